"""Batches of a few fixed shapes, for steps that are captured once and replayed.

A step's number of tokens T and of masked positions M differ from step to step. Here both are filled up: M to the
most that N sequences can have, T to the next of at most `BUCKETS` sizes. What fills up

- tokens: sequences of padding words behind the batch's own; attention stays within a sequence, so that they
  reach nobody, and no token of the batch moves to another row (rows decide what dropout draws);
- masked positions: rows that all name the last token, which is always a filling one

has weight 0 in every mean, hence no gradient. Losses and gradients are those of the batch as it was, up to the
order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from electra_core.config import PretrainConfig
from electra_core.electra import PretrainBatch
from electra_core.filling import fill_up
from electra_core.input_buffers import InputBuffers
from electra_core.packing import TokenBatch, pack

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

    def inputs(self, parts: Sequence[PretrainBatch], pinned: bool) -> StaticInputs:
        """Buffers that hold `parts`; nothing is in them yet."""
        return StaticInputs(self.fit(parts), len(parts), pinned=pinned)

    def in_vain(self, parts: Sequence[PretrainBatch], pinned: bool) -> StaticInputs:
        """The largest step in as many parts, filled so that it changes nothing."""
        inputs = StaticInputs(self.largest(len(parts)), len(parts), pinned=pinned)
        inputs.fill_in_vain()
        return inputs

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


class StaticInputs(InputBuffers):
    """The parts of a pre-training step's batch, each a `PretrainBatch` of one shape.

    Args:
        shape: of each part.
        parts: how many there are.
    """

    def __init__(self, shape: Shape, parts: int, device: torch.device | str = "cpu", pinned: bool = False):
        super().__init__(shape, [_sizes(shape)] * parts, device, pinned)
        self.parts = [_views(integers, floats, shape) for integers, floats in self.pieces]

    def on(self, device: torch.device) -> StaticInputs:
        """See `InputBuffers`."""
        return StaticInputs(self.shape, len(self.parts), device)

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
            fill_up(part.tokens, pack([]))
            part.masked_positions_M.copy_(torch.arange(self.shape.masked))


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
    fill_up(views.tokens, part.tokens)
    views.masked_ids_T[:tokens], views.masked_ids_T[tokens:] = part.masked_ids_T, 0
    positions_M = views.masked_positions_M
    positions_M[:masked], positions_M[masked:] = part.masked_positions_M, shape.tokens - 1
    assert views.token_weights_T is not None and views.masked_weights_M is not None
    for weights, count in ((views.token_weights_T, tokens), (views.masked_weights_M, masked)):
        weights[:count], weights[count:] = 1.0 / count, 0.0
    for name in ("first_token", "first_masked", "token_share", "masked_share"):
        getattr(views, name).fill_(getattr(part, name))
