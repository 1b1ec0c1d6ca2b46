"""How this package registers an operation with PyTorch, and which table of tiles a device takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from electra_kernels.compile_case import tiles_of
from torch import Tensor

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""What runs under an operator's name; called directly, PyTorch's own operations in it are seen from outside."""


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """As a kernel that strides over whole rows takes them; what is left out stays so."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


class Operator:
    """A function as `electra_kernels::name`: opaque to torch.compile, and it writes to no input.

    Where PyTorch has to see a call, it goes through its dispatcher: while something traces or watches
    (torch.compile, dispatch modes such as fake tensors', functorch), for tensors of another class and those
    without values. Elsewhere the function is called as it is, under an autograd function with the same
    formula, because a custom operator in Python takes the host longer than a small kernel takes the GPU.

    It runs on the device of its first argument, a tensor. Triton launches on the *current* device, which on a
    machine with several GPUs need not be the tensors'.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        @functools.wraps(function)
        def on_the_device_of_its_tensors(first: Tensor, *rest: Any) -> Any:
            if not first.is_cuda or first.device.index == torch.cuda.current_device():
                return function(first, *rest)
            with torch.cuda.device_of(first):
                return function(first, *rest)

        IMPLEMENTATIONS[name] = function
        self.direct = on_the_device_of_its_tensors
        self.custom = torch.library.custom_op(f"electra_kernels::{name}", self.direct, mutates_args=())
        self._with_gradient: type[torch.autograd.Function] | None = None

    def __call__(self, *inputs: Any) -> Any:
        """The function's results; differentiable, where a formula was registered."""
        if torch.compiler.is_compiling() or _must_be_seen(inputs):
            return self.custom(*inputs)
        if not torch.is_grad_enabled():
            return self.direct(*inputs)
        if self._with_gradient is None:  # which would not say that it has none
            return self.custom(*inputs)
        return self._with_gradient.apply(*inputs)  # type: ignore[no-untyped-call]

    def register_fake(self, function: Callable[..., Any]) -> None:
        """As a decorator: what its results look like."""
        self.custom.register_fake(function)

    def register_autograd(self, differentiate: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """As `torch.library.register_autograd`."""
        self.custom.register_autograd(differentiate, setup_context=setup_context)

        def forward(ctx: Any, *inputs: Any) -> Any:  # torch binds arguments by name, slowly, for a setup_context
            output = self.direct(*inputs)
            setup_context(ctx, inputs, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
        self._with_gradient = type(f"{self.direct.__name__}_with_gradient", (torch.autograd.Function,), members)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """As a decorator: makes a function an `Operator`."""
    return lambda function: Operator(name, function)


def _must_be_seen(inputs: tuple[Any, ...]) -> bool:
    """Whether something watches operations, or a tensor has no values, or operations of its own."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active() or inputs[0].is_meta:
        return True
    return any(isinstance(value, Tensor) and type(value) not in PLAIN for value in inputs)


PLAIN = (Tensor, torch.nn.Parameter)


def statistics_dtype(values: Tensor) -> torch.dtype:
    """What sums and statistics of such values are kept in: fp32, or fp64 for fp64."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Inside, operations on `tensor`'s device take the dtypes they are given. The meta device has no autocast."""
    device = tensor.device.type
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def architecture(device: torch.device) -> int:
    """Which architecture's tiles `device` takes: 80, 90 or 100; Triton's interpreter counts as 90."""
    if device.type != "cuda":
        return 90
    if torch.version.hip:  # whose numbers mean something else: (9, 4) is an MI300, with 64 KB a program
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return tiles_of(10 * major + minor)
