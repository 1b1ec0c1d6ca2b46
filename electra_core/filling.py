"""Filling sequences, so that batches have one of a few numbers of tokens.

On a CPU that is fast at bf16 oneDNN generates code for every new shape of a bf16 product, 1 to 3 ms each. The
batches of fine-tuning and prediction hold as many tokens as their texts have, nearly every time another number.
Filled up to the next of `SIZES_PER_OCTAVE` sizes between a power of two and the next one, they cost 3% more to
multiply and need new code only now and then.

What fills up is a sequence behind the batch's own: attention stays within a sequence, and no token of the batch
moves to another row, which decides what dropout draws. Whoever fills cuts the rows behind the batch's own off
again, so results and gradients change by rounding at most. (Pre-training does the same with all of a step's
shapes: `static_batch.py`.)
"""

from __future__ import annotations

import torch
from electra_kernels.fast_bf16 import has_fast_bf16
from torch import Tensor

from electra_core.packing import TokenBatch

SIZES_PER_OCTAVE = 16


def filled(batch: TokenBatch) -> TokenBatch:
    """The batch with sequences of padding words behind its own, `filled_size` tokens in all."""
    tokens, longest = batch.num_tokens, max(1, batch.max_seqlen)
    filling = filled_size(tokens) - tokens
    if not filling:
        return batch
    positions = torch.arange(filling, device=batch.input_ids_T.device) % longest
    starts = torch.arange(longest, filling + longest, longest, device=batch.cu_seqlens.device) + tokens
    zeros = torch.zeros_like(positions)
    return TokenBatch(
        torch.cat([batch.input_ids_T, zeros]),
        torch.cat([batch.segment_ids_T, zeros]),
        torch.cat([batch.position_ids_T, positions]),
        torch.cat([batch.cu_seqlens, starts.clamp(max=tokens + filling).to(batch.cu_seqlens.dtype)]),
        batch.max_seqlen,
    )


def filled_size(tokens: int) -> int:
    """The next size at or above `tokens`: those up to `SIZES_PER_OCTAVE` are all sizes, then steps double."""
    step = max(1, (1 << max(0, tokens - 1).bit_length()) // (2 * SIZES_PER_OCTAVE))
    return -(-tokens // step) * step


def wants_filling(tensor: Tensor) -> bool:
    """Whether products are done in bf16 on a CPU that is fast at it; not while torch.compile traces."""
    return (
        tensor.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.compiler.is_compiling()
        and has_fast_bf16()
    )
