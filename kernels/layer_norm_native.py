"""Dropout + residual + LayerNorm by the loops in `c/layer_norm.c` (maths: see `layer_norm`).

As with the Triton kernels, only the inputs are saved: the backward pass recomputes the sum, its statistics and the
dropout decisions.
"""

from __future__ import annotations

from typing import Any

import torch
from electra_kernels.layer_norm_autograd import empty_gradients, number_of_sums, register
from electra_kernels.native import DTYPES, c_int, call, dropout_arguments
from electra_kernels.operators import operator
from torch import Tensor

ROW_BLOCK = 64  # as in c/layer_norm.c
WIDEST = 8192  # features; rows are held on the stack


def takes(x_TD: Tensor, residual_TD: Tensor) -> bool:
    """Whether the loops support these dtypes and sizes."""
    return x_TD.dtype in DTYPES and residual_TD.dtype in DTYPES and 0 < x_TD.shape[1] <= WIDEST


@operator("native_dropout_add_layer_norm")
def forward(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor, x_bias_D: Tensor | None, eps: float,
    dropout_p: float, seed: Tensor | None, stream: int,
) -> Tensor:  # fmt: skip
    """LayerNorm(residual + dropout(x + x_bias)); see the contract in `layer_norm`."""
    x_TD, residual_TD = x_TD.contiguous(), residual_TD.contiguous()
    out_TD = torch.empty_like(x_TD)
    call(
        "layer_norm_forward", x_TD, residual_TD, _row(weight_D), _row(bias_D), _row(x_bias_D), seed,
        out_TD, *x_TD.shape, eps, *dropout_arguments(dropout_p, stream), *_flags(x_TD, residual_TD),
    )  # fmt: skip
    return out_TD


@operator("native_dropout_add_layer_norm_backward")
def backward(
    dout_TD: Tensor, dout_again_TD: Tensor | None, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor,
    x_bias_D: Tensor | None, eps: float, dropout_p: float, seed: Tensor | None, stream: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same results as `layer_norm_triton.backward`."""
    x_TD, residual_TD, dout_TD = x_TD.contiguous(), residual_TD.contiguous(), dout_TD.contiguous()
    dout_again_TD = None if dout_again_TD is None else dout_again_TD.contiguous()
    rows, size = x_TD.shape
    dresidual_TD, dx_TD = empty_gradients(x_TD, residual_TD, dropout_p)
    sums = number_of_sums(x_bias_D)
    partial = x_TD.new_empty(sums, -(-rows // ROW_BLOCK), size, dtype=torch.float32)
    call(
        "layer_norm_backward", dout_TD, dout_again_TD, x_TD, residual_TD, _row(weight_D), _row(x_bias_D), seed,
        dx_TD, dresidual_TD, partial[0], partial[1], partial[2] if sums == 3 else None, rows, size, eps,
        *dropout_arguments(dropout_p, stream), *_flags(x_TD, residual_TD),
    )  # fmt: skip
    return dresidual_TD, dx_TD, partial.sum(1)


def _row(parameter_D: Tensor | None) -> Tensor | None:
    return None if parameter_D is None else parameter_D.float().contiguous()


def _flags(x_TD: Tensor, residual_TD: Tensor) -> tuple[Any, Any, Any]:
    """Whether x and residual are bf16 (1 or 0 each), and the number of threads."""
    x_bf16, residual_bf16 = x_TD.dtype == torch.bfloat16, residual_TD.dtype == torch.bfloat16
    return c_int(x_bf16), c_int(residual_bf16), c_int(torch.get_num_threads())


register(forward, backward)
