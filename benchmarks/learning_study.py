"""Learning for equal compute: ELECTRA, BERT's masked LM and the paper's ablations, pre-trained on the same text.

    python -m benchmarks.learning_study --data DATA --work WORK --out FILE.jsonl [--budget minutes]

Every objective is pre-trained with the FLOPs that ELECTRA takes for certain numbers of steps (`learning_plan.py`
counts them), with several seeds each, and again with the time that ELECTRA takes. The learning rate is chosen for
each objective, by the same number of trials (`learning_plan.py` says how). Everything else is the same for all:
text and its order, preset, initial weights, optimizer, schedule over the run's own length. Every run is fine-tuned
on several tasks. On a CPU, time is processor time, which other programs disturb far less than wall-clock time.

A study may grow: after points, seeds or tasks are added to its budget, the same command continues it.

A study consists of pieces (a pre-training run, or one fine-tuning), the most valuable first. Each appends its row
to FILE.jsonl when it ends, and the same command continues an interrupted study: pieces with a row are done, and an
interrupted run resumes from its last checkpoint. Rows of another study (another preset, budget, corpus, machine)
are refused. `--piece-minutes` and `--minutes` limit the time of a piece and of the whole command.
`python -m benchmarks render` draws the figures. With `--elsewhere` a study continues on another kind of machine:
scores for equal FLOPs do not depend on the machine but seconds do, so such rows name their machine and their
seconds are not shown.

WORK holds runs and data and is not needed afterwards. Tasks whose data are not under $ELECTRA_DATA are left out,
with a message.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from benchmarks.harness import add_row, environment, read_rows
from benchmarks.learning_plan import (
    BUDGETS,
    START,
    Finetuning,
    Pretraining,
    chosen_rate,
    pieces,
    steps_for_equal_flops,
)
from benchmarks.learning_tasks import TASKS, available, judge
from electra_core import pretrain as pretraining
from electra_core.config import PRESETS
from electra_core.corpus import Corpus
from electra_core.errors import UserError
from electra_core.execution.placement import resolve_device
from electra_core.flops import training_step_flops
from electra_core.pretraining import setup as pretrain_setup
from electra_core.runs.metrics_log import read_metrics

Row = dict[str, Any]
EVALUATIONS = 4  # per run, on held-out text


class Study:
    """A budget's pieces, and the rows of the finished ones."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.budget = options, BUDGETS[options.budget]
        self.preset = PRESETS[self.budget.model]
        if options.temperature is not None:
            changed = replace(self.preset.pretrain, temperature=options.temperature)
            self.preset = replace(self.preset, pretrain=changed)
        self.device = resolve_device(options.device)
        self.clock: Callable[[], float] = time.process_time if self.device.type == "cpu" else time.monotonic
        self.corpus = Corpus.open(options.data)
        self.rows = read_rows(options.out)
        check_study(self.rows, self._identity(), options.out, options.elsewhere)

    def run(self) -> None:
        """Run the remaining pieces until the minutes are over."""
        done = {row["piece"] for row in self.rows}
        todo = [piece for piece in pieces(self.budget) if piece.name not in done]
        missing = {
            piece.task for piece in todo if not isinstance(piece, Pretraining) and not available(piece.task)
        }
        for task in sorted(missing):
            print(f"{task}: left out, because its data are missing (set ELECTRA_DATA)", file=sys.stderr)
        elsewhere = {"elsewhere": True} if self.options.elsewhere else {}
        self._write({"piece": "environment", "study": self._identity(), **self._environment(), **elsewhere})
        deadline = time.monotonic() + 60 * self.options.minutes
        for piece in todo:
            if time.monotonic() > deadline:
                print("the time is up; to continue, repeat the command")
                return
            if isinstance(piece, Finetuning) and piece.task in missing:
                continue
            run = piece if isinstance(piece, Pretraining) else piece.run
            if self.options.elsewhere and run.equal == "seconds":
                continue
            row = self._pretrain(piece) if isinstance(piece, Pretraining) else self._finetune(piece)
            if row is None:
                print(f"{piece.name}: the piece's time is up; to continue, repeat the command")
                return
            machine = {"machine": self._machine()} if self.options.elsewhere else {}
            self._write({"piece": piece.name, **row, **machine})
            print(f"{piece.name}: {summary(row)}", flush=True)

    def _pretrain(self, run: Pretraining) -> Row | None:
        """One pre-training run; None if its time was up before it finished."""
        steps, out = self._steps(run), self.options.work / "runs" / run.name
        preset = self.preset.pretrain
        rate = chosen_rate(self.rows, run.objective) if run.trial is None else run.trial
        changes = {
            "objective": "electra" if run.objective == START else run.objective,
            "steps": steps,
            "seed": run.seed,
            "temperature": preset.temperature,
            "learning_rate": rate * preset.learning_rate,
            "muon_learning_rate": rate * preset.muon_learning_rate,
            "warmup_steps": max(1, min(preset.warmup_steps, steps // 5)),
            "eval_every": max(1, steps // EVALUATIONS),
            "eval_examples": 128 if self.device.type == "cpu" else 512,
            "log_every": max(1, steps // 50),
            "checkpoint_every": max(1, steps // 4) if self.device.type == "cuda" else steps,
            "keep_checkpoints": 1,
        }
        with stopwatch(self.clock) as elsewhere:
            begin, wall = self.clock(), time.monotonic()
            result = pretraining.pretrain(
                self.options.data, out, model=self.budget.model, changes=changes, device=str(self.device),
                resume=(out / "checkpoints").is_dir(), overwrite=not (out / "checkpoints").is_dir(),
                max_minutes=self.options.piece_minutes, quiet=True,
            )  # fmt: skip
        times = {
            "seconds": round(self.clock() - begin - elsewhere[0], 2),
            "wall_seconds": round(time.monotonic() - wall, 2),
        }
        times = add_times(out / "times.json", times)  # over all parts of an interrupted run
        if result.stopped_by == "time limit":
            return None
        if result.stopped_by:
            raise SystemExit(f"stopped by {result.stopped_by}")
        curve = [row for row in read_metrics(out / "metrics.jsonl") if "eval_mlm_loss" in row]
        return {
            "kind": "pretraining", **asdict(run), "rate": rate, "steps": steps, "tokens": result.tokens,
            "flops": self._flops(run) * steps, **times, "evaluation": result.evaluation, "curve": curve,
        }  # fmt: skip

    def _finetune(self, piece: Finetuning) -> Row:
        model = self.options.work / "runs" / piece.run.name / "discriminator"
        found = judge(
            model, piece.task, piece.seed, self.budget.finetuning, self.options.work, self.clock,
            judged_by="dev" if piece.run.trial is None else "tune",
        )  # fmt: skip
        return {
            "kind": "finetuning", "run": piece.run.name, **asdict(piece.run), "task": piece.task,
            "finetune_seed": piece.seed, **found,
        }  # fmt: skip

    def _steps(self, run: Pretraining) -> int:
        if run.equal == "flops":
            return steps_for_equal_flops(self.budget, run, self.corpus.tokenizer.vocab_size)
        return steps_for_equal_seconds(self.rows, run)

    def _flops(self, run: Pretraining) -> float:
        encoder = replace(self.preset.discriminator, vocab_size=self.corpus.tokenizer.vocab_size)
        if run.objective == START:
            return 0.0
        return training_step_flops(encoder, replace(self.preset.pretrain, objective=run.objective))

    def _identity(self) -> Row:
        """What the rows of one study have in common, as JSON values."""
        tasks = {*self.budget.tasks, *self.budget.later_tasks, *self.budget.rate_tasks}
        values = {
            "budget": asdict(self.budget),
            "preset": asdict(self.preset),
            "tasks": {name: asdict(TASKS[name]) for name in sorted(tasks)},
            "corpus": self.corpus.fingerprint,
            "machine": self._machine(),
        }
        return dict(json.loads(json.dumps(values)))

    def _machine(self) -> str:
        return str(environment(self.device)["device"])

    def _environment(self) -> Row:
        corpus = {"fingerprint": self.corpus.fingerprint, "tokens": self.corpus.num_tokens}
        command = (
            "python -m benchmarks.learning_study --data DATA --work WORK --out FILE.jsonl"  # without local paths
        )
        command += f" --budget {self.options.budget}"
        if self.options.temperature is not None:
            command += f" --temperature {self.options.temperature:g}"
        command += " --elsewhere" * self.options.elsewhere
        measured_with = {**environment(self.device), "command": command}
        return {"kind": "environment", "corpus": corpus, "environment": measured_with}

    def _write(self, row: Row) -> None:
        self.rows.append(row)
        add_row(self.options.out, row)


def steps_for_equal_seconds(rows: list[Row], run: Pretraining) -> int:
    """Steps that take as long as ELECTRA's run at this point and seed, given the seconds per step of the runs of
    equal FLOPs."""

    def measured(objective: str) -> Row:
        wanted = asdict(replace(run, objective=objective, equal="flops"))
        found = (row for row in rows if row.get("kind") == "pretraining" and wanted.items() <= row.items())
        return next(found)

    electra, own = measured("electra"), measured(run.objective)
    return max(1, round(electra["seconds"] / (own["seconds"] / own["steps"])))


@contextmanager
def stopwatch(clock: Callable[[], float]) -> Iterator[list[float]]:
    """Collects the seconds that pre-training spends outside its steps: counting words before the first one (once
    per seed, because every run needs the same counts), evaluating, saving."""
    elsewhere = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            begin = clock()
            try:
                return function(*arguments, **named)
            finally:
                elsewhere[0] += clock() - begin

        return run

    count = timed(counted_once)
    with mock.patch.object(pretrain_setup, "cooccurrence_embeddings", count):
        with mock.patch.object(pretraining, "evaluate", timed(pretraining.evaluate)):
            with mock.patch.object(pretraining, "save_models", timed(pretraining.save_models)):
                yield elsewhere


count_words = pretrain_setup.cooccurrence_embeddings
_counted: dict[tuple[object, ...], Tensor] = {}


def counted_once(corpus: Corpus, width: int, rms: float, seed: int) -> Tensor:
    """`cooccurrence_embeddings`, cached."""
    key = corpus.fingerprint, width, rms, seed
    if key not in _counted:
        _counted[key] = count_words(corpus, width, rms, seed)
    return _counted[key]


def add_times(path: Path, times: dict[str, float]) -> dict[str, float]:
    """Adds `times` to those of the run's earlier parts in `path`; returns the sums."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    times = {name: round(value + before.get(name, 0.0), 2) for name, value in times.items()}
    path.write_text(json.dumps(times), encoding="utf-8")
    return times


def check_study(rows: list[Row], identity: Row, path: Path, elsewhere: bool = False) -> None:
    """Raises UserError if `rows` belong to another study than `identity`, so that their figures must not be mixed.

    With `elsewhere` the machines may differ.
    """
    for row in rows:
        if row.get("kind") != "environment":
            continue
        before = row.get("study") or {}
        told = identity.keys() - ({"machine"} if elsewhere or row.get("elsewhere") else set())
        changed = [
            name for name in identity if name in told and not _agree(name, before.get(name), identity[name])
        ]
        if changed:
            other = ", another ".join(changed)
            raise UserError(f"{path}: has rows of a study with another {other}; take another file")


GROWING = ("electra_steps", "seeds", "finetune_seeds", "tasks", "later_tasks", "timed_point", "objectives")
"""Fields of a budget that determine the number of pieces, not what a piece is."""


def _agree(name: str, before: Any, now: Any) -> bool:
    """Whether rows with these two values of a property can belong to one study."""
    if name == "budget" and before:  # rows name their point by its index
        points = min(len(before["electra_steps"]), len(now["electra_steps"]))
        if before["electra_steps"][:points] != now["electra_steps"][:points]:
            return False
        before, now = ({k: v for k, v in part.items() if k not in GROWING} for part in (before, now))
    if name == "preset" and isinstance(before, dict):  # every run says how many steps it has
        before, now = (part | {"pretrain": {**part["pretrain"], "steps": None}} for part in (before, now))
    if name == "tasks" and before:
        return all(before[task] == now[task] for task in before.keys() & now.keys())
    return bool(before == now)


def summary(row: Row) -> str:
    """A row in one line, for the terminal."""
    if row["kind"] == "finetuning":
        return f"{row['metric']} {row['value']:.3f} ({row['seconds']:.0f} s)"
    shown = ", ".join(f"{name.removeprefix('eval_')} {value:.3f}" for name, value in row["evaluation"].items())
    return f"{row['steps']} steps, {row['flops']:.3g} FLOPs, {row['seconds']:.0f} s; {shown}"


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prepared corpus (electra prepare)")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and data")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one row per piece")
    parser.add_argument("--budget", default="minutes", choices=tuple(BUDGETS))
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--temperature", type=float, help="sampling temperature of the generator (default: the preset's)"
    )
    parser.add_argument("--elsewhere", action="store_true", help="continue a study from another kind of machine")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no piece after this time")
    parser.add_argument(
        "--piece-minutes",
        type=float,
        default=None,
        help="stop a pre-training run after this time, to continue later",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Start or continue the study."""
    try:
        Study(arguments().parse_args(argv)).run()
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
