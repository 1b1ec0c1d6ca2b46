"""Compares two or more programs in one run: interleaved rounds, medians with their spread, and a JSON file that
says what was measured, against what, on which machine and by which command.

In every round each program runs once, in turn, and the program that starts changes from round to round. A
disturbance of the machine then affects all of them, and ratios are taken within a round. There are two clocks:
wall-clock time, and the processor seconds of the process over all threads, which other processes on the same cores
disturb far less.

This is for whole programs. A kernel takes microseconds on a GPU, and the host's clock would measure its launch, so
`kernel_timing.py` times kernels with device events and cold caches. What both need is here: medians with their
spread, and the description of the machine.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

BEGUN = "the process ended, or was stopped, in this case"
"""The problem in a row of a case that has no answer (`kernel_checks`)."""
TIME_UP = 4
"""Exit status of a program that has used up its own time; the same command continues."""
Rounds = dict[str, list[tuple[float, float]]]
"""Program -> (wall seconds, processor seconds) of each round."""


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, with the smallest and largest (from `deciles`: the 10th and 90th percentile)."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 2
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


@dataclass(frozen=True)
class Comparison:
    """One figure of ours compared with one peer's. Ratios above 1 mean that ours is faster."""

    figure: str
    unit: str
    peer: str
    ours: Spread
    theirs: Spread
    ratio: Spread
    """Ratio of the wall-clock rates, taken within each round."""
    ratio_by_processor_time: Spread
    rounds: int

    def __str__(self) -> str:
        return (
            f"{self.figure}: {self.ours} {self.unit}, {self.peer}: {self.theirs}; ratio {self.ratio}, "
            f"by processor time {self.ratio_by_processor_time}"
        )


def interleave(
    programs: Mapping[str, Callable[[], object] | OwnProcess], rounds: int, device: torch.device, warmup: int = 1,
    after_round: Callable[[Rounds], object] = lambda _: None,
) -> Rounds:  # fmt: skip
    """Run every program `rounds` times in turn, after `warmup` runs of each that do not count.

    Args:
        after_round: called with the rounds so far, for who may be stopped before the last.
    """
    for _ in range(warmup):
        for run in programs.values():
            _seconds(run, device)
    names = list(programs)
    seconds: Rounds = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_seconds(programs[name], device))
        after_round(seconds)
    return seconds


class OwnProcess:
    """A program in its own process, as users run it: with its own memory and its own settings.

    It works only while it is asked. It ends after its last answer, with `close`, or with its parent.

    Args:
        answers: a generator of the program's answers when called with `arguments`. Both are sent to the process,
            so `answers` has to be a function of a module.
    """

    def __init__(self, answers: Callable[..., Iterator[Any]], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, answers, arguments), daemon=True)
        self._process.start()
        there.close()

    def ask(self) -> Any:
        """Its next answer.

        Raises:
            EOFError: the process has ended.
        """
        try:
            self._pipe.send(True)
            return self._pipe.recv()
        except ConnectionError:
            raise EOFError from None

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, answers: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    answering = answers(*arguments)
    with contextlib.suppress(EOFError, StopIteration):
        while True:
            pipe.recv()
            pipe.send(next(answering))


def timed(make: Callable[..., Callable[[], object]], *arguments: Any) -> Iterator[tuple[float, float]]:
    """Answers for `OwnProcess`: (wall-clock, processor) seconds of each run of the program `make(*arguments)`."""
    run = make(*arguments)
    while True:
        yield _seconds(run, torch.device("cpu"))


def _seconds(run: Callable[[], object] | OwnProcess, device: torch.device) -> tuple[float, float]:
    if isinstance(run, OwnProcess):
        try:
            seconds: tuple[float, float] = run.ask()
            return seconds
        except EOFError:
            raise SystemExit("a program's process has ended; its output is above") from None
    wait_for(device)
    wall, processor = time.perf_counter(), time.process_time()
    run()
    wait_for(device)
    return time.perf_counter() - wall, time.process_time() - processor


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(figure: str, unit: str, work: float, seconds: Rounds, ours: str) -> list[Comparison]:
    """Rates (`work` units per round) of program `ours`, compared with each of the others."""
    rates = {name: [work / wall for wall, _ in rows] for name, rows in seconds.items()}
    comparisons = []
    for peer in seconds:
        if peer == ours:
            continue
        pairs = list(zip(seconds[ours], seconds[peer], strict=True))
        by_wall, by_processor = ([b[clock] / a[clock] for a, b in pairs] for clock in (0, 1))
        values = spread(rates[ours]), spread(rates[peer]), spread(by_wall), spread(by_processor)
        comparisons.append(Comparison(figure, unit, peer, *values, rounds=len(pairs)))
    return comparisons


def spread(values: list[float]) -> Spread:
    """Median, minimum and maximum, to four digits."""
    return Spread(*(float(f"{value:.4g}") for value in (median(values), min(values), max(values))))


