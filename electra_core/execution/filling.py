"""Filling sequences, which round a batch's number of tokens up to one of a few sizes.

On a CPU that is fast at bf16, oneDNN generates code for every new shape of a bf16 product, 1 to 3 ms each. The
batches of fine-tuning and prediction hold as many tokens as their texts have, nearly always a new number.
Filled up to the next of `SIZES_PER_OCTAVE` sizes between one power of two and the next, they cost 3% more to
multiply and rarely need new code.

The filling sequences follow the batch's own: attention stays within a sequence, and no token of the batch moves to
another row, on which dropout depends. The caller cuts the filling rows off again, so results and gradients change
by rounding at most. (Pre-training does the same with all of a step's shapes: `static_batch.py`.)
"""

from __future__ import annotations

import torch
from electra_kernels.fast_bf16 import has_fast_bf16
from torch import Tensor

from electra_core.packing import TokenBatch

SIZES_PER_OCTAVE = 16


def filled(batch: TokenBatch) -> TokenBatch:
    """The batch followed by sequences of padding tokens, `filled_size` tokens in all."""
    tokens, longest = batch.num_tokens, max(1, batch.max_seqlen)
    filling = filled_size(tokens) - tokens
    if not filling:
        return batch
    ids_T, segments_T, positions_T = (batch.input_ids_T.new_empty(tokens + filling) for _ in range(3))
    ends = batch.cu_seqlens.new_empty(len(batch.cu_seqlens) + -(-filling // longest))
    whole = TokenBatch(ids_T, segments_T, positions_T, ends, batch.max_seqlen)
    fill_up(whole, batch)
    return whole


def fill_up(target: TokenBatch, batch: TokenBatch) -> None:
    """Writes `batch` into `target`, followed by sequences of padding tokens that use up the tokens of `target`.
    Those have the maximum length; the last may be shorter, and any sequences left over are empty."""
    tokens, sequences, longest = batch.num_tokens, batch.num_sequences, max(1, target.max_seqlen)
    device = target.input_ids_T.device
    target.input_ids_T[:tokens], target.input_ids_T[tokens:] = batch.input_ids_T, 0
    target.segment_ids_T[:tokens], target.segment_ids_T[tokens:] = batch.segment_ids_T, 0
    target.position_ids_T[:tokens] = batch.position_ids_T
    target.position_ids_T[tokens:] = torch.arange(target.num_tokens - tokens, device=device) % longest
    target.cu_seqlens[: sequences + 1] = batch.cu_seqlens
    ends = tokens + longest * torch.arange(1, target.num_sequences - sequences + 1, device=device)
    target.cu_seqlens[sequences + 1 :] = ends.clamp(max=target.num_tokens)


def filled_size(tokens: int) -> int:
    """The next size at or above `tokens`: up to 2 `SIZES_PER_OCTAVE` every number is one, then steps double."""
    step = max(1, (1 << max(0, tokens - 1).bit_length()) // (2 * SIZES_PER_OCTAVE))
    return -(-tokens // step) * step


def wants_filling(tensor: Tensor) -> bool:
    """Whether products are done in bf16 on a CPU that is fast at it; False while torch.compile traces."""
    return (
        tensor.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.compiler.is_compiling()
        and has_fast_bf16()
    )
