"""Which columns of a file hold what: those that the user named, otherwise those with the usual names."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from electra_core.config import plain
from electra_core.errors import UserError
from electra_core.files.row_files import (
    DELIMITERS,
    PLAIN_LINES,
    QUOTES_IN_TSV,
    Row,
    format_of,
    other_encoding,
    read_rows,
)
from electra_core.files.text_lines import at_hand, text_problem

TEXT_NAMES = ("text", "sentence", "review", "content", "document", "comment", "body", "tweet", "utterance")
PAIR_NAMES = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"),
    ("text_a", "text_b"), ("text", "pair"), ("question", "sentence"), ("question", "passage"),
    ("#1 String", "#2 String"),
)  # fmt: skip
LABEL_NAMES = (
    "label", "labels", "class", "category", "sentiment", "target", "gold_label", "is_duplicate", "score",
    "Quality",
)  # fmt: skip
ID_NAMES = ("id", "idx", "index", "guid", "pairID")
USUAL_NAMES = (*TEXT_NAMES, *itertools.chain(*PAIR_NAMES), *LABEL_NAMES, *ID_NAMES)

FIRST_ROWS = 100
"""Rows whose columns together count as the file's: a row of JSON lines may lack some."""

ColumnName = str | int | tuple[str, ...] | None
"""A column's name or its number from 1; of several, the first that the file has counts; None: the usual names.

An int is its digits, so in a table of pandas without names, whose columns are called 0, 1, 2, it is the name."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold what."""

    text: ColumnName = None
    pair: ColumnName = None
    label: ColumnName = None
    id: ColumnName = None
    """ "none": rows are identified by their line numbers, whatever columns there are."""
    header: bool | None = None
    """Whether a CSV or TSV has a header. None: detected; where all columns are numbers, by the usual names."""
    quoting: bool | None = None
    """Whether cells may be quoted. None: in CSV yes, in TSV no."""
    encoding: str | None = None
    """Encoding of a CSV or TSV, or of a folder's texts, as Python names it ("cp1252"). None: UTF-8."""
    labels: tuple[str, ...] | None = None
    """For texts with any number of labels: the columns of 0 and 1, one for each label, instead of `label`."""
    separator: str | None = None
    """For such texts: what separates the labels in a cell (`label_cells.SEPARATOR` if None)."""
    group: ColumnName = None
    """In fine-tuning without dev data: rows with the same value are held out together, or trained on together."""

    def __post_init__(self) -> None:
        for role in ALL_FLAGS:
            object.__setattr__(self, role, _as_name(role, getattr(self, role)))
        object.__setattr__(self, "labels", _as_names(self.labels))
        if self.labels is not None and self.label is not None:
            raise ValueError(
                "labels: the labels' own columns, or the one column that holds them (label), not both"
            )
        if self.separator == "":
            raise ValueError("separator: expected at least one character, got ''")


@dataclass(frozen=True)
class TrainedColumns(Columns):
    """The names of the training file's columns. Another file may have the usual names instead."""

    asked: frozenset[str] = frozenset()
    """The roles (text, pair, label, labels) that were named for this very file."""
    instead_of: tuple[str, ...] = ()
    """The training file's names for those: a first line that holds them is a header."""
    form: str = ""
    """The file's format, whatever its name (`files.row_files.FORMS`)."""


NO_COLUMN = "none"
ROLE_FLAGS = {"text": "--text-column", "pair": "--text-pair-column", "label": "--label-column"}
ALL_FLAGS = {**ROLE_FLAGS, "id": "--id-column", "group": "--group-column"}
LABEL_COLUMNS_FLAG = "--label-columns"


def with_given(columns: Columns, given: Columns) -> Columns:
    """`columns`, overridden by what `given` names."""
    changes = {role: value for role, value in vars(given).items() if value is not None}
    if {"label", "labels"} & changes.keys():  # labels are in one column or in several
        changes = {"label": None, "labels": None, **changes}
    return replace(columns, **changes)


