"""Where the examples of an epoch lie: every document is cut into slots, which are found by number.

The original walks through a document and begins each example where the previous one ended: all are full but the
last, which holds the remaining text. A slot is the space of one such example; all slots but the short one begin
where there is text for a full example. Slot numbers run through all documents of all shards, and example `index`
is found without walking: a table of cumulative slot counts has one entry per 64 documents, and the slots of those
64 are counted on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

BLOCK = 64
"""Documents per entry of the table: 28 million documents (100 GB of text) take 3.5 MB."""


class Borders(Protocol):
    """The part of a shard used here (`corpus.Shard`): offsets of sentences in tokens, of documents in both."""

    @property
    def sentences(self) -> np.ndarray: ...
    @property
    def documents(self) -> np.ndarray: ...
    @property
    def starts(self) -> np.ndarray: ...


class Slot(NamedTuple):
    """A slot's place: the `place`-th of the `total` slots of a document."""

    shard: int
    document: int
    place: int
    total: int


class Places(NamedTuple):
    """Many slots and the documents around them, int64 arrays [N]."""

    shard: np.ndarray
    place: np.ndarray
    """Which of the document's slots it is ..."""
    total: np.ndarray
    """... and how many there are."""
    first: np.ndarray
    """The document's first sentence in its shard ..."""
    end: np.ndarray
    """... and the end of its last one."""
    begin: np.ndarray
    """The document's first token in its shard ..."""
    tokens: np.ndarray
    """... and how many it has."""


