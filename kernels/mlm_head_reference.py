"""`mlm_head` in plain PyTorch: the specification, and the training path on CPUs (maths: see `mlm_head`).

`plain_mlm_head` is the specification: it stores all logits and leaves the gradients to autograd. Read it first.
`mlm_head` computes the same at the sizes of a training step.

Operands have hidden's dtype. Products, sums and statistics are fp32, even for bf16: this keeps the logits exact
and is faster on most CPUs. Rows are processed in chunks whose logits fit in a CPU's cache (on a GPU larger ones,
for fewer launches), so memory is O(chunk · V). Three things save passes over a chunk: one buffer is reused, the
softmax is never normalised (1/Σ is applied to M numbers, not M·V), and the upstream gradient g scales hidden
instead of P.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from electra_kernels.operators import statistics_dtype, without_autocast
from electra_kernels.sample_replace_reference import draw, rows_at_once, tempered_weights, tile_sums
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 21  # logits per chunk: 8 MB in fp32, the fastest of 2^18 ... 2^22 at V = 30522 and 8192


def plain_mlm_head(
    hidden_ME: Tensor,
    embedding_VE: Tensor,
    bias_V: Tensor,
    target_ids_M: Tensor,
    seed: Tensor,
    stream: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(loss_M, sampled_ids_M) straight from the formulas, in O(M · V) memory: the specification of `mlm_head`."""
    dtype = statistics_dtype(hidden_ME)
    embedding_VE = embedding_VE.to(hidden_ME.dtype).to(dtype)
    logits_MV = hidden_ME.to(dtype) @ embedding_VE.T + bias_V.to(dtype)
    loss_M = logits_MV.logsumexp(-1) - logits_MV.gather(1, target_ids_M[:, None])[:, 0]

    logits_MV = logits_MV.detach()  # no gradient flows through the draw
    weights_MV = tempered_weights(logits_MV, logits_MV.amax(-1, keepdim=True), temperature)
    rows_M = torch.arange(len(logits_MV), device=logits_MV.device)
    return loss_M, draw(weights_MV, tile_sums(weights_MV), seed, rows_M, stream)


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
    with without_autocast(hidden_ME):
        return _ChunkedHead.apply(hidden_ME, embedding_VE, bias_V, target_ids_M.long(), seed, stream, temperature)


def _logit_chunks(hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, their logits) chunk by chunk, in one reused buffer that the caller may overwrite."""
    rows, vocabulary = len(hidden_ME), len(embedding_VE)
    size = min(rows, rows_at_once(hidden_ME, CHUNK_ELEMENTS, vocabulary))
    buffer_RV = hidden_ME.new_empty(size, vocabulary)
    for start in range(0, rows, max(1, size)):
        block = slice(start, min(start + size, rows))
        logits_RV = buffer_RV[: block.stop - block.start]
        torch.mm(hidden_ME[block], embedding_VE.T, out=logits_RV)  # with addmm the product took 1.5x as long
        yield block, logits_RV.add_(bias_V)


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
        ctx.dtypes = hidden_ME.dtype, embedding_VE.dtype, bias_V.dtype
        dtype = statistics_dtype(hidden_ME)
        embedding_VE = embedding_VE.to(hidden_ME.dtype).to(dtype)
        hidden_ME, bias_V = hidden_ME.to(dtype), bias_V.to(dtype)
        logsumexp_M = hidden_ME.new_empty(len(hidden_ME))
        target_logit_M = torch.empty_like(logsumexp_M)
        sampled_M = torch.empty_like(target_M)
        rows_M = torch.arange(len(hidden_ME), device=hidden_ME.device)
        for block, logits_RV in _logit_chunks(hidden_ME, embedding_VE, bias_V):
            max_R1 = logits_RV.amax(-1, keepdim=True)
            target_logit_M[block] = logits_RV.gather(1, target_M[block, None])[:, 0]
            # At temperature 1 loss and draw share their weights. Otherwise the draw's are computed first, because
            # the loss's overwrite the logits.
            drawn_RV = tempered_weights(logits_RV, max_R1, temperature) if temperature != 1.0 else None
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
        scaled_ME = grad_loss_M[:, None] * hidden_ME
        dhidden_ME = torch.empty_like(hidden_ME)
        dembedding_VE = torch.zeros_like(embedding_VE)
        dbias_V = torch.zeros_like(bias_V)
        for block, logits_RV in _logit_chunks(hidden_ME, embedding_VE, bias_V):
            errors_RV = logits_RV.sub_(logsumexp_M[block, None]).exp_()  # P, then P - onehot
            errors_RV.scatter_add_(1, target_M[block, None], errors_RV.new_full((len(errors_RV), 1), -1.0))
            torch.mm(errors_RV, embedding_VE, out=dhidden_ME[block])
            dembedding_VE.addmm_(errors_RV.T, scaled_ME[block])
            dbias_V.addmv_(errors_RV.T, grad_loss_M[block])
        gradients = dhidden_ME.mul_(grad_loss_M[:, None]), dembedding_VE, dbias_V
        casts = (gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes))
        return *casts, None, None, None, None
