"""Accepts labelled data in memory where a file is expected: a list of dicts, a pandas table, a Hub data set.

The rows are written to a temporary JSON-lines file and read like any other, so the same columns, checks and error
messages apply; messages count rows from 1.
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

from electra_core.downstream.choices import ANSWER_NAMES, CHOICE_LISTS, CHOICE_TEXT_NAMES, ENDING
from electra_core.errors import UserError, is_on_command_line
from electra_core.labelled_data.columns import ALL_FLAGS, LABEL_COLUMNS_FLAG, USUAL_NAMES, Columns, alternatives
from electra_core.labelled_data.notices import Say
from electra_core.labelled_data.squad_files import ONE_ANSWER
from electra_core.labelled_data.tagged_files import TAG_LISTS, WORD_LISTS
from electra_core.labelled_data.tagged_rows import SENTENCE_COLUMNS, SPAN_LISTS, TAG_COLUMNS, WORD_COLUMNS

Rows = Iterable[Mapping[str, Any]]
"""Each row maps column names, for instance "text" and "label", to values."""
READ = frozenset(
    name.lower()
    for name in (
        *USUAL_NAMES, *CHOICE_TEXT_NAMES, *CHOICE_LISTS, *ANSWER_NAMES, *WORD_LISTS, *TAG_LISTS, *SPAN_LISTS,
        *SENTENCE_COLUMNS, *WORD_COLUMNS, *TAG_COLUMNS, *ONE_ANSWER, "question", "context", "answers",
        "answer_start", "is_impossible",
    )
)  # fmt: skip
"""The column names that some task looks for, in lower case."""

IN_PYTHON = {
    "--id-column none": 'Columns(id="none")',
    "--skip-bad-rows": "skip_bad_rows=True",
    "--encoding cp1252": 'Columns(encoding="cp1252")',
    "--task multilabel": "MultiLabel()",
    "--label-separator": "Columns(separator=...)",
    LABEL_COLUMNS_FLAG: "Columns(labels=...)",  # before --label-column, with which it begins
    **{flag: f"Columns({role}=...)" for role, flag in ALL_FLAGS.items()},
}
"""The Python names for flags in the readers' messages, used off the command line; elsewhere `option` does this."""


@contextmanager
def as_files(
    say: Say, asked: Columns | None = None, **data: str | Path | Rows | None
) -> Iterator[tuple[dict[str, Any], Say]]:
    """Gives paths unchanged, and rows in memory as temporary files that exist inside the context.

    Args:
        say: receives lines for the user.
        asked: the columns that the task reads by other than the usual names. Other columns need not fit into JSON.
        data: sources by name, which names the files, also in messages.

    Yields:
        The paths by name, and a `say` for lines that mention them.

    Raises:
        ValueError: rows are not dicts, or a column that may be read does not fit into JSON.
    """
    with tempfile.TemporaryDirectory() as folder:

        def told(line: str) -> str:
            kind = type(line)  # `Lost`, perhaps
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
    """The rows of a pandas, Polars or Arrow table (iterating over one gives columns); None for anything else."""
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
    """Whether a task may read a column: it has a usual name or was named, perhaps by its number from 1."""
    roles = () if asked is None else (asked.text, asked.pair, asked.label, asked.labels, asked.id)
    named = {name for role in roles for name in alternatives(role)}
    return column in named or str(place) in named or column.lower() in READ or bool(ENDING.fullmatch(column))


def _plain(value: Any) -> Any:
    """A value in a form for JSON: NumPy's as Python's, NaN (missing in pandas) as None, dates in ISO form."""
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
