"""A second device with values, on a CPU: what a tensor on a GPU may be mixed with, and what it may not.

Tensors on the `meta` device have no values. These say that they are on `meta` and have some, in a CPU tensor
inside. So code that reads values on the host (the twins of the kernels do) runs as it would on a GPU, and an
operation between one of them and a tensor that was left on the host raises, as it does there.

with elsewhere():
    model(batch.to("meta"))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
MAY_MIX = {torch.ops.aten.copy_.default, torch.ops.aten.index.Tensor}
"""Operations that take tensors of two devices: copies, and indices from the host."""


class Elsewhere(Tensor):
    """A tensor on the second device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inner!r})"

    def tolist(self) -> Any:
        """PyTorch's own refuses subclasses."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Makes what is asked for on `DEVICE` from nothing, or from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in given)
    if there and func not in MAY_MIX:
        left = [tensor for tensor in given if not isinstance(tensor, Elsewhere) and tensor.dim()]
        if left:
            raise RuntimeError(f"{func}: tensors on two devices, one on the host of shape {tuple(left[0].shape)}")
    wanted = kwargs.get("device")
    if wanted is not None:
        there = torch.device(wanted) == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    bare = tree_map_only(Elsewhere, lambda tensor: tensor.inner, (args, kwargs))
    result = func(*bare[0], **bare[1])
    if not there:
        return result
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, Elsewhere, result))


@contextmanager
def elsewhere() -> Iterator[None]:
    """Inside, what is put on `DEVICE` has values."""
    with _Mode(), mock.patch.object(torch, "tensor", _tensor):
        yield


def _tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """`torch.tensor`, which copies to a device where no mode sees it."""
    made = _on_host(data, **options, device=None if _is_there(device) else device)
    return made.detach().to(DEVICE).requires_grad_(made.requires_grad) if _is_there(device) else made


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device) == DEVICE


_on_host = torch.tensor
