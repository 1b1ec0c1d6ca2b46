"""The original's rules for building a pre-training example, one example at a time.

- sentences are collected until they reach the target length, or the slot's document ends;
- the target is `max_length`, or with probability 0.05 uniform in [5, max_length];
- with probability 0.1 (`PretrainConfig.one_segment_probability`) everything is one segment, else the first segment
  aims at (target - 3) // 2;
- `[CLS] first [SEP] second [SEP]`, each segment cut to what fits.

This file is the readable form, which tests compare with; training runs `planning.py`, which does the same for a
whole batch at once. Random numbers are passed in as `coins`, uniform in (0, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SHORT_EXAMPLE_PROBABILITY = 0.05
ONE_SEGMENT_PROBABILITY = 0.1
SHORTEST_TARGET = 5
UNREACHABLE = 100_000
"""Target length of the first segment where it takes everything."""
CROSSING_PROBABILITY = 0.5
"""Probability that the sentence crossing the border between the segments still goes to the first."""
MOST_SENTENCES = 64
"""Maximum number of sentences considered per example; each uses one coin."""


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


def collect(
    shard: int, borders: np.ndarray, max_length: int, coins: np.ndarray,
    one_segment_probability: float = ONE_SEGMENT_PROBABILITY,
) -> Example:  # fmt: skip
    """The example that begins with a given sentence.

    Args:
        shard: the shard's number.
        borders: where that sentence and the following ones begin in the shard's tokens, and where the last one
            ends; at most `MOST_SENTENCES`, none beyond the end of the slot's document.
        max_length: maximum number of tokens per example, [CLS] and [SEP] included.
        coins: MOST_SENTENCES + 3 numbers.
    """
    target = max_length
    if coins[0] < SHORT_EXAMPLE_PROBABILITY:
        target = SHORTEST_TARGET + int(coins[1] * (max_length - SHORTEST_TARGET + 1))
    count = int(np.searchsorted(borders - borders[0], target))  # sentences until the target is reached
    sentences = [Span(shard, b, e) for b, e in zip(borders[:count].tolist(), borders[1 : count + 1].tolist())]
    one_segment = len(sentences) == 1 or coins[2] < one_segment_probability
    first, second = split_segments(sentences, target, one_segment, coins[3:])
    first = cut(first, max_length - 2)
    return Example(first, cut(second, max_length - _length(first) - 3))


def split_segments(
    sentences: list[Span], target: int, one_segment: bool, coins: np.ndarray | Sequence[float]
) -> tuple[list[Span], list[Span]]:
    """Divides the sentences between the first segment and the second.

    The coin decides about the sentence that crosses the border: half the time it still goes to the first.
    """
    first_target = UNREACHABLE if one_segment else (target - 3) // 2
    first: list[Span] = []
    second: list[Span] = []
    first_length = 0
    for sentence, coin in zip(sentences, coins):
        length = sentence.end - sentence.begin
        fits = first_length + length < first_target
        crosses = not second and first_length < first_target and coin < CROSSING_PROBABILITY
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


def _length(spans: list[Span]) -> int:
    return sum(span.end - span.begin for span in spans)
