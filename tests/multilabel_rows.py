"""Rows with any number of labels, for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reading import write_lines

from electra_core.downstream.multilabel import MultiLabel
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.labelled import BadRows, MultiLabelExample


def examples(*labels: tuple[str, ...], text: str = "text") -> list[MultiLabelExample]:
    return [MultiLabelExample(str(n), n, f"{text} {n}", labels=own) for n, own in enumerate(labels, 2)]


def read(file: Any, task: MultiLabel | None = None, **columns: Any) -> list[tuple[str, ...] | None]:
    """The labels of every row."""
    task = task or MultiLabel(columns=Columns(**columns))
    return [example.labels for example in task.read(file, BadRows(file))]  # type: ignore[attr-defined]


def rows(path: Path, values: list[Any]) -> Path:
    return write_lines(path, *(json.dumps({"text": f"row {n}", "labels": v}) for n, v in enumerate(values)))
