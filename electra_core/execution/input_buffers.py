"""The inputs of a step in fixed shapes: two flat buffers, integers and floats, so that two copies bring all of
them (batch, seed, learning rate) to the device. `static_batch.py` and `finetuning/static_task.py` define their
contents.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from typing_extensions import Self  # in `typing` from Python 3.11


class InputBuffers:
    """The inputs of a step of one shape, as views of two flat buffers, one of integers and one of floats.

    Args:
        shape: its key; one graph is captured for each.
        sizes: number of integers and floats in each part of the batch.
        device: where the buffers are.
        pinned: use pinned host memory, from which copies to a GPU do not block the host.

    Attributes:
        parts: the arguments of the step's loss function, one call for each; their tensors are views.
        seed, rate: the step's, int64 [1] and float scalar.
    """

    parts: Sequence[Any]

    def __init__(
        self, shape: Hashable, sizes: Sequence[tuple[int, int]], device: torch.device | str, pinned: bool
    ):
        integers, floats = (list(counts) for counts in zip(*sizes))
        self.shape: Any = shape
        self.integers = torch.empty(sum(integers) + 1, dtype=torch.int64, device=device, pin_memory=pinned)
        self.floats = torch.empty(sum(floats) + 1, dtype=torch.float32, device=device, pin_memory=pinned)
        self.seed, self.rate = self.integers[-1:], self.floats[-1]
        self.pieces = list(zip(self.integers[:-1].split(integers), self.floats[:-1].split(floats)))

    def on(self, device: torch.device) -> Self:
        """Uninitialised buffers for the same step on another device."""
        raise NotImplementedError

    def copy_(self, other: Self) -> None:
        """Copies the values of `other`; from pinned memory without waiting for the copy."""
        self.integers.copy_(other.integers, non_blocking=True)
        self.floats.copy_(other.floats, non_blocking=True)
