"""The tables that a report on a fine-tuned model is made of (`task_report.py`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from electra_core.metrics import answered, calibration

WORST = 20  # mistakes that are shown
TEXT_LENGTH = 240  # characters of a text that are shown
MANY_LABELS = 20
"""Of more, only those that occur are shown, the commonest first, and pairs instead of a matrix."""
CONFUSIONS = 15  # pairs that are shown


@dataclass(frozen=True)
class Table:
    """Named columns; `shaded` tables are counts, coloured by their share of the row."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    shaded: bool = False
    only_data: bool = False
    """Too large to be read: it stands in the JSON only."""


def table_of(title: str, note: str, rows: Sequence[dict[str, Any]]) -> Table:
    """A table of rows that name their cells."""
    return Table(title, note, tuple(rows[0]) if rows else (), [tuple(row.values()) for row in rows])


def calibration_table(confidence: Sequence[float], correct: Sequence[bool], where: str = "") -> Table:
    """How far the model's confidence can be trusted (`metrics.calibration`).

    Args:
        where: of what it is the confidence, if not of one decision an example.
    """
    error, rows = calibration(confidence, correct)
    note = f"Expected calibration error {error:.3f}: mean distance between confidence and accuracy{where}."
    return table_of("Calibration", note, rows)


def answered_table(confidence: Sequence[float], correct: Sequence[bool]) -> Table:
    """What a model would get that answers only where it is sure enough (`metrics.answered`)."""
    note = "Answers with at least this score. To choose a threshold here, evaluate on other data."
    return table_of("If only sure answers count", note, answered(confidence, correct))


def label_table(title: str, note: str, rows: Sequence[dict[str, Any]], seen: Collection[int]) -> Table:
    """Figures per label; of many, those that are seen, by how often they are the truth.

    Args:
        rows: one for each label, with its support.
        seen: indices of the labels that are the truth, or are predicted, at least once.
    """
    if len(rows) <= MANY_LABELS:
        return table_of(title, note, rows)
    if unseen := len(rows) - len(seen):
        plural = "labels do" if unseen > 1 else "label does"
        note = f"{note} {unseen} {plural} not occur and {'were' if unseen > 1 else 'was'} not predicted.".lstrip()
    shown = sorted((rows[index] for index in sorted(seen)), key=lambda row: -row["support"])
    return table_of(title, note, shown)


def confusions_table(truth: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> Table:
    """The commonest mistakes, for labels too many for a matrix."""
    pairs = Counter(pair for pair in zip(truth, predicted) if pair[0] != pair[1])
    note = f"{min(CONFUSIONS, len(pairs))} of {len(pairs)} pairs of truth and prediction, the commonest first."
    rows = [(labels[t], labels[p], n) for (t, p), n in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))]
    return Table("Commonest confusions", note, ("truth", "prediction", "count"), rows[:CONFUSIONS])


def short(text: str, length: int = TEXT_LENGTH) -> str:
    """A text on one line, cut where it is too long."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def text_or_pair(example: Any) -> str:
    """The text, or both, of an example."""
    return short(example.text if example.pair is None else f"{example.text} ‖ {example.pair}")
