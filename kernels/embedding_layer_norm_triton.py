"""Embedding sum + LayerNorm + dropout on Triton (maths: `embedding_layer_norm`).

A tile is BLOCK_T tokens by all E features (D in the kernels, as in those of `layer_norm_triton` that they use).
**Forward.** A program owns one tile; the embedding sum is never stored.
**Backward.** Only the inputs are saved. Programs stride over the tokens, recompute sum, statistics and dropout
decisions, and write ds, the gradient of the sum, for each token, and partial sums of dweight and dbias (formulas:
`layer_norm_triton`). PyTorch's own embedding backward then adds ds to the tables' gradients: it sorts the ids and
sums runs of equal ones, without atomics, so there is nothing to gain from rewriting it. Its one weakness is a row
that thousands of tokens share, whose partial sums a single thread adds in sequence. The two segments are such
rows, so tables of few rows get their gradient from a product with the one-hot matrix of the ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from electra_kernels.blocks_triton import ROUNDED, column_sums, folded_rows, load_rows, store_rows
from electra_kernels.compile_case import CompileCase, signature_of
from electra_kernels.layer_norm_triton import PROGRAMS, blocks, constexprs, drop, normalise, normalise_backward
from electra_kernels.operators import operator, statistics_dtype
from electra_kernels.rng import dropout_threshold
from torch import Tensor

FEW_ROWS = 8  # tables of at most so many rows get their gradient from a matrix product


@triton.jit
def _normalised_sum(
    p_input_ids, p_position_ids, p_segment_ids, p_words, p_positions, p_segments, o_t, m_t, o_d, eps,
    ACC: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """`normalise` applied to the tokens' embedding sums."""
    b_ids = tl.load(p_input_ids + o_t, mask=m_t, other=0)
    b_s = load_rows(p_words, b_ids, m_t, o_d, D).to(ACC)
    b_ids = tl.load(p_position_ids + o_t, mask=m_t, other=0)
    b_s += load_rows(p_positions, b_ids, m_t, o_d, D).to(ACC)
    b_ids = tl.load(p_segment_ids + o_t, mask=m_t, other=0)
    b_s += load_rows(p_segments, b_ids, m_t, o_d, D).to(ACC)
    return normalise(b_s, o_d, eps, D)


