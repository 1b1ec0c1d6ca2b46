"""Argument checks of the public functions: every error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from electra_kernels.dispatch import checks_values
from electra_kernels.rng import Seed, seed_tensor
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Raise ValueError unless `tensor` has this shape (None: any size), one of these dtypes and this device."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape)
    )
    if not fits:
        wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise ValueError(f"{name}: expected shape {wanted}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")


def check_dropout(dropout_p: float, seed: Seed | None, like: Tensor) -> Tensor | None:
    """The seed as a tensor on `like`'s device, or None where nothing is dropped.

    Raises:
        ValueError: a probability outside [0, 1) (NaN too); dropout without a seed, or with a wrong one.
    """
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {dropout_p}")
    if dropout_p == 0.0:
        return None
    if seed is None:
        raise ValueError("seed: expected an int or an int64 tensor because dropout_p > 0, got None")
    return seed_tensor(seed, like.device)


def check_eps(eps: float) -> float:
    """`eps` as a float, which the loops in C tell from an int; ValueError unless 0 <= eps < inf (NaN fails).

    0 becomes the least that fp32 tells from it safely: a kernel's tile has rows outside the batch, whose variance
    is 0, and 0 / sqrt(0) would make the sums over rows NaN.
    """
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps: expected a finite number, not negative, got {eps}")
    return max(float(eps), 1e-37)


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless 0 < temperature < inf (NaN fails too)."""
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")


def check_ids(name: str, ids: Tensor, upper: int, *, unique: bool = False) -> None:
    """Raise ValueError unless all ids lie in [0, upper) (and differ, if `unique`).

    Reads values, so on a GPU it runs only with ELECTRA_KERNELS_DEBUG=1: see `dispatch.checks_values`.
    """
    if not checks_values(ids) or ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= upper:
        raise ValueError(f"{name}: expected values in [0, {upper}), got {low if low < 0 else high}")
    if unique and len(torch.unique(ids)) != len(ids):
        raise ValueError(f"{name}: expected distinct values, got a repeated one")


def check_weights(name: str, weights: Tensor) -> None:
    """Raise ValueError if a weight is negative; NaN passes and shows in the result. Reads values: `check_ids`."""
    if not checks_values(weights) or weights.numel() == 0:
        return
    if (least := float(weights.min())) < 0.0:
        raise ValueError(f"{name}: expected no negative weight, got {least}")
