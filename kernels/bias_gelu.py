"""Bias + GELU in one pass: the step between the two linear layers of a feed-forward block.

    out = gelu(x + bias),   gelu(y) = y Φ(y),   Φ(y) = (1 + erf(y / √2)) / 2

x is the first layer's matrix product without its bias. Adding the bias here costs nothing in the forward pass. In
the backward pass its gradient, the sum of dx over the tokens, is formed as dx is computed; PyTorch would read dx
again for it.
"""

from __future__ import annotations

from electra_kernels import bias_gelu_reference as reference
from electra_kernels.checks import FLOATS, check_tensor
from electra_kernels.dispatch import use_triton
from torch import Tensor


def bias_gelu(x_TF: Tensor, bias_F: Tensor) -> Tensor:
    """GELU(x + bias), the exact (erf) form; differentiable with respect to both.

    Args:
        x_TF: fp32, bf16, fp16 or fp64. The sum and GELU are computed in fp32 (fp64); the result has x's dtype.
        bias_F: any float dtype.

    Raises:
        ValueError: wrong shape, dtype or device.
    """
    check_tensor("x_TF", x_TF, (None, None), FLOATS)
    check_tensor("bias_F", bias_F, (x_TF.shape[1],), FLOATS, x_TF.device)
    if use_triton(x_TF):
        from electra_kernels import bias_gelu_triton

        return bias_gelu_triton.forward(x_TF, bias_F)
    return reference.bias_gelu(x_TF, bias_F)