@triton.jit(do_not_specialize=["T", "stream"])
def _forward_kernel(
    p_input_ids, p_position_ids, p_segment_ids, p_words, p_positions, p_segments, p_weight, p_bias, p_seed, p_out,
    T, eps, stream,
    ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Whole rows of the result: BLOCK_T tokens."""
    o_t, o_d = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    m_t = o_t < T
    b_n, _ = _normalised_sum(
        p_input_ids, p_position_ids, p_segment_ids, p_words, p_positions, p_segments, o_t, m_t, o_d, eps, ACC, D
    )
    b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(ACC)
    b_out = b_n * b_weight[None, :] + tl.load(p_bias + o_d, mask=o_d < D, other=0.0).to(ACC)[None, :]
    if THRESHOLD > 0:
        b_out = drop(b_out, p_seed, o_t, stream, THRESHOLD, BLOCK_D)
    store_rows(p_out, o_t, m_t, o_d, b_out, D)


@triton.jit(do_not_specialize=["T", "stream"])
def _backward_kernel(
    p_input_ids, p_position_ids, p_segment_ids, p_words, p_positions, p_segments, p_weight, p_seed, p_dout,
    p_ds, p_dweight, p_dbias, T, eps, stream,
    ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ds of this program's tokens, and their partial sums for dweight and dbias, [ROWS, BLOCK_D] each."""
    o_d = tl.arange(0, BLOCK_D)
    b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(ACC)
    b_dweight, b_dbias = tl.zeros((ROWS, BLOCK_D), ACC), tl.zeros((ROWS, BLOCK_D), ACC)
    for start in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        b_n, b_rstd = _normalised_sum(
            p_input_ids, p_position_ids, p_segment_ids, p_words, p_positions, p_segments,
            o_t, m_t, o_d, eps, ACC, D,
        )  # fmt: skip
        b_dout = load_rows(p_dout, o_t, m_t, o_d, D).to(ACC)
        if THRESHOLD > 0:
            b_dout = drop(b_dout, p_seed, o_t, stream, THRESHOLD, BLOCK_D)
        b_dweight += column_sums(b_dout * b_n, ROWS)
        b_dbias += column_sums(b_dout, ROWS)
        store_rows(p_ds, o_t, m_t, o_d, normalise_backward(b_dout * b_weight[None, :], b_n, b_rstd, D), D)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    store_rows(p_dweight, o_row, o_row >= 0, o_d, b_dweight, D)
    store_rows(p_dbias, o_row, o_row >= 0, o_d, b_dbias, D)


# ---------------------------------------------------------------- custom operators and autograd


@operator("embedding_layer_norm")
def forward(
    input_ids_T: Tensor, position_ids_T: Tensor, segment_ids_T: Tensor, words_VE: Tensor, positions_SE: Tensor,
    segments_CE: Tensor, weight_E: Tensor, bias_E: Tensor, eps: float, dropout_p: float, seed: Tensor | None,
    stream: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See the contract in `embedding_layer_norm`."""
    tokens, shapes = len(input_ids_T), constexprs(words_VE, dropout_p)
    out_TE = words_VE.new_empty(tokens, words_VE.shape[1], dtype=dtype)
    inputs = (input_ids_T, position_ids_T, segment_ids_T, words_VE, positions_SE, segments_CE, weight_E, bias_E)
    if out_TE.numel():
        _forward_kernel[(triton.cdiv(tokens, shapes["BLOCK_T"]),)](
            *(tensor.contiguous() for tensor in inputs), seed, out_TE, tokens, eps, stream,
            **shapes, num_warps=4, **ROUNDED,
        )  # fmt: skip
    return out_TE


@forward.register_fake
def _(
    input_ids_T: Tensor, position_ids_T: Tensor, segment_ids_T: Tensor, words_VE: Tensor, positions_SE: Tensor,
    segments_CE: Tensor, weight_E: Tensor, bias_E: Tensor, eps: float, dropout_p: float, seed: Tensor | None,
    stream: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return words_VE.new_empty(input_ids_T.shape[0], words_VE.shape[1], dtype=dtype)


@operator("embedding_layer_norm_backward")
def backward(
    dout_TE: Tensor, input_ids_T: Tensor, position_ids_T: Tensor, segment_ids_T: Tensor, words_VE: Tensor,
    positions_SE: Tensor, segments_CE: Tensor, weight_E: Tensor, eps: float, dropout_p: float,
    seed: Tensor | None, stream: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(ds_TE, [dweight_E, dbias_E]) in fp32 (fp64)."""
    tokens, shapes = len(input_ids_T), constexprs(words_VE, dropout_p)
    programs = max(1, min(PROGRAMS, triton.cdiv(tokens, shapes["BLOCK_T"])))
    ds_TE = words_VE.new_empty(tokens, words_VE.shape[1], dtype=statistics_dtype(words_VE))
    rows = folded_rows(shapes["BLOCK_T"], shapes["BLOCK_D"])
    partial = ds_TE.new_empty(2, programs * rows, words_VE.shape[1])
    inputs = (input_ids_T, position_ids_T, segment_ids_T, words_VE, positions_SE, segments_CE, weight_E)
    _backward_kernel[(programs,)](
        *(tensor.contiguous() for tensor in inputs), seed, dout_TE.contiguous(), ds_TE, partial[0], partial[1],
        tokens, eps, stream, **shapes, ROWS=rows, num_warps=4, **ROUNDED,
    )  # fmt: skip
    return ds_TE, partial.sum(1)


@backward.register_fake
def _(
    dout_TE: Tensor, input_ids_T: Tensor, position_ids_T: Tensor, segment_ids_T: Tensor, words_VE: Tensor,
    positions_SE: Tensor, segments_CE: Tensor, weight_E: Tensor, eps: float, dropout_p: float,
    seed: Tensor | None, stream: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ds_TE = dout_TE.new_empty(dout_TE.shape[0], words_VE.shape[1], dtype=statistics_dtype(words_VE))
    return ds_TE, ds_TE.new_empty(2, words_VE.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, bias_E, ctx.eps, ctx.dropout_p, seed, ctx.stream, _ = inputs
    ctx.bias_dtype = bias_E.dtype
    ctx.save_for_backward(*tensors, seed)


def _dtable(ds_TE: Tensor, ids_T: Tensor, rows: int) -> Tensor:
    """The gradient of a table: for each row, ds summed over the tokens that looked it up."""
    if rows > FEW_ROWS:
        return torch.ops.aten.embedding_dense_backward(ds_TE, ids_T, rows, -1, False)
    took_RT = torch.arange(rows, device=ids_T.device)[:, None] == ids_T
    return took_RT.to(ds_TE.dtype) @ ds_TE


def _differentiate(ctx: Any, dout_TE: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    ds_TE, (dweight_E, dbias_E) = backward(dout_TE, *tensors, ctx.eps, ctx.dropout_p, seed, ctx.stream)
    tables = [_dtable(ds_TE, ids, len(table)).to(table.dtype) for ids, table in zip(tensors[:3], tensors[3:6])]
    parameters = dweight_E.to(tensors[6].dtype), dbias_E.to(ctx.bias_dtype)
    return None, None, None, *tables, *parameters, None, None, None, None, None


forward.register_autograd(_differentiate, setup_context=_save)


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Both kernels at the embedding widths of Small and Base, in bf16 from fp32 tables."""
    for size, dropout_p in ((128, 0.1), (768, 0.0)):
        types = dict.fromkeys(("p_input_ids", "p_position_ids", "p_segment_ids", "p_seed"), "*i64")
        types |= {"p_out": "*bf16", "p_dout": "*bf16", "T": "i32", "eps": "fp32", "stream": "i32"}
        shapes = {"ACC": tl.float32, **blocks(size), "THRESHOLD": dropout_threshold(dropout_p)}
        for name, kernel in (("forward", _forward_kernel), ("backward", _backward_kernel)):
            rows = folded_rows(shapes["BLOCK_T"], shapes["BLOCK_D"])
            known = {**shapes, "ROWS": rows} if kernel is _backward_kernel else shapes
            signature = signature_of(kernel, types, known)
            label = f"embedding_layer_norm_{name}[E={size} p={dropout_p}]"
            yield CompileCase(label, kernel, signature, known, 4, 3, streaming=True, wide_stores=True, **ROUNDED)
