"""Turns the text of the sources into the shards of a corpus: the work of `prepare`, without its settings.

SourceText   the documents of the sources, read as often as needed
assign       sends each document to the training or the held-out split
in_batches   groups documents into units of work, which `encoding.encode_all` tokenises
ShardedText  writes the tokens to shards on disk, resuming where the journal says
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from electra_core.corpora.encoding import Batch, Document, encode_all
from electra_core.corpora.hold_out import hold_one_out, lacks_heldout
from electra_core.corpora.journal import Journal
from electra_core.corpora.shards import SPLITS, Block, Manifest, ShardWriter, SplitCounts, token_dtype
from electra_core.corpora.sources import Source
from electra_core.corpora.text_files import ReadReport, document_hash, read_documents, spool
from electra_core.errors import UserError
from electra_core.runs.progress import progress
from electra_core.tokenizer import Tokenizer, unknown_words

BATCH_CHARACTERS = 1 << 20  # of text in one unit of work
JOURNAL_BATCHES = 64  # units of work between two entries of the journal
MUCH_UNKNOWN = 0.01  # the share of [UNK] above which the user is warned

log = logging.getLogger(__name__)


class SourceText:
    """The text of the sources, which can be read repeatedly, with a progress bar each time."""

    def __init__(self, sources: Sequence[Source], text_field: str, documents: str, quiet: bool) -> None:
        self._sources, self._quiet = list(sources), quiet
        self._reading = {"text_field": text_field, "documents": documents}
        self._spooled: list[Source] = []
        self.can_be_read_again = all(source.is_regular for source in sources)
        """Whether another process would find the same text."""
        self.report = ReadReport()
        """Report of the latest reading."""

    def spool_into(self, folder: Path) -> None:
        """Copies standard input and other pipes to files, so that they can be read twice."""
        for place, source in enumerate(self._sources):
            if not source.is_regular:
                self._sources[place] = spool(source, folder)
                self._spooled.append(self._sources[place])

    def remove_spooled(self) -> None:
        """Removes these files."""
        for source in self._spooled:
            if source.path:
                source.path.unlink()

    def documents(self, title: str, after: ReadReport | None = None) -> Iterator[list[str]]:
        """All documents, or those after the point that an earlier reading had reached."""
        self.report = report = after or ReadReport()
        sizes = [source.size for source in self._sources]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        shown = 0
        with progress(title, total, "B", quiet=self._quiet) as bar:
            for document in read_documents(self._sources, **self._reading, report=report):
                bar.update(report.position - shown)
                shown = report.position
                yield document
            bar.update((total or shown) - shown)


def assign(
    documents: Iterable[list[str]], seed: int, heldout_fraction: float, drop_duplicates: bool
) -> Iterator[Document]:
    """Sends each document to the training or held-out split by its contents alone, independent of all others."""
    limit = int(heldout_fraction * (1 << 64))
    seen: set[int] = set()
    for document in documents:
        number = document_hash(document, seed, b"split")
        if drop_duplicates:
            if number in seen:
                continue
            seen.add(number)
        yield Document(int(number < limit), document)


def in_batches(documents: Iterable[Document]) -> Iterator[Batch]:
    """Units of work of about BATCH_CHARACTERS, whatever the number of workers."""
    batch: Batch = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(map(len, document.lines))
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class ShardedText:
    """Writes the shards of both splits, resuming where the journal says."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int, journal: Journal) -> None:
        self._tokenizer, self._dtype, self._journal = tokenizer, token_dtype(tokenizer.vocab_size), journal
        self._folder, self._shard_tokens, self._held_one_out = folder, shard_tokens, False
        self._before = journal.state
        state = self._before or {"writers": dict.fromkeys(SPLITS), "unknown": 0}
        self._writers = {
            split: ShardWriter(folder, split, self._dtype, shard_tokens, state["writers"][split])
            for split in SPLITS
        }
        self._unknown = int(state["unknown"])

    def encode(
        self, text: SourceText, lines: str, workers: int, seed: int, heldout_fraction: float, drop_duplicates: bool
    ) -> None:
        """Writes all documents that have not been written yet."""
        after, done = None, 0
        if self._before:
            after, done = ReadReport(**self._before["report"]), int(self._before["documents"])
            log.info("continuing an interrupted run after %s documents", f"{done:,}")
        # Duplicates can be told only once all earlier documents have been read again.
        documents = text.documents("writing tokens", None if drop_duplicates else after)
        assigned = assign(documents, seed, heldout_fraction, drop_duplicates)
        remaining = islice(assigned, done, None) if drop_duplicates else assigned
        places: deque[dict[str, Any]] = deque()  # after each batch that is being encoded

        def batches() -> Iterator[Batch]:
            count = done
            for batch in in_batches(remaining):
                count += len(batch)
                places.append({"report": asdict(text.report), "documents": count})
                yield batch

        with closing(encode_all(batches(), self._tokenizer, lines, workers)) as encoded:
            for number, blocks in enumerate(encoded, start=1):
                self._add(blocks)
                place = places.popleft()
                if number % JOURNAL_BATCHES == 0 and text.can_be_read_again:
                    writers = {split: writer.sync() for split, writer in self._writers.items()}
                    self._journal.write({**place, "writers": writers, "unknown": self._unknown})
        for writer in self._writers.values():
            writer.close()

    def _add(self, blocks: list[Block]) -> None:
        for writer, block in zip(self._writers.values(), blocks):
            writer.add(block)
            ids = np.frombuffer(block.tokens, self._dtype)
            self._unknown += int(np.count_nonzero(ids == self._tokenizer.unk_id))

    def hold_out(self, heldout_fraction: float) -> None:
        """Holds one document out if there should be any and none was drawn."""
        if lacks_heldout(self._writers, heldout_fraction):
            self._journal.remove()  # it describes the present shards, not those about to be written
            train = self._writers["train"].counts
            self._writers = hold_one_out(self._folder, train, self._dtype, self._shard_tokens)
            self._held_one_out = True

    def manifest(self, settings: Mapping[str, Any], report: ReadReport) -> Manifest:
        """The manifest; raises UserError if there is nothing to train on, unless this is only a part."""
        if not self._writers["train"].counts.tokens and "shard" not in settings:
            raise UserError("no document is left for training: the text is too small for a held-out part")
        counts = {name: getattr(report, name) for name in ("empty_files", "cut_lines", "cut_documents")}
        counts["unknown_tokens"] = self._unknown
        return manifest_of(
            self._writers, self._tokenizer.fingerprint(), self._tokenizer.vocab_size, settings, counts,
            held_one_out=self._held_one_out,
        )  # fmt: skip


