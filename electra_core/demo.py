"""The whole pipeline in minutes: `electra demo`.

    1  read the docstrings on this machine, and make a labelled task from them
    2  train a vocabulary, write token shards
    3  pre-train a tiny ELECTRA from scratch
    4  fine-tune the model that ships with the package, the one just pre-trained, and a random start
    5  compare them, in the terminal and in report.html

Everything has a time budget: pre-training takes its share of the minutes, and fine-tuning continues, one seed of
every start at a time, until the minutes are over. The results are reported whatever they are.

    OUT/corpus.txt, OUT/task/    the text and the labelled examples
    OUT/data/                    token shards and tokenizer
    OUT/pretrained/              the pre-training run
    OUT/finetuned/*/             the last fine-tuned model from every start
    OUT/report.html, OUT/report.json
"""

from __future__ import annotations

import io
import json
import math
import os
import platform
import shutil
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path

import torch

from electra_core.corpora.docstrings import Document, LabelledTask, documents
from electra_core.corpora.sample import write_sample
from electra_core.corpora.shards import Manifest
from electra_core.downstream.classify import Classify
from electra_core.errors import UserError, option
from electra_core.execution.placement import resolve_device
from electra_core.files.clutter import entries
from electra_core.finetune import finetune
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.model_dir import shipped_model
from electra_core.prepare import prepare
from electra_core.pretrain import PretrainResult, pretrain
from electra_core.reports.demo_page import Report, to_terminal, write_report
from electra_core.reports.demo_report import Findings, build_report, to_json
from electra_core.reports.plots import duration
from electra_core.runs.metrics_log import read_metrics
from electra_core.runs.notices import Say
from electra_core.runs.progress import progress

CPU_MINUTES, GPU_MINUTES = 8.0, 2.0
PRETRAIN_SHARE = 0.4  # of the minutes
MOST_SEEDS = 5
PATIENCE = 1.25  # times its seconds, after which pre-training is stopped if the machine has slowed down
OVERDRAFT = 0.25  # of the minutes: may be exceeded for a second seed, without which there is no spread
VOCABULARY = 8192
HELDOUT_FRACTION = 0.02
CALIBRATION_STEPS = {"cpu": 24, "cuda": 400}
"""On a GPU most of the first hundred run eagerly or are captured; later ones are replayed, much faster."""
SLOW = 2.0
"""Steps per second; two quiet cores took 9.6 (machine C of docs/results.md, 30 November)."""
EPOCHS = 10
WRITTEN = {"task", "corpus.txt", "data", "calibration", "pretrained", "finetuned", "report.html", "report.json"}
"""Everything that a demo writes in its folder, beginning with `task`."""


@dataclass(frozen=True)
class Start:
    """What a fine-tuning starts from."""

    key: str
    name: str
    directory: Path
    """A model directory."""
    random: bool = False
    """Whether only the directory's sizes and tokenizer are used."""


