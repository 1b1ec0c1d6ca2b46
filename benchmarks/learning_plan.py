"""The plan of the learning study: budgets, their pieces, and the cost of a training step of every objective.

A piece is one pre-training run, or one fine-tuning of one such run. The most valuable pieces come first, so that a
study that is stopped early still compares all objectives, at less compute and with fewer seeds.

**Every point is a separate run**, with the recipe's learning-rate schedule over its own length. Checkpoints along
one run would be cheaper, but the recipe's rate falls from the first step on, so a checkpoint in the middle of a
long run is not what a run of that length gives. A constant rate with a short decay at each point would save only a
quarter, because points are a factor of three apart and the longest run is most of the work. Separate runs are
independent, too.

**Every objective has its own learning rate.** Each is first pre-trained for a while with the preset's rates
(Adam's and Muon's) times each of `Budget.rates`, from a seed that the study does not use otherwise, and fine-tuned
on `rate_tasks` with rows of the training data that the study does not use otherwise either. From then on it uses
the factor with the best mean score. All objectives get the same number of trials at the same compute, and the same
judge: losses of different objectives cannot be compared, and ELECTRA's loss says little about its rate, because it
falls when the generator is weak.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

from electra_core.config import OBJECTIVES, PRESETS
from electra_core.flops import training_step_flops

START = "start"
"""In place of an objective: the model before its first step, which all objectives start from."""


TRIAL_SEED = 1000
"""Seed of the runs by which rates are chosen."""


@dataclass(frozen=True)
class Budget:
    """The size of a study."""

    model: str
    """The preset's name."""
    electra_steps: tuple[int, ...]
    """The points of compute, ascending: the FLOPs of ELECTRA for so many steps."""
    seeds: int
    """Pre-training runs of every objective at every point."""
    finetune_seeds: int
    """Fine-tunings of every run on every task."""
    tasks: tuple[str, ...]
    """Names in `learning_tasks.TASKS`, the most informative first."""
    later_tasks: tuple[str, ...]
    """Tasks that follow after every run has been judged by `tasks`."""
    rates: tuple[float, ...] = (1.0,)
    """Factors of the preset's rates that are tried for every objective."""
    rate_steps: int = 0
    """The compute of a trial: the FLOPs of ELECTRA for so many steps."""
    rate_tasks: tuple[str, ...] = ()
    """The tasks that trials are judged by."""
    timed_point: int | None = 1
    """Index into `electra_steps` of the point at which objectives are also compared for equal time, if any."""
    finetuning: dict[str, Any] = field(default_factory=dict)
    """`FinetuneSettings` that differ from the recipe's; the same for every objective."""
    objectives: tuple[str, ...] = OBJECTIVES
    """The objectives compared."""


