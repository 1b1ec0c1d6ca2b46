"""Solutions to the exercises of docs/exercises.md; look here last."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from electra_kernels import rtd_loss
from electra_kernels.rng import dropout_threshold, philox, seed_tensor
from torch import Tensor


def masked_count(tokens: int, fraction: float, most: int) -> int:
    """1. At least one, at most `most`; an integer tensor times a number is fp32."""
    return max(1, min(most, round((torch.tensor(tokens) * fraction).item())))


def draw_word(weights: list[float], u_tile: float, u_word: float, tile: int) -> int:
    """2. A tile by the sums of the tiles, then a word by the weights of its words."""

    def inverse_cdf(weights: list[float], u: float) -> int:
        passed, threshold = 0.0, u * sum(weights)
        for index, weight in enumerate(weights):
            passed += weight
            if passed > threshold:
                return index
        raise ValueError("weights: no distribution")

    sums = [sum(weights[first : first + tile]) for first in range(0, len(weights), tile)]
    first = inverse_cdf(sums, u_tile) * tile
    return first + inverse_cdf(weights[first : first + tile], u_word)


def rtd_gradient(logits_T: Tensor, is_replaced_T: Tensor) -> Tensor:
    """3. The answer minus the truth, over the number of tokens."""
    return (logits_T.sigmoid() - is_replaced_T.float()) / len(logits_T)


def labels(input_ids_T: Tensor, positions_M: Tensor, sampled_M: Tensor) -> Tensor:
    """4. Replaced is what differs afterwards."""
    originals_M = input_ids_T[positions_M]
    corrupted_T = input_ids_T.clone()
    corrupted_T[positions_M] = torch.where(sampled_M < 0, originals_M, sampled_M)
    return corrupted_T != input_ids_T


def first_update(gradient: Tensor) -> Tensor:
    """5. Both moments begin at zero, and nothing makes up for it."""
    m, v = 0.1 * gradient, 0.001 * gradient**2
    return m / (v.sqrt() + 1e-6)


def rate(step: int, peak: float, steps: int, warmup: int) -> float:
    """6. The decay runs from the first step on."""
    return peak * (1 - step / steps) * min(1.0, step / warmup)


def softmax_in_blocks(scores: Tensor, values: Tensor, block: int) -> Tensor:
    """7. Everything so far is relative to the largest score so far."""
    largest, total, out = torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(values.shape[1])
    for first in range(0, len(scores), block):
        part = scores[first : first + block]
        new = torch.maximum(largest, part.max())
        shrink, weights = (largest - new).exp(), (part - new).exp()
        total = total * shrink + weights.sum()
        out = out * shrink + weights @ values[first : first + block]
        largest = new
    return out / total


def kept(seed: int, row: int, column: int, dropout_p: float, stream: int) -> bool:
    """8. Eight columns share a call; word (column // 2) % 4 of it, low half first."""
    words = philox(seed_tensor(seed), torch.tensor(column // 8), torch.tensor(row), stream)
    word = int(words[column // 2 % 4])
    half = word >> 16 if column % 2 else word & 0xFFFF
    return half >= dropout_threshold(dropout_p)


def electra_15_loss(logits_T: Tensor, is_replaced_T: Tensor, positions_M: Tensor) -> Tensor:
    """9. Weight 1 at the masked positions, 0 elsewhere."""
    weights_T = torch.zeros_like(logits_T)
    weights_T[positions_M] = 1.0
    return rtd_loss(logits_T, is_replaced_T, weights_T)


@triton.jit
def _count_kernel(p_flags, p_partial, T, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    b_flags = tl.load(p_flags + o_t, mask=o_t < T, other=0)
    tl.store(p_partial + tl.program_id(0), tl.sum(b_flags.to(tl.int32), 0))


def count_replaced(is_replaced_T: Tensor) -> Tensor:
    """10. A partial sum for each program, then their sum: no two programs write to the same place."""
    programs = triton.cdiv(len(is_replaced_T), 128)
    partial = torch.empty(programs, dtype=torch.int32, device=is_replaced_T.device)
    _count_kernel[(programs,)](is_replaced_T.to(torch.int8), partial, len(is_replaced_T), BLOCK_T=128)
    return partial.sum()
