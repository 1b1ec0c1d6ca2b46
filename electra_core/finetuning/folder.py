"""OUT, the folder of a fine-tuning: the best model and, until training is finished, what `--resume` needs.

OUT/model.safetensors, config.json, ...   the best model so far: a model directory, task.json beside it
OUT/config.toml         the resolved settings
OUT/metrics.jsonl       the log; with several seeds OUT/seed-N/metrics.jsonl
OUT/metrics.json        figures of all seeds, written when training ends
OUT/state.json          whether it runs, and how it ended (`runs/state.py`)
OUT/checkpoints/        training state (`checkpoint.py`); removed when all seeds are done

A resumed run takes the same steps as one that was never stopped: what a step does depends on seed and step only,
and a checkpoint holds everything else, including the evaluations so far.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from electra_core import model_dir
from electra_core.checkpoint import Checkpoint, CheckpointWriter, snapshot
from electra_core.downstream.interface import Task
from electra_core.downstream.task_files import LATER, TASK_FILE, save_task, task_to_json
from electra_core.errors import UserError, option, writing
from electra_core.execution.distributed import Ranks
from electra_core.files.json_files import read_json
from electra_core.files.new_file import write_new
from electra_core.files.toml_files import to_toml
from electra_core.finetuning.card import About, model_card
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.hub.tokenizer_loading import TOKENIZER_FILES
from electra_core.hub.weight_files import SAFETENSORS, weights_digest
from electra_core.labelled_data.columns import Columns, to_json
from electra_core.runs.checkpoint_files import remove_checkpoints
from electra_core.runs.folder import make_run
from electra_core.runs.state import RunState
from electra_core.tasks import TaskModel
from electra_core.tokenizer import Tokenizer

KEPT_CHECKPOINTS = 1
_FOLDERS = ("checkpoints", "tensorboard", "seed-*")
_MODEL = (SAFETENSORS, "config.json", TASK_FILE, "README.md", "tokenizer_config.json", *TOKENIZER_FILES)
"""Files that a fine-tuning writes in OUT, and a new one removes."""
RULES = 4
"""Version of the rules for batches, dropout and heads; a run is resumed only under the rules it began with. In
version 1 an epoch's remainder was its longest examples, weighted like a full batch; in 2 the last layer drew
dropout for all tokens, though only [CLS] was used; in 3 a fine-tuned model's head was kept if it had as many
labels, whatever their names. Whoever raises this adapts the date in `check_identity`."""
FREE = {"log_every", "checkpoint_every", "skip_bad_rows", "metric", "engine"}
"""Settings that may change between a run and its resumption; `metric` because the compared task holds it."""


@dataclass
class Run:
    """One seed's training, and its best evaluation so far."""

    seed: int
    best: float = -np.inf
    best_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures of the best evaluation; empty before the first."""
    last: dict[str, float] = field(default_factory=dict)
    """Figures of the last evaluation: after the last step, unless training was stopped before it."""
    evaluations: int = 0
    best_evaluation: int = 0
    """Number of the first evaluation as good as `best`."""
    steps: int = 0
    seconds: float = 0.0
    """Training time, without the evaluations."""
    tokens: int = 0
    """Number of tokens trained on, counted in every epoch."""
    skipped: int = 0
    """How many of the last steps in a row changed nothing (`StepResult.in_a_row`); set when it is saved."""
    over: bool = False
    """Whether the run has taken all its steps, or was stopped early by `patience`."""


class Keeper:
    """Keeps in OUT the best model of all seeds, and in OUT/checkpoints what is needed to resume.

    Args:
        checkpoint: the one to resume from; None for a new fine-tuning.
        identity: what must match for a checkpoint to be resumed (`identity`).
        about: what the model card says of the training.
        ranks: the processes that train together; all have the same runs, and rank 0 writes.
        saved: called with every checkpoint's step, once it is complete.
    """

    def __init__(
        self, out: Path, checkpoint: Checkpoint | None, identity: dict[str, Any], about: About, ranks: Ranks,
        saved: Callable[[int], None],
    ):  # fmt: skip
        self.out, self.checkpoint, self.identity, self.about, self.ranks = out, checkpoint, identity, about, ranks
        first_step, runs = (checkpoint.step, checkpoint.meta["runs"]) if checkpoint is not None else (0, [])
        self.runs = [Run(**fields) for fields in runs]
        """One for each seed so far, the last being trained; the training loop appends to it."""
        self.writer = ranks.only_first(
            lambda: CheckpointWriter(out / "checkpoints", KEPT_CHECKPOINTS, first_step, saved)
        )

    def offer(self, model: TaskModel, task: Task, tokenizer: Tokenizer) -> None:
        """Saves the model, its seed's best so far, unless an earlier seed's is as good; `task` is rank 0's."""
        if self.best is self.runs[-1]:
            self.ranks.only_first(lambda: self._save_model(model, task, tokenizer))

    @property
    def best(self) -> Run | None:
        """The run whose model OUT holds, the first of equally good ones. None before the first evaluation."""
        return max((run for run in self.runs if run.metrics), key=lambda run: run.best, default=None)

    def _save_model(self, model: TaskModel, task: Task, tokenizer: Tokenizer) -> None:
        run = self.runs[-1]
        card = model_card(model, task, self.about, f"step {run.steps:,} with seed {run.seed}", run.metrics)
        with task.as_saved(model) as saved:
            model_dir.save_pretrained(model, self.out, tokenizer=tokenizer, card=card)
            save_task(saved, self.out)

    def save(self, model: TaskModel, optimizer: torch.optim.Optimizer) -> None:
        """Starts writing a checkpoint, whose number counts the steps of all seeds."""
        self.ranks.together(self.writer.wait)
        meta = {"identity": self.identity, "runs": [asdict(run) for run in self.runs]}
        tensors = snapshot(model, optimizer, keep=self.ranks.first)
        self.writer.save(sum(run.steps for run in self.runs), tensors, meta)

    def restore(self, model: TaskModel, optimizer: torch.optim.Optimizer) -> None:
        """Restores the checkpoint's state, bit for bit."""
        assert self.checkpoint is not None
        self.checkpoint.restore(model, optimizer)

    def remove_checkpoints(self) -> None:
        """Removes the checkpoints, once training is finished."""
        self.ranks.only_first(lambda: remove_checkpoints(self.out / "checkpoints"))


