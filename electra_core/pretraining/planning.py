"""Plans many examples at once: the rules of `example_rules.py` on arrays, one row for each example.

Applied example by example, the rules cost Python time for every sentence. Here each of their steps is a few NumPy
calls for the whole batch; a test compares the two, example by example, on many corpora.

Letters in shapes: N examples, J candidate sentences, P spans of all examples end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from electra_core.pretraining.example_rules import (
    CROSSING_PROBABILITY,
    ONE_SEGMENT_PROBABILITY,
    SHORT_EXAMPLE_PROBABILITY,
    SHORTEST_TARGET,
    UNREACHABLE,
    Example,
    Span,
)


@dataclass(frozen=True, eq=False)
class Plan(Sequence[Example]):
    """N planned examples as arrays, int64 unless noted; `plan[i]` is an `Example`, `plan[a:b]` another plan.

    Spans are in the order of their tokens: an example's first segment, its second, the next example's first, ...
    """

    shards_N: np.ndarray
    """Shard of each example."""
    firsts_N: np.ndarray
    """Number of tokens in the first segment, without [CLS] and [SEP]."""
    seconds_N: np.ndarray
    """Number of tokens in the second segment."""
    ends_N: np.ndarray
    """[N + 1]: example n has the spans ends_N[n] to ends_N[n + 1] - 1."""
    begins_P: np.ndarray
    """First token of each span within its shard."""
    lengths_P: np.ndarray
    """Number of tokens in each span."""
    is_second_P: np.ndarray
    """bool: whether the span belongs to the second segment."""

    @property
    def lengths(self) -> np.ndarray:
        """[N]: number of tokens in each example, [CLS] and [SEP] included."""
        return self.firsts_N + 2 + np.where(self.seconds_N > 0, self.seconds_N + 1, 0)

    def __len__(self) -> int:
        return len(self.shards_N)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Plan: ...
    def __getitem__(self, place: int | slice) -> Example | Plan:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        place = range(len(self))[place]
        shard, spans = int(self.shards_N[place]), slice(self.ends_N[place], self.ends_N[place + 1])
        parts: tuple[list[Span], list[Span]] = [], []
        rows = zip(self.begins_P[spans].tolist(), self.lengths_P[spans].tolist(), self.is_second_P[spans].tolist())
        for begin, length, is_second in rows:
            parts[is_second].append(Span(shard, begin, begin + length))
        return Example(*parts)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    def take(self, places: np.ndarray) -> Plan:
        """The examples at `places`, in that order."""
        counts = np.diff(self.ends_N)[places]
        ends = np.concatenate(([0], np.cumsum(counts)))
        spans = ragged(self.ends_N[:-1][places], counts)
        return Plan(
            self.shards_N[places], self.firsts_N[places], self.seconds_N[places], ends,
            self.begins_P[spans], self.lengths_P[spans], self.is_second_P[spans],
        )  # fmt: skip

    @staticmethod
    def joined(plans: Sequence[Plan]) -> Plan:
        """The concatenation of several plans."""

        def join(name: str) -> np.ndarray:
            return np.concatenate([getattr(plan, name) for plan in plans])

        counts = np.concatenate([np.diff(plan.ends_N) for plan in plans])
        return Plan(
            join("shards_N"), join("firsts_N"), join("seconds_N"), np.concatenate(([0], np.cumsum(counts))),
            join("begins_P"), join("lengths_P"), join("is_second_P"),
        )  # fmt: skip


def collect_all(
    shards_N: np.ndarray, borders_NJ: np.ndarray, counts_N: np.ndarray, max_length: int, coins_NJ: np.ndarray,
    one_segment_probability: float = ONE_SEGMENT_PROBABILITY,
) -> Plan:  # fmt: skip
    """`example_rules.collect` for every row.

    Args:
        borders_NJ: [N, J + 1], sentence boundaries; those after a row's last sentence may be any value not less.
        counts_N: number of sentences in each row.
    """
    targets_N = np.where(
        coins_NJ[:, 0] < SHORT_EXAMPLE_PROBABILITY,
        SHORTEST_TARGET + (coins_NJ[:, 1] * (max_length - SHORTEST_TARGET + 1)).astype(np.int64),
        max_length,
    )
    below_NJ = borders_NJ - borders_NJ[:, :1] < targets_N[:, None]
    counts_N = np.minimum(below_NJ.sum(axis=1), counts_N)
    most = int(counts_N.max(initial=0))
    begins_NJ, lengths_NJ = borders_NJ[:, :most], np.diff(borders_NJ[:, : most + 1])
    is_there_NJ = np.arange(most) < counts_N[:, None]
    one_segment_N = (counts_N == 1) | (coins_NJ[:, 2] < one_segment_probability)
    first_targets_N = np.where(one_segment_N, UNREACHABLE, (targets_N - 3) // 2)
    in_first_NJ = _split_all(lengths_NJ, is_there_NJ, first_targets_N, coins_NJ[:, 3:])

    firsts_NJ = _cut_all(lengths_NJ * in_first_NJ, np.full(len(counts_N), max_length - 2))
    firsts_N = firsts_NJ.sum(axis=1)
    seconds_NJ = _cut_all(lengths_NJ * (is_there_NJ & ~in_first_NJ), max_length - 3 - firsts_N)

    lengths = np.stack((firsts_NJ, seconds_NJ), axis=1)  # [N, 2, J]: the order of the tokens
    kept = lengths > 0
    begins = np.broadcast_to(begins_NJ[:, None], lengths.shape)
    is_second = np.broadcast_to(np.array([False, True])[:, None], lengths.shape)
    ends = np.concatenate(([0], np.cumsum(kept.sum(axis=(1, 2)))))
    return Plan(
        shards_N, firsts_N, seconds_NJ.sum(axis=1), ends, begins[kept], lengths[kept], is_second[kept]
    )  # fmt: skip


def _split_all(
    lengths_NJ: np.ndarray, is_there_NJ: np.ndarray, first_targets_N: np.ndarray, coins_NJ: np.ndarray
) -> np.ndarray:
    """`example_rules.split_segments` for every row: bool [N, J], which sentences go to the first segment."""
    in_first_NJ = np.zeros(lengths_NJ.shape, dtype=bool)
    first_length_N = np.zeros(len(lengths_NJ), dtype=np.int64)
    has_second_N = np.zeros(len(lengths_NJ), dtype=bool)
    for j in range(lengths_NJ.shape[1]):
        fits_N = first_length_N + lengths_NJ[:, j] < first_targets_N
        under_N = first_length_N < first_targets_N
        crosses_N = ~has_second_N & under_N & (coins_NJ[:, j] < CROSSING_PROBABILITY)
        in_first_N = is_there_NJ[:, j] & (fits_N | crosses_N | (j == 0))
        first_length_N += lengths_NJ[:, j] * in_first_N
        has_second_N |= is_there_NJ[:, j] & ~in_first_N
        in_first_NJ[:, j] = in_first_N
    return in_first_NJ


def _cut_all(lengths_NJ: np.ndarray, most_N: np.ndarray) -> np.ndarray:
    """`example_rules.cut` for every row: what is left of each length, [N, J]."""
    before_NJ = np.cumsum(lengths_NJ, axis=1) - lengths_NJ
    return np.clip(most_N[:, None] - before_NJ, 0, lengths_NJ)


def ragged(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """begins[0], begins[0] + 1, ... (lengths[0] numbers), begins[1], ...: the indices of runs laid end to end."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(begins - (ends - lengths), lengths)
