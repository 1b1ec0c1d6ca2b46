"""One step, and a loop around it: what pre-training and fine-tuning share.

`training_steps` is a generator: it does an optimizer step and hands its figures to the caller, whose own
loop logs, evaluates and saves. There is no trainer object; a run is read top to bottom
in `pretrain.py` and `finetune.py`.

It is the loop to read, and not the only one. On GPUs that run the kernels, and for pre-training in bf16 on CPUs
that are fast at it, `engine.static_steps` takes its place: the same step in fixed shapes, the next batch prepared
meanwhile.

A step's dropout and draws are decided by `fold(seed, step)`, with a seed that the caller has folded for training;
pre-training's examples and masks by the run's seed and the examples' numbers (`examples.py`, `masking.py`). So
step t of a resumed run is step t of the uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from electra_kernels.rng import Seed, fold
from torch import Tensor, nn

from electra_core.distributed import Ranks
from electra_core.optim import clip_gradients, set_learning_rate

Batch = TypeVar("Batch")
LOSS = ""
"""Key of the step's loss among its figures; empty, as a figure may itself be called "loss" (pretrain.py's is)."""
MOST_SKIPPED_STEPS = 20
"""Steps with a loss or gradient that is not finite, in a row, after which a run stops."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; tensors stay on the device until somebody asks for their values."""

    step: int
    """Steps done so far, this one included."""
    loss: Tensor
    """Scalar: summed over the parts of the batch."""
    figures: dict[str, Tensor]
    """Scalars that the loss function reported, summed over the parts."""
    gradient_norm: Tensor
    """Scalar: global norm before clipping."""
    learning_rate: float
    """Rate of this step's update."""
    skipped: Tensor
    """Scalar, true if loss or gradient was not finite, so that nothing was updated."""
    in_a_row: Tensor
    """Scalar: how many steps up to this one were skipped, one after the other."""


class Diverged(FloatingPointError):
    """Too many steps in a row had a loss or gradient that is not finite, or what was learned is not of use.

    `step` is the last one taken, from 0.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


def training_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_function: Callable[[Batch, int], tuple[Tensor, dict[str, Tensor]]],
    batches: Callable[[int], Sequence[Batch]],
    *,
    schedule: Callable[[int], float],
    first_step: int,
    steps: int,
    seed: int,
    clip_norm: float,
    autocast: AbstractContextManager[Any] | None = None,
    ranks: Ranks | None = None,
    skipped_before: int = 0,
) -> Iterator[StepResult]:
    """Train from `first_step` up to `steps`, handing out each step's figures.

    Args:
        model: whose gradients are clipped; put in training mode before every step.
        optimizer: one that reads `found_inf` (see adam.py): torch's fused ones and ours.
        loss_function: (part, seed) -> (loss, figures). Losses of a step's parts add up to the step's loss.
        batches: step (from 0) -> a list of the parts of its batch, often one; a pure function of the step.
        schedule: step (from 0) -> learning rate.
        first_step: how many steps were done before; 0 in a new run.
        steps: how many there are in all.
        seed: of the run's training; the seed that `loss_function` is given in step t is `fold(seed, t)`.
        clip_norm: the most that the gradients' global norm may be.
        autocast: context of the forward pass, for mixed precision.
        ranks: the processes that train together, each with parts of its own; their gradients and figures add up.
        skipped_before: `in_a_row` of the step before the first one.

    Raises:
        Diverged: see `stop_if_diverged`.
        ValueError: an optimizer that cannot drop a step, a model without anything to train, a step without parts.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"optimizer: expected one that reads found_inf (fused=True), got {type(optimizer).__name__}"
        )
    autocast, ranks = autocast or nullcontext(), ranks or Ranks()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: expected a parameter that requires a gradient, got none")
    in_a_row, count = torch.tensor(float(skipped_before), device=parameters[0].device), LateNumber()
    for step in range(first_step, steps):
        model.train()
        parts, key, rate = batches(step), fold(seed, step), schedule(step)
        done = take_step(parameters, optimizer, loss_function, parts, key, rate, clip_norm, autocast, ranks)
        in_a_row = torch.where(done.skipped, in_a_row + 1, 0)
        stop_if_diverged(in_a_row, count, step, steps)
        yield StepResult(step + 1, done.loss, done.figures, done.gradient_norm, rate, done.skipped, in_a_row)


class Done(NamedTuple):
    """What `take_step` reports; all of it stays on the device. See `StepResult`."""

    loss: Tensor
    figures: dict[str, Tensor]
    gradient_norm: Tensor
    skipped: Tensor


