"""A random permutation of range(size) by formula, without a table, and the hash that it is made of."""

from __future__ import annotations

import numpy as np

_64_BITS = 0xFFFFFFFFFFFFFFFF
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def permute(index: int, size: int, seed: int) -> int:
    """The position of `index` in a pseudo-random permutation of range(size).

    A four-round Feistel network on the next even number of bits; values outside the range are sent through it
    again ("cycle walking"), which makes it a bijection of range(size) without a table.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(4):
            left, right = right, left ^ (mix(right, seed + round_number) & mask)
        index = left << half | right
        if index < size:
            return index


def mix(value: int, seed: int) -> int:
    """A 64-bit hash of two integers (the finaliser of splitmix64, Steele et al. 2014)."""
    value = (value * _GOLDEN + seed) & _64_BITS
    value = ((value ^ (value >> 30)) * _FIRST) & _64_BITS
    value = ((value ^ (value >> 27)) * _SECOND) & _64_BITS
    return value ^ (value >> 31)


def permute_all(indices: np.ndarray, size: int, seeds: np.ndarray) -> np.ndarray:
    """`permute` for each index (int64) with its seed (uint64); arrays of equal shape."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    values = indices.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_number in range(4):
            left, right = right, left ^ (mix_all(right, seeds[outside] + np.uint64(round_number)) & mask)
        values[outside] = left << half | right
        outside = values >= size
    return values.astype(np.int64)


def mix_all(values: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """`mix` for uint64 arrays; their products wrap around, as intended."""
    values = values * np.uint64(_GOLDEN) + seeds
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))
