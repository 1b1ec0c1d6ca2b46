"""The tables of a multi-label model's report: what it gets right and wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from electra_core.downstream.multilabel import MultiLabel
from electra_core.labelled_data.labelled import MultiLabelExample
from electra_core.metrics import per_label_metrics
from electra_core.predict import Evaluation
from electra_core.reports.report_tables import (
    Table,
    calibration_table,
    label_table,
    text_or_pair,
    thresholds_table,
    with_precisions,
    worst_table,
)


def multilabel_tables(evaluation: Evaluation) -> list[Table]:
    """Figures per label and per threshold, calibration of the individual decisions, worst mistakes."""
    task = evaluation.task
    assert isinstance(task, MultiLabel)
    truth, predicted, scores = task.matrices(evaluation.examples, evaluation.predictions)
    sure = np.maximum(scores, 1 - scores).ravel()
    right = ((scores >= 0.5) == truth).ravel()
    note = f"At a threshold of {task.threshold:g}; average precision needs none."
    rows = with_precisions(per_label_metrics(truth, predicted, task.labels), truth, scores)
    seen = np.flatnonzero((truth | predicted).any(axis=0)).tolist()
    return [
        label_table("Per label", note, rows, seen),
        thresholds_table("Over all labels together (micro).", "--threshold", truth, scores),
        calibration_table(sure.tolist(), right.tolist(), " over all labels of all texts"),
        _worst(task.labels, evaluation.examples, truth, predicted, scores),
    ]


def _worst(
    labels: Sequence[str],
    examples: Sequence[MultiLabelExample],
    truth: np.ndarray,
    predicted: np.ndarray,
    scores: np.ndarray,
) -> Table:
    """Texts with a wrong decision, the most confident mistakes first."""
    wrong = np.flatnonzero((truth != predicted).any(axis=1))
    far = np.where(truth != predicted, np.abs(truth - scores), 0.0).max(axis=1)

    def names(marks: np.ndarray) -> str:
        return ", ".join(label for label, mark in zip(labels, marks) if mark)

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
    return worst_table(note, ("line", "missing", "too many", "off by", "text"), rows)
