"""The tables of a report on a fine-tuned model (`task_report.py`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from electra_core.metrics import answered, average_precisions, calibration, micro_metrics

WORST = 20  # mistakes shown
TEXT_LENGTH = 240  # characters shown of a text
MANY_LABELS = 20
"""With more labels, only those that occur are shown, the commonest first, and pairs instead of a matrix."""
CONFUSIONS = 15  # pairs shown
THRESHOLDS = (0.01, 0.02, 0.05, *(step / 10 for step in range(1, 10)))


@dataclass(frozen=True)
class Table:
    """A table with named columns; `shaded` tables hold counts, coloured by their share of the row."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    shaded: bool = False
    only_data: bool = False
    """Whether it is too large for a reader, and only in the JSON."""
    shown: int | None = None
    """Number of rows that a reader sees, the first; all are in the JSON. None: all."""

    def to_read(self) -> Table:
        """The table with the rows that a reader sees, and a note if there are others."""
        if self.shown is None or len(self.rows) <= self.shown:
            return self
        note = f"{self.note} The first {self.shown} of {len(self.rows):,}; a .json report has all."
        return replace(self, note=note, rows=self.rows[: self.shown])


def table_of(title: str, note: str, rows: Sequence[dict[str, Any]]) -> Table:
    """A table from rows given as dicts."""
    return Table(title, note, tuple(rows[0]) if rows else (), [tuple(row.values()) for row in rows])


def worst_table(note: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Table:
    """The mistakes, the worst first."""
    return Table("Worst mistakes", note, columns, rows, shown=WORST)


def with_precisions(rows: Sequence[dict[str, Any]], truth: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    """The rows, one for each of C labels, with its average precision; `truth` and `scores` are [N, C]."""
    return [
        row | {"average_precision": float(figure)} for row, figure in zip(rows, average_precisions(truth, scores))
    ]


def calibration_table(confidence: Sequence[float], correct: Sequence[bool], where: str = "") -> Table:
    """How far the model's confidence can be trusted (`metrics.calibration`).

    Args:
        where: what the confidence refers to, if not to one decision per example.
    """
    error, rows = calibration(confidence, correct)
    note = f"Expected calibration error {error:.3f}: mean distance between confidence and accuracy{where}."
    return table_of("Calibration", note, rows)


def answered_table(confidence: Sequence[float], correct: Sequence[bool]) -> Table:
    """Results if the model answers only where it is confident enough (`metrics.answered`)."""
    note = "Answers with at least this score. To choose a threshold here, evaluate on other data."
    return table_of("If only sure answers count", note, answered(confidence, correct))


def thresholds_table(note: str, flags: str, truth: np.ndarray, scores: np.ndarray) -> Table:
    """Precision, recall and F1 over all decisions together, for several thresholds.

    Args:
        note: what the figures are of, a sentence.
        flags: what sets a threshold, which follows them.
        truth: any shape, 0 or 1.
        scores: of the same shape, probabilities.
    """
    rows = [{"threshold": value, **micro_metrics(truth, scores >= value)} for value in THRESHOLDS]
    best = max(rows, key=lambda row: row["f1"])
    advice = (
        f"F1 is best at {flags} {best['threshold']:g}; to choose it for that, evaluate on other data."
        if best["f1"]
        else "None of them finds a label."
    )
    return table_of("Thresholds", f"{note} {advice}", rows)


def label_table(title: str, note: str, rows: Sequence[dict[str, Any]], seen: Collection[int]) -> Table:
    """Figures per label; if there are many, only those seen, sorted by support.

    Args:
        rows: one for each label, with its support.
        seen: indices of the labels that are true or predicted at least once.
    """
    if len(rows) <= MANY_LABELS:
        return table_of(title, note, rows)
    if unseen := len(rows) - len(seen):
        plural = "labels do" if unseen > 1 else "label does"
        note = f"{note} {unseen} {plural} not occur and {'were' if unseen > 1 else 'was'} not predicted.".lstrip()
    shown = sorted((rows[index] for index in sorted(seen)), key=lambda row: -row["support"])
    return table_of(title, note, shown)


def confusions_table(truth: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> Table:
    """The commonest mistakes, for more labels than fit a matrix."""
    pairs = Counter(pair for pair in zip(truth, predicted) if pair[0] != pair[1])
    note = f"{min(CONFUSIONS, len(pairs))} of {len(pairs)} pairs of truth and prediction, the commonest first."
    rows = [(labels[t], labels[p], n) for (t, p), n in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))]
    return Table("Commonest confusions", note, ("truth", "prediction", "count"), rows[:CONFUSIONS])


def short(text: str, length: int = TEXT_LENGTH) -> str:
    """A text on one line, truncated if it is too long."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def text_or_pair(example: Any) -> str:
    """The text of an example, or both texts of a pair."""
    return short(example.text if example.pair is None else f"{example.text} ‖ {example.pair}")