@dataclass
class Clock:
    """Measures the stages of the demo against its budget."""

    budget: float
    """Seconds in all."""
    stages: list[tuple[str, float]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block."""
        begin = time.monotonic()
        yield
        self.stages.append((name, time.monotonic() - begin))

    @property
    def left(self) -> float:
        """Seconds left of the budget; negative when it is exceeded."""
        return self.budget - (time.monotonic() - self.started)


def run_demo(
    out_dir: str | Path,
    *,
    minutes: float | None = None,
    quiet: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    seed: int = 0,
    say: Say = print,
) -> Report:
    """Runs the demo and writes its report; see the header.

    Args:
        out_dir: must be new or empty, unless `overwrite`.
        minutes: of wall-clock time in all; None: 8 on a CPU, 2 on a GPU. One seed of every start is fine-tuned
            even if that takes longer.
        quiet: no progress bars.
        say: receives lines for the user.

    Raises:
        UserError: the folder is not empty, there is no CUDA device though `device` names one, ...
    """
    place = resolve_device(device)
    if minutes is None:
        minutes = GPU_MINUTES if place.type == "cuda" else CPU_MINUTES
    if not 0.1 <= minutes < math.inf:
        raise UserError(f"{option('minutes')}: expected a number of at least 0.1, got {minutes:g}")
    if not 0 <= seed < 1 << 64:
        raise UserError(f"{option('seed')}: expected a number from 0 to below 2^64, got {seed}")
    out, clock = Path(out_dir), Clock(60 * minutes)
    for line in introduction(place, minutes):
        say(line)
    _make_folder(out, overwrite)

    say(f"\n1  Docstrings -> {out / 'corpus.txt'}, {out / 'task'}")
    with clock.stage("reading docstrings"):
        corpus, task = _read_docstrings(out, quiet)
    say(f"   {len(corpus):,} documents; {len(task.train)} + {len(task.dev)} labelled, {len(task.labels)} areas")

    say(f"\n2  Vocabulary and token shards -> {out / 'data'}")
    with clock.stage("vocabulary and shards"):
        manifest = _prepare(out, seed, quiet)

    seconds = PRETRAIN_SHARE * clock.budget
    say(f"\n3  Pre-training for {duration(seconds)} -> {out / 'pretrained'}")
    with clock.stage("pre-training"):
        pretrained = _pretrain(out, seconds, device, seed, quiet, say)
    _stop_if(pretrained.stopped_by)

    starts = [
        Start("shipped", "Shipped tiny model", shipped_model() / "discriminator"),
        Start("pretrained", "Pre-trained just now", out / "pretrained" / "discriminator"),
        Start("random", "Random start", out / "pretrained" / "discriminator", random=True),
    ]
    left = f"for {duration(clock.left)}" if clock.left > 0 else "although the time is up"
    say(f"\n4  Fine-tuning, seed by seed, {left} -> {out / 'finetuned'}")
    with clock.stage("fine-tuning"):
        accuracies = _finetune(starts, out, clock, device, quiet, say)

    findings = Findings(
        out=out,
        machine=machine(place),
        documents=len(corpus),
        tokens={split: counts.tokens for split, counts in manifest.splits.items()},
        task=task,
        pretrained=pretrained,
        shipped=shipped_model(),
        accuracies=accuracies,
        epochs=EPOCHS,
        stages=clock.stages,
    )
    report = build_report(findings)
    write_report(report, out / "report.html")
    (out / "report.json").write_text(json.dumps(to_json(report, findings), indent=2) + "\n", encoding="utf-8")
    say(f"\n5  Comparison\n\n{to_terminal(report)}\n")
    say(f"Report with plots: {out / 'report.html'}   ({duration(minutes * 60 - clock.left)} in all)")
    return report


def texts_only(out_dir: str | Path, *, quiet: bool = False, overwrite: bool = False) -> tuple[int, LabelledTask]:
    """The demo's first step alone: the number of documents in OUT/corpus.txt, and the task in OUT/task."""
    out = Path(out_dir)
    _make_folder(out, overwrite)
    corpus, task = _read_docstrings(out, quiet)
    return len(corpus), task


def machine(place: torch.device) -> str:
    """The device and its machine, in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = f"CUDA, {torch.cuda.get_device_name(place)}" if place.type == "cuda" else "CPU"
    return f"torch {torch.__version__} on {where}; {cores} CPU cores; Python {platform.python_version()}"


def introduction(place: torch.device, minutes: float) -> list[str]:
    """The first lines of output: what was found here, and what will happen."""
    lines = [machine(place)]
    if place.type == "cpu" and torch.cuda.is_available():
        lines.append(f"A CUDA device is available; to use it: {option('device', 'cuda')}")
    lines.append(
        f"In about {duration(60 * minutes)}: train a vocabulary and a tiny ELECTRA from scratch on the docstrings "
        "of this machine's own libraries, then compare it on a task with the model that ships with the package "
        "and with a random start. Nothing is downloaded."
    )
    return [part for line in lines for part in textwrap.wrap(line, 88)]


def _make_folder(out: Path, overwrite: bool) -> None:
    """Makes `out`, removing an earlier demo; raises UserError if it holds anything and may not be overwritten.

    Nothing is removed if the folder holds anything else: a `data` there may be the user's own.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file, expected a folder")
    found = {path.name for path in entries(out)} if out.exists() else set()
    if found and not overwrite:
        raise UserError(f"{out}: not empty; {option('overwrite')} replaces the demo in it")
    others = sorted(name for name in found - WRITTEN if not name.startswith("."))  # .data.partial of a killed demo
    if others or (found and "task" not in found):
        raise UserError(
            f"{out}: holds {others[0] if others else 'no demo'}, and {option('overwrite')} replaces nothing "
            f"but a demo; choose another {option('out')}"
        )
    for name in ("task", "data", "pretrained", "calibration", "finetuned"):
        shutil.rmtree(out / name, ignore_errors=True)
    try:
        (out / "task").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be created ({error.strerror})") from None


def _read_docstrings(out: Path, quiet: bool) -> tuple[list[Document], LabelledTask]:
    """Writes corpus and task."""
    with progress("reading", None, "documents", quiet=quiet) as bar:

        def counted() -> Iterator[Document]:
            for document in documents():
                bar.update()
                yield document

        return write_sample(out, counted())


def _prepare(out: Path, seed: int, quiet: bool) -> Manifest:
    return prepare(
        [out / "corpus.txt"],
        out / "data",
        vocab_size=VOCABULARY,
        lines="sentence",
        heldout_fraction=HELDOUT_FRACTION,
        seed=seed,
        quiet=quiet,
    )


def _pretrain(out: Path, seconds: float, device: str, seed: int, quiet: bool, say: Say) -> PretrainResult:
    """Pre-trains for as many steps as fit into `seconds`; the learning-rate schedule spans exactly these steps."""
    begin = time.monotonic()
    rate = _steps_per_second(out, device, seed)
    left = max(seconds - (time.monotonic() - begin), seconds / 2)  # a slow machine still gets a run
    steps = max(2 * CALIBRATION_STEPS["cpu"], round(0.9 * left * rate))  # a tenth is for evaluating and saving
    if rate < SLOW and resolve_device(device).type == "cpu" and torch.get_num_threads() > 1:
        say("   This is slow. Where other programs use the cores, threads wait for each other: begin again with "
            "OMP_NUM_THREADS=1 in front of the command and --overwrite.")  # fmt: skip
    changes = {
        "steps": steps,
        "warmup_steps": max(1, steps // 10),
        "eval_every": max(1, steps // 12),
        "eval_examples": 256,
        "log_every": max(1, steps // 80),
        "checkpoint_every": steps,
        "seed": seed,
    }
    limit = PATIENCE * left / 60
    run = out / "pretrained"
    return pretrain(
        out / "data", run, model="tiny", changes=changes, device=device, max_minutes=limit, quiet=quiet
    )


def _steps_per_second(out: Path, device: str, seed: int) -> float:
    """Steps per second, measured on the second half of a short run; the first steps are slower."""
    half = CALIBRATION_STEPS[resolve_device(device).type] // 2
    changes = {"steps": 2 * half, "warmup_steps": half, "log_every": half, "eval_every": 2 * half}
    changes |= {"eval_examples": 32, "seed": seed}
    run = out / "calibration"
    with redirect_stderr(io.StringIO()):  # it is too short to have learned anything, and would be warned of that
        result = pretrain(out / "data", run, model="tiny", changes=changes, device=device, quiet=True)
    _stop_if(result.stopped_by)
    first, last = (row for row in read_metrics(run / "metrics.jsonl") if "tokens_per_second" in row)
    shutil.rmtree(run)
    return half * last["tokens_per_second"] / (last["tokens"] - first["tokens"])


def _finetune(
    starts: Sequence[Start], out: Path, clock: Clock, device: str, quiet: bool, say: Say
) -> dict[str, list[float]]:
    """Accuracies from each start, one for each seed; every start gets the same seeds."""
    accuracies: dict[str, list[float]] = {start.key: [] for start in starts}
    slowest = 0.0
    for seed in range(MOST_SEEDS):
        credit = OVERDRAFT * clock.budget if seed == 1 else 0.0
        if seed and clock.left + credit < slowest:
            break
        begin = time.monotonic()
        for start in starts:
            accuracy = _finetune_once(start, out, seed, device, quiet)
            accuracies[start.key].append(accuracy)
            say(f"   seed {seed}  {start.name:<22} {100 * accuracy:5.1f}%")
        slowest = max(slowest, time.monotonic() - begin)
    return accuracies


def _finetune_once(start: Start, out: Path, seed: int, device: str, quiet: bool) -> float:
    """Accuracy after the last epoch: no epoch is chosen by its accuracy."""
    # The same for every start; layer-wise decay would keep the lower layers of a random start from learning.
    settings = FinetuneSettings(epochs=EPOCHS, layerwise_decay=1.0, seed=seed, random_start=start.random)
    folder = out / "finetuned" / start.key
    result = finetune(
        start.directory, Classify(), out / "task" / "train.jsonl", out / "task" / "dev.jsonl", folder, settings,
        device=device, overwrite=True, quiet=quiet, say=lambda line: None,
    )  # fmt: skip
    _stop_if(result["stopped_by"])
    return next(
        row["dev_accuracy"] for row in reversed(read_metrics(folder / "metrics.jsonl")) if "dev_accuracy" in row
    )


def _stop_if(reason: str | None) -> None:
    """Ends the demo if a signal stopped the stage; running out of the stage's time does not end it."""
    if reason not in (None, "time limit"):
        raise KeyboardInterrupt(reason)
