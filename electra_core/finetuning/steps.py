"""The steps of a fine-tuning: their batches, precision, learning rate and engine.

`finetuning_steps` yields one `StepResult` after the other, which `seed.py` consumes. All batches are
known before the first step (`data.plan_batches`), and so is the largest one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from electra_kernels.rng import fold
from torch import Tensor

from electra_core.adam import ElectraAdam
from electra_core.downstream.interface import Task
from electra_core.execution.distributed import Ranks
from electra_core.execution.engine import agreed_engine, choose_engine, graph_problem, static_steps
from electra_core.execution.placement import autocast_context
from electra_core.finetuning.data import Data, tokens_of_steps
from electra_core.finetuning.folder import Run
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.finetuning.static_task import Part, TaskShapes
from electra_core.optim import linear_schedule, parameter_groups
from electra_core.tasks import TaskModel
from electra_core.training import Loop, StepResult, training_steps

TRAINING_STREAM = 0  # of a fine-tuning run's random numbers; see also data.py


@dataclass(frozen=True)
class Job:
    """What every seed trains on, and how."""

    task: Task
    """Fitted to the training data."""
    directory: Path
    """Directory of the model to start from."""
    settings: FinetuneSettings
    data: Data
    device: torch.device
    dtype: torch.dtype
    """Data type that matrix products are computed in."""
    on_evaluation: Callable[[dict[str, float]], object] | None = None
    """Called with every evaluation's figures, and "seed" and "step"; on rank 0 only. True stops the training."""
    ranks: Ranks = field(default_factory=Ranks)

    def engine(self, model: TaskModel) -> str:
        """How steps are carried out: eager | static | graph (`execution/engine.py`).

        "auto" is "graph" on a GPU that runs the kernels, and never "static" on a CPU, where `execution/filling.py`
        does what is needed. An engine that cannot run falls back to another, with the reason logged.
        """
        wanted, heads = self.settings.engine, [model.config.head_size]
        if wanted == "auto":
            engine = "eager" if graph_problem(self.device, self.dtype, heads) else "graph"
        else:
            engine = choose_engine(wanted, self.device, self.dtype, heads)
        return agreed_engine(engine, self.ranks)


def finetuning_steps(
    job: Job, model: TaskModel, optimizer: torch.optim.Optimizer, plan: Sequence[Sequence[np.ndarray]], run: Run
) -> Iterator[StepResult]:
    """The steps of `plan` that `run` has not taken yet."""
    settings, engine = job.settings, job.engine(model)
    called = job.ranks.data_parallel(model) if engine == "eager" else model

    def loss(part: Part, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        logits = called(part.batch.tokens, seed=part.seed(seed))
        if part.is_filled and not model.per_token:
            logits = logits[:-1]
        return job.task.loss(logits, part.batch) * part.share, {}

    warmup = round(settings.warmup * len(plan))
    loop = Loop(
        model, optimizer, loss,
        schedule=lambda step: linear_schedule(step, settings.learning_rate, len(plan), warmup),
        steps=len(plan), seed=fold(run.seed, TRAINING_STREAM), clip_norm=settings.clip_norm,
        first_step=run.steps, skipped_before=run.skipped, autocast=autocast_context(job.device, job.dtype),
        ranks=job.ranks,
    )  # fmt: skip
    parts = partial(_parts, job, plan, _full_step(settings, plan))
    if engine == "eager":
        return training_steps(loop, lambda step: [replace(p, batch=p.batch.to(job.device)) for p in parts(step)])
    per_token, positions = job.data.train.per_token, model.config.max_position_embeddings
    largest = int(np.argmax(tokens_of_steps(job.data.train, plan)))
    shapes = TaskShapes(per_token=per_token, positions=positions, largest=lambda: parts(largest))
    return static_steps(loop, parts, shapes=shapes, device=job.device, capture=engine == "graph")


def _full_step(settings: FinetuneSettings, plan: Sequence[Sequence[np.ndarray]]) -> int:
    """Number of units in a full step; 0 where token budgets limit batches, since no step is full then."""
    return 0 if settings.tokens_per_batch else max(sum(len(units) for units in batches) for batches in plan)


def _parts(job: Job, plan: Sequence[Sequence[np.ndarray]], full: int, step: int) -> list[Part]:
    """This rank's parts of a step, on the host: its share of each of the step's batches.

    The weights of a step's parts add up to 1, so that its loss is a mean; in a step that is not `full`, to less,
    so that an example has the same weight in every step.
    """
    size, mine = job.ranks.size, job.ranks.rank
    batches = [job.data.train.batch(units) for whole in plan[step] for units in shares(whole, size)]
    # A share that had to borrow its unit has no weight.
    borrowed = [rank >= len(whole) for whole in plan[step] for rank in range(size)]
    weights = [0.0 if b else job.task.weight(batch) for b, batch in zip(borrowed, batches)]
    total = sum(weights) or 1.0
    if full:
        total *= full / sum(len(units) for units in plan[step])
    parts = [Part(batch, weight / total, index) for index, (batch, weight) in enumerate(zip(batches, weights))]
    return parts[mine::size]


def shares(units: np.ndarray, size: int) -> list[np.ndarray]:
    """A batch's units dealt out to `size` ranks; since units are sorted by length, all get similar lengths.

    If there are too few, the remaining ranks repeat the first unit, because every rank has to take a step.
    """
    return [units[rank::size] if rank < len(units) else units[:1] for rank in range(size)]


def evaluation_steps(steps: int, settings: FinetuneSettings) -> set[int]:
    """The steps after which the dev data are evaluated: evenly spaced, the last one included."""
    count = max(1, min(steps, round(settings.epochs * settings.evaluations)))
    return {round((index + 1) * steps / count) for index in range(count)}


def task_optimizer(model: TaskModel, settings: FinetuneSettings) -> torch.optim.Optimizer:
    """The optimizer that the settings name, with layer-wise learning-rate decay."""
    groups = parameter_groups(
        model,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        layerwise_decay=settings.layerwise_decay,
        original_depths=settings.original_depths,
    )
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    return ElectraAdam(groups, lr=settings.learning_rate)
