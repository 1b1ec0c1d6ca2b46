"""Timing shared by the kernel benchmarks: cold caches, medians, memory, ceilings, and the machine.

**Correct first, then fast.** Contenders are compared with a reference on the very inputs that are timed. One that
computes something else is not timed, and the command ends with exit status 1.
**Device time.** Before every repetition the L2 cache is filled with other data (read, so that nothing has to be
written back during the measurement), and a kernel that only waits keeps the GPU busy until the host has submitted
the repetition. Device events around it then measure the GPU and not the interpreter. The time that the host takes
to submit a call is reported separately. A stream's queue holds about 1,024 launches; beyond that the host waits in
the middle of a call and the events would measure the host. So calls that take long to submit are captured as a
CUDA graph and its replay is timed; if that is impossible, the row says that it shows the host's time. Results are
the median, the 10th and 90th percentile, and peak memory beyond the inputs. Slow contenders are repeated less
often, so that a benchmark takes minutes.
**Ceiling.** `of ceiling` is the least time for the operation (its unavoidable bytes or its matrix products,
whichever takes longer, at the rates of a large copy and of a large bf16 product of random numbers on the same GPU
in the same run), divided by the measured time.

Not run on a GPU so far. On a CPU (tiny shapes, wall clock) the commands only prove that they work; their figures
say nothing about the kernels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from electra_kernels import mlm_head_reference, sample_replace_reference, use
from torch import Tensor

from benchmarks.harness import deciles, use_device
from benchmarks.kernel_report import (
    Ceilings,
    Mismatch,
    Result,
    Timing,
    clocks_under_load,
    environment,
    failed,
    keep,
    require_device,
)
from electra_core.execution.capture import capturing

COLD_BYTES = 256 << 20  # at least twice the L2 cache of any GPU that this runs on (H200: 60 MB, B200: 126 MB)
SECONDS = 0.5  # for all repetitions of one contender
QUEUE_SECONDS = 3e-3
"""Longest submission that surely fits into a stream's queue: 1,000 launches of at least 3 us each."""
REPLAYED, HOST_BOUND = "replay of a CUDA graph", "host-bound: more launches than the queue takes, not captured"
CLOCK_HZ = 2e9  # no GPU's clock is much faster, so a wait of so many cycles is not too short
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Work:
    """An operation's unavoidable work: bytes read and written, and the operations of its matrix products."""

    bytes: float
    operations: float = 0.0


# ---------------------------------------------------------------- measuring


