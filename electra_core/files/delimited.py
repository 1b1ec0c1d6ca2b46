"""Splits CSV into cells, for readers of labelled files (`row_files.py`) and of text (`corpora/text_tables.py`).

They differ in how they treat a broken row: the first skips and reports it, the second stops.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from typing import NamedTuple

EXCELS = ["sep=", ""]
"""Excel's line `sep=;`, split at the delimiter that it names."""
QUOTED = re.compile(r'"[^"]*("|$)')


class Cells(NamedTuple):
    """A row of a delimited file."""

    first: int
    """Line on which the row begins, from 1."""
    last: int
    """Line on which it ends: quoted cells may span several."""
    cells: list[str]
    error: csv.Error | None
    """What is wrong with the row; it then has no cells."""


def delimiter_of(first_line: str) -> tuple[str, bool]:
    """A CSV's delimiter, guessed from its first line, and whether a space follows it.

    It may also be a semicolon (spreadsheets in much of Europe), a tab or a bar (databases).
    """
    line = QUOTED.sub("", first_line)
    delimiter = max(",;\t|", key=line.count)
    return delimiter, delimiter + " " in line


def split_cells(
    lines: Iterator[str], delimiter: str, spaced: bool, *, quoting: bool = True, most: int
) -> Iterator[Cells]:
    """Every row except blank ones and Excel's `sep=` line.

    Args:
        lines: without their line ends.
        delimiter, spaced: as `delimiter_of` returns them.
        quoting: whether cells may be quoted.
        most: maximum number of characters in a cell.
    """
    csv.field_size_limit(most)  # the default refuses cells beyond 128 kB
    reader = csv.reader(
        (line + "\n" for line in lines),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
        skipinitialspace=spaced,  # otherwise a quote after the space would be an ordinary character
        strict=True,  # otherwise a forgotten closing quote silently swallows the rest of the file
    )
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Cells(first, reader.line_num, [], error)
            continue
        if cells and not (first == 1 and cells == EXCELS):
            yield Cells(first, reader.line_num, cells, None)
