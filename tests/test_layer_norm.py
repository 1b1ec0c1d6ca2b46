"""dropout_add_layer_norm against the float64 formula, on both implementations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from electra_kernels import dropout_add_layer_norm, dropout_add_layer_norm_twice, layer_norm_triton, rng, use
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import (
    DEVICE,
    DTYPES,
    assert_within_budget,
    dtype_id,
    implementations,
    poisoned_memory,
    value_and_gradients,
)
from torch import Tensor

from electra_core.execution.fake_step import Recorder

SEED = torch.tensor([31337, 5])
STREAM = 3

# (T, D), and why.
SHAPES = {
    "one-row": (1, 8),
    "odd-width": (20, 300),  # D that is no power of two
    "narrower-than-a-random-call": (5, 6),
    "programs-take-turns": (37, 64),  # more blocks than programs, the last one partial
}


path = implementations((layer_norm_triton, "ELEMENTS", 512), (layer_norm_triton, "PROGRAMS", 3))


def inputs(tokens: int, size: int, seed: int = 0) -> list[Tensor]:
    """x, residual, weight, bias, x's bias and the gradient of the result, float64 on the host."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, size), (tokens, size), (size,), (size,), (size,), (tokens, size)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]


def naive(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor, x_bias_D: Tensor, *, dropout_p: float
) -> Tensor:
    """The formula, with the dropout decisions of the specification."""
    keep_TD = rng.keep_mask(SEED, torch.arange(len(x_TD)), x_TD.shape[1], dropout_p, STREAM).to(x_TD.device)
    s_TD = residual_TD + (x_TD + x_bias_D) * keep_TD.to(x_TD.dtype) * rng.keep_scale(dropout_p)
    if s_TD.dtype != torch.float64:
        return F.layer_norm(s_TD, s_TD.shape[1:], weight_D, bias_D, 1e-6)
    s_TD = s_TD - s_TD.mean(1, keepdim=True)
    return s_TD / (s_TD.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight_D + bias_D


def ours(*leaves: Tensor, dropout_p: float) -> Tensor:
    *tensors, x_bias = leaves
    numbers = {"eps": 1e-6, "dropout_p": dropout_p, "seed": SEED.to(DEVICE), "stream": STREAM}
    return dropout_add_layer_norm(*tensors, x_bias_D=x_bias, **numbers)  # type: ignore[arg-type]


def for_two_readers(*leaves: Tensor, dropout_p: float, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    *tensors, x_bias = leaves
    seed = SEED.to(DEVICE) if seed is None else seed
    numbers = {"eps": 1e-6, "dropout_p": dropout_p, "seed": seed, "stream": STREAM}
    return dropout_add_layer_norm_twice(*tensors, x_bias_D=x_bias, **numbers)  # type: ignore[arg-type]


NAMES = ("out", "dx", "dresidual", "dweight", "dbias", "dx_bias")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_and_gradients(path: str, shape: tuple[int, int], dropout_p: float, dtype: torch.dtype) -> None:
    *leaves, dout = inputs(*shape)
    leaves, dout = [leaf.to(dtype) for leaf in leaves], dout.to(dtype)
    exact = value_and_gradients(naive, [leaf.double() for leaf in leaves], dout, dropout_p=dropout_p)
    device, dout = [leaf.to(DEVICE) for leaf in leaves], dout.to(DEVICE)
    same = value_and_gradients(naive, device, dout, dropout_p=dropout_p)
    got = value_and_gradients(ours, device, dout, dropout_p=dropout_p)
    for name, *values in zip(NAMES, got, same, exact, strict=True):
        assert_within_budget(name, *values)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("readers", ["both", "first", "second"])
def test_gradients_of_two_readers(path: str, readers: str, dropout_p: float, dtype: torch.dtype) -> None:
    """What each sends back is added up; what one of them does not send back is not missed."""
    *leaves, dout = inputs(20, 24)
    douts = [dout.to(dtype), dout.flip(0).to(dtype)]
    leaves = [leaf.to(dtype) for leaf in leaves]
    sent = {"both": douts, "first": douts[:1], "second": douts[1:]}[readers]
    exact = value_and_gradients(
        naive, [leaf.double() for leaf in leaves], sum(d.double() for d in sent), dropout_p=dropout_p
    )  # type: ignore[arg-type]
    device = [leaf.to(DEVICE) for leaf in leaves]
    same = value_and_gradients(naive, device, sum(sent).to(DEVICE), dropout_p=dropout_p)  # type: ignore[union-attr]
    device = [leaf.clone().requires_grad_() for leaf in device]
    outs = for_two_readers(*device, dropout_p=dropout_p)
    assert torch.equal(*outs)
    read = {"both": outs, "first": outs[:1], "second": outs[1:]}[readers]
    got = [outs[0].detach(), *torch.autograd.grad(read, device, [d.to(DEVICE) for d in sent])]
    for name, *values in zip(NAMES, got, same, exact, strict=True):
        assert_within_budget(name, *values)


def test_two_readers_take_one_launch_less() -> None:
    """Their gradients are added by the backward kernel, not by autograd."""
    *leaves, dout = (t.to(DEVICE).float() for t in inputs(9, 24))
    leaves, seed = [leaf.requires_grad_() for leaf in leaves], SEED.to(DEVICE)  # on a GPU a copy is a launch, too
    with use("triton"), Recorder() as recorder:
        first, second = for_two_readers(*leaves, dropout_p=0.2, seed=seed)
        torch.autograd.grad([first, second], leaves, [dout, dout])
    operations = {name for counter in recorder.launches.values() for name in counter}
    assert {"aten::add", "aten::sum"}.isdisjoint(operations) and len(operations) == 2


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_without_a_bias_for_x(path: str, dropout_p: float) -> None:
    *leaves, x_bias, dout = (t.to(DEVICE).float() for t in inputs(9, 24))
    none = value_and_gradients(lambda *t: ours(*t, None, dropout_p=dropout_p), leaves, dout)  # type: ignore[arg-type]
    zero = value_and_gradients(ours, [*leaves, torch.zeros_like(x_bias)], dout, dropout_p=dropout_p)
    for a, b in zip(none, zero[:-1], strict=True):  # which has a gradient of x_bias, too
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(path: str, dropout_p: float) -> None:
    leaves = tuple(leaf.to(DEVICE).requires_grad_() for leaf in inputs(7, 12)[:5])
    assert torch.autograd.gradcheck(lambda *tensors: ours(*tensors, dropout_p=dropout_p), leaves, fast_mode=True)


@settings(max_examples=6)
@given(tokens=st.integers(0, 9), size=st.integers(1, 70), dropout_p=st.sampled_from([0.0, 0.1, 0.9]))
def test_any_shape(tokens: int, size: int, dropout_p: float) -> None:
    *leaves, dout = (t.to(DEVICE) for t in inputs(tokens, size, seed=size))  # float64: few features lose digits
    results = []
    for implementation in ("triton", "reference"):
        with use(implementation):  # type: ignore[arg-type]
            results.append(value_and_gradients(ours, leaves, dout, dropout_p=dropout_p))
    for kernel, twin in zip(*results, strict=True):
        torch.testing.assert_close(kernel, twin, rtol=1e-9, atol=1e-9)


def test_dropout_decides_as_specified(path: str) -> None:
    """With a residual that marks nothing else, exactly the kept values of x reach its gradient."""
    *leaves, dout = (t.to(DEVICE).float() for t in inputs(11, 40))
    _, dx, dresidual, *_ = value_and_gradients(ours, leaves, dout, dropout_p=0.3)
    keep = rng.keep_mask(SEED, torch.arange(11), 40, 0.3, STREAM).to(DEVICE)
    torch.testing.assert_close(dx, dresidual * keep * rng.keep_scale(0.3))
    assert 0.6 < keep.float().mean() < 0.8


def test_a_split_batch_drops_what_the_whole_one_does(path: str) -> None:
    x, residual, weight, bias, x_bias, _ = (t.to(DEVICE).float() for t in inputs(10, 16))
    whole = ours(x, residual, weight, bias, x_bias, dropout_p=0.5)
    part = dropout_add_layer_norm(
        x[4:], residual[4:], weight, bias, eps=1e-6, x_bias_D=x_bias, dropout_p=0.5,
        seed=(SEED + torch.tensor([0, 4])).to(DEVICE), stream=STREAM,
    )  # fmt: skip
    assert torch.equal(part, whole[4:])


def test_dtypes_may_differ(path: str) -> None:
    x, *others, dout = (t.to(DEVICE).float() for t in inputs(6, 24))
    got = value_and_gradients(ours, (x.half(), *others), dout.half(), dropout_p=0.2)
    assert [t.dtype for t in got] == [torch.float16] * 2 + [torch.float32] * 4
    exact = value_and_gradients(naive, [t.cpu().double() for t in (x.half(), *others)], dout.cpu(), dropout_p=0.2)
    for value, wanted in zip(got, exact, strict=True):
        torch.testing.assert_close(value.cpu().double(), wanted, rtol=2e-3, atol=2e-3 * wanted.abs().max().item())


def test_same_bits_every_time_and_inputs_untouched(path: str) -> None:
    *leaves, dout = (t.to(DEVICE).float() for t in inputs(9, 24))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    before = [leaf.detach().clone() for leaf in (*leaves, dout)]
    with poisoned_memory():
        out = ours(*leaves, dropout_p=0.2)
        first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        second = torch.autograd.grad(out, leaves, dout)
        again = ours(*leaves, dropout_p=0.2)
    assert torch.equal(out, again) and not out.isnan().any()
    assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((*leaves, dout), before, strict=True))


def test_a_probability_that_rounds_to_0_drops_nothing(path: str) -> None:
    leaves = [t.to(DEVICE).float() for t in inputs(9, 24)]
    with poisoned_memory():
        got = value_and_gradients(ours, leaves[:-1], leaves[-1], dropout_p=1e-6)
        wanted = value_and_gradients(ours, leaves[:-1], leaves[-1], dropout_p=0.0)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_eps_may_be_0(path: str) -> None:
    """Rows of a kernel's tile outside the batch have variance 0."""
    *leaves, _, dout = (t.to(DEVICE).float() for t in inputs(5, 16))
    got = value_and_gradients(dropout_add_layer_norm, leaves, dout, eps=0.0)
    wanted = value_and_gradients(
        lambda x, residual, *parameters: F.layer_norm(x + residual, x.shape[1:], *parameters, 0.0), leaves, dout
    )
    for value, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)


