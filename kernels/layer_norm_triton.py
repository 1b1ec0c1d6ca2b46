"""Dropout + residual + LayerNorm on Triton, one pass forward and one backward (maths: `layer_norm`).

With s = residual + keep ∘ (x + x_bias) · keep_scale, n = (s - mean) · rstd and a row's gradient a = dout ∘ weight:

    ds = rstd · (a - mean(a) - n · mean(a ∘ n)),   dresidual = ds,   dx = keep ∘ ds · keep_scale,
    dweight = Σ_t dout ∘ n,   dbias = Σ_t dout,   dx_bias = Σ_t dx

dout is the sum of two gradients where the result was returned twice. A tile is BLOCK_T tokens by all D features.
**Forward.** A program owns one tile.
**Backward.** Only the inputs are saved: with whole rows in a tile, s, mean, rstd and the dropout decisions can be
recomputed from x, residual and the counter, and s never loses bits to half precision. (Storing s would move as
many bytes: one write more forward, one read less backward.) A program strides over the tokens and keeps its part
of the parameters' gradients in registers; the programs' partial sums are then added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from electra_kernels.blocks_triton import ROUNDED, column_sums, folded_rows, load_rows, store_rows
from electra_kernels.compile_case import CompileCase, signature_of
from electra_kernels.layer_norm_autograd import empty_gradients, number_of_sums, register
from electra_kernels.operators import contiguous, operator, statistics_dtype
from electra_kernels.rng import dropout_threshold
from electra_kernels.rng_triton import keep_tile
from torch import Tensor

ELEMENTS = 4096  # of a tile
PROGRAMS = 528  # at most, in the backward pass: four for each of an H200's 132 multiprocessors


@triton.jit
def drop(values, p_seed, rows, stream, THRESHOLD: tl.constexpr, COLUMNS: tl.constexpr):
    """Dropout of whole rows, with rescaling: of 65536 random numbers, 65536 - THRESHOLD keep a value."""
    b_keep = keep_tile(p_seed, rows, 0, stream, tl.zeros((1, 1), tl.int32), THRESHOLD, COLUMNS)
    return tl.where(b_keep, values * (65536.0 / (65536 - THRESHOLD)), 0.0)


@triton.jit
def normalise(b_s, o_d, eps, D: tl.constexpr):
    """n = (s - mean) · rstd, and rstd, for every row of s; zeros beyond D."""
    b_mean = tl.sum(b_s, 1) / D
    b_s = tl.where((o_d < D)[None, :], b_s - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_s * b_s, 1) / D + eps)
    return b_s * b_rstd[:, None], b_rstd


@triton.jit
def normalise_backward(b_a, b_n, b_rstd, D: tl.constexpr):
    """ds, given a = dout ∘ weight, which is zero beyond D, and the results of `normalise`."""
    b_ds = b_a - (tl.sum(b_a, 1) / D)[:, None] - b_n * (tl.sum(b_a * b_n, 1) / D)[:, None]
    return b_ds * b_rstd[:, None]


@triton.jit
def _load_row(p_row, o_d, ACC: tl.constexpr, D: tl.constexpr):
    """A parameter as [1, len(o_d)]; zeros beyond D, or everywhere if it is None."""
    if p_row is None:
        b_row = tl.zeros(o_d.shape, ACC)
    else:
        b_row = tl.load(p_row + o_d, mask=o_d < D, other=0.0).to(ACC)
    return b_row[None, :]


@triton.jit
def _normalise(
    p_x, b_x_bias, p_residual, p_seed, o_t, m_t, o_d, eps, stream,
    ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """`normalise` applied to s = residual + dropout(x + x_bias)."""
    b_x = load_rows(p_x, o_t, m_t, o_d, D).to(ACC) + b_x_bias
    if THRESHOLD > 0:
        b_x = drop(b_x, p_seed, o_t, stream, THRESHOLD, BLOCK_D)
    return normalise(b_x + load_rows(p_residual, o_t, m_t, o_d, D).to(ACC), o_d, eps, D)


@triton.jit(do_not_specialize=["T", "stream"])
def _forward_kernel(
    p_x, p_residual, p_weight, p_bias, p_x_bias, p_seed, p_out, T, eps, stream,
    ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Whole rows of the result: BLOCK_T tokens."""
    o_t, o_d = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    m_t = o_t < T
    b_x_bias = _load_row(p_x_bias, o_d, ACC, D)
    b_n, _ = _normalise(p_x, b_x_bias, p_residual, p_seed, o_t, m_t, o_d, eps, stream, ACC, D, BLOCK_D, THRESHOLD)
    b_weight, b_bias = _load_row(p_weight, o_d, ACC, D), _load_row(p_bias, o_d, ACC, D)
    store_rows(p_out, o_t, m_t, o_d, b_n * b_weight + b_bias, D)


