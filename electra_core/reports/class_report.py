"""The tables of a classifier's report: what it gets right and wrong."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import numpy as np

from electra_core.downstream.interface import Task
from electra_core.metrics import confusion_matrix, per_class_metrics
from electra_core.predict import Evaluation
from electra_core.reports.report_tables import (
    MANY_LABELS,
    Table,
    answered_table,
    calibration_table,
    confusions_table,
    label_table,
    text_or_pair,
    thresholds_table,
    with_precisions,
    worst_table,
)


def class_tables(evaluation: Evaluation) -> list[Table]:
    """Figures per class, confusions, thresholds of two classes, calibration, sure answers, worst mistakes."""
    labels, predictions = evaluation.task.labels, evaluation.predictions
    truth = [labels.index(example.label) for example in evaluation.examples]
    predicted = [labels.index(prediction["label"]) for prediction in predictions]
    scores = np.array([[prediction["scores"][label] for label in labels] for prediction in predictions])
    marks = np.equal.outer(truth, range(len(labels)))
    rows = with_precisions(per_class_metrics(truth, predicted, labels), marks, scores)
    sure, right = [p["score"] for p in predictions], np.equal(truth, predicted).tolist()
    return [
        label_table("Per class", _at_a_threshold(evaluation.task), rows, {*truth, *predicted}),
        *_confusions(truth, predicted, labels),
        *_thresholds(evaluation.task, marks, scores),
        calibration_table(sure, right),
        answered_table(sure, right),
        _worst(evaluation),
    ]


def _confusions(truth: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> list[Table]:
    """The confusion matrix; with many labels it is only for programs, and the commonest pairs are added."""
    counts, many = confusion_matrix(truth, predicted, len(labels)), len(labels) > MANY_LABELS
    rows = [(label, *row) for label, row in zip(labels, counts)]
    note, columns = "Rows are the truth, columns the prediction.", ("truth", *labels)
    matrix = Table("Confusion", note, columns, rows, shaded=True, only_data=many)
    return [matrix, confusions_table(truth, predicted, labels)] if many else [matrix]


def _at_a_threshold(task: Task) -> str:
    """A note on how the classes were chosen; "" if by the larger score."""
    threshold = getattr(task, "threshold", None)
    if threshold is None:
        return ""
    return f"At a threshold of {threshold:g} for {task.positive!r}; average precision needs none."


def _thresholds(task: Task, marks: np.ndarray, scores: np.ndarray) -> list[Table]:
    """Of two classes that both occur, figures for thresholds of one's score: of the positive one if the user has
    chosen it, otherwise of the rarer (the second, if they are equally frequent).

    Args:
        marks: [N, C], whether it is the example's class.
        scores: [N, C].
    """
    counts = marks.sum(axis=0)
    if not task.positive or not counts.all():
        return []
    chosen = getattr(task, "positive_class", "")
    place = task.labels.index(chosen) if chosen else 0 if counts[0] < counts[1] else 1
    label = task.labels[place]
    note = f"Of {label!r}, if all texts that score at least this for it count as {label!r}."
    flags = "--threshold" if label == task.positive else f"--positive-class {shlex.quote(label)} --threshold"
    return [thresholds_table(note, flags, marks[:, place], scores[:, place])]


def _worst(evaluation: Evaluation) -> Table:
    rows = [
        (e.place, e.label, p["label"], p["score"], text_or_pair(e))
        for e, p in zip(evaluation.examples, evaluation.predictions)
        if e.label != p["label"]
    ]
    rows.sort(key=lambda row: -row[3])
    note = f"{len(rows)} of {len(evaluation.examples)} are wrong; most confident first."
    return worst_table(note, ("line", "truth", "prediction", "score", "text"), rows)
