"""Sends SIGKILL at random moments: a resumed run must end as if nothing had happened, bit for bit.

    python -m benchmarks.kill_test [--kills 50] [--seed 0] [--out FILE.json]

A story is `electra prepare`, then `electra pretrain --resume`, each started again after every kill until it is
done. A kill comes after a random time, after a random step, or at a random moment after a save (of a checkpoint
following a random step, of a model directory, of the corpus) was seen to begin. At the end of every story all that
is in its folders is compared with a story without kills: the same names (so no temporary files), and the same
bytes in the corpus, the checkpoints, the model directories and, except for what depends on the clock, the log.

The processes are forked from this one, so that kills do not hit the seconds in which Python imports torch and
scikit-learn, when nothing can be lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sklearn.metrics  # noqa: F401  (imported before forking, like `electra_core.pretrain` below)
import torch
from safetensors.torch import load_file

import electra_core.pretrain  # noqa: F401  (imported before forking, not in every process)
from benchmarks import tiny_run
from benchmarks.harness import environment, replace_text
from electra_core.runs.metrics_log import read_metrics

SAVES = {"prepare": ("data",), "pretrain": ("step", "step", "discriminator", "generator")}
MOST_SECONDS = 120  # for one process that is not killed


@dataclass
class Tally:
    """Counts of what happened so far."""

    kills: Counter[str] = field(default_factory=Counter)
    """Kills by what the process left unfinished: "nothing", or the name of what it was writing."""
    stories: int = 0
    resumes: int = 0
    at_step: list[int] = field(default_factory=list)
    """The newest step in the log at each kill of a pre-training run; 0 before the first."""
    after_seconds: list[float] = field(default_factory=list)
    """How long each killed process had been running."""


def main(arguments: list[str] | None = None) -> None:
    """Run stories until there are enough kills, then write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=40, help="steps per run")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the moments to kill at, as far as a clock allows"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.kills < 1:
        parser.error("--kills: expected at least 1")
    draw, tally = random.Random(options.seed), Tally()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        text = tiny_run.write_text(work / "text.txt")
        began = time.monotonic()
        tell(text, work / "whole", options.steps, draw, Tally(), kills=0)
        seconds = time.monotonic() - began
        while tally.kills.total() < options.kills:
            story = work / "story"
            tell(text, story, options.steps, draw, tally, options.kills, seconds)
            check_same(story, work / "whole")
            shutil.rmtree(story)
            tally.stories += 1
            record = report(options, tally, seconds)
            print(f"{tally.kills.total()} kills, {tally.stories} stories, all equal", file=sys.stderr)
    print(json.dumps({name: record[name] for name in list(record)[:4]}, indent=1))


def report(options: argparse.Namespace, tally: Tally, seconds: float) -> dict[str, Any]:
    """The report so far; written after every story."""
    record = {
        "kills": tally.kills.total(),
        "kills_by_what_was_unfinished": dict(tally.kills.most_common()),
        "processes_that_went_on": tally.resumes,
        "stories_equal_to_the_uninterrupted_one": tally.stories,
        "steps_of_a_story": options.steps,
        "log_at_step_when_killed": tally.at_step,
        "killed_after_seconds": tally.after_seconds,
        "seconds_of_the_uninterrupted_story": round(seconds, 1),
        "environment": environment(torch.device("cpu")),
    }
    if options.out:
        replace_text(options.out, json.dumps(record, indent=1) + "\n")
    return record


def tell(
    text: Path, folder: Path, steps: int, draw: random.Random, tally: Tally, kills: int, seconds: float = 0.0
) -> None:
    """Prepare and pre-train in `folder`, killed at random until `tally` counts `kills`."""
    folder.mkdir()
    data, run, log = folder / "data", folder / "run", folder.with_suffix(".log")
    often = ("--checkpoint-every", "2", "--eval-every", "4", "--log-every", "1", "--resume")
    for command, folders in (
        (tiny_run.prepare_command(text, data), [folder]),
        (tiny_run.pretrain_command(data, run, steps, *often), [run, run / "checkpoints"]),
    ):
        what = command[0]
        while not (what == "prepare" and data.exists()):
            pid, began = tiny_run.start(command, log), time.monotonic()
            if tally.kills.total() >= kills:
                code = tiny_run.wait(pid)
            else:
                code = kill(pid, what, folders, steps, draw, seconds)
            if code == 0:
                break
            if code != -signal.SIGKILL:
                sys.exit(f"a resumed process ended with {code}:\n{log.read_text(encoding='utf-8')}")
            tally.resumes += 1
            tally.after_seconds.append(round(time.monotonic() - began, 3))
            tally.kills[unfinished(folders) or "nothing"] += 1
            if what == "pretrain":
                tally.at_step.append(newest_row(run))


def kill(pid: int, what: str, folders: list[Path], steps: int, draw: random.Random, seconds: float) -> int:
    """Send SIGKILL at a random moment; returns how the process ended, perhaps before that."""
    way, run = draw.choice(("time", "step", "save", "save")), folders[0]
    step = draw.randint(1, steps)
    if way == "time" or (way == "step" and what == "prepare"):
        _wait_until(pid, lambda: False, draw.uniform(0, seconds))
    elif way == "step":
        _wait_until(pid, lambda: newest_row(run) >= step, MOST_SECONDS, pause=0.005)
        time.sleep(draw.uniform(0, 0.05))
    else:
        kind = draw.choice(SAVES[what])
        if kind == "step":
            _wait_until(pid, lambda: newest_row(run) >= step - 1, MOST_SECONDS, pause=0.005)
        _wait_until(pid, lambda: unfinished(folders) == kind, MOST_SECONDS)
        time.sleep(draw.choice((0, draw.uniform(0, 0.002), draw.uniform(0, 0.02))))
    os.kill(pid, signal.SIGKILL)
    return tiny_run.wait(pid)


def newest_row(run: Path) -> int:
    """The newest step in the log; 0 if there is none."""
    rows = read_metrics(run / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else 0


def unfinished(folders: list[Path]) -> str | None:
    """Name of the file or folder that is being written, or was being written when its writer was killed."""
    for folder in folders:
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        for name in names:
            if name.startswith(".") and name.endswith((".tmp", ".old", ".new", ".partial")):
                return re.sub(r"[-.\d]*(tmp|old|new|partial)$", "", name[1:])
    return None


def _wait_until(pid: int, ready: Any, seconds: float, pause: float = 0.0005) -> None:
    """Waits until `ready()` is true, the process has ended, or the seconds are over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not ready():
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(pause)


def check_same(story: Path, whole: Path) -> None:
    """Raises SystemExit with the first difference between two folders of a story."""
    ours, theirs = set(_files(story)), set(_files(whole))
    if different := ours ^ theirs:
        sys.exit(f"files differ: {sorted(map(str, different))}")
    for path in sorted(ours):
        one, two = story / path, whole / path
        if path.name == "metrics.jsonl":
            same = tiny_run.without_clock(one) == tiny_run.without_clock(two)
        elif path.name == "state.safetensors":
            same = _same_tensors(load_file(one), load_file(two))
        elif path == Path("run/state.json"):  # has a process id and a date
            same = _without_process(one) == _without_process(two)
        else:
            same = one.read_bytes() == two.read_bytes()
        if not same:
            sys.exit(f"{path} differs from the uninterrupted run's")


def _files(folder: Path) -> list[Path]:
    """All files except TensorBoard's, because every process writes its own."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in paths if "tensorboard" not in path.parts]


def _same_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _without_process(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key not in ("pid", "written")}


if __name__ == "__main__":
    main()
