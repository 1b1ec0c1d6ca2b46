"""What a fine-tuning that starts from a fine-tuned model keeps of that model's head.

An output means what its label says, wherever it stands, so outputs are taken over by the labels' names:

    every label is known    the head is kept, its outputs in the order of the task's labels
    some are                their outputs and the layer before are kept; an output of another label is new
    none is                 the whole head is new
    a number (regress)      the head is kept, in the units in which training sees the numbers
    questions, choices      the head is kept; its outputs mean the same whatever the data

A name may differ in case and the like. LABEL_0, LABEL_1, ..., which `transformers` writes where nobody named the
classes, are the classes 0, 1, ... of data that have just such; of others they say nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from electra_core.downstream import Task
from electra_core.errors import UserError
from electra_core.hub_layout import MULTI_LABEL, read_labels
from electra_core.label_cells import look_of
from electra_core.model_dir import load_config
from electra_core.tasks import QuestionAnswerer, SequenceClassifier, TaskModel, TokenClassifier, initialise_head
from electra_core.weight_files import open_weights

SHOWN_LABELS = 5
"""Of so many labels a message gives the names."""
UNNAMED = re.compile(r"LABEL_(\d+)")


@dataclass(frozen=True)
class OldHead:
    """The head in a model's directory, as far as a task can use it."""

    labels: tuple[str, ...]
    """Its outputs' names; empty if they have none, or are one number."""
    rows: tuple[int | None, ...]
    """For each of the task's labels the output to keep; None: it has none. Empty if all are kept as they are."""

    @property
    def is_of_use(self) -> bool:
        """Whether anything of it is kept."""
        return not self.rows or any(row is not None for row in self.rows)


def old_head(task: Task, directory: Path) -> OldHead | None:
    """The head of the task's kind that a model directory holds; None if it has none, or does not name its outputs.

    Args:
        task: fitted to its training data.
    """
    kind = task.model_class
    _, raw = load_config(directory)
    if kind.architecture not in (raw.get("architectures") or [kind.architecture]):
        return None
    outputs = open_weights(directory).shapes.get(f"{_last_layer(kind)}.weight", (0,))[0]
    if not outputs:
        return None
    if not issubclass(kind, SequenceClassifier | TokenClassifier):
        return OldHead((), ())
    try:
        labels = read_labels(raw, str(directory))
    except UserError:
        return None
    if len({*labels}) != outputs or len(labels) != outputs:
        return None
    is_number = issubclass(kind, SequenceClassifier) and outputs == 1 and raw.get("problem_type") != MULTI_LABEL
    if is_number or task.kind == "regress":
        return OldHead((), ()) if is_number and task.kind == "regress" else None
    return OldHead(labels, rows_by_name(labels, task.labels))


def rows_by_name(known: Sequence[str], labels: Sequence[str]) -> tuple[int | None, ...]:
    """For each label its place among those that are known; None for one that is not.

    A name that is there as it is written comes first; then one that looks the same, if only one does.
    """
    known = _numbered(known, labels)
    place = {label: index for index, label in enumerate(known)}
    theirs, ours = _by_look({*known} - {*labels}), _by_look({*labels} - {*known})
    alike = {label: place[theirs[look]] for look, label in ours.items() if look in theirs}
    return tuple(place.get(label, alike.get(label)) for label in labels)


def _numbered(known: Sequence[str], labels: Sequence[str]) -> Sequence[str]:
    """LABEL_0, LABEL_1, ... as 0, 1, ... if the task's labels are such numbers."""
    numbers = [UNNAMED.fullmatch(label) for label in known]
    if {*labels} != {str(index) for index in range(len(labels))}:
        return known
    return [number[1] for number in numbers if number] if all(numbers) else known


def _by_look(labels: Iterable[str]) -> dict[str, str]:
    """Look -> label, of looks that only one has."""
    looks = {label: look_of(label) for label in labels}
    often = Counter(looks.values())
    return {look: label for label, look in looks.items() if often[look] == 1}


def told(task: Task, old: OldHead) -> str:
    """Says what is kept, to stand behind the model's name."""
    if not old.rows:
        return "the head is kept"
    if not old.is_of_use:
        return f"the head is new: it knows {_shown(old.labels)}, none of which is a label of the data"
    new = [label for label, row in zip(task.labels, old.rows) if row is None]
    known = len(task.labels) - len(new)
    gone = [label for row, label in enumerate(old.labels) if row not in old.rows]
    if not new and not gone:
        return "the head is kept: the labels are the same"
    changes = [f"{what} {_shown(labels)}" for what, labels in (("new:", new), ("left out:", gone)) if labels]
    return f"the head is kept for {known} label{'s' if known > 1 else ''}; {'; '.join(changes)}"


def _shown(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - SHOWN_LABELS:,} others" if len(labels) > SHOWN_LABELS else ""
    return f"{', '.join(map(repr, labels[:SHOWN_LABELS]))}{more}"


@torch.no_grad()
def give_head(model: TaskModel, old: OldHead, task: Task, seed: int) -> None:
    """Makes a model that was loaded with its own labels one of the task's, in place; what is new is drawn from
    `seed`, and is what it would be without an old head."""
    if not old.rows:
        task.as_trained(model)
        return
    last: Any = model.get_submodule(_last_layer(type(model)))
    head = {name: value.clone() for name, value in model.named_parameters() if not name.startswith("encoder.")}
    before = {name: head.pop(f"{_last_layer(type(model))}.{name}") for name in ("weight", "bias")}
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


def _last_layer(kind: type[TaskModel]) -> str:
    """The name of the layer whose rows are the outputs."""
    if issubclass(kind, SequenceClassifier):
        return "classifier.out_proj"
    return "qa_outputs" if issubclass(kind, QuestionAnswerer) else "classifier"