class Slots:
    """All slots of a corpus.

    Args:
        shards: the corpus's shards.
        max_length: maximum number of tokens per example, for which a slot has room.
    """

    def __init__(self, shards: Sequence[Borders], max_length: int):
        self.shards, self.max_length = shards, max_length
        counts = [self._block_counts(shard) for shard in shards]
        self._ends = np.cumsum(np.concatenate(counts))
        self._first_blocks = np.cumsum([0, *map(len, counts)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Slot:
        """The slot with a number in [0, len)."""
        block = int(np.searchsorted(self._ends, number, side="right"))
        shard = int(np.searchsorted(self._first_blocks, block, side="right")) - 1
        first = (block - int(self._first_blocks[shard])) * BLOCK
        place = number - (int(self._ends[block - 1]) if block else 0)
        counts = self._counts_in(self.shards[shard], first, first + BLOCK)
        ends = np.cumsum(counts)
        document = int(np.searchsorted(ends, place, side="right"))
        place -= int(ends[document] - counts[document])
        return Slot(shard, first + document, place, int(counts[document]))

    def sentences(self, slot: Slot, draw: int) -> tuple[int, int]:
        """(first sentence, end) of a slot, counted within its shard; at least one sentence.

        Args:
            draw: a random number of 64 bits for (epoch, document). It decides which of the document's slots is the
                short one (in the original always the last), and shifts the slots between the first and the last
                by up to half a slot, by one amount within a run of slots and another outside it, so that every
                epoch has different borders.
        """
        shard = self.shards[slot.shard]
        first, end = (int(border) for border in shard.documents[slot.document : slot.document + 2])
        if slot.total == 1:
            return first, end
        borders = shard.sentences[first : end + 1]
        tokens = int(borders[-1] - borders[0])
        reach = _reach(tokens, end - first, self.max_length)
        rest = tokens - (slot.total - 1) * reach

        draw, short = divmod(draw, slot.total)
        draw, moved = divmod(draw, slot.total)
        draw, run = divmod(draw, slot.total)
        moves = divmod(draw % reach**2, reach)
        begin = slot.place * reach if slot.place <= short else (slot.place - 1) * reach + rest
        if 0 < slot.place < slot.total - 1:
            begin += moves[moved < slot.place <= moved + run] - reach // 2
        if slot.place != short:
            return first + _full_at(borders, begin, self.max_length), end
        sentence, stop = _sentence_at(borders, begin), _sentence_at(borders, begin + rest)
        return first + max(0, min(sentence, stop - 1)), first + max(1, stop)

    def find(self, numbers: np.ndarray) -> Places:
        """`self[number]` for many numbers at once."""
        block = np.searchsorted(self._ends, numbers, side="right")
        shard = np.searchsorted(self._first_blocks, block, side="right") - 1
        first = (block - self._first_blocks[shard]) * BLOCK
        place = numbers - np.where(block > 0, self._ends[block - 1], 0)
        documents, starts = (
            gather(self.shards, part, shard, first, BLOCK + 1) for part in ("documents", "starts")
        )
        tokens, sentences = np.diff(starts), np.diff(documents)
        counts = self._counts(tokens, sentences)
        ends = np.cumsum(counts, axis=1)
        rows, inside = np.arange(len(numbers)), (ends <= place[:, None]).sum(axis=1)
        total = counts[rows, inside]
        place = place - (ends[rows, inside] - total)
        begin, end = documents[rows, inside], documents[rows, inside + 1]
        return Places(shard, place, total, begin, end, starts[rows, inside], tokens[rows, inside])

    def ranges(self, slots: Places, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`self.sentences(slot, draw)` for many slots at once; `draws` is uint64 [N]."""
        place, total = slots.place, slots.total
        reach = _reach(slots.tokens, slots.end - slots.first, self.max_length)
        rest = slots.tokens - (total - 1) * reach

        draws, (short, moved, run) = _dealt(draws, total, 3)
        by = draws % (reach * reach).astype(np.uint64)
        outside, inside = (part.astype(np.int64) for part in np.divmod(by, reach.astype(np.uint64)))
        in_run = (moved < place) & (place <= moved + run)
        begin = np.where(place <= short, place * reach, (place - 1) * reach + rest)
        between = (0 < place) & (place < total - 1)
        begin = begin + between * (np.where(in_run, inside, outside) - reach // 2)

        sentence, stop = slots.first.copy(), slots.end.copy()
        full, short_one = (total > 1) & (place != short), (total > 1) & (place == short)
        sentence[full] = self._sentences_at(slots, begin, full, partial(_full_at, max_length=self.max_length))
        sentence[short_one] = self._sentences_at(slots, begin, short_one, _sentence_at)
        stop[short_one] = self._sentences_at(slots, begin + rest, short_one, _sentence_at)
        first = np.maximum(slots.first, np.minimum(sentence, stop - 1))
        return first, np.maximum(slots.first + 1, stop)

    def _sentences_at(
        self, slots: Places, tokens: np.ndarray, chosen: np.ndarray, find: Callable[[np.ndarray, int], int]
    ) -> list[int]:
        """The sentences that `find` returns for the chosen slots, counted within the shard."""
        columns = (slots.shard, slots.first, slots.end, tokens)
        return [
            first + find(self.shards[shard].sentences[first : end + 1], token)
            for shard, first, end, token in zip(*(column[chosen].tolist() for column in columns))
        ]

    def _block_counts(self, shard: Borders) -> np.ndarray:
        """int64 [blocks]: slots per block of documents."""
        documents, step = len(shard.documents) - 1, BLOCK << 10
        parts = [np.zeros(0, dtype=np.int64)]
        for first in range(0, documents, step):
            counts = self._counts_in(shard, first, min(first + step, documents))
            parts.append(np.add.reduceat(counts, np.arange(0, len(counts), BLOCK)))
        return np.concatenate(parts)

    def _counts_in(self, shard: Borders, first: int, end: int) -> np.ndarray:
        """int64 [end - first]: slots of each of the documents [first, end)."""
        sentences = np.diff(shard.documents[first : end + 1].astype(np.int64))
        return self._counts(np.diff(shard.starts[first : end + 1].astype(np.int64)), sentences)

    def _counts(self, tokens: np.ndarray, sentences: np.ndarray) -> np.ndarray:
        """Slots of documents with so many tokens and sentences."""
        return np.maximum(1, -(-tokens // _reach(tokens, sentences, self.max_length)))


def gather(shards: Sequence[Borders], part: str, shard: np.ndarray, begin: np.ndarray, width: int) -> np.ndarray:
    """int64 [N, width]: a part ("sentences", ...) of each shard from `begin` on; past its end, its last value."""
    values = np.empty((len(shard), width), dtype=np.int64)
    for number in np.unique(shard).tolist():
        rows = np.flatnonzero(shard == number)
        whole = getattr(shards[number], part)
        values[rows] = whole[np.minimum(begin[rows, None] + np.arange(width), len(whole) - 1)]
    return values


def _dealt(draws: np.ndarray, total: np.ndarray, count: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Splits `count` numbers below `total` off each draw; returns the rest of the draws, and the numbers."""
    numbers = []
    for _ in range(count):
        draws, number = np.divmod(draws, total.astype(np.uint64))
        numbers.append(number.astype(np.int64))
    return draws, numbers


def _sentence_at(borders: np.ndarray, token: int) -> int:
    """The first sentence that begins at or after a token of the document, or the end."""
    token = min(max(token, 0), int(borders[-1] - borders[0]))
    return int(np.searchsorted(borders, borders.dtype.type(int(borders[0]) + token)))  # the same type: no copy


def _full_at(borders: np.ndarray, token: int, max_length: int) -> int:
    """As `_sentence_at`, but early enough to leave text for a full example.

    (A document with several slots has that much text.)
    """
    sentence = _sentence_at(borders, token)
    latest = int(borders[-1]) - max_length
    if int(borders[sentence]) <= latest:
        return sentence
    return int(np.searchsorted(borders, borders.dtype.type(latest), side="right")) - 1


def _reach(tokens, sentences, max_length: int):  # type: ignore[no-untyped-def]  # integers or arrays of them
    """Tokens an example uses up: it ends with the sentence that fills it, of which on average half is cut off."""
    return max_length + tokens // (2 * np.maximum(sentences, 1))
