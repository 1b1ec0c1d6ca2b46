"""Autograd and shapes for the MLM head, shared by the Triton and the native operators.

    forward(hidden, embedding, bias, target, seed, stream, temperature) -> loss, sampled ids, logsumexp
    backward(dloss, hidden, embedding, bias, target, logsumexp) -> dhidden, dembedding, dbias

Saved are the inputs and the logsumexp, M numbers, whose unit is the operators' own affair.
"""

from __future__ import annotations

from typing import Any

import torch
from electra_kernels.operators import Operator, statistics_dtype
from torch import Tensor


def register(forward: Operator, backward: Operator) -> None:
    """Makes `backward` the derivative of `forward`, and registers what both return."""

    @forward.register_fake
    def _(hidden_ME: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss_M = hidden_ME.new_empty(hidden_ME.shape[0], dtype=statistics_dtype(hidden_ME))
        return loss_M, torch.empty_like(loss_M, dtype=torch.int64), torch.empty_like(loss_M)

    @backward.register_fake
    def _(
        grad_M: Tensor, hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, *_: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(t.new_empty(t.shape) for t in (hidden_ME, embedding_VE, bias_V))

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:4], output[2])
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.set_materialize_grads(False)  # no zero tensors for outputs without a gradient

    def differentiate(ctx: Any, grad_loss_M: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        if grad_loss_M is None:
            return (None,) * 7
        return *backward(grad_loss_M, *ctx.saved_tensors), None, None, None, None

    forward.register_autograd(differentiate, setup_context=save)
