"""Reads sentences with a tag for every word in the usual formats, and splits raw texts to be tagged into words.

The formats are CoNLL columns (word first, tag last, an empty line after a sentence), CoNLL-U and CoNLL-U Plus,
lists in JSON lines or Parquet (or texts with the places of their spans), tables with a row per word and, for
prediction, plain lines and the text column of a CSV or TSV.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from electra_core.errors import UserError
from electra_core.files.row_files import HUB, Row, format_of, read_rows
from electra_core.files.text_lines import read_lines, text_problem
from electra_core.labelled_data.columns import (
    NO_COLUMN,
    TEXT_NAMES,
    Columns,
    alternatives,
    first_cell,
    may_be_usual,
    names_of,
)
from electra_core.labelled_data.groups import ONLY_ROWS
from electra_core.labelled_data.label_cells import label_text
from electra_core.labelled_data.labelled import BadRows, checked, examples_of_rows
from electra_core.labelled_data.tagged_rows import (
    SPAN_LISTS,
    WORD,
    Cells,
    first_line_cells,
    table_columns,
    table_rows,
    tags_of_spans,
)

WORD_LISTS, TAG_LISTS = ("tokens", "words"), ("tags", "ner_tags", "labels")
CONLLU_COLUMNS = ("ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC")
CONLLU_FIRST = re.compile(r"1(-\d+)?|0\.1")  # in the first column
CONLLU_LEFT_OUT = re.compile(r"\d+[-.]\d+")  # in the column ID
CONLLU_PLUS = re.compile(r"#\s*global\.columns\s*=(.+)")  # a comment before the first sentence

Line = tuple[int, str]  # its number in the file, and its text


@dataclass(frozen=True, slots=True)
class TaggedExample:
    """One sentence; `tags` is None if there are none, `offsets` are set if it was split from a text."""

    id: str
    line: int
    words: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    text: str | None = None
    offsets: tuple[tuple[int, int], ...] = ()


def from_text(
    text: str, name: str = "1", line: int = 1, places: Sequence[tuple[int, int]] | None = None
) -> TaggedExample:
    """A raw text split into words, at their `places` in it; None: found here."""
    places = tuple(match.span() for match in WORD.finditer(text)) if places is None else tuple(places)
    return TaggedExample(name, line, tuple(text[a:b] for a, b in places), None, text, places)


def read_tagged(
    path: Path | str, columns: Columns | None = None, bad: BadRows | None = None, *, labelled: bool = True
) -> Iterator[TaggedExample]:
    """Sentences with a tag per word.

    A file of CoNLL columns is CoNLL-U if its first line that is not a comment (`# ...`) has that format's ten
    tab-separated columns and begins with the number of a first word: 1, 1-2 or 0.1. In CoNLL-U, comments, ranges
    (`1-2 du`, whose words `1 de` and `2 le` follow) and empty nodes (`1.1`) are left out; in other files `1-2` is
    a word, and so is `#`, except in comments at the head of a sentence (`_is_comment`). It is CoNLL-U Plus if a
    comment before that line names the columns (`# global.columns = ...`).

    A CSV or TSV whose header names a column for sentences (`SENTENCE_COLUMNS`) and one for words has a row per
    word; a sentence continues while its cell is empty or unchanged. Rows with a text and the places of its spans
    ([[start, end, type], ...] or dicts of these) are split into words like raw text, and also at the spans' ends.

    Args:
        columns: `text` holds the words, `label` the tags: numbers (from 1) of CoNLL columns, or names of lists;
            for CoNLL-U also names of columns. None: the first and the last, or the usual names; for CoNLL-U FORM
            and UPOS, if present.
        bad: receives sentences that cannot be used; without it they raise at the end of the file.
        labelled: whether every sentence must have tags. If not, tags are not read, and a text instead of a list
            is split into words here.

    Raises:
        UserError: file unreadable or empty, bad sentences.
    """
    path, columns = Path(path), columns or Columns()
    bad = bad or BadRows(path)
    names, has_rows = table_columns(path, columns, labelled), _holds_rows(path, columns, labelled)
    if (names or not has_rows) and columns.id not in (None, NO_COLUMN) and not may_be_usual(columns, "id"):
        raise UserError(f"--id-column: no effect with {path}, where a row is a word")
    if not (names or has_rows) and labelled and columns.group is not None:
        raise UserError(f"--group-column: no effect with {path}, which is no table; {ONLY_ROWS}")
    if names:
        examples = _read_table(path, names, columns.encoding, bad, labelled)
    elif has_rows:
        examples = _read_lists(path, columns, bad, labelled)
    else:
        examples = _read_conll(path, columns, bad, labelled)
    yield from checked(path, examples, bad)


def _holds_rows(path: Path, columns: Columns, labelled: bool) -> bool:
    """Whether it is a file of rows, not of CoNLL columns; for a .tsv to predict, its first line decides."""
    kind = format_of(path)
    if kind in (".jsonl", ".ndjson", ".json", ".parquet") or str(path).startswith(HUB):
        return True
    if labelled:
        return False
    if kind == ".tsv":
        return not {*alternatives(columns.text), *TEXT_NAMES}.isdisjoint(first_line_cells(path, columns.encoding))
    return kind in (".csv", ".txt") or str(path) == "-"


# ---- CoNLL columns


def _read_conll(path: Path, columns: Columns, bad: BadRows, labelled: bool) -> Iterator[TaggedExample]:
    """Sentences from CoNLL columns. An empty line ends a sentence; -DOCSTART- lines are skipped."""
    lines, names = _looked_at(read_lines(path, columns.encoding))
    word = _number(path, columns, "text", names.index("FORM") if "FORM" in names else 0, names)
    tag = _number(path, columns, "label", names.index("UPOS") if "UPOS" in names else -1, names)
    needed = max(word + 1, tag + 1, 2) if labelled else word + 1
    for sentence in _sentences(_conllu_rows(lines, names) if names else _rows(lines)):
        sentence = sentence if names else _without_comments(sentence)
        if not sentence:
            continue
        number, rows = sentence[0][0], [cells for _, cells in sentence]
        if problem := _conll_problem(sentence, needed):
            bad.add(number, problem)
            continue
        tags = tuple(row[tag] for row in rows) if labelled else None
        yield TaggedExample(str(number), number, tuple(row[word] for row in rows), tags)


def _number(path: Path, columns: Columns, role: str, usual: int, names: Sequence[str]) -> int:
    """Index of a column given by its number from 1, or by name if the columns have `names`."""
    given = next(iter(names_of(columns, role, ())), None)
    if given in names:
        return names.index(given)
    if given is None or (not given.isdecimal() and may_be_usual(columns, role)):
        return usual
    if not (given.isdecimal() and int(given) > 0):
        known = f" or one of {', '.join(names)}" if names else ""
        raise UserError(f"{path}: {role} column: expected a number from 1{known}, got {given!r}")
    return int(given) - 1


def _looked_at(lines: Iterator[Line]) -> tuple[Iterator[Line], tuple[str, ...]]:
    """The same lines, and the names of their columns if the file is CoNLL-U (Plus)."""
    head: list[Line] = []
    for number, line in lines:
        head.append((number, line))
        if plus := CONLLU_PLUS.fullmatch(line):
            return itertools.chain(head, lines), tuple(plus[1].split())
        if line.strip() and not line.startswith("#"):
            cells = line.split("\t")
            is_conllu = len(cells) == len(CONLLU_COLUMNS) and CONLLU_FIRST.fullmatch(cells[0]) is not None
            return itertools.chain(head, lines), CONLLU_COLUMNS if is_conllu else ()
    return iter(head), ()


def _rows(lines: Iterable[Line]) -> Iterator[Cells]:
    """Number and cells of each line. Only spaces and tabs separate cells; a word may contain U+00A0."""
    for number, line in lines:
        is_word = line.strip() and not line.startswith("-DOCSTART-")
        yield number, re.split(r"[ \t]+", line.strip(" \t")) if is_word else []


def _conllu_rows(lines: Iterable[Line], names: Sequence[str]) -> Iterator[Cells]:
    """As `_rows`, for CoNLL-U: only tabs separate cells; a word may contain spaces."""
    place = names.index("ID") if "ID" in names else None
    for number, line in lines:
        if line.startswith("#"):
            continue
        cells = line.split("\t") if line.strip() else []
        if place is None or not CONLLU_LEFT_OUT.fullmatch("".join(cells[place : place + 1])):
            yield number, cells


def _sentences(rows: Iterable[Cells]) -> Iterator[list[Cells]]:
    """The rows of each sentence; a row without cells separates two."""
    sentence: list[Cells] = []
    for number, cells in rows:
        if cells:
            sentence.append((number, cells))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _without_comments(sentence: list[Cells]) -> list[Cells]:
    """The sentence's rows without the comments at its head."""
    columns = len(sentence[-1][1])
    return list(itertools.dropwhile(lambda row: _is_comment(row[1], columns), sentence))


