"""The MLM head's loops in C: within the error budget, the twin's draws, no bit that depends on the threads.

They are what trains on a CPU, and optional: without a C compiler the twin runs, and these tests are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from electra_kernels import (
    fast_bf16,
    mlm_head,
    mlm_head_native,
    mlm_head_reference,
    native,
    sample_and_replace,
    use,
)
from electra_kernels.dispatch import Implementation
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import assert_within_budget, dtype_id, poisoned_memory, value_and_gradients
from torch import Tensor

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=f"no loops in C: {native.problem()}")
needs_avx2 = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="the processor has no AVX2")
SEED = torch.tensor([-77, 2**32 - 7])

# (M, V, E), and why.
SHAPES = {
    "one-position": (1, 2, 32),
    "smaller-than-a-tile": (5, 7, 32),
    "one-word-in-the-last-tile": (97, 129, 64),
    "several-panels": (300, 700, 128),
    "no-multiple-of-anything": (37, 1000, 96),
    "wide": (20, 400, 768),
    "positions-in-chunks": (2100, 300, 32),
}


@pytest.fixture(params=["fp32", "tiles", "pairs"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """How the head multiplies: in fp32, or bf16 on tiles, or bf16 in pairs (on processors with tiles, too)."""
    if request.param == "fp32":
        return torch.float32
    if request.param == "tiles" and not (fast_bf16._has_amx() and native.has_bf16_products()):
        pytest.skip("the processor has no tiles")
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("the processor has no AVX-512 BF16")
    monkeypatch.setattr(mlm_head_native, "has_fast_bf16", lambda: True)
    if request.param == "pairs":
        here = native._load()
        without_tiles = native._build_and_load(here.compiler, (*here.options, "-mno-amx-bf16"))
        monkeypatch.setattr(native, "_load", lambda: without_tiles)
        assert native.has_bf16_products()
    return torch.bfloat16


def inputs(rows: int, vocabulary: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(hidden, embedding, bias, gradient of the loss, targets): numbers of `dtype`, parameters in fp32."""
    generator = torch.Generator().manual_seed(rows)
    hidden_ME, embedding_VE, bias_V, grad_M = (
        torch.randn(*shape, generator=generator)
        for shape in ((rows, size), (vocabulary, size), (vocabulary,), (rows,))
    )
    embedding_VE = (embedding_VE * 3 / size**0.5).to(dtype).float()
    targets_M = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden_ME.to(dtype), embedding_VE, bias_V, grad_M, targets_M


def results(path: Implementation, tensors: Sequence[Tensor], **options: float) -> list[Tensor]:
    """[loss, dhidden, dembedding, dbias, drawn ids]"""
    *leaves, grad_M, targets_M = tensors
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    with use(path):
        out = mlm_head(*leaves, targets_M, seed=SEED, stream=4, **options)  # type: ignore[arg-type]
        return [
            out.loss_M.detach(), *torch.autograd.grad(out.loss_M, leaves, grad_M.to(out.loss_M.dtype)),
            out.sampled_ids_M,
        ]  # fmt: skip


def plain(hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, targets_M: Tensor) -> Tensor:
    """The formula as anybody would write it, in hidden's dtype, with logits in fp32 at least."""
    logits_MV = hidden_ME @ embedding_VE.to(hidden_ME.dtype).T + bias_V.to(hidden_ME.dtype)
    return F.cross_entropy(logits_MV if hidden_ME.dtype == torch.float64 else logits_MV.float(), targets_M,
                           reduction="none")  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_and_gradients_are_within_the_error_budget(
    shape: tuple[int, int, int], products: torch.dtype
) -> None:
    *leaves, grad_M, targets_M = inputs(*shape, products)
    exact = value_and_gradients(plain, [leaf.double() for leaf in leaves], grad_M, targets_M)
    same = value_and_gradients(plain, leaves, grad_M, targets_M)
    with poisoned_memory():
        got = results("native", (*leaves, grad_M, targets_M))
    largest = float((leaves[0].float() @ leaves[1].T).abs().max())
    for name, *values in zip(("loss", "dhidden", "dembedding", "dbias"), got, same, exact, strict=False):
        assert_within_budget(name, *values, largest_logit=0.0 if name == "loss" else largest)


