"""The batches of pre-training: examples, masked, cut into parts; a pure function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from electra_core.config import PretrainConfig
from electra_core.corpus import Corpus
from electra_core.electra import PretrainBatch
from electra_core.errors import UserError
from electra_core.examples import Example
from electra_core.masking import mask_tokens, masked_counts
from electra_core.mixing import examples_of
from electra_core.packing import TokenBatch


class Batches:
    """step -> this process's parts of the step's batch, a pure function of the configuration.

    All parts together are the same examples, masks and random rows whatever `world_size` and
    `config.accumulate` are.
    """

    def __init__(
        self, corpus: Corpus, config: PretrainConfig, device: torch.device, rank: int = 0, world_size: int = 1
    ):
        self.examples = examples_of(corpus, config.max_length, config.seed)
        self.config, self.device = config, device
        self.rank, self.world_size = rank, world_size
        if config.batch_size % (config.accumulate * world_size):
            raise UserError(
                f"batch_size: {config.batch_size} sequences cannot be split evenly over {world_size} process(es) "
                f"x accumulate {config.accumulate}"
            )

    def __call__(self, step: int) -> list[PretrainBatch]:
        size, parts = self.config.batch_size, self.config.accumulate * self.world_size
        first = step * size
        planned = self.examples.plan(range(first, first + size))
        lengths = np.array([example.num_tokens for example in planned])
        masked = _counts(lengths, self.config)
        each = size // parts
        mine = range(self.rank * self.config.accumulate, (self.rank + 1) * self.config.accumulate)
        return [self._part(planned, lengths, masked, first, part * each, (part + 1) * each) for part in mine]

    def _part(
        self, planned: list[Example], lengths: np.ndarray, masked: np.ndarray, first: int, begin: int, end: int
    ) -> PretrainBatch:
        tokens = self.examples.batch(planned[begin:end])
        batch = mask(
            tokens, range(first + begin, first + end), self.examples.corpus, self.config, self.config.seed
        )
        batch = replace(
            batch,
            first_token=int(lengths[:begin].sum()),
            first_masked=int(masked[:begin].sum()),
            token_share=float(lengths[begin:end].sum() / lengths.sum()),
            masked_share=float(masked[begin:end].sum() / masked.sum()),
        )
        return batch.to(self.device)


def mask(
    tokens: TokenBatch, indices: Sequence[int], corpus: Corpus, config: PretrainConfig, seed: int
) -> PretrainBatch:
    """Mask packed examples as `config` and the corpus's tokenizer say."""
    tokenizer = corpus.tokenizer
    return mask_tokens(
        tokens,
        indices,
        seed=seed,
        mask_id=tokenizer.mask_id,
        special_ids=[tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id],
        fraction=config.mask_fraction,
        max_predictions=config.max_predictions,
    )


def _counts(lengths: np.ndarray, config: PretrainConfig) -> np.ndarray:
    return masked_counts(torch.from_numpy(lengths), config.mask_fraction, config.max_predictions).numpy()
