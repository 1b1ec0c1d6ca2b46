"""Attention: the twin against the formula, the kernels against the twin, and everything around them.

Here the kernels run under Triton's interpreter (float32, float16, float64); on a GPU the same tests run
them for real, with bfloat16 as well. Sequences of up to 32 tokens take the short path, longer ones the
general path (the limits of float32; see `attention_triton.SHORT_LIMIT_FLOAT32`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from attention_calls import SEED, dropout_mask, inputs, largest_logit, offsets, run, tiny_tiles  # noqa: F401
from electra_kernels import attention, attention_triton, rng, use
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    LARGE,
    ON_PTX_MACHINE,
    assert_within_budget,
    dtype_id,
    poisoned_memory,
    skip_without_memory,
)
from torch import Tensor

# Lengths, and why they are here.
LENGTHS = {
    "one-token": [1],  # softmax of a single key
    "tile-minus-plus-one": [15, 16, 17],  # around the smallest block
    "equal": [12, 12, 12],  # the twin's path without a gather
    "empty-sequences": [0, 5, 0, 0, 9, 0],  # nothing to compute, at both ends too
    "longest-short": [32, 3],  # fills the short path's block
    "first-general": [33, 1, 0],  # two blocks, the second almost empty; a sequence shorter than a block
    "three-blocks": [70, 32, 64],  # online softmax rescales; exact multiples of the block
}


def check(
    lengths: Sequence[int], dtype: torch.dtype, dropout_p: float, heads: int = 2, head_dim: int = 16
) -> None:
    """Kernels within the budget, forward and backward, against the twin in float64 and in `dtype`."""
    qkv, dout = inputs(lengths, heads, head_dim)
    qkv, dout = qkv.to(dtype).double(), dout.to(dtype).double()  # what the inputs really are in this dtype
    exact = run("reference", qkv, dout, lengths, torch.float64, dropout_p, device="cpu")
    same = run("reference", qkv, dout, lengths, dtype, dropout_p)
    got = run("triton", qkv, dout, lengths, dtype, dropout_p)
    logit = largest_logit(qkv, lengths)
    assert_within_budget("out", got[0], same[0], exact[0], largest_logit=logit)
    for i, name in enumerate(("dq", "dk", "dv")):
        tensors = (got[1][:, i], same[1][:, i], exact[1][:, i])
        assert_within_budget(name, *tensors, beside=exact[1], largest_logit=logit)


# ---------------------------------------------------------------- the twin is the formula


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_twin_is_the_formula(lengths: list[int], dropout_p: float) -> None:
    qkv, dout = inputs(lengths)
    out, _ = run("reference", qkv, dout, lengths, torch.float64, dropout_p, device="cpu")
    start = 0
    for length in lengths:
        rows = torch.arange(start, start + length)
        for head in range(qkv.shape[2]):
            q, k, v = qkv[rows, :, head].unbind(1)
            logits = q @ k.T / math.sqrt(q.shape[-1])
            p = logits.exp() / logits.exp().sum(1, keepdim=True)
            keep = rng.keep_mask(SEED, rows, length, dropout_p, stream=3, plane=head)
            torch.testing.assert_close(out[rows, head], (p * keep * rng.keep_scale(dropout_p)) @ v)
        start += length


def test_twin_in_bfloat16_on_a_cpu_is_near_float64() -> None:
    """The dtype the CPU trains in has its own branch (an explicit backward)."""
    lengths = [24, 24]
    qkv, dout = inputs(lengths)
    for dropout_p in (0.0, 0.2):
        got = run("reference", qkv, dout, lengths, torch.bfloat16, dropout_p, device="cpu")
        exact = run("reference", qkv, dout, lengths, torch.float64, dropout_p, device="cpu")
        for a, b in zip(got, exact, strict=True):
            assert a.dtype == torch.bfloat16
            assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_other_scales_and_int64_offsets(implementation: str) -> None:
    lengths = [5, 20]
    qkv, _ = inputs(lengths)
    scaled = qkv.clone()
    scaled[:, 0] *= 0.5 * 4  # 1/sqrt(16) = 1/4, undone; then 1/2
    with use(implementation):  # type: ignore[arg-type]
        cu_seqlens = offsets(lengths, torch.int64).to(DEVICE)
        expected = attention(scaled.to(DEVICE), cu_seqlens, 20)
        got = attention(qkv.to(DEVICE), cu_seqlens, 20, softmax_scale=0.5)
        roomy = attention(qkv.to(DEVICE), cu_seqlens, 31, softmax_scale=0.5)  # a bucketed max_seqlen
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(roomy, expected)


# ---------------------------------------------------------------- the kernels are the twin


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_kernels_are_within_the_error_budget(lengths: list[int], dropout_p: float, dtype: torch.dtype) -> None:
    check(lengths, dtype, dropout_p)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_budget_of_a_gradient_of_zero_is_ulps_of_the_others(dtype: torch.dtype) -> None:
    """A single key has the probability 1 whatever its logit is, so queries and keys get no gradient."""
    qkv, dout = inputs([1])
    _, grad = run("reference", qkv, dout, [1], torch.float64, device="cpu")
    (query, key, value), largest = qkv.unbind(1), grad.abs().max()
    error = (2 * torch.finfo(dtype).eps * largest).expand_as(dout)  # as of a probability a little off 1
    slope = (dout * value).sum(-1, keepdim=True) / 4  # the formula without the mean that is to be subtracted
    wrong = {"dq": slope * key, "dk": slope * query}
    for exact in (torch.zeros_like(dout), grad[:, 0]):  # the latter is 0 up to the rounding of float64
        assert exact.abs().max() < 1e-15
        twins = exact.to(dtype)
        assert_within_budget("dq", error.to(dtype), twins, exact, beside=grad)
        with pytest.raises(AssertionError, match="dq: error"):
            assert_within_budget("dq", error.to(dtype), twins, exact)
        for name, got in (*wrong.items(), ("dq", 5 * error)):
            with pytest.raises(AssertionError, match=f"{name}: error"):
                assert_within_budget(name, got.to(dtype), twins, exact, beside=grad)


def test_the_budget_of_large_logits_is_their_rounding() -> None:
    qkv = torch.zeros(5, 3, 1, 4, dtype=torch.float64)
    qkv[1, 0, 0, 0], qkv[2, 1, 0, 0], qkv[4, 1, 0, 0] = 8, -4, 100  # the last in another sequence
    assert largest_logit(qkv, [0, 3, 2]) == 16 and largest_logit(qkv[:0], [0]) == 0
    exact = torch.ones(2, dtype=torch.float64)
    for logit, error in ((0, 4), (16, 36)):
        got = exact.float() + error * torch.finfo(torch.float32).eps
        assert_within_budget("out", got, exact.float(), exact, largest_logit=logit)
        with pytest.raises(AssertionError, match="out: error"):
            assert_within_budget("out", got + 1e-6, exact.float(), exact, largest_logit=logit)


def test_results_beside_it_loosen_no_other_budget() -> None:
    exact = torch.full((2,), 1e-3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="dq: error"):
        assert_within_budget("dq", exact.float() + 1e-6, exact.float(), exact, beside=torch.ones(2))


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 5, 24, 48, 96])
@pytest.mark.parametrize("lengths", [[13], [40, 7]], ids=["short", "general"])
def test_head_dims(lengths: list[int], head_dim: int) -> None:
    check(lengths, torch.float32, 0.3, head_dim=head_dim)


@settings(max_examples=8)
@given(
    st.lists(st.one_of(st.just(0), st.integers(1, 20), st.integers(30, 50)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.5]),
)
def test_any_lengths(lengths: list[int], heads: int, dropout_p: float) -> None:
    check(lengths, torch.float32, dropout_p, heads)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4], ids=["", "dropout"])
@pytest.mark.parametrize("lengths", [[3, 0, 2], [33, 2]], ids=["short", "general"])
def test_gradcheck(lengths: list[int], dropout_p: float) -> None:
    qkv, cu_seqlens = inputs(lengths, heads=1)[0].to(DEVICE), offsets(lengths).to(DEVICE)
    with use("triton"):
        assert torch.autograd.gradcheck(
            lambda x: attention(x, cu_seqlens, max(lengths), dropout_p=dropout_p, seed=SEED.to(DEVICE)),
            (qkv.requires_grad_(),),
            fast_mode=True,
        )


@pytest.mark.parametrize("lengths", [[9, 0, 14], [40, 0, 3]], ids=["short", "general"])
def test_every_output_is_written_and_inputs_are_not(lengths: list[int]) -> None:
    qkv, dout = inputs(lengths)
    x, dout = qkv.to(DEVICE, torch.float32).requires_grad_(), dout.to(DEVICE, torch.float32)
    before = x.detach().clone(), dout.clone()
    with poisoned_memory():
        with use("triton"):
            out = attention(x, offsets(lengths).to(DEVICE), max(lengths), dropout_p=0.2, seed=5)
            (first,) = torch.autograd.grad(out, x, dout, retain_graph=True)
            (second,) = torch.autograd.grad(out, x, dout)
    assert not out.isnan().any() and not first.isnan().any()
    assert torch.equal(first, second), "a second backward must give the same bits"
    assert torch.equal(x, before[0]) and torch.equal(dout, before[1]), "inputs were written to"


def test_inputs_and_gradients_need_not_be_contiguous() -> None:
    lengths = [6, 11]
    qkv, _ = inputs(lengths, heads=2)
    wide = torch.cat([qkv, qkv], -1).to(DEVICE, torch.float32)
    sliced = wide[..., :16].requires_grad_()
    assert not sliced.is_contiguous()
    with use("triton"):
        out = attention(sliced, offsets(lengths).to(DEVICE).repeat_interleave(2)[::2], 11)
        (grad,) = torch.autograd.grad(out.sum(), sliced)  # an expanded gradient
    expected = run("reference", qkv, torch.ones_like(out, dtype=torch.float64), lengths, torch.float32)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(grad, expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=["no-sequences", "empty", "two-empty"])
def test_empty_batch(lengths: list[int], implementation: str) -> None:
    qkv, dout = inputs(lengths)
    out, grad = run(implementation, qkv, dout, lengths, torch.float32, dropout_p=0.1)
    assert out.shape == (0, 2, 16) and grad.shape == (0, 3, 2, 16)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_nan_stays_in_its_sequence(implementation: str) -> None:
    lengths = [4, 6, 35]
    for longest, count in ((6, 2), (35, 3)):
        qkv, dout = inputs(lengths[:count])
        qkv[5, 1, 0, 3] = math.nan  # a key of the second sequence, first head
        out, grad = run(implementation, qkv, dout, lengths[:count], torch.float32)
        assert out[4:10, 0].isnan().all() and grad[4:10, 0, 0].isnan().all(), longest
        clean = torch.ones(len(out), 2, dtype=torch.bool)
        clean[4:10, 0] = False
        assert out.cpu()[clean].isfinite().all() and grad.cpu().transpose(1, 2)[clean].isfinite().all()


@pytest.mark.parametrize("lengths", [[20], [45]], ids=["short", "general"])
def test_large_logits_neither_overflow_nor_vanish(lengths: list[int]) -> None:
    qkv, dout = inputs(lengths)
    qkv[:, 0] *= 300  # logits around ±2000: exp alone would overflow even in float64
    out, grad = run("triton", qkv, dout, lengths, torch.float32)
    exact = run("reference", qkv, dout, lengths, torch.float64, device="cpu")
    assert out.isfinite().all() and grad.isfinite().all()
    torch.testing.assert_close(out.cpu().double(), exact[0], atol=1e-2, rtol=0)


@LARGE
def test_offsets_beyond_31_bits() -> None:
    """The last sequence of a batch of more than 2^31 elements equals the same sequence alone.

    The operators read and write the rows of the given sequences only, so the rest of these tensors is never
    touched and, on a CPU, costs no memory: `cu_seqlens` starts late, which the public function refuses.
    """
    skip_without_memory(12)
    heads, head_dim, length = 2, 16, 40
    first = 2**31 // (3 * heads * head_dim) + 1
    alone = inputs([length], heads, head_dim)[0].half()
    qkv = torch.empty(first + length, 3, heads, head_dim, dtype=torch.float16, device=DEVICE)
    qkv[first:] = alone
    numbers = (length, 0.0, 0, 0.25)
    results = []
    for rows, start in ((qkv, first), (qkv[first:].clone(), 0)):
        batch = rows, torch.tensor([start, start + length], device=DEVICE), SEED.to(DEVICE)
        out, lse = attention_triton.forward(*batch, *numbers)
        results.append((out[start:], attention_triton.backward(out, out, lse, *batch, *numbers)[start:]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.skipif(ON_PTX_MACHINE, reason="a million blocks: hours on the PTX machine")
def test_sequences_of_8192(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of the general path; keys of the last tile alone must matter."""
    tile = attention_triton.Tile(1024, 1024, 8, 1)
    monkeypatch.setattr(attention_triton, "tile", lambda *_: tile) if INTERPRETED else None
    check([8192], torch.float32, 0.0, heads=1)