def for_another_file(columns: Columns, given: Columns, form: str = "") -> TrainedColumns:
    """The columns of a file that a fine-tuned model will read: the training file's, except those `given`, and
    without its groups, which only training needs."""
    asked = frozenset(role for role in (*ALL_FLAGS, "labels") if getattr(given, role) is not None)
    replaced = itertools.chain(*(alternatives(getattr(columns, role)) for role in sorted(asked)))
    names = tuple(name for name in replaced if not name.isdecimal() and name != NO_COLUMN)
    columns = with_given(replace(columns, encoding=None, group=None), given)
    return TrainedColumns(**vars(columns), asked=asked, instead_of=names, form=form)


def to_json(columns: Columns) -> dict[str, Any]:
    """Its values by name. Without a group column it has no entry: what was fine-tuned before there were groups is
    resumed, and its tokens in the cache are found."""
    values = asdict(columns)
    return {role: value for role, value in values.items() if role != "group" or value is not None}


def alternatives(name: ColumnName) -> tuple[str, ...]:
    """A column's possible names as a tuple."""
    return (str(name),) if isinstance(name, (str, int)) else name or ()


def names_given(columns: Columns) -> list[str]:
    """The names and numbers that were given for any role."""
    roles = columns.text, columns.pair, columns.label, columns.labels, columns.id, columns.group
    return [name for role in roles for name in alternatives(role)]


def _as_name(role: str, given: Any) -> str | tuple[str, ...] | None:
    """A column's name, or several; numbers as digits.

    Raises:
        ValueError: something else; the message names the role.
    """
    name = plain(given)
    if isinstance(name, (list, tuple)) and name and None not in name:
        return tuple(str(_as_name(role, one)) for one in name)
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise ValueError(f"{role}: expected a column's name or its number from 1, got {given!r:.80}")
    return str(name) if isinstance(name, int) else name


def _as_names(given: Any) -> tuple[str, ...] | None:
    """The columns of 0 and 1, each once, as `_as_name` has them; None: there are none.

    Raises:
        ValueError: something else than several names or numbers.
    """
    if given is None:
        return None
    is_several = isinstance(given, Iterable) and not isinstance(given, str)
    names = [_as_name("labels", name) for name in given] if is_several else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"labels: expected column names, such as ('toxic', 'threat'), got {given!r:.80}")
    return tuple(dict.fromkeys(str(name) for name in names))


def may_be_usual(columns: Columns, role: str) -> bool:
    """Whether a role's column may have a usual name, because the name in `columns` is only the training file's."""
    return isinstance(columns, TrainedColumns) and role not in columns.asked


def names_of(columns: Columns, role: str, usual: Sequence[str]) -> tuple[str, ...]:
    """The names that a role's column may have, in order of preference."""
    given = alternatives(getattr(columns, role))
    return (*given, *usual) if not given or may_be_usual(columns, role) else given


