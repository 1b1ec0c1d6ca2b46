"""Results of the kernel benchmarks: their type, the table, the JSON file, and the machine they come from."""

from __future__ import annotations

import argparse
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.catalogue import is_baseline, is_ours
from electra_core.errors import first_line

BUSY_SECONDS = 0.5
WRONG = "WRONG RESULT:"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, and its peak memory beyond its inputs."""

    milliseconds: float
    """Median."""
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""
    peak_megabytes: float | None
    """None on a CPU."""
    submit_milliseconds: float | None = None
    """Time that the host takes to submit one call; None on a CPU."""
    note: str = ""
    """What was timed, where it is not the calls themselves."""


@dataclass(frozen=True)
class Ceilings:
    """The highest rates measured on this GPU."""

    bytes_per_second: float
    """Of a large copy, counting bytes read and bytes written."""
    operations_per_second: float
    """Of a large bf16 matrix product of random numbers."""


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


class Mismatch(Exception):
    """A contender's result differs from the reference."""


def failed(case: str, contender: str, error: Exception) -> Result:
    """The result of a contender that computed something wrong or could not run."""
    note = f"{WRONG} {first_line(error)}" if isinstance(error, Mismatch) else f"cannot run: {in_a_line(error)}"
    return Result(case, contender, None, note=note)


REFUSED = (
    "OutOfResources", "CompilationError", "CompileTimeAssertionFailure", "UnsupportedLanguageConstruct",
    "PTXASError",
)  # fmt: skip
"""Triton's errors for tiles that do not fit or do not compile; trying again would not help."""


def in_a_line(error: Exception) -> str:
    """An error's type and first line."""
    return f"{type(error).__name__}: {first_line(error)}"


def refused(note: str) -> bool:
    """Whether a failure (as by `in_a_line`) is final. Others may be the machine's fault and are worth a retry."""
    return note.partition(":")[0] in REFUSED


def require_device(what: str, error: Exception) -> None:
    """Checks after an error of `what` that the GPU still works in this process (not after an illegal access, say).

    Raises:
        SystemExit: it does not, so everything that follows would fail, too.
    """
    try:
        harness.require_cuda()
    except Exception as lost:
        raise SystemExit(
            f"{what}: {in_a_line(error)}\nafter it, the GPU cannot be used any more in this process "
            f"({in_a_line(lost)}); what was measured before is kept"
        ) from error


def keep(result: Result, options: argparse.Namespace) -> Result:
    """Appends a result to the `.part` file of `--out`, so that results survive if the benchmark is stopped."""
    options.results.append(result)
    if options.out:
        _write(options.out.with_suffix(".part"), options.results, options)
    return result


def environment(device: str, clocks: dict[str, str]) -> dict[str, Any]:
    """The machine and versions that the figures were measured with."""
    facts = harness.environment(torch.device(device))
    if device == "cpu":
        return {**facts, "note": "CPU, tiny shapes: shows that the command works, says nothing about the kernels"}
    facts["versions"] |= {"cudnn": torch.backends.cudnn.version(), **harness.versions("liger-kernel")}
    return {**facts, "clocks_under_load": clocks}


CLOCKS = (
    "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "driver_version",
)  # fmt: skip


def clocks_under_load(device: str) -> dict[str, str]:
    """Clocks, power and temperature by nvidia-smi while matrix products run; idle clocks say nothing.

    A slice of a GPU (MIG) has an id of its own, which nvidia-smi does not know. If the machine has one GPU, the
    answer is that GPU's, and says so.
    """
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    with _busy(device):
        found, said = _clocks(f"--id=GPU-{uuid}")
        if not found:
            found, _ = _clocks()
            found |= {"of": "the only GPU of the machine, not by its id"} if found else {}
    return found or {"clocks.sm": said}


def _clocks(*which: str) -> tuple[dict[str, str], str]:
    """The `CLOCKS` of one GPU, empty if nvidia-smi names none or several; and what it said."""
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader", *which]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return {}, str(error)
    values = [value.strip() for value in printed.split(",")]
    return (dict(zip(CLOCKS, values)) if len(values) == len(CLOCKS) else {}), printed


@contextmanager
def _busy(device: str) -> Iterator[None]:
    """Inside, another thread keeps the GPU busy with matrix products, whenever nvidia-smi samples it."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    stop = threading.Event()

    def multiply() -> None:
        while not stop.is_set():
            for _ in range(50):
                torch.mm(a, a)
            torch.cuda.synchronize(device)

    thread = threading.Thread(target=multiply)
    thread.start()
    time.sleep(BUSY_SECONDS)  # until the clocks have risen
    try:
        yield
    finally:
        stop.set()
        thread.join()


def report(options: argparse.Namespace) -> list[Result]:
    """Prints a table of `options.results` and writes `--out`; `ratio` is a time over ours in that case.

    Raises:
        SystemExit: a contender's result differs from the reference, or ours has no time. Without a time of ours
            the results stay in the `.part` file, and the benchmark counts as not measured.
    """
    results: list[Result] = options.results
    facts = options.environment
    print(f"{facts['device']}  {facts.get('note', '')}")
    print(f"{'case':44} {'contender':30} {'ms':>9} {'ratio':>6} {'submit':>7} {'MB':>8} {'GB/s':>7} {'TFLOP/s':>8}"
          f"  of ceiling")  # fmt: skip
    ours = {row.case: row.timing.milliseconds for row in results if row.timing and is_baseline(row.contender)}
    for row in results:
        print(_line(row, row.timing, ours.get(row.case)) if row.timing else f"{_named(row)} {row.note}")
    missing = [row for row in results if row.timing is None and is_ours(row.contender)]
    if options.out and not missing:
        _write(options.out, results, options)
        options.out.with_suffix(".part").unlink(missing_ok=True)
    wrong = [row for row in results if row.note.startswith(WRONG) and row not in missing]
    if failures := [f"{row.case}, {row.contender}: {row.note}" for row in (*missing, *wrong)]:
        raise SystemExit("\n".join(failures))
    return results


def _named(row: Result) -> str:
    return f"{row.case:44} {row.contender:30}"


def _line(row: Result, timing: Timing, ours: float | None) -> str:
    ratio = _or_dash(ours and timing.milliseconds / ours, ".2f")
    submit, peak = _or_dash(timing.submit_milliseconds, ".3f"), _or_dash(timing.peak_megabytes, ".0f")
    return (
        f"{_named(row)} {timing.milliseconds:9.3f} {ratio:>6} {submit:>7} "
        f"{peak:>8} {row.gigabytes_per_second:7.0f} {row.teraflops:8.1f} {_or_dash(row.of_ceiling, '.1%'):>10} "
        f"{row.note}"
    )


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _write(path: Path, results: list[Result], options: argparse.Namespace) -> None:
    best = options.ceilings and asdict(options.ceilings)
    rows = [asdict(result) for result in results]
    text = json.dumps({"environment": options.environment, "ceilings": best, "results": rows}, indent=1)
    harness.replace_text(path, text + "\n")
