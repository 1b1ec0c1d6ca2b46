"""Packed batches: a `TokenBatch` holds sequences laid end to end, without padding; a `PretrainBatch` is one whose
masked positions are chosen.

There is no attention mask, and "all tokens" means all `T`. Padded tensors exist only at the boundary, in
`from_padded` and `to_padded`.

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
from electra_kernels.checks import check_ids, check_tensor
from electra_kernels.rng import Seed, seed_tensor
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

    @property
    def first_tokens_N(self) -> Tensor:
        """int64 [N]: row of each sequence's first token, [CLS]; of an empty one at most the last row."""
        return self.cu_seqlens[:-1].long().clamp(max=self.num_tokens - 1)

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


@dataclass(frozen=True)
class PretrainBatch:
    """A batch of original text and its masked positions (`masking.py`).

    The first three fields are the batch. The others place it in a step that is computed in several parts, or in
    fixed shapes; by their defaults it is the whole step.

    In fixed shapes (the engines `static`, `compile` and `graph`; `execution/static_batch.py`) it may hold filling
    tokens and filling sequences, some of them empty. They have weight 0 in `mean_over_tokens`, `mean_over_masked`
    and `mean_over_sequences`. An objective's losses are such means; the contributions of a step's parts then add
    up. A loss in which sequences compete leaves out those whose `sequence_weights_N` is 0.
    """

    tokens: TokenBatch
    """The original sequences."""
    masked_ids_T: Tensor
    """int64 [T]: the ids the generator sees, [MASK] at most of the masked positions."""
    masked_positions_M: Tensor
    """int64 [M]: which of the T tokens are masked, ascending, without duplicates."""
    first_token: int | Tensor = 0
    """Index of this part's first token in the whole step's batch (see `rng`: `first_row`)."""
    first_masked: int | Tensor = 0
    """Index of this part's first masked position among those of the whole step's batch."""
    token_share: float | Tensor = 1.0
    """This part's tokens / tokens of the whole step, so that the parts' losses add up to the step's means."""
    masked_share: float | Tensor = 1.0
    """This part's masked positions / those of the whole step."""
    sequence_share: float | Tensor = 1.0
    """This part's sequences / those of the whole step."""
    token_weights_T: Tensor | None = None
    """Float [T], sums to 1; None: 1/T each. Filling tokens (`execution/static_batch.py`) have 0."""
    masked_weights_M: Tensor | None = None
    """Float [M], sums to 1: the same for the masked positions."""

    @property
    def target_ids_M(self) -> Tensor:
        """int64 [M]: the original token ids at the masked positions."""
        return self.tokens.input_ids_T[self.masked_positions_M]

    @property
    def first_tokens_N(self) -> Tensor:
        """int64 [N]: row of each sequence's first token, [CLS]; of an empty filling sequence the last row."""
        return self.tokens.first_tokens_N

    @property
    def sequence_weights_N(self) -> Tensor:
        """Float [N], sums to 1: the same for each of the batch's own sequences, 0 for filling ones."""
        own_N = (self.tokens.lengths > 0).float()
        if self.token_weights_T is not None:
            own_N = own_N * (self.token_weights_T[self.first_tokens_N] > 0)
        return own_N / own_N.sum()

    def counted_tokens(self) -> Tensor:
        """Float scalar on the device: the number of tokens with a weight above 0."""
        ids_T, weights_T = self.tokens.input_ids_T, self.token_weights_T
        if weights_T is None:
            return ids_T.new_full((), len(ids_T), dtype=torch.float32)
        return (weights_T > 0).sum().float()

    def mean_over_tokens(self, values_T: Tensor) -> Tensor:
        """Scalar: this part's contribution to the mean over the step's tokens."""
        return _mean(values_T, self.token_weights_T) * self.token_share

    def mean_over_masked(self, values_M: Tensor) -> Tensor:
        """Scalar: this part's contribution to the mean over the step's masked positions."""
        return _mean(values_M, self.masked_weights_M) * self.masked_share

    def mean_over_sequences(self, values_N: Tensor) -> Tensor:
        """Scalar: this part's contribution to the mean over the step's sequences."""
        return (values_N * self.sequence_weights_N).sum() * self.sequence_share

    def seeds(self, seed: Seed) -> tuple[Tensor, Tensor]:
        """`seed` for randomness per token (dropout), and for randomness per masked position (draws)."""
        device = self.tokens.input_ids_T.device
        return _first_row(seed, self.first_token, device), _first_row(seed, self.first_masked, device)

    def to(self, device: torch.device | str) -> PretrainBatch:
        """The batch on `device`."""
        moved = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, tokens=self.tokens.to(device), **moved)


def check_pretrain_batch(batch: object) -> None:
    """Raises ValueError unless `batch` is a PretrainBatch whose tensors fit together. Values are checked on a CPU
    only, and nothing is checked while torch.compile traces."""
    if torch.compiler.is_compiling():
        return
    if not isinstance(batch, PretrainBatch):
        raise ValueError(
            f"batch: expected a PretrainBatch (masking.mask_tokens makes one), got {type(batch).__name__}"
        )
    check_packed(batch.tokens)
    positions_M, ids_T = batch.masked_positions_M, batch.tokens.input_ids_T
    check_tensor("input_ids_T", ids_T, (None,), (torch.int64,))
    check_tensor("masked_ids_T", batch.masked_ids_T, (len(ids_T),), (torch.int64,), ids_T.device)
    check_tensor("masked_positions_M", positions_M, (None,), (torch.int64,), ids_T.device)
    filled_up = batch.masked_weights_M is not None  # filling positions have weight 0 and may repeat
    check_ids("masked_positions_M", positions_M, len(ids_T), unique=not filled_up)


def _mean(values_R: Tensor, weights_R: Tensor | None) -> Tensor:
    if not len(values_R):  # a mean of nothing is NaN
        return values_R.sum()
    return values_R.mean() if weights_R is None else (values_R * weights_R).sum()


def _first_row(seed: Seed, first_row: int | Tensor, device: torch.device) -> Tensor:
    """`seed` in the form that kernels on `device` read, with rows counted from `first_row`."""
    key = seed_tensor(seed, device)[0]
    # `new_full` passes the number with the launch: nothing is copied from the host, and CUDA graphs capture it.
    return torch.stack((key, first_row if isinstance(first_row, Tensor) else key.new_full((), first_row)))
