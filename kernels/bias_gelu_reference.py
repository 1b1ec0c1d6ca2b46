"""Bias + GELU in plain PyTorch: the specification (maths: see `bias_gelu`)."""

from __future__ import annotations

import torch.nn.functional as F
from electra_kernels.operators import statistics_dtype
from torch import Tensor


def bias_gelu(x_TF: Tensor, bias_F: Tensor) -> Tensor:
    """See the contract in `bias_gelu`."""
    dtype = statistics_dtype(x_TF)
    return F.gelu(x_TF.to(dtype) + bias_F.to(dtype)).to(x_TF.dtype)
