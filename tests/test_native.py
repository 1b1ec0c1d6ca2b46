"""The loops in C against the twins: the same dropout decisions, values within the error budget, no surprises.

They are what trains on a CPU, and optional: without a C compiler the twins run, and these tests are skipped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from electra_kernels import (
    attention,
    attention_native,
    dropout_add_layer_norm,
    fast_bf16,
    native,
    rng,
    use,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import assert_within_budget, dtype_id
from native_calls import SEED, STREAM, leaves, offsets, run_attention, run_layer_norm

from benchmarks import bench_native

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=f"no loops in C: {native.problem()}")
needs_threads = pytest.mark.skipif(native.one_thread() is not None, reason=f"{native.one_thread()}")
needs_avx2 = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="the processor has no AVX2")

DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = {
    "one-token": [1],
    "equal": [24, 24],
    "unequal-and-empty": [5, 0, 33, 17],
    "more-than-a-block-of-queries": [150, 3],
    "whole-blocks-and-halves-of-one": [128, 64, 96, 32],
}


@pytest.fixture
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How attention multiplies: in fp32, or bf16 on tiles, or bf16 in pairs (on processors with tiles, too)."""
    monkeypatch.setattr(attention_native, "has_fast_bf16", lambda: request.param != "fp32")
    if request.param == "tiles" and not (fast_bf16._has_amx() and native.has_bf16_products()):
        pytest.skip("the processor has no tiles")
    if request.param == "pairs":
        if not torch.cpu._is_avx512_bf16_supported():
            pytest.skip("the processor has no AVX-512 BF16")
        here = native._load()
        without_tiles = native._build_and_load(here.compiler, (*here.options, "-mno-amx-bf16"))
        monkeypatch.setattr(native, "_load", lambda: without_tiles)
        assert native.has_bf16_products()
    return str(request.param)


@pytest.mark.parametrize(
    ("dtype", "dim", "products"),
    [
        (torch.float32, 48, "fp32"),
        (torch.bfloat16, 48, "fp32"),
        (torch.bfloat16, 32, "fp32"),
        (torch.bfloat16, 32, "tiles"),
        (torch.bfloat16, 128, "tiles"),
        (torch.bfloat16, 32, "pairs"),
        (torch.bfloat16, 128, "pairs"),
    ],
    ids=str,
    indirect=["products"],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_is_within_the_error_budget(
    lengths: list[int],
    dropout_p: float,
    dtype: torch.dtype,
    dim: int,
    products: str,
) -> None:
    qkv, dout = leaves((sum(lengths), 3, 2, dim), (sum(lengths), 2, dim), dtype=dtype)
    exact = run_attention("reference", qkv.double(), dout.double(), lengths, dropout_p)
    same = run_attention("reference", qkv, dout, lengths, dropout_p)
    got = run_attention("native", qkv, dout, lengths, dropout_p)
    for name, *values in zip(("out", "dqkv"), got, same, exact, strict=True):
        assert_within_budget(name, *values)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (70, 300), (130, 64)], ids=str)