def deciles(values: list[float]) -> Spread:
    """Median, 10th and 90th percentile: for many short repetitions, some of which are always disturbed."""
    low, *_, high = quantiles(values, n=10, method="inclusive") if len(values) > 1 else (values[0], values[0])
    return Spread(median(values), low, high)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, if it exists; a truncated last line is removed from the file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.split("\n") if line]


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a file of JSON lines that others may be writing to. The file is not changed."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # an empty or truncated line
            rows.append(json.loads(line))
    return rows


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a file of JSON lines in a single write, because other processes may append, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(row) + "\n").encode())


def use_device(device: torch.device) -> None:
    """Makes a GPU the current device, for events, synchronisation and statistics that name none, and keeps fp32
    products in fp32 whatever the environment says (NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE)."""
    torch.set_float32_matmul_precision("highest")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def require_cuda() -> None:
    """Raises an error if this process has used CUDA and cannot use it any more as before: an illegal access ends
    everything; a failed capture of a CUDA graph may leave a generator that refuses, and its own stream current."""
    if not torch.cuda.is_initialized():
        return
    torch.cuda.synchronize()
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        torch.rand(1, device="cuda")
    if torch.cuda.current_stream() != torch.cuda.default_stream():
        raise RuntimeError("a failed capture has left its stream as the current one")


ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Environment for processes of which there is one per core."""


def processes() -> int:
    """How many processes may share the GPU: one per core, if they mostly compile; one in exclusive mode."""
    words = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]
    try:
        mode = subprocess.run(words, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):  # there is no nvidia-smi
        mode = ""
    return 1 if "exclusive" in mode.lower() else min(16, os.cpu_count() or 1)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces a file of JSON lines."""
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


BEING_WRITTEN = ".new"
"""Suffix of a file that takes another's place when it is whole."""


def replace_text(path: Path, text: str) -> None:
    """Replaces a file's text, or makes the file and its folder; if interrupted, the old file stays whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + BEING_WRITTEN)
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def environment(device: torch.device) -> dict[str, Any]:
    """The machine, versions, commit and command of a measurement; stored with every figure."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        **(_extent(device) if device.type == "cuda" else _generation()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # "+cu130", which the package's metadata may leave out
            **versions("triton", "transformers"),
        },
        "cuda": torch.version.cuda,
        "commit": commit(),
        "command": shlex.join(["python", "-m", _module(), *map(_without_folders, sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _extent(device: torch.device) -> dict[str, int]:
    """How much of a GPU it is: of one that is divided (MIG) a program sees a slice."""
    found = torch.cuda.get_device_properties(device)
    return {"multiprocessors": found.multi_processor_count, "memory_megabytes": found.total_memory // 10**6}


CPUINFO = Path("/proc/cpuinfo")


def _cpuinfo() -> dict[str, str]:
    """What Linux says about the processor; empty on other systems."""
    lines = CPUINFO.read_text(encoding="utf-8").split("\n") if CPUINFO.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


EXTENSIONS = {
    "flags": ("avx2", "avx512f", "avx512_bf16", "amx_bf16"),
    "Features": ("asimddp", "sve", "sve2", "bf16", "i8mm", "svebf16"),  # on ARM
}


def processor_name() -> str:
    """The processor's name; on ARM, where Linux knows no names, its maker's number and its own (0x41/0xd40)."""
    facts = _cpuinfo()
    if "model name" in facts:
        return facts["model name"]
    if {"CPU implementer", "CPU part"} <= facts.keys():
        return f"{platform.machine()} {facts['CPU implementer']}/{facts['CPU part']}"
    return platform.machine() if facts else platform.processor() or platform.machine()


def _processor() -> str:
    """The processor's name, and the extensions that determine how fast it multiplies."""
    facts = _cpuinfo()
    if not facts:
        return processor_name()
    known = next((key for key in EXTENSIONS if key in facts), "flags")
    extensions = [name for name in EXTENSIONS[known] if name in facts.get(known, "").split()]
    return f"{processor_name()} ({', '.join(extensions)})"


def _generation() -> dict[str, str]:
    """Vendor, family and model, which distinguish generations with the same name and extensions (AMD's Zen 4 and
    Zen 5). They are not part of the device's name, by which resumed results recognise their machine."""
    facts = _cpuinfo()
    if not {"vendor_id", "cpu family", "model"} <= facts.keys():
        return {}
    return {"processor": f"{facts['vendor_id']} family {facts['cpu family']} model {facts['model']}"}


def versions(*packages: str) -> dict[str, str | None]:
    """Package -> its version; None for those that are not installed."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str | None:
    """The commit that is running, with "+changes" if tracked files of the program differ from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ":/electra_core", ":/kernels", ":/benchmarks")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _without_folders(argument: str) -> str:
    """An absolute path as it is within the project, or its last part; any other argument unchanged."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    root = Path(__file__).parent.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name


def write_report(
    path: Path, comparisons: list[Comparison], device: torch.device, **facts: object
) -> dict[str, Any]:
    """Writes the result file: what was compared, `facts` (sizes, checks), and the environment."""
    report = {
        "comparisons": [asdict(comparison) for comparison in comparisons],
        **facts,
        "environment": environment(device),
    }
    replace_text(path, json.dumps(report, indent=2) + "\n")
    return report