def take_step(
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss_function: Callable[[Batch, Any], tuple[Tensor, dict[str, Tensor]]],
    parts: Sequence[Batch],
    seed: Seed,
    rate: float | Tensor,
    clip_norm: float,
    autocast: AbstractContextManager[Any],
    ranks: Ranks,
) -> Done:
    """Forward, backward, clipping and update. Nothing in it waits for the device, and with `seed` and `rate` as
    device tensors nothing comes from the host either: a CUDA graph can capture it whole (`engine.py`)."""
    sums = ranks.summed(backward(loss_function, parts, seed, autocast, ranks))
    return update(parameters, optimizer, rate, clip_norm, sums)


def update(
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rate: float | Tensor,
    clip_norm: float,
    sums: dict[str, Tensor],
) -> Done:
    """The second half of `take_step`: clips the whole batch's gradients, and updates if they are finite.

    Args:
        sums: what `backward` returned, over all ranks.
    """
    figures = dict(sums)
    loss = figures.pop(LOSS)
    gradient_norm = clip_gradients(parameters, clip_norm)
    skipped = ~torch.isfinite(loss + gradient_norm)
    set_learning_rate(optimizer, rate)
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]  # or a later step of the caller's own would still heed it
    optimizer.zero_grad(set_to_none=True)
    return Done(loss, figures, gradient_norm, skipped)


class LateNumber:
    """Reads a number off the device without holding up the host: on a GPU, that of the call before.

    Reading it at once would wait until the GPU has done all that was given to it, and leave it idle until the
    next step's kernels arrive.
    """

    def __init__(self) -> None:
        self._on_its_way: tuple[Tensor, torch.cuda.Event] | None = None

    def read(self, number: Tensor) -> float:
        """The number; on a GPU the one of the call before, 0 at first."""
        if not number.is_cuda:
            return float(number)
        before, copy, arrived = self._on_its_way, torch.empty((), pin_memory=True), torch.cuda.Event()
        copy.copy_(number, non_blocking=True)
        arrived.record(torch.cuda.current_stream(number.device))  # which need not be the current device
        self._on_its_way = copy, arrived
        if before is None:
            return 0.0
        before[1].synchronize()
        return float(before[0])


def stop_if_diverged(in_a_row: Tensor, count: LateNumber, step: int, steps: int) -> None:
    """Ends a run of `steps` steps that has diverged, after `step` (from 0) and before anybody hears of that step.

    It has after `MOST_SKIPPED_STEPS` skipped steps in a row; on a GPU that is noticed one step later, because the
    host reads the count of the step before. A run that ends amid such a row may be too short for that: it has
    diverged if they are half of its steps. Only there the host waits: nothing comes after the last step.

    Args:
        in_a_row: as in `StepResult`, on the device.
        count: that reads it.

    Raises:
        Diverged: says after how many.
    """
    if count.read(in_a_row) >= MOST_SKIPPED_STEPS:
        message = f"step {step + 1}: no finite loss and gradient for {MOST_SKIPPED_STEPS} steps in a row"
        raise Diverged(message, step)
    if step + 1 < steps:
        return
    if (at_the_end := int(in_a_row)) >= min(MOST_SKIPPED_STEPS, (steps + 1) // 2):
        message = f"step {step + 1}: no finite loss and gradient in the last {at_the_end} of {steps} steps"
        raise Diverged(message, step)


def backward(
    loss_function: Callable[[Batch, Any], tuple[Tensor, dict[str, Tensor]]],
    parts: Sequence[Batch],
    seed: Seed,
    autocast: AbstractContextManager[Any],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """The first half of `take_step`: forward and backward over this rank's parts of a batch, gradients added up.

    Those of other ranks are added where the loss function's model is `Ranks.data_parallel`'s.

    Returns:
        Figures, and the loss as `LOSS`, summed over the parts.
    """
    if not parts:
        raise ValueError("batches: expected a list of one part or more for every step, got an empty one")
    sums: dict[str, Tensor] = {}
    for index, part in enumerate(parts, start=1):
        with ranks.locally() if index < len(parts) else nullcontext():  # other ranks hear of the last part's sum
            with autocast:
                loss, figures = loss_function(part, seed)
            loss.backward()
        figures = {**figures, LOSS: loss}
        sums = {name: value.detach() + sums.get(name, 0) for name, value in figures.items()}
    return sums
