"""Fine-tuning and inference compared with `transformers`, on texts as long as SST-2's and IMDb's.

    python -m benchmarks.bench_finetune [--model small] [--device cpu] [--threads 1] [--json FILE]

Ways to run the same ELECTRA, with random weights, on the same sequences of random tokens:

    ours              packed, no padding; batches of similar lengths as `finetune.py` makes them; on a GPU,
                      training replays one CUDA graph per step
    ours, eager       on a GPU: training without graphs
    hub, sorted       transformers, batches of similar lengths, each padded to its longest sequence: in training
                      like `group_by_length`, which sorts 50 batches at a time; for inference all are sorted
    hub, dynamic      transformers, batches in random order, each padded to its longest sequence
    hub, maximum      transformers, every sequence padded to the maximum (128, IMDb 512): the worked example

Lengths are drawn from log-normal distributions fitted to the data sets' training texts with BERT's vocabulary of
30,522 (SST-2: mean 13.3 tokens, median 10; IMDb: mean 275 after truncation at 512, which a fifth reach). Training
uses dropout 0.1, cross-entropy, gradient clipping and fused AdamW in all ways; inference uses none of these. Both
sides run in the same precision (bf16 autocast where the machine computes in it, unless `--precision` says
otherwise). On a GPU every way first makes an untimed pass over the examples, and graphs are captured in two: a
training of some epochs sees each shape hundreds of times.

Before anything is timed, both models must give the same logits for the same weights. Every measurement runs in its
own process (for peak memory), the ways take turns, and medians over the rounds are shown; until all are there,
FILE's suffix is .part. On a shared machine, trust the ratio of processor times. On a CPU ours makes C's allocator
keep freed memory, as `electra finetune` and `electra predict` do; `--keep-freed-memory all` does so for the
others, too.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.harness import environment, replace_text, use_device, wait_for
from benchmarks.kernel_report import in_a_line
from electra_core import model_dir
from electra_core.config import PRESETS
from electra_core.execution.engine import static_steps
from electra_core.execution.placement import autocast_context, keep_memory_between_batches, resolve_precision
from electra_core.finetuning.static_task import Part, TaskShapes
from electra_core.initialisation import initialise
from electra_core.labelled_data.features import Features, batch_order, sorted_batches
from electra_core.linear import round_weights
from electra_core.packing import from_padded
from electra_core.tasks import SequenceClassifier, classification_loss
from electra_core.training import Loop

OURS, OURS_EAGER = "ours", "ours, eager"
SORTED, DYNAMIC, MAXIMUM = "hub, sorted", "hub, dynamic", "hub, maximum"
WAYS = (OURS, SORTED, DYNAMIC, MAXIMUM)
PASSES = 3
"""Passes over the examples with graphs: shapes are first seen, then captured, and in the last pass timed."""
CLS, SEP = 101, 102


@dataclass(frozen=True)
class Workload:
    """Sequence lengths and batches like a data set's."""

    name: str
    log_mean: float
    log_deviation: float
    maximum: int
    train_batch: int
    """Examples per training step: the recipe's 32, the worked example's 8 for IMDb."""
    infer_batch: int


WORKLOADS = {
    "sst2": Workload("sst2", 2.073, 0.882, 128, 32, 128),
    "imdb": Workload("imdb", 5.519, 0.660, 512, 8, 32),
}


def is_ours(way: str) -> bool:
    return way in (OURS, OURS_EAGER)


def sequences(workload: Workload, count: int, vocab_size: int) -> list[np.ndarray]:
    """Random tokens between [CLS] and [SEP], with lengths distributed as in the data set."""
    random = np.random.default_rng(0)
    lengths = np.exp(random.normal(workload.log_mean, workload.log_deviation, count)).round().astype(int)
    lengths = np.clip(lengths, 1, workload.maximum - 2)
    words = (random.integers(200, vocab_size, size=length) for length in lengths)
    return [np.concatenate([[CLS], ids, [SEP]]) for ids in words]


def as_features(rows: list[np.ndarray]) -> Features:
    features = Features(CLS, SEP)
    for index, ids in enumerate(rows):
        features.add(index, ids[1:-1].tolist(), None, index % 2)
    return features


