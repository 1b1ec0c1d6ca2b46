"""The random numbers of `electra_kernels.rng` for many counters at once, on the host, in NumPy.

`rng.philox` makes new tensors at every operation, which for a batch of examples costs more than all the rest of
its preparation. Here all rounds run in place, on blocks that stay in the processor's cache; a test compares the
two bit by bit.
"""

from __future__ import annotations

import numpy as np
from electra_kernels.rng import MASK32, MULTIPLIER_A, MULTIPLIER_B, ROUNDS, WEYL_A, WEYL_B

BLOCK = 8192
"""Counters computed at once: six arrays of 64 KB."""
_LOW, _HALF = np.uint64(MASK32), np.uint64(32)


def philox_words(key: int, columns: int, rows: np.ndarray) -> np.ndarray:
    """Four words of 32 random bits for every row and column.

    Args:
        key: 64 bits, as `rng.fold` gives them.
        columns: C; counters have the columns 0 to C - 1.
        rows: int64 [N]; the low half is the counter's row, the high half its plane. The stream is 0.

    Returns:
        uint64 [4, N, C], values below 2^32, as `rng.philox` returns.
    """
    words = np.empty((4, len(rows), columns), dtype=np.uint64)
    step = max(1, BLOCK // max(1, columns))
    for first in range(0, len(rows), step):
        _rounds(key, rows[first : first + step].astype(np.uint64), words[:, first : first + step])
    return words


def _rounds(key: int, rows: np.ndarray, words: np.ndarray) -> None:
    """Computes Philox4x32 for a block into `words` [4, n, C]."""
    c0, c1, c2, c3 = (np.empty(words.shape[1:], dtype=np.uint64) for _ in range(4))
    c0[...], c1[...] = np.arange(words.shape[2]), rows[:, None] & _LOW
    c2[...], c3[...] = 0, rows[:, None] >> _HALF
    a, b = np.empty_like(c0), np.empty_like(c0)
    k0, k1 = key & MASK32, (key >> 32) & MASK32
    for _ in range(ROUNDS):
        np.multiply(c0, np.uint64(MULTIPLIER_A), out=a)
        np.multiply(c2, np.uint64(MULTIPLIER_B), out=b)
        _mix(b, c1, k0, out=c0)
        _mix(a, c3, k1, out=c2)
        # The products' low halves are the next c1 and c3; their high ones are cut off by the next `_mix`.
        c1, c3, a, b = b, a, c3, c1
        k0, k1 = (k0 + WEYL_A) & MASK32, (k1 + WEYL_B) & MASK32
    words[0], words[2] = c0, c2
    np.bitwise_and(c1, _LOW, out=words[1])
    np.bitwise_and(c3, _LOW, out=words[3])


def _mix(product: np.ndarray, low: np.ndarray, key: int, out: np.ndarray) -> None:
    """high half of `product` ^ `low` ^ `key`, in 32 bits."""
    np.right_shift(product, _HALF, out=out)
    np.bitwise_xor(out, low, out=out)
    np.bitwise_xor(out, np.uint64(key), out=out)
    np.bitwise_and(out, _LOW, out=out)
