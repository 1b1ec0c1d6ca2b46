"""Reads a prepared corpus: memory-mapped tokens with sentence and document boundaries.

`prepare` (in `prepare.py`) writes it, `corpora/shards.py` describes the files. Opening checks file sizes only, so
its time and memory do not depend on the size of the corpus; `verify` reads everything.
"""

from __future__ import annotations

import mmap
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from electra_core.corpora.shards import OFFSET, SPLITS, Manifest, Shard, shard_name, token_dtype
from electra_core.errors import UserError, reading
from electra_core.files.byte_files import sha256_of
from electra_core.tokenizer import Tokenizer, load_tokenizer

LARGE = 1_000_000_000
"""From this many tokens on, the sentence boundaries that examples look up are read page by page. In a smaller
corpus, read-ahead fetches what is needed soon; in a larger one, a hundred times too much (docs/scaling.md)."""


class Corpus:
    """One split of a prepared corpus; `Corpus.open` makes it.

    `shards` holds its sentences and documents in the order of the text (`corpora.shards.Shard`).
    """

    def __init__(self, directory: Path, split: str, manifest: Manifest) -> None:
        self.directory, self.split, self.manifest = directory, split, manifest
        counts = manifest.splits[split]
        self.num_tokens, self.num_sentences = counts.tokens, counts.sentences
        self.num_documents = counts.documents
        self.shards = tuple(self._open_shard(index) for index in range(counts.shards))
        tokens = sum(len(shard.tokens) for shard in self.shards)
        sentences = sum(len(shard.sentences) - 1 for shard in self.shards)
        if (tokens, sentences) != (counts.tokens, counts.sentences):
            raise UserError(f"{directory}: the counts in manifest.json do not match the {split} files")

    @classmethod
    def open(cls, directory: str | Path, split: str = "train") -> Corpus:
        """Opens the "train" or "heldout" split of DATA.

        Raises:
            UserError: not a prepared corpus, another version, files missing or of the wrong size.
        """
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
        directory = Path(directory)
        if not (directory / "manifest.json").is_file():
            raise UserError(
                f"{directory}: not a prepared corpus (no manifest.json); make one with `electra prepare`"
            )
        return cls(directory, split, Manifest.read(directory / "manifest.json"))

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the whole corpus: both splits and the tokenizer."""
        return self.manifest.fingerprint

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the corpus was made with.

        Raises:
            UserError: the files under DATA/tokenizer belong to another tokenizer.
        """
        tokenizer = load_tokenizer((self.directory / "tokenizer" / "tokenizer.json").resolve())  # links are fine
        if tokenizer.fingerprint() != self.manifest.tokenizer_fingerprint:
            raise UserError(f"{self.directory}: this tokenizer is not the one that the corpus was made with")
        return tokenizer

    def read_at_random(self) -> None:
        """Tells the system that sentences will be looked up at random places, if the corpus is `LARGE`."""
        for shard in self.shards if self.num_tokens > LARGE else ():
            mapped: Any = shard.sentences
            while not isinstance(mapped, mmap.mmap):
                mapped = mapped.base
            mapped.madvise(mmap.MADV_RANDOM)

    def verify(self) -> None:
        """Reads every file of both splits and compares the checksums.

        Raises:
            UserError: naming the first damaged or missing file.
        """
        for name, entry in self.manifest.files.items():
            path = self.directory / name
            with reading(path):
                found = sha256_of(path)
            if found != entry.sha256:
                raise UserError(f"{path}: damaged (the checksum does not match)")

    def _open_shard(self, index: int) -> Shard:
        tokens = self._map(index, "tokens", token_dtype(self.manifest.vocab_size))
        sentences = self._map(index, "sentences", OFFSET)
        documents = self._map(index, "documents", OFFSET)
        whole = int(sentences[-1]) == len(tokens) and int(documents[-1]) == len(sentences) - 1
        if whole and self.manifest.format_version == 1:
            starts = sentences[documents]
        else:
            starts = self._map(index, "starts", OFFSET)
        if not whole or len(starts) != len(documents) or int(starts[-1]) != len(tokens):
            name = shard_name(self.split, index, "*")
            raise UserError(f"{self.directory / name}: damaged (the offsets do not match the tokens)")
        return Shard(tokens, sentences, documents, starts)

    def _map(self, index: int, part: str, dtype: np.dtype) -> np.ndarray:
        name = shard_name(self.split, index, part)
        path = self.directory / name
        entry = self.manifest.files.get(name)
        if entry is None or not path.is_file():
            raise UserError(f"{path}: missing")
        if (size := path.stat().st_size) != entry.bytes:
            raise UserError(f"{path}: truncated or changed ({size:,} bytes, the manifest says {entry.bytes:,})")
        # A plain array over the mapped memory: slicing an np.memmap costs several times as much.
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
