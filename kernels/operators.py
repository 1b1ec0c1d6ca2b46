"""How this package registers an operation with PyTorch, and which table of tiles a device takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from electra_kernels.compile_case import tiles_of
from torch import Tensor
from torch.library import CustomOpDef

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""What runs under an operator's name; called directly, PyTorch's own operations in it are seen from outside."""


def operator(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Registers a function as `electra_kernels::name`: opaque to torch.compile, and it writes to no input.

    It runs on the device of its first argument, a tensor. Triton launches on the *current* device, which on a
    machine with several GPUs need not be the tensors'.
    """

    def register(function: Callable[..., Any]) -> CustomOpDef:
        @functools.wraps(function)
        def on_the_device_of_its_tensors(first: Tensor, *rest: Any) -> Any:
            with torch.cuda.device_of(first):
                return function(first, *rest)

        IMPLEMENTATIONS[name] = function
        return torch.library.custom_op(f"electra_kernels::{name}", on_the_device_of_its_tensors, mutates_args=())

    return register


def statistics_dtype(values: Tensor) -> torch.dtype:
    """What sums and statistics of such values are kept in: fp32, or fp64 for fp64."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def architecture(device: torch.device) -> int:
    """Which architecture's tiles `device` takes: 80, 90 or 100; Triton's interpreter counts as 90."""
    if device.type != "cuda":
        return 90
    if torch.version.hip:  # whose numbers mean something else: (9, 4) is an MI300, with 64 KB a program
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return tiles_of(10 * major + minor)
