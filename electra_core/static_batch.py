"""Batches of a few fixed shapes, for steps that are captured once and replayed.

A step's number of tokens T and of masked positions M differ from step to step. Here both are filled up: M to the
most that N sequences can have, T to the next of at most `BUCKETS` sizes. What fills up

- tokens: sequences of padding words behind the batch's own; attention stays within a sequence, so that they
  reach nobody, and no token of the batch moves to another row (rows decide what dropout draws);
- masked positions: rows that all name the last token, which is always a filling one

has weight 0 in every mean, hence no gradient. Losses and gradients are those of the batch as it was, up to the
order of sums.

Everything that a step reads lies in two flat buffers, integers and floats, so that two copies bring a step's
whole input to the device: batch, seed and learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from electra_core.config import PretrainConfig
from electra_core.electra import PretrainBatch
from electra_core.packing import TokenBatch

BUCKETS = 32
"""Sizes that T is rounded up to, at most, and so the most graphs a run captures. Half a bucket, 1.6% of a full
batch, is wasted on average."""


class Shape(NamedTuple):
    """Sizes of one part of a step's batch; parts of a step have the same."""

    tokens: int
    """T, filling tokens included."""
    sequences: int
    """N, filling sequences included (some of them may be empty)."""
    masked: int
    """M, filling rows included."""
    max_seqlen: int
    """Longest sequence that can occur."""


