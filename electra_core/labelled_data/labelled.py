"""Reads labelled texts in the usual formats as examples.

These are files of one or two text columns and a label column (CSV, TSV, JSON lines, Parquet), and folders with one
sub-folder of .txt files per label, such as IMDb. Sentences with tags are read in `tagged_files.py`, questions with
answers in `squad_files.py`, multiple choice in `downstream/choices.py`; `columns.py` finds which column holds
what.

Every reader is a generator, so that prediction works on files larger than memory; a row that it cannot use goes to
`BadRows`, which names file and line.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from electra_core.errors import UserError
from electra_core.files.row_files import Row, other_encoding
from electra_core.files.text_lines import read_lines, text_problem
from electra_core.labelled_data.columns import Columns, Found, find_columns, first_rows, id_of, table
from electra_core.labelled_data.label_cells import SEPARATOR, label_text, labels_of_cell, labels_of_columns
from electra_core.runs.notices import Lost

log = logging.getLogger("electra_core")
NO_ROW_ID = "if that column does not hold row ids: --id-column none"
FEWEST_IDS = 10
"""Among fewer ids, a repeated one is taken for a slip."""


@dataclass(frozen=True, slots=True)
class TextExample:
    """One text, or a pair, with its label as written in the file (None where there is none)."""

    id: str
    """ "" if the row has none though the file has ids."""
    line: int
    """Line number, from 1; 0 for a file of a folder."""
    text: str
    pair: str | None = None
    label: str | None = None

    @property
    def place(self) -> int | str:
        """Where the example comes from: its line, or its file."""
        return self.line or f"{self.id}.txt"


@dataclass(frozen=True, slots=True)
class MultiLabelExample(TextExample):
    """One text, or a pair, with any number of distinct labels."""

    labels: tuple[str, ...] | None = None
    """None if unknown."""


def labels_in(example: TextExample) -> tuple[str, ...]:
    """The labels of an example, of either kind."""
    if isinstance(example, MultiLabelExample):
        return example.labels or ()
    return () if example.label is None else (example.label,)


def label_counts(examples: Iterable[TextExample]) -> Counter[str]:
    """How many examples have each label."""
    return Counter(label for example in examples for label in labels_in(example))


def relabelled(example: TextExample, new: Callable[[str], str]) -> TextExample:
    """The example with new names for its labels; those that then are the same count once."""
    if isinstance(example, MultiLabelExample):
        return replace(example, labels=tuple(dict.fromkeys(map(new, labels_in(example)))))
    return replace(example, label=None if example.label is None else new(example.label))


class BadRows:
    """Collects rows that cannot be used, with file and line; they stop the reading, or are skipped and counted.

    Args:
        skip: count them and continue; otherwise `close` raises, naming the first and saying how many there are.
    """

    def __init__(self, path: Path | str, skip: bool = False):
        self.path, self.skip = path, skip
        self.reasons: Counter[str] = Counter()
        self.first: list[str] = []
        self.ways_out: dict[str, None] = {}
        self.found: Found | None = None
        """The columns that were read, for a file of texts with columns; set at its first row."""

    def add(self, place: int | str, reason: str) -> None:
        """Records a bad row; `place` is its line, or its place in a JSON file.

        Reasons are counted by the text before the first parenthesis, so details belong in parentheses.
        """
        self.reasons[reason.split(" (")[0]] += 1
        if "not valid UTF-8 (byte" in reason:
            self.ways_out[other_encoding(Path(self.path))] = None
        if len(self.first) < 3:
            self.first.append(f"{self.path}:{place}: {reason}")

    @property
    def count(self) -> int:
        """Number of bad rows."""
        return self.reasons.total()

    def close(self, good: bool = True) -> None:
        """Raises UserError if there were bad rows, unless they are skipped; `good`: whether others were good."""
        if not self.count or self.skip:
            return
        others = f"{self.count - 1} more bad row{'s' if self.count > 2 else ''}"
        more = f"and {others}" if good else f"all {self.count} rows are bad"
        raise UserError(
            self.first[0]
            + (f" ({more})" if self.count > 1 else "")
            + self.way_out()
            + ("; --skip-bad-rows skips bad rows" if good else "")
        )

    def way_out(self) -> str:
        """What the user can do about them, beginning with a semicolon; "" if nothing is known."""
        return "".join(f"; {way}" for way in self.ways_out)

    def summary(self) -> str:
        """One line for the log: how many were skipped, why, and where the first ones are."""
        why = ", ".join(f"{reason} ({number})" for reason, number in self.reasons.most_common(5))
        first = "; ".join(self.first)
        rows = f"{self.count} bad row{'s' if self.count > 1 else ''}"
        return Lost(f"{self.path}: skipped {rows}: {why}; first {first}{self.way_out()}")


class Ids:
    """The ids of a file so far, to find duplicates.

    Args:
        labelled: whether ids are kept; prediction keeps none, since there may be more rows than fit into memory.
        bad: gets the remedy for a duplicate, if the file's columns can be named.
    """

    def __init__(self, labelled: bool, bad: BadRows | None = None):
        self.labelled, self._bad = labelled, bad
        self._seen: set[str] = set()

    def problem(self, value: Any) -> str:
        """Why the id cannot be used; "" if it is new, or there is none."""
        if not self.labelled or not has_id(value):
            return ""
        if str(value) in self._seen:
            if self._bad is not None:
                self._bad.ways_out[NO_ROW_ID] = None
            return f"duplicate id ({value})"
        self._seen.add(str(value))
        return ""


def has_id(value: Any) -> bool:
    """Whether a cell holds an id; some rows may have none."""
    return value is not None and bool(str(value).strip())


def row_id(row: Row, column: str | None) -> str:
    """The row's id, "" if its cell is empty; in a file without ids, its line number.

    (For an empty cell the line number could be another row's id.)
    """
    if column is None:
        return str(row.line)
    value = row.cells.get(column)
    return str(value) if has_id(value) else ""


def examples_of_rows(
    path: Path,
    rows: Iterable[Row],
    columns: Columns,
    bad: BadRows,
    labelled: bool,
    read: Callable[[Row, str], tuple[Any, str]],
) -> Iterator[Any]:
    """Examples from rows, each of which is read by the names of its own cells.

    Args:
        read: (row, its id) -> (example, ""), or (None, why it cannot be used).
    """
    ids = Ids(labelled, bad)
    for row in rows:
        id_name = id_of(path, columns, row.cells)
        example, problem = (None, row.problem) if row.problem else read(row, row_id(row, id_name))
        if problem := problem or ids.problem(row.cells.get(id_name or "")):
            bad.add(row.line, problem)
        else:
            yield example


def read_texts(
    path: Path | str,
    columns: Columns | None = None,
    bad: BadRows | None = None,
    *,
    labelled: bool = True,
    several: bool = False,
) -> Iterator[TextExample]:
    """Texts or pairs of texts, in the file's order.

    Args:
        path: a file, or a folder with one sub-folder of .txt files per label; without labels, one of .txt files.
        bad: receives rows that cannot be used; without it they raise at the end of the file.
        labelled: whether every row must have a label; if not, labels are read where present.
        several: whether a row may have any number of labels: the file's rows become `MultiLabelExample`, and
            labels that are not required are not read.

    Raises:
        UserError: file unreadable or empty, a column missing (the message lists those present), bad rows.
    """
    path, columns = Path(path), columns or Columns()
    bad = bad or BadRows(path)
    if path.is_dir():
        examples = _read_folder(path, bad, labelled, columns.encoding)
    else:
        examples = _read_text_rows(path, columns, bad, labelled, several)
    yield from checked(path, examples, bad)


def checked(path: Path, examples: Iterable[Any], bad: BadRows) -> Iterator[Any]:
    """Passes examples on; at the end raises UserError for bad rows, or if no row was good.

    The consumer may still add an example to the bad rows, before it takes the next.
    """
    count = good = 0
    for example in examples:
        count, before = count + 1, bad.count
        yield example
        good += bad.count == before
    bad.close(good > 0)
    if not count:
        why = f"none of its {bad.count} rows can be used ({bad.first[0]})" if bad.count else "holds no rows"
        raise UserError(f"{'standard input' if str(path) == '-' else path}: {why}{bad.way_out()}")


def _read_text_rows(
    path: Path, columns: Columns, bad: BadRows, labelled: bool, several: bool
) -> Iterator[TextExample]:
    found: Found | None = None
    ids, rows = Ids(labelled, bad), table(path, columns)
    first, present = first_rows(path, rows)
    for row in itertools.chain(first, rows):
        if row.problem:
            bad.add(row.line, row.problem)
            continue
        if found is None:
            found = find_columns(path, present or list(row.cells), columns, labelled, several)
            if labelled and columns.id is None and _mostly_repeated(found.id, first):
                log.warning(
                    "%s: column %r holds no row ids, as most values repeat; name another with --id-column",
                    path,
                    found.id,
                )
                found = replace(found, id=None)
            bad.found = found
        example, problem = _text_example(row, found, labelled and not several)
        if several and example is not None:
            example, problem = _with_labels(example, row, found, labelled, columns.separator or SEPARATOR)
        problem = problem or (ids.problem(row.cells.get(found.id)) if found.id else "")
        if problem or example is None:
            bad.add(row.line, problem)
        else:
            yield example


def _mostly_repeated(column: str | None, rows: Sequence[Row]) -> bool:
    """Whether fewer than half of the ids in these rows are distinct, and there are more than a few."""
    ids = [str(row.cells[column]) for row in rows if column and has_id(row.cells.get(column))]
    return len(ids) >= FEWEST_IDS and 2 * len({*ids}) < len(ids)


def _text_example(row: Row, columns: Found, labelled: bool) -> tuple[TextExample | None, str]:
    """(example, ""), or (None, why it cannot be used)."""
    text, problem = text_cell(row, columns.text)
    pair = None
    if columns.pair and not problem:
        pair, problem = text_cell(row, columns.pair)
    value = row.cells.get(columns.label) if columns.label else None
    label = label_text(value)
    if labelled and not problem:
        problem = _label_problem(value, label)
    if problem:
        return None, problem
    return TextExample(row_id(row, columns.id), row.line, text, pair, label), ""


def _with_labels(
    example: TextExample, row: Row, columns: Found, labelled: bool, separator: str
) -> tuple[TextExample | None, str]:
    """(example with the row's labels, ""), or (None, why it cannot be used)."""
    labels: tuple[str, ...] | None = None
    if labelled:
        if columns.labels:
            labels, problem = labels_of_columns(row.cells, columns.labels)
        elif columns.label in row.cells:
            labels, problem = labels_of_cell(row.cells[columns.label], separator)
        else:
            problem = f"the label is missing (no field {columns.label!r}; an empty list means no labels)"
        if problem:
            return None, problem
    return MultiLabelExample(example.id, example.line, example.text, example.pair, None, labels), ""


def _label_problem(value: Any, label: str | None) -> str:
    if isinstance(value, (list, dict)):
        several = " (for several labels per text: --task multilabel)" if isinstance(value, list) else ""
        return f"the label is a {type(value).__name__}, expected one string or number{several}"
    return "the label is missing" if label is None else ""


def text_cell(row: Row, column: str) -> tuple[str, str]:
    """(text, ""), or ("", why the cell holds no usable text)."""
    value = row.cells.get(column)
    if value is None or value != value:  # NaN, as pandas writes it
        return "", f"column {column!r} is missing"
    if isinstance(value, (list, dict, bytes)):
        return "", f"column {column!r} holds a {type(value).__name__}, expected text"
    text = str(value).strip()
    return (text, text_problem(text)) if text else ("", f"the text is empty (column {column!r})")


def _read_folder(path: Path, bad: BadRows, labelled: bool, encoding: str | None) -> Iterator[TextExample]:
    """One text per .txt file, labelled by its sub-folder; `unsup/`, IMDb's unlabelled part, is left out."""
    labels = sorted(sub.name for sub in path.iterdir() if sub.is_dir() and sub.name != "unsup")
    folders = {label: path / label for label in labels if label[0] != "." and _text_files(path / label)}
    if not labelled and _text_files(path):
        folders = {"": path}
    elif len(folders) < 2:
        raise UserError(f"{path}: expected sub-folders of .txt files, one per label (such as pos/ and neg/)")
    for label, folder in folders.items():
        for file in _text_files(folder):
            name, (text, problem) = f"{label}/{file.stem}".lstrip("/"), _file_text(file, encoding)
            if problem:
                bad.add(f"{name}.txt", problem)
            else:
                yield TextExample(name, 0, text, None, label or None)


def _text_files(folder: Path) -> list[Path]:
    """The .txt files, 2_9.txt before 10_9.txt; not hidden ones, such as macOS's ._2_9.txt beside each file."""
    return sorted((file for file in folder.glob("*.txt") if file.name[0] != "."), key=_natural)


def _file_text(file: Path, encoding: str | None) -> tuple[str, str]:
    """(text, ""), or ("", why the file holds no usable text)."""
    try:
        text = "\n".join(line for _, line in read_lines(file, encoding)).strip()
    except UserError as error:  # unreadable, or UTF-16
        return "", str(error).removeprefix(f"{file}: ")
    return text, text_problem(text, encoding) if text else "the text is empty"


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that orders numbers within a name by value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]
