"""How the time and memory for opening and preparing a corpus grow with its size.

    python -m benchmarks.bench_corpus open    [--gigabytes 0.1 1 10 100] [--folder DIR] [--json FILE]
                                              [--advice normal random ahead] [--written-tokens]
    python -m benchmarks.bench_corpus prepare --text FILE [--megabytes 10 50 200] [--workers 1 2] [--json FILE]

`open` makes a synthetic corpus of the size that so much text would give (250 M tokens, 280,000 documents and 10 M
sentences per GB). Offsets of sentences and documents are real numbers on disk; the token files are sparse, because
opening a corpus does not read them. After the files are dropped from the page cache, a fresh process opens the
corpus and makes its first batch, then more. 100 GB of text need 9 GB of disk in --folder. Two options measure what
reading costs: `--written-tokens` fills the token files, so that they, too, are read from the disk;
`--advice random` tells the system not to read around the requested pages (MADV_RANDOM), and `--advice ahead` also
tells it which tokens the next batches need (MADV_WILLNEED).

`prepare` runs all of `electra prepare`, including the vocabulary, on the first so many MB of a text, and on a
single line as long as the largest of these. Memory is the resident memory of all its processes together, sampled
every 50 ms; shared pages count once for each process.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import environment, replace_text
from electra_core.corpora.shards import PARTS, FileEntry, Manifest, SplitCounts, shard_name
from electra_core.corpus import Corpus
from electra_core.examples import Examples, Plan
from electra_core.files.byte_files import ByteFile
from electra_core.tokenizer import WordPieceTokenizer

SHARD_TOKENS = 1 << 28
TOKENS_PER_GB, SENTENCE_TOKENS, DOCUMENT_SENTENCES = 250_000_000, 25, 36
BATCH, BATCHES, LENGTH = 128, 50, 128
PLANNED = 8  # batches planned at a time, as in `pretraining/batches.py`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("open", "prepare", "one-open"))
    parser.add_argument("--gigabytes", nargs="+", type=float, default=[0.1, 1, 10, 100])
    parser.add_argument("--folder", type=Path, help="folder for the synthetic corpora")
    parser.add_argument("--advice", nargs="+", choices=("normal", "random", "ahead"), default=["normal"])
    parser.add_argument("--written-tokens", action="store_true")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--megabytes", nargs="+", type=int, default=[10, 50, 200])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.what == "one-open":
        print(json.dumps(run_open(options.folder, options.advice[0])))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = open_rows(options, Path(folder)) if options.what == "open" else prepare_rows(options, Path(folder))
    result = {"rows": rows, "environment": environment(torch.device("cpu"))}
    print(json.dumps(result, indent=2))
    if options.json:
        replace_text(options.json, json.dumps(result, indent=2) + "\n")


def open_rows(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row per size."""
    rows = []
    for gigabytes in options.gigabytes:
        corpus = folder / f"{gigabytes:g}"
        make_corpus(corpus, int(gigabytes * TOKENS_PER_GB), options.written_tokens)
        for advice in options.advice:
            drop_from_cache(corpus)
            row = _in_new_process("one-open", "--folder", corpus, "--advice", advice)
            rows.append(
                {"gigabytes": gigabytes, "advice": advice, "tokens_on_disk": options.written_tokens, **row}
            )
            print(json.dumps(rows[-1]), file=sys.stderr)
        for path in corpus.glob("train-*"):
            path.unlink()
    return rows


