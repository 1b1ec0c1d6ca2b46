"""Which columns of a file hold what: those that were asked for, else those with the usual names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from electra_core.errors import UserError
from electra_core.row_files import Row, read_rows

TEXT_NAMES = ("text", "sentence", "review", "content", "document", "comment", "body", "tweet", "utterance")
PAIR_NAMES = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"),
    ("text_a", "text_b"), ("question", "sentence"), ("question", "passage"), ("#1 String", "#2 String"),
)  # fmt: skip
LABEL_NAMES = (
    "label", "labels", "class", "category", "sentiment", "target", "gold_label", "is_duplicate", "score",
    "Quality",
)  # fmt: skip
ID_NAMES = ("id", "idx", "index", "guid", "pairID")
USUAL_NAMES = (*TEXT_NAMES, *itertools.chain(*PAIR_NAMES), *LABEL_NAMES, *ID_NAMES)

ColumnName = str | tuple[str, ...] | None
"""A column's name, or its number from 1; several mean the first of them that is there; None: the usual names."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold what."""

    text: ColumnName = None
    pair: ColumnName = None
    label: ColumnName = None
    id: ColumnName = None
    header: bool | None = None
    """Whether a CSV or TSV has a header. None: found out; where all columns are numbers, by the usual names."""
    quoting: bool | None = None
    """Whether cells may be quoted. None: in CSV yes, in TSV no."""


def alternatives(name: ColumnName) -> tuple[str, ...]:
    """A column's possible names as a tuple."""
    return (name,) if isinstance(name, str) else name or ()


@dataclass(frozen=True)
class Found:
    """The columns of a particular file."""

    text: str
    pair: str | None
    label: str | None
    id: str | None


def table(path: Path, columns: Columns) -> Iterator[Row]:
    """The file's rows, its header (if it has one) found with the help of the wanted columns."""
    given = [
        name for role in (columns.text, columns.pair, columns.label, columns.id) for name in alternatives(role)
    ]
    names = [name for name in given if not name.isdecimal()]
    header = True if columns.header is None and len(names) == len(given) else columns.header
    return read_rows(path, header=header, wanted=names or USUAL_NAMES, quoting=columns.quoting)


def find_columns(path: Path, present: Sequence[str], wanted: Columns, labelled: bool) -> Found:
    """The column for every role: those asked for, checked, and the usual names for the others.

    Raises:
        UserError: a column that is not there, or no way to tell which one holds the text or the label.
    """
    if not labelled and wanted.pair is None and list(present) == ["text"]:
        # Plain lines to predict, whatever the training data's column was called.
        return Found("text", None, None, None)
    asked = {"text": wanted.text, "pair": wanted.pair, "id": wanted.id, "label": wanted.label}
    names = {}
    for role, name in asked.items():
        optional = role == "id" or (role == "label" and not labelled)
        if name is not None and (match := _present(path, present, alternatives(name), role, optional)):
            names[role] = match
    if "text" not in names:
        names = _guess_texts([name for name in present if name not in names.values()]) | names
    for role, usual in (("label", LABEL_NAMES), ("id", ID_NAMES)):
        taken = set(names.values())
        match = next((name for name in usual if name in present and name not in taken), None)
        if asked[role] is None and match is not None:
            names[role] = match
    for role in ("text", "label") if labelled else ("text",):
        if role not in names:
            raise UserError(
                f"{path}: which column holds the {role}? The columns are {', '.join(present)}; "
                f"name it with --{role}-column"
            )
    return Found(names["text"], names.get("pair"), names.get("label"), names.get("id"))


def _present(path: Path, present: Sequence[str], names: tuple[str, ...], role: str, optional: bool) -> str | None:
    for name in names:
        if name in present:
            return name
        if name.isdecimal() and 1 <= int(name) <= len(present):
            return present[int(name) - 1]
    if optional:
        return None
    raise UserError(
        f"{path}: there is no {role} column {' or '.join(map(repr, names))}; the columns are {', '.join(present)}"
    )


def _guess_texts(present: Sequence[str]) -> dict[str, str]:
    for first, second in PAIR_NAMES:
        if first in present and second in present:
            return {"text": first, "pair": second}
    match = next((name for name in TEXT_NAMES if name in present), None)
    return {"text": match} if match else {}
