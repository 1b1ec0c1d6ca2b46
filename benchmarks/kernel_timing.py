"""Timing shared by the kernel benchmarks: cold caches, medians, memory, and what it ran on.

Per contender: warm-up, then for every repetition a fresh copy out of a rotation of inputs larger than twice
the L2 cache, timed by device events; the median is reported, with the peak memory above the inputs. On a CPU
(tiny shapes, wall clock) the commands prove that they work; their figures say nothing about the kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

ROTATION_BYTES = 128 << 20  # more than twice the 50 to 60 MB L2 of a Hopper GPU
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Result:
    """One contender at one shape."""

    case: str
    contender: str
    milliseconds: float
    peak_megabytes: float | None
    """Above what the inputs take; None on a CPU."""
    gigabytes_per_second: float
    """Bytes the operation cannot avoid moving, over the time."""
    teraflops: float
    """Operations of the matrix products, over the time (0 where there are none)."""


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments all kernel benchmarks share."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--repetitions", type=int, default=None, help="timed runs (default: 100, on a CPU 3)")
    options.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                         help="include torch.compile contenders (default: on a GPU)")  # fmt: skip
    options.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return options


def settle(options: argparse.Namespace) -> argparse.Namespace:
    """Fills the defaults that depend on the device."""
    on_gpu = options.device != "cpu"
    options.repetitions = options.repetitions or (100 if on_gpu else 3)
    options.compile = on_gpu if options.compile is None else options.compile
    return options


def same(name: str, got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    """Fails unless two contenders computed the same, relative to each result's largest value."""
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        limit = tolerance * max(b.abs().max().item(), 1e-6)
        error = (a.double() - b.double()).abs().max().item()
        if not error <= limit:
            raise SystemExit(f"{name}: result {index} differs by {error:.3g} (allowed {limit:.3g})")


def _bytes(inputs: Inputs) -> int:
    return sum(value.numel() * value.element_size() for value in inputs if isinstance(value, Tensor))


def _copy(inputs: Inputs) -> Inputs:
    def one(value: Any) -> Any:
        return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    return tuple(one(value) for value in inputs)


def measure(function: Callable[..., Any], inputs: Inputs, repetitions: int) -> tuple[float, float | None]:
    """(median milliseconds, peak megabytes above the inputs)."""
    on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in inputs)
    copies = min(16, max(2, 1 + ROTATION_BYTES // max(1, _bytes(inputs)))) if on_gpu else 1
    rotation = [inputs, *(_copy(inputs) for _ in range(copies - 1))]
    for index in range(3 if on_gpu else 1):
        function(*rotation[index % copies])
    if not on_gpu:
        return statistics.median(_wall(function, inputs) for _ in range(repetitions)), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*rotation[0])
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    events = []
    for index in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function(*rotation[index % copies])
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events), peak


def _wall(function: Callable[..., Any], inputs: Inputs) -> float:
    start = time.perf_counter()
    function(*inputs)
    return (time.perf_counter() - start) * 1e3


def compare(
    case: str,
    contenders: dict[str, Callable[..., Any]],
    inputs: Inputs,
    repetitions: int,
    moved_bytes: float,
    operations: float = 0.0,
) -> list[Result]:
    """Measures every contender on the same inputs; one that runs out of memory is left out, aloud."""
    results = []
    for name, function in contenders.items():
        try:
            milliseconds, peak = measure(function, inputs, repetitions)
        except torch.OutOfMemoryError:
            print(f"{case}: {name} ran out of memory")
            continue
        rates = moved_bytes / milliseconds / 1e6, operations / milliseconds / 1e9
        results.append(Result(case, name, milliseconds, peak, *rates))
    return results


def with_gradients(function: Callable[..., Tensor], leaves: int) -> Callable[..., tuple[Tensor, ...]]:
    """`function` followed by the gradients of its first `leaves` arguments."""

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        value = function(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs[:leaves])

    return run


def environment(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    import platform

    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "device": device}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if device == "cpu":
        facts["note"] = "CPU, tiny shapes: shows that the command works, says nothing about the kernels"
        return facts
    facts["gpu"] = torch.cuda.get_device_name()
    query = "clocks.sm,clocks.mem,power.limit,driver_version"
    answer = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
                            capture_output=True, text=True, check=False)  # fmt: skip
    facts[query] = answer.stdout.strip()
    return facts


def report(results: list[Result], options: argparse.Namespace) -> None:
    """A table, or JSON with the environment; `ratio` is a contender's time over ours (the first of its case)."""
    facts = environment(options.device)
    if options.json:
        print(json.dumps({"environment": facts, "results": [asdict(result) for result in results]}, indent=1))
        return
    print("  ".join(f"{key}: {value}" for key, value in facts.items()))
    print(f"{'case':44} {'contender':30} {'ms':>9} {'ratio':>6} {'MB':>8} {'GB/s':>7} {'TFLOP/s':>8}")
    ours: dict[str, float] = {}
    for row in results:
        ratio = row.milliseconds / ours.setdefault(row.case, row.milliseconds)
        memory = "-" if row.peak_megabytes is None else f"{row.peak_megabytes:.0f}"
        print(f"{row.case:44} {row.contender:30} {row.milliseconds:9.3f} {ratio:6.2f} {memory:>8} "
              f"{row.gigabytes_per_second:7.0f} {row.teraflops:8.1f}")  # fmt: skip
