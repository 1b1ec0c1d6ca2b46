"""Who carries out a step in fixed shapes (`engine.py`): kernel by kernel, or by replaying CUDA graphs.

The first step of every shape is carried out eagerly (Triton compiles what it has to, the optimizer makes its
state, and the step counts), the second is captured, and from then on it is replayed. The graphs of all shapes
share one pool of memory, because never two of them run at a time. A pool only grows, and what a small shape has
left in pieces no larger one can use, so the largest shape is rehearsed and captured before the first step, in
vain: its loss is NaN, and such a step changes nothing. Beside the pool an eager step needs its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from electra_core.errors import option
from electra_core.input_buffers import InputBuffers

StepFunction = Callable[[Any], dict[str, Tensor]]
"""`InputBuffers` -> scalars, which the next call may overwrite."""
MOST_GRAPHS = 64
"""Captured in one run, as each takes memory for itself; what is beyond goes kernel by kernel. Pre-training has at
most 33 shapes, fine-tuning a few dozen."""
log = logging.getLogger("electra_core")


def rehearsed(step_function: StepFunction, in_vain: InputBuffers, device: torch.device) -> GraphRunner | None:
    """Graphs, with that of the step `in_vain` captured; None where CUDA does not capture the step, with the reason
    logged. (A step in vain changes nothing, and one that is captured is not carried out.)"""
    runner = GraphRunner(step_function, device)
    try:
        runner.rehearse(in_vain)
    except Exception as error:
        cause: BaseException = error
        while cause.__context__ is not None:  # the end of a broken capture raises, too, and hides the cause
            cause = cause.__context__
        if isinstance(cause, torch.cuda.OutOfMemoryError):
            raise cause from None  # kernel by kernel the next step would need as much
        with suppress(Exception):  # torch before 2.14 goes on as if it captured
            torch._C._cuda_endAllocateToPool(device.index or 0, runner.pool)
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        log.warning(
            "%s: a step cannot be captured (%s); launching its kernels one by one instead",
            option("engine", "graph"),
            reason,
        )
        return None
    return runner


class PlainRunner:
    """The static step kernel by kernel; on any device."""

    def __init__(self, step_function: StepFunction, device: torch.device):
        self.step_function, self.device = step_function, device

    def send(self, inputs: InputBuffers) -> None:
        """The next step's input."""
        self.sent = inputs
        if self.device.type != "cpu":
            self.sent = inputs.on(self.device)
            self.sent.copy_(inputs)

    def run(self) -> dict[str, Tensor]:
        """Take the step whose input was sent last."""
        return self.step_function(self.sent)


class GraphRunner:
    """Replays one CUDA graph for each shape."""

    def __init__(self, step_function: StepFunction, device: torch.device):
        self.step_function, self.device = step_function, device
        self.compute, self.copies = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.captured: dict[Hashable, CapturedStep] = {}

    def send(self, inputs: InputBuffers) -> None:
        """The next step's input, in pinned memory; it travels while this step is computed."""
        with torch.cuda.stream(self.copies):
            self.sent = inputs.on(self.device)
            self.sent.copy_(inputs)

    def rehearse(self, inputs: InputBuffers) -> None:
        """Capture a shape by two steps in vain, so that the pool holds it in one piece."""
        for _ in range(2):
            self.send(inputs)
            self.run()

    def run(self) -> dict[str, Tensor]:
        """Take the step whose input was sent last; the caller's stream continues behind it, and the next step
        behind what the caller does with the result."""
        callers = torch.cuda.current_stream(self.device)
        self.compute.wait_stream(callers)
        self.compute.wait_stream(self.copies)
        with torch.cuda.stream(self.compute):
            scalars = self._step()(self.sent)
        for tensor in (self.sent.integers, self.sent.floats):
            tensor.record_stream(self.compute)
        callers.wait_stream(self.compute)
        return scalars

    def _step(self) -> StepFunction:
        key = self.sent.shape
        if key not in self.captured:
            if len(self.captured) == MOST_GRAPHS:
                return self.step_function
            inputs = self.sent.on(self.device)
            self.captured[key] = CapturedStep(self.step_function, inputs, self.compute, self.pool)
        return self.captured[key]


class CapturedStep:
    """One shape's step: eagerly the first time, captured the second time, replayed from then on."""

    def __init__(self, step_function: StepFunction, inputs: InputBuffers, stream: torch.cuda.Stream, pool: Any):
        self.step_function, self.inputs, self.stream, self.pool = step_function, inputs, stream, pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def __call__(self, sent: InputBuffers) -> dict[str, Tensor]:
        """Take the step with what was sent; on the current stream."""
        self.inputs.copy_(sent)
        if not self.warm:
            self.warm = True
            return self.step_function(self.inputs)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # Other threads (a checkpoint's writer) may use the device meanwhile.
            mode = "thread_local"
            with torch.cuda.graph(self.graph, pool=self.pool, stream=self.stream, capture_error_mode=mode):
                self.scalars = self.step_function(self.inputs)
        self.graph.replay()
        return self.scalars
