"""The two-level exact draw in plain PyTorch: the specification of `sample_replace` (maths: see there)."""

from __future__ import annotations

import torch
from electra_kernels.rng import philox
from torch import Tensor

TILE_V = 128
CHUNK_ELEMENTS = 1 << 21  # weights per chunk: 8 MB in fp32
GPU_CHUNK_ELEMENTS = 1 << 27  # 512 MB: no GPU's cache holds a chunk, and launches cost (predicted, not measured)


def rows_at_once(x: Tensor, elements_on_host: int, vocabulary: int) -> int:
    """Rows per chunk for tensors on the device of `x`; at least one."""
    return max(1, (GPU_CHUNK_ELEMENTS if x.is_cuda else elements_on_host) // max(1, vocabulary))


def row_uniforms(seed: Tensor, rows: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """The two float64 uniforms (tile, word) of every row, strictly inside (0, 1)."""
    words = philox(seed, torch.zeros_like(rows), rows, stream)
    # 52 bits plus a half are exact in float64, so rounding cannot give 0 or 1.
    tile, word = (
        ((high << 20 | low >> 12).to(torch.float64) + 0.5) * 2.0**-52 for high, low in (words[0:2], words[2:4])
    )
    return tile, word


def inverse_cdf(weights_RC: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """First column whose cumulative weight exceeds uniform * total, and whether the row is a distribution.

    This column has a positive weight, because its cumulative sum is larger than its predecessor's.
    """
    cumulative_RC = weights_RC.to(torch.float64).cumsum(-1)
    total_R = cumulative_RC[:, -1]
    column_R = torch.searchsorted(cumulative_RC, (uniform_R * total_R)[:, None], right=True)[:, 0]
    valid_R = (total_R > 0) & (total_R < torch.inf)  # NaN fails both
    return torch.where(valid_R, column_R, 0), valid_R


def tile_sums(weights_RV: Tensor) -> Tensor:
    """Sums over tiles of `TILE_V` tokens; the last tile may be partial."""
    rows, vocabulary = weights_RV.shape
    whole = vocabulary // TILE_V * TILE_V
    sums = weights_RV[:, :whole].unflatten(1, (-1, TILE_V)).sum(-1) if whole else weights_RV.new_empty(rows, 0)
    return sums if whole == vocabulary else torch.cat((sums, weights_RV[:, whole:].sum(-1, keepdim=True)), 1)


def draw(weights_RV: Tensor, sums_RC: Tensor, seed: Tensor, rows_R: Tensor, stream: int) -> Tensor:
    """Ids drawn with unnormalised weights >= 0, given their tile sums; -1 for a row that is not a distribution."""
    u_tile_R, u_word_R = row_uniforms(seed, rows_R, stream)
    tile_R, valid_tile_R = inverse_cdf(sums_RC, u_tile_R)
    words_RC = tile_R[:, None] * TILE_V + torch.arange(TILE_V, device=rows_R.device)
    inside_RC = words_RC < weights_RV.shape[1]
    words_RC = words_RC.clamp(max=weights_RV.shape[1] - 1)
    weights_RC = torch.where(inside_RC, weights_RV.gather(1, words_RC), 0)
    word_R, valid_word_R = inverse_cdf(weights_RC, u_word_R)
    return torch.where(valid_tile_R & valid_word_R, tile_R * TILE_V + word_R, -1)


def tempered_weights(logits_RV: Tensor, max_R1: Tensor, temperature: float) -> Tensor:
    """exp((logit - max) / temperature); subtracting the maximum first avoids overflow at any temperature."""
    return logits_RV.sub(max_R1).mul_(inverse_temperature(temperature)).exp_()


def inverse_temperature(temperature: float) -> float:
    """1 / temperature, in fp32 neither inf nor 0: 0 * inverse must stay 0, and -inf * inverse -inf."""
    return max(1e-37, min(1.0 / temperature, 1e38))


def sample_and_replace(
    logits_MV: Tensor, input_ids_T: Tensor, positions_M: Tensor, seed: Tensor, stream: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(corrupted_ids_T, is_replaced_T, sampled_ids_M); see the contract in `sample_replace`."""
    sampled_M = torch.full((len(logits_MV),), -1, device=logits_MV.device)
    rows_M = torch.arange(len(logits_MV), device=logits_MV.device)
    chunk = rows_at_once(logits_MV, CHUNK_ELEMENTS, logits_MV.shape[1])
    for start in range(0, len(logits_MV) if logits_MV.shape[1] else 0, chunk):
        block = slice(start, start + chunk)
        logits_RV = logits_MV[block] if logits_MV.dtype == torch.float64 else logits_MV[block].float()
        weights_RV = tempered_weights(logits_RV, logits_RV.amax(-1, keepdim=True), temperature)
        sampled_M[block] = draw(weights_RV, tile_sums(weights_RV), seed, rows_M[block], stream)

    positions_M = positions_M.long()
    original_M = input_ids_T[positions_M]
    new_M = torch.where(sampled_M >= 0, sampled_M, original_M).to(input_ids_T.dtype)
    corrupted_T = input_ids_T.clone()
    corrupted_T[positions_M] = new_M
    is_replaced_T = torch.zeros_like(input_ids_T, dtype=torch.bool)
    is_replaced_T[positions_M] = new_M != original_M
    return corrupted_T, is_replaced_T, sampled_M
