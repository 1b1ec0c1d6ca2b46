"""Replaced-token detection on Triton (maths: `rtd_loss`).

Sums have two stages and so a fixed order: programs stride over the tokens and store partial sums, then one program
adds these. The forward passes save dlogit = w·(sigmoid(x) - y) and 1 / Σw; backward scales dlogit by g / Σw.

`rtd_loss` takes BLOCK_T tokens per program and step. It moves less than a megabyte: what it gains over PyTorch is
fewer launches. `rtd_head` takes BLOCK_T whole rows of the T x D pre-activation and reads each of them once forward
(logit, loss, dlogit) and once backward, where one pass gives dhidden and the partial sums of dweight and dbias.
Storing dhidden in the forward pass instead would write it, read it and write it scaled: four passes over T x D
instead of three, and one more rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from electra_kernels.blocks_triton import FUSED, ROUNDED, column_sums, folded_rows, load_rows, normal, store_rows
from electra_kernels.compile_case import CompileCase, signature_of
from electra_kernels.operators import contiguous, operator, statistics_dtype
from torch import Tensor

BLOCK_T = 1024  # tokens per program and step of the plain loss
HEAD_ELEMENTS = 4096  # of T x D, per program and step of the head
PROGRAMS = 512  # at most; each leaves a partial sum for the last stage
FINISH_BLOCK = 128  # partial sums added per step


@triton.jit
def _token_terms(b_x, b_y, b_w):
    """(w·loss, w·(sigmoid(x) - y)) of logits; accurate for any |x|."""
    b_small = tl.exp(-tl.abs(b_x))
    b_one = 1.0 + b_small
    # log1p(s), exact up to rounding even where 1 + s rounds to 1 (Goldberg 1991, theorem 4).
    b_log1p = tl.where(b_one == 1.0, b_small, tl.log(b_one) * (b_small / (b_one - 1.0)))
    b_loss = tl.maximum(b_x, 0.0) - b_x * b_y + b_log1p
    b_loss = tl.where(b_x != b_x, b_x, b_loss)  # `maximum` drops NaNs
    b_sigmoid = tl.where(b_x >= 0, 1.0, b_small) / b_one
    return b_w * b_loss, b_w * (b_sigmoid - b_y)


@triton.jit
def _load_tokens(p_labels, p_weights, o_t, m_t, ACC: tl.constexpr, WEIGHTED: tl.constexpr):
    """Labels and weights; the weight is 0 outside the batch."""
    b_y = tl.load(p_labels + o_t, mask=m_t, other=0).to(ACC)
    b_w = m_t.to(ACC)
    if WEIGHTED:
        b_w = tl.load(p_weights + o_t, mask=m_t, other=0.0).to(ACC)
    return b_y, b_w


@triton.jit
def _confusion(b_x, b_y, b_w):
    """A 1 in one of four 16-bit fields (true positive, false positive, false negative, true negative), or 0 where
    the weight is 0. A lane adds one per iteration, and 65,535 iterations are more tokens than a GPU holds."""
    b_shift = tl.where(b_x > 0, 0, 32) + tl.where(b_y > 0.5, 0, 16)
    return tl.where(b_w != 0, tl.full((1,), 1, tl.int64) << b_shift, 0)


@triton.jit
def _store_partial(p_partial, p_counts, b_loss, b_total, b_counts):
    """This program's sums of losses and weights, and its four counts, taken out of the fields."""
    program = tl.program_id(0)
    tl.store(p_partial + program * 2, tl.sum(b_loss, 0))
    tl.store(p_partial + program * 2 + 1, tl.sum(b_total, 0))
    o_field = tl.arange(0, 4)
    b_fields = (b_counts[:, None] >> (16 * o_field)[None, :]) & 0xFFFF
    tl.store(p_counts + program * 4 + o_field, tl.sum(b_fields.to(tl.int32), 0))


