"""Accepts labelled data in memory where a file is expected: a list of dicts, a pandas table, a Hub data set.

The rows are written to a temporary JSON-lines file and read like any other, so the same columns, checks and error
messages apply; messages count rows from 1.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, time
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID

from electra_core.downstream.choices import ANSWER_NAMES, CHOICE_LISTS, CHOICE_TEXT_NAMES, ENDING
from electra_core.downstream.interface import Task
from electra_core.errors import UserError, is_on_command_line, listed
from electra_core.labelled_data.columns import (
    ALL_FLAGS,
    LABEL_COLUMNS_FLAG,
    USUAL_NAMES,
    Columns,
    names_given,
)
from electra_core.labelled_data.squad_files import ONE_ANSWER
from electra_core.labelled_data.tagged_files import TAG_LISTS, WORD_LISTS
from electra_core.labelled_data.tagged_rows import SENTENCE_COLUMNS, SPAN_LISTS, TAG_COLUMNS, WORD_COLUMNS
from electra_core.runs.notices import Say

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
    say: Say, task: Task | None = None, **data: str | Path | Rows | None
) -> Iterator[tuple[dict[str, Any], Say]]:
    """Gives paths unchanged, and rows in memory as temporary files that exist inside the context.

    Args:
        say: receives lines for the user.
        task: what the rows are for. Columns that it does not read need not fit into JSON.
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
            paths[name] = _written(source, name, Path(folder), task) if in_memory else source  # type: ignore[arg-type]
        try:
            yield paths, lambda line: say(told(line))
        except UserError as error:
            raise UserError(told(str(error))) from None


def rows_of(table: Any, name: str = "inputs") -> list[dict[str, Any]] | None:
    """The rows of a pandas, Polars or Arrow table (iterating over one gives columns); None for anything else.

    Raises:
        ValueError: a table that is not computed yet, or a dict of data sets (the Hub's DatasetDict); the message
            calls it `name`.
    """
    if isinstance(table, Mapping) and table and all(map(_is_data_set, table.values())):
        first = "train" if "train" in table else next(iter(table))
        known = ", ".join(map(str, table))
        raise ValueError(f"{name}: expected rows, got a dict of data sets ({known}); give one, data[{first!r}]")
    if type(table).__name__ == "LazyFrame":
        raise ValueError(f"{name}: expected rows or a table, got a LazyFrame; call its collect() first")
    if not hasattr(table, "columns"):
        return None
    for method, how in (("to_dicts", ()), ("to_pylist", ()), ("to_dict", ("records",))):
        if callable(rows := getattr(table, method, None)):
            return list(rows(*how))
    return None


def row_of(value: Any, columns: Columns | None) -> dict[str, Any] | None:
    """The cells of one row of a pandas table, `table.iloc[0]`: a Series whose index are the names of columns, and
    whose own name is the row's. None for anything else, such as a column: its name is a column's, and its index
    may be words, one of which is "text".

    Args:
        columns: those that the task reads by other than the usual names.
    """
    if not hasattr(value, "index") or not callable(getattr(value, "to_dict", None)) or hasattr(value, "columns"):
        return None
    named = names_given(columns or Columns())

    def is_read(name: Any) -> bool:
        return isinstance(name, str) and (name in named or name.lower() in READ)

    own = getattr(value, "name", None)
    is_row = own is not None and not is_read(own) and any(map(is_read, value.index))
    return value.to_dict() if is_row else None


def _written(rows: Rows, name: str, folder: Path, task: Task | None) -> Path:
    path, asked = folder / f"{name}.jsonl", getattr(task, "columns", None)
    names = _class_names(rows, task)
    if (table := rows_of(rows, name)) is not None:
        rows = table
    if isinstance(rows, Mapping):
        known = listed([*map(str, rows)], 5)
        raise ValueError(f"{name}: expected rows, got a dict ({known}); give a list with a dict for each row")
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
                if column in names:
                    value = _by_name(_plain(value), names[column])
                try:
                    cell = json.dumps(_plain(value), default=_plain)
                except (TypeError, ValueError) as error:
                    if _may_be_read(str(column), place, asked):
                        raise ValueError(f"{name}: row {number}: column {str(column)!r}: {error}") from None
                    cell = "null"
                cells.append(f"{json.dumps(str(column))}: {cell}")
            file.write(f"{{{', '.join(cells)}}}\n")
    return path


def _is_data_set(value: Any) -> bool:
    return hasattr(value, "features") or hasattr(value, "columns")


def _class_names(rows: Any, task: Task | None) -> dict[str, Sequence[str]]:
    """Column -> names of its classes, where a data set of the Hub (`features`) stores their numbers.

    Numbers stay where names would not help: for a task of numbers, and for a model that has none of the names
    (it may have been trained on the numbers).
    """
    features = getattr(rows, "features", None)
    if not isinstance(features, Mapping) or getattr(task, "kind", "") == "regress":
        return {}
    known = {label.casefold() for label in getattr(task, "labels", ())}
    found = {}
    for column, kind in features.items():
        kind = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", kind)  # of a list
        names = getattr(kind, "names", None)
        if names and (not known or known & {str(name).casefold() for name in names}):
            found[column] = names
    return found


def _by_name(value: Any, names: Sequence[str]) -> Any:
    """A class's number, or a list of them, by name; -1, the Hub's sign for a missing label, is None."""
    if isinstance(value, list):
        return [_by_name(item, names) for item in value]
    if type(value) is not int or not -1 <= value < len(names):
        return value
    return None if value == -1 else names[value]


def _may_be_read(column: str, place: int, asked: Columns | None) -> bool:
    """Whether a task may read a column: it has a usual name or was named, perhaps by its number from 1."""
    named = names_given(asked or Columns())
    return column in named or str(place) in named or column.lower() in READ or bool(ENDING.fullmatch(column))


def _plain(value: Any) -> Any:
    """A value in a form for JSON: NumPy's as Python's, NaN (missing in pandas) as None, dates in ISO form."""
    if isinstance(value, (float, str, int, list, dict, type(None))) and type(value).__module__ == "builtins":
        return None if isinstance(value, float) and math.isnan(value) else value
    if isinstance(value, Enum):
        return _plain(value.value)
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