def first_cell(cells: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The value of the first of these columns that a row has; None if it has none."""
    return next((cells[name] for name in names if name in cells), None)


def id_of(path: Path, columns: Columns, cells: Mapping[str, Any]) -> str | None:
    """The name of the column that holds the ids, where rows name their cells; None: the row has no such cell.

    Raises:
        UserError: the column named for this file is missing in a row.
    """
    names = alternatives(columns.id)
    found = next((name for name in names or ("id",) if name in cells), None)
    if names and found is None and cells and columns.id != NO_COLUMN and not may_be_usual(columns, "id"):
        wanted = " or ".join(map(repr, names))
        raise UserError(f"{path}: no id column {wanted}; the columns are {', '.join(cells)}")
    return found


@dataclass(frozen=True)
class Found:
    """The columns of a particular file."""

    text: str
    pair: str | None
    label: str | None
    id: str | None
    present: tuple[str, ...] = ()
    """All columns of the file."""
    labels: tuple[str, ...] = ()
    """The columns of 0 and 1, one for each label."""

    def named(self, columns: Columns) -> Columns:
        """`columns` with the found names filled in, so that another file is read as this one was."""
        roles = {role: getattr(self, role) for role in ROLE_FLAGS if getattr(columns, role) is None}
        return replace(columns, **roles)

    def passed_over(self, usual: Sequence[str]) -> list[str]:
        """The columns that have a usual name but are not read."""
        taken = (self.text, self.pair, self.label, self.id, *self.labels)
        return [name for name in _called(self.present, usual) if name not in taken]


def table(path: Path, columns: Columns) -> Iterator[Row]:
    """The file's rows; the wanted columns help to tell whether it has a header."""
    given = [name for name in names_given(columns) if name != NO_COLUMN]
    names = [name for name in given if not name.isdecimal()]
    header = True if columns.header is None and len(names) == len(given) else columns.header
    form = ""
    if isinstance(columns, TrainedColumns):
        names, form = [*names, *columns.instead_of], columns.form
    wanted, quoting, encoding = (*names, *USUAL_NAMES), columns.quoting, columns.encoding
    return read_rows(path, header=header, wanted=wanted, quoting=quoting, encoding=encoding, form=form)


def first_rows(path: Path, rows: Iterator[Row]) -> tuple[list[Row], list[str]]:
    """The first rows, taken from `rows`, and the columns that they have together."""
    first = list(at_hand(rows, FIRST_ROWS, path))
    return first, list(dict.fromkeys(name for row in first for name in row.cells))


def may_be_header(path: Path, line: int, columns: Columns) -> bool:
    """Whether an example's line may be a header that was read as data, the user not having said there is none."""
    return line == 1 and columns.header is None and format_of(path) in DELIMITERS


def find_columns(
    path: Path, present: Sequence[str], wanted: Columns, labelled: bool, several: bool = False
) -> Found:
    """The column for every role: the named ones, checked, and the usual names for the others.

    Args:
        several: whether a text may have any number of labels, which may have columns of their own.

    Raises:
        UserError: a named column is missing, or nothing tells which one holds the text or the label.
    """
    wants_pairs = {"pair"} if wanted.pair is not None else set[str]()
    for_this_file = wanted.asked if isinstance(wanted, TrainedColumns) else wants_pairs
    if not labelled and list(present) == ["text"] and for_this_file.isdisjoint({"text", "pair"}):
        # Plain lines to predict, whatever the name of the training data's column.
        return Found("text", None, None, None, ("text",))
    may_be_absent = may_be_usual(wanted, "id") or wanted.id == NO_COLUMN
    if isinstance(wanted, TrainedColumns):
        wanted = _usual_instead(wanted, present)
    asked = {"text": wanted.text, "pair": wanted.pair, "id": wanted.id, "label": wanted.label}
    own = _label_columns(path, present, wanted) if labelled and wanted.labels else ()
    names, absent = {}, []
    for role, name in asked.items():
        if name is not None and (match := _match(present, alternatives(name))):
            names[role] = match
        elif name is not None and not ((role == "label" and not labelled) or (role == "id" and may_be_absent)):
            absent.append(role)
    if absent:
        raise UserError(_not_there(path, present, wanted, absent))
    if "text" not in names:
        names = _guess_texts([name for name in present if name not in (*names.values(), *own)]) | names
    for role, usual in (("label", () if own else LABEL_NAMES), ("id", ID_NAMES)):
        free = [name for name in _called(present, usual) if name not in (*names.values(), *own)]
        if asked[role] is None and free:
            names[role] = free[0]
    needed = ("text", "label") if labelled and not own else ("text",)
    if missing := [role for role in needed if role not in names]:
        which, flags = " and the ".join(missing), " and ".join(ROLE_FLAGS[role] for role in missing)
        or_own = f", or one column of 0 and 1 per label with {LABEL_COLUMNS_FLAG}"
        raise UserError(
            f"{path}: no column has a usual name for the {which}; the columns are {', '.join(present)}; "
            f"name one with {flags}{or_own if several and 'label' in missing else ''}"
            f"{_or_no_header(path, wanted)}{_other_kind(path, present)}"
        )
    return Found(names["text"], names.get("pair"), names.get("label"), names.get("id"), tuple(present), own)


def has_column(present: Sequence[str], wanted: Columns, role: str) -> bool:
    """Whether the column that was named for a role is among those present."""
    return _match(present, alternatives(getattr(wanted, role))) is not None


def column_named(path: Path, present: Sequence[str], wanted: Columns, role: str) -> str:
    """The column that was named for a role.

    Raises:
        UserError: the file has no such column; the message lists those present.
    """
    if (name := _match(present, alternatives(getattr(wanted, role)))) is None:
        raise UserError(_not_there(path, present, wanted, [role]))
    return name


def _label_columns(path: Path, present: Sequence[str], wanted: Columns) -> tuple[str, ...]:
    """The columns of 0 and 1; UserError if one is missing."""
    labels = wanted.labels or ()
    if missing := [name for name in labels if name not in present]:
        several = len(missing) > 1
        raise UserError(
            f"{path}: no label column{'s' if several else ''} "
            f"{', '.join(map(repr, missing))}; the columns are {', '.join(present)}; name those of 0 and 1 with "
            f"{LABEL_COLUMNS_FLAG}, or one that holds all labels with {ROLE_FLAGS['label']}"
            f"{_other_kind(path, present)}"
        )
    return labels


def _usual_instead(wanted: TrainedColumns, present: Sequence[str]) -> Columns:
    """Replaces the training file's names that are missing here by usual ones, where only one (or pair) fits."""
    named = {role: alternatives(getattr(wanted, role)) for role in ROLE_FLAGS if may_be_usual(wanted, role)}
    absent = {role for role, names in named.items() if names and _match(present, names) is None}
    changes: dict[str, Any] = {}
    for role in sorted(absent):  # the training file's name in another case beats a usual name
        if alike := _called(present, named[role]):
            changes[role] = alike[0]
    absent -= changes.keys()
    if absent >= {"text", "pair"}:
        pairs = [found for pair in PAIR_NAMES if len(found := _called(present, pair)) == 2]
        changes |= zip(("text", "pair"), pairs[0]) if len(pairs) == 1 else ()
    elif "text" in absent and wanted.pair is None:
        texts = _called(present, TEXT_NAMES)
        changes |= {"text": texts[0]} if len(texts) == 1 else {}
    labels = _called(present, LABEL_NAMES)
    if "label" in absent and len(labels) == 1:
        changes["label"] = labels[0]
    own = wanted.labels if may_be_usual(wanted, "labels") else None
    if own and {*own}.isdisjoint(present) and len(labels) == 1:
        changes |= {"label": labels[0], "labels": None}
    return replace(wanted, **changes)


def _or_no_header(path: Path, wanted: Columns) -> str:
    """What to do about a file whose first line was taken for a header but is none."""
    form = wanted.form if isinstance(wanted, TrainedColumns) else ""
    if format_of(path, form) not in DELIMITERS:
        return ""
    if wanted.header is False:
        return ", by number, from 1"
    return " (if the first line is not a header: --no-header, and the column's number from 1)"


def _other_kind(path: Path, present: Sequence[str]) -> str:
    """A hint at another name, encoding or quoting with which the file's columns would be found."""
    kind = format_of(path)
    if any(map(text_problem, present)):
        return f"; {other_encoding(path)}"
    if kind == ".txt":
        return f"; {PLAIN_LINES}"
    return f"; {QUOTES_IN_TSV}" if kind == ".tsv" and any(name[:1] == '"' for name in present) else ""


def _not_there(path: Path, present: Sequence[str], wanted: Columns, absent: Sequence[str]) -> str:
    """Message for columns that were named and are missing."""
    named = {role: " or ".join(map(repr, alternatives(getattr(wanted, role)))) for role in absent}
    columns = " and ".join(f"no {role} column {names}" for role, names in named.items())
    flags = " and ".join(ALL_FLAGS[role] for role in absent)
    return (
        f"{path}: {columns}; the columns are {', '.join(present)}; "
        f"name {'another' if len(absent) == 1 else 'others'} with {flags}"
        f"{'' if _called(present, USUAL_NAMES) else _or_no_header(path, wanted)}{_other_kind(path, present)}"
    )


def _match(present: Sequence[str], names: tuple[str, ...]) -> str | None:
    """The first column that one of `names` means, as a name or a number from 1."""
    for name in names:
        if name in present:
            return name
        if name.isdecimal() and 1 <= int(name) <= len(present):
            return present[int(name) - 1]
    return None


def _guess_texts(present: Sequence[str]) -> dict[str, str]:
    for pair in PAIR_NAMES:
        if len(found := _called(present, pair)) == 2:
            return dict(zip(("text", "pair"), found))
    return dict(zip(("text",), _called(present, TEXT_NAMES)))


def _called(present: Sequence[str], usual: Sequence[str]) -> list[str]:
    """The columns that have a usual name, in the order of these; case is ignored where only one column matches."""
    found = []
    for name in usual:
        alike = [column for column in present if column.lower() == name.lower()]
        if name in alike or len(alike) == 1:
            found.append(name if name in alike else alike[0])
    return found