def make_corpus(folder: Path, tokens: int, written: bool = False) -> None:
    """Makes a corpus of about `tokens` tokens; its token files take no disk space unless `written`."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(30_000))]
    tokenizer = WordPieceTokenizer.from_tokens(words)
    tokenizer.save(folder / "tokenizer")
    draw = np.random.default_rng(0)
    shards, files = [], {}
    while tokens > 0:
        here = min(tokens, SHARD_TOKENS)
        sentences = np.cumsum(draw.integers(1, 2 * SENTENCE_TOKENS, here // SENTENCE_TOKENS))
        ends = np.cumsum(draw.geometric(1 / DOCUMENT_SENTENCES, len(sentences)))
        documents = np.append(ends[ends < len(sentences)], len(sentences))
        parts = {"sentences": sentences, "documents": documents, "starts": sentences[documents - 1]}
        for part in PARTS:
            path = folder / shard_name("train", len(shards), part)
            if part == "tokens":
                with open(path, "wb") as file:
                    if written:
                        draw.integers(5, 30_000, int(sentences[-1]), dtype="<u2").tofile(file)
                    file.truncate(2 * int(sentences[-1]))
            else:
                np.concatenate(([0], parts[part])).astype("<u8").tofile(path)
            files[path.name] = FileEntry(path.stat().st_size, "")
        shards.append(SplitCounts(int(sentences[-1]), len(sentences), len(documents)))
        tokens -= here
    train = SplitCounts(sum(s.tokens for s in shards), sum(s.sentences for s in shards),
                        sum(s.documents for s in shards), len(shards))  # fmt: skip
    splits = {"train": train, "heldout": SplitCounts()}
    Manifest(tokenizer.fingerprint(), tokenizer.vocab_size, splits, files, {}).write(folder / "manifest.json")


def drop_from_cache(folder: Path) -> None:
    """Drops the files from the page cache, so that the next reader reads from the disk."""
    for path in folder.glob("train-*"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_open(folder: Path, advice: str) -> dict[str, Any]:
    """Opens the corpus, takes a batch, and takes more; returns times and memory."""
    before, start = _memory(), time.perf_counter()
    corpus = Corpus.open(folder)
    if advice != "normal":
        for shard in corpus.shards:
            for part in PARTS:
                _mapping(getattr(shard, part)).madvise(mmap.MADV_RANDOM)
    opened = time.perf_counter()
    examples = Examples(corpus, LENGTH, 0)  # not `examples_of`, which sets its own advice for large corpora
    counted = time.perf_counter()
    _ = corpus.tokenizer
    loaded = time.perf_counter()
    examples.batch(examples.plan(range(BATCH)))
    first, tokens, faults, read = time.perf_counter(), 0, _major_faults(), _bytes_read()
    for batch in range(1, BATCHES, PLANNED):
        plan = examples.plan(range(batch * BATCH, min(batch + PLANNED, BATCHES) * BATCH))
        if advice == "ahead":
            _announce(corpus, plan)
        tokens += sum(examples.batch(plan[i : i + BATCH]).num_tokens for i in range(0, len(plan), BATCH))
    end = time.perf_counter()
    after = _memory()
    return {
        "tokens": corpus.num_tokens, "documents": corpus.num_documents, "sentences": corpus.num_sentences,
        "open_seconds": round(opened - start, 3), "slots_seconds": round(counted - opened, 3),
        "tokenizer_seconds": round(loaded - counted, 3), "first_batch_seconds": round(first - loaded, 3),
        "later_tokens_per_second": round(tokens / (end - first)),
        "later_major_faults": _major_faults() - faults, "later_read_mb": round((_bytes_read() - read) / 1e6, 1),
        "own_memory_mb": round(after["RssAnon"] - before["RssAnon"], 1),
        "mapped_file_memory_mb": round(after["RssFile"] - before["RssFile"], 1),
    }  # fmt: skip


def _memory() -> dict[str, float]:
    """RssAnon and RssFile of this process in MB; the system evicts pages of mapped files when memory is short."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().split("\n") if line.startswith("Rss"))
    return {name.rstrip(":"): int(kilobytes) / 1024 for name, kilobytes, _ in lines}


def _announce(corpus: Corpus, plan: Plan) -> None:
    """Tells the system to start reading the tokens of all examples of a plan."""
    ends = plan.begins_P + plan.lengths_P
    for shard, first, behind in zip(plan.shards_N, plan.ends_N[:-1], plan.ends_N[1:]):
        tokens = corpus.shards[shard].tokens
        begin = int(plan.begins_P[first]) * tokens.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
        length = int(ends[first:behind].max()) * tokens.itemsize - begin
        _mapping(tokens).madvise(mmap.MADV_WILLNEED, begin, length)


def _mapping(array: Any) -> mmap.mmap:
    """The memory map behind an array."""
    while not isinstance(array, mmap.mmap):
        array = array.base
    return array


def _major_faults() -> int:
    """Pages of this process that had to wait for the disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _bytes_read() -> int:
    """Bytes that the disk delivered for this process."""
    lines = (line.split() for line in Path("/proc/self/io").read_text().split("\n") if line)
    return int(dict(lines)["read_bytes:"])


def prepare_rows(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row per size and number of workers, and one for a single line as long as the largest."""
    rows = []
    for megabytes in [*options.megabytes, None]:
        path = folder / ("line.txt" if megabytes is None else f"{megabytes}.txt")
        with ByteFile(str(options.text), options.text) as source:
            content = source.read((megabytes or max(options.megabytes)) * 1_000_000).decode("utf-8", "ignore")
        path.write_text(
            content.replace("\n", " ") if megabytes is None else content, encoding="utf-8", newline="\n"
        )
        del content
        for workers in options.workers:
            row = {"text": "one line" if megabytes is None else "documents", "workers": workers}
            rows.append({**row, **run_prepare(path, workers)})
            print(json.dumps(rows[-1]), file=sys.stderr)
        path.unlink()
    return rows


def run_prepare(text: Path, workers: int) -> dict[str, Any]:
    """`electra prepare` with its own vocabulary, watched from outside."""
    out = text.with_suffix(".corpus")
    command = [sys.executable, "-m", "electra_core", "prepare", "--quiet", "--text", text, "--out", out]
    start, cpu = time.perf_counter(), sum(os.times()[2:4])
    process = subprocess.Popen([*map(str, command), "--workers", str(workers)], stdout=subprocess.DEVNULL)
    together = singly = 0.0
    while process.poll() is None:
        sizes = [_resident(number) for number in _with_children(str(process.pid))]
        together, singly = max(together, sum(sizes)), max(singly, *sizes)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"electra prepare ended with {process.returncode}")
    seconds, cpu = time.perf_counter() - start, sum(os.times()[2:4]) - cpu
    tokens = Corpus.open(out).num_tokens
    shutil.rmtree(out)
    return {
        "megabytes": round(text.stat().st_size / 1e6), "training_tokens": tokens, "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1), "peak_mb": round(together), "peak_mb_of_one_process": round(singly),
    }  # fmt: skip


def _with_children(process: str) -> list[str]:
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        children = " ".join((task / "children").read_text() for task in tasks).split()
    except OSError:  # it has ended in the meantime
        return [process]
    return [process, *(found for child in children for found in _with_children(child))]


def _resident(process: str) -> float:
    """Resident memory in MB."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
    except OSError:
        return 0.0


def _in_new_process(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench_corpus", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    main()
