"""The spine of the command line for its tests: prepare, pretrain and finetune on a little text."""

from __future__ import annotations

from pathlib import Path

import pytest
import reading
import tiny_model
from small_runs import RUN, SIZES

from benchmarks.tiny_run import write_text
from electra_core.cli import main


def flags(settings: dict[str, object]) -> list[str]:
    return [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), str(value))]


PRETRAIN = ["pretrain", "--model", "tiny", "--device", "cpu", "--quiet", *flags({**RUN, **SIZES, "steps": 4})]
FINETUNE = ["finetune", "--task", "classify", "--device", "cpu", "--quiet", "--batch-size", "8", "--epochs", "1"]


def write(path: Path, content: str | bytes) -> str:
    return str(reading.write(path, content))


@pytest.fixture(scope="module")
def spine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the commands made, each from what came before: data, run and model."""
    folder = tmp_path_factory.mktemp("spine")
    write_text(folder / "text.txt")
    tiny_model.reviews(folder / "train.tsv", 48)
    tiny_model.reviews(folder / "dev.tsv", 16, seed=1)
    data, run, model = (str(folder / name) for name in ("data", "run", "model"))
    train, dev = str(folder / "train.tsv"), str(folder / "dev.tsv")
    prepare = ["prepare", "--text", str(folder / "text.txt"), "--out", data, "--quiet"]
    tokenizer = str(tiny_model.make_model(folder / "words") / "vocab.txt")
    assert main([*prepare, "--tokenizer", tokenizer, "--heldout-fraction", "0.1"]) == 0
    assert main([*PRETRAIN, "--data", data, "--out", run]) == 0
    assert main([*FINETUNE, "--model", run, "--train", train, "--dev", dev, "--out", model]) == 0
    return folder
