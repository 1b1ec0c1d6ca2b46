"""Counter-based random numbers, shared by every kernel and every twin.

A random number here is a pure function of five integers,

    bits = Philox4x32-7( key = seed (64 bits),  counter = (column, row, stream, plane) )

so a backward pass recomputes the forward's dropout instead of storing it, a resumed run draws what the
uninterrupted one would have drawn, and the tile sizes of a kernel cannot change what it draws.

- `seed`: 64 bits. A training loop derives it from its own seed and the step: `fold(seed_of_training, step)`.
- `stream`: which use of randomness this is (layer 3's attention dropout, the generator's draw, ...).
- `row`, `column`, `plane`: which number: token and block of features, or token, block of keys and head, ...

One call yields four 32-bit words. Philox4x32 needs at least seven rounds to pass BigCrush (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011, table 2). The usual ten are a safety margin that costs 43%
more work, and dropout takes this path for every attention probability.

**Seeds as tensors.** Kernels accept `seed` as an int or as an int64 tensor of 1 or 2 elements: `[key]` or
`[key, first_row]`. With a tensor, a replayed CUDA graph draws fresh numbers. `first_row` is the row number of the
batch's first row, so that a batch that is split over ranks or accumulation steps draws exactly what the whole
batch would have drawn.

The arithmetic is in int64. A 32 x 32 -> 64 bit product would overflow there, which a compiler may take for
impossible (GCC does, in what torch.compile generates for a CPU); `philox` multiplies with the multiplier less 2^32
instead.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

ROUNDS = 7
# Multipliers and key increments ("Weyl constants") of Philox4x32, from the paper.
MULTIPLIER_A, MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85
MASK32 = 0xFFFFFFFF
FOLD = 0x464F4C44  # "FOLD" in ASCII: the stream that `fold` draws from

Seed = int | Tensor


def fold(seed: int, *parts: int) -> int:
    """A new 63-bit seed, derived from `seed` and integers (step, epoch, document, ...) in this order.

    It computes on Python integers: use it on the host, once per step. Different parts give unrelated seeds.

    Raises:
        TypeError: an argument that is not an integer.
    """
    seed = operator.index(seed)  # NumPy's integers would overflow in the rounds
    for part in map(operator.index, parts):
        words = _philox_int((part & MASK32, (part >> 32) & MASK32, FOLD, 0), seed)
        seed = (words[0] | words[1] << 32) >> 1
    return seed


def _philox_int(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """Philox4x32-7 on Python integers: the same rounds as `philox`, for a single counter on the host."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & MASK32, (key >> 32) & MASK32
    for _ in range(ROUNDS):
        a, b = c0 * MULTIPLIER_A, c2 * MULTIPLIER_B
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & MASK32, (a >> 32) ^ c3 ^ k1, a & MASK32
        k0, k1 = (k0 + WEYL_A) & MASK32, (k1 + WEYL_B) & MASK32
    return c0, c1, c2, c3


