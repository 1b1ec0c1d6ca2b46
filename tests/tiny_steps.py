"""Batches and sizes of steps that take milliseconds, and the settings that make steps differ, for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.electra import PretrainBatch
from electra_core.masking import mask_tokens
from electra_core.packing import from_lengths

ENCODER = EncoderConfig(
    vocab_size=97, embedding_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=32,
)  # fmt: skip

CONFIG = PretrainConfig(
    steps=6, batch_size=8, max_length=24, warmup_steps=2, learning_rate=3e-3, generator_hidden_size=16,
    generator_attention_heads=1, generator_intermediate_size=32, generator_layers=1,
)  # fmt: skip


def batch_of(
    step: int, config: PretrainConfig = CONFIG, lengths_of: Callable[[int], list[int]] | None = None
) -> list[PretrainBatch]:
    """Parts of a batch of sequences of uneven length, shares and first rows as `Batches` gives them.

    Args:
        lengths_of: step -> the lengths of a part's sequences; random if None.
    """
    draw = torch.Generator().manual_seed(step)
    parts = config.accumulate
    each = config.batch_size // parts
    made = []
    for part in range(parts):
        lengths = torch.randint(6, config.max_length + 1, (each,), generator=draw).tolist()
        lengths = lengths_of(step) if lengths_of else lengths
        ids_T = torch.randint(5, ENCODER.vocab_size, (sum(lengths),), generator=draw)
        tokens = from_lengths(ids_T, torch.zeros_like(ids_T), lengths)
        indices = range(step * config.batch_size + part * each, step * config.batch_size + (part + 1) * each)
        made.append(
            mask_tokens(tokens, indices, seed=0, mask_id=4, special_ids=[1, 2, 4], fraction=config.mask_fraction,
                        max_predictions=config.max_predictions)
        )  # fmt: skip
    tokens_of = [part.tokens.num_tokens for part in made]
    masked_of = [len(part.masked_positions_M) for part in made]
    return [
        dataclasses.replace(
            part, first_token=sum(tokens_of[:i]), first_masked=sum(masked_of[:i]),
            token_share=tokens_of[i] / sum(tokens_of), masked_share=masked_of[i] / sum(masked_of),
        )
        for i, part in enumerate(made)
    ]  # fmt: skip


CASES = {
    "electra": {},
    "two-parts": {"accumulate": 2},
    "adamw": {"optimizer": "adamw"},
    "muon": {"optimizer": "muon"},
    "mlm": {"objective": "mlm"},
    "replace-mlm": {"objective": "replace-mlm"},
    "all-tokens-mlm": {"objective": "all-tokens-mlm"},
    "electra-15": {"objective": "electra-15"},
    "uniform": {"uniform_generator": True},
    "disallow-correct": {"disallow_correct": True},
}
