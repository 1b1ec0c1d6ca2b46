"""Replaced-token detection in plain PyTorch: the specification (maths: see `rtd_loss`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from electra_kernels.operators import statistics_dtype, without_autocast
from torch import Tensor


def rtd_loss(logits_T: Tensor, is_replaced_T: Tensor, weights_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """(loss, counts); see the contract in `rtd_loss`."""
    logits_T = logits_T if logits_T.dtype == torch.float64 else logits_T.float()
    losses_T = F.binary_cross_entropy_with_logits(logits_T, is_replaced_T.to(logits_T.dtype), reduction="none")
    counts = confusion_counts(logits_T.detach(), is_replaced_T, weights_T)
    if weights_T is None:
        return losses_T.sum() / max(1, len(losses_T)), counts
    weights_T = weights_T.detach().to(losses_T.dtype)
    total = weights_T.sum()
    return (weights_T * losses_T).sum() / torch.where(total == 0, torch.ones_like(total), total), counts


def confusion_counts(logits_T: Tensor, is_replaced_T: Tensor, weights_T: Tensor | None) -> Tensor:
    """int64 [4]: true positives, false positives, false negatives, true negatives."""
    predicted_T = logits_T > 0
    counted_T = torch.ones_like(predicted_T) if weights_T is None else weights_T != 0
    return torch.stack(
        [
            (counted_T & (predicted_T == predicted) & (is_replaced_T == (predicted == correct))).sum()
            for predicted, correct in ((True, True), (True, False), (False, False), (False, True))
        ]
    )


def rtd_head(
    hidden_TD: Tensor, weight_D: Tensor, bias: Tensor, is_replaced_T: Tensor, weights_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logits_T, counts); see the contract in `rtd_loss`."""
    dtype = statistics_dtype(hidden_TD)
    with without_autocast(hidden_TD):
        logits_T = (F.gelu(hidden_TD.to(dtype)) @ weight_D.to(dtype)) + bias.to(dtype).reshape(())
    loss, counts = rtd_loss(logits_T, is_replaced_T, weights_T)
    return loss, logits_T.detach(), counts
