"""Timing shared by the kernel benchmarks: cold caches, medians, memory, ceilings, and what it ran on.

Per contender: warm-up, then for every repetition the next of several copies of the inputs, together larger than
twice the L2 cache, timed by device events; the median and the 10th and 90th percentiles are reported, with peak
memory above the inputs. `of ceiling` is the time that the operation's unavoidable bytes and its matrix products
would take at the rates measured on the same GPU in the same run (a large copy; a large bf16 product of random
numbers), whichever is longer, over the measured time.

Not run on a GPU so far. On a CPU (tiny shapes, wall clock) the commands prove that they work; their figures say
nothing about the kernels.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness

ROTATION_BYTES = 256 << 20  # at least twice the L2 of any GPU this is run on (H200: 60 MB, B200: 126 MB)
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, and the most memory it held above its inputs."""

    milliseconds: float
    """Median."""
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""
    peak_megabytes: float | None
    """None on a CPU."""


@dataclass(frozen=True)
class Work:
    """What an operation cannot avoid: bytes read and written, and operations of its matrix products."""

    bytes: float
    operations: float = 0.0


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches at its best."""

    bytes_per_second: float
    """Of a large copy, counting what is read and what is written."""
    operations_per_second: float
    """Of a large bf16 matrix product, random numbers."""


@dataclass(frozen=True)
class Result:
    """One contender at one shape; `timing` is None if it could not run, and `note` says why."""

    case: str
    contender: str
    timing: Timing | None
    gigabytes_per_second: float | None = None
    teraflops: float | None = None
    of_ceiling: float | None = None
    note: str = ""


# ---------------------------------------------------------------- measuring


def measure(function: Callable[..., Any], inputs: Inputs, repetitions: int) -> Timing:
    """Times `function(*inputs)`; on a GPU with inputs that are in no cache."""
    if not any(isinstance(value, Tensor) and value.is_cuda for value in inputs):
        function(*inputs)
        return _timing([_wall(function, inputs) for _ in range(repetitions)], None)
    copies = min(16, max(2, 1 + ROTATION_BYTES // max(1, _bytes(inputs))))
    rotation = [inputs, *(_copy(inputs) for _ in range(copies - 1))]
    for index in range(10):
        function(*rotation[index % copies])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*rotation[0])
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for index, (start, end) in enumerate(events):
        start.record()
        function(*rotation[index % copies])
        end.record()
    torch.cuda.synchronize()
    return _timing([start.elapsed_time(end) for start, end in events], peak)


def _timing(times: list[float], peak: float | None) -> Timing:
    low, *_, high = quantiles(times, n=10) if len(times) > 1 else (times[0], times[0])
    return Timing(median(times), low, high, peak)


def _wall(function: Callable[..., Any], inputs: Inputs) -> float:
    start = time.perf_counter()
    function(*inputs)
    return (time.perf_counter() - start) * 1e3


def _bytes(inputs: Inputs) -> int:
    return sum(value.numel() * value.element_size() for value in inputs if isinstance(value, Tensor))


def _copy(inputs: Inputs) -> Inputs:
    def one(value: Any) -> Any:
        return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    return tuple(one(value) for value in inputs)


def ceilings(device: str) -> Ceilings | None:
    """Measured on the GPU; None on a CPU, where nothing here is worth comparing."""
    if device == "cpu":
        return None
    source = torch.empty(1 << 30, dtype=torch.int8, device=device).random_()
    copy = measure(lambda a, b: b.copy_(a), (source, torch.empty_like(source)), 20)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = measure(torch.mm, (a, b), 20)
    return Ceilings(2e3 * source.numel() / copy.milliseconds, 2e3 * 8192**3 / product.milliseconds)


def run(
    case: str,
    name: str,
    function: Callable[..., Any],
    inputs: Inputs,
    options: argparse.Namespace,
    work: Work,
    note: str = "",
) -> Result:
    """Measures one contender. One that runs out of memory or refuses the shape gets a result that says so."""
    try:
        timing = measure(function, inputs, options.repetitions)
    except (RuntimeError, NotImplementedError) as error:  # torch.OutOfMemoryError is a RuntimeError
        return Result(case, name, None, note=f"cannot run: {str(error).partition(chr(10))[0]}")
    seconds, best = timing.milliseconds * 1e-3, options.ceilings
    floor = best and max(work.bytes / best.bytes_per_second, work.operations / best.operations_per_second)
    share = None if floor is None else floor / seconds
    return Result(case, name, timing, work.bytes / seconds / 1e9, work.operations / seconds / 1e12, share, note)


def compare(
    case: str,
    contenders: dict[str, Callable[..., Any]],
    inputs: Inputs,
    options: argparse.Namespace,
    work: Work,
) -> list[Result]:
    """Measures every contender on the same inputs."""
    return [run(case, name, function, inputs, options, work) for name, function in contenders.items()]


def with_gradients(function: Callable[..., Tensor], leaves: int) -> Callable[..., tuple[Tensor, ...]]:
    """`function` followed by the gradients of its first `leaves` arguments.

    Where its value is no scalar, the gradient that comes in is the argument after the leaves.
    """

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        value = function(*inputs)
        incoming = inputs[leaves] if value.dim() else None
        return value.detach(), *torch.autograd.grad(value, inputs[:leaves], incoming)

    return run


def same(name: str, got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    """Fails unless two contenders computed the same, relative to each result's largest value."""
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        limit = tolerance * max(b.abs().max().item(), 1e-6)
        error = (a.double() - b.double()).abs().max().item()
        if not error <= limit:
            raise SystemExit(f"{name}: result {index} differs by {error:.3g} (allowed {limit:.3g})")


