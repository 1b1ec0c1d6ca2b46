# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton kernels of attention: the maths of `attention.py`, without storing any N·H·S·S tensor.

**Short sequences** (at most `attention_triton.SHORT_LIMIT` tokens: up to 128 in half precision). A program owns
one (sequence, head) and holds it on chip as a single tile of BLOCK_S queries by BLOCK_S keys, so the softmax takes
one pass. Nothing is saved for the backward pass but the inputs: a single kernel recomputes P from Q and K:

    P = softmax(scale · Q Kᵀ)        P̃ = keep ∘ P · keep_scale        O  = P̃ V
    dP = keep ∘ (dO Vᵀ) · keep_scale  δ = rowsum(P ∘ dP)
    dV = P̃ᵀ dO                        dS = scale · P ∘ (dP - δ)        dQ = dS K,  dK = dSᵀ Q

(`scale` and `keep_scale` are factors of whole results, so they are applied to those and not to S x S tiles.
dS is dP multiplied by the derivative of softmax, ∂P_ij / ∂logit_ik = P_ij ([j = k] - P_ik), whose second term is
the same for a whole row: it gives δ.)

**Any length.** In the forward pass a program owns BLOCK_Q queries of one (sequence, head) and loops over blocks of
BLOCK_J keys with the online softmax (Milakov and Gimelshein 2018; Dao et al. 2022). It saves O and each row's
log-sum-exp (base 2), from which the backward pass recomputes P = 2^(logits - lse) directly. There are two backward
kernels: a program of the first owns a block of queries (dQ, and δ, which it stores), one of the second a block of
keys (dK, dV). No program sees a whole row of P, so δ is computed from O instead:
Σ_j P_ij dP_ij = Σ_j P̃_ij <dO_i, V_j> = <dO_i, O_i>.

