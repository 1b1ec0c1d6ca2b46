"""Memory of a pre-training step: predicted, measured, and made to fit.

The prediction is a trace on tensors without values (`fake_step.py`), so it needs neither the memory nor the
device that it predicts for. It leaves out temporary memory inside kernels, the CUDA context, the allocator's
fragmentation and libraries' workspaces; `MARGIN` is reserved for those.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from electra_kernels.dispatch import gpu_problem
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.errors import UserError, place_of
from electra_core.execution import torchrun
from electra_core.execution.fake_step import StepTrace, built, full_shape, loop_of, trace_step
from electra_core.execution.host_memory import available_bytes
from electra_core.execution.placement import resolve_precision
from electra_core.execution.static_batch import StaticInputs
from electra_core.optim import state_tensors
from electra_core.training import take_step

MARGIN = 0.15
"""Fraction of the free memory that the choice of parts leaves unused."""


def peak_with_graphs(trace: StepTrace) -> int:
    """Peak bytes of a run whose steps are captured: the memory of a captured step stays with its graph, and the
    first step of every shape, which runs eagerly, needs the same amount besides."""
    return 2 * trace.peak - trace.weights - trace.optimizer


class Way(NamedTuple):
    """How a step is computed, as far as it matters for memory."""

    kernels: str
    """As `electra_kernels.use` takes it: "triton" on a GPU that runs the kernels, "reference" on others."""
    precision: torch.dtype
    """The dtype of products."""


def way_of(device: torch.device, precision: str) -> Way:
    """How this machine computes on `device`; for a GPU it does not have, how one that runs the kernels would.

    Args:
        precision: auto | bf16 | fp32.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_available():
        dtype = resolve_precision(precision, device)
        return Way("triton" if gpu_problem(device, dtype) is None else "reference", dtype)
    half = precision == "bf16" or (on_gpu and precision == "auto")
    return Way("triton" if on_gpu else "auto", torch.bfloat16 if half else torch.float32)


def predict(
    encoder: EncoderConfig, config: PretrainConfig, sequences: int, length: int, device: torch.device
) -> StepTrace:
    """The trace of a step as `device` would compute it (`way_of`)."""
    return trace_step(encoder, config, sequences, length, **way_of(device, config.precision)._asdict())


def measure_on_cpu(encoder: EncoderConfig, config: PretrainConfig, sequences: int, length: int) -> int:
    """Peak bytes that PyTorch's CPU allocator had handed out during a step, weights included.

    The second of two steps is measured, by the events that the allocator reports to PyTorch's profiler.
    """
    config = replace(config, max_length=length)
    model, optimizer = built(encoder, config)
    inputs = StaticInputs(full_shape(sequences, length, config.max_predictions), 1)
    _fill_with_words(inputs, encoder.vocab_size)
    precision = torch.bfloat16 if config.precision == "bf16" else torch.float32
    loop = loop_of(model, optimizer, config.clip_norm, precision)

    take_step(loop, inputs.parts, inputs.seed, inputs.rate)
    state = state_tensors(optimizer).values()
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *state))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        take_step(loop, inputs.parts, inputs.seed, inputs.rate)
    kineto = profile.profiler.kineto_results.events()
    events = sorted((event.start_ns(), event.nbytes()) for event in kineto if event.name() == "[memory]")
    now = most = 0
    for _, size in events:
        now += size
        most = max(most, now)
    return held + most


def _fill_with_words(inputs: StaticInputs, vocabulary: int) -> None:
    """Fills in full sequences of varied tokens; the first positions of each are masked."""
    shape, part = inputs.shape, inputs.parts[0]
    inputs.floats.fill_(1.0)
    inputs.integers.zero_()
    positions_T = torch.arange(shape.tokens) % shape.max_seqlen
    part.tokens.input_ids_T.copy_(torch.arange(shape.tokens) % vocabulary)
    part.masked_ids_T.copy_(part.tokens.input_ids_T)
    part.tokens.position_ids_T.copy_(positions_T)
    part.tokens.cu_seqlens.copy_(torch.arange(shape.sequences + 1) * shape.max_seqlen)
    masked = shape.masked // shape.sequences
    part.masked_positions_M.copy_((positions_T < masked).nonzero().squeeze(-1))
    assert part.token_weights_T is not None and part.masked_weights_M is not None
    part.token_weights_T.fill_(1.0 / shape.tokens)
    part.masked_weights_M.fill_(1.0 / shape.masked)


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that this process may take on `device` now; of main memory, its share among the processes
    that torchrun started on this machine.

    Raises:
        UserError: the system does not report it (macOS does not).
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what an earlier run in this process has left to torch's allocator is free, too
        unused, total = torch.cuda.mem_get_info(device)
        limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return min(unused, limit - torch.cuda.memory_reserved(device))
    if (free := available_bytes()) is None:
        raise UserError("accumulate: this system does not report its free memory; give a number above 0")
    return free // torchrun.local_size()


def fitting_parts(
    encoder: EncoderConfig, config: PretrainConfig, device: torch.device, processes: int, engine: str = "eager",
    free: int | None = None,
) -> int:  # fmt: skip
    """The smallest number of parts with which a process's share of a batch fits into `free` bytes on the device.

    Args:
        engine: how steps are carried out (`engine.py`).

    Raises:
        UserError: not even one sequence fits; an objective of one's own whose step cannot be traced.
    """
    free = free_bytes(device) if free is None else free
    share = config.batch_size // processes
    for parts in (parts for parts in range(1, share + 1) if share % parts == 0):
        try:
            trace = predict(encoder, config, share // parts, config.max_length, device)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UserError(
                f"accumulate: the memory of a step that reads values from the device (at {place_of(error)}) "
                "cannot be predicted; give a number above 0"
            ) from None
        needed = peak_with_graphs(trace) if engine == "graph" else trace.peak
        if processes > 1 and engine != "eager":
            needed += trace.gradients  # a second copy of all, in one piece (`FlatGradients`)
        if needed <= free * (1 - MARGIN):
            return parts
    raise UserError(
        f"accumulate: a step of one sequence of {config.max_length} tokens needs {needed / 2**30:.2f} GiB; "
        f"{free / 2**30:.2f} GiB are free on {device}, of which {MARGIN:.0%} stay unused; try --recompute"
    )


def summary(trace: StepTrace, graphs: bool = False) -> dict[str, Any]:
    """A trace's memory, in bytes, as `electra info --memory --json` prints it; with `graphs`, also the peak with
    captured steps."""
    facts = {
        "tokens": trace.tokens,
        "weights": trace.weights,
        "gradients": trace.gradients,
        "optimizer": trace.optimizer,
        "kept_for_backward": trace.kept,
        "kept_bytes_per_token": round(trace.activations / trace.tokens),
        "predicted_peak": trace.peak,
    }
    return facts | {"predicted_peak_with_graphs": peak_with_graphs(trace)} if graphs else facts
