"""Tagged words in the formats of spreadsheets and annotation tools, for `tagged_files.py`.

These are tables with a row per word and a column that identifies the sentence, and texts with the places of their
spans.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from electra_core.errors import UserError
from electra_core.files.row_files import DELIMITERS, Row, format_of, read_rows
from electra_core.files.text_lines import read_lines
from electra_core.labelled_data.columns import Columns, names_of

NO_NESTED = "nested spans are not supported; keep the outer ones"
SPAN_LISTS = ("entities", "spans", "label", "labels")
SENTENCE_COLUMNS = ("Sentence #", "sentence_id", "sent_id", "sentence id", "sentence_idx", "sentence")
WORD_COLUMNS = ("Word", "token", "form", "words", "tokens")
TAG_COLUMNS = ("Tag", "ner_tag", "ner", "label", "pos_tag", "pos", "tags", "ner_tags", "labels")
LAST_MARK = 0x1E94A  # the last combining mark of a script
_CHARACTERS = [chr(code) for code in range(LAST_MARK + 1)]
_MARKS = "".join(c for c in _CHARACTERS if unicodedata.category(c)[0] == "M")
_JOINERS = "\u200c\u200d"
_CONTROLS = "".join(c for c in _CHARACTERS if unicodedata.category(c) in ("Cc", "Cf") and not c.isspace())
_HIDDEN = _CONTROLS.replace(_JOINERS, "") + r"\U000e0001\U000e0020-\U000e007f"  # with the tags of flags
_JOINED = rf"(?:[{_HIDDEN}]*[{_MARKS}{_JOINERS}\U000e0100-\U000e01ef])*"  # with joiners and variation selectors
_THAI_LAO = r"\u0e01-\u0e3a\u0e40-\u0e4f\u0e81-\u0ecf\u0edc-\u0edf"
_BURMESE_KHMER = r"\u1000-\u103f\u1050-\u108f\u109a-\u109f\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa7f\u1780-\u17dd"
_KANA_HAN = (
    r"\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
UNSPACED = _THAI_LAO + _BURMESE_KHMER + _KANA_HAN
"""Characters (except digits) of scripts without spaces between words, as ranges of a regular expression."""
_LETTER = rf"[^\W{UNSPACED}]{_JOINED}"  # \w leaves out combining accents and vowel signs
_LETTERS = rf"{_LETTER}(?:[{_HIDDEN}]*{_LETTER})*"
_INNER = rf"(?:[{_HIDDEN}]*[-'’.,:/][{_HIDDEN}]*{_LETTERS})*"
WORD = re.compile(rf"{_LETTERS}{_INNER}|[{UNSPACED}]{_JOINED}|[^\w\s{_HIDDEN}{_JOINERS}]{_JOINED}")
"""Words of raw text: letters and digits with inner hyphens, points and apostrophes; otherwise single characters,
also in scripts without spaces, where no rule finds words, and a whole sentence would be one. Soft hyphens and
others that are not seen may lie inside a word, but do not begin or end one."""

Cells = tuple[int, list[str]]  # line number, and its cells
Place = tuple[int, int]  # of a word: its first character, and the one after its last
Span = tuple[int, int, str]  # the same of a span, and its type


# ---- a row per word


def table_columns(path: Path, columns: Columns, labelled: bool) -> tuple[str, str, str] | None:
    """Names of the columns of sentences, words and tags; None if the file is not such a table.

    Raises:
        UserError: the file is unreadable or empty, a labelled .csv is not such a table, or a labelled table has no
            tags.
    """
    if format_of(path) not in DELIMITERS:
        return None
    if format_of(path) == ".tsv":  # most are CoNLL columns, two of which may begin with the same cell
        present = first_line_cells(path, columns.encoding)
    elif (first := next(read_rows(path, header=True, encoding=columns.encoding), None)) is not None:
        present = list(first.cells)
    else:
        raise UserError(f"{path}: holds no rows")
    wanted = (SENTENCE_COLUMNS, names_of(columns, "text", WORD_COLUMNS), names_of(columns, "label", TAG_COLUMNS))
    sentence, word, tag = (_first_meant(present, names) for names in wanted)
    is_table = sentence and word and sentence != word
    if labelled and (not tag if is_table else format_of(path) == ".csv"):
        raise UserError(
            f"{path}: expected one row per word, columns Sentence #, Word, Tag, got {', '.join(present)}; "
            "tags can also be read from CoNLL columns, JSON lines and Parquet"
        )
    return (sentence, word, tag or "") if sentence and word and is_table else None


def first_line_cells(path: Path, encoding: str | None) -> list[str]:
    """The cells of a TSV's first line, of which nothing else is known yet."""
    first = next((line for _, line in read_lines(path, encoding)), "")
    return [cell.strip() for cell in first.split("\t")]


def _first_meant(present: Sequence[str], names: Sequence[str]) -> str | None:
    """The first column that one of the names means, in any case or as a number from 1."""
    for name in names:
        if name.isdecimal() and 1 <= int(name) <= len(present):
            return present[int(name) - 1]
        if alike := [column for column in present if column.lower() == name.lower()]:
            return alike[0]
    return None


def table_rows(
    rows: Iterable[Row], sentence: str, wanted: Sequence[str], problems: dict[int, str]
) -> Iterator[Cells]:
    """Line and `wanted` cells of each row, and no cells before each sentence; fills `problems`, by line."""
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
    """(places of a text's words, their IOB2 tags, ""), or ([], [], why there are none).

    Args:
        given: [[start, end, type], ...], or dicts of these with start, end, and label or type.
    """
    if not isinstance(given, list):
        return [], [], "neither a list of words nor a text with entities (expected [[start, end, type], ...])"
    spans: set[Span] = set()
    for item in given:
        try:
            start, end, kind = _span(item)
        except (KeyError, TypeError, ValueError):
            return [], [], f"expected spans as [start, end, type] or dicts of these (got {item!r:.60})"
        if not (0 <= start < end <= len(text) and WORD.search(text, start, end)):
            return [], [], f"a span contains no word of the text ({item!r:.60})"
        spans.add((start, end, kind))
    for (start, end, _), (other, _, _) in itertools.pairwise(sorted(spans)):
        if other < end:
            return [], [], f"two spans overlap (characters {start} to {end}, and from {other}); {NO_NESTED}"
    places = cut_at(text, spans)
    return places, tags_at(places, spans), "" if places else "the text is empty"


def cut_at(text: str, spans: Iterable[Span]) -> list[Place]:
    """The places of a text's words, which are also split where a span begins or ends."""
    borders = sorted({0, len(text), *(place for start, end, _ in spans for place in (start, end))})
    return [match.span() for a, b in itertools.pairwise(borders) for match in WORD.finditer(text, a, b)]


def tags_at(places: Sequence[Place], spans: Iterable[Span]) -> list[str]:
    """The IOB2 tags of words, none of which may extend beyond the end of a span."""
    tags = ["O"] * len(places)
    starts = [start for start, _ in places]
    for start, end, kind in spans:
        first, stop = bisect_left(starts, start), bisect_left(starts, end)
        tags[first:stop] = [f"{'I' if index else 'B'}{'-' if kind else ''}{kind}" for index in range(stop - first)]
    return tags


def _span(item: Any) -> Span:
    """A span from its JSON value; raises KeyError, TypeError or ValueError for any other form."""
    if isinstance(item, dict):
        item = item["start"], item["end"], item["label"] if "label" in item else item["type"]
    start, end, kind = item
    if type(start) is not int or type(end) is not int or not isinstance(kind, str) or not kind.strip():
        raise ValueError
    return start, end, kind.strip()
