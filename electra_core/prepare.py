"""Text files to a prepared corpus: `electra prepare`.

The text is read as a stream: once to draw the sample a vocabulary is learnt from (not with a given tokenizer),
once to be encoded. Everything is written to a folder beside the target, which takes its place at the very end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path

import numpy as np

from electra_core import progress as progress_module
from electra_core.encoding import MAX_SENTENCE_TOKENS, Batch, Document, encode_all
from electra_core.errors import UserError
from electra_core.new_folder import new_folder
from electra_core.progress import Progress
from electra_core.sentences import LINE_MODES
from electra_core.shards import SPLITS, Block, Manifest, ShardWriter, SplitCounts, token_dtype
from electra_core.text_files import ReadReport, Source, document_hash, find_sources, read_documents, spool
from electra_core.tokenizer import Tokenizer, load_tokenizer
from electra_core.vocabulary import draw_sample, train_sentencepiece, train_wordpiece

TRAINED = ("sentencepiece", "wordpiece")
BATCH_CHARACTERS = 1 << 20  # of text in one unit of work
SAMPLE_CHARACTERS = 30_000_000  # of text that a vocabulary is trained on
SHARD_TOKENS = 1 << 28
MUCH_UNKNOWN = 0.01  # the share of [UNK] from which on the user is told

ProgressMaker = Callable[[str, int | None, str], AbstractContextManager[Progress]]


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
    progress: ProgressMaker = progress_module.progress,
) -> Manifest:
    """Turns text files into a corpus under `out_dir`.

    Args:
        text_paths: files, folders, or "-" for standard input; see `text_files.py`.
        tokenizer: "sentencepiece" or "wordpiece" trains one on the text; else the path of one.
        vocab_size, model_type, lowercase: of a trained one; `model_type` is SentencePiece's "unigram" or "bpe".
        lines: what the lines of a document are, see `sentences.split_document`.
        text_field: the field of JSON lines and the column of Parquet files that holds the text.
        workers: processes; the result is the same, byte for byte, for any number. With more than one, a script
            needs the usual `if __name__ == "__main__":`.
        heldout_fraction: of the documents, drawn by their contents, kept out of training.
        seed: of that draw, and of the sample.
        drop_duplicates: documents equal to an earlier one are left out (16 bytes of memory or so for each).
        sample_characters: of text that a vocabulary is trained on.
        shard_tokens: a shard is closed once it has so many.
        overwrite: replace an earlier corpus at `out_dir`.
        progress: makes the progress bars, `progress.progress` or a likeness.

    Raises:
        UserError: bad input, or a target that cannot be written; nothing is left behind.
    """
    _check_arguments(lines, workers, heldout_fraction, seed)
    sources = find_sources(text_paths)
    _check_target(Path(out_dir), sources, overwrite)
    with new_folder(Path(out_dir)) as folder:
        text = _Text(sources, text_field, progress)
        if tokenizer in TRAINED:
            text.spool_into(folder)
            sample = draw_sample(text.documents("reading a sample"), seed, sample_characters)
            chosen = _train(str(tokenizer), sample, vocab_size, model_type, lowercase)
        else:
            chosen = load_tokenizer(tokenizer)
        chosen.save(folder / "tokenizer")
        documents = assign(text.documents("writing tokens"), seed, heldout_fraction, drop_duplicates)
        shards = _Shards(folder, chosen, shard_tokens)
        with closing(encode_all(in_batches(documents), chosen, lines, workers)) as blocks:
            shards.write(blocks)
        text.remove_spooled()
        settings = {
            "lines": lines,
            "max_sentence_tokens": MAX_SENTENCE_TOKENS,
            "heldout_fraction": heldout_fraction,
            "drop_duplicates": drop_duplicates,
            "seed": seed,
            "sources": [{"name": Path(source.name).name, "bytes": source.size} for source in sources],
        }
        manifest = shards.manifest(settings, text.report.notes())
        manifest.write(folder / "manifest.json")
    return manifest


def _check_arguments(lines: str, workers: int, heldout_fraction: float, seed: int) -> None:
    if lines not in LINE_MODES:
        raise ValueError(f"lines must be one of {LINE_MODES}, got {lines!r}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction must be in [0, 1), got {heldout_fraction}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")


def _check_target(out: Path, sources: Sequence[Source], overwrite: bool) -> None:
    """Replaces nothing but an earlier corpus, and not one that holds the text."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "manifest.json").is_file():
        raise UserError(f"{out}: exists and is not a prepared corpus, so nothing is written there")
    if not overwrite:
        raise UserError(f"{out}: holds a prepared corpus already (--overwrite replaces it)")
    for source in sources:
        if source.path and source.path.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{source.name}: lies in {out}, which is to be overwritten")


