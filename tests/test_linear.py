"""Linear layers under autocast: on a CPU that multiplies bf16 slowly, and with weights that are cast together."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from electra_kernels import use
from kernel_helpers import DEVICE, assert_within_budget
from torch import Tensor, nn

from electra_core import linear
from electra_core.execution.fake_step import Recorder
from electra_core.linear import Linear


@pytest.fixture(autouse=True)
def without_fast_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever processor the test runs on."""
    monkeypatch.setattr(linear, "has_fast_bf16", lambda: False)


def value_and_gradients(layer: nn.Linear, x: Tensor, dy: Tensor, autocast: bool) -> list[Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.backward(dy.to(y.dtype))
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    return [y.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (0, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_exact_as_bf16_products(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs, exact = Linear(24, 40), nn.Linear(24, 40), nn.Linear(24, 40).double()
    theirs.load_state_dict(ours.state_dict())
    exact.load_state_dict(ours.state_dict())
    x, dy = torch.randn(shape).to(torch.bfloat16).to(dtype), torch.randn(*shape[:-1], 40).to(torch.bfloat16)
    wanted = value_and_gradients(exact, x.double(), dy.double(), autocast=False)
    same = value_and_gradients(theirs, x, dy, autocast=True)
    for name, *values in zip(
        ("y", "dx", "dweight", "dbias"), value_and_gradients(ours, x, dy, True), same, wanted, strict=True
    ):
        assert_within_budget(name, *values)


def test_activations_are_kept_in_bf16_and_multiplied_in_fp32() -> None:
    layer, x = Linear(16, 16), torch.randn(4, 16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
    assert y.dtype == torch.bfloat16
    assert {(t.dtype, t.shape) for t in saved} == {(torch.bfloat16, x.shape), (torch.float32, layer.weight.shape)}
    exact = torch.nn.functional.linear(x.to(torch.bfloat16).float(), layer.weight, layer.bias)
    assert torch.equal(y, exact.to(torch.bfloat16))


def test_without_autocast_it_is_torchs_linear() -> None:
    layer, x = Linear(16, 8), torch.randn(4, 16)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert not linear.multiplies_by_itself(x)


def gradients(layers: nn.Sequential, x: Tensor, together: bool) -> list[Tensor | None]:
    layers.zero_grad()
    with use("triton"), torch.autocast(DEVICE, dtype=torch.bfloat16):
        with linear.cast_together(layers) if together else nullcontext():
            y = layers(x)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad for p in layers.parameters())]


def test_weights_cast_together_give_the_same_bits() -> None:
    """`use("triton")`, because it is a GPU's way; layers that are frozen get no gradient."""
    layers = nn.Sequential(Linear(16, 24), nn.GELU(), Linear(24, 8)).to(DEVICE)
    layers[2].weight.requires_grad_(False)
    x = torch.randn(5, 16, device=DEVICE)
    for got, wanted in zip(gradients(layers, x, True), gradients(layers, x, False), strict=True):
        assert wanted is None if got is None else torch.equal(got, wanted) and got.dtype == wanted.dtype
    assert layers[2].weight.grad is None and all(m.copies is None for m in layers if isinstance(m, Linear))


def test_weights_are_cast_by_one_operation_each_way() -> None:
    layers = nn.Sequential(*(Linear(16, 16) for _ in range(30))).to(DEVICE)
    with Recorder() as recorder:
        gradients(layers, torch.randn(5, 16, device=DEVICE), True)
    counts = recorder.launches["losses"]
    assert counts["aten::_foreach_copy_"] == 2 and counts["aten::_to_copy"] <= 4  # x, y and their gradients


@pytest.mark.parametrize("why", ["no autocast", "a CPU's kernels", "half-precision parameters"])
def test_where_nothing_is_gained_weights_stay(why: str) -> None:
    layer = Linear(16, 16).to(DEVICE, torch.bfloat16 if why == "half-precision parameters" else torch.float32)
    with use("reference" if why == "a CPU's kernels" else "triton"):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=why != "no autocast"):
            with linear.cast_together(layer):
                assert layer.copies is None
