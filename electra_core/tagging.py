"""Tagging: a tag for every word (named entities, chunks, parts of speech).

Tags that mark spans come in several notations; everything here works in IOB2:

    words   U.N.   official  Ekeus   heads for  Baghdad
    IOB1    I-ORG  O         I-PER   O     O    I-LOC     B- only between neighbours of one type (CoNLL-2003)
    IOB2    B-ORG  O         B-PER   O     O    B-LOC     every span begins with B-
    IOBES   S-ORG  O         S-PER   O     O    S-LOC     E- ends a span, S- is a span of one word (also L-, U-)

A word's tag is predicted at its first sub-token. Sentences longer than the model's input go through
overlapping windows, each word judged where it has most context.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from electra_core.classify import softmax
from electra_core.downstream import Task
from electra_core.errors import UserError
from electra_core.features import UNLABELLED, Features, TaskBatch, windows
from electra_core.labelled import BadRows, Columns, Ids, alternatives, checked
from electra_core.metrics import classification_metrics, span_metrics
from electra_core.row_files import HUB, format_of, read_lines, read_rows, text_problem
from electra_core.tasks import TokenClassifier, tagging_loss
from electra_core.tokenizer import Tokenizer

WORD_LISTS, TAG_LISTS = ("tokens", "words"), ("tags", "ner_tags", "labels")
SPAN_TAG = re.compile(r"O|[BIELSU]-.+")
WORD = re.compile(r"\w+(?:[-'’.,:/]\w+)*|[^\w\s]")
"""Words of raw text: letters and digits with inner hyphens, points, apostrophes; else single characters."""


@dataclass(frozen=True, slots=True)
class TaggedExample:
    """One sentence; `tags` is None where there are none, `offsets` are set where it was cut from a text."""

    id: str
    line: int
    words: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    text: str | None = None
    offsets: tuple[tuple[int, int], ...] = ()


def from_text(text: str, name: str = "1", line: int = 1) -> TaggedExample:
    """A raw text as words with their places in it."""
    places = tuple(match.span() for match in WORD.finditer(text))
    return TaggedExample(name, line, tuple(text[a:b] for a, b in places), None, text, places)


def read_tagged(
    path: Path | str, bad: BadRows | None = None, *, tag_column: str | None = None, labelled: bool = True
) -> Iterator[TaggedExample]:
    """Sentences with a tag per word, from CoNLL columns or from lists in JSON lines or Parquet.

    Args:
        bad: takes sentences that cannot be used; without it they raise at the end of the file.
        tag_column: number (from 1) of the CoNLL column, or name of the list; None: the last, or the usual names.
        labelled: whether every sentence must have tags. Without, a line of a .txt file or
            the `text` of a JSON line is cut into words here.

    Raises:
        UserError: file unreadable or empty, bad sentences.
    """
    path = Path(path)
    bad = bad or BadRows(path)
    raw = not labelled and (format_of(path) == ".txt" or str(path) == "-")
    if raw or format_of(path) in (".jsonl", ".json", ".parquet") or str(path).startswith(HUB):
        examples = _read_lists(path, bad, tag_column, labelled)
    else:
        examples = _read_conll(path, bad, tag_column, labelled)
    yield from checked(path, examples, bad)


def _read_conll(path: Path, bad: BadRows, tag_column: str | None, labelled: bool) -> Iterator[TaggedExample]:
    """Word first, tag last on each line; an empty line ends a sentence; -DOCSTART- lines are no sentences."""
    if tag_column is not None and not tag_column.isdigit():
        raise UserError(f"{path}: label column: expected a number from 1, got {tag_column!r}")
    column = int(tag_column) - 1 if tag_column else -1
    for lines in _sentences(path):
        first, rows = lines[0][0], [line.split() for _, line in lines]
        problem = _conll_problem(lines, max(column + 1, 2 if labelled else 1))
        if problem:
            bad.add(first, problem)
            continue
        tags = tuple(row[column] for row in rows) if len(rows[0]) > 1 else None
        yield TaggedExample(str(first), first, tuple(row[0] for row in rows), tags)


def _sentences(path: Path) -> Iterator[list[tuple[int, str]]]:
    """The numbered lines of each sentence."""
    lines: list[tuple[int, str]] = []
    for number, line in read_lines(path):
        if line.strip() and not line.startswith("-DOCSTART-"):
            lines.append((number, line))
        elif lines:
            yield lines
            lines = []
    if lines:
        yield lines


def _conll_problem(lines: Sequence[tuple[int, str]], needed: int) -> str:
    columns = len(lines[0][1].split())
    for number, line in lines:
        if len(line.split()) < needed:
            return f"a word without tag (line {number}: {line.strip()!r})"
        if len(line.split()) != columns:
            return f"expected {columns} columns as before, found {len(line.split())} (line {number})"
        if text_problem(line):
            return f"{text_problem(line)} (line {number})"
    return ""


def _read_lists(path: Path, bad: BadRows, tag_column: str | None, labelled: bool) -> Iterator[TaggedExample]:
    names, ids = (tag_column,) if tag_column else TAG_LISTS, Ids(labelled)
    for row in read_rows(path):
        words = next((row.cells[name] for name in WORD_LISTS if name in row.cells), None)
        tags = next((row.cells[name] for name in names if name in row.cells), None)
        text = row.cells.get("text")
        if words is None and isinstance(text, str) and not labelled and not row.problem:
            yield from_text(text, str(row.cells.get("id", row.line)), row.line)
            continue
        problem = row.problem or _list_problem(words, tags, names, labelled)
        if not problem and "id" in row.cells:
            problem = ids.problem(str(row.cells["id"]))
        if problem or not isinstance(words, list):
            bad.add(row.line, problem)
            continue
        as_text = tuple(map(str, tags)) if isinstance(tags, list) else None
        yield TaggedExample(str(row.cells.get("id", row.line)), row.line, tuple(map(str, words)), as_text)


def _list_problem(words: Any, tags: Any, names: Sequence[str], labelled: bool) -> str:
    if not (isinstance(words, list) and words):
        return f"no list of words (expected in {' or '.join(WORD_LISTS)})"
    for number, word in enumerate(words, 1):
        if word is None or word == "" or isinstance(word, (list, dict)):
            return f"a word is empty or no text (word {number}: {word!r:.40})"
        if problem := text_problem(str(word)):
            return f"{problem} (word {number})"
    if labelled and not isinstance(tags, list):
        return f"no list of tags (expected in {' or '.join(names)})"
    if isinstance(tags, list) and len(tags) != len(words):
        return f"tag count differs from word count ({len(tags)} tags, {len(words)} words)"
    return ""


def marks_spans(tags: Sequence[str]) -> bool:
    """Whether these are tags of spans (O, B-X, I-X, ...) rather than, say, parts of speech."""
    return "O" in tags and all(SPAN_TAG.fullmatch(tag) for tag in tags)


def to_iob2(tags: Sequence[str]) -> list[str]:
    """IOB1, IOB2 or IOBES tags of one sentence -> IOB2."""
    result, before = [], "O"
    for tag in tags:
        if tag == "O":
            result.append("O")
        else:
            mark, kind = tag[0], tag[2:]
            goes_on = mark in "IEL" and before[2:] == kind and before[0] not in "ESLU"
            result.append(("I-" if goes_on else "B-") + kind)
        before = tag
    return result


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, word behind the last) of every span in any of the notations."""
    found: list[tuple[str, int, int]] = []
    for index, tag in enumerate(to_iob2(tags)):
        if tag.startswith("B-"):
            found.append((tag[2:], index, index + 1))
        elif tag.startswith("I-"):
            kind, start, _ = found[-1]
            found[-1] = (kind, start, index + 1)
    return found


