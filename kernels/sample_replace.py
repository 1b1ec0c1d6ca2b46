"""Draw a token for every masked position and put it into the batch (paper section 2, the generator's step).

    x̂_m ~ softmax(logits_m / temperature),   corrupted[position_m] = x̂_m,   replaced iff x̂_m ≠ original

**The exact draw, in two levels.** The vocabulary is split into tiles of `TILE_V` = 128 tokens (the last may be
shorter). With weights e_v = exp((logit_v - max) / temperature), tile sums W_t = Σ_{v in t} e_v and total W,

    1. tile t is drawn by inverse CDF from W_t / W with the uniform u_tile,
    2. token v of that tile is drawn by inverse CDF from e_v / W_t with a second, independent uniform u_word.

This is exact because P(v) = P(t) · P(v | t) = (W_t / W) · (e_v / W_t) = e_v / W. It takes one random call per row
instead of V, and stores M x V/128 sums instead of M x V noise values. A tile's sum does not depend on the order
in which tiles are visited, so the vocabulary can be split over programs in any way. (The alternative, a reservoir
over tiles, takes a random number per tile and ties the draw to the visiting order.)

**Random numbers.** One Philox call per row, with counter row m (+ `first_row` of the seed), column 0, plane 0 and
the given stream. Of its four 32-bit words, 0 and 1 make u_tile, 2 and 3 make u_word, each a float64 strictly
inside (0, 1) with 52 random bits. Cumulative sums are float64: fp32 would under-sample the far tail.

**Edge cases.** A token of weight 0 (logit -inf) is never drawn. A row that is not a distribution (it has a NaN or
a +inf, or only -inf) draws the id -1; its position keeps the original token and counts as original.
"""

from __future__ import annotations

from typing import NamedTuple

from electra_kernels import sample_replace_reference as reference
from electra_kernels.checks import FLOATS, INTEGERS, check_ids, check_temperature, check_tensor
from electra_kernels.dispatch import use_triton
from electra_kernels.rng import Seed, seed_tensor
from torch import Tensor

TILE_V = reference.TILE_V


class SampledTokens(NamedTuple):
    """What `sample_and_replace` returns."""

    corrupted_ids_T: Tensor
    """`input_ids_T` with the drawn tokens at the masked positions; same dtype."""
    is_replaced_T: Tensor
    """bool: the corrupted id differs from the original one."""
    sampled_ids_M: Tensor
    """int64: the draws; -1 for a row of logits that is not a distribution."""


def sample_and_replace(
    logits_MV: Tensor,
    input_ids_T: Tensor,
    masked_positions_M: Tensor,
    *,
    seed: Seed,
    stream: int = 0,
    temperature: float = 1.0,
) -> SampledTokens:
    """Exact draws from softmax(logits / temperature), written into a copy of the batch; not differentiable.

    Args:
        logits_MV: fp32, bf16, fp16 or fp64; -inf marks tokens that must not be drawn.
        input_ids_T: int64 or int32, the *original* ids (not those with [MASK] in them).
        masked_positions_M: int64 or int32, distinct positions in [0, T).
        seed: int, or int64 tensor `[key]` or `[key, first_row]` on the logits' device (see `rng`).
        stream: distinguishes uses of one `seed`; a static int.
        temperature: finite and > 0; small values approach argmax, large ones the uniform distribution.

    Raises:
        ValueError: wrong shape, dtype, device or temperature; positions that repeat or lie outside the batch
            (on a GPU checked only with ELECTRA_KERNELS_DEBUG=1, because reading them waits for the device).
    """
    check_tensor("logits_MV", logits_MV, (None, None), FLOATS)
    device = logits_MV.device
    check_tensor("input_ids_T", input_ids_T, (None,), INTEGERS, device)
    check_tensor("masked_positions_M", masked_positions_M, (len(logits_MV),), INTEGERS, device)
    check_ids("masked_positions_M", masked_positions_M, len(input_ids_T), unique=True)
    check_temperature(temperature)
    key = seed_tensor(seed, device)
    arguments = (logits_MV.detach(), input_ids_T, masked_positions_M, key, stream, temperature)
    if use_triton(logits_MV):
        from electra_kernels import sample_replace_triton

        return SampledTokens(*sample_replace_triton.sample_and_replace(*arguments))
    return SampledTokens(*reference.sample_and_replace(*arguments))
