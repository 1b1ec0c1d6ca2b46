"""Autograd and shapes for dropout + residual + LayerNorm, shared by the Triton and the native operators.

    forward(x, residual, weight, bias, x_bias, eps, dropout_p, seed, stream) -> out
    backward(dout, dout_again, x, residual, weight, x_bias, eps, dropout_p, seed, stream)
        -> dresidual, dx, [dweight, dbias, dx_bias]

Only the inputs are saved: backward recomputes everything else from them. The parameters' gradients are rows of one
tensor, because a single reduction then adds all partial sums, and because an operator's results must not share
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from electra_kernels.operators import Operator, statistics_dtype
from electra_kernels.rng import dropout_threshold
from torch import Tensor
from torch.autograd.function import once_differentiable

Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]
Gradients = tuple[Tensor | None, ...]


def register(forward: Operator, backward: Operator) -> None:
    """Makes `backward` the derivative of `forward`, and registers what both return."""

    @forward.register_fake
    def _(x_TD: Tensor, *_: Any) -> Tensor:
        return x_TD.new_empty(x_TD.shape)

    @backward.register_fake
    def _(
        dout_TD: Tensor, dout_again_TD: Tensor | None, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor,
        x_bias_D: Tensor | None, eps: float, dropout_p: float, *_: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        sums = x_TD.new_empty(number_of_sums(x_bias_D), x_TD.shape[1], dtype=statistics_dtype(x_TD))
        return *empty_gradients(x_TD, residual_TD, dropout_p), sums

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, *inputs)

    def differentiate(ctx: Any, dout_TD: Tensor) -> Gradients:
        return _differentiate(ctx, backward, dout_TD, None)

    forward.register_autograd(differentiate, setup_context=save)


class Twice(torch.autograd.Function):
    """The result of `forward` for two readers, whose gradients `backward` adds as it reads them."""

    @staticmethod
    def forward(ctx: Any, forward: Operator, backward: Backward, *inputs: Any) -> tuple[Tensor, Tensor]:
        """The result twice, sharing memory."""
        _save(ctx, *inputs)
        ctx.backward_operator = backward
        ctx.set_materialize_grads(False)
        out_TD = forward(*inputs)
        return out_TD, out_TD.view_as(out_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor | None, dout_again_TD: Tensor | None) -> Gradients:
        """None for the two operators; the gradients for the tensors."""
        if dout_TD is None:
            dout_TD, dout_again_TD = dout_again_TD, None
        if dout_TD is None:
            return (None,) * (2 + NUMBER_OF_INPUTS)
        return None, None, *_differentiate(ctx, ctx.backward_operator, dout_TD, dout_again_TD)


NUMBER_OF_INPUTS = 9
"""Number of arguments of the forward operators."""


def _save(
    ctx: Any, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor, x_bias_D: Tensor | None,
    eps: float, dropout_p: float, seed: Tensor | None, stream: int,
) -> None:  # fmt: skip
    ctx.eps, ctx.dropout_p, ctx.stream, ctx.bias_dtype = eps, dropout_p, stream, bias_D.dtype
    ctx.save_for_backward(x_TD, residual_TD, weight_D, x_bias_D, seed)


def _differentiate(ctx: Any, backward: Backward, dout_TD: Tensor, dout_again_TD: Tensor | None) -> Gradients:
    x_TD, residual_TD, weight_D, x_bias_D, seed = ctx.saved_tensors
    tensors = dout_TD, dout_again_TD, x_TD, residual_TD, weight_D, x_bias_D
    dresidual_TD, dx_TD, sums = backward(*tensors, ctx.eps, ctx.dropout_p, seed, ctx.stream)
    dx_TD = dx_TD if dropout_threshold(ctx.dropout_p) else dresidual_TD.to(x_TD.dtype)
    dweight_D, dbias_D, *rest = sums.unbind()
    dx_bias_D = None if x_bias_D is None else rest[0].to(x_bias_D.dtype)
    parameters = dweight_D.to(weight_D.dtype), dbias_D.to(ctx.bias_dtype), dx_bias_D
    return dx_TD, dresidual_TD, *parameters, None, None, None, None


def number_of_sums(x_bias_D: Tensor | None) -> int:
    """Number of parameters whose gradients are sums over the tokens."""
    return 2 if x_bias_D is None else 3


def empty_gradients(x_TD: Tensor, residual_TD: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Uninitialised dresidual and dx. Where nothing is dropped, dx equals dresidual and is returned empty; so too
    for a `dropout_p` that rounds to 0, with which the kernels write no dx."""
    dx_TD = x_TD.new_empty(x_TD.shape if dropout_threshold(dropout_p) else (0, x_TD.shape[1]))
    return residual_TD.new_empty(residual_TD.shape), dx_TD
