"""Packed batches: a `TokenBatch` holds sequences laid end to end, without padding.

There is no attention mask, and "all tokens" means all `T`. (Steps in fixed shapes append filling sequences of
weight 0 after the batch's own: `execution/static_batch.py`, `execution/filling.py`.)
Padded tensors exist only at the boundary, in `from_padded` and `to_padded`.

    sequences       [CLS]  a   b  [SEP]   [CLS]  c  [SEP]
    input_ids_T       2   17  23    3       2   41    3          T = 7 tokens
    cu_seqlens        0                     4             7      where each sequence starts, and the end
    position_ids_T    0    1   2    3       0    1    2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """N sequences of T tokens in all."""

    input_ids_T: Tensor
    """int64 [T]: token ids."""
    segment_ids_T: Tensor
    """int64 [T]: 0 for the first segment of a pair, 1 for the second."""
    position_ids_T: Tensor
    """int64 [T]: position in its own sequence, from 0."""
    cu_seqlens: Tensor
    """int32 [N + 1]: sequence n holds tokens cu_seqlens[n] to cu_seqlens[n + 1]."""
    max_seqlen: int
    """Length of the longest sequence; on the host, because kernels choose their code path by it."""

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids_T)

    @property
    def lengths(self) -> Tensor:
        """int32 [N]: tokens per sequence."""
        return self.cu_seqlens.diff()

    def with_ids(self, input_ids_T: Tensor) -> TokenBatch:
        """The same sequences with other token ids."""
        return replace(self, input_ids_T=input_ids_T)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        """The batch on `device`. With `non_blocking`, copies to a GPU go through pinned memory: from pageable
        memory they would wait for the GPU's pending work."""
        pin = non_blocking and torch.device(device).type == "cuda" and self.input_ids_T.device.type == "cpu"
        moved: dict[str, Any] = {
            name: (value.pin_memory() if pin else value).to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def split(self) -> list[Tensor]:
        """The token ids of each sequence."""
        return list(self.input_ids_T.split(self.lengths.tolist()))


def check_packed(batch: object) -> None:
    """Raises ValueError unless `batch` is a TokenBatch: models of other libraries take padded tensors."""
    if not isinstance(batch, TokenBatch):
        raise ValueError(
            f"batch: expected a TokenBatch (packing.pack, or packing.from_padded of a padded batch), "
            f"got {type(batch).__name__}"
        )


def pack(sequences: Sequence[Sequence[int]], segments: Sequence[Sequence[int]] | None = None) -> TokenBatch:
    """Packs lists of token ids (and of segment ids, by default all 0) into one TokenBatch, on the CPU.

    Raises:
        ValueError: a single flat list; values that are not integers; segments whose lengths differ from the
            sequences'.
    """
    flat, lengths = _flat("sequences", sequences)
    if segments is None:
        return from_lengths(flat, torch.zeros_like(flat), lengths)
    segment_ids, of_segments = _flat("segments", segments)
    if of_segments != lengths:
        raise ValueError("segments: expected one id for every token of every sequence")
    return from_lengths(flat, segment_ids, lengths)


def _flat(name: str, lists: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """int64 [T]: the ids of all sequences; and the sequences' lengths."""
    lists = list(lists)
    try:
        lengths = [len(ids) for ids in lists]
    except TypeError:
        raise ValueError(
            f"{name}: expected a list of ids for every sequence, got a list of "
            f"{'ids' if isinstance(lists[0], int) else type(lists[0]).__name__}"
        ) from None
    values = [i for ids in lists for i in ids]
    try:
        flat = torch.tensor(values, device="cpu") if values else torch.zeros(0, dtype=torch.int64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected lists of integers ({error})") from None
    if flat.is_floating_point() or flat.is_complex() or flat.dim() != 1:
        raise ValueError(f"{name}: expected lists of integers, got {values[0]!r:.60}, ...")
    return flat.long(), lengths


def from_lengths(input_ids_T: Tensor, segment_ids_T: Tensor, lengths: Sequence[int] | np.ndarray) -> TokenBatch:
    """Builds a TokenBatch, on the ids' device, from flat ids and the sequences' lengths (on the host)."""
    lengths_N = torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
    cu_seqlens = torch.nn.functional.pad(lengths_N.cumsum(0), (1, 0))
    positions = torch.arange(len(input_ids_T), device="cpu") - cu_seqlens[:-1].repeat_interleave(lengths_N)
    longest, device = int(lengths_N.max()) if len(lengths_N) else 0, input_ids_T.device
    return TokenBatch(
        input_ids_T, segment_ids_T, positions.to(device), cu_seqlens.to(device, torch.int32), longest
    )


def from_padded(
    input_ids_NS: Tensor, attention_mask_NS: Tensor, segment_ids_NS: Tensor | None = None
) -> TokenBatch:
    """Packs a padded batch as other libraries have it (mask 1 = token, 0 = padding), on its device.

    Raises:
        ValueError: ids that are not a matrix; a mask or segment ids of another shape; a row without a token.
    """
    if not isinstance(input_ids_NS, Tensor) or input_ids_NS.dim() != 2:
        got = list(input_ids_NS.shape) if isinstance(input_ids_NS, Tensor) else type(input_ids_NS).__name__
        raise ValueError(f"input_ids_NS: expected a tensor of shape [N, S], got {got}")
    segments = torch.zeros_like(input_ids_NS) if segment_ids_NS is None else segment_ids_NS
    for name, other in (("attention_mask_NS", attention_mask_NS), ("segment_ids_NS", segments)):
        if not isinstance(other, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(other).__name__}")
        if other.shape != input_ids_NS.shape:
            raise ValueError(f"{name}: expected shape {list(input_ids_NS.shape)}, got {list(other.shape)}")
    keep = attention_mask_NS.bool()
    lengths = keep.sum(1).tolist()
    if 0 in lengths:  # packed, nothing would be left of that row
        raise ValueError(f"attention_mask_NS: expected a token in every row, row {lengths.index(0)} has none")
    return from_lengths(input_ids_NS[keep], segments[keep], lengths)


def to_padded(values_T: Tensor, batch: TokenBatch, fill: float = 0) -> Tensor:
    """Pads per-token values [T, ...] to [N, S, ...], with `fill` where there is no token."""
    shape = (batch.num_sequences, batch.max_seqlen, *values_T.shape[1:])
    padded = values_T.new_full(shape, fill)
    rows_T = torch.repeat_interleave(batch.lengths.long())
    padded.flatten(0, 1)[rows_T * batch.max_seqlen + batch.position_ids_T] = values_T
    return padded
