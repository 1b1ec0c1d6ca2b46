"""Dropout + residual + LayerNorm in plain PyTorch: the specification (maths: see `layer_norm`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from electra_kernels.operators import statistics_dtype, without_autocast
from electra_kernels.rng import keep_mask, keep_scale
from torch import Tensor


def dropout_add_layer_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    x_bias_D: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> Tensor:
    """See the contract in `layer_norm`; `seed` is None where nothing is dropped."""
    statistics = statistics_dtype(x_TD)
    with without_autocast(x_TD):
        sum_TD = x_TD.to(statistics)
        if x_bias_D is not None:
            sum_TD = sum_TD + x_bias_D.to(statistics)
        if seed is not None:
            rows_T = torch.arange(len(x_TD), device=x_TD.device)
            keep_TD = keep_mask(seed, rows_T, x_TD.shape[1], dropout_p, stream)
            sum_TD = sum_TD * keep_scale(dropout_p) * keep_TD
        sum_TD = sum_TD + residual_TD.to(statistics)
        size = (x_TD.shape[1],)
        normed_TD = F.layer_norm(sum_TD, size, weight_D.to(statistics), bias_D.to(statistics), eps)
        return normed_TD.to(x_TD.dtype)
