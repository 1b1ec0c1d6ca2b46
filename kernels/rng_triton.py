# mypy: allow-untyped-defs, allow-incomplete-defs
"""The random numbers of `rng.py` inside Triton kernels: the same bits, whatever the tiles.

`seed` reaches a kernel as the int64 tensor `[key, first_row]` of `rng.seed_tensor`, so nothing of it is
compiled in and a replayed CUDA graph draws from what the tensor holds by then.
"""

from __future__ import annotations

import triton
import triton.language as tl
from electra_kernels import rng

ROUNDS = tl.constexpr(rng.ROUNDS)


@triton.jit
def philox(p_seed, row, column, stream, plane):
    """Four uint32 tensors of random bits for every broadcast (row, column, plane); `rng.philox`."""
    key = tl.load(p_seed)
    first_row = tl.load(p_seed + 1)
    c0, c1 = tl.broadcast(column.to(tl.uint32), (row + first_row).to(tl.uint32))
    zero = tl.zeros_like(c0)
    c2 = zero + stream.to(tl.uint32)
    c3 = zero + plane.to(tl.uint32)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    return tl.philox_impl(c0, c1, c2, c3, k0, k1, ROUNDS)


@triton.jit
def uniform(bits):
    """uint32 bits -> float32 strictly inside (0, 1): the upper 23 bits and a half. Not `rng.uniform`'s float64."""
    return ((bits >> 9).to(tl.float32) + 0.5) * (2.0**-23)


@triton.jit
def keep_tile(p_seed, rows, first_column, stream, plane, THRESHOLD: tl.constexpr, COLUMNS: tl.constexpr):
    """Dropout decisions [len(rows), COLUMNS] for columns first_column + 0 ..; `rng.keep_mask`.

    `first_column` and COLUMNS are multiples of 8: eight neighbours share one call.
    """
    block = first_column // 8 + tl.arange(0, COLUMNS // 8)
    word0, word1, word2, word3 = philox(p_seed, rows[:, None], block[None, :], stream, plane)
    # The new axes are, in this order, the two bits of the word's number; the last one is the half.
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    keep = tl.join((words & 0xFFFF) >= THRESHOLD, (words >> 16) >= THRESHOLD)
    return tl.reshape(keep, (rows.shape[0], COLUMNS))