# ---------------------------------------------------------------- command line


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments all kernel benchmarks share."""
    options = argparse.ArgumentParser(description=description.partition("\n")[0])
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--repetitions", type=int, default=None, help="timed runs (default: 100, on a CPU 3)")
    options.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                         help="include torch.compile contenders (default: on a GPU)")  # fmt: skip
    options.add_argument("--out", type=Path, help="write the results here as JSON, with GPU, clocks and versions")
    return options


def settle(options: argparse.Namespace) -> argparse.Namespace:
    """Fills the defaults that depend on the device, and measures its ceilings."""
    on_gpu = options.device != "cpu"
    options.repetitions = options.repetitions or (100 if on_gpu else 3)
    options.compile = on_gpu if getattr(options, "compile", None) is None else options.compile
    options.ceilings = ceilings(options.device)
    return options


def environment(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    facts = harness.environment(torch.device(device))
    if device == "cpu":
        return {**facts, "note": "CPU, tiny shapes: shows that the command works, says nothing about the kernels"}
    query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,driver_version"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        facts[query] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError as error:
        facts[query] = str(error)
    return facts


def report(results: list[Result], options: argparse.Namespace) -> None:
    """Prints a table; `ratio` is a contender's time over ours (the first of its case). Writes `--out`."""
    facts = environment(options.device)
    print(f"{facts['device']}  {facts.get('note', '')}")
    print(f"{'case':44} {'contender':30} {'ms':>9} {'ratio':>6} {'MB':>8} {'GB/s':>7} {'TFLOP/s':>8}  of ceiling")
    ours: dict[str, float] = {}
    for row in results:
        if row.timing is None:
            print(f"{row.case:44} {row.contender:30} {row.note}")
            continue
        ratio = row.timing.milliseconds / ours.setdefault(row.case, row.timing.milliseconds)
        peak, share = row.timing.peak_megabytes, row.of_ceiling
        print(f"{row.case:44} {row.contender:30} {row.timing.milliseconds:9.3f} {ratio:6.2f} "
              f"{'-' if peak is None else f'{peak:.0f}':>8} {row.gigabytes_per_second:7.0f} {row.teraflops:8.1f} "
              f"{'-' if share is None else f'{share:.1%}':>10} {row.note}")  # fmt: skip
    if options.out:
        best = options.ceilings and asdict(options.ceilings)
        written = {"environment": facts, "ceilings": best, "results": [asdict(result) for result in results]}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
