"""The files of a prepared corpus, and their writer; `writing.py` fills them, `corpus.py` opens them.

    DATA/manifest.json           list of files, with sizes and checksums; written last
    DATA/tokenizer/              the tokenizer's files
    DATA/train-00000.tokens      ids, uint16 (uint32 from 65,536 entries on), sentences laid end to end
    DATA/train-00000.sentences   uint64, where each sentence begins in the tokens, and where the last one ends
    DATA/train-00000.documents   uint64, where each document begins in the sentences, likewise
    DATA/train-00000.starts      uint64, where each document begins in the tokens, likewise
    DATA/heldout-00000.*         the same for the documents held out

All numbers are little-endian, so that a mapped file is the array. No sentence or document is empty, and none spans
two shards. `.starts` follows from the two files above it, but without it, reading the lengths of all documents
would touch every page of `.sentences`: 8 GB for 100 GB of text instead of 0.2 GB. Version 1 had no `.starts`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from electra_core.errors import UserError, reading
from electra_core.files.json_files import digest_of, read_json
from electra_core.files.new_file import write_durably

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
SPLITS = ("train", "heldout")
PARTS = ("tokens", "sentences", "documents", "starts")
OFFSET = np.dtype("<u8")
BLOCK_TOKENS = 1 << 22
"""Tokens copied at a time, rounded up to a whole document."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_name(split: str, index: int, part: str) -> str:
    """File name of one part (see PARTS) of shard `index` of a split."""
    return f"{split}-{index:05d}.{part}"


