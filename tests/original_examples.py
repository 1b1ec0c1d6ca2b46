"""Corpora in memory, and a faithful sequential re-implementation of the original's builder of examples
(google-research/electra, build_pretraining_dataset.py), which goes through each document once."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from electra_core.pretraining.example_rules import Example

MAX_LENGTH = 32

FIRST_WORD = 10

CLS, SEP = 2, 3


def make_corpus(documents: list[list[int]], shards: int = 1) -> Any:
    """A corpus in memory: documents as lists of sentence lengths. Its token n is the word n + FIRST_WORD."""
    made, word = [], FIRST_WORD
    for part in np.array_split(np.arange(len(documents)), shards):
        lengths = [length for d in part for length in documents[d]]
        sentences = np.concatenate(([0], np.cumsum(lengths))).astype("<u8")
        borders = np.concatenate(([0], np.cumsum([len(documents[d]) for d in part]))).astype("<u8")
        tokens = np.arange(word, word + int(sentences[-1]), dtype="<u4")
        word += len(tokens)
        starts = sentences[borders.astype(np.int64)]
        made.append(SimpleNamespace(tokens=tokens, sentences=sentences, documents=borders, starts=starts))
    return SimpleNamespace(shards=tuple(made), tokenizer=SimpleNamespace(cls_id=CLS, sep_id=SEP))


@dataclass
class OriginalBuilder:
    """The original's rules, one sentence after the other; segments are lists of words."""

    max_length: int
    draw: random.Random
    examples: list[tuple[list[int], list[int]]] = field(default_factory=list)
    sentences: list[list[int]] = field(default_factory=list)
    length: int = 0
    target: int = 0

    def add_document(self, sentences: list[list[int]]) -> None:
        self.target = self.target or self.max_length
        for sentence in sentences:
            self.sentences.append(sentence)
            self.length += len(sentence)
            if self.length >= self.target:
                self.finish()
        if self.sentences:
            self.finish()

    def finish(self) -> None:
        aim = 100_000 if self.draw.random() < 0.1 else (self.target - 3) // 2
        first: list[int] = []
        second: list[int] = []
        for sentence in self.sentences:
            if not first or len(first) + len(sentence) < aim:
                first += sentence
            elif not second and len(first) < aim and self.draw.random() < 0.5:
                first += sentence
            else:
                second += sentence
        first = first[: self.max_length - 2]
        second = second[: max(0, self.max_length - len(first) - 3)]
        self.examples.append((first, second))
        self.sentences, self.length, self.target = [], 0, self.max_length
        if self.draw.random() < 0.05:
            self.target = self.draw.randint(5, self.max_length)


def words_of(example: Example) -> tuple[list[int], list[int]]:
    """The example's words in `make_corpus` with one shard."""
    return tuple([t + FIRST_WORD for s in part for t in range(s.begin, s.end)] for part in example)  # type: ignore[return-value]


def total(pair: tuple[list[int], list[int]]) -> int:
    """Length with [CLS] and [SEP]."""
    return len(pair[0]) + 2 + (len(pair[1]) + 1 if pair[1] else 0)


def original_examples(
    documents: list[list[int]], max_length: int = MAX_LENGTH
) -> list[tuple[list[int], list[int]]]:
    """What the original makes of the documents, with the words of `make_corpus`."""
    builder = OriginalBuilder(max_length, random.Random(1))
    word = FIRST_WORD
    for lengths in documents:
        starts = (np.cumsum([0, *lengths]) + word).tolist()
        builder.add_document([list(range(a, b)) for a, b in itertools.pairwise(starts)])
        word = starts[-1]
    return builder.examples