class Shapes:
    """The shapes of a run's batches.

    Args:
        sequences: in each part.
        max_length: tokens of a sequence at most.
        max_predictions: masked positions of a sequence at most.
    """

    def __init__(self, sequences: int, max_length: int, max_predictions: int):
        self.sequences, self.max_length, self.max_predictions = sequences, max_length, max_predictions
        self.bucket = -(-sequences * max_length // BUCKETS)

    @classmethod
    def of_run(cls, config: PretrainConfig, processes: int = 1) -> Shapes:
        """Those of the parts that each of `processes` computes in the run that `config` describes."""
        sequences = config.batch_size // (config.accumulate * processes)
        return cls(sequences, config.max_length, config.max_predictions)

    def fit(self, parts: Sequence[PretrainBatch]) -> Shape:
        """The smallest shape that holds each of `parts` and at least one filling token."""
        return self._shape(max(part.tokens.num_tokens for part in parts) + 1, len(parts))

    def largest(self, parts: int) -> Shape:
        """That of a step in which every sequence is as long as it can be."""
        return self._shape(self.sequences * self.max_length + 1, parts)

    def _shape(self, tokens: int, parts: int) -> Shape:
        # One part leaves less than a bucket free; the shorter of several may leave nearly everything.
        filling = -(-self.bucket // self.max_length) + (self.sequences if parts > 1 else 0)
        masked = self.sequences * self.max_predictions
        return Shape(-(-tokens // self.bucket) * self.bucket, self.sequences + filling, masked, self.max_length)


class StaticInputs:
    """What a step of one shape reads: the parts of its batch, seed and learning rate, as views of two buffers.

    Args:
        shape: of each part.
        parts: how many there are.
        device: where the buffers lie.
        pinned: host memory from which a copy to a GPU does not hold up the host.
    """

    def __init__(self, shape: Shape, parts: int, device: torch.device | str = "cpu", pinned: bool = False):
        integers, floats = _sizes(shape)
        self.shape, self.pinned = shape, pinned
        self.integers = torch.empty(parts * integers + 1, dtype=torch.int64, device=device, pin_memory=pinned)
        self.floats = torch.empty(parts * floats + 1, dtype=torch.float32, device=device, pin_memory=pinned)
        self.seed, self.rate = self.integers[-1:], self.floats[-1]
        self.parts = [
            _views(i, f, shape)
            for i, f in zip(self.integers[:-1].view(parts, -1), self.floats[:-1].view(parts, -1))
        ]

    def fill(self, parts: Sequence[PretrainBatch], seed: int, rate: float) -> None:
        """Write a step's input; on the host.

        Raises:
            ValueError: a part that does not fit the shape.
        """
        self.seed.fill_(seed)
        self.rate.fill_(rate)
        for views, part in zip(self.parts, parts, strict=True):
            _fill(views, part, self.shape)

    def fill_in_vain(self) -> None:
        """Write a step that has no text and a loss that is NaN, so that nothing is updated."""
        self.integers.zero_()
        self.floats.fill_(math.nan)
        self.rate.zero_()
        for part in self.parts:
            ends = self.shape.max_seqlen * torch.arange(self.shape.sequences + 1)
            part.tokens.cu_seqlens.copy_(ends.clamp(max=self.shape.tokens))
            part.tokens.position_ids_T.copy_(torch.arange(self.shape.tokens) % self.shape.max_seqlen)
            part.masked_positions_M.copy_(torch.arange(self.shape.masked))

    def copy_(self, other: StaticInputs) -> None:
        """Take over the values of `other`; from pinned memory without waiting for the copy."""
        self.integers.copy_(other.integers, non_blocking=True)
        self.floats.copy_(other.floats, non_blocking=True)


def _sizes(shape: Shape) -> tuple[int, int]:
    """Integers and floats of one part; `_views` cuts them up in this order."""
    return 4 * shape.tokens + shape.masked + shape.sequences + 1 + 2, shape.tokens + shape.masked + 2


def _views(integers: Tensor, floats: Tensor, shape: Shape) -> PretrainBatch:
    tokens, sequences, masked, longest = shape
    *text, positions_M, cu_seqlens, first = integers.split([tokens] * 4 + [masked, sequences + 1, 2])
    input_ids_T, segment_ids_T, position_ids_T, masked_ids_T = text
    token_weights_T, masked_weights_M, shares = floats.split([tokens, masked, 2])
    return PretrainBatch(
        TokenBatch(input_ids_T, segment_ids_T, position_ids_T, cu_seqlens, longest),
        masked_ids_T,
        positions_M,
        first_token=first[0],
        first_masked=first[1],
        token_share=shares[0],
        masked_share=shares[1],
        token_weights_T=token_weights_T,
        masked_weights_M=masked_weights_M,
    )


def _fill(views: PretrainBatch, part: PretrainBatch, shape: Shape) -> None:
    tokens, masked, sequences = part.tokens.num_tokens, len(part.masked_positions_M), part.tokens.num_sequences
    filling = shape.tokens - tokens
    room = (shape.sequences - sequences) * shape.max_seqlen
    if not 1 <= filling <= room or masked > shape.masked or part.tokens.max_seqlen > shape.max_seqlen:
        raise ValueError(f"part: {tokens} tokens, {masked} masked, {sequences} sequences do not fit {shape}")
    text = ((views.tokens.input_ids_T, part.tokens.input_ids_T), (views.masked_ids_T, part.masked_ids_T))
    for target_T, source_T in (*text, (views.tokens.segment_ids_T, part.tokens.segment_ids_T)):
        target_T[:tokens], target_T[tokens:] = source_T, 0
    views.tokens.position_ids_T[:tokens] = part.tokens.position_ids_T
    views.tokens.position_ids_T[tokens:] = torch.arange(filling) % shape.max_seqlen
    ends = tokens + shape.max_seqlen * torch.arange(1, shape.sequences - sequences + 1)
    views.tokens.cu_seqlens[: sequences + 1] = part.tokens.cu_seqlens
    views.tokens.cu_seqlens[sequences + 1 :] = ends.clamp(max=shape.tokens)
    positions_M = views.masked_positions_M
    positions_M[:masked], positions_M[masked:] = part.masked_positions_M, shape.tokens - 1
    assert views.token_weights_T is not None and views.masked_weights_M is not None
    for weights, count in ((views.token_weights_T, tokens), (views.masked_weights_M, masked)):
        weights[:count], weights[count:] = 1.0 / count, 0.0
    for name in ("first_token", "first_masked", "token_share", "masked_share"):
        getattr(views, name).fill_(getattr(part, name))
