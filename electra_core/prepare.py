"""Turns text files into a prepared corpus: `electra prepare`.

The text is read as a stream: once to draw the sample from which a vocabulary is learnt (unless a tokenizer is
given), once to be encoded. Everything is written to a folder beside the target, which takes its place at the very
end; a killed run is resumed (`corpora/journal.py`).

On many machines: `train_tokenizer` once, then `prepare(..., shard=(i, n))` on each, then `corpora.merge.merge`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from electra_core.corpora.encoding import MAX_SENTENCE_TOKENS
from electra_core.corpora.journal import FILE as JOURNAL
from electra_core.corpora.journal import Journal
from electra_core.corpora.replacing import CORPUS, TOKENIZER, check_target
from electra_core.corpora.sentences import LINE_MODES
from electra_core.corpora.shards import Manifest
from electra_core.corpora.sources import describe, find_sources, share
from electra_core.corpora.text_files import DOCUMENTS
from electra_core.corpora.vocabulary import draw_sample, train_sentencepiece, train_wordpiece
from electra_core.corpora.writing import ShardedText, SourceText
from electra_core.errors import UserError, option
from electra_core.files.json_files import digest_of
from electra_core.files.new_folder import new_folder, partial_folder
from electra_core.tokenizer import Tokenizer, load_tokenizer

TRAINED = ("sentencepiece", "wordpiece")
SAMPLE_CHARACTERS = 50_000_000  # of text that a vocabulary is trained on
SHARD_TOKENS = 1 << 28

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

    A corpus made earlier by the same call is left as it is; what a killed or interrupted call left is resumed
    (not from standard input). Files are recognised by name, size and their first and last 64 KiB.

    Args:
        text_paths: a file or folder, several, or "-" for standard input; see `corpora/text_files.py`.
        tokenizer: "sentencepiece" or "wordpiece" trains one on the text; otherwise the path of one.
        vocab_size, model_type, lowercase: for training one; `model_type` is SentencePiece's "unigram" or "bpe".
        lines: what the lines of a document are; see `corpora.sentences.split_document`.
        text_field: the field of JSON rows and the column of CSV, TSV and Parquet files that holds the text.
        documents: what ends a document in a `.txt` file: a "blank-line", the end of each "line", or only that of
            the "file".
        workers: number of processes; the result is the same, byte for byte, for any. With more than one, a script
            needs the usual `if __name__ == "__main__":`.
        heldout_fraction: share of documents, drawn by their contents, kept out of training; unless it is 0, one of
            several documents is held out even if none is drawn (`corpora/hold_out.py`; not in a part, but when
            merging).
        seed: of that draw and of the sample.
        drop_duplicates: documents equal to an earlier one are left out (about 70 bytes of memory for each).
        sample_characters: amount of text that a vocabulary is trained on.
        shard_tokens: a shard is closed once it has this many tokens.
        shard: (i, n) processes the i-th of n parts of the files, i from 1; `merge` makes one corpus of all parts.
        overwrite: replace an earlier corpus at `out_dir`.
        quiet: no progress bars.

    Raises:
        UserError: bad input, or a target that cannot be written; nothing is left behind.
        KeyboardInterrupt: what is durable by then is kept for the same call to resume.
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
            raise UserError(f"{option('shard')}: needs an existing {option('tokenizer')}, the same for all parts")
        settings["shard"] = [*shard, digest_of([describe(source) for source in every_source])]
    if not overwrite and (finished := _finished(Path(out_dir), settings)):
        log.info("%s: already prepared from the same files in the same way; nothing to do", out_dir)
        return finished
    check_target(Path(out_dir), [source.path for source in sources if source.path], overwrite, CORPUS)
    text = SourceText(sources, text_field, documents, quiet)
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
        run = ShardedText(folder, chosen, shard_tokens, journal)
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
    """Trains only the tokenizer that `prepare` would train on the same text, and saves it under `out_dir`.

    Args: as for `prepare`.

    Raises:
        UserError: as `prepare`.
    """
    if tokenizer not in TRAINED:
        raise UserError(f"tokenizer: expected {' or '.join(TRAINED)} to train one, got {str(tokenizer)!r}")
    _check_arguments("auto", documents, 1, 0.0, seed)
    sources, out = find_sources(text_paths), Path(out_dir)
    inputs = [source.path for source in sources if source.path]
    check_target(out, inputs, overwrite, TOKENIZER)
    with new_folder(out) as folder:
        text = SourceText(sources, text_field, documents, quiet)
        sample = draw_sample(text.documents("reading a sample"), seed, sample_characters)
        chosen = _train(tokenizer, sample, vocab_size, model_type, lowercase)
        chosen.save(folder)
    return chosen


def _finished(out: Path, settings: Mapping[str, Any]) -> Manifest | None:
    """The manifest of the corpus at `out`, if the same call made it."""
    if not (out / "manifest.json").is_file() or any(
        source["ends_sha256"] is None for source in settings["sources"]
    ):
        return None
    manifest = Manifest.read(out / "manifest.json")
    return manifest if manifest.settings == json.loads(json.dumps(settings)) else None


def _check_arguments(lines: str, documents: str, workers: int, heldout_fraction: float, seed: int) -> None:
    if lines not in LINE_MODES:
        raise ValueError(f"lines: expected one of {LINE_MODES}, got {lines!r}")
    if documents not in DOCUMENTS:
        raise ValueError(f"documents: expected one of {DOCUMENTS}, got {documents!r}")
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction: expected a number in [0, 1), got {heldout_fraction}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: expected an integer in [0, 2^64), got {seed}")


def _train(kind: str, sample: Iterable[str], vocab_size: int, model_type: str, lowercase: bool) -> Tokenizer:
    if kind == "wordpiece":
        return train_wordpiece(sample, vocab_size, lowercase=lowercase)
    return train_sentencepiece(sample, vocab_size, model_type=model_type, lowercase=lowercase)