# ---------------------------------------------------------------- dropout


@pytest.mark.host_only
@pytest.mark.parametrize("seed", [11, SEED], ids=["int", "tensor-with-first-row"])
def test_mask_dump_equals_the_twin_bit_for_bit(seed: rng.Seed) -> None:
    for dropout_p in (0.1, 0.5):
        masks = []
        for implementation in ("reference", "triton"):
            with use(implementation):  # type: ignore[arg-type]
                masks.append(
                    dropout_mask(37, 45, 3, dropout_p=dropout_p, seed=_to(seed, DEVICE), stream=2, device=DEVICE)
                )
        assert torch.equal(*masks)
        assert abs(masks[0].double().mean().item() - (1 - dropout_p)) < 5 * 0.5 / masks[0].numel() ** 0.5


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("lengths", [[16, 9], [40, 16]], ids=["short", "general"])
def test_attention_applies_the_dumped_mask(lengths: list[int], implementation: str) -> None:
    """Equal logits and values that count keys: the output is the mask itself, and so is V's gradient."""
    heads, head_dim = 2, 64
    tokens, longest = sum(lengths), max(lengths)
    qkv = torch.zeros(tokens, 3, heads, head_dim)
    key = torch.cat([torch.arange(length) for length in lengths])
    qkv[torch.arange(tokens), 2, :, key] = 1.0
    dout = torch.zeros(tokens, heads, head_dim)
    dout[torch.arange(tokens), :, key] = 1.0
    out, grad = run(implementation, qkv, dout, lengths, torch.float32, dropout_p=0.25)
    mask = dropout_mask(tokens, longest, heads, dropout_p=0.25, seed=SEED, stream=3)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        kept = mask[:, rows, :length].float() * rng.keep_scale(0.25) / length
        torch.testing.assert_close(out.cpu()[rows, :, :length].transpose(0, 1), kept)
        torch.testing.assert_close(grad.cpu()[rows, 2, :, :length].permute(1, 2, 0), kept)
        start += length


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_split_batch_draws_what_the_whole_draws(implementation: str) -> None:
    lengths = [7, 12, 5]
    qkv = inputs(lengths)[0].to(DEVICE, torch.float32)
    with use(implementation):  # type: ignore[arg-type]
        whole = attention(
            qkv, offsets(lengths).to(DEVICE), 12, dropout_p=0.5, seed=torch.tensor([9], device=DEVICE)
        )
        part = attention(
            qkv[7:], offsets(lengths[1:]).to(DEVICE), 12, dropout_p=0.5, seed=torch.tensor([9, 7], device=DEVICE)
        )
    torch.testing.assert_close(part, whole[7:])


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_seeds_and_streams_differ_and_ints_equal_tensors(implementation: str) -> None:
    lengths = [16]
    qkv = inputs(lengths)[0].to(DEVICE, torch.float32)

    def draw(seed: rng.Seed, stream: int) -> Tensor:
        with use(implementation):  # type: ignore[arg-type]
            return attention(qkv, offsets(lengths).to(DEVICE), 16, dropout_p=0.5, seed=seed, stream=stream)

    assert torch.equal(draw(4, 1), draw(torch.tensor([4], device=DEVICE), 1))
    assert not torch.equal(draw(4, 1), draw(5, 1)) and not torch.equal(draw(4, 1), draw(4, 2))


def _to(seed: rng.Seed, device: str) -> rng.Seed:
    return seed.to(device) if isinstance(seed, Tensor) else seed


def test_without_gradient_or_dropout_sequences_go_one_by_one() -> None:
    """Lengths that differ: PyTorch's own kernel on slices gives what the batched calls give."""
    lengths = [5, 0, 33, 17, 130]
    ends = torch.tensor([0, *itertools.accumulate(lengths)])
    qkv = torch.randn(int(ends[-1]), 3, 2, 16, dtype=torch.float64)
    with use("reference"):
        alone = attention(qkv, ends, max(lengths))
        together = attention(qkv.clone().requires_grad_(), ends, max(lengths))
    torch.testing.assert_close(alone, together.detach(), rtol=1e-12, atol=1e-12)
