"""Helpers that the Triton kernels share: rows of a matrix, GELU, fp32 products without tf32, logits in base 2."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Launch options: whether a·b + c is rounded once. Every launch names one, because Triton 3.10 changes the default.
FUSED: dict[str, Any] = {"enable_fp_fusion": True}
ROUNDED: dict[str, Any] = {"enable_fp_fusion": False}
"""For kernels in which several lanes of a warp hold the same sum. Fused, lane A adds its own unrounded product to
B's rounded one, and B the other way round: two values of one sum, and either of them may be stored."""


@triton.jit
def load_rows(p_matrix, rows, m_rows, columns, COLUMNS: tl.constexpr):
    """Loads [len(rows), len(columns)] of a contiguous [*, COLUMNS] matrix; zeros outside."""
    p_rows = p_matrix + rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    return tl.load(p_rows, mask=m_rows[:, None] & (columns < COLUMNS)[None, :], other=0.0)


@triton.jit
def store_rows(p_matrix, rows, m_rows, columns, values, COLUMNS: tl.constexpr):
    """Stores `values` where `load_rows` would load them, cast to the matrix's dtype."""
    p_rows = p_matrix + rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    mask = m_rows[:, None] & (columns < COLUMNS)[None, :]
    tl.store(p_rows, values.to(p_matrix.dtype.element_ty), mask=mask)


def folded_rows(rows: int, columns: int) -> int:
    """ROWS for `column_sums` of a [rows, columns] tile: 128 threads load 1024 numbers at a time, eight each."""
    return min(rows, max(1, 1024 // columns))


@triton.jit
def column_sums(values, ROWS: tl.constexpr):
    """[rows, columns] -> [ROWS, columns], row i the sum of rows i, i + ROWS, …

    With ROWS from `folded_rows`, a thread adds only numbers that it holds itself. Summing to a single row would
    go through shared memory in every iteration, with 32-way bank conflicts under Triton 3.6; so the caller adds
    the ROWS rows together with the other programs' partial sums.
    """
    return tl.sum(tl.reshape(values, (values.shape[0] // ROWS, ROWS, values.shape[1])), 0)


@triton.jit
def normal(x):
    """Φ(x) and φ(x), the standard normal CDF and its density: GELU(x) = x Φ(x), GELU'(x) = Φ(x) + x φ(x).

    In fp32 Φ(-|x|) = erfc(|x| / √2) / 2 = poly(1 / (1 + c |x|)) exp(-x² / 2) by Abramowitz and Stegun 7.1.26
    (error 7.5e-8, or 2.5e-7 with rounding; that of PyTorch's GELU on a CPU is 3.4e-7). This takes a third fewer
    instructions than erf, because the density is needed anyway. In fp64 it uses erf.
    """
    if x.dtype == tl.float64:
        b_exp = tl.exp(-0.5 * x * x)
        b_cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        b_exp = tl.exp2(x * x * -0.7213475204444817)  # -log2(e) / 2
        b_t = tl.fdiv(1.0, tl.fma(tl.abs(x), 0.2316418882, 1.0))
        b_poly = tl.fma(b_t, tl.fma(b_t, 0.5307027145, -0.7265760135), 0.7107068705)
        b_poly = tl.fma(b_t, tl.fma(b_t, b_poly, -0.142248368), 0.127414796) * b_t
        b_tail = b_poly * b_exp
        b_cdf = tl.where(x < 0, b_tail, 1.0 - b_tail)
    return b_cdf, b_exp * 0.3989422804014327


@triton.jit
def dot(a, b):
    """Matrix product accumulated in fp32 (fp64 for fp64); fp32 operands stay fp32, never tf32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_bias2(p_bias, words, ACC: tl.constexpr, V: tl.constexpr):
    """Bias in units of log 2; -inf outside the vocabulary, which gives those entries probability 0."""
    return tl.load(p_bias + words, mask=words < V, other=float("-inf")).to(ACC) * LOG2E


@triton.jit
def finite_or_zero(maximum):
    """What to subtract from logits with this maximum: -inf - -inf would be NaN, but -inf - 0 is -inf."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)