def manifest_of(
    writers: Mapping[str, ShardWriter], tokenizer_fingerprint: str, vocab_size: int, settings: Mapping[str, Any],
    counts: Mapping[str, int], *, held_one_out: bool,
) -> Manifest:  # fmt: skip
    """The manifest of what the writers of both splits, all closed, have written.

    Args:
        counts: of what happened while the text was read and encoded.
        held_one_out: whether `hold_one_out` was needed.
    """
    splits = {split: writer.counts for split, writer in writers.items()}
    files = {name: entry for writer in writers.values() for name, entry in writer.files.items()}
    notes = tuple(_notes(splits, counts, held_one_out))
    return Manifest(tokenizer_fingerprint, vocab_size, splits, files, settings, notes, dict(counts))


def _notes(splits: Mapping[str, SplitCounts], counts: Mapping[str, int], held_one_out: bool) -> Iterator[str]:
    """Sentences for the user about anything unusual."""
    of_reading = {name: count for name, count in counts.items() if name != "unknown_tokens"}
    yield from ReadReport(**of_reading).notes()
    tokens = sum(split.tokens for split in splits.values())
    if warning := unknown_words(counts["unknown_tokens"], tokens, MUCH_UNKNOWN):
        yield warning
    if held_one_out:
        yield "few documents, and the draw held out none; one of about average length is held out"
    if not splits["heldout"].documents:
        yield "no document is held out; to get some, raise the held-out fraction or add documents"
