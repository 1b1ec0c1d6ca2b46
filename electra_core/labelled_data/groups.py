"""Reads which examples belong together, such as those of one patient or document, from a column of their table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from electra_core.errors import UserError
from electra_core.files.row_files import Row
from electra_core.labelled_data.columns import Columns, column_named, first_rows, has_column, table
from electra_core.labelled_data.label_cells import label_text

ONLY_ROWS = "expected rows with a column for the group, as CSV, TSV, JSON lines or Parquet have"


def groups_of(path: Path | str, columns: Columns, examples: Sequence[Any]) -> list[str | None]:
    """For each example the text in its row's group column; None where the cell is empty or missing.

    The file is read a second time, so that readers and examples need not know of groups.

    Args:
        path: the file that the examples were read from.
        columns: as they were read, and `group`.

    Raises:
        UserError: the file is a pipe, the examples are no rows, there is no such column, or it holds lists or the
            like.
    """
    path = Path(path)
    name = "standard input" if str(path) == "-" else path
    read_once = f"{name}: cannot be read twice, which --group-column needs; expected a file"
    if name != path or path.is_fifo():
        raise UserError(read_once)
    lines = [getattr(example, "line", 0) for example in examples]
    if 0 in lines:
        raise UserError(f"--group-column: no effect with {path}, which is no table; {ONLY_ROWS}")
    rows = table(path, columns)
    first, present = _up_to_the_column(rows, columns, path)
    column = column_named(path, present, columns, "group")
    wanted, found = set(lines), dict[int, str | None]()
    for row in itertools.chain(first, rows):
        if row.line in wanted:
            value = row.cells.get(column)
            if isinstance(value, (list, dict, bytes)):
                kind = type(value).__name__
                raise UserError(f"{path}:{row.line}: column {column!r}: expected one value per row, got a {kind}")
            found[row.line] = label_text(value)
    if wanted - found.keys():
        raise UserError(read_once)
    return [found[line] for line in lines]


def _up_to_the_column(rows: Iterator[Row], columns: Columns, path: Path) -> tuple[list[Row], list[str]]:
    """The first rows, and the names of their cells: as many as tell which column is meant.

    Of JSON lines any number of rows may lack the column. Of those beyond `first_rows` the cells are not kept.
    """
    first, present = first_rows(path, rows)
    while not has_column(present, columns, "group") and (row := next(rows, None)) is not None:
        present = list(dict.fromkeys([*present, *row.cells]))
        first.append(row if has_column(present, columns, "group") else Row(row.line))
    return first, present
