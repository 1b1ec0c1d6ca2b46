"""Rows of tagged words in the forms of spreadsheets and of annotation tools, for `tagged_files.py`.

A table with a row per word, a column of which tells the sentences apart, and texts with the places of their spans.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from electra_core.columns import Columns, names_of
from electra_core.errors import UserError
from electra_core.row_files import DELIMITERS, Row, format_of, read_lines, read_rows

SPAN_LISTS = ("entities", "spans", "label", "labels")
SENTENCE_COLUMNS = ("Sentence #", "sentence_id", "sent_id", "sentence id", "sentence_idx", "sentence")
WORD_COLUMNS = ("Word", "token", "form", "words", "tokens")
TAG_COLUMNS = ("Tag", "ner_tag", "ner", "label", "pos_tag", "pos", "tags", "ner_tags", "labels")
LAST_MARK = 0x1E94A  # the last combining mark of a script
_MARKS = "".join(chr(code) for code in range(0x300, LAST_MARK + 1) if unicodedata.category(chr(code))[0] == "M")
_JOINED = rf"[{_MARKS}\u200c\u200d\U000e0100-\U000e01ef]"  # with joiners and variation selectors
_LETTERS = rf"(?:\w{_JOINED}*)+"  # \w leaves out accents and vowel signs that are characters of their own
WORD = re.compile(rf"{_LETTERS}(?:[-'’.,:/]{_LETTERS})*|[^\w\s]{_JOINED}*")
"""Words of raw text: letters and digits with inner hyphens, points, apostrophes; else single characters."""

Cells = tuple[int, list[str]]  # of the line of that number
Place = tuple[int, int]  # of a word: its first character, and the one behind its last
Span = tuple[int, int, str]  # the same of a span, and its type


# ---- a row per word


def table_columns(path: Path, columns: Columns, labelled: bool) -> tuple[str, str, str] | None:
    """Names of the columns of sentences, words and tags; None if it is no such table.

    Raises:
        UserError: a .csv to learn from or to judge by that is none, or a table without tags.
    """
    if format_of(path) not in DELIMITERS:
        return None
    if format_of(path) == ".tsv":  # most are CoNLL columns, two of which may begin with the same cell
        present = [
            cell.strip() for cell in next((line for _, line in read_lines(path, columns.encoding)), "").split("\t")
        ]
    elif (first := next(read_rows(path, header=True, encoding=columns.encoding), None)) is not None:
        present = list(first.cells)
    else:
        raise UserError(f"{path}: holds no rows")
    wanted = (SENTENCE_COLUMNS, names_of(columns, "text", WORD_COLUMNS), names_of(columns, "label", TAG_COLUMNS))
    sentence, word, tag = (_called(present, names) for names in wanted)
    is_table = sentence and word and sentence != word
    if labelled and (not tag if is_table else format_of(path) == ".csv"):
        raise UserError(
            f"{path}: expected a row per word, with columns as Sentence #, Word, Tag, found {', '.join(present)}; "
            "tags are also read from CoNLL columns, JSON lines and Parquet"
        )
    return (sentence, word, tag or "") if sentence and word and is_table else None


def _called(present: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of the columns that has one of the names, in any case, or a number from 1."""
    for name in names:
        if name.isdecimal() and 1 <= int(name) <= len(present):
            return present[int(name) - 1]
        if alike := [column for column in present if column.lower() == name.lower()]:
            return alike[0]
    return None


def table_rows(
    rows: Iterable[Row], sentence: str, wanted: Sequence[str], problems: dict[int, str]
) -> Iterator[Cells]:
    """Line and `wanted` cells of each row, no cells before a sentence; `problems` takes what is wrong, by line."""
    current = ""
    for row in rows:
        if row.problem:
            problems[row.line] = row.problem
        cell = row.cells.get(sentence, "").strip()
        if cell and cell != current:
            yield row.line, []
            current = cell
        yield row.line, [row.cells.get(name, "").strip() for name in wanted]


# ---- spans in a text


def tags_of_spans(text: str, given: Any) -> tuple[list[Place], list[str], str]:
    """The places of a text's words, their tags (IOB2), and "" - or why there are none.

    Args:
        given: [[start, end, type], ...], or dicts of these with start, end, and label or type.
    """
    if not isinstance(given, list):
        return [], [], "no list of words, nor a text with entities (expected [[start, end, type], ...])"
    spans: set[Span] = set()
    for item in given:
        try:
            start, end, kind = _span(item)
        except (KeyError, TypeError, ValueError):
            return [], [], f"expected spans as [start, end, type], or dicts of these (found {item!r:.60})"
        if not (0 <= start < end <= len(text) and text[start:end].strip()):
            return [], [], f"a span holds no word of the text ({item!r:.60})"
        spans.add((start, end, kind))
    for (start, end, _), (other, _, _) in itertools.pairwise(sorted(spans)):
        if other < end:
            return [], [], f"two spans overlap (characters {start} to {end}, and from {other})"
    borders = sorted({0, len(text), *(place for start, end, _ in spans for place in (start, end))})
    places = [match.span() for a, b in itertools.pairwise(borders) for match in WORD.finditer(text, a, b)]
    tags = ["O"] * len(places)
    for start, end, kind in spans:
        inside = [index for index, (a, b) in enumerate(places) if start <= a and b <= end]
        for index in inside:
            tags[index] = f"{'B' if index == inside[0] else 'I'}-{kind}"
    return places, tags, "" if places else "the text is empty"


def _span(item: Any) -> Span:
    """As JSON has it; raises KeyError, TypeError or ValueError for another form."""
    if isinstance(item, dict):
        item = item["start"], item["end"], item["label"] if "label" in item else item["type"]
    start, end, kind = item
    if type(start) is not int or type(end) is not int or not isinstance(kind, str) or not kind.strip():
        raise ValueError
    return start, end, kind.strip()