def padded(rows: list[np.ndarray], length: int) -> dict[str, torch.Tensor]:
    """The rows padded to `length`, as a tokenizer of `transformers` returns them."""
    ids = np.zeros((len(rows), length), dtype=np.int64)
    for row, words in zip(ids, rows):
        row[: len(words)] = words
    mask = torch.tensor([[1] * len(words) + [0] * (length - len(words)) for words in rows])
    return {"input_ids": torch.from_numpy(ids), "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}


def make_directory(name: str, folder: Path) -> None:
    """Writes a sequence classifier of the preset's size, with random weights, as a model directory."""
    config = replace(PRESETS[name].discriminator, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    model = SequenceClassifier(config, ("0", "1"))
    initialise(model, config.initializer_range, seed=0)
    model_dir.save_pretrained(model, folder)


def check_logits(folder: Path, device: str) -> float:
    """The largest difference between both models' logits on one padded batch, in fp32."""
    from transformers import ElectraForSequenceClassification

    ours = model_dir.load(SequenceClassifier, folder).to(device)
    theirs = ElectraForSequenceClassification.from_pretrained(folder).to(device).eval()
    rows = sequences(WORKLOADS["sst2"], 16, ours.config.vocab_size)
    batch = padded(rows, max(len(ids) for ids in rows))
    with torch.inference_mode():
        expected = theirs(**{name: value.to(device) for name, value in batch.items()}).logits
        got = ours(from_padded(batch["input_ids"], batch["attention_mask"]).to(device))
    difference = float((expected - got).abs().max())
    if not difference <= 1e-3 * float(expected.abs().max()) + 1e-4:
        raise SystemExit(f"the models differ: logits by up to {difference:.2g}; nothing was timed")
    return difference


def checked(folder: Path, device: str) -> float | None:
    """`check_logits`; None if the library cannot run, so that ours is measured alone.

    On a CPU it has to. A GPU may be there for minutes only, and without the library, or with another version.
    """
    try:
        return check_logits(folder, device)
    except Exception as error:
        if not on_gpu(device):
            raise
        print(f"transformers: left out, cannot run: {in_a_line(error)}", flush=True)
        return None


# ---- one measurement (in its own process) ----------------------------------------------------------------


def batches_of(way: str, workload: Workload, rows: list[np.ndarray], train: bool) -> Iterator[Any]:
    """Batches of one pass over the rows; making them is timed, as in real use."""
    size = workload.train_batch if train else workload.infer_batch
    if is_ours(way):
        features = as_features(rows)
        tokens = size * int(features.lengths.mean())
        plan = (
            batch_order(features.lengths, batch_size=size, seed=0, epoch=0)
            if train
            else sorted_batches(features.lengths, tokens)
        )
        yield from (features.batch(units) for units in plan)
        return
    if way == SORTED:
        pool = 50 * size if train else len(rows)
        rows = [
            ids
            for start in range(0, len(rows), pool)
            for ids in sorted(rows[start : start + pool], key=len, reverse=True)
        ]
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        length = workload.maximum if way == MAXIMUM else max(len(ids) for ids in part)
        yield padded(part, length) | {"labels": torch.arange(start, start + len(part)) % 2}


def stepper(way: str, folder: Path, train: bool, device: str, precision: str) -> Callable[[Any, int], None]:
    """A function that trains on, or predicts, one batch."""
    dtype = resolve_precision(precision, torch.device(device))
    if is_ours(way):
        model: Any = model_dir.load(SequenceClassifier, folder)
    else:
        from transformers import ElectraForSequenceClassification

        model = ElectraForSequenceClassification.from_pretrained(folder)
    model = model.to(device).train(train)
    if is_ours(way) and not train:
        round_weights(model, torch.device(device), dtype)  # as `electra predict` does
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)

    def loss_of(batch: Any, step: int) -> torch.Tensor:
        if is_ours(way):
            batch = batch.to(device)
            return classification_loss(model(batch.tokens, seed=step), batch.targets)
        return model(**{name: value.to(device) for name, value in batch.items()}).loss

    def step(batch: Any, number: int) -> None:
        with nullcontext() if train else torch.inference_mode(), autocast_context(torch.device(device), dtype):
            loss = loss_of(batch, number)
        if train:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        else:
            loss.item()

    return step


def ways_of(train: bool, device: str) -> tuple[str, ...]:
    """The ways that are compared, ours first."""
    return (OURS, OURS_EAGER, *WAYS[1:]) if train and on_gpu(device) else WAYS


def last_pass(
    folder: Path, workload: Workload, rows: list[np.ndarray], device: str, precision: str
) -> tuple[float, float]:
    """Wall-clock and processor seconds for the last of `PASSES` over the rows, in captured steps.

    On a CPU steps have the same fixed shapes but are not captured.
    """
    place = torch.device(device)
    model: Any = model_dir.load(SequenceClassifier, folder).to(place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    features = as_features(rows)
    plan = batch_order(features.lengths, batch_size=workload.train_batch, seed=0, epoch=0)
    largest = int(np.argmax([features.lengths[units].sum() for units in plan]))

    def parts(step: int) -> list[Part]:
        return [Part(features.batch(plan[step % len(plan)]), 1.0, 0)]

    def loss(part: Part, _: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = model(part.batch.tokens, seed=part.key)
        return classification_loss(logits[:-1], part.batch.targets) * part.share, {}

    positions = model.config.max_position_embeddings
    loop = Loop(
        model, optimizer, loss, schedule=lambda _: 5e-5, steps=PASSES * len(plan), seed=0, clip_norm=1.0,
        autocast=autocast_context(place, resolve_precision(precision, place)),
    )  # fmt: skip
    shapes = TaskShapes(per_token=False, positions=positions, largest=lambda: parts(largest))
    steps = static_steps(loop, parts, shapes=shapes, device=place, capture=place.type == "cuda")
    for _ in range((PASSES - 1) * len(plan)):
        next(steps)
    wait_for(place)
    started, processor = time.perf_counter(), time.process_time()
    taken = sum(1 for _ in steps)
    wait_for(place)
    assert taken == len(plan)
    return time.perf_counter() - started, time.process_time() - processor


def measure(way: str, workload: Workload, train: bool, args: argparse.Namespace) -> dict[str, float]:
    """Seconds for one pass over the examples (after a warm-up on some of them; on a GPU, on all), and peak
    memory."""
    if is_ours(way) or args.keep_freed_memory == "all":
        keep_memory_between_batches(torch.device(args.device))
    rows = sequences(
        workload,
        args.examples or default_examples(workload, train, args.device),
        PRESETS[args.model].discriminator.vocab_size,
    )
    if way == OURS and train and on_gpu(args.device):
        seconds, processor = last_pass(Path(args.folder), workload, rows, args.device, args.precision)
    else:
        seconds, processor = one_pass(way, workload, rows, train, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if on_gpu(args.device):
        peak = torch.cuda.max_memory_allocated() / 2**20
    tokens = sum(len(ids) for ids in rows)
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "examples_per_second": len(rows) / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_mib": peak,
    }


def one_pass(
    way: str, workload: Workload, rows: list[np.ndarray], train: bool, args: argparse.Namespace
) -> tuple[float, float]:
    """Wall-clock and processor seconds for one pass over the rows, step by step."""
    step = stepper(way, Path(args.folder), train, args.device, args.precision)
    # On a GPU a kernel's first launch in a new shape loads or compiles it, and the allocator grows.
    warm = rows if on_gpu(args.device) else rows[: (workload.train_batch if train else workload.infer_batch)]
    for number, batch in enumerate(batches_of(way, workload, warm, train)):
        step(batch, number)
    wait_for(torch.device(args.device))
    started, processor = time.perf_counter(), time.process_time()
    for number, batch in enumerate(batches_of(way, workload, rows, train)):
        step(batch, number)
    wait_for(torch.device(args.device))
    return time.perf_counter() - started, time.process_time() - processor


def on_gpu(device: str) -> bool:
    """Whether `device` is a GPU, with or without a number."""
    return torch.device(device).type == "cuda"


def default_examples(workload: Workload, train: bool, device: str) -> int:
    size = workload.train_batch if train else workload.infer_batch
    batches = {"cpu": {"sst2": 8, "imdb": 4}, "cuda": {"sst2": 200, "imdb": 100}}[torch.device(device).type][
        workload.name
    ]
    return size * (batches if train else max(4, batches // 2))


# ---- all measurements ------------------------------------------------------------------------------------


def run_child(folder: str, way: str, workload: str, mode: str, args: argparse.Namespace) -> dict[str, float]:
    """One measurement in a fresh process."""
    command = [
        sys.executable, "-m", "benchmarks.bench_finetune", "--child", json.dumps([way, workload, mode]),
        "--folder", folder, "--model", args.model, "--device", args.device,
        "--threads", str(args.threads), "--precision", args.precision,
        "--examples", str(args.examples), "--keep-freed-memory", args.keep_freed_memory,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{way}, {workload}, {mode} failed:\n{result.stderr[-2000:]}")
    sys.stderr.write(result.stderr)  # ours says there if it runs without kernels or graphs
    return json.loads(result.stdout.strip().split("\n")[-1])


def compare(
    folder: str, workload: str, mode: str, every: Sequence[str], args: argparse.Namespace,
    keep: Callable[[dict[str, Any]], object] = lambda _: None,
) -> None:  # fmt: skip
    """Measures all ways on one workload, in turns, and prints how they compare.

    Args:
        every: the ways, ours first.
        keep: called with `summary` after every measurement, should the machine go before the last of them.
    """
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in every}
    for _ in range(args.rounds):
        for way in every:
            rounds[way].append(run_child(folder, way, workload, mode, args))
            print(f"{workload}, {mode}: {way} {rounds[way][-1]['tokens_per_second']:.0f} tokens/s", flush=True)
            keep(summary(rounds))
    found = summary(rounds)
    print(f"\n{workload}, {mode}")
    for way, row in found["ways"].items():
        against = ""
        if way in found["speedups"]:
            clocks = found["speedups"][way], found["speedups_by_processor_time"][way]
            against = "   ours is {:.2f} x as fast ({:.2f} x by processor time)".format(*clocks)
        print(
            f"  {way:16} {row['examples_per_second']:9.1f} examples/s {row['tokens_per_second']:10.0f} tokens/s"
            f" {row['peak_mib']:8.0f} MiB{against}"
        )


def summary(rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds of each way that was measured, and our speed relative to theirs."""
    taken = {way: rows for way, rows in rounds.items() if rows}
    others = [way for way in taken if way != OURS]
    return {
        "ways": {
            way: {key: round(median(row[key] for row in rows), 3) for key in rows[0]}
            for way, rows in taken.items()
        },
        "speedups": {way: round(median(_ratios(taken, way, "seconds")), 2) for way in others},
        "speedups_by_processor_time": {
            way: round(median(_ratios(taken, way, "processor_seconds")), 2) for way in others
        },
        "speedups_of_rounds": {
            way: [round(ratio, 2) for ratio in _ratios(taken, way, "seconds")] for way in others
        },
    }


def _ratios(rounds: dict[str, list[dict[str, float]]], way: str, clock: str) -> list[float]:
    """How many times as fast ours was, round by round."""
    return [their[clock] / our[clock] for their, our in zip(rounds[way], rounds[OURS])]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="small", choices=sorted(PRESETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--modes", nargs="+", default=["train", "infer"], choices=["train", "infer"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--examples", type=int, default=0, help="examples per measurement; 0: enough for a few seconds"
    )
    parser.add_argument(
        "--keep-freed-memory", default="ours", choices=["ours", "all"], help="programs that keep freed memory"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    use_device(torch.device(args.device))
    if args.child:
        way, workload, mode = json.loads(args.child)
        print(json.dumps(measure(way, WORKLOADS[workload], mode == "train", args)))
        return
    place = torch.device(args.device)
    report: dict[str, Any] = {
        "environment": environment(place),
        "precision": str(resolve_precision(args.precision, place)),
        "threads": args.threads,
        "keep_freed_memory": args.keep_freed_memory,
        "model": args.model,
        "workloads": {name: asdict(WORKLOADS[name]) for name in args.workloads},
        "results": {},
    }

    def keep(path: Path, name: str, found: dict[str, Any]) -> None:
        report["results"][name] = found
        replace_text(path, json.dumps(report, indent=2) + "\n")

    part = args.json.with_suffix(".part") if args.json else None
    with tempfile.TemporaryDirectory() as folder:
        make_directory(args.model, Path(folder))
        report["largest_logit_difference"] = difference = checked(Path(folder), args.device)
        agree = "" if difference is None else f", logits agree to {difference:.1g}"
        print(f"electra-{args.model} on {args.device}{agree}")
        for workload, mode in product(args.workloads, args.modes):
            every = ways_of(mode == "train", args.device)
            if difference is None:
                every = tuple(way for way in every if is_ours(way))
            kept = partial(keep, part, f"{workload} {mode}") if part else lambda _: None
            compare(folder, workload, mode, every, args, kept)
    if part:
        part.replace(args.json)


if __name__ == "__main__":
    main()
