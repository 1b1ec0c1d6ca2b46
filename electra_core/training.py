"""One step, one loop: what pre-training and fine-tuning share.

`training_steps` is a generator: it does an optimizer step and hands its figures to the caller, whose own
loop logs, evaluates and saves. There are no callbacks and no trainer object; a run is read top to bottom
in `pretrain.py` and `finetune.py`.

Everything random in a step is decided by `fold(seed, step)`, so step t of a resumed run is step t of the
uninterrupted one.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
from electra_kernels.rng import Seed, fold
from torch import Tensor, nn

from electra_core.distributed import Ranks
from electra_core.optim import clip_gradients, set_learning_rate

Batch = TypeVar("Batch")
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


class Diverged(FloatingPointError):
    """Too many steps in a row had a loss or gradient that is not finite; `step` counts from 0."""

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
) -> Iterator[StepResult]:
    """Train from `first_step` up to `steps`, handing out each step's figures.

    Args:
        model: whose gradients are clipped; put in training mode here.
        loss_function: (batch, seed) -> (loss, figures). Losses of a step's parts add up to the step's loss.
        batches: step -> the parts of its batch, a pure function of the step.
        optimizer: one that reads `found_inf` (see optim.py): torch's fused ones and ours.
        schedule: step (from 0) -> learning rate.
        autocast: context of the forward pass, for mixed precision.
        ranks: the processes that train together, each with parts of its own; their gradients and figures add up.

    Raises:
        Diverged: after `MOST_SKIPPED_STEPS` steps in a row without a finite loss and gradient; on a GPU one step
            later, because the host reads the count of the step before.
        ValueError: an optimizer that cannot drop a step.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"optimizer: expected one that reads found_inf (fused=True), got {type(optimizer).__name__}"
        )
    autocast, ranks = autocast or nullcontext(), ranks or Ranks()
    parameters = [p for p in model.parameters() if p.requires_grad]
    in_a_row, count = torch.zeros((), device=parameters[0].device), LateNumber()
    for step in range(first_step, steps):
        model.train()
        parts, key, rate = batches(step), fold(seed, step), schedule(step)
        done = take_step(parameters, optimizer, loss_function, parts, key, rate, clip_norm, autocast, ranks)
        in_a_row = torch.where(done.skipped, in_a_row + 1, 0)
        if count.read(in_a_row) >= MOST_SKIPPED_STEPS:
            message = f"step {step + 1}: no finite loss and gradient for {MOST_SKIPPED_STEPS} steps in a row"
            raise Diverged(message, step)
        yield StepResult(step + 1, done.loss, done.figures, done.gradient_norm, rate, done.skipped)


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
    loss, figures = _backward_all(loss_function, parts, seed, autocast, ranks)
    gradient_norm = clip_gradients(parameters, clip_norm)
    skipped = ~torch.isfinite(loss + gradient_norm)
    set_learning_rate(optimizer, rate)
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
    optimizer.step()
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
        arrived.record()
        self._on_its_way = copy, arrived
        if before is None:
            return 0.0
        before[1].synchronize()
        return float(before[0])


def _backward_all(
    loss_function: Callable[[Batch, Any], tuple[Tensor, dict[str, Tensor]]],
    parts: Sequence[Batch],
    seed: Seed,
    autocast: AbstractContextManager[Any],
    ranks: Ranks,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward over the parts of a batch; gradients, losses and figures added up over all ranks."""
    sums: dict[str, Tensor] = {}
    for index, part in enumerate(parts, start=1):
        with ranks.locally() if index < len(parts) else nullcontext():  # other ranks hear of the last part's sum
            with autocast:
                loss, figures = loss_function(part, seed)
            loss.backward()
        figures = {**figures, "": loss}
        sums = {name: value.detach() + sums.get(name, 0) for name, value in figures.items()}
    sums = ranks.summed(sums)
    return sums.pop(""), sums


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The compute dtype for "auto" | "bf16" | "fp32".

    "auto" takes bf16 where it is the faster one: on a GPU that has it, and on a processor with AMX tiles.
    Processors with AVX-512 BF16 alone multiply bf16 at half the speed of fp32 (measured,
    docs/decisions.md).
    """
    if precision == "auto":
        has_tiles = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        has_gpu_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_tiles or has_gpu_bf16 else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast_context(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision: parameters stay fp32, products are done in `dtype`."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def resolve_device(device: str) -> torch.device:
    """ "auto" | "cpu" | "cuda" | "cuda:1" -> a device that exists; several processes get a GPU each.

    Raises:
        electra_core.errors.UserError: CUDA asked for where there is none, or too little of it.
    """
    from electra_core.errors import UserError

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this torch ({torch.__version__}) sees no CUDA device")
    if device == "cuda" and (local_rank := os.environ.get("LOCAL_RANK")) is not None:
        if int(local_rank) >= torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node: this machine has {torch.cuda.device_count()} GPUs, one per process"
            )
        device = f"cuda:{local_rank}"
    try:
        return torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: expected auto, cpu or cuda") from None


class StopRequest(AbstractContextManager["StopRequest"]):
    """Notes SIGINT, SIGTERM, SIGUSR1 or a time limit, so that the loop can save and leave.

    A second signal ends the process at once, by Python's own handler; what was saved stays whole. Under torchrun a
    scheduler's signal comes twice, from it and from torchrun, so there one within `SAME_SIGNAL` seconds of the
    first is the first.

    Args:
        ranks: the processes that train together; `agreed` is what they all stop for.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    REASONS = ("time limit", *(number.name for number in SIGNALS))
    SAME_SIGNAL = 5.0

    def __init__(self, max_minutes: float | None = None, ranks: Ranks | None = None):
        self.reason: str | None = None
        self.ranks = ranks or Ranks()
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._previous: dict[signal.Signals, Any] = {}
        self._signalled: float | None = None
        self._told: Callable[[], Tensor] | None = None

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: signals are the caller's affair
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = self.REASONS[0]
        return self.reason is not None

    def agreed(self) -> str | None:
        """Why to stop, the same on all ranks at the same call; None to go on.

        With several ranks, each call tells the others what this one knows and hears what they all knew at the call
        before, so that nobody waits. A single process hears itself at once.
        """
        if self.ranks.size == 1:
            return self.reason if self else None
        wanted = [float(bool(self) and self.reason == reason) for reason in self.REASONS]
        before, self._told = self._told, self.ranks.later_sum(torch.tensor(wanted))
        counts = before().tolist() if before else []
        return next((reason for reason, count in zip(self.REASONS, counts) if count), None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled is None:
            self._signalled, self.reason = now, signal.Signals(number).name
        elif "TORCHELASTIC_RUN_ID" not in os.environ or now - self._signalled > self.SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
