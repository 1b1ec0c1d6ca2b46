"""Which positions are masked, and what the generator sees there.

Of an example of n tokens ([CLS] and [SEP] counted), max(1, min(max_predictions, round(fraction n))) are
chosen, uniformly and without replacement, among those that are not special. 85% of the chosen become
[MASK], 15% keep their word; none becomes a random word. That is the original's code; by the paper's section 2
all become [MASK], and of 80/10/10 it speaks as BERT's. All of them are predicted, sampled and replaced alike.

The choice is a pure function of (seed, index of the example, position in the example).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from electra_kernels.rng import fold
from torch import Tensor

from electra_core.config import PretrainConfig
from electra_core.electra import PretrainBatch
from electra_core.host_random import philox_words
from electra_core.packing import TokenBatch
from electra_core.tokenizer import Tokenizer

KEEP_PROBABILITY = 0.15
MASKING_STREAM = 3
"""What the run's seed is folded with for the masks; `examples.py` has 0 to 2."""
NEVER = 1 << 60  # sorts behind every 32-bit random number, with 24 bits of position behind it


def mask(
    tokens: TokenBatch, indices: Sequence[int], tokenizer: Tokenizer, config: PretrainConfig, seed: int
) -> PretrainBatch:
    """`mask_tokens` as a run's configuration and its corpus's tokenizer say."""
    return mask_tokens(
        tokens,
        indices,
        seed=seed,
        mask_id=tokenizer.mask_id,
        special_ids=[tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id],
        fraction=config.mask_fraction,
        max_predictions=config.max_predictions,
    )


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
        tokens: N examples, packed, on the CPU.
        indices: the N examples' numbers in the run; each has masks of its own.
        seed: of the run.
        mask_id: id of [MASK].
        special_ids: ids that are never chosen ([CLS], [SEP], [MASK]).
        fraction, max_predictions: see the header.

    Raises:
        ValueError: other than N indices; a fraction outside [0, 1]; no special ids.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction: expected a number in [0, 1], got {fraction}")
    if not len(special_ids):
        raise ValueError(
            "special_ids: expected those of [CLS], [SEP] and [MASK], which are never chosen, got none"
        )
    if len(indices) != tokens.num_sequences:
        raise ValueError(f"indices: expected one for each of {tokens.num_sequences} sequences, got {len(indices)}")
    # A call gives four words for every position: the first is its place in the order of choice, the second decides
    # between [MASK] and keeping the word, the other two are not used.
    words = philox_words(fold(seed, MASKING_STREAM), tokens.max_seqlen, np.asarray(indices, dtype=np.int64))
    order_NS, keep_NS, _, _ = torch.from_numpy(words.view(np.int64))

    counts_N = masked_counts(tokens.lengths.long(), fraction, max_predictions)
    row_M, place_M = _smallest(order_NS, _candidates(tokens, special_ids), counts_N).nonzero(as_tuple=True)
    masked_positions_M = tokens.cu_seqlens.long()[row_M] + place_M
    becomes_mask_M = keep_NS[row_M, place_M] >= int(KEEP_PROBABILITY * 2**32)
    masked_ids_T = tokens.input_ids_T.index_fill(0, masked_positions_M[becomes_mask_M], mask_id)
    return PretrainBatch(tokens, masked_ids_T, masked_positions_M)


def masked_counts(lengths_N: Tensor, fraction: float, max_predictions: int) -> Tensor:
    """int64 [N]: how many positions are masked in sequences of these lengths; the product is fp32, as in the
    original, where 0.15 x 190 is 28.500002 and gives 29."""
    return (lengths_N * fraction).round().long().clamp(max=max_predictions).clamp(min=1)


def _candidates(tokens: TokenBatch, special_ids: Sequence[int]) -> Tensor:
    """bool [N, S]: where a word stands that may be masked."""
    is_candidate_T = tokens.input_ids_T != special_ids[0]
    for special in special_ids[1:]:
        is_candidate_T &= tokens.input_ids_T != special
    is_there_NS = torch.arange(tokens.max_seqlen) < tokens.lengths[:, None]
    is_candidate_NS = is_there_NS.numpy()  # NumPy fills in by a mask several times as fast as torch
    is_candidate_NS[is_candidate_NS] = is_candidate_T.numpy()
    return torch.from_numpy(is_candidate_NS)


def _smallest(order_NS: Tensor, is_candidate_NS: Tensor, counts_N: Tensor) -> Tensor:
    """bool [N, S]: the counts_N[n] smallest among the candidates of each row n, or all if there are fewer."""
    longest = order_NS.shape[1]
    # With the position behind it no number occurs twice in a row, so ties never depend on how one sorts.
    order_NS = torch.where(is_candidate_NS, order_NS << 24 | torch.arange(longest), NEVER)
    sorted_NS = torch.from_numpy(np.sort(order_NS.numpy(), axis=1))  # several times as fast as torch's
    last_N1 = sorted_NS.gather(1, counts_N.clamp(max=longest)[:, None] - 1)
    return (order_NS <= last_N1) & is_candidate_NS
