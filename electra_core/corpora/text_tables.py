"""Reads the texts in files of rows: JSON lines, JSON, CSV and TSV. `text_files.py` turns them into documents.

Rows are read one at a time, whatever the size of the file; only a single row must fit into memory. A malformed row
ends the reading, since training text must not be lost silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from electra_core.errors import UserError
from electra_core.files.delimited import Cells, begun, split_cells
from electra_core.files.text_lines import MAX_ROW_BYTES

BLOCK_CHARACTERS = 1 << 16  # minimum read at once from a .json file
_NOT_SPACE = re.compile(r"[^ \t\n\r]")


def json_line_texts(name: str, lines: Iterator[str], text_field: str) -> Iterator[str]:
    """The texts of JSON lines.

    Args:
        name: what error messages call the file.
        lines: all of its lines, without their ends.

    Raises:
        UserError: naming the line, from 1: not a JSON object, no such field, or no text in it.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{name}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON ({error})") from None
        yield _text_of(place, row, text_field)


def json_texts(name: str, blocks: Iterator[str], text_field: str) -> Iterator[str]:
    """The texts of a .json file: rows in one array or one after the other, each on one line or on several.

    Args:
        name: what error messages call the file.
        blocks: its characters, in blocks.

    Raises:
        UserError: as `json_line_texts`, naming the row, from 1; or something is not a row, or too long.
    """
    text, number = _Characters(blocks), 0
    in_array = text.peek() == "["
    if in_array:
        text.take()
    while text.peek() != ("]" if in_array else ""):
        if in_array and number and (found := text.take()) != ",":
            raise UserError(f"{name}: expected , or ] after row {number}, got {found or 'the end of the file'}")
        number += 1
        place = f"{name}: row {number}"
        try:
            row = text.value()
        except (ValueError, RecursionError) as error:
            too_long = f", or longer than {MAX_ROW_BYTES >> 20} MiB" if text.held > MAX_ROW_BYTES else ""
            raise UserError(f"{place}: not JSON{too_long} ({getattr(error, 'msg', error)})") from None
        yield _text_of(place, row, text_field)
    if in_array and text.take() and (found := text.peek()):
        raise UserError(f"{name}: expected nothing after the array of rows, got {found}")


class _Characters:
    """JSON text that arrives in blocks; what has been taken is dropped."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks, self._text, self._at = blocks, "", 0
        self._decoder = json.JSONDecoder()

    @property
    def held(self) -> int:
        """Number of characters available and not taken."""
        return len(self._text) - self._at

    def peek(self) -> str:
        """The next character after white space, which is taken; "" at the end."""
        while not (found := _NOT_SPACE.search(self._text, self._at)):
            self._at = len(self._text)
            if not self._more():
                return ""
        self._at = found.start()
        return found[0]

    def take(self) -> str:
        """As `peek`, and takes the character."""
        character = self.peek()
        self._at += len(character)
        return character

    def value(self) -> Any:
        """Takes a JSON value of at most about MAX_ROW_BYTES characters; ValueError or RecursionError if there is
        none."""
        self.peek()
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
                return value
            except (ValueError, RecursionError):
                if self.held > MAX_ROW_BYTES or not self._more():
                    raise

    def _more(self) -> bool:
        """Doubles what is held, so that a long value is not decoded too often; False at the end."""
        pieces = [self._text[self._at :]]
        wanted = size = max(self.held, BLOCK_CHARACTERS)
        while wanted > 0 and (block := next(self._blocks, "")):
            pieces.append(block)
            wanted -= len(block)
        self._text, self._at = "".join(pieces), 0
        return wanted < size


def csv_texts(name: str, lines: Iterator[str], tabs: bool, text_field: str) -> Iterator[str]:
    """The texts of a CSV or TSV file whose first line names the columns.

    A CSV may also be delimited by semicolons or tabs, as its first line shows. In a TSV quotes are ordinary
    characters.

    Args:
        name: what error messages call the file.
        lines: all of its lines, without their ends.
        tabs: whether it is a TSV.

    Raises:
        UserError: no such column, or two; or, naming the line, from 1: a wrong number of cells, or broken quoting.
    """
    delimiter, spaced, lines = begun(lines, tabs=tabs)
    rows = _whole(name, split_cells(lines, delimiter, spaced, quoting=not tabs))
    header = next(rows, None)
    if header is None:
        return
    names = [cell.strip() for cell in header[1]]
    column = column_of(name, names, text_field, " in the first line")
    for line, cells in rows:
        if len(cells) != len(names):
            hint = "" if tabs or len(cells) < len(names) else f"; cells that contain {delimiter!r} need quotes"
            raise UserError(f"{name}: line {line}: expected {len(names)} columns, got {len(cells)}{hint}")
        yield cells[column]


def _whole(name: str, rows: Iterator[Cells]) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) of every row; UserError for a broken row."""
    for row in rows:
        if row.error is not None:
            raise UserError(f"{name}: line {row.first}: not CSV ({row.error})")
        yield row.first, row.cells


def column_of(name: str, names: list[str], text_field: str, where: str = "") -> int:
    """Index of the text's column; UserError if the file has none (`where` they are named), or two."""
    if text_field not in names:
        columns = ", ".join(map(repr, names))
        raise UserError(f"{name}: no column {text_field!r}{where}; the columns are {columns}")
    if names.count(text_field) > 1:
        raise UserError(f"{name}: two columns are named {text_field!r}; rename one of them")
    return names.index(text_field)


def _text_of(place: str, row: Any, text_field: str) -> str:
    """The text of a row from JSON."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected a JSON object, got {type(row).__name__}")
    if text_field not in row:
        raise UserError(f"{place}: no field {text_field!r}; the fields are {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(text := row[text_field], str):
        raise UserError(f"{place}: field {text_field!r} holds {type(text).__name__}, not text")
    return text
