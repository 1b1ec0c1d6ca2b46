"""Chooses which positions are masked, and what the generator sees there.

Of an example's n tokens ([CLS] and [SEP] included), max(1, min(max_predictions, round(fraction n))) are
chosen, uniformly and without replacement, among those that are not special. 85% of the chosen tokens become
[MASK], 15% stay as they are; none becomes a random token. This is what the original's code does; in the paper's
section 2 all become [MASK], and 80/10/10 is mentioned as BERT's. All chosen positions, masked or kept, are
predicted, sampled and replaced.

The choice is a pure function of (seed, index of the example, position in the example).

Another choice (`pretrain(..., mask=...)`) has the signature of `mask` and the same two properties: it is a pure
function of its arguments, and it masks exactly `masked_counts` positions of each example, or all that are not
special if there are fewer. `pretraining/batches.py` relies on this where it divides a batch, and checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from electra_kernels.rng import fold
from torch import Tensor

from electra_core.config import PretrainConfig
from electra_core.host_random import philox_words
from electra_core.packing import PretrainBatch, TokenBatch, to_padded
from electra_core.tokenizer import Tokenizer

KEEP_PROBABILITY = 0.15
MASKING_STREAM = 3
"""The run's seed is folded with this for the masks; `examples.py` uses 0 to 2."""
NEVER = 1 << 60  # sorts after every key: 32 random bits, then 24 bits of position


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
    """Chooses the masked positions of a batch.

    Args:
        tokens: N examples, packed, on the CPU.
        indices: the N examples' numbers in the run; each has its own masks.
        seed: the run's seed.
        mask_id: id of [MASK].
        special_ids: ids that are never chosen ([CLS], [SEP], [MASK]).
        fraction, max_predictions: see the header.

    Raises:
        ValueError: not exactly N indices; a fraction outside [0, 1]; no special ids.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction: expected a number in [0, 1], got {fraction}")
    if not len(special_ids):
        raise ValueError(
            "special_ids: expected those of [CLS], [SEP] and [MASK], which are never chosen, got none"
        )
    if len(indices) != tokens.num_sequences:
        raise ValueError(f"indices: expected one for each of {tokens.num_sequences} sequences, got {len(indices)}")
    # One call yields four 32-bit words per position: the first orders the positions for the choice, the second
    # decides between [MASK] and keeping the token, the other two are unused.
    words = philox_words(fold(seed, MASKING_STREAM), tokens.max_seqlen, np.asarray(indices, dtype=np.int64))
    order_NS, keep_NS, _, _ = torch.from_numpy(words.view(np.int64))

    counts_N = masked_counts(tokens.lengths.long(), fraction, max_predictions)
    row_M, place_M = _smallest(order_NS, _candidates(tokens, special_ids), counts_N).nonzero(as_tuple=True)
    masked_positions_M = tokens.cu_seqlens.long()[row_M] + place_M
    becomes_mask_M = keep_NS[row_M, place_M] >= int(KEEP_PROBABILITY * 2**32)
    masked_ids_T = tokens.input_ids_T.index_fill(0, masked_positions_M[becomes_mask_M], mask_id)
    return PretrainBatch(tokens, masked_ids_T, masked_positions_M)


def masked_counts(lengths_N: Tensor, fraction: float, max_predictions: int) -> Tensor:
    """int64 [N]: how many positions are masked in sequences of these lengths. The product is fp32, as in the
    original, where 0.15 x 190 is 28.500002 and rounds to 29."""
    return (lengths_N.float() * fraction).round().long().clamp(max=max_predictions).clamp(min=1)


def _candidates(tokens: TokenBatch, special_ids: Sequence[int]) -> Tensor:
    """bool [N, S]: the positions of tokens that may be masked."""
    is_candidate_T = tokens.input_ids_T != special_ids[0]
    for special in special_ids[1:]:
        is_candidate_T &= tokens.input_ids_T != special
    return to_padded(is_candidate_T, tokens, fill=False)


def _smallest(order_NS: Tensor, is_candidate_NS: Tensor, counts_N: Tensor) -> Tensor:
    """bool [N, S]: the counts_N[n] smallest candidates of each row n, or all of them if there are fewer."""
    longest = order_NS.shape[1]
    # With the position in its low bits every key is unique within its row, so no tie depends on the sort.
    order_NS = torch.where(is_candidate_NS, order_NS << 24 | torch.arange(longest, device="cpu"), NEVER)
    sorted_NS = torch.from_numpy(np.sort(order_NS.numpy(), axis=1))  # several times as fast as torch's
    last_N1 = sorted_NS.gather(1, counts_N.clamp(max=longest)[:, None] - 1)
    return (order_NS <= last_N1) & is_candidate_NS


MaskFunction = Callable[[TokenBatch, Sequence[int], Tokenizer, PretrainConfig, int], PretrainBatch]
"""(examples, their numbers, tokenizer, configuration, seed) -> the batch with its masked positions: see `mask`."""


def mask(
    tokens: TokenBatch, indices: Sequence[int], tokenizer: Tokenizer, config: PretrainConfig, seed: int
) -> PretrainBatch:
    """`mask_tokens` with a run's configuration and its corpus's tokenizer."""
    return mask_tokens(
        tokens,
        indices,
        seed=seed,
        mask_id=tokenizer.mask_id,
        special_ids=special_ids(tokenizer),
        fraction=config.mask_fraction,
        max_predictions=config.max_predictions,
    )


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that are never masked: [CLS], [SEP], [MASK]."""
    return [tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]


def check_masked(batch: PretrainBatch, counts_N: Tensor, tokenizer: Tokenizer) -> None:
    """Raises ValueError unless counts_N[n] positions of each sequence n are masked, or, if it has fewer tokens
    that are not special, those."""
    borders = torch.searchsorted(batch.masked_positions_M.contiguous(), batch.tokens.cu_seqlens.long())
    if torch.equal(found_N := borders.diff(), counts_N):
        return
    candidates_N = _candidates(batch.tokens, special_ids(tokenizer)).sum(1)
    if (wrong_R := (found_N != counts_N.minimum(candidates_N)).nonzero()).numel():
        first = int(wrong_R[0])
        raise ValueError(
            f"mask: expected {int(counts_N[first])} masked positions in a sequence of "
            f"{int(batch.tokens.lengths[first])} tokens, ascending, got {int(found_N[first])}; mask exactly "
            "masking.masked_counts(lengths, config.mask_fraction, config.max_predictions)"
        )
