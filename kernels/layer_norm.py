"""Dropout + residual + LayerNorm in one pass: the last step of every sub-layer of a post-norm Transformer.

    out = LayerNorm(residual + dropout(x + x_bias)) · weight + bias

`rng.keep_mask` (row: token, column: feature, plane 0) decides which values dropout keeps; those are multiplied by
`rng.keep_scale`. The backward pass recomputes the decisions from the counter instead of storing them. Statistics
are fp32; the result has x's dtype.

Two details serve the backward pass. `x_bias` is the bias of the linear layer that computed x. Its gradient is the
sum of dx over the tokens, which is formed as dx is computed; PyTorch would read dx again for it. And the next
sub-layer reads the result twice, as its input and as its residual: `…_twice` returns it for both readers and adds
their gradients as it reads them, where autograd would add them in a separate pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from electra_kernels import layer_norm_native as native
from electra_kernels import layer_norm_reference as reference
from electra_kernels.checks import FLOATS, check_dropout, check_eps, check_tensor
from electra_kernels.dispatch import use_native, use_triton
from electra_kernels.layer_norm_autograd import Twice
from electra_kernels.operators import Operator
from electra_kernels.rng import Seed
from torch import Tensor


def dropout_add_layer_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    eps: float,
    x_bias_D: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
    stream: int = 0,
) -> Tensor:
    """LayerNorm(residual + dropout(x + x_bias)); differentiable with respect to all five tensors.

    Args:
        x_TD, residual_TD: fp32, bf16, fp16 or fp64, of the same shape; dtypes may differ (x in bf16 and residual
            in fp32, for example). The sum is formed in fp32; the result has x's dtype.
        weight_D, bias_D: any float dtype.
        eps: added to the variance; finite, not negative.
        x_bias_D: added to x before dropout, in any float dtype.
        dropout_p: in [0, 1); probability that a value of x is dropped.
        seed: int or int64 tensor `[key]` or `[key, first_row]` (see `rng`); required iff dropout_p > 0.
            `first_row` is the row number of the batch's first token.
        stream: distinguishes uses of one `seed`; a static int.

    Raises:
        ValueError: wrong shape, dtype, device or range; dropout without a seed.
    """
    arguments = _checked(x_TD, residual_TD, weight_D, bias_D, x_bias_D, eps, dropout_p, seed, stream)
    return _once(_operators(x_TD, residual_TD, dropout_p), arguments)


def dropout_add_layer_norm_twice(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    eps: float,
    x_bias_D: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """`dropout_add_layer_norm` for two readers: its result twice, sharing memory, so write to neither.

    Arguments and errors are those of `dropout_add_layer_norm`.
    """
    arguments = _checked(x_TD, residual_TD, weight_D, bias_D, x_bias_D, eps, dropout_p, seed, stream)
    operators = _operators(x_TD, residual_TD, dropout_p)
    if operators is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        out_TD = _once(operators, arguments)
        return out_TD, out_TD
    return Twice.apply(*operators, *arguments)


class _Operators(NamedTuple):
    forward: Operator
    backward: Operator


def _operators(x_TD: Tensor, residual_TD: Tensor, dropout_p: float) -> _Operators | None:
    """The operators of the fast implementation that runs here, or None for the twin."""
    if use_triton(x_TD):
        from electra_kernels import layer_norm_triton

        return _Operators(layer_norm_triton.forward, layer_norm_triton.backward)
    if use_native(x_TD, training=dropout_p > 0, supported=native.takes(x_TD, residual_TD)):
        return _Operators(native.forward, native.backward)
    return None


def _once(operators: _Operators | None, arguments: tuple[Any, ...]) -> Tensor:
    return (operators.forward if operators else reference.dropout_add_layer_norm)(*arguments)


def _checked(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor, x_bias_D: Tensor | None, eps: float,
    dropout_p: float, seed: Seed | None, stream: int,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments that every implementation takes, checked."""
    check_tensor("x_TD", x_TD, (None, None), FLOATS)
    device, (tokens, size) = x_TD.device, x_TD.shape
    check_tensor("residual_TD", residual_TD, (tokens, size), FLOATS, device)
    check_tensor("weight_D", weight_D, (size,), FLOATS, device)
    check_tensor("bias_D", bias_D, (size,), FLOATS, device)
    if x_bias_D is not None:
        check_tensor("x_bias_D", x_bias_D, (size,), FLOATS, device)
    eps = check_eps(eps)
    key = check_dropout(dropout_p, seed, x_TD)
    return x_TD, residual_TD, weight_D, bias_D, x_bias_D, eps, dropout_p, key, stream
