"""Replaced-token detection: binary cross-entropy over all tokens (paper section 2, L_Disc).

With logit x, label y and weight w (1 where no weights are given),

    l(x, y) = max(x, 0) - x·y + log(1 + exp(-|x|)),   loss = Σ w·l / Σ w,   ∂loss/∂x = w·(sigmoid(x) - y) / Σ w

which neither overflows for large |x| nor loses small losses. A batch with Σ w = 0 (or no tokens) has loss 0 and a
zero gradient. The same pass counts the confusion matrix: a token is predicted to be replaced iff x > 0, and tokens
of weight 0 are not counted. `rtd_head` fuses the loss with the discriminator's last two steps,
x = gelu(pre-activation) · weight + bias, with the exact (erf) GELU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from electra_kernels import rtd_loss_reference as reference
from electra_kernels.checks import FLOATS, check_tensor, check_weights
from electra_kernels.dispatch import use_triton
from torch import Tensor


class RTDLoss(NamedTuple):
    """What `rtd_loss_and_counts` returns."""

    loss: Tensor
    """fp32 scalar (fp64 for fp64 input)."""
    counts: Tensor
    """int64 [4]: true positives, false positives, false negatives, true negatives; replaced = positive."""


class RTDHead(NamedTuple):
    """What `rtd_head` returns."""

    loss: Tensor
    """fp32 scalar (fp64 for fp64 input)."""
    logits_T: Tensor
    """fp32 (fp64), without a gradient; positive means replaced."""
    counts: Tensor
    """int64 [4]: true positives, false positives, false negatives, true negatives; replaced = positive."""


def rtd_loss(logits_T: Tensor, is_replaced_T: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy over all tokens, or Σ w·l / Σ w. Arguments as in `rtd_loss_and_counts`."""
    return rtd_loss_and_counts(logits_T, is_replaced_T, weights_T).loss


def rtd_loss_and_counts(logits_T: Tensor, is_replaced_T: Tensor, weights_T: Tensor | None = None) -> RTDLoss:
    """The loss and the confusion counts from one pass over the tokens.

    Args:
        logits_T: fp32, bf16, fp16 or fp64; the gradient has its dtype.
        is_replaced_T: bool.
        weights_T: float, >= 0, or None for 1 everywhere; it gets no gradient.

    Raises:
        ValueError: wrong shape, dtype or device; a negative weight (on a GPU checked only with
            ELECTRA_KERNELS_DEBUG=1, because reading them waits for the device).
    """
    check_tensor("logits_T", logits_T, (None,), FLOATS)
    _check_labels(is_replaced_T, weights_T, logits_T)
    if use_triton(logits_T):
        from electra_kernels import rtd_loss_triton

        return RTDLoss(*rtd_loss_triton.rtd_loss(logits_T, is_replaced_T, weights_T)[:2])
    return RTDLoss(*reference.rtd_loss(logits_T, is_replaced_T, weights_T))


def rtd_head(
    hidden_TD: Tensor,
    weight_D: Tensor,
    bias: Tensor,
    is_replaced_T: Tensor,
    weights_T: Tensor | None = None,
) -> RTDHead:
    """`rtd_loss` of gelu(hidden) · weight + bias; differentiable with respect to hidden, weight and bias.

    Args:
        hidden_TD: the pre-activation of the discriminator's dense layer; fp32, bf16, fp16 or fp64.
        weight_D, bias: any float dtype; bias is a scalar or has one element.
        is_replaced_T, weights_T: as in `rtd_loss_and_counts`.

    Raises:
        ValueError: as `rtd_loss_and_counts`.
    """
    check_tensor("hidden_TD", hidden_TD, (None, None), FLOATS)
    check_tensor("weight_D", weight_D, (hidden_TD.shape[1],), FLOATS, hidden_TD.device)
    check_tensor("bias", bias, (1,) if isinstance(bias, Tensor) and bias.dim() else (), FLOATS, hidden_TD.device)
    _check_labels(is_replaced_T, weights_T, hidden_TD)
    if use_triton(hidden_TD):
        from electra_kernels import rtd_loss_triton

        return RTDHead(*rtd_loss_triton.rtd_head(hidden_TD, weight_D, bias, is_replaced_T, weights_T)[:3])
    return RTDHead(*reference.rtd_head(hidden_TD, weight_D, bias, is_replaced_T, weights_T))


def _check_labels(is_replaced_T: Tensor, weights_T: Tensor | None, like: Tensor) -> None:
    check_tensor("is_replaced_T", is_replaced_T, (len(like),), (torch.bool,), like.device)
    if weights_T is not None:
        check_tensor("weights_T", weights_T, (len(like),), FLOATS, like.device)
        check_weights("weights_T", weights_T)
