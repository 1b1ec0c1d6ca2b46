"""Embedding sum + LayerNorm + dropout, an encoder's first step, in one pass over T x E.

    out = dropout(LayerNorm(words[input_ids] + positions[position_ids] + segments[segment_ids]) · weight + bias)

`rng.keep_mask` (row: token, column: feature, plane 0) decides which values dropout keeps; those are multiplied by
`rng.keep_scale`. The sum and the statistics are fp32 (fp64 for fp64 tables).
"""

from __future__ import annotations

import torch
from electra_kernels import embedding_layer_norm_reference as reference
from electra_kernels.checks import FLOATS, INTEGERS, check_dropout, check_eps, check_ids, check_tensor
from electra_kernels.dispatch import use_triton
from electra_kernels.rng import Seed
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
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
    stream: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The encoder's input, [T, E]. Gradients of tables, weight and bias are summed in a fixed order.

    Args:
        input_ids_T, position_ids_T, segment_ids_T: int64 or int32, rows of the three tables.
        words_VE, positions_SE, segments_CE: fp32, bf16, fp16 or fp64, all of the same dtype.
        weight_E, bias_E: any float dtype.
        eps: added to the variance; finite, not negative.
        dropout_p, seed, stream: as in `dropout_add_layer_norm`.
        dtype: of the result; None means that of the tables.

    Raises:
        ValueError: wrong shape, dtype, device or range; dropout without a seed; ids outside their table (on a
            GPU checked only with ELECTRA_KERNELS_DEBUG=1, because reading them waits for the device).
    """
    check_tensor("words_VE", words_VE, (None, None), FLOATS)
    device, size = words_VE.device, words_VE.shape[1]
    check_tensor("positions_SE", positions_SE, (None, size), (words_VE.dtype,), device)
    check_tensor("segments_CE", segments_CE, (None, size), (words_VE.dtype,), device)
    check_tensor("weight_E", weight_E, (size,), FLOATS, device)
    check_tensor("bias_E", bias_E, (size,), FLOATS, device)
    check_tensor("input_ids_T", input_ids_T, (None,), INTEGERS, device)
    check_tensor("position_ids_T", position_ids_T, (len(input_ids_T),), INTEGERS, device)
    check_tensor("segment_ids_T", segment_ids_T, (len(input_ids_T),), INTEGERS, device)
    check_ids("input_ids_T", input_ids_T, len(words_VE))
    check_ids("position_ids_T", position_ids_T, len(positions_SE))
    check_ids("segment_ids_T", segment_ids_T, len(segments_CE))
    dtype = words_VE.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise ValueError(f"dtype: expected a float dtype, got {dtype}")
    eps = check_eps(eps)
    key = check_dropout(dropout_p, seed, words_VE)
    ids = (input_ids_T, position_ids_T, segment_ids_T)
    tables = (words_VE, positions_SE, segments_CE)
    arguments = (*ids, *tables, weight_E, bias_E, eps, dropout_p, key, stream, dtype)
    if use_triton(words_VE):
        from electra_kernels import embedding_layer_norm_triton

        return embedding_layer_norm_triton.forward(*arguments)
    return reference.embedding_layer_norm(*arguments)