def seed_tensor(seed: Seed, device: torch.device | str | None = None) -> Tensor:
    """`seed` as the int64 tensor `[key, first_row]` that kernels read.

    Args:
        seed: int, or int64 tensor of 1 or 2 elements.
        device: device of the result; None leaves a tensor where it is and puts an int on the CPU.

    Raises:
        ValueError: neither an integer nor a tensor; a tensor that is not int64, does not have 1 or 2 elements or
            is on another device.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() not in (1, 2):
            raise ValueError(
                f"seed: expected an int or an int64 tensor of 1 or 2 elements, "
                f"got {seed.dtype} of shape {tuple(seed.shape)}"
            )
        if device is not None and not _is_on(seed, torch.device(device)):
            raise ValueError(f"seed: expected an int or a tensor on {device}, got one on {seed.device}")
        seed = seed.reshape(-1).contiguous()  # kernels read two adjacent numbers
        return torch.nn.functional.pad(seed, (0, 1)) if seed.numel() == 1 else seed
    if not (isinstance(seed, int) or hasattr(seed, "__index__")):
        raise ValueError(f"seed: expected an int or an int64 tensor, got {type(seed).__name__}")
    signed = int(seed)
    if not -(1 << 63) <= signed < 1 << 63:  # only if needed: torch.compile cannot hold 64 ones in an int64
        signed = ((signed & 0xFFFFFFFFFFFFFFFF) ^ (1 << 63)) - (1 << 63)  # the same 64 bits, as int64
    # `full` passes the number as a launch argument: no copy from the host, so a CUDA graph can capture it.
    return torch.nn.functional.pad(torch.full((1,), signed, dtype=torch.int64, device=device), (0, 1))


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    """Whether `tensor` is on `device`; `cuda` without a number means any GPU."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def philox(
    seed: Tensor, column: Tensor, row: Tensor, stream: int, plane: Tensor | int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits for each (column, row, plane) of the broadcast shape.

    Args:
        seed: int64 `[key, first_row]` (see `seed_tensor`); `first_row` is added to `row`.
        column, row, plane: integer tensors that broadcast together, each value in [0, 2^32).
        stream: in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2^32).
    """
    key, first_row = seed[0], seed[1]
    c0, c1 = column.to(torch.int64), (row.to(torch.int64) + first_row) & MASK32
    c2: Tensor = torch.full((), stream & MASK32, dtype=torch.int64, device=c0.device)
    # `full` passes the number as a launch argument; `as_tensor` would copy it from the host.
    c3 = plane.long() if isinstance(plane, Tensor) else torch.full((), plane, dtype=torch.int64, device=c0.device)
    k0, k1 = key & MASK32, (key >> 32) & MASK32
    # The rounds themselves broadcast the counter: the first two still work on rows and columns separately.
    for _ in range(ROUNDS):
        a, b = c0 * (MULTIPLIER_A - 2**32), c2 * (MULTIPLIER_B - 2**32)
        c0, c2 = _mix(b, c2, c1, k0), _mix(a, c0, c3, k1)
        c1, c3 = b, a  # their low halves count; the next `_mix` cuts the high ones off
        k0, k1 = (k0 + WEYL_A) & MASK32, (k1 + WEYL_B) & MASK32
    return c0, c1 & MASK32, c2, c3 & MASK32


def _mix(product: Tensor, factor: Tensor, low: Tensor, key: Tensor) -> Tensor:
    """(high half of `product` + 2^32 `factor`) ^ `low` ^ `key`, in 32 bits."""
    return ((product >> 32).add_(factor) ^ low).bitwise_xor_(key).bitwise_and_(MASK32)


def uniform(bits: Tensor) -> Tensor:
    """32 random bits -> float64 strictly inside (0, 1), so that logarithms are finite."""
    return (bits.to(torch.float64) + 0.5) * 2.0**-32


def dropout_threshold(dropout_p: float) -> int:
    """The threshold for 16-bit random numbers r: a value is kept iff r >= threshold.

    p is met to within 2^-17, but at most 1 - 2^-16 is dropped, so that something is kept.
    """
    return min(round(dropout_p * 65536), 65535)


def keep_scale(dropout_p: float) -> float:
    """1 / (probability that a value is kept), for p as 16 bits represent it."""
    return 65536.0 / (65536 - dropout_threshold(dropout_p))


def keep_mask(seed: Tensor, rows: Tensor, columns: int, dropout_p: float, stream: int, plane: int = 0) -> Tensor:
    """Dropout decisions, bool [len(rows), columns], True where a value is kept; the kernels' specification.

    Eight neighbouring columns share one Philox call: column c is decided by the 16-bit half `c % 2` (low half
    first) of word `(c // 2) % 4` of the call with counter column `c // 8`. `attention_triton.dropout_mask` has
    the same decisions from a kernel.
    """
    blocks = torch.arange((columns + 7) // 8, device=rows.device)
    words = philox(seed, blocks[None, :], rows[:, None], stream, plane)
    # int32 keeps the 32 bits, and on every machine that torch runs on, the low half comes first.
    halves = torch.stack([word.to(torch.int32) for word in words], dim=-1).view(torch.int16)
    # int16 reads a half r as r or r - 65536; flipping the top bit gives r - 32768, which keeps the order.
    signed = halves.flatten(1)[:, :columns] ^ -32768
    return signed >= dropout_threshold(dropout_p) - 32768
