"""Dropout + residual + LayerNorm by the loops of `c/layer_norm.c` (maths: see `layer_norm`).

Like the Triton kernels they store nothing for the backward pass: it computes the sum, its statistics and the
dropout decisions again.
"""

from __future__ import annotations

from typing import Any

import torch
from electra_kernels.layer_norm_autograd import register_autograd
from electra_kernels.native import DTYPES, c_int, call, dropout_arguments
from electra_kernels.operators import operator
from torch import Tensor

ROW_BLOCK = 64  # as in c/layer_norm.c
WIDEST = 8192  # rows are worked on in memory of the stack


def takes(x_TD: Tensor, residual_TD: Tensor) -> bool:
    """Whether the loops can work on these dtypes and sizes."""
    return x_TD.dtype in DTYPES and residual_TD.dtype in DTYPES and 0 < x_TD.shape[1] <= WIDEST


@operator("native_dropout_add_layer_norm")
def forward(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, dropout_p: float,
    seed: Tensor | None, stream: int,
) -> Tensor:  # fmt: skip
    """LayerNorm(residual + dropout(x)); see the contract in `layer_norm`."""
    x_TD, residual_TD = x_TD.contiguous(), residual_TD.contiguous()
    out_TD = torch.empty_like(x_TD)
    call(
        "layer_norm_forward", x_TD, residual_TD, weight_D.float().contiguous(), bias_D.float().contiguous(), seed,
        out_TD, *x_TD.shape, eps, *dropout_arguments(dropout_p, stream), *_flags(x_TD, residual_TD),
    )  # fmt: skip
    return out_TD


@forward.register_fake
def _(x_TD: Tensor, *_: Any) -> Tensor:
    return x_TD.new_empty(x_TD.shape)


@operator("native_dropout_add_layer_norm_backward")
def backward(
    dout_TD: Tensor, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, dropout_p: float,
    seed: Tensor | None, stream: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dresidual_TD, dx_TD, [dweight_D, dbias_D]); without dropout dx is dresidual, and stays empty here."""
    x_TD, residual_TD, dout_TD = x_TD.contiguous(), residual_TD.contiguous(), dout_TD.contiguous()
    rows, size = x_TD.shape
    dresidual_TD, dx_TD, _ = _backward_outputs(x_TD, residual_TD, dropout_p)
    partial = x_TD.new_empty(2, -(-rows // ROW_BLOCK), size, dtype=torch.float32)
    call(
        "layer_norm_backward", dout_TD, x_TD, residual_TD, weight_D.float().contiguous(), seed, dx_TD,
        dresidual_TD, partial[0], partial[1], rows, size, eps, *dropout_arguments(dropout_p, stream),
        *_flags(x_TD, residual_TD),
    )  # fmt: skip
    return dresidual_TD, dx_TD, partial.sum(1)


@backward.register_fake
def _(
    dout_TD: Tensor, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, dropout_p: float, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_outputs(x_TD, residual_TD, dropout_p)


def _backward_outputs(x_TD: Tensor, residual_TD: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    dx_TD = x_TD.new_empty(x_TD.shape if p > 0 else (0, x_TD.shape[1]))
    dparameters = x_TD.new_empty(2, x_TD.shape[1], dtype=torch.float32)
    return residual_TD.new_empty(residual_TD.shape), dx_TD, dparameters


def _flags(x_TD: Tensor, residual_TD: Tensor) -> tuple[Any, Any, Any]:
    """Which tensors are bf16, and how many threads run."""
    halves = (int(tensor.dtype == torch.bfloat16) for tensor in (x_TD, residual_TD))
    return *(c_int(half) for half in halves), c_int(torch.get_num_threads())  # type: ignore[return-value]


register_autograd(forward, backward)
