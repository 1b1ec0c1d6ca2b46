"""Merges parts of a corpus prepared on many machines: `electra prepare --merge PART... --out DATA`.

The documents are rewritten, part after part, so the result is what a single machine would have made of all files,
byte for byte (except that a document in two parts is not recognised as a duplicate). The parts are read twice:
once to check them, once to copy them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from electra_core.corpora.hold_out import hold_one_out, lacks_heldout
from electra_core.corpora.replacing import CORPUS, check_target
from electra_core.corpora.shards import SPLITS, Manifest, ShardWriter, token_dtype
from electra_core.corpora.writing import manifest_of
from electra_core.corpus import Corpus
from electra_core.errors import UserError
from electra_core.files.new_folder import new_folder
from electra_core.runs.progress import progress


def merge(
    parts: Sequence[str | Path],
    out_dir: str | Path,
    *,
    overwrite: bool = False,
    quiet: bool = False,
) -> Manifest:
    """Merges all parts made by `prepare(..., shard=(i, n))` into one corpus under `out_dir`.

    Args:
        parts: their folders, in any order.
        overwrite: replace an earlier corpus at `out_dir`.
        quiet: no progress bars.

    Raises:
        UserError: a folder is not a part, or parts are missing, given twice, damaged or made with other settings.
    """
    out = Path(out_dir)
    opened = _in_order([Corpus.open(part) for part in parts])
    check_target(out, [corpus.directory for corpus in opened], overwrite, CORPUS)
    first = opened[0].manifest
    settings = {key: value for key, value in first.settings.items() if key != "shard"}
    settings["sources"] = [source for corpus in opened for source in corpus.manifest.settings["sources"]]
    counts: Counter[str] = Counter()
    for corpus in opened:
        corpus.verify()
        counts.update(corpus.manifest.counts)
    with new_folder(out) as folder:
        shutil.copytree(opened[0].directory / "tokenizer", folder / "tokenizer")
        writers = {split: _copy(opened, split, folder, settings["shard_tokens"], quiet) for split in SPLITS}
        if held_one_out := lacks_heldout(writers, settings["heldout_fraction"]):
            dtype = token_dtype(first.vocab_size)
            writers = hold_one_out(folder, writers["train"].counts, dtype, settings["shard_tokens"])
        if not writers["train"].counts.tokens:
            raise UserError("no part has documents to train on")
        manifest = manifest_of(
            writers, first.tokenizer_fingerprint, first.vocab_size, settings, counts, held_one_out=held_one_out
        )
        manifest.write(folder / "manifest.json")
    return manifest


def _in_order(parts: Sequence[Corpus]) -> list[Corpus]:
    """The parts by number; UserError unless each is there once and all are of the same corpus."""
    found: dict[int, Corpus] = {}
    for corpus in parts:
        number, of, _ = _shard(corpus)
        if number in found:
            raise UserError(f"{corpus.directory} and {found[number].directory} are both part {number} of {of}")
        found[number] = corpus
    first = parts[0]
    for corpus in parts:
        ours, theirs = _common(first), _common(corpus)
        if differing := [key for key in ours | theirs if ours.get(key) != theirs.get(key)]:
            raise UserError(f"{corpus.directory} and {first.directory} differ in {', '.join(differing)}")
    if missing := set(range(1, _shard(first)[1] + 1)) - found.keys():
        raise UserError(f"missing: part {', '.join(map(str, sorted(missing)))} of {_shard(first)[1]}")
    return [found[number] for number in sorted(found)]


def _shard(corpus: Corpus) -> tuple[int, int, str]:
    """(part number, number of parts, digest of all files)."""
    shard = corpus.manifest.settings.get("shard")
    if shard is None:
        raise UserError(
            f"{corpus.directory}: a whole corpus, not a part of one (`electra pretrain` mixes whole ones)"
        )
    number, of, digest = shard
    return int(number), int(of), str(digest)


def _common(corpus: Corpus) -> dict[str, Any]:
    """What all parts must have in common."""
    common = {key: value for key, value in corpus.manifest.settings.items() if key not in ("shard", "sources")}
    _, of, files = _shard(corpus)
    tokenizer = corpus.manifest.tokenizer_fingerprint
    return {**common, "tokenizer": tokenizer, "number of parts": of, "the files that were cut into parts": files}


def _copy(parts: Sequence[Corpus], split: str, folder: Path, shard_tokens: int, quiet: bool) -> ShardWriter:
    writer = ShardWriter(folder, split, token_dtype(parts[0].manifest.vocab_size), shard_tokens)
    total = sum(corpus.manifest.splits[split].tokens for corpus in parts)
    with progress(f"copying {split}", total, "token", quiet=quiet) as bar:
        for corpus in parts:
            for shard in Corpus(corpus.directory, split, corpus.manifest).shards:
                for block in shard.blocks():
                    writer.add(block)
                    bar.update(int(block.sentence_tokens.sum()))
    writer.close()
    return writer
