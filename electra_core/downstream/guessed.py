"""Labelled data for a model without task.json, whose task is guessed from config.json, as with most of the Hub.

A task that was trained here knows how its data call the labels. Of a guessed one only `id2label` is known, which
may say POSITIVE, LABEL_1 or PER-B where the data have positive, 1 or B-PER; and nothing says whether a question
may be without an answer. So the data are read as for training, and their labels are then matched with the model's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from electra_core.downstream.classify import Classify, TextTask, as_shown, label_order
from electra_core.downstream.interface import Task, read_all
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag, kind_of, marks_spans, with_kind
from electra_core.errors import UserError, is_on_command_line, listed
from electra_core.labelled_data.label_cells import rows_by_name
from electra_core.labelled_data.labelled import BadRows, labels_in, relabelled
from electra_core.labelled_data.tagged_files import TaggedExample

SHOWN = 5
"""Number of labels that a message names."""
RENAME = "write the data's names into id2label in the model's config.json, if they mean the same"


def no_answer_note(task: Task) -> str | None:
    """Says that a question-answering model cannot answer "no answer", and what allows it; None if it can."""
    if not isinstance(task, Answer) or task.unanswerable:
        return None
    in_python = "predictor.task = replace(predictor.task, unanswerable=True)"
    how = "--threshold 0" if is_on_command_line() else in_python
    return f'without task.json every question gets an answer; "no answer", as in SQuAD 2.0, is allowed by {how}'


def read_guessed(
    task: Task, path: Path | str, *, skip_bad_rows: bool = False
) -> tuple[Task, list[Any], BadRows, str]:
    """Labelled examples for a guessed task, as from `interface.read_all`.

    Returns:
        The task fitted to them, the examples with the model's labels, the rows that were skipped, and a line for
        the user if anything was inferred (otherwise "").

    Raises:
        UserError: as `read_all`; or labels that match none of the model's.
    """
    if isinstance(task, Answer):
        examples, bad = read_all(task, path, skip_bad_rows=skip_bad_rows)
        fitted = task.fitted(examples)
        return fitted, examples, bad, "" if fitted == task else f"{path}: {_allowed_note()}"
    if not isinstance(task, Classify | MultiLabel | Tag):
        return task, *read_all(task, path, skip_bad_rows=skip_bad_rows), ""
    examples, bad = read_all(dataclasses.replace(task, labels=()), path, skip_bad_rows=skip_bad_rows)
    given = dict.fromkeys(label for example in examples for label in _labels_of(example))
    if isinstance(task, MultiLabel) and task.columns.labels:
        given = dict.fromkeys(task.columns.labels)
        _check_columns(task, path)
    names = _span_names(task.labels, given) if _are_spans(task) else _names(task.labels, given)
    known = [example for example in examples if _is_known(task, example, names, path, bad)]
    bad.close(bool(known))
    if not known:
        raise UserError(f"{path}: no usable row ({bad.first[0]}){bad.way_out()}")
    told = {_shown_label(task, label): _shown_label(task, name) for label, name in names.items() if label != name}
    line = f"{path}: labels matched with the model's: {_pairs(told)}" if told else ""
    return task, [_renamed(example, names) for example in known], bad, line


def _check_columns(task: MultiLabel, path: Path | str) -> None:
    """Raises UserError if the labels' own columns are not those of the model's labels."""
    columns = task.columns.labels or ()
    matched = _names(task.labels, columns)
    if len(matched) < len(columns) or {*matched.values()} != {*task.labels}:
        raise UserError(
            f"{path}: expected one column per label of the model ({', '.join(task.labels)}), got "
            f"{', '.join(columns)}"
        )


def _allowed_note() -> str:
    where = "predict --threshold" if is_on_command_line() else "null_threshold of the model's task"
    return f'holds questions without an answer, so "no answer" is possible here; best_f1_threshold is for {where}'


def _labels_of(example: Any) -> Sequence[str]:
    return example.tags or () if isinstance(example, TaggedExample) else labels_in(example)


def _are_spans(task: Task) -> bool:
    return isinstance(task, Tag) and marks_spans(task.labels)


def _names(known: Sequence[str], labels: Iterable[str]) -> dict[str, str]:
    """Label of the data -> the model's, for those that have one: by name, or as another form of a number."""
    labels = sorted(labels, key=label_order)
    shown = as_shown(known)
    names = {}
    for label, row in zip(labels, rows_by_name(known, labels, may_be_others=True)):
        if row is not None:
            names[label] = known[row]
        elif shown(label) in known:
            names[label] = shown(label)
    return names


def _span_names(known: Sequence[str], tags: Iterable[str]) -> dict[str, str]:
    """Tag of the data in IOB2 -> the same mark with the model's type. (The model may have no B-X: IOB1.)"""
    tags = list(tags)
    kinds, given = (
        list(dict.fromkeys(kind for tag in some if (kind := kind_of(tag)) is not None)) for some in (known, tags)
    )
    names = _names(kinds, given)
    return {
        tag: with_kind(tag, names.get(kind_of(tag) or "")) for tag in tags if tag == "O" or kind_of(tag) in names
    }


def _is_known(task: Task, example: Any, names: Mapping[str, str], path: Path | str, bad: BadRows) -> bool:
    """Whether the model has all labels of an example; if not, it becomes a bad row."""
    unknown = next((label for label in _labels_of(example) if label not in names), None)
    if unknown is None:
        return True
    place = example.line if isinstance(task, Tag) else example.place
    hint = task.header_hint(path, example) if isinstance(task, TextTask) else ""
    more = ", ..." if len(task.labels) > 2 * SHOWN else ""
    known = f"{', '.join(task.labels[: 2 * SHOWN])}{more}"
    bad.add(place, f"the label is not one of the model's ({unknown!r}; known: {known}{hint})")
    if {*names} <= {"O"}:  # a single unknown label among others is rather a mistake
        bad.ways_out[RENAME] = None
    return False


def _renamed(example: Any, names: Mapping[str, str]) -> Any:
    """The example with the model's names for its labels."""
    if isinstance(example, TaggedExample):
        return dataclasses.replace(example, tags=tuple(names[tag] for tag in example.tags or ()))
    return relabelled(example, names.__getitem__)


def _shown_label(task: Task, label: str) -> str:
    """The label for a message; of a span its type."""
    return (kind_of(label) or label) if _are_spans(task) else label


def _pairs(told: Mapping[str, str]) -> str:
    return listed([f"{label!r} is {name!r}" for label, name in told.items()], SHOWN)
