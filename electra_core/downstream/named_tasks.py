"""The named tasks: GLUE, IMDb, CoNLL-2003, SQuAD.

Each name stands for files, columns, label names, metric and the hyper-parameters that differ from the defaults
(the recipe of google-research/electra, `finetune/` and `configure_finetuning.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from electra_core.downstream.choices import Choose
from electra_core.downstream.classify import Classify, Regress
from electra_core.downstream.interface import Task
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag
from electra_core.downstream.task_files import KINDS
from electra_core.errors import UserError, option, writing
from electra_core.labelled_data.columns import Columns, TrainedColumns, for_another_file, with_given


@dataclass(frozen=True)
class NamedTask:
    """A task with its files and hyper-parameters."""

    name: str
    """Name of the data set."""
    task: Task
    train: tuple[str, ...]
    """Possible names of the training file in the data set's folder."""
    dev: tuple[str, ...]
    """The same for the development file."""
    test: tuple[str, ...] = ()
    """The same for the test file, which is predicted for a submission."""
    epochs: float = 3.0
    """Passes over the training data."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other `finetune.FinetuneSettings` of the task."""
    submission: str = ""
    """Name of the task's file in a GLUE submission."""

    def find(self, folder: Path | str, split: str) -> Path:
        """The file of a split ("train", "dev", "test") in the data set's folder.

        Raises:
            UserError: there is no such file.
        """
        names: tuple[str, ...] = getattr(self, split)
        found = next((Path(folder) / name for name in names if (Path(folder) / name).exists()), None)
        if found is None:
            raise UserError(f"{folder}: expected {self.name}'s {split} file: {' or '.join(names) or 'none'}")
        return found


def _classes(*pairs: tuple[str, str], **more: Any) -> Classify:
    return Classify(labels=tuple(shown for _, shown in pairs), label_names=pairs, **more)


_BINARY_ENTAILMENT = (("entailment", "entailment"), ("not_entailment", "not_entailment"))
_MNLI = Classify(
    labels=("contradiction", "entailment", "neutral"),
    columns=Columns("sentence1", "sentence2", "gold_label"),
)
_TSV: dict[str, Any] = {"train": ("train.tsv",), "dev": ("dev.tsv",), "test": ("test.tsv",)}

NAMED: dict[str, NamedTask] = {
    task.name.lower(): task
    for task in (
        NamedTask(
            "CoLA",
            _classes(
                ("0", "unacceptable"), ("1", "acceptable"), metric="mcc",
                columns=Columns(("sentence", "4"), None, ("label", "2")),  # only the test file has a header
            ),
            **_TSV, submission="CoLA.tsv",
        ),
        NamedTask(
            "SST-2",
            _classes(("0", "negative"), ("1", "positive"), columns=Columns("sentence", None, "label")),
            **_TSV, submission="SST-2.tsv",
        ),
        NamedTask(
            "MRPC",
            _classes(
                ("0", "different"), ("1", "equivalent"), both_orders=True,
                columns=Columns("#1 String", "#2 String", "Quality"),
            ),
            **_TSV, submission="MRPC.tsv",
        ),
        NamedTask(
            "STS-B",
            Regress(columns=Columns("sentence1", "sentence2", "score"), scale=5.0, both_orders=True),
            **_TSV, epochs=10.0, submission="STS-B.tsv",
        ),
        NamedTask(
            "QQP",
            _classes(
                ("0", "different"), ("1", "duplicate"),
                columns=Columns("question1", "question2", "is_duplicate"),
            ),
            **_TSV, settings={"skip_bad_rows": True}, submission="QQP.tsv",  # its files hold a few broken rows
        ),
        NamedTask(
            "MNLI", _MNLI, ("train.tsv",), ("dev_matched.tsv",), ("test_matched.tsv",), submission="MNLI-m.tsv"
        ),
        NamedTask(
            "MNLI-mm", _MNLI, ("train.tsv",), ("dev_mismatched.tsv",), ("test_mismatched.tsv",),
            submission="MNLI-mm.tsv",
        ),
        NamedTask(
            "QNLI",
            _classes(*_BINARY_ENTAILMENT, columns=Columns("question", "sentence", "label")),
            **_TSV, submission="QNLI.tsv",
        ),
        NamedTask(
            "RTE",
            _classes(*_BINARY_ENTAILMENT, columns=Columns("sentence1", "sentence2", "label")),
            **_TSV, epochs=10.0, submission="RTE.tsv",
        ),
        NamedTask(
            "WNLI",
            _classes(
                ("0", "not_entailment"), ("1", "entailment"), columns=Columns("sentence1", "sentence2", "label")
            ),
            **_TSV, submission="WNLI.tsv",
        ),
        NamedTask(
            "IMDb",
            Classify(
                labels=("neg", "pos"), label_names=(("0", "neg"), ("1", "pos")), max_length=512,
                columns=Columns("text", None, "label"),
            ),
            ("train.jsonl.xz", "train.jsonl", "train.parquet", "train"),
            ("test.jsonl.xz", "test.jsonl", "test.parquet", "test"),
            ("test.jsonl.xz", "test.jsonl", "test.parquet", "test"),
        ),
        NamedTask("CoNLL-2003", Tag(), ("eng.train",), ("eng.testa",), ("eng.testb",)),
        NamedTask(
            "SQuAD", Answer(), ("train-v1.1.json", "train-v1.1.subset.json"),
            ("dev-v1.1.json", "dev-v1.1.rebuilt.json"), epochs=2.0,
        ),
        NamedTask(
            "SQuAD2", Answer(unanswerable=True), ("train-v2.0.json",),
            ("dev-v2.0.json", "dev-v2.0.rebuilt.json"), epochs=2.0,
        ),
    )
}  # fmt: skip
_ALIASES = {
    "sst2": "sst-2", "stsb": "sts-b", "sts": "sts-b", "mnli-m": "mnli", "conll": "conll-2003",
    "conll2003": "conll-2003", "squad1": "squad", "squad-2": "squad2",
}  # fmt: skip


