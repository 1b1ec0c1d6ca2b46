"""embedding_layer_norm against the float64 formula, on both implementations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from electra_kernels import embedding_layer_norm, embedding_layer_norm_triton, layer_norm_triton, rng, use
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

SEED = torch.tensor([99, 4])
EPS = 1e-6
NAMES = ("out", "dwords", "dpositions", "dsegments", "dweight", "dbias")

# (T, E), and why.
SHAPES = {
    "one-token": (1, 8),
    "odd-width": (6, 20),  # E that is no power of two
    "programs-take-turns": (37, 32),  # more blocks than programs, the last one partial
}


path = implementations((layer_norm_triton, "ELEMENTS", 256), (embedding_layer_norm_triton, "PROGRAMS", 3))


def inputs(tokens: int, size: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(ids, leaves, gradient of the result); float64 on the host. Words repeat, some never occur."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(upper, (tokens,), generator=generator) for upper in (11, 16, 2)]
    shapes = (15, size), (16, size), (2, size), (size,), (size,), (tokens, size)
    *leaves, dout = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return ids, leaves, dout


def naive(ids: Sequence[Tensor], *leaves: Tensor, dropout_p: float) -> Tensor:
    """The formula, with the dropout decisions of the specification."""
    s_TE = sum(table[index] for index, table in zip(ids, leaves))
    assert isinstance(s_TE, Tensor)
    keep_TE = rng.keep_mask(SEED, torch.arange(len(s_TE)), s_TE.shape[1], dropout_p, 2).to(s_TE.device)
    normed_TE = F.layer_norm(s_TE, s_TE.shape[1:], leaves[3], leaves[4], EPS)
    return normed_TE * keep_TE.to(s_TE.dtype) * rng.keep_scale(dropout_p)


def ours(ids: Sequence[Tensor], *leaves: Tensor, dropout_p: float) -> Tensor:
    options = {"eps": EPS, "dropout_p": dropout_p, "stream": 2}
    return embedding_layer_norm(*ids, *leaves, seed=SEED.to(DEVICE), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_and_gradients(path: str, shape: tuple[int, int], dropout_p: float, dtype: torch.dtype) -> None:
    ids, leaves, dout = inputs(*shape)
    leaves, dout = [leaf.to(dtype) for leaf in leaves], dout.to(dtype)
    exact = value_and_gradients(partial(naive, ids), [leaf.double() for leaf in leaves], dout, dropout_p=dropout_p)
    ids, leaves, dout = [i.to(DEVICE) for i in ids], [leaf.to(DEVICE) for leaf in leaves], dout.to(DEVICE)
    same = value_and_gradients(partial(naive, ids), leaves, dout, dropout_p=dropout_p)
    got = value_and_gradients(partial(ours, ids), leaves, dout, dropout_p=dropout_p)
    for name, *values in zip(NAMES, got, same, exact, strict=True):
        assert_within_budget(name, *values)


def test_gradcheck(path: str) -> None:
    ids, leaves, _ = inputs(5, 12)
    ids = [i.to(DEVICE) for i in ids]
    assert torch.autograd.gradcheck(
        lambda *tensors: ours(ids, *tensors, dropout_p=0.4),
        tuple(leaf.to(DEVICE).requires_grad_() for leaf in leaves),
        fast_mode=True,
    )


@settings(max_examples=6)
@given(tokens=st.integers(0, 9), size=st.integers(1, 70), dropout_p=st.sampled_from([0.0, 0.1, 0.9]))
def test_any_shape(tokens: int, size: int, dropout_p: float) -> None:
    ids, leaves, dout = inputs(tokens, size)  # float64: few features lose digits
    ids, leaves = [i.to(DEVICE) for i in ids], [leaf.to(DEVICE) for leaf in leaves]
    results = []
    for implementation in ("triton", "reference"):
        with use(implementation):  # type: ignore[arg-type]
            results.append(value_and_gradients(partial(ours, ids), leaves, dout.to(DEVICE), dropout_p=dropout_p))
    for kernel, twin in zip(*results, strict=True):
        torch.testing.assert_close(kernel, twin, rtol=1e-9, atol=1e-9)


def test_no_tokens(path: str) -> None:
    ids, leaves, dout = inputs(0, 8)
    leaves, function = [leaf.to(DEVICE) for leaf in leaves], partial(ours, [i.to(DEVICE) for i in ids])
    results = value_and_gradients(function, leaves, dout.to(DEVICE), dropout_p=0.1)
    assert results[0].shape == (0, 8) and all((gradient == 0).all() for gradient in results[1:])


def test_half_precision_from_fp32_tables(path: str) -> None:
    ids, leaves, dout = inputs(6, 16)
    ids, leaves = (
        [i.to(DEVICE, torch.int32) for i in ids],
        [leaf.to(DEVICE).float().requires_grad_() for leaf in leaves],
    )
    out = embedding_layer_norm(*ids, *leaves, eps=EPS, dtype=torch.float16)
    gradients = torch.autograd.grad(out, leaves, dout.to(DEVICE).half())
    assert out.dtype == torch.float16 and all(gradient.dtype == torch.float32 for gradient in gradients)
    exact = value_and_gradients(partial(naive, inputs(6, 16)[0]), inputs(6, 16)[1], dout, dropout_p=0.0)
    for got, wanted in zip((out, *gradients), exact, strict=True):
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=2e-3, atol=2e-3)


def test_eps_may_be_0(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a kernel's tile outside the batch have variance 0."""
    monkeypatch.setitem(globals(), "EPS", 0.0)
    ids, leaves, dout = inputs(5, 16)
    ids, leaves, dout = [i.to(DEVICE) for i in ids], [leaf.to(DEVICE).float() for leaf in leaves], dout.to(DEVICE)
    got = value_and_gradients(partial(ours, ids), leaves, dout, dropout_p=0.0)
    for value, exact in zip(got, value_and_gradients(partial(naive, ids), leaves, dout, dropout_p=0.0)):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)


