"""The file that `predict` writes, a row for each input, as JSON lines or CSV; one that was begun is continued."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from electra_core.errors import UserError, listed, reading

FORMS = ("jsonl", "csv")
SHOWN = 10  # columns that a message names
LONGEST_CELL = 2**31 - 1  # characters, the most that csv takes everywhere; a book's tags are one cell


class AnswerFile:
    """What is in a file of answers so far, and how further ones are written.

    Args:
        form: one of `FORMS`; in CSV, lists are JSON.
        begun: a file whose rows are kept, up to the last whole one; None: there is none.
    """

    def __init__(self, form: str, begun: Path | None = None):
        if form not in FORMS:
            raise ValueError(f"form: expected {' or '.join(FORMS)}, got {form!r}")
        self.form, self.begun = form, begun
        self.rows = self.end = 0
        """Number of the begun file's whole rows that were passed over, and where they end, in bytes."""
        self._header: list[str] = []
        self._is_checked = False

    def pass_over(self, examples: Iterator[Any], source: str | Path) -> None:
        """Takes from `examples` those that the begun file answers.

        Raises:
            UserError: the file cannot be read, or its ids are not those of the examples.
        """
        for answered in self._ids():
            example = next(examples, None)
            if example is None or example.id != answered:
                instead = "has no more rows" if example is None else f"has {example.id!r}"
                raise UserError(
                    f"{self.begun}: does not hold the beginning of the answers to {source}: row {self.rows + 1:,} "
                    f"answers id {answered!r}, and {source} {instead} there; write to another file"
                )
            self.rows += 1

    def _ids(self) -> Iterator[str]:
        """The id of each whole row of the begun file; `end` is behind the row."""
        if self.begun is None:
            return
        with reading(self.begun), open(self.begun, encoding="utf-8", newline="\n") as file:
            yield from self._ids_of_csv(file) if self.form == "csv" else self._ids_of_json(file)

    def _ids_of_json(self, file: TextIO) -> Iterator[str]:
        for line in self._whole_lines(file):
            try:
                row = json.loads(line)
                found, self._header = row["id"], self._header or list(_flat(row))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise self._not_ours() from None
            self.end += len(line.encode())
            yield found

    def _ids_of_csv(self, file: TextIO) -> Iterator[str]:
        lines: list[str] = []
        is_at_end = False

        def kept() -> Iterator[str]:
            nonlocal is_at_end
            for line in self._whole_lines(file):
                lines.append(line)
                yield line
            is_at_end = True

        csv.field_size_limit(LONGEST_CELL)
        try:
            for cells in csv.reader(kept(), strict=True):
                if not self._header:
                    if cells[:1] != ["id"]:
                        raise self._not_ours()
                    self._header = cells
                elif len(cells) != len(self._header):
                    raise self._not_ours()
                self.end += sum(len(line.encode()) for line in lines)
                lines.clear()
                if cells is not self._header:
                    yield cells[0]
        except csv.Error:
            if not is_at_end:  # otherwise the last row was cut off within quotes
                raise self._not_ours() from None

    def _whole_lines(self, file: TextIO) -> Iterator[str]:
        try:
            for line in file:
                if line.endswith("\n"):
                    yield line
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":  # where writing stopped
                raise self._not_ours() from None

    def _not_ours(self) -> UserError:
        return UserError(
            f"{self.begun}: row {self.rows + 1:,} is not an answer of electra predict in {self.form}; write to "
            "another file"
        )

    def write(self, sink: TextIO, row: dict[str, Any]) -> None:
        """Writes one row; in CSV the first is preceded by the header.

        Raises:
            UserError: the begun file's answers are of another kind, or of other labels.
        """
        flat = _flat(row)
        if self.begun is not None and self._header and not self._is_checked and list(flat) != self._header:
            raise UserError(
                f"{self.begun}: holds answers of another model, with {listed(self._header, SHOWN)} in place of "
                f"{listed(list(flat), SHOWN)}; write to another file"
            )
        self._is_checked = True
        if self.form == "jsonl":
            sink.write(json.dumps(row, ensure_ascii=False) + "\n")
            return
        if not self._header:
            self._header = list(flat)
            sink.write(_csv_line(self._header))
        sink.write(_csv_line([flat.get(name, "") for name in self._header]))


def _csv_line(cells: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text).writerow(cells)  # ended by \r\n, so that it quotes cells that hold one of the two
    return text.getvalue().removesuffix("\r\n") + "\n"


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """The cells of a row: a dict has one for each of its values, a list is JSON."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}_{key}": item for key, item in value.items()}
        else:
            flat[name] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return flat
