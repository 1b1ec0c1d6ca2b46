"""Runs steps in fixed shapes (`engine.py`): kernel by kernel, or by replaying CUDA graphs.

The first step of every shape runs eagerly (Triton compiles its kernels, the optimizer creates its
state, and the step counts), the second is captured, and from then on the graph is replayed. The graphs of all
shapes share one memory pool, because no two of them run at the same time. A pool only grows, and a larger shape
cannot use the pieces left by a smaller one, so the largest shape is rehearsed and captured before the first step
with a dummy step: its loss is NaN, so it changes nothing. An eager step needs memory of its own besides the pool.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from electra_kernels.dispatch import numbered
from torch import Tensor

from electra_core.errors import first_line, option, place_of
from electra_core.execution.capture import capturing
from electra_core.execution.input_buffers import InputBuffers

StepFunction = Callable[[Any], dict[str, Tensor]]
"""`InputBuffers` -> scalars, which the next call may overwrite."""
MOST_GRAPHS = 64
"""Maximum number of graphs in a run, as each takes memory of its own; further shapes run kernel by kernel.
Pre-training has at most 33 shapes, fine-tuning a few dozen."""
log = logging.getLogger("electra_core")


def rehearsed(step_function: StepFunction, in_vain: InputBuffers, device: torch.device) -> GraphRunner | None:
    """A `GraphRunner` that has captured the dummy step `in_vain`; None, with the reason logged, if CUDA cannot
    capture it. (The dummy step changes nothing, and a step is not executed while it is captured.)"""
    runner, handled = GraphRunner(step_function, device), sys.exc_info()[1]
    try:
        runner.rehearse(in_vain)
        return runner
    except Exception as error:
        cause = _first_cause(error, handled)
    try:
        if isinstance(cause, torch.cuda.OutOfMemoryError):
            raise cause  # kernel by kernel, the next step would need as much
        log.warning(
            "%s: a step cannot be captured (%s, at %s); launching its kernels one by one instead, as with %s",
            option("engine", "graph"),
            first_line(cause),
            place_of(cause),
            option("engine", "static"),
        )
        return None
    finally:
        del cause  # with this frame it would form a cycle, and keep the step's tensors on the GPU


def _first_cause(error: BaseException, handled: BaseException | None) -> BaseException:
    """What led to `error`: ending a failed capture raises, too, and hides the cause. `handled` is no part of it:
    an earlier run's error, if a script goes on in its `except`."""
    while error.__context__ is not None and error.__context__ is not handled:
        error = error.__context__
    return error


class PlainRunner:
    """Runs static steps kernel by kernel, on any device."""

    def __init__(self, step_function: StepFunction, device: torch.device):
        self.step_function, self.device = step_function, device

    def send(self, inputs: InputBuffers) -> None:
        """Sets the next step's input."""
        self.sent = inputs
        if self.device.type != "cpu":
            self.sent = inputs.on(self.device)
            self.sent.copy_(inputs)

    def run(self) -> dict[str, Tensor]:
        """Takes the step whose input was sent last."""
        return self.step_function(self.sent)


def streams_of(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The streams on which this thread computes and copies on a GPU, the same for all of its runs.

    For every stream torch keeps workspaces of cuBLAS until the process ends, 32 MiB each on an H100, and what its
    allocator has freed on one stream serves no other. So a fine-tuning's seeds share theirs.
    """
    whose = device, threading.get_ident()
    if whose not in _streams:
        _streams[whose] = torch.cuda.Stream(device), torch.cuda.Stream(device)
    return _streams[whose]


_streams: dict[tuple[torch.device, int], tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}


class GraphRunner:
    """Replays one CUDA graph for each shape."""

    def __init__(self, step_function: StepFunction, device: torch.device):
        self.step_function, self.device = step_function, device
        self.compute, self.copies = streams_of(numbered(device))
        self.pool = torch.cuda.graph_pool_handle()
        self.captured: dict[Hashable, CapturedStep] = {}

    def send(self, inputs: InputBuffers) -> None:
        """Sets the next step's input, in pinned memory; it is copied while this step is computed."""
        with torch.cuda.stream(self.copies):
            self.sent = inputs.on(self.device)
            self.sent.copy_(inputs)

    def rehearse(self, inputs: InputBuffers) -> None:
        """Captures a shape with two dummy steps, so that the pool holds it in one piece."""
        for _ in range(2):
            self.send(inputs)
            self.run()

    def run(self) -> dict[str, Tensor]:
        """Takes the step whose input was sent last; the caller's stream waits for it, and the next step
        waits for what the caller does with the result."""
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
        """Takes the step with the input `sent`, on the current stream."""
        self.inputs.copy_(sent)
        if not self.warm:
            self.warm = True
            return self.step_function(self.inputs)
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, self.pool, self.stream):
                self.scalars = self.step_function(self.inputs)
            self.graph = graph
        self.graph.replay()
        return self.scalars
