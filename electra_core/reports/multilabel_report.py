"""The tables of a multi-label model's report: what it gets right and wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from electra_core.downstream.multilabel import MultiLabel
from electra_core.labelled_data.labelled import MultiLabelExample
from electra_core.metrics import average_precisions, multilabel_f1, per_label_metrics
from electra_core.reports.report_tables import WORST, Table, calibration_table, label_table, table_of, text_or_pair

THRESHOLDS = (0.01, 0.02, 0.05, *(step / 10 for step in range(1, 10)))


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
        _thresholds(truth, scores),
        calibration_table(sure.tolist(), right.tolist(), " over all labels of all texts"),
        _worst(task, examples, truth, predicted, scores),
    ]


def _thresholds(truth: np.ndarray, scores: np.ndarray) -> Table:
    rows = [{"threshold": value, **multilabel_f1(truth, scores >= value)} for value in THRESHOLDS]
    best = max(rows, key=lambda row: row["f1"])
    advice = (
        f"F1 is best at --threshold {best['threshold']:g}; to choose it for that, evaluate on other data."
        if best["f1"]
        else "None of them finds a label."
    )
    return table_of("Thresholds", f"Over all labels together (micro). {advice}", rows)


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
        for n in sorted(wrong.tolist(), key=lambda n: -far[n])[:WORST]
    ]
    note = (
        f"{len(wrong)} of {len(examples)} texts miss a label or have one too many; the largest error "
        "of a label's probability first."
    )
    return Table("Worst mistakes", note, ("line", "missing", "too many", "off by", "text"), rows)
