"""One training step and the loop around it, shared by pre-training and fine-tuning.

`training_steps` is a generator: it takes an optimizer step and yields its figures to the caller, whose own
loop logs, evaluates and saves. There is no trainer object; a run reads from top to bottom
in `pretrain.py` and `finetuning/seed.py`.

This is the loop to read, but not the only one. On GPUs that run the kernels, and for pre-training in bf16 on CPUs
that are fast at it, `execution.engine.static_steps` takes its place: the same step in fixed shapes, while the
next batch is being prepared.

A step's dropout and draws depend on `fold(seed, step)` alone, with a seed that the caller has folded for training;
pre-training's examples and masks depend on the run's seed and the examples' numbers (`examples.py`, `masking.py`).
So step t of a resumed run is step t of the uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from electra_kernels.rng import Seed, fold
from torch import Tensor, nn

from electra_core.execution.distributed import Ranks
from electra_core.optim import clip_gradients, set_learning_rate

LossFunction = Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]]
"""(part of a batch, seed) -> (loss, figures). Of several processes, all report the same figures in one order."""
LOSS = ""
"""Key of the step's loss among its figures; empty, as a figure may itself be called "loss" (pretrain.py)."""
MOST_SKIPPED_STEPS = 20
"""A run stops after this many steps in a row whose loss or gradient is not finite."""


@dataclass(frozen=True)
class Loop:
    """What is trained and how: everything a training loop needs except the batches."""

    model: nn.Module
    """The model to train; put in training mode before every step."""
    optimizer: torch.optim.Optimizer
    """Its groups' rates are set before every step: the schedule's times the group's `lr_scale` (1 if it has none).
    One that reads `found_inf` (see adam.py), as torch's fused ones and ours do, skips a step that is not finite by
    itself; of any other, `step` is then not called, for which the host waits for the device once per step."""
    loss_function: LossFunction
    """Its losses for the parts of a step add up to the step's loss."""
    schedule: Callable[[int], float]
    """Step (from 0) -> learning rate."""
    steps: int
    """Number of steps in all."""
    seed: int
    """The run's training seed; in step t `loss_function` receives `fold(seed, t)`."""
    clip_norm: float
    """Maximum global norm of the gradients, to which they are clipped."""
    first_step: int = 0
    """Number of steps done before; 0 in a new run."""
    skipped_before: int = 0
    """`StepResult.in_a_row` of the step before the first one."""
    autocast: AbstractContextManager[Any] = field(default_factory=nullcontext)
    """Context of the forward pass, for mixed precision."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that train together, each on its own parts; their gradients and figures are summed."""

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the model."""
        return [p for p in self.model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; tensors stay on the device until their values are read."""

    step: int
    """Steps done so far, this one included."""
    loss: Tensor
    """Scalar: summed over the parts of the batch."""
    figures: dict[str, Tensor]
    """Scalars reported by the loss function, summed over the parts."""
    gradient_norm: Tensor
    """Scalar: global norm before clipping."""
    learning_rate: float
    """Rate of this step's update."""
    skipped: Tensor
    """Scalar, true if loss or gradient was not finite, so that nothing was updated."""
    in_a_row: Tensor
    """Scalar: how many steps in a row, up to this one, were skipped."""


def training_steps(loop: Loop, batches: Callable[[int], Sequence[Any]]) -> Iterator[StepResult]:
    """Trains from `loop.first_step` up to `loop.steps` and yields each step's figures.

    Args:
        batches: step (from 0) -> the list of the parts of its batch, often one; a pure function of the step.

    Raises:
        Diverged: see `stop_if_diverged`.
        ValueError: no trainable parameters, or a step without parts.
    """
    if not loop.parameters:
        raise ValueError("model: expected a parameter that requires a gradient, got none")
    in_a_row = torch.tensor(float(loop.skipped_before), device=loop.parameters[0].device)
    count = LateNumber()
    for step in range(loop.first_step, loop.steps):
        loop.model.train()
        rate = loop.schedule(step)
        done = take_step(loop, batches(step), fold(loop.seed, step), rate)
        in_a_row = torch.where(done.skipped, in_a_row + 1, 0)
        stop_if_diverged(in_a_row, count, step, loop.steps)
        yield StepResult(step + 1, done.loss, done.figures, done.gradient_norm, rate, done.skipped, in_a_row)


class Done(NamedTuple):
    """What `take_step` reports; all of it stays on the device. See `StepResult`."""

    loss: Tensor
    figures: dict[str, Tensor]
    gradient_norm: Tensor
    skipped: Tensor


