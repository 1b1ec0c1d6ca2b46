"""Small pieces that Triton kernels share: rows of a matrix, GELU, exact products, logits in units of log 2."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Launch options: whether a·b + c is rounded once. Said by every launch, because Triton 3.10 changes the default.
FUSED: dict[str, Any] = {"enable_fp_fusion": True}
ROUNDED: dict[str, Any] = {"enable_fp_fusion": False}
"""For kernels in which several lanes of a warp hold one sum. Fused, lane A adds its own product, not rounded, to
B's, which is, and B the other way round: two values of one sum, and which of them is stored is not promised."""


@triton.jit
def load_rows(p_matrix, rows, m_rows, columns, COLUMNS: tl.constexpr):
    """[len(rows), len(columns)] of a contiguous [*, COLUMNS] matrix; zeros outside."""
    p_rows = p_matrix + rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    return tl.load(p_rows, mask=m_rows[:, None] & (columns < COLUMNS)[None, :], other=0.0)


@triton.jit
def store_rows(p_matrix, rows, m_rows, columns, values, COLUMNS: tl.constexpr):
    """The inverse of `load_rows`; `values` are cast to the matrix's dtype."""
    p_rows = p_matrix + rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    mask = m_rows[:, None] & (columns < COLUMNS)[None, :]
    tl.store(p_rows, values.to(p_matrix.dtype.element_ty), mask=mask)


def folded_rows(rows: int, columns: int) -> int:
    """ROWS for `column_sums` of a [rows, columns] tile: 128 threads load 1024 numbers in one go, eight each."""
    return min(rows, max(1, 1024 // columns))


@triton.jit
def column_sums(values, ROWS: tl.constexpr):
    """[rows, columns] -> [ROWS, columns], row i the sum of rows i, i + ROWS, …

    With `folded_rows` these are a thread's own numbers. A sum down to one row would go through shared memory, in
    every turn of a loop, and with Triton 3.6 make a warp wait 32 times for one of its banks; the rest of the sum
    is left to whoever adds up what the programs leave.
    """
    return tl.sum(tl.reshape(values, (values.shape[0] // ROWS, ROWS, values.shape[1])), 0)


@triton.jit
def normal(x):
    """Φ(x) and φ(x), the normal distribution and its density: GELU(x) = x Φ(x), GELU'(x) = Φ(x) + x φ(x).

    In fp32 Φ(-|x|) = erfc(|x| / √2) / 2 = poly(1 / (1 + c |x|)) exp(-x² / 2) by Abramowitz and Stegun 7.1.26 (off
    by 7.5e-8, roundings make 2.5e-7 of it; PyTorch's GELU on a CPU is 3.4e-7 off): a third fewer instructions than
    erf, because the density is needed anyway. In fp64 by erf.
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
    """Matrix product with fp32 (fp64 for fp64) sums; fp32 stays fp32, never tf32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_bias2(p_bias, words, V: tl.constexpr):
    """Bias in units of log 2; -inf outside the vocabulary gives those words probability 0."""
    b_bias = tl.load(p_bias + words, mask=words < V, other=float("-inf"))
    return b_bias.to(tl.float64 if p_bias.dtype.element_ty == tl.float64 else tl.float32) * LOG2E


@triton.jit
def finite_or_zero(maximum):
    """What to subtract from logits whose maximum this is: -inf - -inf would be NaN, -inf - 0 is -inf."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)
