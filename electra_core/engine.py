"""Engines: how a training step is carried out. The same mathematics, the same random numbers.

| engine | what it is | where |
|---|---|---|
| `eager` | kernel by kernel, as the code reads | everywhere |
| `static` | the same, in fixed shapes | everywhere; for CPUs that are fast at bf16 |
| `compile` | the model through `torch.compile`, in fixed shapes | pre-training, where a compiler works |
| `graph` | forward, backward, clipping, update: one CUDA graph, replayed | GPUs that run the kernels |

**The static step.** A captured graph replays the same kernels on the same addresses, so nothing in a step may
depend on a value that the host would have to read, and nothing may come from the host but through buffers that
stay where they are: `InputBuffers` hold batch, seed and rate (`static_batch.py` pre-training's, `static_task.py`
fine-tuning's), and `training.take_step` drops a step that is not finite on the device. All of that runs on a CPU
just as well, where the tests compare its losses with the eager engine's; only the capture itself needs a GPU.

**On a CPU that is fast at bf16** oneDNN generates code for every new shape of a bf16 product, 1 to 3 ms each.
With a T of its own in every step that takes longer than the products; in a few fixed shapes it happens once.

**Around it.** While the device is busy with step t, the host prepares step t + 1 in pinned memory and sends it
over a stream of its own. `step_runners.py` carries it out: kernel by kernel, or captured.

**Several processes** (`distributed.py`). Each computes its share of the batch in a shape of its own, and may be
capturing while another one replays. So what a graph holds ends with the backward pass; sums over all processes,
clipping and update, few launches beside the others, follow behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from electra_kernels.attention import KERNEL_HEAD_DIMS
from electra_kernels.dispatch import gpu_problem, launch_problem
from electra_kernels.fast_bf16 import has_fast_bf16
from electra_kernels.rng import fold
from torch import Tensor

from electra_core.distributed import FlatGradients, Ranks
from electra_core.errors import option
from electra_core.input_buffers import InputBuffers
from electra_core.optim import make_capturable
from electra_core.step_runners import GraphRunner, PlainRunner, rehearsed
from electra_core.training import (
    LOSS,
    Done,
    LateNumber,
    Loop,
    StepResult,
    backward,
    stop_if_diverged,
    take_step,
    update,
)

NORM, SKIPPED = "norm of the gradient", "whether it was skipped"
"""Names of two more of a whole step's scalars."""
OLDEST_COMPILED = (7, 0)
"""Capability of the oldest GPUs that torch.compile generates code for."""
log = logging.getLogger("electra_core")


class FixedShapes(Protocol):
    """How a run's batches are filled up: `static_batch.Shapes`, `static_task.TaskShapes`."""

    def inputs(self, parts: Any, pinned: bool) -> Any:
        """`InputBuffers` that hold `parts`, to be filled by their `fill(parts, seed, rate)`."""

    def in_vain(self, parts: Any, pinned: bool) -> Any:
        """Those of the run's largest step, in as many parts, filled so that it changes nothing."""


def choose_engine(
    engine: str, device: torch.device, dtype: torch.dtype | None = None, head_sizes: Collection[int] = (),
    sharded: bool = False,
) -> str:  # fmt: skip
    """The engine to use: what was asked for where it works, else "eager" with the reason logged.

    "auto" is "graph" on GPUs that run the Triton kernels, "static" in bf16 on a CPU that is fast at it, and
    "eager" elsewhere: on a CPU compiling was measured not to pay (docs/performance.md).

    Args:
        dtype: what the run computes in.
        head_sizes: of the models' attention.
        sharded: each process stores a part of the parameters only.
    """
    parts = "each process stores only a part of the model, which eager steps put together" if sharded else None
    problems: dict[str, Callable[[], str | None]] = {
        "eager": lambda: None,
        "graph": lambda: parts or graph_problem(device, dtype, head_sizes),
        "compile": lambda: parts or compile_problem(device),
        "static": lambda: parts,
    }
    if engine == "auto":
        if not problems["graph"]():
            return "graph"
        fast = device.type == "cpu" and dtype == torch.bfloat16 and has_fast_bf16()
        return "static" if fast and not problems["static"]() else "eager"
    if problem := problems[engine]():
        log.warning("%s: %s; using the eager engine instead", option("engine", engine), problem)
        return "eager"
    return engine


def agreed_engine(engine: str, ranks: Ranks) -> str:
    """`engine`, or "eager" on every rank if one rank, whose GPU is another or at fault, takes eager steps.

    Those add gradients up while the backward pass goes on, all others behind it.
    """
    any_eager = bool(ranks.joined(torch.tensor([engine == "eager"])).any())
    if engine == "eager" or not any_eager:
        return engine
    if ranks.first:  # where it is the one, it has said why
        log.warning("%s: another process cannot use it; using the eager engine instead", option("engine", engine))
    return "eager"


