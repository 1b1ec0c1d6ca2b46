"""Token shards -> pre-training examples, as a pure function of (seed, index).

The original (google-research/electra, build_pretraining_dataset.py) walks through each document once,
collecting sentences until they reach a target length, and stores the examples. Here nothing is stored:
example `index` is built when it is asked for, so every epoch sees other segment borders and other masks,
the number of workers or ranks changes nothing, and resuming needs no saved iterator.

An epoch visits every slot of every document once (`slots.py`), in random order. The example of a slot follows
the original's rules:

- sentences are collected until they reach the target length, or the slot's document ends;
- the target is `max_length`, or with probability 0.05 uniform in [5, max_length];
- with probability 0.1 everything is one segment, else the first segment aims at (target - 3) // 2;
- `[CLS] first [SEP] second [SEP]`, each segment cut to what fits.

`docs/deviations.md` says what differs; a test compares the distributions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from electra_kernels.rng import fold, philox, seed_tensor, uniform

from electra_core.corpus import Corpus
from electra_core.packing import TokenBatch, from_lengths
from electra_core.slots import Slots

SHORT_EXAMPLE_PROBABILITY = 0.05
ONE_SEGMENT_PROBABILITY = 0.1
SHORTEST_TARGET = 5
MOST_SENTENCES = 64
"""Sentences looked at per example at most; also how many coins one example may toss."""


class Span(NamedTuple):
    """A run of tokens in a shard."""

    shard: int
    begin: int
    end: int


class Example(NamedTuple):
    """Where an example's two segments lie in the corpus; the second may be empty."""

    first: list[Span]
    second: list[Span]

    @property
    def num_tokens(self) -> int:
        """Length with [CLS] and [SEP]."""
        first, second = _length(self.first), _length(self.second)
        return first + 2 + (second + 1 if second else 0)


class Examples:
    """The endless sequence of pre-training examples of a corpus.

    Args:
        corpus: an opened split.
        max_length: tokens per example at most, [CLS] and [SEP] included.
        seed: of the run.
    """

    def __init__(self, corpus: Corpus, max_length: int, seed: int):
        self.corpus, self.max_length, self.seed = corpus, max_length, seed
        self.shards = corpus.shards
        self.slots = Slots(self.shards, max_length)

    def plan(self, indices: Sequence[int]) -> list[Example]:
        """Where the words of examples `indices` lie; reads sentence borders, but no text."""
        return [
            self._collect(*self._place(index), coins) for index, coins in zip(indices, _coins(self.seed, indices))
        ]

    def batch(self, examples: Sequence[Example]) -> TokenBatch:
        """The words of planned examples, packed."""
        tokenizer = self.corpus.tokenizer
        cls, sep = [tokenizer.cls_id], [tokenizer.sep_id]
        pieces: list[np.ndarray | list[int]] = []
        segments: list[int] = []
        for example in examples:
            pieces += [cls, *self._read(example.first), sep]
            segments += [0, _length(example.first) + 2]
            if example.second:
                pieces += [*self._read(example.second), sep]
                segments += [1, _length(example.second) + 1]
        ids = np.concatenate(pieces).astype(np.int64)
        segment_ids = np.repeat(segments[0::2], segments[1::2])
        lengths = [example.num_tokens for example in examples]
        return from_lengths(torch.from_numpy(ids), torch.from_numpy(segment_ids), lengths)

    def _place(self, index: int) -> tuple[int, int, int]:
        """(shard, first sentence, end) of the slot of example `index`."""
        epoch, index = divmod(index, len(self.slots))
        number = permute(index, len(self.slots), fold(self.seed, epoch, 0))
        slot = self.slots[number]
        document = number - slot.place  # its first slot's number names it
        return slot.shard, *self.slots.sentences(slot, _mix(document, fold(self.seed, epoch, 1)))

    def _collect(self, number: int, sentence: int, end: int, coins: np.ndarray) -> Example:
        """Follow the original's rules from `sentence` to `end` at most; `coins` are uniform in (0, 1)."""
        stop = min(end, sentence + MOST_SENTENCES)
        borders = self.shards[number].sentences[sentence : stop + 1].astype(np.int64)

        target = self.max_length
        if coins[0] < SHORT_EXAMPLE_PROBABILITY:
            target = SHORTEST_TARGET + int(coins[1] * (self.max_length - SHORTEST_TARGET + 1))
        count = int(np.searchsorted(borders - borders[0], target))  # sentences until the target is reached
        sentences = [Span(number, b, e) for b, e in zip(borders[:count].tolist(), borders[1 : count + 1].tolist())]
        one_segment = len(sentences) == 1 or coins[2] < ONE_SEGMENT_PROBABILITY
        first, second = split_segments(sentences, target, one_segment, coins[3:])
        first = cut(first, self.max_length - 2)
        return Example(first, cut(second, self.max_length - _length(first) - 3))

    def _read(self, spans: list[Span]) -> Iterator[np.ndarray]:
        for span in spans:
            yield self.shards[span.shard].tokens[span.begin : span.end]


def split_segments(
    sentences: list[Span], target: int, one_segment: bool, coins: np.ndarray
) -> tuple[list[Span], list[Span]]:
    """Which sentences go to the first segment, and which to the second.

    The coin is for the sentence that crosses the border: half the time it still goes to the first.
    """
    first_target = 100_000 if one_segment else (target - 3) // 2
    first: list[Span] = []
    second: list[Span] = []
    first_length = 0
    for sentence, coin in zip(sentences, coins):
        length = sentence.end - sentence.begin
        fits = first_length + length < first_target
        crosses = not second and first_length < first_target and coin < 0.5
        if not first or fits or crosses:
            first.append(sentence)
            first_length += length
        else:
            second.append(sentence)
    return first, second


def cut(spans: list[Span], most: int) -> list[Span]:
    """The first `most` tokens of `spans`."""
    kept: list[Span] = []
    for span in spans:
        if most <= 0:
            break
        kept.append(span._replace(end=min(span.end, span.begin + most)))
        most -= span.end - span.begin
    return kept


def permute(index: int, size: int, seed: int) -> int:
    """Where `index` goes in a pseudo-random permutation of range(size).

    A four-round Feistel network on the next even number of bits; values that fall outside are sent through
    again ("cycle walking"), so that it is a bijection of range(size) without any table.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(4):
            left, right = right, left ^ (_mix(right, seed + round_number) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int, seed: int) -> int:
    """A 64-bit hash of two integers (the finaliser of splitmix64, Steele et al. 2014)."""
    value = (value * 0x9E3779B97F4A7C15 + seed) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def _coins(seed: int, indices: Sequence[int]) -> np.ndarray:
    """Uniform numbers [len(indices), MOST_SENTENCES + 4], a function of seed and index."""
    index = torch.as_tensor(indices, dtype=torch.int64)[:, None]
    column = torch.arange((MOST_SENTENCES + 4) // 4)[None, :]
    words = philox(seed_tensor(fold(seed, 2)), column, index & 0xFFFFFFFF, 0, index >> 32)
    return uniform(torch.stack(words, dim=-1)).flatten(1).numpy()


def _length(spans: list[Span]) -> int:
    return sum(span.end - span.begin for span in spans)
