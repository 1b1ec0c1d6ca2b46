"""Attention in plain PyTorch: the specification of the kernels, and the path that trains on CPUs.

    P = softmax(scale · Q Kᵀ)        per sequence and head, over all of the sequence's keys
    O = (keep ∘ P · keep_scale) V

Sequences of equal length make one batched call, so nothing is padded and no mask is added. Which
probabilities dropout keeps is decided by `rng.keep_mask`; see `attention.py` for the counter.
"""

from __future__ import annotations

import torch
from electra_kernels import rng
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float,
    seed: Tensor,
    stream: int,
    softmax_scale: float,
) -> Tensor:
    """Attention within each sequence, `out_THK`; arguments as in `electra_kernels.attention`, all given."""
    tokens, _, heads, head_dim = qkv_T3HK.shape
    if tokens == 0:
        return qkv_T3HK.sum(1)
    order_T, shapes = _group_by_length(tokens, cu_seqlens, max_seqlen)
    grouped = qkv_T3HK if order_T is None else qkv_T3HK[order_T]
    outputs, start = [], 0
    for count, length in shapes:
        group = grouped.narrow(0, start, count * length) if len(shapes) > 1 else grouped
        q, k, v = group.view(count, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        if dropout_p == 0.0:
            out = scaled_dot_product_attention(q, k, v, scale=softmax_scale)
        else:
            rows = torch.arange(start, start + count * length, device=qkv_T3HK.device)
            rows = rows if order_T is None else order_T[rows]
            keep = dropout_mask(rows.view(count, length), length, heads, dropout_p, seed, stream)
            out = _attention_with_dropout(q, k, v, keep, rng.keep_scale(dropout_p), softmax_scale)
        outputs.append(out.transpose(1, 2).reshape(count * length, heads, head_dim))
        start += count * length
    out_THK = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return out_THK if order_T is None else torch.empty_like(out_THK).index_copy(0, order_T, out_THK)


def _group_by_length(
    tokens: int, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor | None, list[tuple[int, int]]]:
    """Token order that lays equally long sequences side by side (None: as it is), and (count, length) runs."""
    count = cu_seqlens.numel() - 1
    if count * max_seqlen == tokens:  # no sequence can be shorter, and no value has to reach the host
        return None, [(count, max_seqlen)]
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    starts = cu_seqlens.tolist()
    by_length: dict[int, list[int]] = {}
    for start, length in zip(starts, lengths):
        if length:
            by_length.setdefault(length, []).append(start)
    shapes = [(len(group), length) for length, group in by_length.items()]
    if len(shapes) == 1:
        return None, shapes
    order = [
        (torch.tensor(group)[:, None] + torch.arange(length)).flatten() for length, group in by_length.items()
    ]
    return torch.cat(order).to(cu_seqlens.device), shapes


def _attention_with_dropout(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, keep_scale: float, softmax_scale: float
) -> Tensor:
    """One group [count, H, length, K]; `torch.softmax` keeps fp32 statistics for half-precision input."""
    probabilities = torch.softmax((q * softmax_scale) @ k.transpose(-1, -2), dim=-1)
    return probabilities.masked_fill(~keep, 0.0) @ (v * keep_scale)


def dropout_mask(
    rows: Tensor, length: int, heads: int, dropout_p: float, seed: Tensor, stream: int
) -> Tensor:
    """Kept probabilities, bool [count, H, length, length], of the tokens `rows` [count, length]."""
    count = rows.shape[0]
    keep = torch.empty(count, heads, length, length, dtype=torch.bool, device=rows.device)
    for head in range(heads):
        mask = rng.keep_mask(seed, rows.flatten(), length, dropout_p, stream, plane=head)
        keep[:, head] = mask.view(count, length, length)
    return keep
