"""Text files to a prepared corpus: `electra prepare`.

The text is read as a stream: once to draw the sample a vocabulary is learnt from (not with a given tokenizer),
once to be encoded. Everything is written to a folder beside the target, which takes its place at the very end; a
killed run is resumed (`journal.py`).

On many machines: `train_tokenizer` once, then `prepare(..., shard=(i, n))` on each, then `merge.merge`.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from electra_core.encoding import MAX_SENTENCE_TOKENS, Batch, Document, encode_all
from electra_core.errors import UserError, option
from electra_core.hold_out import hold_one_out, lacks_heldout
from electra_core.journal import FILE as JOURNAL
from electra_core.journal import Journal
from electra_core.new_folder import new_folder, partial_folder
from electra_core.progress import progress
from electra_core.sentences import LINE_MODES
from electra_core.shards import SPLITS, Block, Manifest, ShardWriter, SplitCounts, token_dtype
from electra_core.sources import Source, describe, digest, find_sources, share
from electra_core.text_files import DOCUMENTS, ReadReport, document_hash, read_documents, spool
from electra_core.tokenizer import Tokenizer, load_tokenizer
from electra_core.vocabulary import draw_sample, train_sentencepiece, train_wordpiece

TRAINED = ("sentencepiece", "wordpiece")
BATCH_CHARACTERS = 1 << 20  # of text in one unit of work
JOURNAL_BATCHES = 64  # units of work between two entries of the journal
SAMPLE_CHARACTERS = 50_000_000  # of text that a vocabulary is trained on
SHARD_TOKENS = 1 << 28
MUCH_UNKNOWN = 0.01  # the share of [UNK] from which on the user is told

log = logging.getLogger(__name__)


def prepare(
    text_paths: str | Path | Sequence[str | Path],
    out_dir: str | Path,
    *,
    tokenizer: str | Path = "sentencepiece",
    vocab_size: int = 8192,
    model_type: str = "unigram",
    lowercase: bool = True,
    lines: str = "auto",
    text_field: str = "text",
    documents: str = "blank-line",
    workers: int = 1,
    heldout_fraction: float = 0.005,
    seed: int = 0,
    drop_duplicates: bool = False,
    sample_characters: int = SAMPLE_CHARACTERS,
    shard_tokens: int = SHARD_TOKENS,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Manifest:
    """Turns text files into a corpus under `out_dir`.

    What was made by the same call before is left as it is; what a killed or interrupted one left is resumed
    (not from standard input). Files are known again by name, size and their first and last 64 KiB.

    Args:
        text_paths: a file or folder, several, or "-" for standard input; see `text_files.py`.
        tokenizer: "sentencepiece" or "wordpiece" trains one on the text; else the path of one.
        vocab_size, model_type, lowercase: of a trained one; `model_type` is SentencePiece's "unigram" or "bpe".
        lines: what the lines of a document are, see `sentences.split_document`.
        text_field: the field of JSON rows and the column of CSV, TSV and Parquet files that holds the text.
        documents: what ends a document in a `.txt` file: a "blank-line", or only the end of the "file".
        workers: processes; the result is the same, byte for byte, for any number. With more than one, a script
            needs the usual `if __name__ == "__main__":`.
        heldout_fraction: of the documents, drawn by their contents, kept out of training; if none of several is
            drawn, one is all the same (`hold_out.py`; not in a part, but in what is merged), unless it is 0.
        seed: of that draw, and of the sample.
        drop_duplicates: documents equal to an earlier one are left out (about 70 bytes of memory for each).
        sample_characters: of text that a vocabulary is trained on.
        shard_tokens: a shard is closed once it has so many.
        shard: (i, n) takes the i-th of n parts of the files, i from 1; `merge` makes one corpus of all of them.
        overwrite: replace an earlier corpus at `out_dir`.
        quiet: without progress bars.

    Raises:
        UserError: bad input, or a target that cannot be written; nothing is left behind.
        KeyboardInterrupt: what is durable by then is left for the same call to go on with.
    """
    _check_arguments(lines, documents, workers, heldout_fraction, seed)
    every_source = find_sources(text_paths)
    sources = every_source if shard is None else share(every_source, *shard)
    given = None if tokenizer in TRAINED else load_tokenizer(tokenizer)
    trained = [str(tokenizer), vocab_size, model_type, lowercase, sample_characters]
    settings: dict[str, Any] = {
        "tokenizer": given.fingerprint() if given else trained,
        "lines": lines,
        "text_field": text_field,
        "max_sentence_tokens": MAX_SENTENCE_TOKENS,
        "heldout_fraction": heldout_fraction,
        "drop_duplicates": drop_duplicates,
        "seed": seed,
        "shard_tokens": shard_tokens,
        "sources": [describe(source) for source in sources],
    }
    if documents != "blank-line":  # which older versions did not write
        settings["documents"] = documents
    if shard is not None:
        if given is None:
            raise UserError("a part of a corpus needs a tokenizer that is there already, the same for all parts")
        settings["shard"] = [*shard, digest([describe(source) for source in every_source])]
    if not overwrite and (finished := _finished(Path(out_dir), settings)):
        log.info("%s: made of the same files in the same way before; nothing to do", out_dir)
        return finished
    check_target(Path(out_dir), [source.path for source in sources if source.path], overwrite)
    text = _Text(sources, text_field, documents, quiet)
    with partial_folder(Path(out_dir), JOURNAL if text.can_be_read_again else "") as folder:
        journal = Journal(folder, settings)
        if not text.can_be_read_again:
            journal.clear()
        if given is None and journal.state is None:
            text.spool_into(folder)
            sample = draw_sample(text.documents("reading a sample"), seed, sample_characters)
            _train(str(tokenizer), sample, vocab_size, model_type, lowercase).save(folder / "tokenizer")
        chosen = given or load_tokenizer(folder / "tokenizer")
        chosen.save(folder / "tokenizer")
        run = _Run(folder, chosen, shard_tokens, journal)
        run.encode(text, lines, workers, seed, heldout_fraction, drop_duplicates)
        if shard is None:
            run.hold_out(heldout_fraction)
        text.remove_spooled()
        manifest = run.manifest(settings, text.report)
        manifest.write(folder / "manifest.json")
        journal.remove()
    return manifest


def train_tokenizer(
    text_paths: str | Path | Sequence[str | Path],
    out_dir: str | Path,
    *,
    tokenizer: str = "sentencepiece",
    vocab_size: int = 8192,
    model_type: str = "unigram",
    lowercase: bool = True,
    text_field: str = "text",
    documents: str = "blank-line",
    seed: int = 0,
    sample_characters: int = SAMPLE_CHARACTERS,
    overwrite: bool = False,
    quiet: bool = False,
) -> Tokenizer:
    """The tokenizer that `prepare` would train on the same text, alone, under `out_dir`.

    Args: as for `prepare`.

    Raises:
        UserError: as `prepare`.
    """
    if tokenizer not in TRAINED:
        raise UserError(f"only {' or '.join(TRAINED)} can be trained, got {str(tokenizer)!r}")
    _check_arguments("auto", documents, 1, 0.0, seed)
    sources, out = find_sources(text_paths), Path(out_dir)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / "tokenizer.json").is_file():
            raise UserError(f"{out}: exists and is not a tokenizer, so nothing is written there")
        if not overwrite:
            raise UserError(f"{out}: holds a tokenizer already ({option('overwrite')} replaces it)")
    with new_folder(out) as folder:
        text = _Text(sources, text_field, documents, quiet)
        sample = draw_sample(text.documents("reading a sample"), seed, sample_characters)
        chosen = _train(tokenizer, sample, vocab_size, model_type, lowercase)
        chosen.save(folder)
    return chosen


def _finished(out: Path, settings: Mapping[str, Any]) -> Manifest | None:
    """The corpus at `out`, if the same call made it."""
    if not (out / "manifest.json").is_file() or any(
        source["ends_sha256"] is None for source in settings["sources"]
    ):
        return None
    manifest = Manifest.read(out / "manifest.json")
    return manifest if manifest.settings == json.loads(json.dumps(settings)) else None


def _check_arguments(lines: str, documents: str, workers: int, heldout_fraction: float, seed: int) -> None:
    if lines not in LINE_MODES:
        raise ValueError(f"lines must be one of {LINE_MODES}, got {lines!r}")
    if documents not in DOCUMENTS:
        raise ValueError(f"documents must be one of {DOCUMENTS}, got {documents!r}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction must be in [0, 1), got {heldout_fraction}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")


def check_target(out: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """Raises UserError unless `out` is new, empty, or an earlier corpus that may go and has no input in it."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "manifest.json").is_file():
        raise UserError(f"{out}: exists and is not a prepared corpus, so nothing is written there")
    if not overwrite:
        raise UserError(f"{out}: holds a prepared corpus already ({option('overwrite')} replaces it)")
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{path}: lies in {out}, which is to be overwritten")


