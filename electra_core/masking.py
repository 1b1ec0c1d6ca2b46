"""Which positions are masked, and what the generator sees there.

Of an example of n tokens ([CLS] and [SEP] counted), max(1, min(max_predictions, round(fraction n))) are
chosen, uniformly and without replacement, among those that are not special. 85% of the chosen become
[MASK], 15% keep their word; none becomes a random word (the original's code; the paper's text has BERT's
80/10/10 in one place). All of them are predicted, sampled and replaced alike.

The choice is a pure function of (seed, index of the example, position in the example).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from electra_kernels.rng import fold, philox, seed_tensor
from torch import Tensor

from electra_core.electra import PretrainBatch
from electra_core.packing import TokenBatch, to_padded

KEEP_PROBABILITY = 0.15
NEVER = 1 << 40  # sorts behind every 32-bit random number


def mask_tokens(
    tokens: TokenBatch,
    indices: Sequence[int],
    *,
    seed: int,
    mask_id: int,
    special_ids: Sequence[int],
    fraction: float,
    max_predictions: int,
) -> PretrainBatch:
    """Choose the masked positions of a batch.

    Args:
        tokens: the examples `indices`, packed.
        seed: of the run.
        mask_id: id of [MASK].
        special_ids: ids that are never chosen ([CLS], [SEP], [MASK]).
        fraction, max_predictions: see the header.
    """
    lengths = tokens.lengths.long()
    index_T = torch.as_tensor(indices, dtype=torch.int64).repeat_interleave(lengths)
    key = seed_tensor(fold(seed, 3))
    order_T, keep_T, _, _ = philox(key, tokens.position_ids_T, index_T & 0xFFFFFFFF, 0, index_T >> 32)

    order_T = order_T.masked_fill(torch.isin(tokens.input_ids_T, torch.tensor(special_ids)), NEVER)
    chosen_T = _smallest(order_T, tokens, masked_counts(lengths, fraction, max_predictions))
    becomes_mask_T = chosen_T & (keep_T >= int(KEEP_PROBABILITY * 2**32))
    masked_ids_T = tokens.input_ids_T.masked_fill(becomes_mask_T, mask_id)
    return PretrainBatch(tokens, masked_ids_T, chosen_T.nonzero().squeeze(-1))


def masked_counts(lengths_N: Tensor, fraction: float, max_predictions: int) -> Tensor:
    """int64 [N]: how many positions are masked in sequences of these lengths."""
    return (lengths_N * fraction).round().long().clamp(max=max_predictions).clamp(min=1)


def _smallest(order_T: Tensor, tokens: TokenBatch, counts_N: Tensor) -> Tensor:
    """bool [T]: the counts_N[n] smallest of each sequence n, NEVER excluded."""
    order_NS = to_padded(order_T, tokens, fill=NEVER)
    rank_NS = order_NS.argsort(dim=1).argsort(dim=1)
    chosen_NS = (rank_NS < counts_N[:, None]) & (order_NS < NEVER)
    sequence_T = torch.repeat_interleave(tokens.lengths.long())
    return chosen_NS[sequence_T, tokens.position_ids_T]
