"""A small model of any objective, and a batch for it, for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from electra_core import objectives
from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.electra import PretrainBatch
from electra_core.packing import from_lengths

CONFIG = EncoderConfig(
    vocab_size=40, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=16,
)  # fmt: skip

PRETRAIN = PretrainConfig(
    generator_hidden_size=8, generator_attention_heads=1, generator_intermediate_size=16, generator_layers=1
)

MASK_ID = 3


def make(objective: str, **changes: Any) -> Any:
    return objectives.build_objective(CONFIG, dataclasses.replace(PRETRAIN, objective=objective, **changes))


def make_batch() -> PretrainBatch:
    ids = torch.randint(5, 40, (30,), generator=torch.Generator().manual_seed(0))
    tokens = from_lengths(ids, torch.zeros_like(ids), [12, 4, 14])
    positions = torch.tensor([1, 5, 6, 13, 18, 25, 28])
    return PretrainBatch(tokens, ids.index_fill(0, positions[:-1], MASK_ID), positions)
