"""Which kernels are right on this GPU, which are wrong, and which do not compile: a row for each, in a minute.

    python -m benchmarks.kernel_checks --out FILE.jsonl [--only TEXT...] [--jobs 16] [--seconds 120]

It checks every operation in the shapes of real runs, forward and backward, in three precisions, and whole models,
as `electra_core.execution.cross_check` compares them: exact (the twin in fp32), rounded (the twin in the
precision) and found (the kernel). Each operation has its own process, so that a kernel that does not compile, or
that leaves the GPU unusable, does not hide the others. If a process dies or hangs, its row says so, a new process
takes the remaining cases, and that case once more after them. The same command continues with the cases that have
no answer yet.

A row: `kernel`, `dtype`, `problem` (None if it is right), `error` (the full text, including the compiler's),
`seconds` (of the first call, which compiles).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from electra_kernels import dispatch, use
from electra_kernels.triton_support import DISTRUSTED, in_words

from benchmarks.harness import BEGUN, ONE_THREAD, TIME_UP, add_row, processes, use_device, wait_for, whole_rows
from benchmarks.kernel_check_cases import Computation, Working, operations
from benchmarks.kernel_report import require_device
from electra_core.config import PRESETS
from electra_core.execution import cross_check
from electra_core.objectives import build_objective
from electra_core.tasks import SequenceClassifier

Row = dict[str, Any]
ERROR_CHARACTERS = 4000
TRIES = 2
"""Processes that may end, or be stopped, in the same case."""


def check(name: str, dtype: torch.dtype, device: torch.device) -> Row:
    """The row of one operation in one precision."""
    working, error, started = Working(dtype), "", time.perf_counter()
    first: float | None = None
    try:
        computation = Computation(operations(device)[name](), working, device)
        with use("triton"):
            with working:
                computation.figures()  # compiles; an error's full text is kept
            wait_for(device)
            first = time.perf_counter() - started
            problem = computation.problem()
    except Exception as raised:
        problem, error = in_words(raised), _text(raised)
        require_or_lose(name, raised, problem)
    return _row(name, dtype, problem, error, first)


MODELS = ("pre-training, fixed shapes", "pre-training", "classifier, training", "classifier, prediction")


def check_model(name: str, dtype: torch.dtype, device: torch.device) -> Row:
    """The row of a whole model, checked as a run does before its first step."""
    error, started = "", time.perf_counter()
    problem: str | None = None
    try:
        preset = PRESETS["small" if device.type == "cuda" else "tiny"]
        DISTRUSTED.clear()
        dispatch._answers.clear()
        if (unused := dispatch.gpu_problem(device, dtype)) is not None:
            return _row(name, dtype, f"the kernels are not used: {unused}", "", None)
        if name.startswith("pre-training"):
            model: Any = build_objective(preset.discriminator, preset.pretrain).to(device).train()
            right = cross_check.check_pretraining(model, device, dtype, 128, static="fixed" in name)
        else:
            model = SequenceClassifier(preset.discriminator, ("0", "1")).to(device)
            right = cross_check.check_task_model(model, device, dtype, 512, training="training" in name)
        problem = None if right else next(iter(DISTRUSTED.values()), "wrong")
    except Exception as raised:
        problem, error = in_words(raised), _text(raised)
        require_or_lose(name, raised, problem)
    return _row(name, dtype, problem, error, time.perf_counter() - started)


class Lost(Exception):
    """The GPU can no longer be used in this process."""

    def __init__(self, problem: str, error: str):
        super().__init__(problem)
        self.problem, self.error = problem, error


def require_or_lose(name: str, raised: Exception, problem: str) -> None:
    """Raises `Lost` if after this error the GPU can no longer be used in this process."""
    try:
        require_device(name, raised)
    except SystemExit as lost:
        raise Lost(f"{problem}; after it the GPU computes nothing more", f"{_text(raised)}\n{lost}") from raised


def _row(name: str, dtype: torch.dtype, problem: str | None, error: str, seconds: float | None) -> Row:
    took = None if seconds is None else round(seconds, 2)
    return {"kernel": name, "dtype": _short(dtype), "problem": problem, "error": error, "seconds": took}


def _text(error: Exception) -> str:
    return "".join(traceback.format_exception(error))[-ERROR_CHARACTERS:]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- in processes


def cases(device: torch.device) -> dict[str, list[tuple[str, str]]]:
    """Process -> its (name, dtype), in order."""
    # bf16, which runs use, comes first; bf16 products are wrong in Triton's interpreter.
    dtypes = ("bfloat16", "float32", "float16") if device.type == "cuda" else ("float32", "float16")
    found = {name: [(name, dtype) for dtype in dtypes] for name in operations(device)}
    models = MODELS if device.type == "cuda" else ()
    return {**{name: [(name, dtype) for dtype in dtypes[:2]] for name in models}, **found}


def known(path: Path) -> dict[tuple[str, str], Row]:
    """The last row of each case."""
    return {(row["kernel"], row["dtype"]): row for row in whole_rows(path)}


def answered(path: Path) -> set[tuple[str, str]]:
    """The cases that are not tried again: they have a result, or `TRIES` processes ended in them."""
    rows = whole_rows(path)
    begun = Counter((row["kernel"], row["dtype"]) for row in rows if row["problem"] == BEGUN)
    return {case for case, row in known(path).items() if row["problem"] != BEGUN or begun[case] >= TRIES}


def in_this_process(name: str, out: Path, device: torch.device) -> int:
    """Writes the rows that are missing; 1 if the GPU was lost and another process has to continue."""
    use_device(device)
    begun = known(out)
    for case in sorted(cases(device)[name], key=lambda case: case in begun):  # where a process ended comes last
        if case in answered(out):
            continue
        add_row(out, {"kernel": case[0], "dtype": case[1], "problem": BEGUN, "error": "", "seconds": None})
        dtype = getattr(torch, case[1])
        try:
            row = (check_model if name in MODELS else check)(name, dtype, device)
        except Lost as lost:
            add_row(out, _row(name, dtype, lost.problem, lost.error, None))
            return 1
        add_row(out, row)
    return 0


def in_processes(names: Sequence[str], out: Path, device: torch.device, jobs: int, seconds: float) -> None:
    """Runs every name in its own process, `jobs` at a time; if one dies, another continues with the next case."""
    end = time.monotonic() + seconds

    def run(name: str) -> None:
        command = [sys.executable, "-m", "benchmarks.kernel_checks", "--here", name, "--out", str(out)]
        for _ in range(TRIES * len(cases(device)[name])):
            left = end - time.monotonic()
            if left <= 0:
                return
            with _quietly():
                if subprocess.run(command, timeout=left, env=os.environ | ONE_THREAD).returncode == 0:
                    return

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, names))


@contextmanager
def _quietly() -> Iterator[None]:
    try:
        yield
    except subprocess.TimeoutExpired:
        pass


def show(rows: Sequence[Row], of: int) -> str:
    """How many of the cases are right, and a line for each that has a row and is not."""
    wrong = [row for row in rows if row["problem"] is not None]
    lines = [f"{row['kernel']}, {row['dtype']}: {row['problem']}" for row in wrong]
    return "\n".join([f"{len(rows) - len(wrong)} of {of} kernels and models are right", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the cases without an answer; `TIME_UP` if some remain, else 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--only", nargs="+", default=[""], help="those whose name holds one of these texts")
    parser.add_argument("--jobs", type=int, default=0, help="processes at a time (default: as many as may be)")
    parser.add_argument("--seconds", type=float, default=120.0, help="after which all are ended")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.here:
        return in_this_process(options.here, options.out, device)
    if device.type == "cpu" and not dispatch.interpreting():
        parser.error("no CUDA device; TRITON_INTERPRET=1 runs tiny shapes, which checks this program")
    every = cases(device)
    names = [name for name in every if any(text in name for text in options.only)]
    wanted = {case for name in names for case in every[name]}
    left = [name for name in names if not answered(options.out).issuperset(every[name])]
    in_processes(left, options.out, device, options.jobs or processes(), options.seconds)
    rows = [row for case, row in known(options.out).items() if case in wanted]
    print(show(rows, len(wanted)))
    if waiting := wanted - answered(options.out):
        print(f"{len(waiting)} have no answer yet; to continue, repeat the command")
        return TIME_UP
    return int(any(row["problem"] is not None for row in rows))


if __name__ == "__main__":
    sys.exit(main())