def _is_comment(cells: Sequence[str], columns: int) -> bool:
    """Whether cells at a sentence's head are a comment: `# id 7 ...`, `# text = ...`, or not `columns` many."""
    return cells[0][:1] == "#" and (cells[1:2] == ["id"] or cells[2:3] == ["="] or len(cells) != columns)


def _conll_problem(lines: Sequence[Cells], needed: int) -> str:
    columns = len(lines[0][1])
    for number, cells in lines:
        if len(cells) < needed:
            return f"a word without a tag (line {number}: {' '.join(cells)!r})"
        if len(cells) != columns:
            return f"expected {columns} columns as before, got {len(cells)} (line {number})"
        if "" in cells:
            return f"an empty column (line {number})"
        if problem := text_problem(" ".join(cells)):
            return f"{problem} (line {number})"
    return ""


# ---- a row per word


def _read_table(
    path: Path, names: tuple[str, str, str], encoding: str | None, bad: BadRows, labelled: bool
) -> Iterator[TaggedExample]:
    problems: dict[int, str] = {}
    wanted = names[1:] if labelled else names[1:2]
    rows = read_rows(path, header=True, encoding=encoding)
    for sentence in _sentences(table_rows(rows, names[0], wanted, problems)):
        number = sentence[0][0]
        problem = next((f"{problems.pop(line)} (line {line})" for line, _ in sentence if line in problems), "")
        if problem := problem or _conll_problem(sentence, len(wanted)):
            bad.add(number, problem)
            continue
        words, *tags = zip(*(cells for _, cells in sentence))
        yield TaggedExample(str(number), number, words, tags[0] if labelled else None)


