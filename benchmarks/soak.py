"""A long run, in which memory, open files and the time per step must not grow.

    python -m benchmarks.soak [--minutes 30] [--out FILE.json]

The smallest model is pre-trained by the ordinary command until its `--max-minutes` are over. It logs every 50
steps, writes a checkpoint every 100 and evaluates every 200, far more often than any real run. Meanwhile this
process samples it from outside: resident memory, open files and threads (/proc), steps (the log), and processor
time, which other programs on the machine disturb less than wall-clock time.

Packed batches differ in length, and oneDNN, PyTorch's library for processors, caches the code for the last 1,024
shapes: memory grows until the cache holds all shapes, or 1,024. Setting ONEDNN_PRIMITIVE_CACHE_CAPACITY=0 in the
environment disables the cache, which distinguishes this growth from a leak.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch

import electra_core.pretrain  # noqa: F401  (imported before forking)
from benchmarks import tiny_run
from benchmarks.harness import environment, replace_text
from electra_core.runs.metrics_log import read_metrics

STEPS = 10_000_000  # more than the time allows
OFTEN = ("--checkpoint-every", "100", "--eval-every", "200", "--log-every", "50")
MEMORY = {"memory_mb": "VmRSS", "own_memory_mb": "RssAnon", "mapped_files_mb": "RssFile"}
WARM_UP = 0.1  # fraction of the time left out of the figures, while caches fill and the best checkpoint is found


def main(arguments: list[str] | None = None) -> None:
    """Run, sample, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--samples", type=int, default=120)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        samples, code = soak(Path(temporary), options.minutes, options.samples)
    record = {
        **summary(samples),
        "minutes": options.minutes,
        "exit_status": code,
        "onednn_primitive_cache": os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "default"),
        "samples": samples,
        "environment": environment(torch.device("cpu")),
    }
    if options.out:
        replace_text(options.out, json.dumps(record) + "\n")
    print(json.dumps({name: value for name, value in record.items() if name not in ("samples", "environment")}))


def soak(work: Path, minutes: float, count: int) -> tuple[list[dict[str, float]], int]:
    """Runs and samples: the samples, and the run's exit status (75: stopped by its time limit)."""
    data, run, log = work / "data", work / "run", work / "log"
    text = tiny_run.write_text(work / "text.txt")
    if tiny_run.wait(tiny_run.start(tiny_run.prepare_command(text, data), log)):
        raise SystemExit(log.read_text(encoding="utf-8"))
    command = tiny_run.pretrain_command(data, run, STEPS, *OFTEN, "--max-minutes", str(minutes))
    pid, began, samples = tiny_run.start(command, log), time.monotonic(), []
    for index in range(1, count + 1):
        time.sleep(max(0.0, began + 60 * minutes * index / (count + 1) - time.monotonic()))
        if sampled := sample(pid, run):
            samples.append({"seconds": round(time.monotonic() - began, 1), **sampled})
    return samples, tiny_run.wait(pid)


def sample(pid: int, run: Path) -> dict[str, float]:
    """What /proc and the log say about the process now; empty if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").split("\n")
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return {}
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    if "VmRSS" not in facts:
        return {}
    rows = read_metrics(run / "metrics.jsonl")
    return {
        **{name: round(int(facts[key].split()[0]) * 1024 / 1e6, 2) for name, key in MEMORY.items()},
        "open_files": files,
        "threads": int(facts["Threads"]),
        "processor_seconds": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        "step": rows[-1]["step"] if rows else 0,
    }


def summary(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Growth after the warm-up, and the first third of that time compared with the last."""
    kept = [row for row in samples if row["seconds"] >= WARM_UP * samples[-1]["seconds"]]
    third = len(kept) // 3
    hours = [row["seconds"] / 3600 for row in kept]
    late = kept[len(kept) // 2 :]

    def milliseconds_a_step(rows: list[dict[str, float]]) -> float:
        seconds = rows[-1]["processor_seconds"] - rows[0]["processor_seconds"]
        return round(1000 * seconds / max(1, rows[-1]["step"] - rows[0]["step"]), 3)

    return {
        "steps": samples[-1]["step"],
        "memory_mb": {
            "first_third": median(row["memory_mb"] for row in kept[:third]),
            "last_third": median(row["memory_mb"] for row in kept[-third:]),
            "growth_per_hour": round(linear_regression(hours, [row["memory_mb"] for row in kept]).slope, 2),
            "growth_per_1000_steps_of_the_last_half": round(
                1000 * linear_regression([row["step"] for row in late], [row["memory_mb"] for row in late]).slope,
                3,
            ),
        },
        "open_files": {
            "least": min(row["open_files"] for row in kept),
            "most": max(row["open_files"] for row in kept),
        },
        "threads": {"least": min(row["threads"] for row in kept), "most": max(row["threads"] for row in kept)},
        "processor_milliseconds_a_step": {
            "first_third": milliseconds_a_step(kept[:third]),
            "last_third": milliseconds_a_step(kept[-third:]),
        },
    }


if __name__ == "__main__":
    main()
