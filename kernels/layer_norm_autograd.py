"""The autograd formula of dropout + residual + LayerNorm, for the operators of both its fast forms.

    forward(x, residual, weight, bias, eps, dropout_p, seed, stream) -> out
    backward(dout, x, residual, weight, eps, dropout_p, seed, stream) -> dresidual, dx, [dweight, dbias]

Backward computes everything again from the inputs, so nothing else is saved. dweight and dbias are the two rows
of one tensor: a single sum over the partial sums, and an operator's results must not share memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.library import CustomOpDef

Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def register_autograd(forward: CustomOpDef, backward: Backward) -> None:
    """Makes `backward` the derivative of `forward`."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_TD, residual_TD, weight_D, bias_D, ctx.eps, ctx.dropout_p, seed, ctx.stream = inputs
        ctx.bias_dtype = bias_D.dtype
        ctx.save_for_backward(x_TD, residual_TD, weight_D, seed)

    def differentiate(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, residual_TD, weight_D, seed = ctx.saved_tensors
        numbers = (ctx.eps, ctx.dropout_p, seed, ctx.stream)
        dresidual_TD, dx_TD, (dweight_D, dbias_D) = backward(dout_TD, x_TD, residual_TD, weight_D, *numbers)
        dx_TD = dx_TD if ctx.dropout_p > 0 else dresidual_TD.to(x_TD.dtype)
        parameters = dweight_D.to(weight_D.dtype), dbias_D.to(ctx.bias_dtype)
        return dx_TD, dresidual_TD, *parameters, None, None, None, None

    forward.register_autograd(differentiate, setup_context=save)
