"""Honest timing of one call: device events, warm-up, a cold L2, the median of many; and what ran it."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch

FLUSH_BYTES = 256 * 1024**2  # several times the L2 of any GPU this is run on (H200: 60 MB, B200: 126 MB)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, and the most memory it held beyond what was there before."""

    median_ms: float
    low_ms: float
    """10th percentile."""
    high_ms: float
    """90th percentile."""
    repeats: int
    peak_bytes: int | None
    """None on a CPU."""


def measure(run: Callable[[], object], device: torch.device, repeats: int = 50, warmup: int = 10) -> Timing:
    """Times `run`; on a GPU each repetition starts with other data in the L2 and is timed by events."""
    for _ in range(warmup):
        run()
    times = _times_on_gpu(run, device, repeats) if device.type == "cuda" else _times_on_cpu(run, repeats)
    low, *_, high = quantiles(times, n=10) if repeats > 1 else (times[0], times[0])
    return Timing(median(times), low, high, repeats, _peak_bytes(run, device))


def _times_on_gpu(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def _times_on_cpu(run: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copy_bandwidth(device: torch.device, megabytes: int = 1024) -> float:
    """Bytes per second of a large copy on the device, counting what is read and what is written."""
    source = torch.empty(megabytes * 1024**2, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), device, repeats=20, warmup=3)
    return 2 * source.numel() / (timing.median_ms * 1e-3)


def machine(device: torch.device) -> dict[str, str | None]:
    """What the figures were measured on: to be kept beside every figure."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "clocks": _clocks() if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _clocks() -> str | None:
    query = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,driver_version"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
