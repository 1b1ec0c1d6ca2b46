# mypy: allow-untyped-defs, allow-incomplete-defs
"""The random numbers of `rng.py` inside Triton kernels: the same bits, whatever the tiles.

A kernel gets `seed` as the int64 tensor `[key, first_row]` of `rng.seed_tensor`. So its value is not compiled in,
and a replayed CUDA graph uses what the tensor holds at that time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from electra_kernels import rng

ROUNDS = tl.constexpr(rng.ROUNDS)
MULTIPLIER_A, MULTIPLIER_B = tl.constexpr(rng.MULTIPLIER_A), tl.constexpr(rng.MULTIPLIER_B)
WEYL_A, WEYL_B = tl.constexpr(rng.WEYL_A), tl.constexpr(rng.WEYL_B)


@triton.jit
def philox(p_seed, column, row, stream, plane):
    """`rng.philox`: four uint32 tensors of random bits for each (column, row, plane) of the broadcast shape.

    `tl.philox_impl` gives the same bits, but with two multiplications where one 64-bit product is enough.
    """
    key = tl.load(p_seed)
    first_row = tl.load(p_seed + 1)
    c0, c1 = tl.broadcast(column.to(tl.uint32), (row + first_row).to(tl.uint32))
    zero = tl.zeros_like(c0)
    c2, c3 = zero + stream.to(tl.uint32), zero + plane.to(tl.uint32)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        a, b = c0.to(tl.uint64) * MULTIPLIER_A, c2.to(tl.uint64) * MULTIPLIER_B
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        # These wrap: with TRITON_DEBUG=1 an ordinary sum would stop the kernel.
        k0 = tl.add(k0, WEYL_A, sanitize_overflow=False)
        k1 = tl.add(k1, WEYL_B, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def keep_tile(p_seed, rows, first_column, stream, plane, THRESHOLD: tl.constexpr, COLUMNS: tl.constexpr):
    """`rng.keep_mask`: dropout decisions [len(rows), COLUMNS] for the columns from `first_column` on.

    `first_column` and COLUMNS are multiples of 8, because eight neighbouring columns share one Philox call.
    """
    block = first_column // 8 + tl.arange(0, COLUMNS // 8)
    word0, word1, word2, word3 = philox(p_seed, block[None, :], rows[:, None], stream, plane)
    # A call's eight decisions share one word: those of word w are bits 12 + w (low half) and 28 + w (high half).
    first = _halves_kept(word0, THRESHOLD) >> 3 | _halves_kept(word1, THRESHOLD) >> 2
    second = _halves_kept(word2, THRESHOLD) >> 1 | _halves_kept(word3, THRESHOLD)
    # The bits are disjoint, so this sum only joins them. It keeps the compiler from repeating the draw in the
    # layout of the matrix product that the mask is applied to, where four threads would draw the same numbers.
    decisions = tl.sum(tl.permute(tl.join(first, second), (2, 0, 1)), 0)
    column = tl.arange(0, 8)
    bit = tl.full((8,), 1, tl.uint32) << (12 + column // 2 + column % 2 * 16).to(tl.uint32)
    return tl.reshape(decisions[:, :, None] & bit[None, None, :], (rows.shape[0], COLUMNS)) != 0


@triton.jit
def _halves_kept(word, THRESHOLD: tl.constexpr):
    """Bits 15 and 31 say whether the low and the high half of a word are >= THRESHOLD; all other bits are 0.

    Both halves are compared at once: bit 15 of (half with its top bit set) - (THRESHOLD without its top bit)
    compares the lower 15 bits, which matter only if the top bits are equal.
    """
    TOP: tl.constexpr = 0x80008000
    difference = (word | TOP) - (THRESHOLD & 0x7FFF) * 0x10001
    if THRESHOLD < 0x8000:  # its top bit is 0: a half with the top bit is larger, whatever follows
        return (word | difference) & TOP
    return word & difference & TOP  # its top bit is 1: a half without it is smaller
