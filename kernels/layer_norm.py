"""Dropout + residual + LayerNorm in one pass: the end of every sub-layer of a post-norm Transformer.

    out = LayerNorm(residual + dropout(x)) · weight + bias

Dropout keeps feature c of token t as `rng.keep_mask(rows=token, columns=feature, plane=0)` says and scales
what it keeps by `rng.keep_scale`; backward recomputes the decisions from the counter instead of storing
them. Statistics are fp32; the result has x's dtype.
"""

from __future__ import annotations

from electra_kernels import layer_norm_native as native
from electra_kernels import layer_norm_reference as reference
from electra_kernels.checks import FLOATS, check_dropout, check_tensor
from electra_kernels.dispatch import use_native, use_triton
from electra_kernels.rng import Seed
from torch import Tensor


def dropout_add_layer_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
    stream: int = 0,
) -> Tensor:
    """LayerNorm(residual + dropout(x)); gradients reach x, residual, weight and bias.

    Args:
        x_TD, residual_TD: fp32, bf16, fp16 or fp64, of one shape; dtypes may differ (residual fp32 beside
            x bf16, say). The sum is formed in fp32, the result has x's dtype.
        weight_D, bias_D: any float dtype.
        eps: added to the variance.
        dropout_p: in [0, 1); probability that a value of x is dropped.
        seed: int or int64 tensor `[key]` or `[key, first_row]` (see `rng`); needed iff dropout_p > 0.
            `first_row` is what the batch's first token counts as.
        stream: which use of randomness this is, a static int.

    Raises:
        ValueError: wrong shape, dtype, device or range; dropout without a seed.
    """
    check_tensor("x_TD", x_TD, (None, None), FLOATS)
    device, (tokens, size) = x_TD.device, x_TD.shape
    check_tensor("residual_TD", residual_TD, (tokens, size), FLOATS, device)
    check_tensor("weight_D", weight_D, (size,), FLOATS, device)
    check_tensor("bias_D", bias_D, (size,), FLOATS, device)
    key = check_dropout(dropout_p, seed, x_TD)
    arguments = (x_TD, residual_TD, weight_D, bias_D, eps, dropout_p, key, stream)
    if use_triton(x_TD):
        from electra_kernels import layer_norm_triton

        return layer_norm_triton.dropout_add_layer_norm(*arguments)
    if use_native(x_TD, dropout_p=dropout_p, supported=native.takes(x_TD, residual_TD)):
        return native.forward(*arguments)
    return reference.dropout_add_layer_norm(*arguments)
