"""`mlm_head` in plain PyTorch: the specification, and the training path on CPUs (maths: see `mlm_head`).

Rows are taken in chunks whose logits stay in cache, so memory is O(chunk · V). The passes over a chunk are
kept few: the softmax is never normalised (1/Σ is applied to M numbers, not M·V), the upstream gradient g
scales hidden instead of P, and backward folds -logsumexp into the matrix product's addend.
"""

from __future__ import annotations

from typing import Any

import torch
from electra_kernels.checks import check_ids
from electra_kernels.sample_replace_reference import draw, tempered_weights, tile_sums
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 20  # logits held at a time


def mlm_head(
    hidden_ME: Tensor,
    embedding_VE: Tensor,
    bias_V: Tensor,
    target_ids_M: Tensor,
    seed: Tensor,
    stream: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(loss_M, sampled_ids_M); see the contract in `mlm_head`."""
    check_ids("target_ids_M", target_ids_M, len(embedding_VE))
    # Casts stay outside the Function: autograd returns each gradient in its parameter's dtype.
    dtype = hidden_ME.dtype
    with torch.autocast(hidden_ME.device.type, enabled=False):
        return _ChunkedHead.apply(  # type: ignore[no-untyped-call, no-any-return]
            hidden_ME, embedding_VE.to(dtype), bias_V.to(dtype), target_ids_M.long(), seed, stream, temperature
        )


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // max(1, vocabulary))
    return [slice(start, start + size) for start in range(0, rows, size)]


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ME: Tensor,
        embedding_VE: Tensor,
        bias_V: Tensor,
        target_M: Tensor,
        seed: Tensor,
        stream: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        statistics = torch.float64 if hidden_ME.dtype == torch.float64 else torch.float32
        logsumexp_M = torch.empty(len(hidden_ME), dtype=statistics, device=hidden_ME.device)
        target_logit_M = torch.empty_like(logsumexp_M)
        sampled_M = torch.empty_like(target_M)
        rows_M = torch.arange(len(hidden_ME), device=hidden_ME.device)
        for block in _chunks(len(hidden_ME), len(embedding_VE)):
            logits_RV = torch.addmm(bias_V, hidden_ME[block], embedding_VE.T).to(statistics)
            max_R1 = logits_RV.amax(-1, keepdim=True)
            target_logit_M[block] = logits_RV.gather(1, target_M[block, None])[:, 0]
            tempered = temperature != 1.0
            drawn_RV = tempered_weights(logits_RV, max_R1, temperature) if tempered else None
            weights_RV = logits_RV.sub_(max_R1).exp_()
            sums_RC = tile_sums(weights_RV)
            logsumexp_M[block] = max_R1[:, 0] + sums_RC.sum(-1).log()
            if drawn_RV is not None:
                weights_RV, sums_RC = drawn_RV, tile_sums(drawn_RV)
            sampled_M[block] = draw(weights_RV, sums_RC, seed, rows_M[block], stream)
        ctx.save_for_backward(hidden_ME, embedding_VE, bias_V, target_M, logsumexp_M)
        ctx.mark_non_differentiable(sampled_M)
        return logsumexp_M - target_logit_M, sampled_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss_M: Tensor, _grad_sampled: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ME, embedding_VE, bias_V, target_M, logsumexp_M = ctx.saved_tensors
        dtype = hidden_ME.dtype
        scaled_ME = (grad_loss_M[:, None] * hidden_ME).to(dtype)
        dhidden_ME = torch.empty_like(hidden_ME)
        dembedding_VE = torch.zeros_like(embedding_VE, dtype=logsumexp_M.dtype)
        dbias_V = torch.zeros_like(bias_V, dtype=logsumexp_M.dtype)
        for block in _chunks(len(hidden_ME), len(embedding_VE)):
            shift_RV = bias_V - logsumexp_M[block, None].to(dtype)
            errors_RV = shift_RV.addmm_(hidden_ME[block], embedding_VE.T).exp_()  # P, then P - onehot
            errors_RV.scatter_add_(1, target_M[block, None], errors_RV.new_full((len(errors_RV), 1), -1.0))
            dhidden_ME[block] = (errors_RV @ embedding_VE) * grad_loss_M[block, None]
            dembedding_VE += errors_RV.T @ scaled_ME[block]
            dbias_V += grad_loss_M[block].to(dtype) @ errors_RV
        return dhidden_ME, dembedding_VE.to(dtype), dbias_V.to(dtype), None, None, None, None