def test_same_bits_every_time_and_inputs_untouched(path: str) -> None:
    ids, leaves, dout = inputs(9, 24)
    ids, leaves = [i.to(DEVICE) for i in ids], [leaf.to(DEVICE).float() for leaf in leaves]
    before = [leaf.clone() for leaf in leaves]
    with poisoned_memory():
        runs = [value_and_gradients(partial(ours, ids), leaves, dout.to(DEVICE), dropout_p=0.2) for _ in range(2)]
    assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


@pytest.mark.host_only
def test_opcheck_and_compile() -> None:
    ids, leaves, dout = inputs(4, 16)
    ids, leaves = [i.to(DEVICE) for i in ids], [leaf.to(DEVICE).float() for leaf in leaves]
    numbers = (EPS, 0.25, SEED.to(DEVICE), 2)
    dout = dout.to(DEVICE).float()
    torch.library.opcheck(embedding_layer_norm_triton.backward.custom, (dout, *ids, *leaves[:4], *numbers))
    needing = [leaf.clone().requires_grad_() for leaf in leaves]
    torch.library.opcheck(embedding_layer_norm_triton.forward.custom, (*ids, *needing, *numbers, torch.float32))
    with use("triton"):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        both = (value_and_gradients(partial(f, ids), leaves, dout, dropout_p=0.2) for f in (compiled, ours))
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions_SE": torch.zeros(3, 5)}, r"positions_SE: expected shape \[any, 4\], got \[3, 5\]"),
        ({"segments_CE": torch.zeros(2, 4).double()}, "segments_CE: expected dtype float32, got float64"),
        ({"segment_ids_T": torch.tensor([0, 2])}, r"segment_ids_T: expected values in \[0, 2\), got 2"),
        ({"position_ids_T": torch.tensor([0, 3])}, r"position_ids_T: expected values in \[0, 3\), got 3"),
        ({"input_ids_T": torch.tensor([0, -1])}, r"input_ids_T: expected values in \[0, 3\), got -1"),
        ({"position_ids_T": torch.tensor([0])}, r"position_ids_T: expected shape \[2\], got \[1\]"),
        ({"bias_E": torch.zeros(4, device="meta")}, "bias_E: expected a tensor on cpu, got one on meta"),
        ({"dropout_p": 0.5}, "seed: expected an int or an int64 tensor because dropout_p > 0"),
        ({"dtype": torch.int64}, "dtype: expected a float dtype, got torch.int64"),
        ({"eps": math.inf}, "eps: expected a finite number, not negative, got inf"),
    ],
    ids=["width", "dtype", "segment", "position", "negative", "length", "device", "no-seed", "result", "eps"],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    ids = dict.fromkeys(("input_ids_T", "position_ids_T", "segment_ids_T"), torch.tensor([0, 1]))
    tables = {"words_VE": torch.zeros(3, 4), "positions_SE": torch.zeros(3, 4), "segments_CE": torch.zeros(2, 4)}
    good = {**ids, **tables, "weight_E": torch.zeros(4), "bias_E": torch.zeros(4), "eps": EPS}
    with pytest.raises(ValueError, match=message):
        embedding_layer_norm(**{**good, **change})  # type: ignore[arg-type]
