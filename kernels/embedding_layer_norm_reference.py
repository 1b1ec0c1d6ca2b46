"""Embedding sum + LayerNorm + dropout in plain PyTorch: the specification (maths: see `embedding_layer_norm`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from electra_kernels.operators import statistics_dtype, without_autocast
from electra_kernels.rng import keep_mask, keep_scale
from torch import Tensor


def embedding_layer_norm(
    input_ids_T: Tensor,
    position_ids_T: Tensor,
    segment_ids_T: Tensor,
    words_VE: Tensor,
    positions_SE: Tensor,
    segments_CE: Tensor,
    weight_E: Tensor,
    bias_E: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    """See the contract in `embedding_layer_norm`; `seed` is None where nothing is dropped."""
    statistics = statistics_dtype(words_VE)
    lookups = ((input_ids_T, words_VE), (position_ids_T, positions_SE), (segment_ids_T, segments_CE))
    with without_autocast(words_VE):
        words_TE, positions_TE, segments_TE = (F.embedding(ids, table).to(statistics) for ids, table in lookups)
        sum_TE = words_TE + positions_TE + segments_TE
        size = (words_VE.shape[1],)
        out_TE = F.layer_norm(sum_TE, size, weight_E.to(statistics), bias_E.to(statistics), eps)
        if seed is not None:
            rows_T = torch.arange(len(out_TE), device=out_TE.device)
            keep_TE = keep_mask(seed, rows_T, size[0], dropout_p, stream)
            out_TE = out_TE * keep_scale(dropout_p) * keep_TE
        return out_TE.to(dtype)