def test_one_tensor_as_x_and_residual(path: str) -> None:
    """Without dropout both gradients are the same tensor inside: it must be counted twice, not shared."""
    x, _, *parameters, dout = (t.to(DEVICE).float() for t in inputs(5, 16))
    gradients = []
    for function in (ours, naive):
        leaf = x.clone().requires_grad_()
        function(leaf, leaf, *parameters, dropout_p=0.0).backward(dout)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    ours(*leaves, *parameters, dropout_p=0.0).backward(dout)
    leaves[0].grad.zero_()  # type: ignore[union-attr]
    assert leaves[1].grad.abs().sum() > 0  # type: ignore[union-attr]


def test_nan_stays_in_its_row(path: str) -> None:
    x, *others, _ = (t.to(DEVICE).float() for t in inputs(4, 16))
    x[2, 3] = math.nan
    assert ours(x, *others, dropout_p=0.0).isnan().all(1).tolist() == [False, False, True, False]


@pytest.mark.host_only
def test_opcheck() -> None:
    x, residual, weight, bias, x_bias, dout = (t.to(DEVICE).float() for t in inputs(5, 16))
    numbers = (1e-6, 0.25, SEED.to(DEVICE), STREAM)
    torch.library.opcheck(layer_norm_triton.backward.custom, (dout, dout, x, residual, weight, x_bias, *numbers))
    torch.library.opcheck(layer_norm_triton.backward.custom, (dout, None, x, residual, weight, None, *numbers))
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias, x_bias)]
    torch.library.opcheck(layer_norm_triton.forward.custom, (*leaves, *numbers))
    torch.library.opcheck(layer_norm_triton.forward.custom, (*leaves[:4], None, *numbers))


