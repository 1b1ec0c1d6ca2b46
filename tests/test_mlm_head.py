"""mlm_head against the naive float64 formula: loss, gradients and draws, on every path.

Paths: the twin; the narrow kernels (everything on chip); the wide kernels (cuBLAS products). The interpreter
runs both kinds at any width, so the same tests cover both; a GPU would spill on narrow fp32 (see
`mlm_head_triton`), where the choice is left to the code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from electra_kernels import (
    MLMHead,
    mlm_head,
    mlm_head_narrow_triton,
    mlm_head_reference,
    mlm_head_triton,
    sample_and_replace,
    sample_replace_reference,
    use,
)
from electra_kernels import mlm_head_wide_triton as wide
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    LARGE,
    assert_within_budget,
    dtype_id,
    poisoned_memory,
    skip_without_memory,
    value_and_gradients,
)
from torch import Tensor

# NaN and infinity go in on purpose, and NumPy, under the interpreter, says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SEED = torch.tensor([-77, 5])

# (M, V, E), and why.
SHAPES = {
    "two-blocks-of-rows": (18, 150, 16),  # a full and an almost empty block; partial last tile
    "four-tiles": (5, 500, 64),  # the vocabulary is split over programs; several inner blocks
    "one-row-one-tile": (1, 128, 32),
    "odd-width": (3, 129, 40),  # E that is no power of two, one word in the last tile
    "smaller-than-a-tile": (4, 7, 8),
}


@pytest.fixture(params=["reference", "narrow", "wide"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Chooses the implementation, with chunks small enough that tiny shapes make several."""
    monkeypatch.setattr(mlm_head_reference, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(sample_replace_reference, "GPU_CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(wide, "CHUNK_ELEMENTS", 2000)
    if request.param != "reference" and INTERPRETED:
        small = mlm_head_narrow_triton.Tile(16, 16, 4, 1)
        tiles = mlm_head_narrow_triton.Tiles(small, small, small._replace(block=64))
        monkeypatch.setattr(mlm_head_narrow_triton, "TILES", {90: tiles})
        monkeypatch.setattr(wide, "_tile", lambda itemsize: (16, 32, 4, 1))
        monkeypatch.setattr(mlm_head_triton, "_kernels", lambda hidden_ME: mlm_head_narrow_triton)
    if request.param == "wide":  # (compiled, `narrow` is what width and type choose: fp32 would not fit on chip)
        monkeypatch.setattr(mlm_head_triton, "_kernels", lambda hidden_ME: wide)
    with use("reference" if request.param == "reference" else "triton"):
        yield request.param


def inputs(rows: int, vocabulary: int, size: int, seed: int = 0) -> tuple[Tensor, ...]:
    """(hidden, embedding, bias, targets, gradient of the loss), float64 on the host."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ME, embedding_VE, bias_V, grad_M = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((rows, size), (vocabulary, size), (vocabulary,), (rows,))
    )
    targets_M = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden_ME, embedding_VE * 3 / size**0.5, bias_V, targets_M, grad_M


def naive(hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, targets_M: Tensor) -> Tensor:
    """The formula as anybody would write it; logits in fp32 at least, as autocast's cross-entropy has them."""
    logits_MV = hidden_ME @ embedding_VE.T + bias_V
    logits_MV = logits_MV if logits_MV.dtype == torch.float64 else logits_MV.float()
    return F.cross_entropy(logits_MV, targets_M, reduction="none")


def ours(*tensors: Tensor) -> Tensor:
    return mlm_head(*tensors, seed=SEED.to(DEVICE)).loss_M


# ---------------------------------------------------------------- loss and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_and_gradients(path: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    *leaves, targets_M, grad_M = inputs(*shape)
    rounded = [leaf.to(dtype) for leaf in leaves]  # all three computations see the same numbers
    exact = value_and_gradients(naive, [leaf.double() for leaf in rounded], grad_M, targets_M)
    device = [t.to(DEVICE) for t in (*rounded, targets_M, grad_M)]
    same = value_and_gradients(naive, device[:3], device[4], device[3])
    got = value_and_gradients(ours, device[:3], device[4], device[3])
    for name, *values in zip(("loss", "dhidden", "dembedding", "dbias"), got, same, exact, strict=True):
        assert_within_budget(name, *values)


def test_gradients_of_words_that_are_nearly_certain(path: str) -> None:
    """P = 0.999 rounds to 1 in bf16: P - 1 has to be taken before, or the row's gradient is lost."""
    hidden_ME, embedding_VE, bias_V, targets_M, _ = inputs(6, 150, 16)
    bias_V, targets_M = torch.zeros_like(bias_V), torch.full_like(targets_M, 3)
    bias_V[3] = math.log(999 * 149)
    rounded = [leaf.to(DTYPES[-1]) for leaf in (hidden_ME * 0.05, embedding_VE, bias_V)]
    wanted_ME = value_and_gradients(naive, [leaf.double() for leaf in rounded], torch.ones(6), targets_M)[1]
    device = [t.to(DEVICE) for t in (*rounded, torch.ones(6), targets_M)]
    dhidden_ME = value_and_gradients(ours, device[:3], *device[3:])[1].cpu().double()
    assert ((dhidden_ME - wanted_ME).norm(dim=1) <= 0.01 * wanted_ME.norm(dim=1)).all()


def test_gradcheck(path: str) -> None:
    *leaves, targets_M, _ = (t.to(DEVICE) for t in inputs(2, 140, 8))
    assert torch.autograd.gradcheck(
        lambda *tensors: ours(*tensors, targets_M),
        tuple(leaf.requires_grad_() for leaf in leaves),
        fast_mode=True,
    )


@settings(max_examples=8)
@given(rows=st.integers(0, 5), vocabulary=st.integers(1, 300), size=st.integers(1, 40), kind=st.booleans())
def test_any_shape(rows: int, vocabulary: int, size: int, kind: bool) -> None:
    *leaves, targets_M, grad_M = (t.to(DEVICE) for t in inputs(rows, vocabulary, size))
    kernels = mlm_head_narrow_triton if kind else wide
    with pytest.MonkeyPatch.context() as patch, use("triton"):
        patch.setattr(mlm_head_triton, "_kernels", lambda hidden_ME: kernels)
        got = value_and_gradients(ours, tuple(leaves), grad_M, targets_M)
    for a, b in zip(got, value_and_gradients(naive, tuple(leaves), grad_M, targets_M), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_no_rows(path: str) -> None:
    *leaves, targets_M, _ = (t.to(DEVICE) for t in inputs(0, 10, 8))
    loss_M, *gradients = value_and_gradients(ours, tuple(leaves), torch.zeros(0, device=DEVICE), targets_M)
    assert loss_M.shape == (0,) and all((g == 0).all() for g in gradients)
    transposed_VE = torch.zeros(8, 10, device=DEVICE).T
    hidden_ME, _, bias_V = leaves
    zeros = mlm_head_triton.backward(hidden_ME[:, 0], hidden_ME, transposed_VE, bias_V, targets_M, hidden_ME[:, 0])
    assert all(gradient.is_contiguous() for gradient in zeros)  # as `register_fake` says


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_half_hidden_beside_fp32_parameters(path: str, bias_dtype: torch.dtype) -> None:
    """What autocast gives: fp16 hidden, fp32 parameters; each gradient comes back in its own dtype."""
    hidden_ME, embedding_VE, bias_V, targets_M, grad_M = (t.to(DEVICE) for t in inputs(6, 150, 16))
    leaves = hidden_ME.half(), embedding_VE.half().float(), bias_V.float().to(bias_dtype)
    loss_M, *gradients = value_and_gradients(ours, leaves, grad_M, targets_M)
    assert loss_M.dtype == torch.float32
    assert [g.dtype for g in gradients] == [torch.float16, torch.float32, bias_dtype]
    exact = value_and_gradients(naive, tuple(leaf.double() for leaf in leaves), grad_M, targets_M)
    for got, wanted in zip((loss_M, *gradients), exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-3, atol=2e-3 * wanted.abs().max().item())


def test_autocast_on_the_training_path() -> None:
    hidden_ME, embedding_VE, bias_V, targets_M, _ = inputs(6, 150, 16)
    parameter_VE = embedding_VE.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_M = mlm_head(hidden_ME.bfloat16(), parameter_VE, bias_V.float(), targets_M, seed=1).loss_M
    loss_M.sum().backward()
    assert loss_M.dtype == parameter_VE.grad.dtype == torch.float32  # type: ignore[union-attr]
    torch.testing.assert_close(
        loss_M.double(), naive(hidden_ME, embedding_VE, bias_V, targets_M), rtol=0.05, atol=0.05
    )


def test_same_bits_every_time_and_inputs_untouched(path: str) -> None:
    leaves = [t.to(DEVICE, torch.float32).requires_grad_() for t in inputs(5, 300, 16)[:3]]
    targets_M, grad_M = torch.arange(5, device=DEVICE), torch.ones(5, device=DEVICE)
    before = [leaf.detach().clone() for leaf in leaves]
    with poisoned_memory():
        out = mlm_head(*leaves, targets_M, seed=SEED.to(DEVICE))
        first = torch.autograd.grad(out.loss_M, leaves, grad_M, retain_graph=True)
        second = torch.autograd.grad(out.loss_M, leaves, grad_M)
        again = mlm_head(*leaves, targets_M, seed=SEED.to(DEVICE))
    assert torch.equal(out.loss_M, again.loss_M) and torch.equal(out.sampled_ids_M, again.sampled_ids_M)
    assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(first, second, strict=True))
    assert ((out.sampled_ids_M >= 0) & (out.sampled_ids_M < 300)).all()
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


def test_inputs_used_twice_get_both_gradients(path: str) -> None:
    """Tied weights: rows of the embedding are the hidden states."""
    _, embedding_VE, bias_V, *_ = (t.to(DEVICE) for t in inputs(1, 20, 8))
    targets_M = torch.tensor([3, 0, 19], device=DEVICE)
    gradients = []
    for function in (ours, naive):
        leaf_VE = embedding_VE.clone().requires_grad_()
        function(leaf_VE[:3], leaf_VE, bias_V, targets_M).sum().backward()
        gradients.append(leaf_VE.grad)
    torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_draws_are_those_of_the_stored_logits(path: str, temperature: float) -> None:
    """Equal logits and seed give the ids of `sample_and_replace`, whose exactness has its own tests."""
    hidden_ME, embedding_VE, bias_V, targets_M, _ = inputs(14, 290, 16)
    bias_V[::3] = -math.inf
    targets_M = targets_M // 3 * 3 + 1
    device = [t.to(DEVICE) for t in (hidden_ME.float(), embedding_VE.float(), bias_V.float(), targets_M)]
    head: MLMHead = mlm_head(*device, seed=SEED.to(DEVICE), stream=4, temperature=temperature)
    logits_MV = hidden_ME.float() @ embedding_VE.float().T + bias_V.float()
    with use("reference"):
        drawn = sample_and_replace(
            logits_MV, torch.zeros(14, dtype=torch.int64), torch.arange(14), seed=SEED, stream=4,
            temperature=temperature,
        )  # fmt: skip
    assert torch.equal(head.sampled_ids_M.cpu(), drawn.sampled_ids_M)
    assert (head.sampled_ids_M % 3 != 0).all()
    device[0], device[3] = device[0][:4], device[3][:4]
    cold = mlm_head(*device, seed=SEED.to(DEVICE), temperature=1e-30)
    assert torch.equal(cold.sampled_ids_M.cpu(), logits_MV[:4].argmax(1))
    torch.testing.assert_close(cold.loss_M, head.loss_M[:4])  # the temperature does not touch the loss


def test_a_row_that_is_no_distribution(path: str) -> None:
    hidden_ME, embedding_VE, bias_V, targets_M, _ = (t.to(DEVICE) for t in inputs(4, 200, 8))
    hidden_ME[1, 3] = math.nan
    hidden_ME[2] = math.inf
    leaves = [t.requires_grad_() for t in (hidden_ME, embedding_VE, bias_V)]
    loss_M, sampled_M = mlm_head(*leaves, targets_M, seed=0)
    assert loss_M.isnan().tolist() == [False, True, True, False]
    assert (sampled_M == -1).tolist() == [False, True, True, False]
    dhidden_ME, *others = torch.autograd.grad(loss_M.sum(), leaves)
    assert dhidden_ME.isnan().any(1).tolist() == [False, True, True, False]
    assert all(other.isnan().any() for other in others)  # never a plausible gradient
    impossible_V = torch.full_like(bias_V, -math.inf)
    loss_M, sampled_M = mlm_head(hidden_ME, embedding_VE, impossible_V, targets_M, seed=0)
    assert loss_M.isnan().all() and (sampled_M == -1).all()


# ---------------------------------------------------------------- integration


def operator_arguments() -> list[Tensor]:
    *leaves, targets_M, _ = inputs(2, 140, 16)
    return [*(leaf.to(DEVICE, torch.float32) for leaf in leaves), targets_M.to(DEVICE), SEED.to(DEVICE)]


@pytest.mark.host_only
def test_opcheck() -> None:
    arguments = operator_arguments()
    loss_M, _, logsumexp_M = mlm_head_triton.forward(*arguments, 1, 0.5)
    torch.library.opcheck(mlm_head_triton.backward.custom, (torch.ones_like(loss_M), *arguments[:4], logsumexp_M))
    leaves = [t.requires_grad_() for t in arguments[:3]]
    torch.library.opcheck(mlm_head_triton.forward.custom, (*leaves, *arguments[3:], 1, 0.5))


@pytest.mark.host_only
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_compiles_without_a_graph_break(implementation: str) -> None:
    *leaves, targets_M, seed = operator_arguments()
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def step(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        loss_M, sampled_M = mlm_head(tensors[0] * 2.0, *tensors[1:4], seed=tensors[4], stream=1)
        return loss_M.sum(), sampled_M

    with use(implementation):  # type: ignore[arg-type]
        results = []
        for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
            loss, sampled_M = function(*leaves, targets_M, seed)
            results.append((loss, sampled_M, *torch.autograd.grad(loss, leaves)))
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_width_and_dtype_choose_the_kernels() -> None:
    for size, kernels in ((128, mlm_head_narrow_triton), (129, wide)):
        assert mlm_head_triton._kernels(torch.zeros(1, size, dtype=torch.bfloat16)) is kernels


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_training_path_is_the_specification(
    shape: tuple[int, int, int], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin in chunks against its own plain form: losses, words and gradients."""
    monkeypatch.setattr(mlm_head_reference, "CHUNK_ELEMENTS", 1000)
    *leaves, targets_M, grad_M = inputs(*shape)
    results = []
    for function in (mlm_head_reference.mlm_head, mlm_head_reference.plain_mlm_head):
        copies = [leaf.clone().requires_grad_() for leaf in leaves]
        loss_M, sampled_M = function(*copies, targets_M, SEED, 4, temperature)
        results.append((loss_M.detach(), *torch.autograd.grad(loss_M, copies, grad_M), sampled_M))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@LARGE
@pytest.mark.gpu
def test_large_and_without_synchronising() -> None:
    """More than 2^31 logits; no host wait on the way."""
    skip_without_memory(4)
    arguments = inputs(70_400, 30_522, 16)[:4]
    hidden_ME, embedding_VE, bias_V, targets_M = (t.cuda() for t in arguments)
    leaves = [t.bfloat16().requires_grad_() for t in (hidden_ME, embedding_VE, bias_V)]
    seed = SEED.cuda()
    mlm_head(*leaves, targets_M, seed=seed).loss_M.sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = mlm_head(*leaves, targets_M, seed=seed)
        out.loss_M.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tail = slice(-50, None)
    exact = naive(leaves[0][tail].double(), leaves[1].double(), leaves[2].double(), targets_M[tail])
    torch.testing.assert_close(out.loss_M[tail].double(), exact, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "rank": ({"hidden_ME": torch.zeros(3)}, r"hidden_ME: expected shape \[any, any\], got \[3\]"),
        "integer": ({"hidden_ME": torch.zeros(3, 4, dtype=torch.int32)}, "hidden_ME: expected dtype"),
        "width": ({"embedding_VE": torch.zeros(9, 5)}, r"embedding_VE: expected shape \[any, 4\], got \[9, 5\]"),
        "bias": ({"bias_V": torch.zeros(8)}, r"bias_V: expected shape \[9\], got \[8\]"),
        "targets": ({"target_ids_M": torch.zeros(3)}, "target_ids_M: expected dtype int64, int32, got float32"),
        "device": ({"bias_V": torch.zeros(9, device="meta")}, "bias_V: expected a tensor on cpu, got one on meta"),
        "outside": (
            {"target_ids_M": torch.tensor([0, 9, 1])},
            r"target_ids_M: expected .*\[0, 9\), got 9",
        ),
        "temperature": ({"temperature": -1.0}, "temperature: expected a finite number > 0, got -1.0"),
        "seed": ({"seed": torch.zeros(1)}, "seed: expected an int or an int64 tensor"),
    }.values(),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    good = {
        "hidden_ME": torch.zeros(3, 4), "embedding_VE": torch.zeros(9, 4), "bias_V": torch.zeros(9),
        "target_ids_M": torch.tensor([0, 1, 2]), "seed": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        mlm_head(**{**good, **change})  # type: ignore[arg-type]