class _Text:
    """The text of the sources, as often as it is asked for, with a progress bar each time."""

    def __init__(self, sources: Sequence[Source], text_field: str, documents: str, quiet: bool) -> None:
        self._sources, self._quiet = list(sources), quiet
        self._reading = {"text_field": text_field, "documents": documents}
        self._spooled: Path | None = None
        self.report = ReadReport()
        """Of the latest reading."""

    @property
    def can_be_read_again(self) -> bool:
        """Whether another process finds the same text."""
        return all(source.is_regular for source in self._sources)

    def spool_into(self, folder: Path) -> None:
        """Copies standard input to a file, so that it can be read twice."""
        for place, source in enumerate(self._sources):
            if source.path is None:
                self._sources[place] = spool(source, folder)
                self._spooled = self._sources[place].path

    def remove_spooled(self) -> None:
        if self._spooled:
            self._spooled.unlink()

    def documents(self, title: str, after: ReadReport | None = None) -> Iterator[list[str]]:
        """All documents, or those behind where an earlier reading was."""
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


class _Run:
    """The shards of both splits on their way to the disk, from where the journal says on."""

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
        self, text: _Text, lines: str, workers: int, seed: int, heldout_fraction: float, drop_duplicates: bool
    ) -> None:
        """Writes all documents that are not there yet."""
        after, done = None, 0
        if self._before:
            after, done = ReadReport(**self._before["report"]), int(self._before["documents"])
            log.info("going on with an interrupted run, behind %s documents", f"{done:,}")
        # Whether a document was there before is known only after all others were looked at again.
        documents = text.documents("writing tokens", None if drop_duplicates else after)
        assigned = assign(documents, seed, heldout_fraction, drop_duplicates)
        remaining = islice(assigned, done, None) if drop_duplicates else assigned
        places: deque[dict[str, Any]] = deque()  # behind each batch that is being encoded

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

    @property
    def _splits(self) -> dict[str, SplitCounts]:
        return {split: writer.counts for split, writer in self._writers.items()}

    def hold_out(self, heldout_fraction: float) -> None:
        """Holds a document out if none is and one should be."""
        if lacks_heldout(self._splits, heldout_fraction):
            self._journal.remove()  # it tells of the shards that are there, not of those that come
            self._writers = hold_one_out(self._folder, self._splits["train"], self._dtype, self._shard_tokens)
            self._held_one_out = True

    def manifest(self, settings: Mapping[str, Any], report: ReadReport) -> Manifest:
        """Raises UserError if there is nothing to train on, unless this is only a part."""
        splits = self._splits
        if not splits["train"].tokens and "shard" not in settings:
            raise UserError("no document is left to train on: the text is too small for a held-out part")
        counts = {name: getattr(report, name) for name in ("empty_files", "cut_lines", "cut_documents")}
        counts["unknown_tokens"] = self._unknown
        return Manifest(
            tokenizer_fingerprint=self._tokenizer.fingerprint(),
            vocab_size=self._tokenizer.vocab_size,
            splits=splits,
            files={name: entry for writer in self._writers.values() for name, entry in writer.files.items()},
            settings=settings,
            counts=counts,
            notes=tuple(notes(splits, counts, self._held_one_out)),
        )


def notes(splits: Mapping[str, SplitCounts], counts: Mapping[str, int], held_one_out: bool) -> Iterator[str]:
    """Sentences for the user about what is out of the ordinary.

    Args:
        held_one_out: whether `hold_one_out` was needed.
    """
    of_reading = {name: count for name, count in counts.items() if name != "unknown_tokens"}
    yield from ReadReport(**of_reading).notes()
    tokens = sum(split.tokens for split in splits.values())
    if counts["unknown_tokens"] > MUCH_UNKNOWN * tokens:
        share_of_unknown = counts["unknown_tokens"] / tokens
        yield f"{share_of_unknown:.1%} of the tokens are [UNK]; the vocabulary does not suit this text"
    if held_one_out:
        yield "documents are few and the draw held out none, so one of about average length is held out"
    if not splits["heldout"].documents:
        yield "no document is held out; a larger held-out fraction or more documents give some"