@pytest.mark.host_only
@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_compiles_without_a_graph_break(implementation: str, dropout_p: float) -> None:
    *leaves, dout = (t.to(DEVICE).float() for t in inputs(5, 16))

    def both(*tensors: Tensor, dropout_p: float) -> Tensor:
        first, second = for_two_readers(*tensors, dropout_p=dropout_p)
        return ours(*tensors, dropout_p=dropout_p) + first * second

    with use(implementation):  # type: ignore[arg-type]
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        found = (value_and_gradients(f, leaves, dout, dropout_p=dropout_p) for f in (compiled, both))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "rank": ({"x_TD": torch.zeros(4)}, r"x_TD: expected shape \[any, any\], got \[4\]"),
        "residual": ({"residual_TD": torch.zeros(2, 4)}, r"residual_TD: expected shape \[3, 4\], got \[2, 4\]"),
        "weight": ({"weight_D": torch.zeros(3)}, r"weight_D: expected shape \[4\], got \[3\]"),
        "x_bias": ({"x_bias_D": torch.zeros(1)}, r"x_bias_D: expected shape \[4\], got \[1\]"),
        "dtype": ({"bias_D": torch.zeros(4).int()}, "bias_D: expected dtype .* got int32"),
        "eps": ({"eps": -1e-6}, "eps: expected a finite number, not negative, got -1e-06"),
        "eps-nan": ({"eps": math.nan}, "eps: expected .* got nan"),
        "p-one": ({"dropout_p": 1.0, "seed": 0}, r"dropout_p: expected a number in \[0, 1\), got 1.0"),
        "p-nan": ({"dropout_p": math.nan, "seed": 0}, r"dropout_p: expected .* got nan"),
        "device": ({"bias_D": torch.zeros(4, device="meta")}, "bias_D: expected a tensor on cpu, got one on meta"),
        "no-seed": ({"dropout_p": 0.1}, "seed: expected an int or an int64 tensor because dropout_p > 0"),
    }.values(),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    good = {
        "x_TD": torch.zeros(3, 4), "residual_TD": torch.zeros(3, 4), "weight_D": torch.zeros(4),
        "bias_D": torch.zeros(4), "eps": 1e-6,
    }  # fmt: skip
    for function in (dropout_add_layer_norm, dropout_add_layer_norm_twice):
        with pytest.raises(ValueError, match=message):
            function(**{**good, **change})  # type: ignore[arg-type]