def find_task(name: str) -> NamedTask | None:
    """The named task, in any case; None for the kinds (classify, tag, ...), which have no files.

    Raises:
        UserError: neither a task nor a kind (the message suggests the nearest name).
    """
    wanted = _ALIASES.get(name.lower(), name.lower())
    if wanted in KINDS:
        return None
    if wanted in NAMED:
        return NAMED[wanted]
    known = [*KINDS, *(task.name for task in NAMED.values())]
    close = difflib.get_close_matches(wanted, [name.lower() for name in known], n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise UserError(f"task: expected one of {', '.join(known)}, got {name!r}{hint}")


def choose_task(name: str, columns: Columns | None = None) -> tuple[Task, dict[str, Any]]:
    """The task for a name or a kind, with the user's columns if any are given.

    Returns:
        The task, and those of its `FinetuneSettings` that differ from the defaults.

    Raises:
        UserError: neither a task nor a kind; or columns given for questions, whose fields have fixed names, for a
            second text in tagging or multiple choice, or for several labels in a task with one.
    """
    named = find_task(name)
    task = KINDS[name.lower()]() if named is None else named.task
    if columns is not None and columns != Columns():
        task = _with_columns(task, with_given(_checked_columns(task, name, columns), columns))
    if named is None:
        return task, {"epochs": 2.0} if task.kind == "qa" else {}
    return task, {"epochs": named.epochs, **named.settings}


def for_reading(task: Task, given: Columns, form: str = "") -> Task:
    """A fine-tuned task set up to read another file: by the columns `given`, for the others by those of its
    training file or, if these are missing, the usual ones.

    Args:
        form: the file's format, whatever its name (`files.row_files.FORMS`).

    Raises:
        UserError: as `choose_task` for columns; or a form is given for tagging or questions.
    """
    columns = getattr(task, "columns", None)
    if form and (columns is None or isinstance(task, Tag)):
        raise UserError(f"--input-format: no effect with {task.kind}, where the file's name tells its format")
    if given == Columns() and not form and (columns is None or isinstance(columns, TrainedColumns)):
        return task
    return _with_columns(task, for_another_file(_checked_columns(task, task.kind, given), given, form))


def _checked_columns(task: Task, name: str, given: Columns) -> Columns:
    """The task's columns; UserError if those given have no effect on it."""
    if given.pair is not None and isinstance(task, Tag | Choose):
        raise UserError(f"--text-pair-column: no effect with {name}, whose files have no second text")
    if not hasattr(task, "columns"):
        raise UserError(
            f"{name}: takes no columns or encoding; its files have the fields question, context and answers, in "
            "UTF-8"
        )
    if (given.labels or given.separator) and not isinstance(task, MultiLabel):
        flag = "--label-columns" if given.labels else "--label-separator"
        raise UserError(f"{flag}: no effect with {name}, only with multilabel")
    return task.columns


def _with_columns(task: Task, columns: Columns) -> Task:
    return dataclasses.replace(task, columns=columns)  # type: ignore[type-var]


def submitted_task(name: str) -> NamedTask:
    """The named task that predictions are submitted for.

    Raises:
        UserError: the task has no GLUE submission.
    """
    named = find_task(name)
    if named is None or not named.submission:
        with_one = ", ".join(task.name for task in NAMED.values() if task.submission)
        raise UserError(f"{option('submission')}: expected one of {with_one}, got {name!r}")
    return named


def write_submission(name: str, predictions: Iterable[dict[str, Any]], folder: Path | str) -> Path:
    """Writes predictions for a GLUE test file, in its order, in gluebenchmark.com's format.

    Returns:
        The file, `index<tab>prediction` per line, labels as in the training file. It appears only when complete.

    Raises:
        UserError: the task has no GLUE submission, or the folder cannot be written.
    """
    named = submitted_task(name)
    written = {shown: raw for raw, shown in getattr(named.task, "label_names", ())}
    path = Path(folder) / named.submission
    unfinished = path.with_name(path.name + ".unfinished")
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(unfinished, "w", encoding="utf-8") as file:
                file.write("index\tprediction\n")
                for index, prediction in enumerate(predictions):
                    file.write(f"{index}\t{_submitted(prediction, written)}\n")
            return unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def _submitted(prediction: dict[str, Any], written: dict[str, str]) -> str:
    if "value" in prediction:
        return f"{min(5.0, max(0.0, prediction['value'])):.3f}"
    return written.get(prediction["label"], prediction["label"])