@dataclass(frozen=True)
class Tag(Task):
    """A tag for each word of a sentence."""

    kind: ClassVar[str] = "tag"
    model_class: ClassVar = TokenClassifier

    labels: tuple[str, ...] = ()
    """Tags in the order of the model's outputs, spans in IOB2; learned from the training data if empty."""
    columns: Columns = field(default_factory=Columns)
    """`columns.label`: the column or list that holds the tags."""
    max_length: int = 256
    """Tokens per window at most, [CLS] and [SEP] included."""
    metric: str = "f1"
    """Which figure chooses the best checkpoint."""

    def read(self, path: Path | str, bad: BadRows, *, labelled: bool = True) -> Iterator[TaggedExample]:
        """Sentences of a file, tags of spans turned into IOB2; a tag unseen in training makes a bad row."""
        for example in read_tagged(
            path, bad, tag_column=next(iter(alternatives(self.columns.label)), None), labelled=labelled
        ):
            if example.tags is not None:
                if all(SPAN_TAG.fullmatch(tag) for tag in example.tags):
                    example = replace(example, tags=tuple(to_iob2(example.tags)))
                unknown = [tag for tag in example.tags or () if self.labels and tag not in self.labels]
                if labelled and unknown:
                    bad.add(example.line, f"a tag does not occur in training ({unknown[0]!r})")
                    continue
            yield example

    def from_value(self, value: Any, name: str) -> TaggedExample:
        """A text, or a list of its words."""
        if isinstance(value, str):
            return from_text(value, name)
        if isinstance(value, (list, tuple)) and value and all(isinstance(word, str) for word in value):
            return TaggedExample(name, 0, tuple(value))
        raise ValueError(f"inputs: expected a text or a list of words, got {value!r:.80}")

    def fitted(self, examples: Sequence[TaggedExample]) -> Tag:
        """The task with the tags of its training examples; every B- has its I-, whether it occurs or not."""
        if self.labels:
            return self
        tags = {tag for example in examples for tag in example.tags or ()}
        if marks_spans(sorted(tags)):
            kinds = sorted({tag[2:] for tag in tags if tag != "O"})
            return replace(self, labels=("O", *(f"{mark}-{kind}" for kind in kinds for mark in "BI")))
        return replace(self, labels=tuple(sorted(tags)), metric="accuracy")

    def encode(
        self, examples: Sequence[TaggedExample], tokenizer: Tokenizer, *, training: bool = False
    ) -> Features:
        """Sub-tokens of every word; targets at first sub-tokens; long sentences in overlapping windows."""
        features = Features(tokenizer.cls_id, tokenizer.sep_id, per_token=True)
        index_of = {tag: index for index, tag in enumerate(self.labels)}
        pieces = iter(tokenizer.encode_batch([word for example in examples for word in example.words]))
        for index, example in enumerate(examples):
            ids: list[int] = []
            targets: list[int] = []
            for place in range(len(example.words)):
                word_ids = next(pieces) or [tokenizer.unk_id]  # some words are only control characters
                tag = index_of.get(example.tags[place], 0) if example.tags else 0  # unknown only in prediction
                targets += [tag] + [UNLABELLED] * (len(word_ids) - 1)
                ids += word_ids
            size = self.max_length - 2
            for window in windows(len(ids), size, max(1, size * 3 // 4)):
                own = [
                    target if window.own_start <= place < window.own_stop else UNLABELLED
                    for place, target in enumerate(targets[window.start : window.stop], window.start)
                ]
                padded = np.array([UNLABELLED, *own, UNLABELLED], dtype=np.int64)
                features.add(index, ids[window.start : window.stop], None, padded)
        return features

    def loss(self, logits_TC: Tensor, batch: TaskBatch) -> Tensor:
        """Cross-entropy at the words' first sub-tokens."""
        return tagging_loss(logits_TC, batch.targets)

    def decode(
        self, examples: Sequence[TaggedExample], features: Features, outputs: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """For each sentence: tags (one per word, spans in IOB2), spans with character offsets."""
        words: list[list[np.ndarray]] = [[] for _ in examples]
        for owner, marks, logits_TC in zip(features.owners, features.targets, outputs):
            words[owner].append(softmax(logits_TC[marks != UNLABELLED]))
        return [
            self._prediction(example, np.concatenate(parts) if parts else np.zeros((0, len(self.labels))))
            for example, parts in zip(examples, words)
        ]

    def _prediction(self, example: TaggedExample, probabilities_WC: np.ndarray) -> dict[str, Any]:
        best = probabilities_WC.argmax(axis=1) if len(probabilities_WC) else np.zeros(0, dtype=int)
        tags = [self.labels[index] for index in best]
        if not marks_spans(self.labels):
            return {"words": list(example.words), "tags": tags}
        tags = to_iob2(tags)
        text = example.text if example.text is not None else " ".join(example.words)
        places = example.offsets or _joined_offsets(example.words)
        sure = probabilities_WC.max(axis=1) if len(best) else np.zeros(0)
        found = [
            {
                "type": kind,
                "start": places[first][0],
                "end": places[last - 1][1],
                "text": text[places[first][0] : places[last - 1][1]],
                "score": float(sure[first:last].mean()),
            }
            for kind, first, last in spans(tags)
        ]
        return {"text": text, "spans": found, "words": list(example.words), "tags": tags}

    def score(self, examples: Sequence[TaggedExample], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """precision, recall, f1 of spans and accuracy per word; for other tags accuracy and macro_f1."""
        truth = [example.tags or () for example in examples]
        predicted = [prediction["tags"] for prediction in predictions]
        if marks_spans(self.labels):
            return span_metrics(truth, predicted)[0]
        index_of = {tag: index for index, tag in enumerate(self.labels)}
        flat = [index_of[tag] for tags in truth for tag in tags]
        return classification_metrics(flat, [index_of[t] for tags in predicted for t in tags], len(self.labels))


def _joined_offsets(words: Sequence[str]) -> list[tuple[int, int]]:
    """Places of the words in " ".join(words)."""
    places, start = [], 0
    for word in words:
        places.append((start, start + len(word)))
        start += len(word) + 1
    return places
