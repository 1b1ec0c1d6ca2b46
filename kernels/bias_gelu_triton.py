"""Bias + GELU on Triton, one pass forward and one backward (maths: `bias_gelu`).

    y = x + bias,   out = y Φ(y),   dx = dout · (Φ(y) + y φ(y)),   dbias = Σ_t dx

A tile is BLOCK_T tokens by BLOCK_F columns. In the forward pass a program owns one tile. In the backward pass it
owns BLOCK_F columns, strides over the tokens and keeps its part of dbias in registers; the programs' partial sums
are then added in a fixed order. Only the inputs are saved for backward: y is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from electra_kernels.blocks_triton import ROUNDED, column_sums, folded_rows, load_rows, normal, store_rows
from electra_kernels.compile_case import CompileCase, signature_of
from electra_kernels.operators import operator, statistics_dtype
from torch import Tensor

ELEMENTS = 4096  # of a tile
COLUMNS = 256  # of a tile, at most: a row of 512 bytes in half precision
PROGRAMS = 528  # at most, in the backward pass: four for each of an H200's 132 multiprocessors


@triton.jit
def _load_sum(p_x, p_bias, o_t, m_t, o_f, ACC: tl.constexpr, F: tl.constexpr):
    """x + bias."""
    b_bias = tl.load(p_bias + o_f, mask=o_f < F, other=0.0).to(ACC)
    return load_rows(p_x, o_t, m_t, o_f, F).to(ACC) + b_bias[None, :]


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    p_x, p_bias, p_out, T, ACC: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """GELU(x + bias) of one tile."""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    b_y = _load_sum(p_x, p_bias, o_t, o_t < T, o_f, ACC, F)
    b_cdf, _ = normal(b_y)
    store_rows(p_out, o_t, o_t < T, o_f, b_y * b_cdf, F)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    p_dout, p_x, p_bias, p_dx, p_dbias, T,
    ACC: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK_F columns, and their partial sums for dbias, [ROWS, BLOCK_F]."""
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    b_dbias = tl.zeros((ROWS, BLOCK_F), ACC)
    for start in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        b_y = _load_sum(p_x, p_bias, o_t, m_t, o_f, ACC, F)
        b_cdf, b_density = normal(b_y)
        b_dx = load_rows(p_dout, o_t, m_t, o_f, F).to(ACC) * (b_cdf + b_y * b_density)
        store_rows(p_dx, o_t, m_t, o_f, b_dx, F)
        b_dbias += column_sums(b_dx, ROWS)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    store_rows(p_dbias, o_row, o_row >= 0, o_f, b_dbias, F)


# ---------------------------------------------------------------- custom operators and autograd


def blocks(size: int) -> dict[str, int]:
    """The tile for rows of `size` features."""
    block_f = max(8, min(COLUMNS, triton.next_power_of_2(size)))
    return {"F": size, "BLOCK_F": block_f, "BLOCK_T": max(1, ELEMENTS // block_f)}


def _constexprs(x_TF: Tensor) -> dict[str, Any]:
    double = statistics_dtype(x_TF) == torch.float64
    return {"ACC": tl.float64 if double else tl.float32, **blocks(x_TF.shape[1])}


@operator("bias_gelu")
def forward(x_TF: Tensor, bias_F: Tensor) -> Tensor:
    """GELU(x + bias); see the contract in `bias_gelu`."""
    out_TF, shapes = torch.empty_like(x_TF, memory_format=torch.contiguous_format), _constexprs(x_TF)
    if out_TF.numel():
        grid = triton.cdiv(len(x_TF), shapes["BLOCK_T"]), triton.cdiv(x_TF.shape[1], shapes["BLOCK_F"])
        _forward_kernel[grid](
            x_TF.contiguous(), bias_F.contiguous(), out_TF, len(x_TF), **shapes, num_warps=4, **ROUNDED
        )
    return out_TF


@forward.register_fake
def _(x_TF: Tensor, bias_F: Tensor) -> Tensor:
    return x_TF.new_empty(x_TF.shape)


@operator("bias_gelu_backward")
def backward(dout_TF: Tensor, x_TF: Tensor, bias_F: Tensor) -> tuple[Tensor, Tensor]:
    """(dx_TF, dbias_F), the latter in fp32 (fp64)."""
    dx_TF, shapes = torch.empty_like(x_TF, memory_format=torch.contiguous_format), _constexprs(x_TF)
    columns = max(1, triton.cdiv(x_TF.shape[1], shapes["BLOCK_F"]))
    programs = max(1, min(PROGRAMS // columns, triton.cdiv(len(x_TF), shapes["BLOCK_T"])))
    rows = folded_rows(shapes["BLOCK_T"], shapes["BLOCK_F"])
    partial = x_TF.new_empty(programs * rows, x_TF.shape[1], dtype=statistics_dtype(x_TF))
    _backward_kernel[(programs, columns)](
        dout_TF.contiguous(), x_TF.contiguous(), bias_F.contiguous(), dx_TF, partial, len(x_TF),
        **shapes, ROWS=rows, num_warps=4, **ROUNDED,
    )  # fmt: skip
    return dx_TF, partial.sum(0)


@backward.register_fake
def _(dout_TF: Tensor, x_TF: Tensor, bias_F: Tensor) -> tuple[Tensor, Tensor]:
    return x_TF.new_empty(x_TF.shape), x_TF.new_empty(x_TF.shape[1], dtype=statistics_dtype(x_TF))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dout_TF: Tensor) -> tuple[Tensor, Tensor]:
    x_TF, bias_F = ctx.saved_tensors
    dx_TF, dbias_F = backward(dout_TF, x_TF, bias_F)
    return dx_TF, dbias_F.to(bias_F.dtype)


forward.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------- what is compiled ahead of time


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Both kernels at the widths of Small's and Base's feed-forward layers, and of Small's generator in fp16."""
    for dtype, size in (("bf16", 1024), ("bf16", 3072), ("fp16", 256)):
        types = dict.fromkeys(("p_x", "p_out", "p_dout", "p_dx"), f"*{dtype}") | {"T": "i32"}
        shapes = {"ACC": tl.float32, **blocks(size)}
        for name, kernel in (("forward", _forward_kernel), ("backward", _backward_kernel)):
            rows = folded_rows(shapes["BLOCK_T"], shapes["BLOCK_F"])
            known = {**shapes, "ROWS": rows} if kernel is _backward_kernel else shapes
            signature = signature_of(kernel, types, known)
            label = f"bias_gelu_{name}[{dtype} F={size}]"
            yield CompileCase(label, kernel, signature, known, 4, 3, streaming=True, wide_stores=True, **ROUNDED)
