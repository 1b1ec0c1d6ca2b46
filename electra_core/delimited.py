"""CSV cut into cells: what the readers of labelled files (`row_files.py`) and of text (`text_tables.py`) share.

They differ in what becomes of a broken row: one leaves it out and says so, the other ends.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

EXCELS = ["sep=", ""]
"""The line sep=; that Excel understands, cut by what it names."""
QUOTED = re.compile(r'"[^"]*("|$)')


class Cells(NamedTuple):
    """A row of a delimited file."""

    first: int
    """Line on which it begins, from 1."""
    last: int
    """Line on which it ends: cells in quotes may go over several."""
    cells: list[str]
    error: csv.Error | None
    """What is wrong with it; then it has no cells."""


def delimiter_of(first_line: str) -> tuple[str, bool]:
    """What a CSV is cut by, and whether a space goes with it, as its first line tells.

    It may be cut by semicolons (spreadsheets in much of Europe), tabs or bars (databases).
    """
    line = QUOTED.sub("", first_line)
    delimiter = max(",;\t|", key=line.count)
    return delimiter, delimiter + " " in line


def split_cells(
    lines: Iterator[str], delimiter: str, spaced: bool, *, quoting: bool = True, most: int = sys.maxsize
) -> Iterator[Cells]:
    """Every row that is not blank, nor Excel's first line.

    Args:
        lines: without their ends.
        delimiter, spaced: as `delimiter_of` gives them.
        quoting: whether cells may be quoted.
        most: characters that a cell may have.
    """
    csv.field_size_limit(most)  # the default refuses cells beyond 128 kB
    reader = csv.reader(
        (line + "\n" for line in lines),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
        skipinitialspace=spaced,  # else a quote behind the space would be an ordinary character
        strict=True,  # else a forgotten closing quote swallows the rest of the file in silence
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
