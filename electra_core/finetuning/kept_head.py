"""Decides what a fine-tuning that starts from a fine-tuned model keeps of that model's head.

An output means what its label says, whatever its position, so outputs are matched by the labels' names:

    every label is known    the head is kept, its outputs in the order of the task's labels
    some are                their outputs and the layer before are kept; the outputs of new labels are new
    none is                 the whole head is new
    a number (regress)      the head is kept, rescaled to the units of the training targets
    questions, choices      the head is kept; its outputs mean the same whatever the data

Names may differ in case and the like. LABEL_0, LABEL_1, ..., which `transformers` writes for unnamed classes,
match the classes 0, 1, ... of data with just such labels, and no others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from electra_core.downstream.classify import Regress
from electra_core.downstream.interface import Task
from electra_core.downstream.tagging import as_iob
from electra_core.downstream.task_files import TASK_FILE, task_from_json
from electra_core.errors import UserError, listed
from electra_core.hub.folder_files import read_json_object
from electra_core.hub.layout import MULTI_LABEL, REGRESSION, read_labels
from electra_core.hub.meta_models import on_meta
from electra_core.hub.weight_files import open_weights
from electra_core.labelled_data.label_cells import rows_by_name
from electra_core.model_dir import load_config
from electra_core.tasks import SequenceClassifier, TaskModel, TokenClassifier, initialise_head

SHOWN_LABELS = 5
"""Number of labels that a message names."""


@dataclass(frozen=True)
class OldHead:
    """The part of a saved model's head that a task can use."""

    labels: tuple[str, ...]
    """The outputs' names; empty if they have none, or if the only output is a number."""
    rows: tuple[int | None, ...]
    """For each of the task's labels the output to keep; None: a new one. Empty if all are kept as they are."""
    units: tuple[float, float] = (0.0, 1.0)
    """Offset and scale that make the only output, if it is a number, one as in the data. Other than 0 and 1 in
    folders from before 28 November 2026, whose last layer holds neither."""

    @property
    def is_of_use(self) -> bool:
        """Whether anything of the head is kept."""
        return not self.rows or any(row is not None for row in self.rows)


def old_head(task: Task, directory: Path) -> OldHead | None:
    """The head in a model directory, if it is of the task's kind; None if there is none or its outputs lack names.

    Args:
        task: fitted to its training data.
    """
    kind = task.model_class
    config, raw = load_config(directory)
    if kind.architecture not in (raw.get("architectures") or [kind.architecture]):
        return None
    outputs = open_weights(directory).shapes.get(f"{kind.output_layer}.weight", (0,))[0]
    if not outputs:
        return None
    if not issubclass(kind, SequenceClassifier | TokenClassifier):
        return OldHead((), ())
    last = dict(on_meta(kind, config, task.labels).named_modules()).get(kind.output_layer)
    if getattr(last, "out_features", 0) != len(task.labels):  # a class of the user's own with another head
        return None
    try:
        labels = read_labels(raw, str(directory))
    except UserError:
        return None
    if len(labels) != outputs or (raw.get("problem_type") == REGRESSION and outputs > 1):
        return None
    if issubclass(kind, TokenClassifier):
        labels = as_iob(labels)
    is_number = issubclass(kind, SequenceClassifier) and outputs == 1 and raw.get("problem_type") != MULTI_LABEL
    if is_number or task.kind == "regress":
        return OldHead((), (), _units(directory)) if is_number and task.kind == "regress" else None
    return OldHead(labels, rows_by_name(labels, task.labels))


def told(task: Task, old: OldHead) -> str:
    """Says what is kept, to follow the model's name in a message."""
    if not old.rows:
        return "the head is kept"
    if not old.is_of_use:
        names = listed([*map(repr, old.labels)], SHOWN_LABELS)
        return f"the head is new: it knows {names}, none of which is a label of the data"
    new = [label for label, row in zip(task.labels, old.rows) if row is None]
    known = len(task.labels) - len(new)
    gone = [label for row, label in enumerate(old.labels) if row not in old.rows]
    if not new and not gone:
        return "the head is kept: the labels are the same"
    changes = [
        f"{what} {listed([*map(repr, labels)], SHOWN_LABELS)}"
        for what, labels in (("new:", new), ("left out:", gone))
        if labels
    ]
    return f"the head is kept for {known} label{'s' if known > 1 else ''}; {'; '.join(changes)}"


@torch.no_grad()
def give_head(model: TaskModel, old: OldHead, task: Task, seed: int) -> None:
    """Converts a model loaded with its own labels to the task's labels, in place; new weights are drawn from
    `seed`, and are those of an entirely new head."""
    if not old.rows:
        if isinstance(task, Regress):
            offset, scale = old.units
            task = replace(task, offset=(task.offset - offset) / scale, scale=task.scale / scale)
        task.as_trained(model)
        return
    last: Any = model.get_submodule(model.output_layer)
    head = {name: value.clone() for name, value in model.named_parameters() if not name.startswith("encoder.")}
    before = {name: head.pop(f"{model.output_layer}.{name}") for name in ("weight", "bias")}
    last.out_features = len(task.labels)
    last.weight = nn.Parameter(last.weight.new_empty(last.out_features, last.in_features))
    last.bias = nn.Parameter(last.bias.new_empty(last.out_features))
    model.labels = task.labels
    initialise_head(model, seed)
    if old.is_of_use:
        for name, value in head.items():
            model.get_parameter(name).copy_(value)
    for place, row in enumerate(old.rows):
        if row is not None:
            last.weight[place], last.bias[place] = before["weight"][row], before["bias"][row]


def _units(directory: Path) -> tuple[float, float]:
    """Offset and scale of a regression's folder."""
    if not (directory / TASK_FILE).exists():
        return 0.0, 1.0
    fields = read_json_object(directory, TASK_FILE)
    if fields.get("kind") != Regress.kind:
        return 0.0, 1.0
    task = task_from_json(fields, str(directory / TASK_FILE))
    assert isinstance(task, Regress)
    return task.offset, task.scale
