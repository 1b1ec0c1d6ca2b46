"""Labelled data in memory where a file is expected: a list of dicts, a table of pandas, a Hub data set.

They are written to a temporary file of JSON lines and read as every other file is, so the same columns, checks and
complaints hold; these count rows from 1.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from electra_core.choices import ANSWER_NAMES, CHOICE_LISTS, CHOICE_TEXT_NAMES, ENDING
from electra_core.columns import ALL_FLAGS, LABEL_COLUMNS_FLAG, USUAL_NAMES, Columns, alternatives
from electra_core.errors import UserError, is_on_command_line
from electra_core.notices import Say
from electra_core.squad_files import ONE_ANSWER
from electra_core.tagged_files import TAG_LISTS, WORD_LISTS
from electra_core.tagged_rows import SENTENCE_COLUMNS, SPAN_LISTS, TAG_COLUMNS, WORD_COLUMNS

Rows = Iterable[Mapping[str, Any]]
"""Each with a file's columns by name, "text" and "label" for instance."""
READ = frozenset(
    name.lower()
    for name in (
        *USUAL_NAMES, *CHOICE_TEXT_NAMES, *CHOICE_LISTS, *ANSWER_NAMES, *WORD_LISTS, *TAG_LISTS, *SPAN_LISTS,
        *SENTENCE_COLUMNS, *WORD_COLUMNS, *TAG_COLUMNS, *ONE_ANSWER, "question", "context", "answers",
        "answer_start", "is_impossible",
    )
)  # fmt: skip
"""The names that some task looks for, in small letters."""

IN_PYTHON = {
    "--id-column none": 'Columns(id="none")',
    "--skip-bad-rows": "skip_bad_rows=True",
    "--encoding cp1252": 'Columns(encoding="cp1252")',
    "--task multilabel": "MultiLabel()",
    "--label-separator": "Columns(separator=...)",
    LABEL_COLUMNS_FLAG: "Columns(labels=...)",  # before --label-column, with which it begins
    **{flag: f"Columns({role}=...)" for role, flag in ALL_FLAGS.items()},
}
"""What the flags in messages of readers are called where there is no command line; of others `option` says so."""


@contextmanager
def as_files(
    say: Say, asked: Columns | None = None, **data: str | Path | Rows | None
) -> Iterator[tuple[dict[str, Any], Say]]:
    """Paths as they are, and rows in memory as temporary files, which exist inside the context.

    Args:
        say: takes lines for the user.
        asked: the columns that a task reads by names of their own. What is in others need not have a form in JSON.
        data: by name; the files have it, in messages, too.

    Yields:
        The paths by name, and `say` for lines in which they occur.

    Raises:
        ValueError: rows that are no dicts, or hold what JSON has no form for in a column that may be read.
    """
    with tempfile.TemporaryDirectory() as folder:

        def told(line: str) -> str:
            kind = type(line)  # as `Lost` is one
            line = line.replace(f"{folder}{os.sep}", "")
            if not is_on_command_line():
                for flag, name in IN_PYTHON.items():
                    line = line.replace(flag, name)
            return kind(line)

        paths: dict[str, Any] = {}
        for name, source in data.items():
            in_memory = source is not None and not isinstance(source, (str, os.PathLike))
            paths[name] = _written(source, name, Path(folder), asked) if in_memory else source  # type: ignore[arg-type]
        try:
            yield paths, lambda line: say(told(line))
        except UserError as error:
            raise UserError(told(str(error))) from None


def rows_of(table: Any) -> list[dict[str, Any]] | None:
    """The rows of a table of pandas, Polars or Arrow, which iterate over columns; None for anything else."""
    if not hasattr(table, "columns"):
        return None
    for method, how in (("to_dicts", ()), ("to_pylist", ()), ("to_dict", ("records",))):
        if callable(rows := getattr(table, method, None)):
            return list(rows(*how))
    return None


def _written(rows: Rows, name: str, folder: Path, asked: Columns | None) -> Path:
    path = folder / f"{name}.jsonl"
    if (table := rows_of(rows)) is not None:
        rows = table
    if not isinstance(rows, Iterable):
        raise ValueError(f"{name}: expected a file or rows, got {type(rows).__name__}")
    with path.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for number, row in enumerate(rows, 1):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"{name}: expected a dict for row {number}, got {type(row).__name__}: {row!r:.60}"
                )
            cells = []
            for place, (column, value) in enumerate(row.items(), 1):
                try:
                    cell = json.dumps(_plain(value), default=_plain)
                except (TypeError, ValueError) as error:
                    if _may_be_read(str(column), place, asked):
                        raise ValueError(f"{name}: row {number}: column {str(column)!r}: {error}") from None
                    cell = "null"
                cells.append(f"{json.dumps(str(column))}: {cell}")
            file.write(f"{{{', '.join(cells)}}}\n")
    return path


def _may_be_read(column: str, place: int, asked: Columns | None) -> bool:
    """Whether a task may look into a column: it has a usual name, or was named, perhaps by its number from 1."""
    roles = () if asked is None else (asked.text, asked.pair, asked.label, asked.labels, asked.id)
    named = {name for role in roles for name in alternatives(role)}
    return column in named or str(place) in named or column.lower() in READ or bool(ENDING.fullmatch(column))


def _plain(value: Any) -> Any:
    """As JSON has it: NumPy's values as Python's, no number (pandas' missing value) as none, dates by ISO."""
    if isinstance(value, (float, str, int, list, dict, type(None))) and type(value).__module__ == "builtins":
        return None if isinstance(value, float) and math.isnan(value) else value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, tuple):
        return list(value)
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, (date, time)):  # also a datetime, pandas' Timestamp
        return value.isoformat()
    if isinstance(value, (UUID, Decimal)):
        return str(value)
    raise TypeError(f"expected texts, numbers and lists of them, got {type(value).__name__}")