@triton.jit  # compiled once for any T and once for multiples of 16, which alone allow loads of 16 bytes
def _loss_kernel(
    p_logits, p_labels, p_weights, p_dlogits, p_partial, p_counts, T,
    BLOCK_T: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """dlogits of this program's tokens, and their sums of losses, weights and counts."""
    ACC: tl.constexpr = p_dlogits.dtype.element_ty
    b_loss, b_total = tl.zeros((BLOCK_T,), ACC), tl.zeros((BLOCK_T,), ACC)
    b_counts = tl.zeros((BLOCK_T,), tl.int64)
    for start in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        b_y, b_w = _load_tokens(p_labels, p_weights, o_t, m_t, ACC, WEIGHTED)
        b_x = tl.load(p_logits + o_t, mask=m_t, other=0.0).to(ACC)
        b_term, b_dlogit = _token_terms(b_x, b_y, b_w)
        tl.store(p_dlogits + o_t, b_dlogit, mask=m_t)
        b_loss += b_term
        b_total += b_w
        b_counts += _confusion(b_x, b_y, b_w)
    _store_partial(p_partial, p_counts, b_loss, b_total, b_counts)


@triton.jit(do_not_specialize=["T"])
def _head_kernel(
    p_hidden, p_weight, p_bias, p_labels, p_weights, p_logits, p_dlogits, p_partial, p_counts, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """As `_loss_kernel`, from pre-activations: the logits are computed here, and stored as well."""
    ACC: tl.constexpr = p_dlogits.dtype.element_ty
    o_d = tl.arange(0, BLOCK_D)
    b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(ACC)
    bias = tl.load(p_bias).to(ACC)
    b_loss, b_total = tl.zeros((BLOCK_T,), ACC), tl.zeros((BLOCK_T,), ACC)
    b_counts = tl.zeros((BLOCK_T,), tl.int64)
    for start in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        b_hidden = load_rows(p_hidden, o_t, m_t, o_d, D).to(ACC)
        b_cdf, _ = normal(b_hidden)
        b_x = tl.sum(b_hidden * b_cdf * b_weight[None, :], 1) + bias
        b_y, b_w = _load_tokens(p_labels, p_weights, o_t, m_t, ACC, WEIGHTED)
        b_term, b_dlogit = _token_terms(b_x, b_y, b_w)
        tl.store(p_logits + o_t, b_x, mask=m_t)
        tl.store(p_dlogits + o_t, b_dlogit, mask=m_t)
        b_loss += b_term
        b_total += b_w
        b_counts += _confusion(b_x, b_y, b_w)
    _store_partial(p_partial, p_counts, b_loss, b_total, b_counts)


@triton.jit(do_not_specialize=["programs"])
def _finish_kernel(p_partial, p_counts_in, p_loss, p_inverse, p_counts, programs, BLOCK: tl.constexpr):
    """Adds all programs' sums: Σ w·loss / Σ w, 1 / Σ w (both 0 if Σ w = 0) and the counts."""
    ACC: tl.constexpr = p_loss.dtype.element_ty
    loss, total, counts = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK, 4), tl.int64)
    for start in range(0, programs, BLOCK):
        o_p = start + tl.arange(0, BLOCK)
        loss += tl.load(p_partial + o_p * 2, mask=o_p < programs, other=0.0)
        total += tl.load(p_partial + o_p * 2 + 1, mask=o_p < programs, other=0.0)
        p_row = p_counts_in + o_p[:, None] * 4 + tl.arange(0, 4)[None, :]
        counts += tl.load(p_row, mask=(o_p < programs)[:, None], other=0).to(tl.int64)
    sum_loss, sum_total = tl.sum(loss, 0), tl.sum(total, 0)
    inverse = tl.where(sum_total == 0, 0.0, 1.0 / sum_total)
    tl.store(p_loss, sum_loss * inverse)
    tl.store(p_inverse, inverse)
    tl.store(p_counts + tl.arange(0, 4), tl.sum(counts, 0))


@triton.jit
def _scale_kernel(p_dlogits, p_inverse, p_grad, p_out, T, BLOCK_T: tl.constexpr):
    """The gradient of the logits: the saved dlogits, scaled by g / Σw."""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    b_out = tl.load(p_dlogits + o_t, mask=o_t < T, other=0.0) * (tl.load(p_grad) * tl.load(p_inverse))
    tl.store(p_out + o_t, b_out.to(p_out.dtype.element_ty), mask=o_t < T)


