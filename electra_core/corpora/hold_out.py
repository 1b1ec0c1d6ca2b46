"""Holds one document out if the draw has chosen none, as happens in a corpus of few documents.

Each document is drawn by its own contents (`writing.assign`), so that neither the others nor the number of
workers or parts matter. Only at the end is it known whether any was held out; the shards exist by then, and one
document is taken out of them. The choice depends on the shards alone, so it is the same for a corpus made at once
and for one merged from parts.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from electra_core.corpora.shards import OFFSET, PARTS, SPLITS, Shard, ShardWriter, SplitCounts, shard_name


def lacks_heldout(writers: Mapping[str, ShardWriter], heldout_fraction: float) -> bool:
    """Whether documents should be held out, none was written, and there is one to spare."""
    train, heldout = (writers[split].counts.documents for split in SPLITS)
    return heldout_fraction > 0 and heldout == 0 and train > 1


def hold_one_out(folder: Path, train: SplitCounts, dtype: np.dtype, shard_tokens: int) -> dict[str, ShardWriter]:
    """Rewrites the shards in `folder`, with one document of the training split moved to the held-out split.

    It is the longest document (the first of equals) that is not longer than the average, so that training loses at
    most 1/n of the text of n documents, and there is still something to evaluate on. A document that has a copy
    among the others is taken only if all candidates have one.

    Args:
        train: counts of the training split, of at least two documents; the held-out one is empty.
        dtype: of the tokens.
        shard_tokens: a shard is closed once it has this many tokens.

    Returns:
        The writers of both splits, closed.
    """
    before = folder / "before"
    before.mkdir()
    for path in folder.glob("train-*"):
        path.rename(before / path.name)
    shards = [_open(before, index, dtype) for index in range(train.shards)]
    chosen, document = _spare(shards, train)
    writers = {split: ShardWriter(folder, split, dtype, shard_tokens) for split in SPLITS}
    for index, shard in enumerate(shards):
        borders = (0, document, document + 1, None) if index == chosen else (0, None)
        for split, first, end in zip(("train", "heldout", "train"), borders, borders[1:]):
            for block in shard.blocks(first or 0, end):
                writers[split].add(block)
    for writer in writers.values():
        writer.close()
    shutil.rmtree(before)
    return writers


def _open(folder: Path, index: int, dtype: np.dtype) -> Shard:
    def mapped(part: str) -> np.ndarray:
        path = folder / shard_name("train", index, part)
        return np.asarray(np.memmap(path, dtype=dtype if part == "tokens" else OFFSET, mode="r"))

    return Shard(*map(mapped, PARTS))


def _spare(shards: list[Shard], counts: SplitCounts) -> tuple[int, int]:
    """(shard, document in it) of the document to take out."""
    often = Counter(digest for shard in shards for digest in _digests(shard))
    candidates = (
        (often[digest] == 1, length, -index, -document)
        for index, shard in enumerate(shards)
        for document, (digest, length) in enumerate(zip(_digests(shard), np.diff(shard.starts).tolist()))
        if length * counts.documents <= counts.tokens
    )
    _, _, index, document = max(candidates)
    return -index, -document


def _digests(shard: Shard) -> Iterator[bytes]:
    """A digest of each document's tokens; equal for copies."""
    for begin, end in pairwise(shard.starts.tolist()):
        yield hashlib.blake2b(shard.tokens[begin:end].tobytes(), digest_size=8).digest()