def test_layer_norm_is_within_the_error_budget(
    shape: tuple[int, int], dropout_p: float, dtype: torch.dtype
) -> None:
    tensors = leaves(shape, shape, shape[1:], shape[1:], shape, dtype=dtype)
    exact = run_layer_norm("reference", [tensor.double() for tensor in tensors], dropout_p)
    same = run_layer_norm("reference", tensors, dropout_p)
    got = run_layer_norm("native", tensors, dropout_p)
    for name, *values in zip(
        ("out", "dx", "dresidual", "dweight", "dbias", "dx_bias"), got, same, exact, strict=True
    ):
        assert_within_budget(name, *values)


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4).filter(any),
    heads=st.integers(1, 3),
    dim=st.sampled_from([16, 32, 64, 80]),
    dropout_p=st.sampled_from([0.0, 0.1, 0.9]),
)
def test_attention_of_any_shape(lengths: list[int], heads: int, dim: int, dropout_p: float) -> None:
    qkv, dout = leaves((sum(lengths), 3, heads, dim), (sum(lengths), heads, dim), seed=heads)
    got = run_attention("native", qkv, dout, lengths, dropout_p)
    for value, twin in zip(got, run_attention("reference", qkv, dout, lengths, dropout_p), strict=True):
        torch.testing.assert_close(value, twin, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dropout_p", [1e-6, 1e-5, 0.1, 0.5, 0.99])
def test_dropout_decides_as_specified(dropout_p: float) -> None:
    """Exactly the kept values of x reach its gradient; columns beyond one vector's 128 included."""
    x, residual, weight, bias, dout = leaves((9, 300), (9, 300), (300,), (300,), (9, 300))
    _, dx, dresidual, *_ = run_layer_norm("native", (x, residual, weight, bias, dout), dropout_p)
    keep = rng.keep_mask(SEED, torch.arange(9), 300, dropout_p, STREAM)
    assert torch.equal(dx, dresidual * (keep * torch.tensor(rng.keep_scale(dropout_p))))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dim", [64, 128])
def test_attention_drops_what_the_specification_drops(dim: int, dtype: torch.dtype) -> None:
    """Queries of zero make every probability 1 / length, values of one-hot rows show which were kept."""
    length, heads = dim, 3
    qkv = torch.zeros(2 * length, 3, heads, dim, dtype=dtype)
    qkv[:, 2] = torch.eye(dim, dtype=dtype).repeat(2, 1)[:, None]
    with use("native"):
        out = attention(qkv, offsets([length] * 2), length, dropout_p=0.3, seed=SEED, stream=STREAM)
    for head in range(heads):
        keep = rng.keep_mask(SEED, torch.arange(2 * length), length, 0.3, STREAM, plane=head)
        torch.testing.assert_close(out[:, head], (keep * rng.keep_scale(0.3) / length).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_attentions_gradient_goes_to_what_was_kept(dtype: torch.dtype) -> None:
    """With equal probabilities the gradient of value j is the sum of the gradients of those who kept it."""
    length = 96
    qkv = torch.zeros(length, 3, 2, 32, dtype=dtype)
    dout = torch.zeros(length, 2, 32, dtype=dtype)
    dout[torch.arange(length), :, torch.arange(length) % 32] = 1.0
    _, dqkv = run_attention("native", qkv, dout, [length], 0.3)
    for head in range(2):
        keep = rng.keep_mask(SEED, torch.arange(length), length, 0.3, STREAM, plane=head)
        counts = keep.float().T.reshape(length, 3, 32).sum(1)  # queries 32 apart have the same one-hot gradient
        expected = counts * (rng.keep_scale(0.3) / length)
        torch.testing.assert_close(
            dqkv[:, 2, head].float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    lengths = [40, 7, 25, 60]
    qkv, dout = leaves((132, 3, 2, 32), (132, 2, 32), dtype=dtype)
    tensors = leaves((300, 96), (300, 96), (96,), (96,), (300, 96))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                [*run_attention("native", qkv, dout, lengths, 0.1), *run_layer_norm("native", tensors, 0.1)]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_stays_in_its_sequence_and_large_logits_are_no_problem(dtype: torch.dtype) -> None:
    qkv, dout = leaves((30, 3, 1, 32), (30, 1, 32), dtype=dtype)
    qkv[:10] *= 1e4
    clean = run_attention("native", qkv, dout, [10, 10, 10], 0.1)
    qkv[12, 0] = torch.nan
    spoilt = run_attention("native", qkv, dout, [10, 10, 10], 0.1)
    for before, after in zip(clean, spoilt, strict=True):
        others = torch.cat([torch.arange(10), torch.arange(20, 30)])
        assert before.isfinite().all() and torch.equal(before[others], after[others])
    assert spoilt[0][12].isnan().all() and spoilt[1][10:20, 1].isnan().all()


def test_opcheck() -> None:
    qkv = torch.randn(12, 3, 2, 16, requires_grad=True)
    arguments = (qkv, offsets([5, 7]), SEED, 7, 0.2, STREAM, 0.25)
    torch.library.opcheck(torch.ops.electra_kernels.native_attention.default, arguments)
    tensors = [tensor.requires_grad_() for tensor in leaves((6, 24), (6, 24), (24,), (24,))]
    torch.library.opcheck(
        torch.ops.electra_kernels.native_dropout_add_layer_norm.default, (*tensors, None, 1e-6, 0.2, SEED, STREAM)
    )


@pytest.mark.parametrize("eps", [0, 1])
def test_a_whole_eps_is_the_same_number(eps: int) -> None:
    """An int would come to the loops in another register than a float, and the arguments behind it as well."""
    x, residual, weight, bias = (torch.randn(*shape) for shape in ((3, 8), (3, 8), (8,), (8,)))
    with use("native"):
        outs = [dropout_add_layer_norm(x, residual, weight, bias, eps=e, dropout_p=0.5, seed=0)
                for e in (eps, float(eps))]  # fmt: skip
    assert torch.equal(*outs) and outs[0].isfinite().all()
    with use("native"), pytest.raises(TypeError, match="integer"):
        dropout_add_layer_norm(x, residual, weight, bias, eps=1.0, dropout_p=0.5, seed=0, stream=1.5)  # type: ignore[arg-type]


def test_what_the_loops_cannot_do_takes_the_twin_or_is_said() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    arguments = (x, x, x[0], x[0])
    assert dropout_add_layer_norm(*arguments, eps=1e-6, dropout_p=0.1, seed=1).dtype == torch.float64
    with use("native"), pytest.raises(RuntimeError, match=r"native was asked for but cannot run: torch.float64"):
        dropout_add_layer_norm(*arguments, eps=1e-6)


@needs_avx2
@pytest.mark.parametrize("processor", ["haswell", "x86-64"])
def test_loops_for_older_processors(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AVX-512, and without AVX, products have other vectors, and random numbers other code."""
    here, older = native._load(), native.load_for(processor)
    assert older.library is not here.library and f"-march={processor}" in older.options
    monkeypatch.setattr(native, "_load", lambda: older)
    for dtype in DTYPES:
        test_attention_is_within_the_error_budget([5, 0, 33, 150], 0.2, dtype, 48, "fp32")
        test_layer_norm_is_within_the_error_budget((70, 300), 0.2, dtype)
    test_dropout_decides_as_specified(0.1)


def test_the_benchmark_compares_ways_that_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "native.json"
    arguments = ["--rounds", "1", "--calls", "1", "--shapes", "2x16", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_native", *arguments])
    threads = torch.get_num_threads()
    bench_native.main()
    torch.set_num_threads(threads)
    compared = json.loads(out.read_text())["comparisons"]
    assert {row["peer"] for row in compared} == {"twin", "PyTorch"}
    assert len(compared) == (12 if fast_bf16.has_fast_bf16() and native.has_bf16_products() else 10)
    with pytest.raises(SystemExit, match="it: differ by 1"):
        bench_native.check([torch.zeros(2)], [torch.ones(2)], "it")


@needs_avx2
def test_the_benchmark_of_loops_for_another_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, here = tmp_path / "native.json", native._load()
    ran = []
    monkeypatch.setattr(bench_native, "report", lambda options: ran.append(native._load()) or [])
    monkeypatch.setattr(sys, "argv", ["bench_native", "--march", "haswell", "--out", str(out)])
    bench_native.main()
    assert "-march=haswell" in ran[0].options and native._load() is here
    facts = json.loads(out.read_text())
    assert (facts["march"], facts["pytorch"]) == ("haswell", torch.backends.cpu.get_cpu_capability())
    monkeypatch.setattr(sys, "argv", ["bench_native", "--march", "abacus"])
    with pytest.raises(SystemExit, match=r"--march: .* failed: .*error: .*abacus"):
        bench_native.main()
