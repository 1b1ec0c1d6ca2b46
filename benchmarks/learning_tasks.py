"""The tasks by which the learning study judges a pre-trained encoder.

Training sets are cut to a size that fits the budget (the same examples for every model, drawn with a fixed seed).
Learning rates are chosen by other rows of the training data ("tune"), never by the dev set that the study reports.
The score of a fine-tuning is that of its last evaluation: no epoch is selected by its dev score.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from electra_core.corpora.docstrings import Example, documents, labelled_task
from electra_core.downstream.classify import Classify
from electra_core.downstream.named_tasks import choose_task, find_task
from electra_core.errors import UserError
from electra_core.finetune import finetune
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.runs.metrics_log import read_metrics

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class StudyTask:
    """A task: where its data are, how much of them is used, and how it is trained."""

    folder: str
    """Folder below $ELECTRA_DATA; empty: the data are made from the docstrings on this machine."""
    metric: str
    train_examples: int
    dev_examples: int
    epochs: float
    header: bool = True
    """Whether the files' first line names the columns."""
    unit: str = "line"
    """What an example is: "line" or "sentence" (the lines up to an empty one)."""


TASKS = {
    "conll-2003": StudyTask("conll2003", "f1", 2000, 600, 3, header=False, unit="sentence"),
    "sst-2": StudyTask("glue/SST-2", "accuracy", 4000, 872, 3),
    "cola": StudyTask("glue/CoLA", "mcc", 4000, 1043, 3, header=False),
    "mrpc": StudyTask("glue/MRPC", "accuracy", 2000, 408, 3),
    "docstrings": StudyTask("", "accuracy", 768, 1200, 10),
}


def data_folder() -> Path:
    """$ELECTRA_DATA, or the folder beside the project."""
    return Path(os.environ.get("ELECTRA_DATA", ROOT.parent / "shared" / "data"))


def available(task: str) -> bool:
    """Whether the task's files are here."""
    return not TASKS[task].folder or (data_folder() / TASKS[task].folder).is_dir()


def task_files(task: str, work: Path, judged_by: str = "dev") -> tuple[Path, Path]:
    """Training file and evaluation file ("dev" or "tune"), cut to size; made in `work` on first use.

    Raises:
        UserError: the data are missing.
    """
    study = TASKS[task]
    folder = work / "tasks" / task
    if not folder.exists():
        scratch = folder.with_name(f"{task}.new")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        _write_docstrings(scratch) if not study.folder else _write_subsets(task, study, scratch)
        scratch.rename(folder)
    train, judge = (next(folder.glob(f"{split}.*")) for split in ("train", judged_by))
    return train, judge


def _write_subsets(task: str, study: StudyTask, folder: Path) -> None:
    named, source = find_task(task), data_folder() / study.folder
    if named is None or not source.is_dir():
        raise UserError(f"{source}: the data of {task} are not here; set ELECTRA_DATA")
    separator = "\n" if study.unit == "line" else "\n\n"
    counts = {
        "train": {"train": study.train_examples, "tune": study.dev_examples},
        "dev": {"dev": study.dev_examples},
    }
    for split, parts in counts.items():
        file = Path(named.find(source, split))
        rows = file.read_text(encoding="utf-8").rstrip("\n").split(separator)
        head, rows = (rows[:1], rows[1:]) if study.header else ([], rows)
        drawn = random.Random(0).sample(range(len(rows)), len(rows))
        for part, count in parts.items():
            kept, drawn = sorted(drawn[:count]), drawn[count:]
            lines = separator.join(head + [rows[index] for index in kept]) + "\n"
            (folder / f"{part}{file.suffix}").write_text(lines, encoding="utf-8")


def _write_docstrings(folder: Path) -> None:
    task = labelled_task(list(documents()), longest=280)
    half = len(task.dev) // 2
    splits: dict[str, Sequence[Example]] = {"train": task.train, "dev": task.dev[:half], "tune": task.dev[half:]}
    for split, examples in splits.items():
        rows = (json.dumps({"text": example.text, "label": example.label}) for example in examples)
        (folder / f"{split}.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")


def judge(
    model: Path, task: str, seed: int, changes: dict[str, Any], work: Path, clock: Callable[[], float],
    judged_by: str = "dev",
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune `model` once.

    Args:
        changes: settings that differ from the recipe's.
        work: folder for the task's data and a temporary model.
        clock: returns seconds; of the processor on a CPU.
        judged_by: "dev" or "tune".

    Returns:
        The metric, its last value, and the seconds that it took.
    """
    study, (train, dev) = TASKS[task], task_files(task, work, judged_by)
    kind = Classify() if not study.folder else choose_task(task)[0]
    settings = FinetuneSettings(**{"epochs": study.epochs, "seed": seed, **changes})
    out = work / "finetuned"
    shutil.rmtree(out, ignore_errors=True)
    begin, wall = clock(), time.monotonic()
    report = finetune(model, kind, train, dev, out, settings, quiet=True, say=lambda line: None)
    if report["stopped_by"]:
        raise SystemExit(f"stopped by {report['stopped_by']}; what this fine-tuning reached is left out")
    rows = [row for row in read_metrics(out / "metrics.jsonl") if f"dev_{study.metric}" in row]
    return {
        "metric": study.metric,
        "value": rows[-1][f"dev_{study.metric}"],
        "seconds": round(clock() - begin, 1),
        "wall_seconds": round(time.monotonic() - wall, 1),
    }