BUDGETS = {
    # One core of a CPU, up to a quarter of an hour a run, some seven hours in all. The longest run sees 11 million
    # tokens; a masked LM leaves the plateau of word frequencies before one million (docs/tiny_history.md).
    "minutes": Budget(
        "tiny", (250, 700, 2000, 6000), 2, 2, ("conll-2003", "sst-2"), ("cola", "docstrings"),
        (0.5, 1.0, 2.0), 400, ("conll-2003", "sst-2"), finetuning={"layerwise_decay": 1.0},
    ),
    # More seeds for the question asked most: ELECTRA against BERT, at the longest run of "minutes". Some two hours
    # of one core.
    "pair": Budget(
        "tiny", (6000,), 3, 2, ("conll-2003", "sst-2", "cola", "docstrings"), (),
        (0.5, 1.0, 2.0), 400, ("conll-2003", "sst-2"), timed_point=None, finetuning={"layerwise_decay": 1.0},
        objectives=("electra", "mlm"),
    ),
    # One modern GPU, ten minutes a run: up to the compute of the paper's 6.25% point, 8.9e16 FLOPs.
    "ten-minutes": Budget(
        "small", (15_625, 31_250, 62_500), 2, 2, ("cola", "sst-2", "mrpc"), ("conll-2003",),
        (0.5, 1.0, 2.0), 8_000, ("cola", "sst-2"),
    ),
    "hours": Budget(
        "small", (62_500, 125_000, 250_000), 3, 3, ("cola", "sst-2", "mrpc"), ("conll-2003",),
        (0.5, 1.0, 2.0), 15_625, ("cola", "sst-2"),
    ),
    # For tests and for trying the command.
    "quick": Budget(
        "tiny", (2, 3), 1, 1, ("docstrings",), (), (1.0, 2.0), 2, ("docstrings",), 0, {"epochs": 0.05}
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Pretraining:
    """One pre-training run."""

    objective: str
    """One of OBJECTIVES, or START."""
    point: int
    """Index into `Budget.electra_steps`; 0 for START and for trials."""
    seed: int
    equal: str = "flops"
    """What it has as much of as ELECTRA at this point: "flops" or "seconds"."""
    trial: float | None = None
    """The factor on the preset's rates that this run tries; None: it uses the chosen one."""

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        if self.trial is not None:
            return f"{self.objective}-rate{self.trial:g}"
        return f"{self.objective}-{self.equal}{self.point}-seed{self.seed}"


@dataclass(frozen=True)
class Finetuning:
    """One fine-tuning of one pre-training run."""

    run: Pretraining
    task: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the piece in the results."""
        return f"{self.run.name}-{self.task}-seed{self.seed}"


Piece = Pretraining | Finetuning


def pieces(budget: Budget) -> Iterator[Piece]:
    """All pieces, the most valuable first. Trials precede everything, and a run precedes its fine-tunings.

    Every run is judged once, by `tasks` and then by `later_tasks`, before any is judged with another seed.
    """
    seeds, tasks, names = range(budget.seeds), budget.tasks, budget.objectives
    yield from _judged([Pretraining(START, 0, 0)], tasks)
    if len(budget.rates) > 1:
        trials = [Pretraining(name, 0, TRIAL_SEED, trial=rate) for name in names for rate in budget.rates]
        for run in trials:
            yield run
            yield from (Finetuning(run, task, 0) for task in budget.rate_tasks)
    lowest, *higher = range(len(budget.electra_steps))
    groups = [[Pretraining(name, point, seed) for name in names] for seed in seeds for point in higher]
    groups += [[Pretraining(name, lowest, seed) for name in names] for seed in seeds]
    for group in groups:
        yield from _judged(group, tasks)
    timed: list[Pretraining] = []
    if budget.timed_point is not None:
        others = [name for name in names if name != "electra"]
        timed = [Pretraining(name, budget.timed_point, seed, "seconds") for seed in seeds for name in others]
    yield from _judged(timed, tasks)
    starts = [Pretraining(START, 0, seed) for seed in seeds]
    yield from _judged(starts[1:], tasks)
    runs = [*(run for group in groups for run in group), *starts]
    yield from (Finetuning(run, task, 0) for run in runs for task in budget.later_tasks)
    for seed in range(1, budget.finetune_seeds):
        yield from (Finetuning(run, task, seed) for run in runs for task in (*tasks, *budget.later_tasks))
        yield from (Finetuning(run, task, seed) for run in timed for task in tasks)


def _judged(runs: list[Pretraining], tasks: tuple[str, ...]) -> Iterator[Piece]:
    """The runs, then their fine-tunings."""
    yield from runs
    yield from (Finetuning(run, task, 0) for run in runs for task in tasks)


# ---- compute ---------------------------------------------------------------------------------------------


def steps_for_equal_flops(budget: Budget, run: Pretraining, vocab_size: int) -> int:
    """Steps of `run` with the FLOPs of ELECTRA's steps at this point; 1 for START, whose learning rate is 0."""
    if run.objective == START:
        return 1
    preset = PRESETS[budget.model]
    encoder = replace(preset.discriminator, vocab_size=vocab_size)
    steps = budget.electra_steps[run.point] if run.trial is None else budget.rate_steps
    electra = steps * training_step_flops(encoder, preset.pretrain)
    return max(1, round(electra / training_step_flops(encoder, replace(preset.pretrain, objective=run.objective))))


# ---- rates -----------------------------------------------------------------------------------------------


def trial_scores(rows: Sequence[dict[str, Any]]) -> dict[str, dict[float, float]]:
    """Objective -> factor -> mean score of its trial over the tasks."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row.get("kind") == "finetuning" and row.get("trial") is not None:
            found.setdefault(row["objective"], {}).setdefault(row["trial"], []).append(row["value"])
    return {name: {rate: mean(values) for rate, values in scores.items()} for name, scores in found.items()}


def chosen_rate(rows: Sequence[dict[str, Any]], objective: str) -> float:
    """The factor with the best trial score, the smallest of ties; 1 without trials (START learns nothing)."""
    scores = trial_scores(rows).get(objective, {1.0: 0.0})
    return max(sorted(scores), key=lambda rate: scores[rate])
