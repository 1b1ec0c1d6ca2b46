"""The tables that a report on a fine-tuned model is made of (`task_report.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from electra_core.metrics import calibration

WORST = 20  # mistakes that are shown
TEXT_LENGTH = 240  # characters of a text that are shown


@dataclass(frozen=True)
class Table:
    """Named columns; `shaded` tables are counts, coloured by their share of the row."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    shaded: bool = False


def table_of(title: str, note: str, rows: Sequence[dict[str, Any]]) -> Table:
    """A table of rows that name their cells."""
    return Table(title, note, tuple(rows[0]) if rows else (), [tuple(row.values()) for row in rows])


def calibration_table(confidence: Sequence[float], correct: Sequence[bool], where: str = "") -> Table:
    """How far the model's confidence can be trusted (`metrics.calibration`).

    Args:
        where: of what it is the confidence, if not of one decision an example.
    """
    error, rows = calibration(confidence, correct)
    note = f"Expected calibration error {error:.3f}: mean distance of confidence and accuracy{where}."
    return table_of("Calibration", note, rows)


def short(text: str, length: int = TEXT_LENGTH) -> str:
    """A text on one line, cut where it is too long."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def text_or_pair(example: Any) -> str:
    """The text, or both, of an example."""
    return short(example.text if example.pair is None else f"{example.text} ‖ {example.pair}")
