"""How fast examples and masks are made on the host, stage by stage, in one process and in several.

    python -m benchmarks.bench_input [--data DATA] [--batch 128] [--length 128] [--ways 1x1 2x1 1x2] [--rounds 5]
        [--seconds 2] [--out FILE]

The stages: **plan** where the tokens of examples are (`Examples.plan`, for several batches at a time, as
`pretraining/batches.py` does), **read** them, packed (`Examples.batch`), and **mask** them for the generator
(`mask_tokens`). A GPU waits for its input if their sum takes longer than its step. A way is PROCESSESxTHREADS. All
workers of a way run at once, each on its own batches, and their tokens are added up, once by wall-clock time and
once by what each worker would do on a core of its own (its thread's processor time). Threads share the
interpreter's lock, as a training loop does with the thread that makes its batches.

Without --data a corpus of random tokens is made in memory, with sentences and documents as long as English ones;
`bench_corpus.py` measures what a disk adds. Before anything is timed, plans are compared with the rules applied to
one example at a time (`pretraining/example_rules.py`), which is also the peer for the speed of planning.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Barrier, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Spread, environment, replace_text, spread
from electra_core.corpora.shards import Shard
from electra_core.corpus import Corpus
from electra_core.examples import Examples
from electra_core.masking import mask_tokens
from electra_core.pretraining.batches import PLANNED_AHEAD

STAGES = ("plan", "read", "mask")
CLS, SEP, MASK = 2, 3, 4
DOCUMENTS, DOCUMENT_SENTENCES, SENTENCE_TOKENS = 20_000, 36, 25
COMPARED = 200
"""Number of examples compared before timing."""


@dataclass(frozen=True)
class Load:
    """A worker's task: make batches of `batch` examples of up to `length` tokens for `seconds`."""

    data: Path | None
    batch: int
    length: int
    seconds: float

    def examples(self) -> Examples:
        """The examples of the corpus, newly opened."""
        corpus: Any = synthetic_corpus() if self.data is None else Corpus.open(self.data)
        return Examples(corpus, self.length, seed=0)


def synthetic_corpus() -> Any:
    """18 million random tokens in memory, with the sentence and document boundaries of a corpus."""
    draw = np.random.default_rng(0)
    sentences = draw.geometric(1 / DOCUMENT_SENTENCES, DOCUMENTS)
    tokens = np.minimum(draw.geometric(1 / SENTENCE_TOKENS, int(sentences.sum())), 128)
    borders, documents = (np.concatenate(([0], np.cumsum(counts))).astype("<u8") for counts in (tokens, sentences))
    words = draw.integers(5, 8192, int(borders[-1]), dtype="<u2")
    tokenizer = SimpleNamespace(cls_id=CLS, sep_id=SEP, mask_id=MASK)
    return SimpleNamespace(
        shards=(Shard(words, borders, documents, borders[documents.astype(int)]),), tokenizer=tokenizer
    )


