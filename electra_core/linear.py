"""Linear layers whose products are done in the precision the processor multiplies fastest.

Under bf16 autocast PyTorch multiplies in bf16. Processors with AVX-512 but without AMX tiles do that at half the
speed of fp32 (docs/decisions.md). There `Linear` keeps what bf16 saves, the memory of activations, and multiplies
in fp32:

    y = bf16(x W^T + b),  dx = bf16(dy W),  dW = dy^T x,  db = sum over rows of dy        x, y, dx, dy in bf16

Each operand is the number that a bf16 product would take, save for W, which is not rounded; so the result is no
farther from the exact one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """`nn.Linear`, same parameters and names; see the file's header for what differs, and where."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        if multiplies_in_fp32(input):
            return _Fp32Products.apply(input, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]
        return super().forward(input)


def multiplies_in_fp32(tensor: Tensor) -> bool:
    """Whether bf16 is asked for on a CPU that is slow at it; not while torch.compile traces."""
    return (
        tensor.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.compiler.is_compiling()
        and not has_bf16_tiles()
    )


@functools.cache
def has_bf16_tiles() -> bool:
    """Whether the processor has a matrix unit for bf16 (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


class _Fp32Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), weight, bias).to(torch.bfloat16)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dy_TO, x_TI = dy.flatten(0, -2).float(), x.flatten(0, -2).float()
        with torch.autocast("cpu", enabled=False):
            dx = (dy_TO @ weight).to(torch.bfloat16).view(x.shape)
            return dx, dy_TO.T @ x_TI, dy_TO.sum(0)