class FileEntry(NamedTuple):
    """The manifest's entry for a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitCounts:
    tokens: int = 0
    sentences: int = 0
    documents: int = 0
    shards: int = 0


@dataclass(frozen=True)
class Manifest:
    """DATA/manifest.json."""

    tokenizer_fingerprint: str = field(repr=False)
    vocab_size: int
    splits: Mapping[str, SplitCounts]
    """Counts of each split, "train" and "heldout"."""
    files: Mapping[str, FileEntry] = field(repr=False)
    """Entries by file name, without the tokenizer's files, which have their own fingerprint."""
    settings: Mapping[str, Any]
    """How the corpus was made: tells `prepare` whether it is finished, and `merge` which parts belong together."""
    notes: tuple[str, ...] = ()
    """Anything unusual that happened while it was made."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """The counts from which the notes were made."""
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that a training run reads: equal fingerprints mean equal examples."""
        return digest_of([self.format_version, self.tokenizer_fingerprint, sorted(self.files.items())])

    def _check_types(self) -> None:
        """Raises ValueError if a value that will be used has the wrong type."""
        numbers = [self.vocab_size, *(entry.bytes for entry in self.files.values())]
        numbers += [number for counts in self.splits.values() for number in asdict(counts).values()]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a size or a count is not an integer")
        if set(self.splits) != set(SPLITS) or not isinstance(self.settings, dict):
            raise ValueError("expected the splits train and heldout, and a table of settings")

    def write(self, path: Path) -> None:
        files = {name: entry._asdict() for name, entry in self.files.items()}
        content = {"format_version": self.format_version, "fingerprint": self.fingerprint, **asdict(self)}
        write_durably(path, json.dumps({**content, "files": files}, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads a manifest; raises UserError if it is damaged or in another version of the format."""
        try:
            with reading(path):
                content = read_json(path)
            version = content["format_version"]
            if version not in READABLE_VERSIONS:
                raise UserError(
                    f"{path}: format version {version}, this program reads versions up to {FORMAT_VERSION}"
                )
            fingerprint = content.pop("fingerprint")
            content["splits"] = {split: SplitCounts(**counts) for split, counts in content["splits"].items()}
            content["files"] = {name: FileEntry(**entry) for name, entry in content["files"].items()}
            manifest = cls(**{**content, "notes": tuple(content["notes"])})
            manifest._check_types()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not the manifest of a corpus ({type(error).__name__}: {error})") from None
        if fingerprint != manifest.fingerprint:
            raise UserError(f"{path}: the fingerprint does not match the contents; the file was changed")
        return manifest


class Block(NamedTuple):
    """Encoded documents laid end to end."""

    tokens: bytes
    """Ids, in the corpus's token dtype."""
    sentence_tokens: np.ndarray
    """Number of tokens in each sentence."""
    document_sentences: np.ndarray
    """Number of sentences in each document."""


@dataclass(frozen=True)
class Shard:
    """Read-only mapped arrays of one shard; all offsets count from its beginning.

    Sentence i is `tokens[sentences[i] : sentences[i + 1]]`; document j is the sentences from `documents[j]` up to,
    not including, `documents[j + 1]`, that is, `tokens[starts[j] : starts[j + 1]]`.
    """

    tokens: np.ndarray
    """uint16 or uint32 [number of tokens]"""
    sentences: np.ndarray
    """uint64 [number of sentences + 1]"""
    documents: np.ndarray
    """uint64 [number of documents + 1]"""
    starts: np.ndarray
    """uint64 [number of documents + 1]: `sentences[documents]`, without reading the sentences"""

    def blocks(self, first: int = 0, end: int | None = None) -> Iterator[Block]:
        """The documents from `first` up to, not including, `end`, about BLOCK_TOKENS at a time."""
        end = len(self.documents) - 1 if end is None else end
        while first < end:
            full = np.searchsorted(self.starts, self.starts[first] + np.uint64(BLOCK_TOKENS))
            stop = min(max(int(full), first + 1), end)
            documents = self.documents[first : stop + 1].astype(np.int64)
            sentences = self.sentences[documents[0] : documents[-1] + 1].astype(np.int64)
            tokens = self.tokens[sentences[0] : sentences[-1]].tobytes()
            yield Block(tokens, np.diff(sentences), np.diff(documents))
            first = stop


class ShardWriter:
    """Appends blocks to the shards of one split; a shard is closed after the document that fills it.

    So the files depend on the documents and their order alone, not on how they were grouped into blocks.

    Args:
        directory: the folder for the files.
        dtype: of the tokens.
        shard_tokens: a shard is closed once it has this many tokens.
        state: from `sync` of an earlier writer of the same files; they are truncated to that state.

    Raises:
        UserError: the files are shorter than `state` says.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        dtype: np.dtype,
        shard_tokens: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._directory, self._split = directory, split
        self._dtype, self._shard_tokens = dtype, shard_tokens
        self._parts: dict[str, _HashedFile] = {}
        self._shards: list[SplitCounts] = []
        self._tokens = self._sentences = self._documents = 0  # in the open shard
        self.files: dict[str, FileEntry] = {}
        if state is not None:
            self._shards = [SplitCounts(**counts) for counts in state["shards"]]
            self.files = {name: FileEntry(**entry) for name, entry in state["files"].items()}
            if state["open"]:
                self._open(*state["open"])

    @property
    def counts(self) -> SplitCounts:
        """Counts over all closed shards."""
        return SplitCounts(
            tokens=sum(shard.tokens for shard in self._shards),
            sentences=sum(shard.sentences for shard in self._shards),
            documents=sum(shard.documents for shard in self._shards),
            shards=len(self._shards),
        )

    def add(self, block: Block) -> None:
        """Appends a block's documents."""
        sentence_ends = np.cumsum(block.sentence_tokens)
        last_sentences = np.cumsum(block.document_sentences)
        document_ends = sentence_ends[last_sentences - 1]  # no document is empty
        first = 0
        while first < len(document_ends):
            token = int(document_ends[first - 1]) if first else 0
            sentence = int(last_sentences[first - 1]) if first else 0
            if not self._parts:
                self._open()
            # up to the document that fills the shard, or all
            room = self._shard_tokens - self._tokens
            stop = min(int(np.searchsorted(document_ends, token + room)) + 1, len(document_ends))
            tokens, sentences = int(document_ends[stop - 1]), int(last_sentences[stop - 1])
            size = self._dtype.itemsize
            self._parts["tokens"].write(memoryview(block.tokens)[token * size : tokens * size])
            self._append("sentences", sentence_ends[sentence:sentences] + (self._tokens - token))
            self._append("documents", last_sentences[first:stop] + (self._sentences - sentence))
            self._append("starts", document_ends[first:stop] + (self._tokens - token))
            self._tokens += tokens - token
            self._sentences += sentences - sentence
            self._documents += stop - first
            first = stop
            if self._tokens >= self._shard_tokens:
                self.close()

    def close(self) -> None:
        """Closes the open shard, if any, and makes it durable."""
        if not self._parts:
            return
        for part, file in self._parts.items():
            self.files[shard_name(self._split, len(self._shards), part)] = file.close()
        self._shards.append(SplitCounts(self._tokens, self._sentences, self._documents))
        self._parts = {}

    def sync(self) -> dict[str, Any]:
        """Makes everything added so far durable; returns the state (JSON values) for resuming from here."""
        for file in self._parts.values():
            file.sync()
        return {
            "shards": [asdict(counts) for counts in self._shards],
            "files": {name: entry._asdict() for name, entry in self.files.items()},
            "open": [self._tokens, self._sentences, self._documents] if self._parts else None,
        }

    def _open(self, tokens: int = 0, sentences: int = 0, documents: int = 0) -> None:
        """Opens a new shard, or one that already holds this much."""
        self._tokens, self._sentences, self._documents = tokens, sentences, documents
        sizes = {"tokens": tokens * self._dtype.itemsize}
        if tokens:
            counts = {"sentences": sentences, "documents": documents, "starts": documents}
            sizes |= {part: (count + 1) * OFFSET.itemsize for part, count in counts.items()}
        for part in PARTS:
            path = self._directory / shard_name(self._split, len(self._shards), part)
            self._parts[part] = _HashedFile(path, sizes.get(part, 0))
            if part not in sizes:
                self._append(part, np.zeros(1))

    def _append(self, part: str, offsets: np.ndarray) -> None:
        self._parts[part].write(offsets.astype(OFFSET).tobytes())


class _HashedFile:
    """A file written sequentially, with its checksum at the end; its first `keep` bytes may exist already."""

    def __init__(self, path: Path, keep: int) -> None:
        self._file: BinaryIO = open(path, "a+b" if keep else "wb")
        self._file.seek(0)
        self._digest = hashlib.sha256()
        self._size = 0
        while self._size < keep:
            block = self._file.read(min(keep - self._size, 1 << 20))
            if not block:
                raise UserError(f"{path}: files of an interrupted run were damaged and are removed; start again")
            self._digest.update(block)
            self._size += len(block)
        self._file.seek(keep)
        self._file.truncate()

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> FileEntry:
        with self._file:
            self.sync()
        return FileEntry(self._size, self._digest.hexdigest())