@triton.jit(do_not_specialize=["T"])
def _head_backward_kernel(
    p_hidden, p_weight, p_dlogits, p_inverse, p_grad, p_dhidden, p_dweight, p_dbias, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dhidden = dlogit · weight · gelu'(hidden) of this program's rows, and their partial sums of
    dlogit · gelu(hidden) for dweight, [ROWS, BLOCK_D], and of dlogit for dbias."""
    ACC: tl.constexpr = p_dlogits.dtype.element_ty
    o_d = tl.arange(0, BLOCK_D)
    b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(ACC)
    scale = tl.load(p_grad) * tl.load(p_inverse)
    b_dweight, b_dbias = tl.zeros((ROWS, BLOCK_D), ACC), tl.zeros((BLOCK_T,), ACC)
    for start in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        b_hidden = load_rows(p_hidden, o_t, m_t, o_d, D).to(ACC)
        b_dlogit = tl.load(p_dlogits + o_t, mask=m_t, other=0.0) * scale
        b_cdf, b_density = normal(b_hidden)
        b_slope = b_cdf + b_hidden * b_density
        store_rows(p_dhidden, o_t, m_t, o_d, b_dlogit[:, None] * b_weight[None, :] * b_slope, D)
        b_dweight += column_sums(b_dlogit[:, None] * b_hidden * b_cdf, ROWS)
        b_dbias += b_dlogit
    program = tl.program_id(0)
    o_row = program * ROWS + tl.arange(0, ROWS)
    store_rows(p_dweight, o_row, o_row >= 0, o_d, b_dweight, D)
    tl.store(p_dbias + program, tl.sum(b_dbias, 0))


# ---------------------------------------------------------------- launchers


def _head_blocks(size: int) -> tuple[int, int]:
    block_d = triton.next_power_of_2(size)
    return max(1, HEAD_ELEMENTS // block_d), block_d


def _finish(partial: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss, inverse = partial.new_empty(()), partial.new_empty(())
    total = torch.empty(4, dtype=torch.int64, device=partial.device)
    _finish_kernel[(1,)](
        partial, counts, loss, inverse, total, len(partial), BLOCK=FINISH_BLOCK, num_warps=4, **FUSED
    )
    return loss, inverse, total


def _partials(like: Tensor, programs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return like.new_empty(programs, 2, dtype=dtype), like.new_empty(programs, 4, dtype=torch.int32)


@operator("rtd_loss")
def rtd_loss(
    logits_T: Tensor, is_replaced_T: Tensor, weights_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, counts, dlogits_T · Σw, 1 / Σw); the last two are saved for backward."""
    dlogits_T = torch.empty_like(logits_T, dtype=statistics_dtype(logits_T), memory_format=torch.contiguous_format)
    programs = max(1, min(PROGRAMS, triton.cdiv(len(logits_T), BLOCK_T)))
    partial, counts = _partials(logits_T, programs, dlogits_T.dtype)
    _loss_kernel[(programs,)](
        *contiguous(logits_T, is_replaced_T, weights_T), dlogits_T, partial, counts, len(logits_T),
        BLOCK_T=BLOCK_T, WEIGHTED=weights_T is not None, num_warps=4, **FUSED,
    )  # fmt: skip
    loss, inverse, total = _finish(partial, counts)
    return loss, total, dlogits_T, inverse


@rtd_loss.register_fake
def _(logits_T: Tensor, is_replaced_T: Tensor, weights_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new, dtype = logits_T.new_empty, statistics_dtype(logits_T)
    return new((), dtype=dtype), new(4, dtype=torch.int64), new(len(logits_T), dtype=dtype), new((), dtype=dtype)


@operator("rtd_loss_backward")
def rtd_loss_backward(grad: Tensor, dlogits_T: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """dlogits_T of the loss, in the logits' dtype."""
    out_T = torch.empty_like(dlogits_T, dtype=dtype)
    if len(out_T):
        grid = (triton.cdiv(len(out_T), BLOCK_T),)
        _scale_kernel[grid](dlogits_T, inverse, grad, out_T, len(out_T), BLOCK_T=BLOCK_T, num_warps=4, **FUSED)
    return out_T


@rtd_loss_backward.register_fake
def _(grad: Tensor, dlogits_T: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(dlogits_T, dtype=dtype)


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[2], output[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zero tensors for outputs without a gradient


def _differentiate_loss(ctx: Any, grad: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    return rtd_loss_backward(grad, *ctx.saved_tensors, ctx.dtype), None, None


rtd_loss.register_autograd(_differentiate_loss, setup_context=_save_loss)


@operator("rtd_head")
def rtd_head(
    hidden_TD: Tensor, weight_D: Tensor, bias: Tensor, is_replaced_T: Tensor, weights_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logits_T, counts, dlogits_T · Σw, 1 / Σw); the last two are saved for backward."""
    (tokens, size), dtype = hidden_TD.shape, statistics_dtype(hidden_TD)
    logits_T, dlogits_T = (hidden_TD.new_empty(tokens, dtype=dtype) for _ in range(2))
    block_t, block_d = _head_blocks(size)
    programs = max(1, min(PROGRAMS, triton.cdiv(tokens, block_t)))
    partial, counts = _partials(hidden_TD, programs, dtype)
    _head_kernel[(programs,)](
        *contiguous(hidden_TD, weight_D, bias, is_replaced_T, weights_T), logits_T, dlogits_T, partial, counts,
        tokens, D=size, BLOCK_D=block_d, BLOCK_T=block_t, WEIGHTED=weights_T is not None, num_warps=4, **ROUNDED,
    )  # fmt: skip
    loss, inverse, total = _finish(partial, counts)
    return loss, logits_T, total, dlogits_T, inverse


@rtd_head.register_fake
def _(
    hidden_TD: Tensor, weight_D: Tensor, bias: Tensor, is_replaced_T: Tensor, weights_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    new, dtype, tokens = hidden_TD.new_empty, statistics_dtype(hidden_TD), hidden_TD.shape[0]
    logits_T, counts = new(tokens, dtype=dtype), new(4, dtype=torch.int64)
    return new((), dtype=dtype), logits_T, counts, torch.empty_like(logits_T), new((), dtype=dtype)


@operator("rtd_head_backward")
def rtd_head_backward(
    grad: Tensor, hidden_TD: Tensor, weight_D: Tensor, bias: Tensor, dlogits_T: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden_TD, dweight_D, dbias), each in its input's dtype."""
    tokens, size = hidden_TD.shape
    block_t, block_d = _head_blocks(size)
    programs = max(1, min(PROGRAMS, triton.cdiv(tokens, block_t)))
    dhidden_TD = torch.empty_like(hidden_TD, memory_format=torch.contiguous_format)
    rows = folded_rows(block_t, block_d)
    dweight, dbias = dlogits_T.new_empty(programs * rows, size), dlogits_T.new_empty(programs)
    _head_backward_kernel[(programs,)](
        hidden_TD.contiguous(), weight_D.contiguous(), dlogits_T, inverse, grad, dhidden_TD, dweight, dbias,
        tokens, D=size, BLOCK_D=block_d, BLOCK_T=block_t, ROWS=rows, num_warps=4, **ROUNDED,
    )  # fmt: skip
    return dhidden_TD, dweight.sum(0).to(weight_D.dtype), dbias.sum().to(bias.dtype).reshape(bias.shape)


@rtd_head_backward.register_fake
def _(
    grad: Tensor, hidden_TD: Tensor, weight_D: Tensor, bias: Tensor, dlogits_T: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (hidden_TD, weight_D, bias))  # type: ignore[return-value]


def _save_head(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], output[3], output[4])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_head(ctx: Any, grad: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return *rtd_head_backward(grad, *ctx.saved_tensors), None, None


rtd_head.register_autograd(_differentiate_head, setup_context=_save_head)


# ---------------------------------------------------------------- what is compiled ahead of time


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """The plain loss, and the head at the widths of Small, Base and Large; with and without weights."""
    yield _case("rtd_finish[fp32]", _finish_kernel, "fp32", {"BLOCK": FINISH_BLOCK})
    yield _case("rtd_scale[bf16]", _scale_kernel, "bf16", {"BLOCK_T": BLOCK_T})
    for weighted in (False, True):
        label = " weighted" if weighted else ""
        loss: dict[str, object] = {"BLOCK_T": BLOCK_T, "WEIGHTED": weighted}
        yield _case(f"rtd_loss[bf16{label}]", _loss_kernel, "bf16", loss)
        yield _case(
            f"rtd_loss[bf16 T=16n{label}]", _loss_kernel, "bf16", loss, streaming=True, multiples_of_16=("T",)
        )
    for dtype, size, weighted in (("bf16", 256, False), ("bf16", 768, True), ("fp16", 1024, False)):
        block_t, block_d = _head_blocks(size)
        shapes: dict[str, object] = {"D": size, "BLOCK_D": block_d, "BLOCK_T": block_t}
        head, label = {**shapes, "WEIGHTED": weighted}, " weighted" if weighted else ""
        yield _case(f"rtd_head[{dtype} D={size}{label}]", _head_kernel, dtype, head, streaming=True)
        name = f"rtd_head_backward[{dtype} D={size}]"
        backward = {**shapes, "ROWS": folded_rows(block_t, block_d)}
        yield _case(name, _head_backward_kernel, dtype, backward, streaming=True)


def _case(
    name: str, kernel: triton.JITFunction, dtype: str, constexprs: dict[str, object], streaming: bool = False,
    multiples_of_16: tuple[str, ...] = (),
) -> CompileCase:  # fmt: skip
    types = dict.fromkeys(("p_logits", "p_hidden", "p_dhidden", "p_out"), f"*{dtype}")
    if kernel is _head_kernel:
        types["p_logits"] = "*fp32"
    types |= {"p_labels": "*i1", "p_counts": "*i32", "p_counts_in": "*i32", "T": "i32", "programs": "i32"}
    if kernel is _finish_kernel:
        types["p_counts"] = "*i64"
    signature = signature_of(kernel, types, constexprs)
    return CompileCase(
        name, kernel, signature, constexprs, num_warps=4, num_stages=3, streaming=streaming,
        wide_stores=kernel is _head_backward_kernel, multiples_of_16=multiples_of_16,
        **(ROUNDED if kernel in (_head_kernel, _head_backward_kernel) else FUSED),
    )  # fmt: skip