def make_batches(examples: Examples, load: Load, first: int) -> tuple[int, dict[str, float]]:
    """Makes batches until time is up: the number of tokens, and stage -> processor seconds of the thread."""
    tokenizer, seconds, tokens = examples.corpus.tokenizer, dict.fromkeys(STAGES, 0.0), 0
    special = [tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]
    block, begin = max(1, PLANNED_AHEAD // load.batch) * load.batch, time.perf_counter()
    while time.perf_counter() - begin < load.seconds:
        clock = time.thread_time()
        plan = examples.plan(np.arange(first, first + block))
        seconds["plan"] += time.thread_time() - clock
        for place in range(0, block, load.batch):
            clock = time.thread_time()
            batch = examples.batch(plan[place : place + load.batch])
            packed = time.thread_time()
            mask_tokens(
                batch, range(first + place, first + place + load.batch), seed=0, mask_id=tokenizer.mask_id,
                special_ids=special, fraction=0.15, max_predictions=int(0.155 * load.length),
            )  # fmt: skip
            seconds["read"] += packed - clock
            seconds["mask"] += time.thread_time() - packed
            tokens += batch.num_tokens
        first += block
    return tokens, seconds


# ---- workers -----------------------------------------------------------------------------------------------


def work(load: Load, threads: int, number: int, barrier: Any, results: Any) -> None:
    """One process of a way: `threads` workers that start together with all others; puts (tokens/s, stages)."""
    torch.set_num_threads(1)
    examples, own = load.examples(), Barrier(threads + 1)
    made: list[tuple[float, dict[str, float]]] = []

    def worker(thread: int) -> None:
        first = (number * threads + thread) << 32
        make_batches(examples, Load(load.data, load.batch, load.length, 0.0), first)  # warms pages and caches
        own.wait()
        begin = time.perf_counter()
        tokens, seconds = make_batches(examples, load, first)
        rate = tokens / (time.perf_counter() - begin)
        made.append((rate, {stage: 1e9 * spent / tokens for stage, spent in seconds.items()}))

    workers = [Thread(target=worker, args=(thread,)) for thread in range(threads)]
    for thread in workers:
        thread.start()
    barrier.wait()
    own.wait()
    for thread in workers:
        thread.join()
    results.put(made)


def measure(load: Load, processes: int, threads: int, rounds: int) -> dict[str, Any]:
    """One way: tokens per second of all workers together, and a worker's nanoseconds per token in each stage."""
    context = multiprocessing.get_context("spawn")
    rates, undisturbed, stages = [], [], []
    for _ in range(rounds):
        barrier, results = context.Barrier(processes), context.Queue()
        started = [
            context.Process(target=work, args=(load, threads, number, barrier, results))
            for number in range(processes)
        ]
        for process in started:
            process.start()
        made = [worker for _ in started for worker in results.get()]
        for process in started:
            process.join()
        rates.append(sum(rate for rate, _ in made))
        undisturbed.append(sum(1e9 / sum(nanoseconds.values()) for _, nanoseconds in made))
        stages += [nanoseconds for _, nanoseconds in made]
    by_stage = {stage: asdict(spread([row[stage] for row in stages])) for stage in STAGES}
    return {
        "processes": processes, "threads": threads, "tokens_per_second": asdict(spread(rates)),
        "tokens_per_second_by_processor_time": asdict(spread(undisturbed)),
        "nanoseconds_per_token": by_stage,
    }  # fmt: skip


# ---- the same as the rules ---------------------------------------------------------------------------------


def check_same(examples: Examples) -> None:
    """Raises SystemExit if a plan differs from the rules, example by example."""
    places = np.linspace(0, 3 * len(examples.slots), COMPARED).astype(np.int64)
    if list(examples.plan(places)) != [examples.one(int(place)) for place in places]:
        raise SystemExit("plans differ from the rules; nothing was timed")


def one_at_a_time(examples: Examples, rounds: int) -> tuple[Spread, Spread]:
    """Nanoseconds per token for planning by the rules and for planning together, in turns."""

    def timed(run: Callable[[], Any]) -> float:
        begin = time.thread_time()
        run()
        return 1e9 * (time.thread_time() - begin) / tokens

    indices = np.arange(PLANNED_AHEAD)
    tokens = int(examples.plan(indices).lengths.sum())
    rows = [
        (timed(lambda: [examples.one(index) for index in indices.tolist()]), timed(lambda: examples.plan(indices)))
        for _ in range(rounds)
    ]
    return spread([row[0] for row in rows]), spread([row[1] for row in rows])


def main(argv: list[str] | None = None) -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="prepared corpus (default: random words in memory)")
    parser.add_argument("--batch", type=int, default=128, help="sequences per batch")
    parser.add_argument("--length", type=int, default=128, help="maximum tokens per sequence")
    parser.add_argument("--ways", nargs="+", default=["1x1", "2x1", "1x2"], metavar="PROCESSESxTHREADS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per round")
    parser.add_argument("--device", help="no effect: batches are made on the host")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    load = Load(options.data, options.batch, options.length, options.seconds)
    examples = load.examples()
    check_same(examples)
    alone, together = one_at_a_time(examples, options.rounds)
    print(f"plan, ns/token: {together}; by the rules, one example at a time: {alone}")
    rows = []
    for way in options.ways:
        rows.append(measure(load, *map(int, way.split("x")), options.rounds))
        rate, alone_rate = (Spread(**rows[-1][f"tokens_per_second{by}"]) for by in ("", "_by_processor_time"))
        stages = rows[-1]["nanoseconds_per_token"]
        shown = ", ".join(f"{stage} {values['median']:.0f}" for stage, values in stages.items())
        print(f"{way}: {rate} tokens/s, by processor time {alone_rate}; ns/token in a worker: {shown}", flush=True)
    if options.out:
        settings = {"batch": load.batch, "length": load.length, "planned": PLANNED_AHEAD, "rounds": options.rounds}
        settings["corpus"] = "random words in memory" if load.data is None else "prepared text"
        peers = {"together": asdict(together), "one_at_a_time": asdict(alone)}
        about = environment(torch.device("cpu"))
        report = {"ways": rows, "plan": peers, "settings": settings, "environment": about}
        replace_text(options.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
