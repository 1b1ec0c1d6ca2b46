"""Attention in plain PyTorch: the specification of the kernels, and what CPUs run where the loops in C do not.

    P = softmax(scale · Q Kᵀ)        per sequence and head, over all of the sequence's keys
    O = (keep ∘ P · keep_scale) V

Sequences of equal length go into one batched call, so nothing is padded and no mask is added. `rng.keep_mask`
decides which probabilities dropout keeps; see `attention.py` for the counter.

Unlike the kernels, this stores the N·H·S·S probabilities with dropout (and when training in bfloat16 on a CPU).
"""

from __future__ import annotations

import itertools

import torch
from electra_kernels import rng
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor,
    max_seqlen: int,
    dropout_p: float,
    stream: int,
    softmax_scale: float,
) -> Tensor:
    """Attention within each sequence, `out_THK`; arguments as in `electra_kernels.attention`, all given."""
    tokens, _, heads, head_dim = qkv_T3HK.shape
    # On the meta device no length can be read, except from a tensor subclass that keeps values.
    if tokens == 0 or (qkv_T3HK.is_meta and type(qkv_T3HK) is Tensor):
        return qkv_T3HK.sum(1)
    order_T, shapes = _group_by_length(tokens, cu_seqlens, max_seqlen)
    if order_T is not None and is_fused(qkv_T3HK, dropout_p) and 2 * len(shapes) > len(cu_seqlens) - 1:
        return _one_by_one(qkv_T3HK, cu_seqlens, softmax_scale)
    rows_T = torch.arange(tokens, device=qkv_T3HK.device) if order_T is None else order_T
    grouped_T3HK = qkv_T3HK if order_T is None else qkv_T3HK[order_T]
    sizes = [count * length for count, length in shapes]
    outputs = []
    for (count, length), group, rows in zip(shapes, grouped_T3HK.split(sizes), rows_T.split(sizes)):
        q, k, v = group.view(count, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        if dropout_p > 0.0:
            keep = dropout_mask(rows, length, heads, dropout_p, seed, stream)
            keep = keep.view(heads, count, length, length).transpose(0, 1)
            out = _explicit(q, k, v * rng.keep_scale(dropout_p), softmax_scale, keep)
        elif q.requires_grad and q.is_cpu and q.dtype == torch.bfloat16:
            out = _explicit(q, k, v, softmax_scale)  # PyTorch's fused backward takes twice as long here
        else:
            out = scaled_dot_product_attention(q, k, v, scale=softmax_scale)
        outputs.append(out.transpose(1, 2).reshape(count * length, heads, head_dim))
    out_THK = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return out_THK if order_T is None else torch.empty_like(out_THK).index_copy(0, order_T, out_THK)


def is_fused(qkv_T3HK: Tensor, dropout_p: float) -> bool:
    """Whether PyTorch's fused forward pass is enough: no dropout and no gradient."""
    return dropout_p == 0.0 and not (qkv_T3HK.requires_grad and torch.is_grad_enabled())


def _one_by_one(qkv_T3HK: Tensor, cu_seqlens: Tensor, softmax_scale: float) -> Tensor:
    """Sequence by sequence, on slices, so that nothing is gathered."""
    out_THK = torch.empty_like(qkv_T3HK[:, 0], memory_format=torch.contiguous_format)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        if end > start:
            q, k, v = qkv_T3HK[start:end].permute(1, 2, 0, 3).unsqueeze(1)
            out_THK[start:end] = scaled_dot_product_attention(q, k, v, scale=softmax_scale)[0].transpose(0, 1)
    return out_THK


def _group_by_length(
    tokens: int, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor | None, list[tuple[int, int]]]:
    """Token order in which sequences of equal length are adjacent (None: as it is), and runs (count, length)."""
    count = cu_seqlens.numel() - 1
    if count * max_seqlen == tokens:  # then no sequence is shorter, and nothing has to be read on the host
        return None, [(count, max_seqlen)]
    starts_by_length: dict[int, list[int]] = {}
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        if end > start:
            starts_by_length.setdefault(end - start, []).append(start)
    shapes = [(len(starts), length) for length, starts in starts_by_length.items()]
    if len(shapes) == 1:
        return None, shapes
    runs = [torch.tensor(starts)[:, None] + torch.arange(length) for length, starts in starts_by_length.items()]
    return torch.cat([run.flatten() for run in runs]).to(cu_seqlens.device), shapes


def _explicit(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, keep: Tensor | None = None) -> Tensor:
    """The formula, for one group [count, H, length, K]; with dropout, `v` comes multiplied by `keep_scale`.
    `torch.softmax` keeps fp32 statistics."""
    probabilities = torch.softmax((q * softmax_scale) @ k.transpose(-1, -2), dim=-1)
    if keep is not None:
        # Multiplying by 0 or 1 is several times faster than `masked_fill`, and so is converting from uint8.
        probabilities = probabilities * keep.view(torch.uint8).to(q.dtype)
    return probabilities @ v


def dropout_mask(rows: Tensor, length: int, heads: int, dropout_p: float, seed: Tensor, stream: int) -> Tensor:
    """Which probabilities of tokens `rows` with keys 0 .. length - 1 are kept: bool [H, len(rows), length]."""
    return torch.stack([rng.keep_mask(seed, rows, length, dropout_p, stream, plane=head) for head in range(heads)])