class _Text:
    """The text of the sources, as often as it is asked for, with a progress bar each time."""

    def __init__(self, sources: Sequence[Source], text_field: str, progress: ProgressMaker) -> None:
        self._sources, self._text_field, self._progress = list(sources), text_field, progress
        self._spooled: Path | None = None
        self.report = ReadReport()
        """Of the latest reading."""

    def spool_into(self, folder: Path) -> None:
        """Copies standard input to a file, so that it can be read twice."""
        for place, source in enumerate(self._sources):
            if source.path is None:
                self._sources[place] = spool(source, folder)
                self._spooled = self._sources[place].path

    def remove_spooled(self) -> None:
        if self._spooled:
            self._spooled.unlink()

    def documents(self, title: str) -> Iterator[list[str]]:
        self.report = report = ReadReport()
        sizes = [source.size for source in self._sources]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        shown = 0
        with self._progress(title, total, "B") as bar:
            for document in read_documents(self._sources, text_field=self._text_field, report=report):
                bar.update(report.position - shown)
                shown = report.position
                yield document
            bar.update((total or shown) - shown)


def _train(kind: str, sample: Iterable[str], vocab_size: int, model_type: str, lowercase: bool) -> Tokenizer:
    if kind == "wordpiece":
        return train_wordpiece(sample, vocab_size, lowercase=lowercase)
    return train_sentencepiece(sample, vocab_size, model_type=model_type, lowercase=lowercase)


def assign(
    documents: Iterable[list[str]], seed: int, heldout_fraction: float, drop_duplicates: bool
) -> Iterator[Document]:
    """Sends each document to training or held-out, by its contents: the others and their order don't matter."""
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


class _Shards:
    """The shards of both splits on their way to the disk."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self._tokenizer, self._dtype = tokenizer, token_dtype(tokenizer.vocab_size)
        self._writers = {split: ShardWriter(folder, split, self._dtype, shard_tokens) for split in SPLITS}
        self._unknown = 0

    def write(self, encoded: Iterable[list[Block]]) -> None:
        for blocks in encoded:
            for writer, block in zip(self._writers.values(), blocks):
                writer.add(block)
                ids = np.frombuffer(block.tokens, self._dtype)
                self._unknown += int(np.count_nonzero(ids == self._tokenizer.unk_id))
        for writer in self._writers.values():
            writer.close()
        if not self._writers["train"].counts.tokens:
            raise UserError("no document is left to train on: the text is too small for a held-out part")

    def manifest(self, settings: dict[str, object], notes: Sequence[str]) -> Manifest:
        splits = {split: writer.counts for split, writer in self._writers.items()}
        return Manifest(
            tokenizer_fingerprint=self._tokenizer.fingerprint(),
            vocab_size=self._tokenizer.vocab_size,
            splits=splits,
            files={name: entry for writer in self._writers.values() for name, entry in writer.files.items()},
            settings=settings,
            notes=(*notes, *self._notes(splits)),
        )

    def _notes(self, splits: Mapping[str, SplitCounts]) -> Iterator[str]:
        unknown = self._unknown / sum(counts.tokens for counts in splits.values())
        if unknown > MUCH_UNKNOWN:
            yield f"{unknown:.1%} of the tokens are [UNK]; the vocabulary does not suit this text"
        if not splits["heldout"].documents:
            yield "no document is held out; a larger held-out fraction or more documents give some"
