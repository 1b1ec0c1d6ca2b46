"""`fake_step.KERNELS` against the launchers: how many kernels each of our operators starts.

Triton's launches are counted and not carried out, so that half precision and the tiles of a GPU can be asked for
anywhere; PyTorch's own operations inside an operator are counted as `fake_step` counts all others.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from electra_kernels import operators
from electra_kernels.attention_triton import short_limit
from kernel_calls import seed_of
from kernel_helpers import DEVICE
from triton.runtime.jit import KernelInterface

from benchmarks.compile_report import MODULES
from electra_core.execution.fake_step import KERNELS, LONG_ATTENTION, Recorder, launches

BF16 = torch.bfloat16
for module in MODULES:  # importing it registers its operators
    importlib.import_module(module)
OURS = {
    name
    for name, function in operators.IMPLEMENTATIONS.items()
    if function.__module__ in MODULES and not name.startswith("native_")  # other tests register operators, too
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts Triton launches by the kernel's name; nothing is launched."""
    counts: Counter[str] = Counter()

    def count(kernel: Any, _grid: Any) -> Callable[..., None]:
        return lambda *_, **__: counts.update([kernel.fn.__name__])

    monkeypatch.setattr(KernelInterface, "__getitem__", count)
    yield counts


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(BF16)


def single(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def ids(count: int, upper: int = 2) -> torch.Tensor:
    return torch.randint(upper, (count,), device=DEVICE)


def arguments(length: int = 32) -> dict[str, tuple[Any, ...]]:
    """Operator -> what it is called with in a training step: activations in bf16, parameters in fp32."""
    seed, offsets = seed_of(1), torch.tensor([0, length], device=DEVICE, dtype=torch.int32)
    attention = (half(length, 3, 2, 64), offsets, seed, length, 0.1, 0, 0.125)
    context, lse = half(length, 2, 64), single(2, length)
    norm = (half(8, 256), half(8, 256), single(256), single(256), single(256), 1e-12, 0.1, seed, 0)
    tables = (single(9, 128), single(16, 128), single(2, 128), single(128), single(128))
    embedding = (ids(8), ids(8), ids(8), *tables, 1e-12, 0.1, seed, 0)
    word_head = (half(5, 128), single(300, 128), single(300), ids(5), seed, 0, 1.0)
    head = (half(8, 256), single(256), single(1), ids(8).bool(), single(8))
    scalar = torch.ones((), device=DEVICE)
    return {
        "attention": attention,
        "attention_backward": (context, context, lse, *attention),
        "dropout_add_layer_norm": norm,
        "dropout_add_layer_norm_backward": (half(8, 256), half(8, 256), *norm[:3], *norm[4:]),
        "bias_gelu": (half(8, 256), single(256)),
        "bias_gelu_backward": (half(8, 256), half(8, 256), single(256)),
        "embedding_layer_norm": (*embedding, BF16),
        "embedding_layer_norm_backward": (half(8, 128), *embedding[:7], *embedding[8:]),
        "mlm_head": word_head,
        "mlm_head_backward": (single(5), *word_head[:4], single(5)),
        "rtd_loss": (half(8), *head[3:]),
        "rtd_loss_backward": (scalar, single(8), scalar, BF16),
        "rtd_head": head,
        "rtd_head_backward": (scalar, *head[:3], single(8), scalar),
        "sample_and_replace": (half(5, 300), ids(20), torch.arange(5, device=DEVICE), seed, 0, 1.0),
    }


def counted(name: str, values: tuple[Any, ...], started: Counter[str]) -> int:
    """Launches of one call, Triton's and PyTorch's."""
    started.clear()
    with Recorder() as recorder:
        operators.IMPLEMENTATIONS[name](*values)
    return started.total() + sum(counter.total() for counter in recorder.launches.values())


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_the_table_says_what_is_launched(name: str, started: Counter[str]) -> None:
    assert counted(name, arguments()[name], started) == KERNELS[name]
    assert started, "no kernel of ours was started"


@pytest.mark.parametrize("length", [LONG_ATTENTION, LONG_ATTENTION + 1])
@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_long_sequences_take_another_launch_back(name: str, length: int, started: Counter[str]) -> None:
    if short_limit(operators.architecture(torch.device(DEVICE)), BF16, 64) != LONG_ATTENTION:
        pytest.skip("the table is that of an H100")
    values = arguments(length)[name]
    overload = getattr(torch.ops.electra_kernels, name).default
    assert counted(name, values, started) == launches(overload, values)


def test_the_table_names_every_operator() -> None:
    assert set(KERNELS) == OURS