@pytest.mark.parametrize("temperature", [1.0, 0.4, 1.5])
def test_draws_are_those_of_the_stored_logits(temperature: float, products: torch.dtype) -> None:
    """Equal logits and seed give the ids of `sample_and_replace`, whose exactness has its own tests."""
    hidden_ME, embedding_VE, bias_V, grad_M, targets_M = inputs(140, 290, 64, products)
    bias_V[::3] = -math.inf
    tensors = (hidden_ME, embedding_VE, bias_V, grad_M, targets_M // 3 * 3 + 1)
    loss_M, *_, drawn_M = results("native", tensors, temperature=temperature)
    logits_MV = hidden_ME.float() @ embedding_VE.T + bias_V
    with use("reference"):
        wanted = sample_and_replace(
            logits_MV, torch.zeros(140, dtype=torch.int64), torch.arange(140), seed=SEED, stream=4,
            temperature=temperature,
        )  # fmt: skip
    assert torch.equal(drawn_M, wanted.sampled_ids_M) and (drawn_M % 3 != 0).all()
    cold_M, *_, coldest_M = results("native", tensors, temperature=1e-30)
    assert torch.equal(coldest_M, logits_MV.argmax(1))
    assert torch.equal(cold_M, loss_M)  # the temperature does not touch the loss


def test_a_row_that_is_no_distribution(products: torch.dtype) -> None:
    hidden_ME, embedding_VE, bias_V, grad_M, targets_M = inputs(4, 200, 32, products)
    hidden_ME[1, 3], hidden_ME[2] = math.nan, math.inf
    tensors = (hidden_ME, embedding_VE, bias_V, grad_M, targets_M)
    loss_M, dhidden_ME, *others, drawn_M = results("native", tensors)
    assert loss_M.isnan().tolist() == [False, True, True, False]
    assert (drawn_M == -1).tolist() == [False, True, True, False]
    assert dhidden_ME.isnan().any(1).tolist() == [False, True, True, False]
    assert all(other.isnan().any() for other in others)  # never a plausible gradient
    bias_V[7] = math.inf
    loss_M, *_, drawn_M = results("native", tensors)
    assert loss_M.isnan().all() and (drawn_M == -1).all()
    impossible_V = torch.full_like(bias_V, -math.inf)
    loss_M, *_, drawn_M = results("native", (hidden_ME, embedding_VE, impossible_V, grad_M, targets_M))
    assert loss_M.isnan().all() and (drawn_M == -1).all()


def test_the_number_of_threads_changes_no_bit(products: torch.dtype) -> None:
    """Nor does a second backward pass; and inputs are only read."""
    tensors = inputs(70, 900, 64, products)
    before, threads, found = [tensor.clone() for tensor in tensors], torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            found.append(results("native", tensors))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_bf16_loses_nothing_but_the_rounding_of_gradients(products: torch.dtype) -> None:
    """The twin multiplies the same numbers in fp32."""
    tensors = inputs(60, 1000, 64, products)
    (loss_M, *gradients, drawn_M), twin = results("native", tensors), results("reference", tensors)
    torch.testing.assert_close(loss_M, twin[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(drawn_M, twin[-1])
    for got, want in zip(gradients, twin[1:-1], strict=True):
        assert got.dtype == want.dtype and float((got - want).norm() / want.norm()) < 2**-7


@settings(max_examples=20)
@given(rows=st.integers(1, 140), vocabulary=st.integers(1, 400), size=st.sampled_from([16, 48, 80]))
def test_any_shape(rows: int, vocabulary: int, size: int) -> None:
    tensors = inputs(rows, vocabulary, size, torch.float32)
    for got, twin in zip(results("native", tensors), results("reference", tensors), strict=True):
        torch.testing.assert_close(got, twin, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_parameters_of_other_dtypes(parameters: torch.dtype) -> None:
    """Each gradient comes back in its input's dtype."""
    hidden_ME, embedding_VE, bias_V, *rest = inputs(9, 150, 32, parameters)
    tensors = (hidden_ME.float(), embedding_VE.to(parameters), bias_V.to(parameters), *rest)
    got, twin = results("native", tensors), results("reference", tensors)
    assert [result.dtype for result in got[:4]] == [torch.float32, torch.float32, parameters, parameters]
    for one, other in zip(got, twin, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)


def test_inputs_used_twice_get_both_gradients() -> None:
    """Tied weights: rows of the embedding are the hidden states; and they need not be contiguous."""
    embedding_VE = inputs(1, 20, 32, torch.float32)[1]
    targets_M = torch.tensor([3, 11, 0, 12, 19, 13])[::2]
    found = []
    for path in ("native", "reference"):
        leaf_VE = embedding_VE.T.contiguous().T.requires_grad_()
        with use(path):
            out = mlm_head(leaf_VE[::7], leaf_VE, torch.zeros(20), targets_M, seed=1)
            out.loss_M.sum().backward()
        found.append(leaf_VE.grad)
    torch.testing.assert_close(*found)


# ---------------------------------------------------------------- integration


def test_opcheck() -> None:
    hidden_ME, embedding_VE, bias_V, grad_M, targets_M = inputs(4, 140, 16, torch.float32)
    operands = [tensor.requires_grad_() for tensor in (hidden_ME, embedding_VE, bias_V)]
    torch.library.opcheck(mlm_head_native.forward.custom, (*operands, targets_M, SEED, 1, 0.5))
    detached = [operand.detach() for operand in operands]
    logsumexp_M = mlm_head_native.forward(*detached, targets_M, SEED, 1, 0.5)[2]
    torch.library.opcheck(mlm_head_native.backward.custom, (grad_M, *detached, targets_M, logsumexp_M))


def test_compiles_without_a_graph_break() -> None:
    hidden_ME, embedding_VE, bias_V, _, targets_M = inputs(4, 140, 16, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (hidden_ME, embedding_VE, bias_V)]

    def step(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        loss_M, sampled_M = mlm_head(tensors[0] * 2.0, *tensors[1:], targets_M, seed=SEED, stream=1)
        return loss_M.sum(), sampled_M

    found = []
    with use("native"):
        for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
            loss, sampled_M = function(*leaves)
            found.append((loss, sampled_M, *torch.autograd.grad(loss, leaves)))
    for compiled, eager in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_training_takes_the_loops_and_inference_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name, module, function in (
        ("loops", mlm_head_native, "forward"), ("twin", mlm_head_reference, "mlm_head"),
    ):  # fmt: skip
        real = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, real=real, name=name: taken.append(name) or real(*a))

    def call(size: int = 32, dtype: torch.dtype = torch.float32) -> str:
        hidden_ME, embedding_VE, bias_V, _, targets_M = inputs(3, 50, size, dtype)
        mlm_head(hidden_ME, embedding_VE, bias_V, targets_M, seed=1)
        return taken.pop()

    monkeypatch.setattr(native, "has_avx2", lambda: True)
    assert call() == "loops" and call(size=40) == call(dtype=torch.float16) == "twin"
    with torch.no_grad():
        assert call() == "twin", "inference in fp32 never waits for a compiler"
    monkeypatch.setattr(mlm_head_native, "has_fast_bf16", lambda: False)
    assert call(dtype=torch.bfloat16) == "twin"
    monkeypatch.setattr(native, "has_avx2", lambda: False)
    assert call() == "twin"
    with use("native"), pytest.raises(RuntimeError, match=r"native was asked for but cannot run: .*\(3, 40\)"):
        call(size=40)


@needs_avx2
@pytest.mark.parametrize("processor", ["haswell", "x86-64"])
def test_loops_for_older_processors(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AVX-512, and without AVX, vectors are shorter."""
    older = native.load_for(processor)
    monkeypatch.setattr(native, "_load", lambda: older)
    for shape in SHAPES.values():
        test_loss_and_gradients_are_within_the_error_budget(shape, torch.float32)
    test_draws_are_those_of_the_stored_logits(1.5, torch.float32)
    test_a_row_that_is_no_distribution(torch.float32)