def measure(function: Callable[..., Any], inputs: Inputs, repetitions: int) -> Timing:
    """Times `function(*inputs)`; on a GPU at least 3 times, with cold caches."""
    if not _on_gpu(inputs):
        function(*inputs)
        return _timing([_wall(function, inputs) for _ in range(repetitions)], None, None)
    function(*inputs)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    function(*inputs)
    torch.cuda.synchronize()
    whole, peak = time.perf_counter() - start, (torch.cuda.max_memory_allocated() - before) / 2**20
    repetitions = max(3, min(repetitions, int(SECONDS / whole)))
    submit = wait = min(_submission(function, inputs) for _ in range(min(5, repetitions)))
    note = ""
    if submit > QUEUE_SECONDS:
        replay = _captured(function, inputs)
        function, note = (function, HOST_BOUND) if replay is None else (replay, REPLAYED)
        wait = min(_submission(function, inputs) for _ in range(2)) if replay else submit
    cold = torch.ones(COLD_BYTES // 4, device=next(v.device for v in inputs if isinstance(v, Tensor)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for first, last in events:
        cold.amax()
        torch.cuda._sleep(int(1.5 * min(wait, 0.1) * CLOCK_HZ))
        first.record()
        function(*inputs)
        last.record()
    torch.cuda.synchronize()
    return _timing([first.elapsed_time(last) for first, last in events], peak, 1e3 * submit, note)


def _on_gpu(inputs: Inputs) -> bool:
    return any(isinstance(value, Tensor) and value.is_cuda for value in inputs)


def _submission(function: Callable[..., Any], inputs: Inputs) -> float:
    """Seconds until the call returns to the host."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function(*inputs)
    return time.perf_counter() - start


def _captured(function: Callable[..., Any], inputs: Inputs) -> Callable[..., Any] | None:
    """Replay of a captured call on the same inputs; None if it cannot be captured.

    A call that waits for the device is not tried: every capture that fails has to be cleaned up after."""
    try:
        _without_waiting(function, inputs)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, torch.cuda.graph_pool_handle()):
            function(*inputs)
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:
        require_device("the capture of a CUDA graph", error)
        return None
    return lambda *_: graph.replay()


def _without_waiting(function: Callable[..., Any], inputs: Inputs) -> None:
    """Calls the function; raises RuntimeError where it waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _timing(times: list[float], peak: float | None, submit: float | None, note: str = "") -> Timing:
    spread = deciles(times)
    return Timing(spread.median, spread.low, spread.high, peak, submit, note)


def _wall(function: Callable[..., Any], inputs: Inputs) -> float:
    start = time.perf_counter()
    function(*inputs)
    return (time.perf_counter() - start) * 1e3


def ceilings(device: str) -> Ceilings | None:
    """The ceilings, measured on this GPU; None on a CPU, where they would mean nothing."""
    if device == "cpu":
        return None
    source = torch.empty(1 << 30, dtype=torch.int8, device=device).random_()
    copy = measure(lambda a, b: b.copy_(a), (source, torch.empty_like(source)), 20)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = measure(torch.mm, (a, b), 20)
    return Ceilings(2e3 * source.numel() / copy.milliseconds, 2e3 * 8192**3 / product.milliseconds)


def run(
    case: str,
    name: str,
    function: Callable[..., Any],
    inputs: Inputs,
    options: argparse.Namespace,
    work: Work,
    note: str = "",
) -> Result:
    """Measures one contender and saves its result. If it runs out of memory or refuses the shape, the result says
    so.

    Raises:
        SystemExit: afterwards the GPU can no longer be used.
    """
    try:
        timing = measure(function, inputs, options.repetitions)
    except Exception as error:  # a peer may raise anything, and must not end the benchmark
        result = keep(failed(case, name, error), options)
        require_device(f"{case}, {name}", error)
        torch.cuda.empty_cache()
        return result
    seconds, best = timing.milliseconds * 1e-3, options.ceilings
    floor = best and max(work.bytes / best.bytes_per_second, work.operations / best.operations_per_second)
    share, rates = None if floor is None else floor / seconds, (work.bytes / 1e9, work.operations / 1e12)
    share = None if timing.note == HOST_BOUND else share
    note = ", ".join(filter(None, (note, timing.note)))
    return keep(Result(case, name, timing, *(rate / seconds for rate in rates), share, note), options)


@contextmanager
def one_case(case: str, options: argparse.Namespace) -> Iterator[None]:
    """Inside are a case's tensors, reference and contenders. If they do not fit, or the reference cannot be
    computed, a result says so, and the cases that follow are measured.

    Raises:
        SystemExit: afterwards the GPU can no longer be used.
    """
    try:
        yield
    except Exception as error:
        keep(failed(case, "ours", error), options)
        require_device(case, error)
    if options.device != "cpu":
        torch.cuda.empty_cache()


def compare(
    case: str,
    contenders: dict[str, Callable[..., Any]],
    inputs: Inputs,
    options: argparse.Namespace,
    work: Work,
) -> list[Result]:
    """Measures every contender on the same inputs."""
    return [run(case, name, function, inputs, options, work) for name, function in contenders.items()]


def agreeing(
    case: str,
    contenders: dict[str, Callable[..., Any]],
    wanted: Sequence[Tensor],
    inputs: Inputs,
    options: argparse.Namespace,
    tolerance: float,
) -> dict[str, Callable[..., Any]]:
    """The contenders that compute `wanted`. For the others, a result is saved that says how far off they are, or
    why they cannot run.

    Raises:
        SystemExit: after one of them the GPU can no longer be used.
    """
    found = {}
    for name, function in contenders.items():
        try:
            same(name, function(*inputs), wanted, tolerance)
            found[name] = function
        except Exception as error:
            keep(failed(case, name, error), options)
            require_device(f"{case}, {name}", error)
    return found


def with_gradients(function: Callable[..., Any], leaves: int) -> Callable[..., tuple[Tensor, ...]]:
    """`function`'s value followed by the gradients of its first `leaves` arguments.

    If the value is not a scalar, its gradient is the argument after the leaves. Anything that the function returns
    besides its value (a draw) is computed but not returned.
    """

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        results = function(*inputs)
        value: Tensor = results if isinstance(results, Tensor) else results[0]
        incoming = inputs[leaves] if value.dim() else None
        return value.detach(), *torch.autograd.grad(value, inputs[:leaves], incoming)

    return run


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile, compiled for each shape, because code for dynamic shapes would be slower."""
    torch._dynamo.reset()  # otherwise the shapes together reach a limit, beyond which nothing is compiled
    return torch.compile(function, dynamic=False)


def by_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the kernels, on a GPU: where they cannot run it fails, instead of timing the twins."""

    def run(*inputs: Any) -> Any:
        with use("triton") if _on_gpu(inputs) else nullcontext():
            return function(*inputs)

    return run


def twin(function: Callable[..., Any], chunked: bool = True) -> Callable[..., Any]:
    """`function` with the twins in plain PyTorch.

    Args:
        chunked: False takes all rows of logits at once. torch.compile would unroll the loops over chunks, which
            takes longer than a GPU is lent for.
    """

    def run(*inputs: Any) -> Any:
        with use("reference"), nullcontext() if chunked else _one_chunk():
            return function(*inputs)

    return run


@contextmanager
def _one_chunk() -> Iterator[None]:
    with (
        mock.patch.object(mlm_head_reference, "CHUNK_ELEMENTS", 1 << 40),
        mock.patch.object(sample_replace_reference, "CHUNK_ELEMENTS", 1 << 40),
        mock.patch.object(sample_replace_reference, "GPU_CHUNK_ELEMENTS", 1 << 40),
    ):
        yield


def same(name: str, got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    """Raises Mismatch unless two contenders' results agree, relative to each result's largest value."""
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        limit = tolerance * max(b.abs().max().item(), 1e-6)
        error = (a.double() - b.double()).abs().max().item()
        if not error <= limit:
            raise Mismatch(f"{name}: result {index} differs by {error:.3g} (allowed {limit:.3g})")


# ---------------------------------------------------------------- command line


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments all kernel benchmarks share."""
    options = argparse.ArgumentParser(description=description.partition("\n")[0])
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--repetitions", type=int, default=None, help="timed runs (default: 100; on a CPU 3)")
    options.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                         help="include torch.compile contenders (default: on a GPU)")  # fmt: skip
    options.add_argument("--out", type=Path, help="write the results here as JSON, with GPU, clocks and versions")
    return options


def settle(options: argparse.Namespace) -> argparse.Namespace:
    """Fills the defaults that depend on the device, and measures its ceilings."""
    use_device(torch.device(options.device))
    on_gpu = options.device != "cpu"
    options.repetitions = options.repetitions or (100 if on_gpu else 3)
    options.compile = on_gpu if getattr(options, "compile", None) is None else options.compile
    options.results, options.ceilings, clocks = [], None, {}
    with suppress(torch.cuda.OutOfMemoryError):  # on a small or shared GPU; the results are worth more
        clocks = clocks_under_load(options.device) if on_gpu else {}
        options.ceilings = ceilings(options.device)
    options.environment = environment(options.device, clocks)
    return options
