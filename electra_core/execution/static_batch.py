"""Batches of a few fixed shapes, for steps that are captured once and replayed.

The number of tokens T and of masked positions M differ from step to step. Here both are filled up: M to the
maximum of N sequences, T to the next multiple of a `BUCKETS`-th of a full batch.

- Filling tokens are sequences of padding after the batch's own: attention stays within a sequence, so they
  affect no other token, and no token of the batch moves to another row (on which dropout depends).
- Filling masked positions all point to the last token, which is always a filling token.

All have weight 0 in every mean (`PretrainBatch.mean_over_...`), hence no gradient. Losses and gradients are those
of the unfilled batch, up to the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from electra_core.config import PretrainConfig
from electra_core.execution.filling import fill_up
from electra_core.execution.input_buffers import InputBuffers
from electra_core.packing import PretrainBatch, TokenBatch, pack

BUCKETS = 32
"""T is rounded up to a multiple of 1/`BUCKETS` of a full batch. As one token is always filling, a run has at most
one size more, and so at most 33 graphs. On average half a bucket, 1.6% of a full batch, is wasted."""


class Shape(NamedTuple):
    """Sizes of one part of a step's batch; all parts of a step have the same."""

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
        sequences: number of sequences in each part.
        max_length: maximum number of tokens per sequence.
        max_predictions: maximum number of masked positions per sequence.
    """

    def __init__(self, sequences: int, max_length: int, max_predictions: int):
        self.sequences, self.max_length, self.max_predictions = sequences, max_length, max_predictions
        self.bucket = -(-sequences * max_length // BUCKETS)

    @classmethod
    def of_run(cls, config: PretrainConfig, processes: int = 1) -> Shapes:
        """The shapes of the parts that each of `processes` computes in the run configured by `config`."""
        sequences = config.batch_size // (config.accumulate * processes)
        return cls(sequences, config.max_length, config.max_predictions)

    def inputs(self, parts: Sequence[PretrainBatch], pinned: bool) -> StaticInputs:
        """Empty buffers for `parts`."""
        return StaticInputs(self.fit(parts), len(parts), pinned=pinned)

    def in_vain(self, parts: Sequence[PretrainBatch], pinned: bool) -> StaticInputs:
        """Buffers of the largest step in as many parts, filled so that the step changes nothing."""
        inputs = StaticInputs(self.largest(len(parts)), len(parts), pinned=pinned)
        inputs.fill_in_vain()
        return inputs

    def fit(self, parts: Sequence[PretrainBatch]) -> Shape:
        """The smallest shape that holds each of `parts` and at least one filling token."""
        return self._shape(max(part.tokens.num_tokens for part in parts) + 1, len(parts))

    def largest(self, parts: int) -> Shape:
        """The shape of a step in which every sequence has the maximum length."""
        return self._shape(self.sequences * self.max_length + 1, parts)

    def _shape(self, tokens: int, parts: int) -> Shape:
        # A single part leaves less than a bucket to fill; the shorter of several may leave nearly everything.
        filling = -(-self.bucket // self.max_length) + (self.sequences if parts > 1 else 0)
        masked = self.sequences * self.max_predictions
        return Shape(-(-tokens // self.bucket) * self.bucket, self.sequences + filling, masked, self.max_length)


class StaticInputs(InputBuffers):
    """The parts of a pre-training step's batch, each a `PretrainBatch` of the same shape.

    Args:
        shape: the shape of each part.
        parts: the number of parts.
    """

    def __init__(self, shape: Shape, parts: int, device: torch.device | str = "cpu", pinned: bool = False):
        super().__init__(shape, [_sizes(shape)] * parts, device, pinned)
        self.parts = [_views(integers, floats, shape) for integers, floats in self.pieces]

    def on(self, device: torch.device) -> StaticInputs:
        """See `InputBuffers`."""
        return StaticInputs(self.shape, len(self.parts), device)

    def fill(self, parts: Sequence[PretrainBatch], seed: int, rate: float) -> None:
        """Writes a step's input, on the host.

        Raises:
            ValueError: a part that does not fit the shape.
        """
        self.seed.fill_(seed)
        self.rate.fill_(rate)
        for views, part in zip(self.parts, parts, strict=True):
            _fill(views, part, self.shape)

    def fill_in_vain(self) -> None:
        """Writes a step without text whose loss is NaN, so that nothing is updated."""
        self.integers.zero_()
        self.floats.fill_(math.nan)
        self.rate.zero_()
        for part in self.parts:
            fill_up(part.tokens, pack([]))
            part.masked_positions_M.copy_(torch.arange(self.shape.masked))


def _sizes(shape: Shape) -> tuple[int, int]:
    """Numbers of integers and of floats of one part; `_views` splits them in this order."""
    return 4 * shape.tokens + shape.masked + shape.sequences + 1 + 2, shape.tokens + shape.masked + 3


def _views(integers: Tensor, floats: Tensor, shape: Shape) -> PretrainBatch:
    tokens, sequences, masked, longest = shape
    *text, positions_M, cu_seqlens, first = integers.split([tokens] * 4 + [masked, sequences + 1, 2])
    input_ids_T, segment_ids_T, position_ids_T, masked_ids_T = text
    token_weights_T, masked_weights_M, shares = floats.split([tokens, masked, 3])
    return PretrainBatch(
        TokenBatch(input_ids_T, segment_ids_T, position_ids_T, cu_seqlens, longest),
        masked_ids_T,
        positions_M,
        first_token=first[0],
        first_masked=first[1],
        token_share=shares[0],
        masked_share=shares[1],
        sequence_share=shares[2],
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
    for name in ("first_token", "first_masked", "token_share", "masked_share", "sequence_share"):
        getattr(views, name).fill_(getattr(part, name))
