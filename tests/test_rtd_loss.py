"""rtd_loss and rtd_head against the float64 formula: loss, gradients, counts, on both implementations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from electra_kernels import rtd_head, rtd_loss, rtd_loss_and_counts, rtd_loss_triton, use
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, DTYPES, assert_within_budget, dtype_id, implementations, poisoned_memory
from torch import Tensor

# NaN and infinity go in on purpose, and NumPy, under the interpreter, says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# T, and why.
TOKENS = {
    "one": 1,
    "part-of-a-block": 50,
    "a-block-and-one": 65,
    "programs-take-turns": 1100,  # more blocks than programs
}
WEIGHTS = ("none", "some-zero")


path = implementations(
    (rtd_loss_triton, "BLOCK_T", 64),
    (rtd_loss_triton, "HEAD_ELEMENTS", 512),
    (rtd_loss_triton, "PROGRAMS", 5),
    (rtd_loss_triton, "FINISH_BLOCK", 4),
)


def inputs(tokens: int, size: int = 24, weights: str = "none", seed: int = 0) -> dict[str, Tensor]:
    """Everything in float64 on the host; a third of the tokens replaced."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tensors = {
        "logits": 3 * normal(tokens), "hidden": normal(tokens, size), "weight": normal(size), "bias": normal(1),
        "labels": torch.rand(tokens, generator=generator) < 0.33,
    }  # fmt: skip
    if weights != "none":
        tensors["weights"] = normal(tokens).abs() * (torch.rand(tokens, generator=generator) < 0.7)
        tensors["weights"][0] = 0.5
    return tensors


def naive_loss(logits_T: Tensor, labels_T: Tensor, weights_T: Tensor | None) -> Tensor:
    """-log of the probability of the right answer, as anybody would write it (float64 needs no stable form)."""
    p_T = torch.sigmoid(logits_T)
    losses_T = -torch.where(labels_T, p_T, 1 - p_T).log()
    return losses_T.mean() if weights_T is None else (weights_T * losses_T).sum() / weights_T.sum()


def torch_loss(logits_T: Tensor, labels_T: Tensor, weights_T: Tensor | None) -> Tensor:
    """PyTorch in the precision of the logits."""
    total = None if weights_T is None else weights_T.sum()
    weights_T = None if weights_T is None else weights_T.to(logits_T.dtype)
    losses_T = F.binary_cross_entropy_with_logits(
        logits_T, labels_T.to(logits_T.dtype), weight=weights_T, reduction="none"
    )
    return losses_T.float().mean() if total is None else losses_T.float().sum() / total.float()


def value_and_gradients(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(3 * value, leaves)]


def counts_by_hand(logits_T: Tensor, labels_T: Tensor, weights_T: Tensor | None) -> list[int]:
    counts = [0, 0, 0, 0]
    for index, (logit, label) in enumerate(zip(logits_T.tolist(), labels_T.tolist(), strict=True)):
        if weights_T is None or weights_T[index] != 0:
            counts[(0 if label else 1) if logit > 0 else (2 if label else 3)] += 1
    return counts


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_loss(path: str, tokens: int, weights: str, dtype: torch.dtype) -> None:
    data = inputs(tokens, weights=weights)
    logits_T, labels_T = data["logits"].to(dtype), data["labels"]
    weights_T = data["weights"].float() if weights != "none" else None
    exact_weights = None if weights_T is None else weights_T.double()
    exact = value_and_gradients(lambda x: naive_loss(x, labels_T, exact_weights), [logits_T.double()])
    logits_T, labels_T = logits_T.to(DEVICE), labels_T.to(DEVICE)
    weights_T = None if weights_T is None else weights_T.to(DEVICE)
    same = value_and_gradients(lambda x: torch_loss(x, labels_T, weights_T), [logits_T])
    got = value_and_gradients(lambda x: rtd_loss(x, labels_T, weights_T), [logits_T])
    assert got[0].dtype == torch.float32
    for name, *values in zip(("loss", "dlogits"), got, same, exact, strict=True):
        assert_within_budget(name, *values)
    counts = rtd_loss_and_counts(logits_T, labels_T, weights_T).counts
    assert counts.dtype == torch.int64 and counts.tolist() == counts_by_hand(logits_T, labels_T, weights_T)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("tokens", "size"), [(1, 8), (50, 24), (130, 32)], ids=["one", "odd-width", "turns"])