def identity(
    settings: FinetuneSettings, task: Task, directory: Path, data: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """What must match for a checkpoint to be resumed; JSON values.

    Args:
        task: fitted to the training data.
        directory: of the model that training starts from.
        data: fingerprints of the training and the development examples, tokenizer included.
    """
    values = {name: value for name, value in asdict(settings).items() if name not in FREE}
    start = {"weights": weights_digest(directory), "training data": data[0], "development data": data[1]}
    facts = json.loads(json.dumps(task_to_json(task)))
    return {"settings": values, "task": facts, "start": start, "rules": {"batches": RULES}}


def check_identity(checkpoint: Checkpoint, now: dict[str, dict[str, Any]]) -> None:
    """Raises UserError with the differences if a checkpoint is of another fine-tuning than `now`."""
    if "runs" not in checkpoint.meta:
        raise UserError(f"cannot resume {checkpoint.path}: it is not a checkpoint of a fine-tuning run")
    was = checkpoint.meta.get("identity", {})
    if was.get("rules") != now["rules"]:
        raise UserError(
            f"cannot resume {checkpoint.path}: it was begun by a version with other batches, dropout or heads; "
            "finish it with that version, which is from before the changes of 29 November 2026"
        )
    if differences := _differences(was, now):
        raise UserError(f"cannot resume {checkpoint.path}: {differences}")


def _differences(was: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> str:
    """What differs between two identities, in words; "" if nothing does.

    A setting, field or column role that an earlier version lacked counts as being at its default there.
    """
    was, now = ({**facts, "task": LATER | facts["task"]} if "task" in facts else facts for facts in (was, now))
    was = {**was, "settings": {**asdict(FinetuneSettings()), **was.get("settings", {})}}
    if columns := was.get("task", {}).get("columns"):
        was["task"] = {**was["task"], "columns": {**to_json(Columns()), **columns}}
    return "; ".join(
        f"{name} differs" if table == "start" else
        f"{name} was {was.get(table, {}).get(name)!r}, is now {value!r}"
        for table, values in now.items()
        for name, value in values.items()
        if was.get(table, {}).get(name) != value
    )  # fmt: skip


def finished_report(out: Path) -> dict[str, Any] | None:
    """metrics.json of a fine-tuning that was trained to its end; None if there is none."""
    try:
        report = read_json(out / "metrics.json")
        return report if report["settings"] and not report["stopped_by"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_finished(out: Path, report: dict[str, Any], now: dict[str, dict[str, Any]]) -> None:
    """Raises UserError with the differences if a finished fine-tuning (its report) is not the same as `now`.

    One finished under other rules is compared by settings and starting weights only, since that version described
    task and data differently.
    """
    was, then = report.get("identity", {}), now
    if was.get("rules") != now["rules"]:
        then = {"start": {"weights": now["start"]["weights"]}} if "start" in was else {}
    if differences := _differences({**was, "settings": report["settings"]}, {**then, "settings": now["settings"]}):
        raise UserError(f"{out}: holds another finished model; {differences}; {option('overwrite')} replaces it")


def make_out(out: Path, settings: FinetuneSettings, resumed: bool, overwrite: bool) -> RunState:
    """Makes OUT with `make_run` and writes the settings to it.

    With `overwrite` an earlier fine-tuning's model is removed: otherwise it would be the folder's model until the
    first evaluation, or for good if there is none.

    Raises:
        UserError: OUT cannot be made, or another process is training in it.
    """
    state = make_run(out, resumed, _FOLDERS, ("metrics.jsonl", *(_MODEL if overwrite else ())))
    with writing(str(out)):
        (out / "metrics.json").unlink(missing_ok=True)  # it marks a finished training
        write_new(out / "config.toml", to_toml(asdict(settings)))
    return state


def log_folder(out: Path, settings: FinetuneSettings, seed: int) -> Path:
    """The folder of a seed's log: OUT, or with several seeds OUT/seed-N."""
    folder = out if settings.seeds == 1 else out / f"seed-{seed}"
    folder.mkdir(exist_ok=True)
    return folder


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON."""
    write_new(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
