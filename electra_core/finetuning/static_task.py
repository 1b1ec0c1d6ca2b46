"""Fine-tuning's batches in a few fixed shapes, for steps captured once and replayed (`execution/engine.py`).

A batch holds as many tokens as its texts have, so T is hardly ever the same twice. Here one sequence of padding
after the batch's own fills T up to a multiple of the longest sequence, rounded up to a power of two:
batches hold texts of similar length (`labelled_data.features.batch_order`), so a step has one of a few dozen
shapes. Attention stays within a sequence, no token moves to another row, on which dropout depends, and the filling
sequence has no target, hence no gradient: losses and gradients are those of the unfilled batch, up to the order of
sums.

The numbers of sequences and units are part of the shape: they differ in an epoch's last batch, or where batches
are limited by tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from electra_kernels.rng import Seed, fold
from torch import Tensor

from electra_core.execution.filling import fill_up
from electra_core.execution.input_buffers import InputBuffers
from electra_core.labelled_data.features import TaskBatch
from electra_core.packing import TokenBatch
from electra_core.tasks import UNLABELLED

SHORTEST = 16  # tokens; shorter sequences do not get shapes of their own


@dataclass(frozen=True)
class Part:
    """A batch, or one of several batches whose gradients make one step."""

    batch: TaskBatch
    share: float | Tensor
    """The part's share of what the step's loss is a mean over (`Task.weight`)."""
    index: int
    key: Tensor | None = None
    """int64 [1]: the part's own seed, for a step in fixed shapes, which reads it from the device."""

    @property
    def is_filled(self) -> bool:
        """Whether a filling sequence follows the batch's own."""
        return self.key is not None

    def seed(self, of_step: Seed) -> Seed:
        """The seed of the part's dropout."""
        if self.key is not None:
            return self.key
        assert isinstance(of_step, int)
        return fold(of_step, self.index)


class TaskShape(NamedTuple):
    """Sizes of one part of a step."""

    tokens: int
    """T, filling tokens included."""
    sequences: int
    """N, without the filling sequence."""
    units: int
    targets: tuple[int, ...]
    """Shape of the targets; [T] if every token has one."""
    whole: bool
    """Whether the targets are integers: classes or positions."""
    max_seqlen: int
    """Longest sequence that can occur."""


class TaskShapes:
    """The shapes of a fine-tuning run's batches.

    Args:
        per_token: whether every token has a target.
        positions: number of positions that the model has.
        largest: makes the parts of the step with the most tokens.
    """

    def __init__(self, *, per_token: bool, positions: int, largest: Callable[[], Sequence[Part]]):
        self.per_token, self.positions, self.largest = per_token, positions, largest

    def inputs(self, parts: Sequence[Part], pinned: bool) -> TaskInputs:
        """Empty buffers for `parts`."""
        return TaskInputs([self.fit(part.batch) for part in parts], self.per_token, pinned=pinned)

    def in_vain(self, parts: Sequence[Part], pinned: bool) -> TaskInputs:
        """The run's largest step, whatever `parts` are, with a NaN loss, so that nothing is updated."""
        largest = self.largest()
        inputs = self.inputs(largest, pinned)
        inputs.fill(largest, seed=0, rate=0.0)
        for part in inputs.parts:
            assert isinstance(part.share, Tensor)
            part.share.fill_(math.nan)
        return inputs

    def fit(self, batch: TaskBatch) -> TaskShape:
        """The smallest shape that holds `batch` and at least one filling token."""
        tokens, longest = batch.tokens.num_tokens, batch.tokens.max_seqlen
        limit = max(longest, min(self.positions, max(SHORTEST, 1 << (longest - 1).bit_length())))
        filled = (tokens // limit + 1) * limit
        targets = (filled,) if self.per_token else tuple(batch.targets.shape)
        whole = not batch.targets.is_floating_point()
        return TaskShape(filled, batch.tokens.num_sequences, len(batch.unit_starts) - 1, targets, whole, limit)


class TaskInputs(InputBuffers):
    """The parts of a fine-tuning step, each with its own shape.

    Args:
        shapes: the parts' shapes.
        per_token: whether every token has a target.
    """

    def __init__(
        self,
        shapes: Sequence[TaskShape],
        per_token: bool,
        device: torch.device | str = "cpu",
        pinned: bool = False,
    ):
        super().__init__(tuple(shapes), [_sizes(shape) for shape in shapes], device, pinned)
        self.per_token = per_token
        self.parts: list[Part] = [
            _views(integers, floats, shape, index)
            for index, ((integers, floats), shape) in enumerate(zip(self.pieces, shapes))
        ]

    def on(self, device: torch.device) -> TaskInputs:
        """See `InputBuffers`."""
        return TaskInputs(self.shape, self.per_token, device)

    def fill(self, parts: Sequence[Part], seed: int, rate: float) -> None:
        """Writes a step's input, on the host.

        Raises:
            ValueError: a part that does not fit its shape.
        """
        self.seed.fill_(seed)
        self.rate.fill_(rate)
        for views, part, shape in zip(self.parts, parts, self.shape, strict=True):
            filling = shape.tokens - part.batch.tokens.num_tokens
            if part.batch.tokens.num_sequences != shape.sequences or not 1 <= filling <= shape.max_seqlen:
                raise ValueError(f"part: {part.batch.tokens.num_tokens} tokens do not fit {shape}")
            _fill(views.batch, part.batch, self.per_token)
            assert isinstance(views.share, Tensor) and views.key is not None
            views.share.fill_(part.share)
            views.key.fill_(part.seed(seed))


def _sizes(shape: TaskShape) -> tuple[int, int]:
    """Numbers of integers and of floats of one part; `_views` splits them in this order."""
    targets = math.prod(shape.targets)
    integers = 3 * shape.tokens + (shape.sequences + 2) + (shape.units + 1) + 1
    return integers + targets * shape.whole, 1 + targets * (not shape.whole)


def _views(integers: Tensor, floats: Tensor, shape: TaskShape, index: int) -> Part:
    sizes = [shape.tokens] * 3 + [shape.sequences + 2, shape.units + 1, 1]
    *head, whole = integers.split([*sizes, len(integers) - sum(sizes)])
    input_ids_T, segment_ids_T, position_ids_T, cu_seqlens, unit_starts, key = head
    share, fractions = floats.split([1, len(floats) - 1])
    targets = (whole if shape.whole else fractions).view(shape.targets)
    text = TokenBatch(input_ids_T, segment_ids_T, position_ids_T, cu_seqlens, shape.max_seqlen)
    return Part(TaskBatch(text, targets, unit_starts), share[0], index, key)


def _fill(views: TaskBatch, batch: TaskBatch, per_token: bool) -> None:
    tokens = batch.tokens.num_tokens
    fill_up(views.tokens, batch.tokens)
    views.unit_starts.copy_(batch.unit_starts)
    if per_token:
        views.targets[:tokens], views.targets[tokens:] = batch.targets, UNLABELLED
    else:
        views.targets.copy_(batch.targets)
