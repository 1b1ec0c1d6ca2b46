"""A predictor with random weights."""

from __future__ import annotations

from pathlib import Path

import tiny_model

from electra_core.initialisation import initialise
from electra_core.model_dir import load as load_model
from electra_core.predict import Predictor
from electra_core.tokenizer import load_tokenizer


def untrained(task, folder: Path, scale: float = 0.5) -> Predictor:
    """A predictor whose random weights are large enough for varied answers."""
    tiny_model.make_model(folder)
    config = load_model(task.model_class, folder, labels=task.labels).config
    model = task.model_class(config, task.labels)
    initialise(model, scale, seed=3)
    return Predictor(model, task, load_tokenizer(folder))
