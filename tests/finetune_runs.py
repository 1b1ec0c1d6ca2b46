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
from electra_core.finetuning import seed as finetune_seed
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.runs.metrics_log import read_metrics

SETTINGS = FinetuneSettings(
    epochs=2, batch_size=16, learning_rate=1e-3, layerwise_decay=1.0, dropout=0.1, log_every=1, evaluations=2
)
"""20 steps a seed, evaluations after 5, 10, 15 and 20."""
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


def train(model, data, out, settings=SETTINGS, task=None, say=lambda line: None, **more):
    return finetune(model, task or Classify(), *data, out, settings, quiet=True, say=say, **more)


class Killed(Exception):
    """Stands for SIGKILL: nothing that the loop does afterwards may be needed."""


def killed() -> None:
    raise Killed


def at_step(patch, step: int, do, seed: int = 0) -> None:
    """Calls `do` when the log's row of a step would be written; `patch` is pytest's monkeypatch."""
    original = finetune_seed._step_figures

    def figures(result, run):
        if result.step == step and run.seed == seed:
            do()
        return original(result, run)

    patch.setattr(finetune_seed, "_step_figures", figures)


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


def assert_same_end(out: Path, whole: Path) -> None:
    got, expected = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    reports = [json.loads((folder / "metrics.json").read_text()) for folder in (out, whole)]
    assert without_times(reports[0]) == without_times(reports[1])
    logs = [sorted(path.relative_to(folder) for path in folder.rglob("metrics.jsonl")) for folder in (out, whole)]
    assert logs[0] == logs[1] != []
    for log in logs[0]:
        assert without_times(read_metrics(out / log)) == without_times(read_metrics(whole / log))
    assert (out / "task.json").read_text() == (whole / "task.json").read_text()