# ---- rows


def _read_lists(path: Path, columns: Columns, bad: BadRows, labelled: bool) -> Iterator[TaggedExample]:
    rows = read_rows(path, header=columns.header, encoding=columns.encoding)
    read = partial(_tagged_row if labelled else _untagged_row, columns=columns)
    return examples_of_rows(path, rows, columns, bad, labelled, read)


def _tagged_row(row: Row, name: str, columns: Columns) -> tuple[TaggedExample | None, str]:
    """The example from lists of words and tags, or from a text and the places of its spans."""
    word_names, tag_names = names_of(columns, "text", WORD_LISTS), names_of(columns, "label", TAG_LISTS)
    words, text = first_cell(row.cells, word_names), first_cell(row.cells, names_of(columns, "text", TEXT_NAMES))
    if isinstance(text, str) and words in (None, text):
        places, marks, problem = tags_of_spans(text, first_cell(row.cells, names_of(columns, "label", SPAN_LISTS)))
        if problem := text_problem(text) or problem:
            return None, problem
        return replace(from_text(text, name, row.line, places), tags=tuple(marks)), ""
    tags = first_cell(row.cells, tag_names)
    if problem := _words_problem(words, word_names) or _tags_problem(words, tags, tag_names):
        return None, problem
    as_text = tuple(label_text(tag) or "" for tag in tags)
    return TaggedExample(name, row.line, tuple(map(str, words)), as_text), ""


def _untagged_row(row: Row, name: str, columns: Columns) -> tuple[TaggedExample | None, str]:
    """The example from a list of words or a text, whatever the name of the training data's column."""
    names = tuple(dict.fromkeys((*names_of(columns, "text", WORD_LISTS), *WORD_LISTS, *TEXT_NAMES)))
    words = first_cell(row.cells, names)
    if isinstance(words, str):
        problem = text_problem(words)
        return (None, problem) if problem else (from_text(words, name, row.line), "")
    problem = _words_problem(words, names)
    return (None, problem) if problem else (TaggedExample(name, row.line, tuple(map(str, words))), "")


def _words_problem(words: Any, names: Sequence[str]) -> str:
    if not (isinstance(words, list) and words):
        return f"no list of words (expected in {' or '.join(names)})"
    for number, word in enumerate(words, 1):
        if word is None or word == "" or isinstance(word, (list, dict)):
            return f"a word is empty or not text (word {number}: {word!r:.40})"
        if problem := text_problem(str(word)):
            return f"{problem} (word {number})"
    return ""


def _tags_problem(words: Sequence[Any], tags: Any, names: Sequence[str]) -> str:
    if not isinstance(tags, list):
        return f"no list of tags (expected in {' or '.join(names)})"
    if len(tags) != len(words):
        return f"tag count differs from word count ({len(tags)} tags, {len(words)} words)"
    for number, tag in enumerate(tags, 1):
        if label_text(tag) is None or isinstance(tag, (list, dict)):
            return f"a tag is empty or not text (tag {number}: {tag!r:.40})"
    return ""
