"""Token shards: what pre-training reads. `prepare` writes them, `Corpus` opens them memory-mapped.

    DATA/manifest.json           format, counts, checksums, fingerprint; written last
    DATA/tokenizer/              the tokenizer's files
    DATA/train-00000.tokens      ids, uint16 (uint32 from 65,536 entries on), sentences end to end
    DATA/train-00000.sentences   uint64 offsets into the tokens, one per sentence and one for the end
    DATA/train-00000.documents   uint64 offsets into the sentences, likewise
    DATA/heldout-00000.*         the same for the documents held out

All numbers are little-endian, so that the mapped files are the arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tokenizers

from electra_core.errors import UserError
from electra_core.progress import Progress, progress
from electra_core.sentences import split_document
from electra_core.text_files import ReadReport, read_documents
from electra_core.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer, train_sentencepiece

FORMAT_VERSION = 1
SPLITS = ("train", "heldout")
PARTS = ("tokens", "sentences", "documents")
MAX_SENTENCE_TOKENS = 128
BATCH_CHARACTERS = 1 << 20  # of text in one unit of work
SAMPLE_CHARACTERS = 50_000_000  # of text a tokenizer is trained on
SHARD_TOKENS = 1 << 27


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus is made of; DATA/manifest.json."""

    format_version: int
    tokenizer: str  # fingerprint
    vocab_size: int
    dtype: str
    splits: dict[str, dict[str, int]]  # split -> tokens, sentences, documents, shards
    files: dict[str, dict[str, Any]]  # file name -> bytes, sha256
    settings: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""  # over everything that decides what is read


class _Writer:
    """Appends documents to the shards of one split."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        self._directory, self._split, self._dtype, self._shard_tokens = directory, split, dtype, shard_tokens
        self._files: dict[str, BinaryIO] = {}
        self._digests: dict[str, Any] = {}
        self._shard = -1
        self._tokens = self._sentences = 0  # in this shard
        self.totals = {"tokens": 0, "sentences": 0, "documents": 0, "shards": 0}
        self.files: dict[str, dict[str, Any]] = {}

    def add(self, block: _Block) -> None:
        """One batch's documents. A shard is closed behind the batch that fills it."""
        if not len(block.document_sentences):
            return
        if not self._files:
            self._open()
        self._write("tokens", block.tokens.astype(self._dtype, copy=False))
        self._write("sentences", self._tokens + np.cumsum(block.sentence_tokens, dtype="<u8"))
        self._write("documents", self._sentences + np.cumsum(block.document_sentences, dtype="<u8"))
        self._tokens += len(block.tokens)
        self._sentences += len(block.sentence_tokens)
        self.totals["tokens"] += len(block.tokens)
        self.totals["sentences"] += len(block.sentence_tokens)
        self.totals["documents"] += len(block.document_sentences)
        if self._tokens >= self._shard_tokens:
            self.close()

    def close(self) -> None:
        """Makes the current shard durable."""
        for part, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
            file.close()
            name = f"{self._split}-{self._shard:05d}.{part}"
            self.files[name] = {"bytes": size, "sha256": self._digests[part].hexdigest()}
        self._files = {}

    def _open(self) -> None:
        self._shard += 1
        self._tokens = self._sentences = 0
        self.totals["shards"] += 1
        for part in PARTS:
            self._files[part] = open(self._directory / f"{self._split}-{self._shard:05d}.{part}", "wb")
            self._digests[part] = hashlib.sha256()
        for part in ("sentences", "documents"):
            self._write(part, np.zeros(1, "<u8"))

    def _write(self, part: str, array: np.ndarray) -> None:
        data = array.tobytes()
        self._files[part].write(data)
        self._digests[part].update(data)


@dataclass
class _Block:
    """The documents of one batch that go to one split, as lengths and tokens laid end to end."""

    tokens: np.ndarray
    sentence_tokens: np.ndarray
    document_sentences: np.ndarray


# ---------------------------------------------------------------------------------------------- encoding

_worker_tokenizer: Tokenizer | None = None


