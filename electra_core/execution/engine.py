"""Engines: ways to carry out a training step, with the same mathematics and the same random numbers.

| engine | what it is | where |
|---|---|---|
| `eager` | operation by operation, as the code reads | everywhere |
| `static` | the same, in fixed shapes | everywhere; for CPUs that are fast at bf16 |
| `compile` | the model through `torch.compile`, in fixed shapes | pre-training, where a compiler works |
| `graph` | forward, backward, clipping, update: one CUDA graph, replayed | GPUs that run the kernels |

**The static step.** A captured graph replays the same kernels on the same addresses. So nothing in a step may
depend on a value that the host would have to read, and input may come from the host only through buffers at fixed
addresses: `InputBuffers` hold batch, seed and rate (`static_batch.py` for pre-training,
`finetuning/static_task.py` for fine-tuning), and `training.take_step` decides on the device whether a step is
finite or skipped. All of this runs on a CPU, too, where tests compare its losses with the eager engine's; only the
capture needs a GPU.

**On a CPU that is fast at bf16**, every new shape of a product costs milliseconds (`filling.py`).

**Overlap.** While the device is busy with step t, the host prepares step t + 1 in pinned memory and sends it
over a separate stream. `step_runners.py` runs the step: kernel by kernel, or as a captured graph.

**Several processes** (`distributed.py`). Each computes its share of the batch in its own shape, and may be
capturing while another one replays. So a graph ends with the backward pass; the sums over all processes, clipping
and the update, few launches in comparison, follow after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from electra_kernels.attention import KERNEL_HEAD_DIMS
from electra_kernels.dispatch import gpu_problem, launch_problem
from electra_kernels.fast_bf16 import has_fast_bf16
from electra_kernels.rng import fold
from torch import Tensor

from electra_core.errors import option
from electra_core.execution.distributed import FlatGradients, Ranks
from electra_core.execution.input_buffers import InputBuffers
from electra_core.execution.step_runners import GraphRunner, PlainRunner, rehearsed
from electra_core.execution.torch_state import buffers_kept
from electra_core.optim import make_capturable
from electra_core.training import (
    LOSS,
    Done,
    LateNumber,
    Loop,
    StepResult,
    backward,
    reads_found_inf,
    stop_if_diverged,
    take_step,
    update,
)

NORM, SKIPPED = "norm of the gradient", "whether it was skipped"
"""Names of two further scalars of a whole step."""
OLDEST_COMPILED = (7, 0)
"""Capability of the oldest GPUs that torch.compile generates code for."""
log = logging.getLogger("electra_core")


class FixedShapes(Protocol):
    """How a run's batches are filled up: `static_batch.Shapes`, `finetuning.static_task.TaskShapes`."""

    def inputs(self, parts: Any, pinned: bool) -> Any:
        """Empty `InputBuffers` for `parts`, to be filled by their `fill(parts, seed, rate)`."""

    def in_vain(self, parts: Any, pinned: bool) -> Any:
        """`InputBuffers` of the run's largest step in as many parts, filled so that the step changes nothing."""


def choose_engine(
    engine: str, device: torch.device, dtype: torch.dtype | None = None, head_sizes: Collection[int] = (),
    sharded: bool = False,
) -> str:  # fmt: skip
    """The engine to use: the requested one if it works here, else "eager", with the reason logged.

    "auto" is "graph" on GPUs that run the Triton kernels, "static" in bf16 on a CPU that is fast at it, and
    "eager" elsewhere: on a CPU, compiling gains too little for what it costs (docs/performance.md).

    Args:
        dtype: the dtype of the run's products.
        head_sizes: widths of the models' attention heads.
        sharded: whether each process stores only a part of the parameters.
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
    """`engine`, or "eager" on every rank if one rank takes eager steps, having a different or faulty GPU.

    Eager steps sum gradients over ranks during the backward pass, all other engines after it.
    """
    any_eager = bool(ranks.joined(torch.tensor([engine == "eager"])).any())
    if engine == "eager" or not any_eager:
        return engine
    if ranks.first:  # a rank that fell back itself has logged why
        log.warning("%s: another process cannot use it; using the eager engine instead", option("engine", engine))
    return "eager"


def graph_problem(device: torch.device, dtype: torch.dtype | None, head_sizes: Collection[int]) -> str | None:
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
        return launch_problem(device)  # Triton launches its code, too
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
        loop: as there, but without `Ranks.data_parallel` around the model: ranks' gradients are summed here.
        batches: step -> this rank's parts of its batch, on the host.
        shapes: the shapes those batches are filled up to.
        capture: whether steps are captured into CUDA graphs and replayed.

    Raises:
        Diverged: as `training_steps`.
        ValueError: an optimizer that cannot skip a step on the device.
    """
    if not reads_found_inf(loop.optimizer):
        raise ValueError(
            "optimizer: expected one that reads found_inf on the device, as steps in fixed shapes need (the "
            f"engines static, compile and graph), got {type(loop.optimizer).__name__}; pass fused=True to "
            "torch's, set _step_supports_amp_scaling = True in one of yours that does (adam.py), or use "
            "training_steps"
        )
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
        # The optimizer skips a dummy step, but a forward pass writes its NaN into buffers.
        with buffers_kept(loop.model) as replaced:
            rehearse = partial(rehearsed, take.captured, shapes.in_vain(first, pinned), device)
            runner = loop.ranks.together(rehearse) or runner
            if isinstance(runner, GraphRunner) and (names := replaced()):  # replays would all read the old tensor
                log.warning(
                    "%s: the forward pass makes the buffer %s anew, and a graph can only write into it (copy_); "
                    "launching kernels one by one instead, as with %s",
                    option("engine", "graph"), names[0], option("engine", "static"),
                )  # fmt: skip
                runner = PlainRunner(take.captured, device)
        loop.optimizer.zero_grad(set_to_none=True)  # left over from a failed capture
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
    """A single process's step, which can be captured as a whole."""

    loop: Loop
    in_a_row: Tensor
    """See `StepResult`; counted here, on the device."""

    def captured(self, inputs: InputBuffers) -> dict[str, Tensor]:
        """The part of the step that a graph holds."""
        done = take_step(self.loop, inputs.parts, inputs.seed, inputs.rate)
        self.count(done)
        return {LOSS: done.loss, NORM: done.gradient_norm, SKIPPED: done.skipped.float(), **done.figures}

    def finished(self, scalars: dict[str, Tensor], rate: float) -> Done:
        """What follows the graph: copies what `captured` returned, in one launch."""
        figures = dict(zip(scalars, torch.stack(list(scalars.values())).unbind()))
        loss, norm, skipped = (figures.pop(name) for name in (LOSS, NORM, SKIPPED))
        return Done(loss, figures, norm, skipped.bool())

    def count(self, done: Done) -> None:
        """Updates the number of skipped steps in a row."""
        self.in_a_row.copy_(torch.where(done.skipped, self.in_a_row + 1, 0))


class _SharedStep(_WholeStep):
    """The step of one among several processes; see the file's header."""

    @cached_property
    def gradients(self) -> FlatGradients:
        """This step's gradients, in one contiguous tensor."""
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
