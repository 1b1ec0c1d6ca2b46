"""How fast `electra prepare` is, compared with the tokenizer library alone on the same text and cores.

    python benchmarks/bench_prepare.py [--text FILE...] [--tokenizer DIR] [--cores 1 2] [--repeats 3] [--json FILE]

"library" is encode_batch of `tokenizers` on sentences that are already in memory and split, with as many threads
as cores; nothing is read or kept. "prepare" is the whole command with as many workers as cores: reading,
splitting, encoding, hashing, writing. Each run is a fresh process, and the two take turns. Medians are compared in
wall-clock seconds and in seconds of processor time, which a busy machine disturbs less. Without --text the text is
the embedded corpus of docstrings; without --tokenizer a vocabulary of 8,192 is learned from the text.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tokenizers

from electra_core.corpora.docstrings import documents, write_corpus
from electra_core.corpora.sentences import split_document
from electra_core.corpora.sources import find_sources
from electra_core.corpora.text_files import read_documents
from electra_core.corpus import Corpus
from electra_core.prepare import prepare
from electra_core.tokenizer import load_tokenizer

BATCH = 10_000  # sentences passed to the library at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--cores", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--one", choices=["library", "prepare"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run = run_library if options.one == "library" else run_prepare
        print(json.dumps(run(options.text, options.tokenizer, options.cores[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        text = options.text or [_embedded_text(Path(folder))]
        tokenizer = options.tokenizer or _learn(text, Path(folder))
        result = compare(text, tokenizer, sorted(set(options.cores)), options.repeats)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def compare(text: list[Path], tokenizer: Path, cores: list[int], repeats: int) -> dict:
    """Medians of both, for every number of cores."""
    rows = []
    for count in cores:
        runs: dict[str, list[dict]] = {"library": [], "prepare": []}
        for _ in range(repeats):
            for name, results in runs.items():
                results.append(_in_new_process(name, text, tokenizer, count))
        rows.append({"cores": count, **_row(runs)})
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_before": os.getloadavg()[0],
        "tokenizers": tokenizers.__version__,
        "tokenizer": type(load_tokenizer(tokenizer)).__name__,
        "text_megabytes": round(sum(path.stat().st_size for path in text) / 1e6, 1),
        "rows": rows,
    }


def _row(runs: dict[str, list[dict]]) -> dict:
    """The comparison for one number of cores."""
    row: dict = {"tokens": runs["prepare"][0]["tokens"]}
    for clock in ("seconds", "cpu_seconds"):
        medians = {name: statistics.median(run[clock] for run in results) for name, results in runs.items()}
        for name, median in medians.items():
            row[f"{name}_{clock}"] = round(median, 2)
            row[f"{name}_tokens_per_{clock.removesuffix('s')}"] = round(row["tokens"] / median)
        row[f"prepare_over_library_by_{clock}"] = round(medians["library"] / medians["prepare"], 2)
    row["prepare_peak_memory_mb_of_a_process"] = max(run["peak_memory_mb"] for run in runs["prepare"])
    row["all"] = {name: [round(run["seconds"], 2) for run in results] for name, results in runs.items()}
    return row


def run_library(text: list[Path], tokenizer: Path, cores: int) -> dict:
    """The library alone; the threads are set by RAYON_NUM_THREADS."""
    engine = load_tokenizer(tokenizer).engine
    sentences = [s for document in read_documents(find_sources(text)) for s in split_document(document)]
    start, cpu_start = time.perf_counter(), _cpu_seconds()
    tokens = 0
    for begin in range(0, len(sentences), BATCH):
        encoded = engine.encode_batch(sentences[begin : begin + BATCH], add_special_tokens=False)
        tokens += sum(len(encoding.ids) for encoding in encoded)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": _cpu_seconds() - cpu_start,
        "tokens": tokens,
    }


def run_prepare(text: list[Path], tokenizer: Path, cores: int) -> dict:
    """The whole command, from files to files."""
    with tempfile.TemporaryDirectory() as folder:
        start, cpu_start = time.perf_counter(), _cpu_seconds()
        manifest = prepare(text, Path(folder) / "out", tokenizer=tokenizer, workers=cores, quiet=True)
        seconds, cpu_seconds = time.perf_counter() - start, _cpu_seconds() - cpu_start
        assert Corpus.open(Path(folder) / "out").num_tokens == manifest.splits["train"].tokens
    kilobytes = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    tokens = sum(counts.tokens for counts in manifest.splits.values())
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens": tokens,
        "peak_memory_mb": kilobytes // 1024,
    }


def _cpu_seconds() -> float:
    """Processor seconds of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def _in_new_process(name: str, text: list[Path], tokenizer: Path, cores: int) -> dict:
    command = [
        sys.executable,
        __file__,
        "--one",
        name,
        "--text",
        *text,
        "--tokenizer",
        tokenizer,
        "--cores",
        cores,
    ]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(cores), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def _embedded_text(folder: Path) -> Path:
    write_corpus(folder / "docstrings.txt", documents())
    return folder / "docstrings.txt"


def _learn(text: list[Path], folder: Path) -> Path:
    prepare(text, folder / "learnt", vocab_size=8192)
    return folder / "learnt" / "tokenizer"


if __name__ == "__main__":
    main()
