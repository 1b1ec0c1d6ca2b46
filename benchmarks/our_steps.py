"""Our side of the pre-training benchmarks: the engines of `electra pretrain` as iterators, one step per item."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.execution.engine import choose_engine, static_steps
from electra_core.execution.placement import keep_freed_memory
from electra_core.execution.static_batch import Shapes
from electra_core.optim import build_optimizer, learning_rate
from electra_core.packing import PretrainBatch
from electra_core.training import Loop, training_steps

OURS, OURS_EAGER = "ours", "ours, eager"


def run_engine(device: torch.device, dtype: torch.dtype, config: EncoderConfig) -> str:
    """The engine that `electra pretrain` uses by default on this device."""
    return choose_engine("auto", device, dtype, {config.hidden_size // config.num_attention_heads})


def engine_steps(
    engine: str,
    model: nn.Module,
    batches: list[PretrainBatch],
    config: PretrainConfig,
    device: torch.device,
    autocast: AbstractContextManager[Any],
) -> Iterator[object]:
    """The steps of one of the engines of `electra pretrain`, as `pretrain._steps` takes them.

    Args:
        engine: "eager", or, with fixed shapes, "static", "graph" or "compile".
        batches: of `config.batch_size` sequences, on the host.
    """
    called: Any = torch.compile(model) if engine == "compile" else model
    loop = Loop(
        model, build_optimizer(model, config), lambda batch, seed: (called(batch, seed).loss, {}),
        schedule=lambda t: learning_rate(t, config.learning_rate, config.steps, config.warmup_steps),
        steps=config.steps, seed=config.seed, clip_norm=config.clip_norm, autocast=autocast,
    )  # fmt: skip
    if engine == "eager":
        batches = [batch.to(device) for batch in batches]
        return training_steps(loop, lambda step: [batches[step % len(batches)]])
    if device.type == "cpu":
        keep_freed_memory()
    return static_steps(
        loop, lambda step: [batches[step % len(batches)]], shapes=Shapes.of_run(config), device=device,
        capture=engine == "graph",
    )  # fmt: skip
