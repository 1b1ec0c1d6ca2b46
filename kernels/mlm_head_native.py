"""The output projection with its softmax by the loops in `c/mlm_head.c` (maths: see `mlm_head`).

**Tile sums.** As with the Triton kernels, the forward pass stores the maximum and the sum of e^(logit - maximum)
for every row and tile of 128 words, and no logits. The draw takes a tile by these sums and computes its logits
again to draw the word, with the random numbers and the code of the twin.
**Backward.** The loops go through the tiles once more. A tile's logits become its errors, P - onehot times the
upstream gradient, and are multiplied with hidden and with the tile's words while they are in the cache.

Products are in fp32 for fp32, and in bf16 with fp32 sums for bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from electra_kernels import native
from electra_kernels.fast_bf16 import has_fast_bf16
from electra_kernels.mlm_head_autograd import register
from electra_kernels.native import DTYPES, c_int, call
from electra_kernels.operators import operator
from electra_kernels.sample_replace_reference import (
    TILE_V,
    inverse_cdf,
    inverse_temperature,
    row_uniforms,
    tempered_weights,
)
from torch import Tensor

LANES, DEPTH = 16, 32  # as in c/common.h and c/products_bf16.h: what E must be a multiple of
PARAMETERS = (*DTYPES, torch.float16)


def takes(hidden_ME: Tensor, embedding_VE: Tensor) -> bool:
    """Whether the loops support these dtypes and sizes; bf16 only on processors that are fast at it."""
    size = hidden_ME.shape[1]
    if embedding_VE.dtype not in PARAMETERS or not (hidden_ME.numel() and len(embedding_VE)):
        return False
    if hidden_ME.dtype == torch.bfloat16:
        return size % DEPTH == 0 and has_fast_bf16() and native.has_bf16_products()
    return hidden_ME.dtype == torch.float32 and size % LANES == 0


@operator("native_mlm_head")
def forward(
    hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, target_M: Tensor, seed: Tensor, stream: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss_M, sampled_ids_M, logsumexp_M)."""
    operands, flags = _operands(hidden_ME, embedding_VE, bias_V)
    hidden_ME, embedding_VE, bias_V = operands
    (rows, size), vocabulary = hidden_ME.shape, len(embedding_VE)
    inverse, tempered = inverse_temperature(temperature), temperature != 1.0
    sums_CM = hidden_ME.new_empty(2 + tempered, -(-vocabulary // TILE_V), rows, dtype=torch.float32)
    highest_CM, total_CM, drawn_CM = sums_CM[0], sums_CM[1], sums_CM[-1]
    call(
        "mlm_head_sums", *operands, highest_CM, total_CM, drawn_CM if tempered else None,
        rows, vocabulary, size, inverse, *flags,
    )  # fmt: skip
    highest_M = highest_CM.amax(0)
    below_CM = highest_CM - highest_M
    logsumexp_M = highest_M + (total_CM * below_CM.exp()).sum(0).log()

    # The target's logit, from operands that are rounded as they are in the products.
    words_ME = embedding_VE[target_M].to(hidden_ME.dtype).float()
    target_logit_M = (hidden_ME.float() * words_ME).sum(1) + bias_V[target_M]

    u_tile_M, u_word_M = row_uniforms(seed, torch.arange(rows), stream)
    tile_M, valid_tile_M = inverse_cdf((drawn_CM * (below_CM * inverse).exp()).T, u_tile_M)
    logits_MC = hidden_ME.new_empty(rows, TILE_V, dtype=torch.float32)
    call("mlm_head_tiles", *operands, tile_M, logits_MC, rows, vocabulary, size, *flags)
    weights_MC = tempered_weights(logits_MC, logits_MC.amax(1, keepdim=True), temperature)
    word_M, valid_word_M = inverse_cdf(weights_MC, u_word_M)
    sampled_M = torch.where(valid_tile_M & valid_word_M, tile_M * TILE_V + word_M, -1)
    return logsumexp_M - target_logit_M, sampled_M, logsumexp_M


@operator("native_mlm_head_backward")
def backward(
    grad_M: Tensor, hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, target_M: Tensor, logsumexp_M: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden_ME, dembedding_VE, dbias_V)."""
    operands, flags = _operands(hidden_ME, embedding_VE, bias_V)
    gradients = [torch.empty_like(operand, dtype=torch.float32) for operand in operands]
    call(
        "mlm_head_gradients", *operands, target_M.contiguous(), logsumexp_M, grad_M.float().contiguous(),
        *gradients, len(hidden_ME), *embedding_VE.shape, *flags,
    )  # fmt: skip
    dhidden_ME, dembedding_VE, dbias_V = gradients
    return dhidden_ME.to(hidden_ME.dtype), dembedding_VE.to(embedding_VE.dtype), dbias_V.to(bias_V.dtype)


def _operands(
    hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Any, Any, Any]]:
    """What the loops read: contiguous, the bias in fp32; with whether hidden and embedding are bf16 (1 or 0 each),
    and the number of threads."""
    if embedding_VE.dtype == torch.float16:
        embedding_VE = embedding_VE.to(hidden_ME.dtype)
    in_bf16 = [c_int(tensor.dtype == torch.bfloat16) for tensor in (hidden_ME, embedding_VE)]
    operands = hidden_ME.contiguous(), embedding_VE.contiguous(), bias_V.float().contiguous()
    return operands, (*in_bf16, c_int(torch.get_num_threads()))


register(forward, backward)