def take_step(loop: Loop, parts: Sequence[Any], seed: Seed, rate: float | Tensor) -> Done:
    """Forward, backward, clipping and update. Nothing in it waits for the device, if the optimizer
    `reads_found_inf`. If `seed` and `rate` are device tensors, nothing comes from the host either, and a CUDA
    graph can capture all of it (`execution/engine.py`)."""
    return update(loop, rate, loop.ranks.summed(backward(loop, parts, seed)))


def backward(loop: Loop, parts: Sequence[Any], seed: Seed) -> dict[str, Tensor]:
    """The first half of `take_step`: forward and backward over this rank's parts of a batch; gradients are summed.

    Other ranks' gradients are included if the loss function's model is the one of `Ranks.data_parallel`.

    Returns:
        The figures, and the loss as `LOSS`, summed over the parts.
    """
    if not parts:
        raise ValueError("batches: expected at least one part per step, got none")
    sums: dict[str, Tensor] = {}
    for index, part in enumerate(parts, start=1):
        last = index == len(parts)
        with nullcontext() if last else loop.ranks.locally():  # ranks exchange gradients after the last part
            with loop.autocast:
                loss, figures = loop.loss_function(part, seed)
            loss.backward()
        figures = {**figures, LOSS: loss}
        sums |= {name: value.detach() + sums.get(name, 0) for name, value in figures.items()}
    return sums


def update(loop: Loop, rate: float | Tensor, sums: dict[str, Tensor]) -> Done:
    """The second half of `take_step`: clips the whole batch's gradients, and updates if loss and norm are finite.
    Then all ranks have rank 0's buffers, which is what a checkpoint holds.

    Args:
        sums: what `backward` returned, summed over all ranks.
    """
    figures, optimizer = dict(sums), loop.optimizer
    loss = figures.pop(LOSS)
    gradient_norm = clip_gradients(loop.parameters, loop.clip_norm)
    skipped = ~torch.isfinite(loss + gradient_norm)
    set_learning_rate(optimizer, rate)
    if reads_found_inf(optimizer):
        optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]  # or a later step of the caller's own would heed it
    elif not bool(skipped):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loop.ranks.share_buffers(loop.model)
    return Done(loss, figures, gradient_norm, skipped)


def reads_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` changes nothing where the optimizer's attribute `found_inf` is 1 (see adam.py)."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


class LateNumber:
    """Reads a number off the device without blocking the host: on a GPU, it returns that of the call before.

    Reading it at once would wait until the GPU has finished all queued work, and leave it idle until the
    next step's kernels arrive.
    """

    def __init__(self) -> None:
        self._on_its_way: tuple[Tensor, torch.cuda.Event] | None = None

    def read(self, number: Tensor) -> float:
        """The number; on a GPU that of the call before, at first 0."""
        if not number.is_cuda:
            return float(number)
        before, arrived = self._on_its_way, torch.cuda.Event()
        copy = torch.empty((), device="cpu", pin_memory=True)
        copy.copy_(number, non_blocking=True)
        arrived.record(torch.cuda.current_stream(number.device))  # which need not be the current device
        self._on_its_way = copy, arrived
        if before is None:
            return 0.0
        before[1].synchronize()
        return float(before[0])


class Diverged(FloatingPointError):
    """Too many steps in a row had a loss or gradient that is not finite, or held-out text has no finite loss.

    `step` is the last one taken, counted from 0.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


def stop_if_diverged(in_a_row: Tensor, count: LateNumber, step: int, steps: int) -> None:
    """Ends a run of `steps` steps if it has diverged; called after `step` (from 0), before its result is yielded.

    A run has diverged after `MOST_SKIPPED_STEPS` skipped steps in a row. On a GPU this is noticed one step later,
    because the host reads the count of the step before. A run too short for so many has diverged if it ends in
    skipped steps that are at least half of its steps. Only at the last step does the host wait: no work follows.

    Args:
        in_a_row: as in `StepResult`, on the device.
        count: the reader of `in_a_row`.

    Raises:
        Diverged: with the number of skipped steps.
    """
    if count.read(in_a_row) >= MOST_SKIPPED_STEPS:
        message = f"step {step + 1}: no finite loss and gradient for {MOST_SKIPPED_STEPS} steps in a row"
        raise Diverged(message, step)
    if step + 1 < steps:
        return
    if (at_the_end := int(in_a_row)) >= min(MOST_SKIPPED_STEPS, (steps + 1) // 2):
        message = f"step {step + 1}: no finite loss and gradient in the last {at_the_end} of {steps} steps"
        raise Diverged(message, step)
