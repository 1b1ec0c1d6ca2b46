"""Calls of attention and LayerNorm with dropout, as the tests of the loops in C make them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from electra_kernels import attention, dropout_add_layer_norm_twice, use
from electra_kernels.dispatch import Implementation
from torch import Tensor

SEED = torch.tensor([0x123456789ABCDEF, 2**32 - 7])  # rows wrap around 32 bits
STREAM = 11


def leaves(*shapes: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def run_attention(
    path: Implementation, qkv: Tensor, dout: Tensor, lengths: Sequence[int], dropout_p: float
) -> tuple[Tensor, Tensor]:
    """(out, gradient of qkv)"""
    qkv = qkv.clone().requires_grad_()
    with use(path):
        longest = max(lengths)
        out = attention(qkv, offsets(lengths), longest, dropout_p=dropout_p, seed=SEED, stream=STREAM)
        return out.detach(), *torch.autograd.grad(out, qkv, dout.to(out.dtype))


def run_layer_norm(path: Implementation, tensors: Sequence[Tensor], dropout_p: float) -> list[Tensor]:
    """The result, read twice, and the gradients of x, residual, weight, bias and x's bias."""
    *inputs, dout = (tensor.clone() for tensor in tensors)
    inputs = [tensor.requires_grad_() for tensor in (*inputs, inputs[-1].flip(0))]
    *leaves, x_bias = inputs
    with use(path):
        outs = dropout_add_layer_norm_twice(
            *leaves, eps=1e-6, x_bias_D=x_bias, dropout_p=dropout_p, seed=SEED, stream=STREAM
        )
        douts = [d.to(outs[0].dtype) for d in (dout, dout.flip(0))]
        return [outs[0].detach(), *torch.autograd.grad(outs, inputs, douts)]
