"""How this package registers operations with PyTorch, and which architecture's tiles a device uses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from electra_kernels.compile_case import tiles_of
from torch import Tensor

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""An operator's name -> its function. Called directly, the function shows the PyTorch operations that it runs."""


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, contiguous, for kernels that assume rows without gaps; None stays None."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


class Operator:
    """A function registered as `electra_kernels::name`, opaque to torch.compile; it must not write to its inputs.

    Calls that PyTorch has to see go through its dispatcher: under torch.compile, dispatch modes (fake tensors, for
    example) or functorch, and for tensor subclasses and tensors without values. All others call the function
    directly, under an autograd function with the same formula, because a custom operator in Python takes the host
    longer than a small kernel takes the GPU.

    The first argument is a tensor, and the function runs on its device. Triton launches on the *current* device,
    which on a machine with several GPUs may be a different one.
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
        """The function's results; differentiable if `register_autograd` was called."""
        if torch.compiler.is_compiling() or _must_be_seen(inputs):
            return self.custom(*inputs)
        if not torch.is_grad_enabled():
            return self.direct(*inputs)
        if self._with_gradient is None:  # a direct call would drop the gradient silently
            return self.custom(*inputs)
        return self._with_gradient.apply(*inputs)

    def register_fake(self, function: Callable[..., Any]) -> None:
        """Decorator: registers a function that returns empty tensors shaped like the results."""
        self.custom.register_fake(function)

    def register_autograd(self, differentiate: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Like `torch.library.register_autograd`."""
        self.custom.register_autograd(differentiate, setup_context=setup_context)

        def forward(ctx: Any, *inputs: Any) -> Any:  # for a setup_context torch binds arguments by name, slowly
            output = self.direct(*inputs)
            setup_context(ctx, inputs, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
        self._with_gradient = type(f"{self.direct.__name__}_with_gradient", (torch.autograd.Function,), members)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: makes a function an `Operator`."""
    return lambda function: Operator(name, function)


def _must_be_seen(inputs: tuple[Any, ...]) -> bool:
    """Whether a mode or transform is active, or a tensor has no values or is of a subclass."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active() or inputs[0].is_meta:
        return True
    return any(isinstance(value, Tensor) and type(value) not in PLAIN for value in inputs)


PLAIN = (Tensor, torch.nn.Parameter)


def statistics_dtype(values: Tensor) -> torch.dtype:
    """The dtype of sums and statistics of `values`: fp64 for fp64, else fp32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off on `tensor`'s device. (The meta device has no autocast.)"""
    device = tensor.device.type
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def architecture(device: torch.device) -> int:
    """The architecture whose tiles `device` uses: 80, 90 or 100; Triton's interpreter counts as 90."""
    if device.type != "cuda":
        return 90
    if torch.version.hip:  # AMD's numbers mean something else: (9, 4) is an MI300, with 64 KB per program
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return tiles_of(10 * major + minor)
