"""Bidirectional attention over sequences laid end to end, with dropout: the contract.

    P[t, j] = softmax_j(softmax_scale · <q_t, k_j>)      j runs over the sequence that holds token t
    out_t   = Σ_j keep[t, j] · P[t, j] / keep_rate · v_j

**Dropout.** Probability (token t, key j, head h) is kept iff `rng.keep_mask(seed, rows=t, columns=j,
plane=h, stream)` says so: t is the token's row in the packed batch (plus the seed's `first_row`), j the
key's position within its sequence. The decisions do not depend on tiles, on the device, or on how the batch
was split, and the backward pass computes them again instead of storing N·H·S·S bits.

Left out on purpose: causal masks, additive biases, different lengths for queries and keys (ELECTRA has none).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from electra_kernels import attention_native, attention_reference, rng
from electra_kernels.checks import FLOATS, INTEGERS, check_dropout, check_tensor
from electra_kernels.dispatch import checks_values, use_native, use_triton
from torch import Tensor

KERNEL_HEAD_DIMS = (16, 32, 64, 128)
"""Head dims that the kernels support. Others are padded with zeros to the next; above 128 the twin runs."""


def attention(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    seed: rng.Seed | None = None,
    stream: int = 0,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention of every token to all tokens of its own sequence.

    Args:
        qkv_T3HK: queries, keys and values of all tokens, [T, 3, H, K], float32, bfloat16, float16 (or
            float64, in the twin and under the interpreter).
        cu_seqlens: int32 or int64 [N + 1], cumulative lengths, rising from 0 to T. Sequences may be empty.
        max_seqlen: at least the longest sequence's length; a Python int, so that nothing is read from the device.
        dropout_p: probability of dropping an attention probability, 0 <= p < 1.
        seed: int, or int64 tensor `[key]` or `[key, first_row]` on the same device; required if dropout_p > 0.
        stream: distinguishes uses of one `seed`, e.g. by the layer's number; each stream has its own dropout.
        softmax_scale: factor on the logits, > 0; 1/sqrt(K) by default.

    Returns:
        out_THK, contiguous, in the dtype of `qkv_T3HK`; differentiable with respect to `qkv_T3HK`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; wrong values in `cu_seqlens` (on a
            GPU checked only with ELECTRA_KERNELS_DEBUG=1, because reading them waits for the device).
    """
    _check(qkv_T3HK, cu_seqlens, max_seqlen, softmax_scale)
    key = check_dropout(dropout_p, seed, qkv_T3HK)
    key = _no_seed(qkv_T3HK) if key is None else key
    scale = qkv_T3HK.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    numbers = (max_seqlen, dropout_p, stream, scale)
    if qkv_T3HK.shape[-1] <= KERNEL_HEAD_DIMS[-1] and use_triton(qkv_T3HK):
        from electra_kernels import attention_triton

        head_dim = qkv_T3HK.shape[-1]
        missing = next(size for size in KERNEL_HEAD_DIMS if size >= head_dim) - head_dim
        filled = F.pad(qkv_T3HK, (0, missing)) if missing else qkv_T3HK
        out_THK, _ = attention_triton.forward(filled.contiguous(), cu_seqlens.contiguous(), key, *numbers)
        return out_THK[..., :head_dim].contiguous() if missing else out_THK
    supported = attention_native.takes(qkv_T3HK, max_seqlen)
    slower = attention_reference.is_fused(qkv_T3HK, dropout_p) and attention_native.is_slower(qkv_T3HK, max_seqlen)
    if use_native(qkv_T3HK, training=dropout_p > 0, supported=supported, twin_is_faster=slower):
        return attention_native.forward(qkv_T3HK, cu_seqlens, key, *numbers)
    return attention_reference.attention(qkv_T3HK, cu_seqlens, key, *numbers)


def _no_seed(qkv_T3HK: Tensor) -> Tensor:
    """A placeholder for the seed. Without dropout nothing is drawn, so nobody reads it."""
    return torch.empty(2, dtype=torch.int64, device=qkv_T3HK.device)


def _check(qkv_T3HK: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float | None) -> None:
    check_tensor("qkv_T3HK", qkv_T3HK, (None, 3, None, None), FLOATS)
    check_tensor("cu_seqlens", cu_seqlens, (None,), INTEGERS, qkv_T3HK.device)
    if len(cu_seqlens) == 0:
        raise ValueError("cu_seqlens: expected N + 1 values, the first of them 0, got none")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen: expected at least 0, got {max_seqlen}")
    if softmax_scale is not None and not 0.0 < softmax_scale < float("inf"):
        raise ValueError(f"softmax_scale: expected a finite number > 0, got {softmax_scale}")
    if checks_values(qkv_T3HK):
        _check_values(cu_seqlens, max_seqlen, qkv_T3HK.shape[0])


def _check_values(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> None:
    """Checks the values of `cu_seqlens`; reads them on the host."""
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if starts[0] != 0 or starts[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens: expected to rise from 0 to T = {tokens}, got {starts}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen: expected at least the longest sequence, {max(lengths)}, got {max_seqlen}")