def graph_problem(
    device: torch.device, dtype: torch.dtype | None = None, head_sizes: Collection[int] = ()
) -> str | None:
    """Why a step cannot be captured here, or None."""
    widest = max(head_sizes, default=0)
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, the device is {device}"
    if widest > KERNEL_HEAD_DIMS[-1]:
        return (
            f"there is no kernel for attention heads of width {widest}, and its fallback reads lengths on the host"
        )
    if problem := gpu_problem(device, dtype or torch.float32):
        return f"the fallback for the Triton kernels reads lengths on the host ({problem})"
    return None


def compile_problem(device: torch.device) -> str | None:
    """Why `torch.compile` cannot generate code here, or None."""
    if device.type == "cuda":
        if not torch.version.hip and torch.cuda.get_device_capability(device) < OLDEST_COMPILED:
            return f"torch.compile needs a GPU of sm_{''.join(map(str, OLDEST_COMPILED))} or newer"
        return launch_problem(device)  # its code is launched by Triton, too
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler (g++ or clang++), and none was found"
    return None


def static_steps(
    loop: Loop,
    batches: Callable[[int], Sequence[Any]],
    *,
    shapes: FixedShapes,
    device: torch.device,
    capture: bool,
) -> Iterator[StepResult]:
    """`training.training_steps` in fixed shapes.

    Args:
        loop: as there, but its loss is not of `Ranks.data_parallel`'s model: gradients are summed over ranks here.
        batches: step -> the parts of its batch, on the host; of this rank's share.
        shapes: what those batches are filled up to.
        capture: into CUDA graphs, which are replayed.

    Raises:
        Diverged: as `training_steps`.
    """
    if loop.first_step >= loop.steps:
        return
    make_capturable(loop.optimizer, device)
    in_a_row, count = torch.tensor(float(loop.skipped_before), device=device), LateNumber()
    take = (_WholeStep if loop.ranks.size == 1 else _SharedStep)(loop, in_a_row)
    pinned = device.type == "cuda"

    def prepared(step: int, parts: Sequence[Any]) -> InputBuffers:
        inputs = shapes.inputs(parts, pinned)
        inputs.fill(parts, fold(loop.seed, step), loop.schedule(step))
        return inputs

    first = batches(loop.first_step)
    runner: GraphRunner | PlainRunner = PlainRunner(take.captured, device)
    if capture:
        loop.model.train()
        runner = rehearsed(take.captured, shapes.in_vain(first, pinned), device) or runner
        loop.optimizer.zero_grad(set_to_none=True)  # what a broken capture has left
        in_a_row.fill_(loop.skipped_before)
    runner.send(prepared(loop.first_step, first))
    for step in range(loop.first_step, loop.steps):
        loop.model.train()
        rate = loop.schedule(step)
        done = take.finished(runner.run(), rate)
        if step + 1 < loop.steps:
            runner.send(prepared(step + 1, batches(step + 1)))  # while the device is busy
        stop_if_diverged(in_a_row, count, step, loop.steps)
        yield StepResult(
            step + 1, done.loss, done.figures, done.gradient_norm, rate, done.skipped, in_a_row.clone()
        )


@dataclass(frozen=True)
class _WholeStep:
    """The step of the only process, which can be captured as a whole."""

    loop: Loop
    in_a_row: Tensor
    """See `StepResult`; counted here, on the device."""

    def captured(self, inputs: InputBuffers) -> dict[str, Tensor]:
        """What a graph holds."""
        done = take_step(self.loop, inputs.parts, inputs.seed, inputs.rate)
        self.count(done)
        return {LOSS: done.loss, NORM: done.gradient_norm, SKIPPED: done.skipped.float(), **done.figures}

    def finished(self, scalars: dict[str, Tensor], rate: float) -> Done:
        """What is done behind it, with what `captured` returned: copies, in one launch."""
        figures = dict(zip(scalars, torch.stack(list(scalars.values())).unbind()))
        loss, norm, skipped = (figures.pop(name) for name in (LOSS, NORM, SKIPPED))
        return Done(loss, figures, norm, skipped.bool())

    def count(self, done: Done) -> None:
        """Of steps in a row that were skipped."""
        self.in_a_row.copy_(torch.where(done.skipped, self.in_a_row + 1, 0))


class _SharedStep(_WholeStep):
    """The step of one of several processes; see the file's header."""

    @cached_property
    def gradients(self) -> FlatGradients:
        """Of this step, in one piece."""
        return FlatGradients(self.loop.parameters)

    def captured(self, inputs: InputBuffers) -> dict[str, Tensor]:
        """See `_WholeStep`."""
        sums = backward(self.loop, inputs.parts, inputs.seed)
        self.gradients.collect()
        return sums

    def finished(self, scalars: dict[str, Tensor], rate: float) -> Done:
        """See `_WholeStep`."""
        sums = self.loop.ranks.summed(scalars)
        self.gradients.add_up()
        done = update(self.loop, rate, sums)
        self.count(done)
        return done
