"""Attention by loops in C (maths: see `attention`). Each (sequence, head) is a task of its own and is worked on a
block of queries at a time, so that probabilities never leave the cache. The backward pass recomputes them.

`c/attention.c` computes in fp32. `c/attention_bf16.c` multiplies in bf16, on processors that are fast at it
(`fast_bf16.py`): the same dropout decisions, and the same rounding of operands as in bf16 products on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from electra_kernels import native
from electra_kernels.fast_bf16 import has_fast_bf16
from electra_kernels.native import DTYPES, c_int, call, dropout_arguments
from electra_kernels.operators import operator
from torch import Tensor

LANES = 16  # as in c/common.h: head dims are multiples of a vector
DEPTH = 32  # as in c/attention_bf16.c: there head dims are multiples of a tile's row
LONGEST = 4096  # tokens of a sequence; beyond this, PyTorch's own blocked kernels are the better choice
SHORT = 128  # tokens; with fp32 products and no dropout, PyTorch's own kernel is faster on longer sequences


def takes(qkv_T3HK: Tensor, max_seqlen: int) -> bool:
    """Whether the loops support this dtype and these sizes."""
    return qkv_T3HK.dtype in DTYPES and qkv_T3HK.shape[-1] % LANES == 0 and max_seqlen <= LONGEST


def is_slower(qkv_T3HK: Tensor, max_seqlen: int) -> bool:
    """Whether PyTorch's fused kernel, where it can do the same, is faster."""
    return max_seqlen > SHORT and not _in_bf16(qkv_T3HK)


def _in_bf16(qkv_T3HK: Tensor) -> bool:
    fits = qkv_T3HK.device.type == "cpu" and qkv_T3HK.dtype == torch.bfloat16 and qkv_T3HK.shape[-1] % DEPTH == 0
    return fits and has_fast_bf16() and native.has_bf16_products()


@operator("native_attention")
def forward(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor,
    max_seqlen: int,
    dropout_p: float,
    stream: int,
    softmax_scale: float,
) -> Tensor:
    """`out_THK`; see the contract in `attention`."""
    return _run(qkv_T3HK, cu_seqlens, seed, None, max_seqlen, dropout_p, stream, softmax_scale)


@forward.register_fake
def _(qkv_T3HK: Tensor, *_: Any) -> Tensor:
    return qkv_T3HK.new_empty(qkv_T3HK.shape[:1] + qkv_T3HK.shape[2:])


@operator("native_attention_backward")
def backward(
    dout_THK: Tensor,
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor,
    max_seqlen: int,
    dropout_p: float,
    stream: int,
    softmax_scale: float,
) -> Tensor:
    """Gradient of `qkv_T3HK`."""
    return _run(qkv_T3HK, cu_seqlens, seed, dout_THK.contiguous(), max_seqlen, dropout_p, stream, softmax_scale)


@backward.register_fake
def _(_dout: Tensor, qkv_T3HK: Tensor, *_: Any) -> Tensor:
    return qkv_T3HK.new_empty(qkv_T3HK.shape)


def _run(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor,
    dout_THK: Tensor | None,
    max_seqlen: int,
    dropout_p: float,
    stream: int,
    softmax_scale: float,
) -> Tensor:
    qkv_T3HK, offsets = qkv_T3HK.contiguous(), cu_seqlens.long().contiguous()
    tokens, _, heads, dim = qkv_T3HK.shape
    out = qkv_T3HK.new_empty(tokens, heads, dim) if dout_THK is None else torch.empty_like(qkv_T3HK)
    threads = c_int(torch.get_num_threads())
    arguments = (
        qkv_T3HK, offsets, seed, dout_THK, out, len(offsets) - 1, max_seqlen, heads, dim,
        softmax_scale, *dropout_arguments(dropout_p, stream),
    )  # fmt: skip
    if _in_bf16(qkv_T3HK):
        call("attention_in_bf16", *arguments, threads)
    else:
        call("attention", *arguments, c_int(qkv_T3HK.dtype == torch.bfloat16), threads)
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.max_seqlen, ctx.dropout_p, ctx.stream, ctx.softmax_scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dout_THK: Tensor) -> tuple[Tensor | None, ...]:
    numbers = (ctx.max_seqlen, ctx.dropout_p, ctx.stream, ctx.softmax_scale)
    return backward(dout_THK, *ctx.saved_tensors, *numbers), *(None,) * 6


forward.register_autograd(_differentiate, setup_context=_save)