def _start_worker(engine_json: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = SentencePieceTokenizer(tokenizers.Tokenizer.from_str(engine_json)).as_plain_text()


def _encode(batch: list[tuple[int, list[str]]], lines: str) -> tuple[_Block, ...]:
    """A block per split for a batch of (index of the split, lines of the document)."""
    assert _worker_tokenizer is not None
    sentences: list[str] = []
    counts: list[int] = []
    for _, document in batch:
        before = len(sentences)
        sentences += split_document(document, lines)
        counts.append(len(sentences) - before)
    encoded = iter(_worker_tokenizer.encode_batch(sentences))
    tokens: list[list[int]] = [[], []]
    lengths: list[list[int]] = [[], []]
    documents: list[list[int]] = [[], []]
    for (split, _), count in zip(batch, counts):
        pieces = 0
        for _ in range(count):
            ids = next(encoded)
            tokens[split] += ids
            cuts = _cut_lengths(len(ids))
            lengths[split] += cuts
            pieces += len(cuts)
        if pieces:
            documents[split].append(pieces)
    return tuple(
        _Block(np.array(tokens[i], "<u4"), np.array(lengths[i], "<u8"), np.array(documents[i], "<u8"))
        for i in range(2)
    )


def _cut_lengths(length: int) -> list[int]:
    """A sentence's length as those of nearly equal pieces within MAX_SENTENCE_TOKENS."""
    if length <= MAX_SENTENCE_TOKENS:
        return [length] if length else []
    count = -(-length // MAX_SENTENCE_TOKENS)
    return [length * (i + 1) // count - length * i // count for i in range(count)]


def _encode_all(
    batches: Iterator[list[tuple[int, list[str]]]], tokenizer: Tokenizer, lines: str, workers: int
) -> Iterator[tuple[_Block, ...]]:
    """Blocks in the order of the batches, whatever the number of processes."""
    engine_json = tokenizer.engine.to_str()
    if workers == 1:
        _start_worker(engine_json)
        yield from (_encode(batch, lines) for batch in batches)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (engine_json,)) as pool:
        running: deque = deque()
        for batch in batches:
            running.append(pool.submit(_encode, batch, lines))
            if len(running) >= 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


# ---------------------------------------------------------------------------------------------- prepare

ProgressMaker = Callable[..., AbstractContextManager[Progress]]


def prepare(
    text_paths: Sequence[str | Path],
    out_dir: str | Path,
    *,
    tokenizer: str | Path = "sentencepiece",
    vocab_size: int = 8192,
    model_type: str = "unigram",
    lowercase: bool = True,
    lines: str = "auto",
    text_field: str = "text",
    workers: int = 1,
    heldout_fraction: float = 0.005,
    seed: int = 0,
    drop_duplicates: bool = False,
    sample_characters: int = SAMPLE_CHARACTERS,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    progress: ProgressMaker = progress,
) -> Manifest:
    """Turns text files into token shards under `out_dir`; see the file's header for the layout."""
    out = Path(out_dir)
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out}: not empty (--overwrite replaces it)")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        if tokenizer == "sentencepiece":
            sample = _sample(read_documents(text_paths, text_field=text_field), seed, sample_characters)
            chosen: Tokenizer = train_sentencepiece(sample, vocab_size, model_type=model_type, lowercase=lowercase)
        else:
            chosen = load_tokenizer(tokenizer)
        chosen.save(temporary / "tokenizer")
        dtype = np.dtype("<u2" if chosen.vocab_size < 1 << 16 else "<u4")
        writers = [_Writer(temporary, split, dtype, shard_tokens) for split in SPLITS]
        report = ReadReport()
        documents = read_documents(text_paths, text_field=text_field, report=report)
        batches = _batches(documents, seed, heldout_fraction, drop_duplicates)
        with progress("tokens", None, "tok") as bar:
            for blocks in _encode_all(batches, chosen, lines, workers):
                for writer, block in zip(writers, blocks):
                    writer.add(block)
                    bar.update(len(block.tokens))
        for writer in writers:
            writer.close()
        manifest = _manifest(chosen, dtype, writers)
        (temporary / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n", "utf-8")
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
        return manifest
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _manifest(tokenizer: Tokenizer, dtype: np.dtype, writers: list[_Writer]) -> Manifest:
    files = {name: entry for writer in writers for name, entry in writer.files.items()}
    content = json.dumps([FORMAT_VERSION, tokenizer.fingerprint(), dtype.str, files], sort_keys=True)
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        dtype=dtype.str,
        splits={split: writer.totals for split, writer in zip(SPLITS, writers)},
        files=files,
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
    )


def _sample(documents: Iterable[list[str]], seed: int, characters: int) -> Iterator[str]:
    """Lines of an evenly spread sample of documents, within about `characters` of text."""
    # Every document gets a pseudo-random number; those below a threshold stay, and the threshold sinks
    # whenever the sample has grown too large. What stays does not depend on the order of the documents.
    kept: list[tuple[int, list[str], int]] = []
    size, threshold = 0, 1 << 64
    for document in documents:
        number = _hash(document, seed, b"sample")
        if number >= threshold:
            continue
        length = sum(map(len, document))
        kept.append((number, document, length))
        size += length
        while size > characters and threshold > 1:
            threshold //= 2
            kept = [entry for entry in kept if entry[0] < threshold] or kept[:1]
            size = sum(entry[2] for entry in kept)
            if len(kept) == 1:
                break
    for _, document, _ in kept:
        yield from document


def _hash(document: list[str], seed: int, purpose: bytes) -> int:
    """64 pseudo-random bits that depend on the text alone (and the seed)."""
    digest = hashlib.blake2b(
        "\n".join(document).encode("utf-8", "surrogatepass"),
        digest_size=8,
        key=seed.to_bytes(8, "little"),
        person=purpose,
    )
    return int.from_bytes(digest.digest(), "little")


def _batches(
    documents: Iterable[list[str]], seed: int, heldout_fraction: float, drop_duplicates: bool
) -> Iterator[list[tuple[int, list[str]]]]:
    """Units of work: (0 for training or 1 for held-out, document), about BATCH_CHARACTERS of text each."""
    limit = int(heldout_fraction * (1 << 64))
    batch: list[tuple[int, list[str]]] = []
    size = 0
    seen: set[int] = set()
    for document in documents:
        number = _hash(document, seed, b"split")
        if drop_duplicates:
            if number in seen:
                continue
            seen.add(number)
        batch.append((int(number < limit), document))
        size += sum(map(len, document))
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Shard:
    """Memory-mapped arrays of one shard; offsets start at 0 in each."""

    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray


class Corpus:
    """One split of a prepared corpus, memory-mapped; `Corpus.open` makes it.

    Sentences and documents are numbered through across the shards, in the order of the text.
    """

    def __init__(self, directory: Path, split: str, manifest: Manifest) -> None:
        self.directory, self.split, self.manifest = directory, split, manifest
        dtypes = {"tokens": manifest.dtype, "sentences": "<u8", "documents": "<u8"}
        self.shards = tuple(
            Shard(**{part: self._map(f"{split}-{index:05d}.{part}", dtypes[part]) for part in PARTS})
            for index in range(manifest.splits[split]["shards"])
        )
        counts = manifest.splits[split]
        self.num_tokens, self.num_sentences = counts["tokens"], counts["sentences"]
        self.num_documents = counts["documents"]
        self.fingerprint = manifest.fingerprint

    @classmethod
    def open(cls, directory: str | Path, split: str = "train") -> Corpus:
        """Opens DATA's "train" or "heldout" split; the time does not depend on its size."""
        directory = Path(directory)
        path = directory / "manifest.json"
        if not path.is_file():
            raise UserError(f"{directory}: not a prepared corpus (no manifest.json; see `electra prepare`)")
        return cls(directory, split, Manifest(**json.loads(path.read_text("utf-8"))))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.directory / "tokenizer")

    def _map(self, name: str, dtype: str) -> np.ndarray:
        path = self.directory / name
        if not path.is_file() or path.stat().st_size != self.manifest.files[name]["bytes"]:
            raise UserError(f"{path}: missing or truncated")
        return np.memmap(path, dtype=dtype, mode="r")
