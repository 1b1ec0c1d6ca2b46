"""The files of a prepared corpus, and how they are written. `corpus.py` opens them, `prepare.py` fills them.

    DATA/manifest.json           what there is, with sizes and checksums; written last
    DATA/tokenizer/              the tokenizer's files
    DATA/train-00000.tokens      ids, uint16 (uint32 from 65,536 entries on), sentences laid end to end
    DATA/train-00000.sentences   uint64, where each sentence begins in the tokens, and where the last one ends
    DATA/train-00000.documents   uint64, where each document begins in the sentences, likewise
    DATA/heldout-00000.*         the same for the documents held out

All numbers are little-endian, so that a mapped file is the array. No sentence and no document is empty, and none
goes across two shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from electra_core.errors import UserError

FORMAT_VERSION = 1
SPLITS = ("train", "heldout")
OFFSET = np.dtype("<u8")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_name(split: str, index: int, part: str) -> str:
    """File name of one part ("tokens", "sentences", "documents") of shard `index` of a split."""
    return f"{split}-{index:05d}.{part}"


class FileEntry(NamedTuple):
    """What the manifest knows of a file."""

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

    tokenizer_fingerprint: str
    vocab_size: int
    splits: Mapping[str, SplitCounts]
    """By split, "train" and "heldout"."""
    files: Mapping[str, FileEntry]
    """By file name; the tokenizer's are not among them, they have their fingerprint."""
    settings: Mapping[str, Any]
    """How the corpus was made, for the reader; nothing depends on it."""
    notes: tuple[str, ...] = ()
    """What was out of the ordinary while it was made."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that a training run reads: equal fingerprints, equal examples."""
        content = [FORMAT_VERSION, self.tokenizer_fingerprint, sorted(self.files.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def write(self, path: Path) -> None:
        files = {name: entry._asdict() for name, entry in self.files.items()}
        content = {"format_version": FORMAT_VERSION, "fingerprint": self.fingerprint, **asdict(self)}
        write_durably(path, json.dumps({**content, "files": files}, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises UserError on a damaged file or another version of the format."""
        try:
            content = json.loads(path.read_bytes())
            version = content.pop("format_version")
            if version != FORMAT_VERSION:
                raise UserError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}")
            fingerprint = content.pop("fingerprint")
            content["splits"] = {split: SplitCounts(**counts) for split, counts in content["splits"].items()}
            content["files"] = {name: FileEntry(**entry) for name, entry in content["files"].items()}
            manifest = cls(**{**content, "notes": tuple(content["notes"])})
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not the manifest of a corpus ({type(error).__name__}: {error})") from None
        if fingerprint != manifest.fingerprint:
            raise UserError(f"{path}: the fingerprint does not fit the contents; the file was changed")
        return manifest


class Block(NamedTuple):
    """Encoded documents laid end to end."""

    tokens: bytes
    """Of the corpus's token type."""
    sentence_tokens: np.ndarray
    """Tokens in each sentence."""
    document_sentences: np.ndarray
    """Sentences in each document."""


class ShardWriter:
    """Appends blocks to the shards of one split; a shard is closed behind the block that fills it."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        self._directory, self._split = directory, split
        self._token_bytes, self._shard_tokens = dtype.itemsize, shard_tokens
        self._parts: dict[str, _HashedFile] = {}
        self._shards: list[SplitCounts] = []
        self._tokens = self._sentences = self._documents = 0  # in the open shard
        self.files: dict[str, FileEntry] = {}

    @property
    def counts(self) -> SplitCounts:
        """Over all closed shards."""
        return SplitCounts(
            tokens=sum(shard.tokens for shard in self._shards),
            sentences=sum(shard.sentences for shard in self._shards),
            documents=sum(shard.documents for shard in self._shards),
            shards=len(self._shards),
        )

    def add(self, block: Block) -> None:
        if not block.tokens:
            return
        if not self._parts:
            self._open()
        self._parts["tokens"].write(block.tokens)
        self._parts["sentences"].write((self._tokens + np.cumsum(block.sentence_tokens)).astype(OFFSET).tobytes())
        ends = self._sentences + np.cumsum(block.document_sentences)
        self._parts["documents"].write(ends.astype(OFFSET).tobytes())
        self._tokens += len(block.tokens) // self._token_bytes
        self._sentences += len(block.sentence_tokens)
        self._documents += len(block.document_sentences)
        if self._tokens >= self._shard_tokens:
            self.close()

    def close(self) -> None:
        """Makes the open shard, if any, durable."""
        if not self._parts:
            return
        for part, file in self._parts.items():
            self.files[shard_name(self._split, len(self._shards), part)] = file.close()
        self._shards.append(SplitCounts(self._tokens, self._sentences, self._documents))
        self._parts = {}

    def _open(self) -> None:
        self._tokens = self._sentences = self._documents = 0
        for part in ("tokens", "sentences", "documents"):
            self._parts[part] = _HashedFile(self._directory / shard_name(self._split, len(self._shards), part))
        for part in ("sentences", "documents"):
            self._parts[part].write(np.zeros(1, OFFSET).tobytes())


class _HashedFile:
    """A file written front to back, whose checksum is known at the end."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb")
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def close(self) -> FileEntry:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return FileEntry(self._size, self._digest.hexdigest())


def write_durably(path: Path, text: str) -> None:
    """Writes a small file and waits until it is on the disk."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
