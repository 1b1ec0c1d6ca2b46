"""What the learning study consists of: budgets, their pieces, and what a training step of every objective costs.

A piece is one pre-training run, or one fine-tuning of one such run. Pieces come in the order of their value, so
that a study which is stopped early still compares all objectives, at less compute and with fewer seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from electra_core.config import OBJECTIVES, PRESETS, EncoderConfig, PretrainConfig, generator_config
from electra_core.flops import forward_flops, mlm_head_flops, rtd_head_flops

START = "start"
"""In place of an objective: the model before its first step, what all of them begin with."""


@dataclass(frozen=True)
class Budget:
    """How large a study is."""

    model: str
    """Preset."""
    electra_steps: tuple[int, ...]
    """The points of compute, ascending: the FLOPs of ELECTRA with this many steps."""
    seeds: int
    """Pre-training runs of every objective at every point."""
    finetune_seeds: int
    """Fine-tunings of every run on every task."""
    tasks: tuple[str, ...]
    """Names in `learning_tasks.TASKS`, the most telling one first."""
    later_tasks: tuple[str, ...]
    """Tasks that wait until everything has been judged by the others."""
    finetuning: dict[str, Any]
    """Settings of `FinetuneSettings` that differ from the recipe's; the same for every objective."""


# On the shipped tiny, CoNLL-2003 gives F1 0.42 at this rate and 0.39 at 1e-3; SST-2 stays at chance with both.
_LITTLE_TRAINED: dict[str, Any] = {"layerwise_decay": 1.0, "learning_rate": 4e-4}

BUDGETS = {
    # One core of a CPU: an hour or two.
    "minutes": Budget(
        "tiny", (100, 250, 600), 2, 1, ("conll-2003", "cola"), ("sst-2", "docstrings", "mrpc"), _LITTLE_TRAINED
    ),
    # One modern GPU, ten minutes a run: up to the compute of the paper's 6.25% point, 8.9e16 FLOPs.
    "ten-minutes": Budget("small", (15_625, 31_250, 62_500), 2, 2, ("cola", "sst-2", "mrpc"), ("docstrings",), {}),
    "hours": Budget("small", (62_500, 125_000, 250_000), 3, 3, ("cola", "sst-2", "mrpc"), ("docstrings",), {}),
    # For tests and for a look at the command.
    "quick": Budget("tiny", (2, 3), 1, 1, ("docstrings",), (), {"epochs": 0.05}),
}


@dataclass(frozen=True)
class Pretraining:
    """One pre-training run."""

    objective: str
    """One of OBJECTIVES, or START."""
    point: int
    """Index into `Budget.electra_steps`; 0 for START."""
    seed: int
    equal: str = "flops"
    """What it has as much of as ELECTRA at this point: flops | seconds."""

    @property
    def name(self) -> str:
        """Also of its folder."""
        return f"{self.objective}-{self.equal}{self.point}-seed{self.seed}"


@dataclass(frozen=True)
class Finetuning:
    """One fine-tuning of one pre-training run."""

    run: Pretraining
    task: str
    seed: int

    @property
    def name(self) -> str:
        """Names the piece in the results."""
        return f"{self.run.name}-{self.task}-seed{self.seed}"


Piece = Pretraining | Finetuning


def pieces(budget: Budget) -> Iterator[Piece]:
    """All pieces, the most valuable first; a run always comes before its fine-tunings."""
    seeds, tasks = range(budget.seeds), budget.tasks
    starts = [Pretraining(START, 0, seed) for seed in seeds]
    points = {
        point: [Pretraining(objective, point, seed) for seed in seeds for objective in OBJECTIVES]
        for point in range(len(budget.electra_steps))
    }
    *most, last = points
    yield from _judged(starts[:1], tasks, budget)
    for point in most:
        yield from _judged(points[point], tasks, budget)
    yield from _judged(starts[1:], tasks, budget)
    timed = [replace(run, equal="seconds") for run in points[max(0, last - 1)] if run.objective != "electra"]
    yield from _judged(timed, tasks, budget)
    yield from _judged(points[last], tasks, budget)
    for run in [*points[last], *points[max(0, last - 1)], *starts]:
        yield from _finetunings(run, budget.later_tasks, budget)


def _judged(runs: list[Pretraining], tasks: tuple[str, ...], budget: Budget) -> Iterator[Piece]:
    """All objectives of a seed, then what they are good for, then the next seed."""
    for seed in sorted({run.seed for run in runs}):
        group = [run for run in runs if run.seed == seed]
        yield from group
        for run in group:
            yield from _finetunings(run, tasks, budget)


def _finetunings(run: Pretraining, tasks: tuple[str, ...], budget: Budget) -> Iterator[Finetuning]:
    for task in tasks:
        for seed in range(budget.finetune_seeds):
            yield Finetuning(run, task, seed)


# ---- compute ---------------------------------------------------------------------------------------------


def step_flops(encoder: EncoderConfig, config: PretrainConfig) -> float:
    """FLOPs of one training step of full sequences by modern counting (`flops.py`), every head as it is computed.

    ELECTRA's discriminator judges all tokens; BERT and `replace-mlm` predict words at the masked positions,
    `all-tokens-mlm` at every token, which is most of what it costs with a small model and a large vocabulary.
    """
    tokens = float(config.batch_size * config.max_length)
    masked = tokens * config.mask_fraction
    forward = forward_flops(encoder, tokens, tokens * config.max_length)
    if config.objective in ("electra", "electra-15"):
        forward += rtd_head_flops(encoder, tokens)
    elif config.objective == "all-tokens-mlm":
        forward += mlm_head_flops(encoder, tokens) + 2 * tokens * encoder.hidden_size
    else:
        forward += mlm_head_flops(encoder, masked)
    if config.objective != "mlm":
        generator = generator_config(encoder, config)
        forward += forward_flops(generator, tokens, tokens * config.max_length) + mlm_head_flops(generator, masked)
    return 3 * forward


def steps_for_equal_flops(budget: Budget, run: Pretraining, vocab_size: int) -> int:
    """Steps of `run` that cost what ELECTRA's steps at this point do; 1 for START, whose rate is 0."""
    if run.objective == START:
        return 1
    preset = PRESETS[budget.model]
    encoder = replace(preset.discriminator, vocab_size=vocab_size)
    electra = budget.electra_steps[run.point] * step_flops(encoder, preset.pretrain)
    return max(1, round(electra / step_flops(encoder, replace(preset.pretrain, objective=run.objective))))
