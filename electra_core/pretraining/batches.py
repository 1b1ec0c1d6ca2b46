"""Pre-training batches: masked examples, divided into parts; a pure function of the step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from electra_core.config import PretrainConfig
from electra_core.corpus import Corpus
from electra_core.errors import UserError
from electra_core.examples import Plan
from electra_core.masking import MaskFunction, check_masked, mask, masked_counts
from electra_core.packing import PretrainBatch
from electra_core.pretraining.mixing import examples_of

PLANNED_AHEAD = 1024
"""Number of examples planned at once."""
PREPARED_AHEAD = 2
"""Number of steps whose batches are prepared while the model works on the current one."""


class Batches:
    """Maps a step to this process's parts of its batch; a pure function of the configuration.

    All parts together have the same examples, masks and random rows for any `world_size` and
    `config.accumulate`.

    Args:
        mask: chooses the masked positions (`masking.py` says what it has to heed). A batch with another number of
            them is a ValueError: the parts' shares would be wrong.
    """

    def __init__(
        self, corpus: Corpus, config: PretrainConfig, device: torch.device, rank: int = 0, world_size: int = 1,
        mask: MaskFunction = mask,
    ):  # fmt: skip
        self.examples = examples_of(corpus, config, config.seed)
        self.config, self.device = config, device
        self.rank, self.world_size, self.mask = rank, world_size, mask
        self._ahead: tuple[int, Any] = (-1, None)
        if config.batch_size % (config.accumulate * world_size):
            raise UserError(
                f"batch_size: {config.batch_size} sequences cannot be split evenly over {world_size} process(es) "
                f"x accumulate {config.accumulate}"
            )

    def __call__(self, step: int) -> list[PretrainBatch]:
        each = self.config.batch_size // (self.config.accumulate * self.world_size)
        mine = range(self.rank * self.config.accumulate, (self.rank + 1) * self.config.accumulate)
        planned = self._planned(step)
        return [self._part(step, planned, part * each, (part + 1) * each) for part in mine]

    def on(self, device: torch.device, accumulate: int | None = None) -> Batches:
        """The same batches on another device, or in another number of parts."""
        config = self.config if accumulate is None else replace(self.config, accumulate=accumulate)
        return Batches(self.examples.corpus, config, device, self.rank, self.world_size, self.mask)

    def _planned(self, step: int) -> Plan:
        """The step's examples, planned together with those of the steps after it, which is cheaper."""
        size = self.config.batch_size
        steps = max(1, PLANNED_AHEAD // size)
        block, place = divmod(step, steps)
        if (ahead := self._ahead)[0] != block:
            first = block * steps * size
            ahead = self._ahead = block, self.examples.plan(np.arange(first, first + steps * size))
        return ahead[1][place * size : (place + 1) * size]

    def _part(self, step: int, planned: Plan, begin: int, end: int) -> PretrainBatch:
        """The step's examples `begin` to `end`, masked, with their position and share in its whole batch."""
        first, config, tokenizer = step * self.config.batch_size, self.config, self.examples.corpus.tokenizer
        tokens = self.examples.batch(planned[begin:end])
        batch = self.mask(tokens, range(first + begin, first + end), tokenizer, config, config.seed)
        lengths = planned.lengths
        counts = masked_counts(torch.from_numpy(lengths), config.mask_fraction, config.max_predictions)
        check_masked(batch, counts[begin:end], tokenizer)
        masked = counts.numpy()
        batch = replace(
            batch,
            first_token=int(lengths[:begin].sum()),
            first_masked=int(masked[:begin].sum()),
            token_share=float(lengths[begin:end].sum() / lengths.sum()),
            masked_share=float(masked[begin:end].sum() / masked.sum()),
            sequence_share=(end - begin) / len(lengths),
        )
        return batch.to(self.device)


Parts = TypeVar("Parts")


class Ahead(Generic[Parts]):
    """`batches`, prepared by a thread for the next steps while the model is busy with this one.

    Batches are a pure function of the step, so nothing else changes; after a jump, preparation restarts there.
    """

    def __init__(self, batches: Callable[[int], Parts]):
        self._batches = batches
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._made: dict[int, Future[Parts]] = {}

    def __call__(self, step: int) -> Parts:
        wanted = range(step, step + 1 + PREPARED_AHEAD)
        for late in [other for other in self._made if other not in wanted]:
            self._made.pop(late).cancel()
        for other in wanted:
            if other not in self._made:
                self._made[other] = self._worker.submit(self._batches, other)
        return self._made.pop(step).result()