def test_head(path: str, tokens: int, size: int, weights: str, dtype: torch.dtype) -> None:
    data = inputs(tokens, size, weights)
    leaves = [data["hidden"].to(dtype), data["weight"].float(), data["bias"].float()]
    labels_T, weights_T = data["labels"], data.get("weights")

    def naive(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return naive_loss(F.gelu(hidden) @ weight + bias, labels_T, weights_T)

    def eager(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits_T = (F.gelu(hidden) @ weight.to(hidden.dtype)).float() + bias
        return torch_loss(logits_T, labels_T.to(DEVICE), None if weights_T is None else weights_T.to(DEVICE))

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mine = None if weights_T is None else weights_T.to(DEVICE)
        return rtd_head(hidden, weight, bias, labels_T.to(DEVICE), mine).loss

    exact = value_and_gradients(naive, [leaf.double() for leaf in leaves])
    same, got = (value_and_gradients(f, [leaf.to(DEVICE) for leaf in leaves]) for f in (eager, ours))
    for name, *values in zip(("loss", "dhidden", "dweight", "dbias"), got, same, exact, strict=True):
        assert_within_budget(name, *values)
    out = rtd_head(*(leaf.to(DEVICE) for leaf in leaves), labels_T.to(DEVICE))
    logits_T = F.gelu(leaves[0].double()) @ leaves[1].double() + leaves[2].double()
    torch.testing.assert_close(out.logits_T.cpu().double(), logits_T, rtol=1e-5, atol=1e-5)
    assert out.counts.tolist() == counts_by_hand(logits_T, labels_T, None)


def test_gradcheck(path: str) -> None:
    data = {name: t.to(DEVICE) for name, t in inputs(70, 8, "some-zero").items()}
    labels_T, weights_T = data["labels"], data["weights"]
    assert torch.autograd.gradcheck(
        lambda x: rtd_loss(x, labels_T, weights_T), (data["logits"].requires_grad_(),), fast_mode=True
    )
    leaves = tuple(data[name].requires_grad_() for name in ("hidden", "weight", "bias"))
    assert torch.autograd.gradcheck(
        lambda *tensors: rtd_head(*tensors, labels_T, weights_T).loss, leaves, fast_mode=True
    )


@settings(max_examples=8)
@given(tokens=st.integers(0, 60), size=st.integers(1, 40), weighted=st.booleans(), seed=st.integers(0, 99))
def test_any_shape(tokens: int, size: int, weighted: bool, seed: int) -> None:
    data = inputs(max(tokens, 1), size, "some-zero" if weighted else "none", seed)
    per_token = {name: t[:tokens] for name, t in data.items() if name in ("hidden", "labels", "weights")}
    data |= per_token
    arguments = [data["hidden"].float(), data["weight"], data["bias"], data["labels"], data.get("weights")]
    results = []
    for implementation in ("triton", "reference"):
        with use(implementation):  # type: ignore[arg-type]
            results.append(rtd_head(*(a if a is None else a.to(DEVICE) for a in arguments)))  # type: ignore[arg-type]
    for kernel, twin in zip(*results, strict=True):
        torch.testing.assert_close(kernel, twin)


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("size", [100.0, 1e4, 6e4])
def test_large_logits(path: str, size: float) -> None:
    """The loss of a confident mistake is the logit itself; that of a confident hit is 0; neither overflows."""
    for dtype in DTYPES:
        logits_T = torch.tensor([size, -size, size, -size], dtype=dtype, device=DEVICE).requires_grad_()
        loss = rtd_loss(logits_T, torch.tensor([True, False, False, True], device=DEVICE))
        (grad,) = torch.autograd.grad(loss, logits_T)
        assert loss.item() == pytest.approx(logits_T[0].item() / 2)
        assert grad.tolist() == pytest.approx([0.0, 0.0, 0.25, -0.25], abs=1e-40)


def test_a_logit_of_0_says_original(path: str) -> None:
    """A model whose head starts from 0 has nothing but such."""
    labels_T = torch.tensor([True, False], device=DEVICE)
    assert rtd_loss_and_counts(torch.zeros(2, device=DEVICE), labels_T).counts.tolist() == [0, 0, 1, 1]


def test_small_losses_are_not_rounded_away(path: str) -> None:
    logits_T = torch.tensor([30.0], device=DEVICE)
    assert rtd_loss(logits_T, torch.tensor([True], device=DEVICE)).item() == pytest.approx(math.exp(-30), rel=1e-5)


def test_nothing_to_average(path: str) -> None:
    """No tokens, or no weight: loss 0 and no gradient, not NaN."""
    for tokens, weights_T in ((0, None), (3, torch.zeros(3, device=DEVICE))):
        logits_T = torch.ones(tokens, device=DEVICE, requires_grad=True)
        out = rtd_loss_and_counts(logits_T, torch.ones(tokens, dtype=torch.bool, device=DEVICE), weights_T)
        (grad,) = torch.autograd.grad(out.loss, logits_T)
        assert out.loss.item() == 0 and out.counts.tolist() == [0] * 4 and (grad == 0).all()


def test_nan_stays_visible(path: str) -> None:
    logits_T = torch.tensor([1.0, math.nan, 2.0], device=DEVICE, requires_grad=True)
    loss = rtd_loss(logits_T, torch.tensor([True, False, True], device=DEVICE))
    (grad,) = torch.autograd.grad(loss, logits_T)
    assert loss.isnan() and grad.isnan().tolist() == [False, True, False]


def test_same_bits_every_time_and_inputs_untouched(path: str) -> None:
    data = {name: t.to(DEVICE) for name, t in inputs(130, 24, "some-zero").items()}
    leaves = [data[name].float().requires_grad_() for name in ("hidden", "weight", "bias")]
    before = [leaf.detach().clone() for leaf in leaves]
    with poisoned_memory():
        runs = []
        for _ in range(2):
            out = rtd_head(*leaves, data["labels"], data["weights"])
            gradients = torch.autograd.grad(out.loss, leaves, retain_graph=True)
            runs.append((*out, *gradients, *torch.autograd.grad(out.loss, leaves)))
    assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(*runs, strict=True))
    again = zip(runs[0][3:6], runs[0][6:], strict=True)
    assert all(torch.equal(a, b) for a, b in again), "a second backward differs"
    assert not runs[0][1].requires_grad and all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


def test_inputs_need_not_be_contiguous(path: str) -> None:
    data = {name: t.to(DEVICE).float() for name, t in inputs(20, 24).items()}
    labels_T = data["labels"].bool()
    wanted = rtd_head(data["hidden"], data["weight"], data["bias"], labels_T)
    got = rtd_head(data["hidden"].T.contiguous().T, data["weight"], data["bias"], labels_T)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- integration and errors


@pytest.mark.host_only
def test_opcheck() -> None:
    data = {name: t.to(DEVICE) for name, t in inputs(9, 8, "some-zero").items()}
    leaves = [data[name].float().requires_grad_() for name in ("logits", "hidden", "weight", "bias")]
    plain, head = (leaves[0], data["labels"], None), (*leaves[1:], data["labels"], data["weights"].float())
    torch.library.opcheck(rtd_loss_triton.rtd_loss.custom, plain)
    torch.library.opcheck(rtd_loss_triton.rtd_head.custom, head)
    with torch.no_grad():
        grad, saved = torch.ones((), device=DEVICE), rtd_loss_triton.rtd_loss(*plain)[2:]
        saved_head = rtd_loss_triton.rtd_head(*head)[3:]
    leaves = [leaf.detach() for leaf in leaves]
    torch.library.opcheck(rtd_loss_triton.rtd_loss_backward.custom, (grad, *saved, torch.float32))
    torch.library.opcheck(rtd_loss_triton.rtd_head_backward.custom, (grad, *leaves[1:], *saved_head))


@pytest.mark.host_only
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_compiles_without_a_graph_break(implementation: str) -> None:
    data = {name: t.to(DEVICE) for name, t in inputs(9, 8).items()}
    leaves = [data[name].float().requires_grad_() for name in ("hidden", "weight", "bias")]

    def step(*tensors: Tensor) -> Tensor:
        head = rtd_head(tensors[0] * 2, *tensors[1:], data["labels"])
        return head.loss + rtd_loss(tensors[0][:, 0], data["labels"])

    with use(implementation):  # type: ignore[arg-type]
        compiled = value_and_gradients(torch.compile(step, fullgraph=True, backend="aot_eager"), leaves)
        for a, b in zip(compiled, value_and_gradients(step, leaves), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "width": ({"weight_D": torch.zeros(5)}, r"weight_D: expected shape \[4\], got \[5\]"),
        "bias": ({"bias": torch.zeros(2)}, r"bias: expected shape \[1\], got \[2\]"),
        "number": ({"bias": 0.5}, "bias: expected a tensor, got float"),
        "labels": ({"is_replaced_T": torch.zeros(3)}, "is_replaced_T: expected dtype bool, got float32"),
        "length": ({"is_replaced_T": torch.zeros(2).bool()}, r"is_replaced_T: expected shape \[3\], got \[2\]"),
        "weights": ({"weights_T": torch.ones(3).long()}, "weights_T: expected dtype .* got int64"),
        "device": ({"weights_T": torch.ones(3, device="meta")}, "weights_T: expected a tensor on cpu"),
        "negative": ({"weights_T": torch.tensor([1, -0.5, 1])}, "weights_T: expected no negative .* got -0.5"),
        "rank": ({"hidden_TD": torch.zeros(4)}, r"hidden_TD: expected shape \[any, any\], got \[4\]"),
    }.values(),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments(change: dict[str, Tensor], message: str) -> None:
    good = {
        "hidden_TD": torch.zeros(3, 4), "weight_D": torch.zeros(4), "bias": torch.zeros(()),
        "is_replaced_T": torch.zeros(3).bool(),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        rtd_head(**{**good, **change})
