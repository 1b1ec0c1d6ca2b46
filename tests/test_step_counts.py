"""What a step launches, moves and keeps, compared with committed counts; independent of the machine's speed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from electra_kernels import use
from tiny_steps import CONFIG, ENCODER
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import bench_step
from electra_core.config import PRESETS
from electra_core.execution.fake_step import (
    Recorder,
    built,
    full_shape,
    loop_of,
    multi_tensor_launches,
    trace_step,
)
from electra_core.execution.static_batch import StaticInputs
from electra_core.training import take_step

COUNTS = Path(__file__).parents[1] / "benchmarks" / "results" / "step_counts_small.json"


def test_a_step_launches_moves_and_keeps_no_more_than_was_committed() -> None:
    """After an improvement: python -m benchmarks.bench_step --batch 128 --no-timing --json <the file>."""
    committed = json.loads(COUNTS.read_text(encoding="utf-8"))
    preset = PRESETS["small"]
    trace = trace_step(preset.discriminator, preset.pretrain, 128, 128)
    assert trace.total_launches <= committed["launches"]
    assert trace.total_traffic <= 1.01 * committed["moved_bytes"]
    assert trace.activations / trace.tokens <= 1.01 * committed["kept_bytes_per_token"]
    assert trace.peak <= 1.01 * committed["predicted_peak_bytes"]


@pytest.mark.parametrize("optimizer", ["electra-adam", "adamw", "muon"])
def test_nothing_in_a_static_step_waits_for_the_device_or_the_host(optimizer: str) -> None:
    """No value is read, and no number from the host becomes a tensor: what CUDA graphs ask for."""
    config = replace(CONFIG, optimizer=optimizer)
    with FakeTensorMode(), use("triton"):
        loop = loop_of(*built(ENCODER, config), clip_norm=1.0, precision=torch.bfloat16)
        inputs = StaticInputs(full_shape(8, 24, 3), 1)
        take_step(loop, inputs.parts, inputs.seed, inputs.rate)  # makes the optimizer's state
        with Recorder() as recorder:
            take_step(loop, inputs.parts, inputs.seed, inputs.rate)
    assert recorder.waits == []


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_stages_are_charged_between_their_boundaries(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU between events that are read after the last of them."""
    now, waited = itertools.count(), []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing and not waited

        def record(self) -> None:
            self.at = next(now)

        def elapsed_time(self, end: Event) -> float:
            assert waited
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    monkeypatch.setattr(bench_step.time, "perf_counter", lambda: next(now))
    clock = bench_step.StageClock(torch.device(kind))
    for stage in ("forward", "backward", "forward", "end"):
        clock.stage = stage
    assert clock.stage == "end" and clock.seconds() == {"losses": 1, "forward": 2, "backward": 1}


def test_a_recorder_sees_what_waits() -> None:
    with Recorder() as recorder:
        torch.tensor(3.0)
        torch.ones(2).sum().item()
    assert "aten::lift_fresh" in recorder.waits and "aten::_local_scalar_dense" in recorder.waits


def test_the_model_is_one_graph_for_torch_compile() -> None:
    """fullgraph=True raises at the first break; the kernels are operators that the compiler passes on."""
    torch._dynamo.reset()
    counters.clear()
    model, _ = built(ENCODER, CONFIG)
    inputs = StaticInputs(full_shape(4, 8, 1), 1)
    inputs.integers.zero_()
    inputs.floats.fill_(0.1)
    part = inputs.parts[0]
    part.tokens.cu_seqlens.copy_(torch.arange(5) * 8)
    part.masked_positions_M.copy_(torch.arange(4) * 8)
    torch.compile(model, backend="eager", fullgraph=True)(part, inputs.seed).loss.backward()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    ("operation", "bytes_moved"),
    {
        "reads two, writes one": (lambda a, b: a + b, 3 * 4000),
        "reads and writes in place": (lambda a, b: a.add_(b), 3 * 4000),
        "overwrites": (lambda a, b: a.copy_(b), 2 * 4000),
        "fills": (lambda a, b: a.zero_(), 4000),
        "looks at": (lambda a, b: a.view(10, 100), 0),
        "takes rows": (
            lambda a, b: torch.nn.functional.embedding(torch.tensor([1, 3]), a.view(100, 10)),
            2 * 80 + 16,
        ),
        "repeats": (lambda a, b: a[:1].expand(1000) + b, 4 + 2 * 4000),
        "lists": (lambda a, b: torch._foreach_add_([a, b], [b, a]), 6 * 4000),
    }.values(),
    ids=range(8),
)
def test_bytes_moved(operation: Callable[[Tensor, Tensor], object], bytes_moved: int) -> None:
    a, b = torch.ones(1000), torch.ones(1000)
    with Recorder() as recorder:
        operation(a, b)
    assert sum(sum(counter.values()) for counter in recorder.traffic.values()) == bytes_moved


def test_multi_tensor_kernels_take_so_many_tensors_and_blocks() -> None:
    assert multi_tensor_launches([10] * 36, depth=4) == 1
    assert multi_tensor_launches([10] * 37, depth=4) == 2
    assert multi_tensor_launches([320 * 65536 + 1], depth=1) == 2
