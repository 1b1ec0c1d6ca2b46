"""Splits CSV into cells, for readers of labelled files (`row_files.py`) and of text (`corpora/text_tables.py`).

They differ in how they treat a broken row: the first skips and reports it, the second stops.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from electra_core.files.text_lines import MAX_ROW_BYTES

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


def begun(lines: Iterator[str], *, tabs: bool) -> tuple[str, bool, Iterator[str]]:
    """A table's delimiter, whether a space follows it, and all of its lines, those before the first text as "".

    Args:
        tabs: whether it is a TSV; of a CSV, the first line that is not blank tells.
    """
    blank = 0
    for first in lines:
        if first.strip():
            delimiter, spaced = ("\t", False) if tabs else delimiter_of(first)
            return delimiter, spaced, itertools.chain([""] * blank, [first], lines)
        blank += 1
    return ",", False, lines


def split_cells(lines: Iterator[str], delimiter: str, spaced: bool, *, quoting: bool) -> Iterator[Cells]:
    """Every row except blank ones and Excel's `sep=` line.

    Args:
        lines: without their line ends.
        delimiter, spaced: as `begun` returns them, with the lines.
        quoting: whether cells may be quoted.
    """
    csv.field_size_limit(MAX_ROW_BYTES)  # the default refuses cells beyond 128 kB
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
