"""Fine-tunings of seconds, for tests: a model with a few dozen words, and reviews to train and judge it on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_model
import torch
from safetensors.torch import load_file

from electra_core.downstream.classify import Classify
from electra_core.finetune import finetune
from electra_core.finetuning.settings import FinetuneSettings

QUICK = FinetuneSettings(epochs=4, batch_size=16, learning_rate=3e-3, layerwise_decay=1.0, log_every=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    return tiny_model.reviews(folder / "train.tsv", 160), tiny_model.reviews(folder / "dev.tsv", 40, seed=1)


def run(model, data, out, task=None, settings=QUICK, **more):
    return finetune(model, task or Classify(), *data, out, settings, quiet=True, **more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(folder: Path, **fields) -> None:
    """Other fields in the model's configuration; None takes one out."""
    raw = json.loads((folder / "config.json").read_text()) | fields
    raw = {name: value for name, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))


def without_times(value):
    """A report or the rows of a log, without what a clock gave."""
    if isinstance(value, dict):
        clock = ("seconds", "tokens_per_second")
        return {key: without_times(item) for key, item in value.items() if key not in clock}
    return [without_times(item) for item in value] if isinstance(value, list) else value
