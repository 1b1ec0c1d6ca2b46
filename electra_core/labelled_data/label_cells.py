"""Turns cells into label texts: one label or, for texts that may have several, any number.

Several labels are in one cell, as a list (JSON, Parquet, a list that pandas wrote into a CSV) or with separators;
or each label has a column of 0 and 1. An empty cell or list means no label.
"""

from __future__ import annotations

import ast
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SEPARATOR = ","
"""Default separator between the labels in a cell; docs/decisions.md has the reason."""
UNNAMED = re.compile(r"LABEL_(\d+)")
"""What `transformers` calls a class that nobody named."""
MARKS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
"""Allowed values in a label's own column, in lower case."""


def label_text(value: Any) -> str | None:
    """A label as text: 1, 1.0, True and "1" give "1"; None, NaN and "" give None.

    "1.0" and "True" in a CSV stay as they are: only all its labels together tell what they mean
    (`downstream.classify.Classify.read`).
    """
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    text = "" if value is None else str(value).strip()
    return None if text.lower() in ("", "nan") else text


def labels_as_texts(labels: Any) -> tuple[str, ...]:
    """A task's labels as texts; they may be given as numbers.

    Raises:
        ValueError: not a sequence, or something in it is neither a string nor an integer.
    """
    if isinstance(labels, (str, bytes)) or not isinstance(labels, Iterable):
        raise ValueError(f"labels: expected several, such as ('no', 'yes'), got {labels!r:.80}")
    texts = []
    for label in labels:
        text = label if isinstance(label, str) else label_text(label) if hasattr(label, "__index__") else None
        if text is None:
            raise ValueError(f"labels: expected strings or integers, got {label!r:.80}")
        texts.append(text)
    return tuple(texts)


def look_of(label: str) -> str:
    """A key shared by labels that differ only in case, invisible characters, white space or a number's form."""
    seen = "".join(c for c in unicodedata.normalize("NFKC", label) if unicodedata.category(c) != "Cf")
    look = re.sub(r"(?<=\d)\.0+$", "", " ".join(seen.casefold().split()))
    return {"true": "1", "false": "0"}.get(look, look)


def rows_by_name(
    known: Sequence[str], labels: Sequence[str], *, may_be_others: bool = False
) -> tuple[int | None, ...]:
    """For each label its index in `known`; None if it is not there.

    An exact match comes first, then a label that looks the same (`look_of`), if there is only one. LABEL_1 is 1 if
    the labels are 0, 1, ..., or, where they `may_be_others` (single bad rows), if a 0 is among them.
    """
    if {*labels} == {str(index) for index in range(len(labels))} or (may_be_others and "0" in labels):
        known = _numbered(known)
    place = {label: index for index, label in enumerate(known)}
    theirs, ours = _by_look({*known} - {*labels}), _by_look({*labels} - {*known})
    alike = {label: place[theirs[look]] for look, label in ours.items() if look in theirs}
    return tuple(place.get(label, alike.get(label)) for label in labels)


def _numbered(known: Sequence[str]) -> Sequence[str]:
    """LABEL_0, LABEL_1, ... as 0, 1, ...; other names as they are."""
    numbers = [UNNAMED.fullmatch(label) for label in known]
    return [number[1] for number in numbers if number] if all(numbers) else known


def _by_look(labels: Iterable[str]) -> dict[str, str]:
    """Look -> label, for looks that only one label has."""
    looks = {label: look_of(label) for label in labels}
    often = Counter(looks.values())
    return {look: label for label, look in looks.items() if often[look] == 1}


def labels_of_cell(value: Any, separator: str = SEPARATOR) -> tuple[tuple[str, ...], str]:
    """(the distinct labels in a cell, ""), or ((), why none can be used)."""
    if isinstance(value, str):
        listed = _list_in_text(value)
        if listed is None:
            parts = [label_text(part) for part in value.split(separator)]
            return tuple(dict.fromkeys(part for part in parts if part is not None)), ""
        value = listed
    if isinstance(value, list):
        return _labels_of_list(value)
    if isinstance(value, (dict, bytes)):
        return (), f"the label is a {type(value).__name__}, expected a list of labels, a string or a number"
    label = label_text(value)
    return (() if label is None else (label,)), ""


def _labels_of_list(values: list[Any]) -> tuple[tuple[str, ...], str]:
    for value in values:
        if isinstance(value, (list, dict, bytes)):
            return (), f"a label in a list is a {type(value).__name__}, expected a string or a number"
    labels = [label for value in values if (label := label_text(value)) is not None]
    if len(labels) < len(values):
        return (), "a label in a list is empty"
    if len(labels) > 2 and {*labels} <= {"0", "1"}:
        return (), (
            "a list of 0 and 1, apparently for every label (expected the text's labels; for one column of 0 and 1 "
            "per label: --label-columns)"
        )
    return tuple(dict.fromkeys(labels)), ""


def _list_in_text(text: str) -> list[Any] | None:
    """The list that a text holds in JSON or Python form (as pandas writes it to a CSV); None if it holds none."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            return list(read(text))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return None


def labels_of_columns(cells: Mapping[str, Any], names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """(the names of the columns that hold 1, ""), or ((), which of them holds neither 0 nor 1)."""
    labels = []
    for name in names:
        mark = label_text(cells.get(name))
        if mark is None:
            return (), f"the label is missing (column {name!r} is empty, expected 0 or 1)"
        if mark.lower() not in MARKS:
            return (), f"a label column holds neither 0 nor 1 ({mark!r:.40} in column {name!r})"
        if MARKS[mark.lower()]:
            labels.append(name)
    return tuple(labels), ""
