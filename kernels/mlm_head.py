"""Output projection + cross-entropy + exact draw, without storing the M x V logits.

    logits = hidden @ embeddingᵀ + bias,   loss_m = logsumexp(logits_m) - logits_m[target_m],
    sampled_m ~ softmax(logits_m / temperature)

Gradients, with g = ∂L/∂loss and P = softmax(logits) at temperature 1:

    dlogits = g ⊙ (P - onehot(target)),  dhidden = dlogits @ embedding,  dembedding = dlogitsᵀ @ hidden,
    dbias = Σ_m dlogits_m

The backward pass recomputes P from hidden, embedding and the saved logsumexp. The draw is the two-level one of
`sample_replace` (the same logits and seed give the same ids), and no gradient flows through it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from electra_kernels import mlm_head_native, native
from electra_kernels import mlm_head_reference as reference
from electra_kernels.checks import FLOATS, INTEGERS, check_ids, check_temperature, check_tensor
from electra_kernels.dispatch import use_native, use_triton
from electra_kernels.rng import Seed, seed_tensor
from torch import Tensor


class MLMHead(NamedTuple):
    """What `mlm_head` returns."""

    loss_M: Tensor
    """fp32 (fp64 for fp64 input): cross-entropy at every masked position; NaN for a row with a NaN."""
    sampled_ids_M: Tensor
    """int64: the draws; -1 for a row of logits that is not a distribution."""


def mlm_head(
    hidden_ME: Tensor,
    embedding_VE: Tensor,
    bias_V: Tensor,
    target_ids_M: Tensor,
    *,
    seed: Seed,
    stream: int = 0,
    temperature: float = 1.0,
) -> MLMHead:
    """Cross-entropy and one exact draw for each masked token, in O(M·E + V·E) memory, not O(M·V).

    Args:
        hidden_ME: fp32, bf16, fp16 or fp64; its dtype is the compute dtype. Statistics are fp32.
        embedding_VE: any float dtype, cast to hidden's (the fp32 parameter under autocast).
        bias_V: any float dtype; added in fp32.
        target_ids_M: int64 or int32, in [0, V).
        seed, stream, temperature: as in `sample_and_replace`; the temperature does not affect the loss.

    Returns:
        MLMHead(loss_M, sampled_ids_M). loss_M is differentiable with respect to hidden, embedding and bias; each
        gradient has its input's dtype and is summed in a fixed order.

    Raises:
        ValueError: wrong shape, dtype, device or temperature; targets outside [0, V) (on a GPU checked only with
            ELECTRA_KERNELS_DEBUG=1, because reading them waits for the device; otherwise their loss is NaN).
    """
    check_tensor("hidden_ME", hidden_ME, (None, None), FLOATS)
    device, (rows, size) = hidden_ME.device, hidden_ME.shape
    check_tensor("embedding_VE", embedding_VE, (None, size), FLOATS, device)
    check_tensor("bias_V", bias_V, (len(embedding_VE),), FLOATS, device)
    check_tensor("target_ids_M", target_ids_M, (rows,), INTEGERS, device)
    check_ids("target_ids_M", target_ids_M, len(embedding_VE))
    check_temperature(temperature)
    key = seed_tensor(seed, device)
    arguments = (hidden_ME, embedding_VE, bias_V, target_ids_M, key, stream, temperature)
    if use_triton(hidden_ME):
        from electra_kernels import mlm_head_triton

        return MLMHead(*mlm_head_triton.forward(*arguments)[:2])
    training, supported = torch.is_grad_enabled(), mlm_head_native.takes(hidden_ME, embedding_VE)
    slower = not native.has_avx2()
    if use_native(hidden_ME, training=training, supported=supported, twin_is_faster=slower):
        arguments = (*arguments[:3], target_ids_M.long(), *arguments[4:])
        return MLMHead(*mlm_head_native.forward(*arguments)[:2])
    return MLMHead(*reference.mlm_head(*arguments))