@triton.jit(do_not_specialize=["T", "stream"])
def _backward_kernel(
    p_dout, p_dout_again, p_x, p_residual, p_weight, p_x_bias, p_seed, p_dresidual, p_dx, p_dweight, p_dbias,
    p_dx_bias, T, eps, stream,
    ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """dresidual and dx of this program's tokens, and partial sums of the parameters, [ROWS, BLOCK_D] each."""
    o_d = tl.arange(0, BLOCK_D)
    b_weight, b_x_bias = _load_row(p_weight, o_d, ACC, D), _load_row(p_x_bias, o_d, ACC, D)
    b_dweight, b_dbias = tl.zeros((ROWS, BLOCK_D), ACC), tl.zeros((ROWS, BLOCK_D), ACC)
    b_dx_bias = tl.zeros((ROWS, BLOCK_D), ACC)
    for start in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        b_n, b_rstd = _normalise(
            p_x, b_x_bias, p_residual, p_seed, o_t, m_t, o_d, eps, stream, ACC, D, BLOCK_D, THRESHOLD
        )  # fmt: skip
        b_dout = load_rows(p_dout, o_t, m_t, o_d, D).to(ACC)
        if p_dout_again is not None:
            b_dout += load_rows(p_dout_again, o_t, m_t, o_d, D).to(ACC)
        b_dweight += column_sums(b_dout * b_n, ROWS)
        b_dbias += column_sums(b_dout, ROWS)
        b_ds = normalise_backward(b_dout * b_weight, b_n, b_rstd, D)
        store_rows(p_dresidual, o_t, m_t, o_d, b_ds, D)
        if THRESHOLD > 0:
            b_ds = drop(b_ds, p_seed, o_t, stream, THRESHOLD, BLOCK_D)
            store_rows(p_dx, o_t, m_t, o_d, b_ds, D)
        if p_x_bias is not None:
            b_dx_bias += column_sums(b_ds, ROWS)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    store_rows(p_dweight, o_row, o_row >= 0, o_d, b_dweight, D)
    store_rows(p_dbias, o_row, o_row >= 0, o_d, b_dbias, D)
    if p_x_bias is not None:
        store_rows(p_dx_bias, o_row, o_row >= 0, o_d, b_dx_bias, D)


# ---------------------------------------------------------------- custom operators and autograd


def constexprs(x_TD: Tensor, dropout_p: float) -> dict[str, Any]:
    """The kernels' compile-time arguments for these rows."""
    accumulator = tl.float64 if statistics_dtype(x_TD) == torch.float64 else tl.float32
    return {"ACC": accumulator, **blocks(x_TD.shape[1]), "THRESHOLD": dropout_threshold(dropout_p)}


def blocks(size: int) -> dict[str, int]:
    """The tile for rows of `size` features: as many whole rows as make up about `ELEMENTS`."""
    block_d = max(8, triton.next_power_of_2(size))  # eight neighbouring features share a Philox call
    return {"D": size, "BLOCK_D": block_d, "BLOCK_T": max(1, ELEMENTS // block_d)}


@operator("dropout_add_layer_norm")
def forward(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor, x_bias_D: Tensor | None, eps: float,
    dropout_p: float, seed: Tensor | None, stream: int,
) -> Tensor:  # fmt: skip
    """LayerNorm(residual + dropout(x + x_bias)); see the contract in `layer_norm`."""
    out_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    shapes = constexprs(x_TD, dropout_p)
    if out_TD.numel():
        _forward_kernel[(triton.cdiv(len(x_TD), shapes["BLOCK_T"]),)](
            *contiguous(x_TD, residual_TD, weight_D, bias_D, x_bias_D), seed, out_TD,
            len(x_TD), eps, stream, **shapes, num_warps=4, **ROUNDED,
        )  # fmt: skip
    return out_TD


@operator("dropout_add_layer_norm_backward")
def backward(
    dout_TD: Tensor, dout_again_TD: Tensor | None, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor,
    x_bias_D: Tensor | None, eps: float, dropout_p: float, seed: Tensor | None, stream: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dresidual_TD, dx_TD, [dweight_D, dbias_D, dx_bias_D]); without x_bias there is no dx_bias."""
    shapes = constexprs(x_TD, dropout_p)
    programs = max(1, min(PROGRAMS, triton.cdiv(len(x_TD), shapes["BLOCK_T"])))
    dresidual_TD, dx_TD = empty_gradients(x_TD, residual_TD, dropout_p)
    rows, sums = folded_rows(shapes["BLOCK_T"], shapes["BLOCK_D"]), number_of_sums(x_bias_D)
    partial = x_TD.new_empty(sums, programs * rows, x_TD.shape[1], dtype=statistics_dtype(x_TD))
    _backward_kernel[(programs,)](
        *contiguous(dout_TD, dout_again_TD, x_TD, residual_TD, weight_D, x_bias_D), seed, dresidual_TD, dx_TD,
        partial[0], partial[1], partial[2] if sums == 3 else None, len(x_TD), eps, stream,
        **shapes, ROWS=rows, num_warps=4, **ROUNDED,
    )  # fmt: skip
    return dresidual_TD, dx_TD, partial.sum(1)


register(forward, backward)


# ---------------------------------------------------------------- what is compiled ahead of time


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Both kernels at the widths of Small, Base and Large, as an encoder calls them; at Base's also without
    dropout, x_bias and a second reader."""
    halves = ("p_x", "p_residual", "p_out", "p_dout", "p_dout_again", "p_dresidual", "p_dx")
    for dtype, size, dropout_p, whole in (
        ("bf16", 256, 0.1, True), ("bf16", 768, 0.1, True), ("bf16", 768, 0.0, False), ("fp16", 1024, 0.1, True),
    ):  # fmt: skip
        types = dict.fromkeys(halves, f"*{dtype}")
        types |= {"p_seed": "*i64", "T": "i32", "eps": "fp32", "stream": "i32"}
        left_out = {} if whole else dict.fromkeys(("p_dout_again", "p_x_bias", "p_dx_bias"))
        shapes = {"ACC": tl.float32, **blocks(size), "THRESHOLD": dropout_threshold(dropout_p)}
        for name, kernel in (("forward", _forward_kernel), ("backward", _backward_kernel)):
            rows = folded_rows(shapes["BLOCK_T"], shapes["BLOCK_D"])
            known = {**shapes, "ROWS": rows} if kernel is _backward_kernel else shapes
            known |= {a: None for a in left_out if a in kernel.arg_names}
            signature = signature_of(kernel, types, known)
            label = f"layer_norm_{name}[{dtype} D={size} p={dropout_p}{'' if whole else ' bare'}]"
            yield CompileCase(label, kernel, signature, known, 4, 3, streaming=True, wide_stores=True, **ROUNDED)
