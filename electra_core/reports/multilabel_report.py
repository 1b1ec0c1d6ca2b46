"""The tables of a multi-label model's report: what it gets right and wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from electra_core.downstream.multilabel import MultiLabel
from electra_core.labelled_data.labelled import MultiLabelExample
from electra_core.metrics import average_precisions, per_label_metrics
from electra_core.reports.report_tables import (
    WORST,
    Table,
    calibration_table,
    label_table,
    text_or_pair,
    thresholds_table,
)


def multilabel_tables(
    task: MultiLabel, examples: Sequence[MultiLabelExample], predictions: Sequence[dict[str, Any]]
) -> list[Table]:
    """Figures per label and per threshold, calibration of the individual decisions, worst mistakes."""
    truth, predicted, scores = task.matrices(examples, predictions)
    sure = np.maximum(scores, 1 - scores).ravel()
    right = ((scores >= 0.5) == truth).ravel()
    note = f"At a threshold of {task.threshold:g}; average precision needs none."
    ranked = zip(per_label_metrics(truth, predicted, task.labels), average_precisions(truth, scores))
    rows = [row | {"average_precision": float(figure)} for row, figure in ranked]
    seen = np.flatnonzero((truth | predicted).any(axis=0)).tolist()
    return [
        label_table("Per label", note, rows, seen),
        thresholds_table("Over all labels together (micro).", "--threshold", truth, scores),
        calibration_table(sure.tolist(), right.tolist(), " over all labels of all texts"),
        _worst(task, examples, truth, predicted, scores),
    ]


def _worst(
    task: MultiLabel,
    examples: Sequence[MultiLabelExample],
    truth: np.ndarray,
    predicted: np.ndarray,
    scores: np.ndarray,
) -> Table:
    """Texts with a wrong decision, the most confident mistakes first."""
    wrong = np.flatnonzero((truth != predicted).any(axis=1))
    far = np.where(truth != predicted, np.abs(truth - scores), 0.0).max(axis=1)

    def names(marks: np.ndarray) -> str:
        return ", ".join(label for label, mark in zip(task.labels, marks) if mark)

    rows = [
        (
            examples[n].place,
            names(truth[n] > predicted[n]),
            names(predicted[n] > truth[n]),
            float(far[n]),
            text_or_pair(examples[n]),
        )
        for n in sorted(wrong.tolist(), key=lambda n: -far[n])
    ]
    note = (
        f"{len(wrong)} of {len(examples)} texts miss a label or have one too many; the largest error "
        "of a label's probability first."
    )
    return Table("Worst mistakes", note, ("line", "missing", "too many", "off by", "text"), rows, shown=WORST)