Each gradient element is written once, by one program. There are no atomics, so results are bitwise reproducible.
Left out on purpose: TMA descriptors and warp specialisation (gains to be measured first), and head dims other than
`attention.KERNEL_HEAD_DIMS` (`attention` pads heads with zeros to the next of them). Tiles and launches are in
`attention_triton.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from electra_kernels.blocks_triton import LOG2E, dot
from electra_kernels.rng_triton import keep_tile

# On sm_100 Triton 3.6 and 3.7 set no barrier between reading a product from tensor memory and clearing it for the
# next: with eight warps, a fast one could clear scores that another has not read.
BARRIER_AFTER_SCORES = tl.constexpr(triton.__version__.startswith(("3.6.", "3.7.")))


@triton.jit
def _span(p_cu_seqlens, sequence):
    """First row (int64) and length (int32) of a sequence."""
    start = tl.load(p_cu_seqlens + sequence).to(tl.int64)
    end = tl.load(p_cu_seqlens + sequence + 1).to(tl.int64)
    return start, (end - start).to(tl.int32)


@triton.jit
def _load_rows(p_head, rows, m_rows, ROW: tl.constexpr, K: tl.constexpr):
    """[len(rows), K] at `p_head + row * ROW`; zeros where the mask is off."""
    o_k = tl.arange(0, K)
    return tl.load(p_head + rows[:, None] * ROW + o_k[None, :], mask=m_rows[:, None], other=0.0)


@triton.jit
def _load_keys_values(p_q, rows, m_rows, H: tl.constexpr, K: tl.constexpr):
    """K and V of these rows; `p_q` points to the head's query in row 0 of the batch."""
    b_k = _load_rows(p_q + H * K, rows, m_rows, 3 * H * K, K)
    return b_k, _load_rows(p_q + 2 * H * K, rows, m_rows, 3 * H * K, K)


@triton.jit
def _store_rows(p_head, rows, m_rows, values, ROW: tl.constexpr, K: tl.constexpr):
    o_k = tl.arange(0, K)
    p_rows = p_head + rows[:, None] * ROW + o_k[None, :]
    tl.store(p_rows, values.to(p_head.dtype.element_ty), mask=m_rows[:, None])


@triton.jit
def _keep_scale(THRESHOLD: tl.constexpr):
    """The factor on kept values: of 65536 random numbers, 65536 - THRESHOLD keep a value."""
    return 65536.0 / (65536 - THRESHOLD)


# ---------------------------------------------------------------- a whole (sequence, head) on chip


@triton.jit
def _softmax_tile(b_q, b_k, o_j, length, SCALE: tl.constexpr):
    """exp(logit - row maximum) over all keys at once, and the sum of each row."""
    b_s = tl.where((o_j < length)[None, :], dot(b_q, tl.trans(b_k)), float("-inf"))
    b_e = tl.exp2(b_s * (SCALE * LOG2E) - (tl.max(b_s, 1) * (SCALE * LOG2E))[:, None])
    return b_e, tl.sum(b_e, 1)


@triton.jit(do_not_specialize=["stream"])
def short_forward_kernel(
    p_qkv, p_cu_seqlens, p_seed, p_out, stream,
    H: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """O of one (sequence, head), in one tile."""
    sequence, head = tl.program_id(0) // H, tl.program_id(0) % H
    start, length = _span(p_cu_seqlens, sequence)
    if length == 0:
        return
    o_s = tl.arange(0, BLOCK_S)
    rows, m_s = start + o_s, o_s < length
    p_q = p_qkv + head * K
    b_q = _load_rows(p_q, rows, m_s, 3 * H * K, K)
    b_k, b_v = _load_keys_values(p_q, rows, m_s, H, K)
    b_e, b_sum = _softmax_tile(b_q, b_k, o_s, length, SCALE)
    if THRESHOLD > 0:
        b_e = tl.where(keep_tile(p_seed, rows, 0, stream, head, THRESHOLD, BLOCK_S), b_e, 0.0)
    b_out = dot(b_e.to(b_v.dtype), b_v) * (_keep_scale(THRESHOLD) / b_sum)[:, None]
    _store_rows(p_out + head * K, rows, m_s, b_out, H * K, K)


@triton.jit(do_not_specialize=["stream"])
def short_backward_kernel(
    p_qkv, p_cu_seqlens, p_seed, p_dout, p_dqkv, stream,
    H: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of one (sequence, head), from Q, K, V and dO; P is recomputed."""
    sequence, head = tl.program_id(0) // H, tl.program_id(0) % H
    start, length = _span(p_cu_seqlens, sequence)
    if length == 0:
        return
    o_s = tl.arange(0, BLOCK_S)
    rows, m_s = start + o_s, o_s < length
    p_q, p_dq = p_qkv + head * K, p_dqkv + head * K
    b_q = _load_rows(p_q, rows, m_s, 3 * H * K, K)
    b_k, b_v = _load_keys_values(p_q, rows, m_s, H, K)
    b_dout = _load_rows(p_dout + head * K, rows, m_s, H * K, K)
    b_e, b_sum = _softmax_tile(b_q, b_k, o_s, length, SCALE)
    if BARRIER_AFTER_SCORES:
        tl.debug_barrier()
    b_p = b_e / b_sum[:, None]
    b_kept, b_dp = b_p, dot(b_dout, tl.trans(b_v))
    if THRESHOLD > 0:
        b_keep = keep_tile(p_seed, rows, 0, stream, head, THRESHOLD, BLOCK_S)
        b_kept, b_dp = tl.where(b_keep, b_p, 0.0), tl.where(b_keep, b_dp, 0.0)
    b_dv = dot(tl.trans(b_kept.to(b_q.dtype)), b_dout) * _keep_scale(THRESHOLD)
    _store_rows(p_dq + 2 * H * K, rows, m_s, b_dv, 3 * H * K, K)
    b_ds = (b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])).to(b_q.dtype)
    factor = SCALE * _keep_scale(THRESHOLD)
    _store_rows(p_dq, rows, m_s, dot(b_ds, b_k) * factor, 3 * H * K, K)
    _store_rows(p_dq + H * K, rows, m_s, dot(tl.trans(b_ds), b_q) * factor, 3 * H * K, K)


# ---------------------------------------------------------------- blocks of queries and keys, any length


@triton.jit
def _locate(p_cu_seqlens, blocks, H: tl.constexpr):
    """(first row, length, head, block) of this program. Blocks of one (sequence, head) have adjacent ids."""
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start, length = _span(p_cu_seqlens, pair // H)
    return start, length, pair % H, block


@triton.jit(do_not_specialize=["stream", "tokens", "blocks"])
def forward_kernel(
    p_qkv, p_cu_seqlens, p_seed, p_out, p_lse, stream, tokens, blocks,
    H: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """O and lse of one block of queries. Sums over earlier blocks of keys are rescaled to each new maximum."""
    start, length, head, block = _locate(p_cu_seqlens, blocks, H)
    if block * BLOCK_Q >= length:
        return
    o_q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    rows, m_q = start + o_q, o_q < length
    p_q = p_qkv + head * K
    b_q = _load_rows(p_q, rows, m_q, 3 * H * K, K)
    b_max = tl.full((BLOCK_Q,), float("-inf"), p_lse.dtype.element_ty)
    b_sum = tl.zeros((BLOCK_Q,), p_lse.dtype.element_ty)
    b_out = tl.zeros((BLOCK_Q, K), p_lse.dtype.element_ty)
    for key in range(0, length, BLOCK_J):
        o_j = key + tl.arange(0, BLOCK_J)
        b_k, b_v = _load_keys_values(p_q, start + o_j, o_j < length, H, K)
        b_s = tl.where((o_j < length)[None, :], dot(b_q, tl.trans(b_k)), float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * (SCALE * LOG2E))
        b_rescale = tl.exp2(b_max - b_new)
        b_e = tl.exp2(b_s * (SCALE * LOG2E) - b_new[:, None])
        b_sum = b_sum * b_rescale + tl.sum(b_e, 1)
        if THRESHOLD > 0:
            b_e = tl.where(keep_tile(p_seed, rows, key, stream, head, THRESHOLD, BLOCK_J), b_e, 0.0)
        b_out = b_out * b_rescale[:, None] + dot(b_e.to(b_v.dtype), b_v)
        b_max = b_new
    b_out *= (_keep_scale(THRESHOLD) / b_sum)[:, None]
    _store_rows(p_out + head * K, rows, m_q, b_out, H * K, K)
    tl.store(p_lse + head.to(tl.int64) * tokens + rows, b_max + tl.log2(b_sum), mask=m_q)


@triton.jit(do_not_specialize=["stream", "tokens", "blocks"])
def backward_queries_kernel(
    p_qkv, p_cu_seqlens, p_seed, p_dout, p_out, p_lse, p_delta, p_dqkv, stream, tokens, blocks,
    H: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """dQ and δ of one block of queries, over all keys."""
    start, length, head, block = _locate(p_cu_seqlens, blocks, H)
    if block * BLOCK_Q >= length:
        return
    o_q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    rows, m_q = start + o_q, o_q < length
    p_q = p_qkv + head * K
    b_q = _load_rows(p_q, rows, m_q, 3 * H * K, K)
    b_dout = _load_rows(p_dout + head * K, rows, m_q, H * K, K)
    b_out = _load_rows(p_out + head * K, rows, m_q, H * K, K)
    o_row = head.to(tl.int64) * tokens + rows
    b_lse = tl.load(p_lse + o_row, mask=m_q, other=0.0)
    b_delta = tl.sum(b_dout.to(b_lse.dtype) * b_out.to(b_lse.dtype), 1)
    tl.store(p_delta + o_row, b_delta, mask=m_q)
    b_dq = tl.zeros((BLOCK_Q, K), b_lse.dtype)
    for key in range(0, length, BLOCK_J):
        o_j = key + tl.arange(0, BLOCK_J)
        b_k, b_v = _load_keys_values(p_q, start + o_j, o_j < length, H, K)
        b_s = dot(b_q, tl.trans(b_k)) * (SCALE * LOG2E) - b_lse[:, None]
        b_p = tl.exp2(tl.where((o_j < length)[None, :], b_s, float("-inf")))
        b_dp = dot(b_dout, tl.trans(b_v))
        if THRESHOLD > 0:
            b_dp = tl.where(keep_tile(p_seed, rows, key, stream, head, THRESHOLD, BLOCK_J), b_dp, 0.0)
        b_dq += dot((b_p * (b_dp * _keep_scale(THRESHOLD) - b_delta[:, None])).to(b_k.dtype), b_k)
    _store_rows(p_dqkv + head * K, rows, m_q, b_dq * SCALE, 3 * H * K, K)


@triton.jit(do_not_specialize=["stream", "tokens", "blocks"])
def backward_keys_kernel(
    p_qkv, p_cu_seqlens, p_seed, p_dout, p_lse, p_delta, p_dqkv, stream, tokens, blocks,
    H: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys, over all queries."""
    start, length, head, block = _locate(p_cu_seqlens, blocks, H)
    if block * BLOCK_J >= length:
        return
    o_j = block * BLOCK_J + tl.arange(0, BLOCK_J)
    m_j = o_j < length
    p_q = p_qkv + head * K
    b_k, b_v = _load_keys_values(p_q, start + o_j, m_j, H, K)
    b_dk = tl.zeros((BLOCK_J, K), p_lse.dtype.element_ty)
    b_dv = tl.zeros((BLOCK_J, K), p_lse.dtype.element_ty)
    for query in range(0, length, BLOCK_Q):
        o_q = query + tl.arange(0, BLOCK_Q)
        rows, m_q = start + o_q, o_q < length
        b_q = _load_rows(p_q, rows, m_q, 3 * H * K, K)
        b_dout = _load_rows(p_dout + head * K, rows, m_q, H * K, K)
        # Tiles are transposed, [keys, queries], so that both products below take them from registers.
        # Queries past the end have dO = 0 and δ = 0, so they add nothing.
        o_row = head.to(tl.int64) * tokens + rows
        b_lse = tl.load(p_lse + o_row, mask=m_q, other=0.0)
        b_p = tl.exp2(dot(b_k, tl.trans(b_q)) * (SCALE * LOG2E) - b_lse[None, :])
        b_kept, b_dp = b_p, dot(b_v, tl.trans(b_dout))
        if THRESHOLD > 0:
            b_keep = tl.trans(keep_tile(p_seed, rows, block * BLOCK_J, stream, head, THRESHOLD, BLOCK_J))
            b_kept, b_dp = tl.where(b_keep, b_p, 0.0), tl.where(b_keep, b_dp, 0.0)
        b_dv += dot(b_kept.to(b_dout.dtype), b_dout)
        b_delta = tl.load(p_delta + o_row, mask=m_q, other=0.0)
        b_dk += dot((b_p * (b_dp * _keep_scale(THRESHOLD) - b_delta[None, :])).to(b_q.dtype), b_q)
    p_dk = p_dqkv + (H + head) * K
    _store_rows(p_dk, start + o_j, m_j, b_dk * SCALE, 3 * H * K, K)
    _store_rows(p_dk + H * K, start + o_j, m_j, b_dv * _keep_scale(THRESHOLD), 3 * H * K, K)


# ---------------------------------------------------------------- dropout, for tests


@triton.jit(do_not_specialize=["stream", "tokens"])
def dropout_mask_kernel(
    p_seed, p_mask, stream, tokens, keys, THRESHOLD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr
):  # fmt: skip
    """Writes one head's decisions for a [BLOCK_Q, BLOCK_J] tile, as bytes, into [H, tokens, keys]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first, head = tl.program_id(1) * BLOCK_J, tl.program_id(2)
    o_j = first + tl.arange(0, BLOCK_J)
    b_keep = keep_tile(p_seed, rows, first, stream, head, THRESHOLD, BLOCK_J)
    p_tile = p_mask + (head * tokens + rows)[:, None] * keys + o_j[None, :]
    tl.store(p_tile, b_keep.to(tl.int8), mask=(rows < tokens)[:, None] & (o_j < keys)[None, :])
