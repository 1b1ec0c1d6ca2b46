"""What holds for every operation alike: the same bits every time, other seeds other draws, graphs, no waiting.

On a GPU at real shapes and a hundred times; here twice under the interpreter, which also tests `kernel_calls.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from electra_kernels import probe_triton
from kernel_calls import CALLS, DRAWING, Call, seed_of
from kernel_helpers import DEVICE, INTERPRETED
from torch import Tensor

from electra_core.execution.capture import capturing

EVERY = pytest.mark.parametrize(("name", "make"), CALLS.items(), ids=CALLS)
Make = Callable[[], Call]


def equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.host_only
def test_the_launch_that_tells_whether_triton_works() -> None:
    """If it failed on a GPU that is in order, no kernel would ever be taken there."""
    probe_triton.launch(torch.device(DEVICE))


@EVERY
def test_the_same_bits_every_time(name: str, make: Make) -> None:
    call = make()
    first = call(seed_of(1))
    assert all(result.isfinite().all() for result in first if result.is_floating_point())
    for _ in range(100 if DEVICE == "cuda" else 1):
        assert equal(call(seed_of(1)), first)
    assert equal(call(seed_of(2)), first) == (name not in DRAWING)


@pytest.mark.skipif(not INTERPRETED, reason="a failed assertion would end all work on a GPU")
@EVERY
def test_no_integer_overflows(name: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TRITON_DEBUG=1, the first aid of many, Triton checks every sum and product of integers."""
    from triton.runtime.interpreter import interpreter_builder

    debugging = dataclasses.replace(interpreter_builder.options, debug=True)
    monkeypatch.setattr(interpreter_builder, "options", debugging)
    make()(seed_of(-1))


@pytest.mark.gpu
@EVERY
def test_a_replayed_graph_draws_fresh_numbers(name: str, make: Make) -> None:
    call, seed, side = make(), seed_of(1), torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call(seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, torch.cuda.graph_pool_handle()):
        captured = call(seed)
    for key in (1, 2):
        seed[0] = key
        graph.replay()
        assert equal(captured, call(seed_of(key)))


@pytest.mark.gpu
@EVERY
def test_nothing_waits_for_the_device(name: str, make: Make) -> None:
    call, seed = make(), seed_of(1)
    call(seed)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@EVERY
def test_runs_on_the_device_of_its_tensors(name: str, make: Make) -> None:
    """Triton launches on the current device; the operators make that the tensors'."""
    call = make()
    expected = call(seed_of(1))
    with torch.cuda.device(1):
        assert equal(call(seed_of(1).to("cuda:0")), expected)
