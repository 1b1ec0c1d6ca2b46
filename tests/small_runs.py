"""Pre-training runs for tests, as small as runs can be, and what compares them.

The models have 1 layer, 16 wide, and some 60 words, so a run of 8 steps takes less than a second. Runs repeat bit
for bit on one thread; the machine's own number of threads is put back afterwards.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.tiny_run import without_clock, write_text
from electra_core.prepare import prepare
from electra_core.pretrain import pretrain

SIZES: dict[str, Any] = {
    "num_hidden_layers": 1, "hidden_size": 16, "embedding_size": 16, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32, "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
RUN: dict[str, Any] = {
    "steps": 8, "batch_size": 8, "max_length": 24, "warmup_steps": 2, "checkpoint_every": 4, "eval_every": 4,
    "eval_examples": 16, "log_every": 1, "precision": "fp32", "generator_hidden_size": 16,
    "generator_attention_heads": 1, "generator_intermediate_size": 32,
}  # fmt: skip
ORIGINAL = {"optimizer": "electra-adam", "embedding_init": "normal", "position_init": "normal"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_data(folder: Path, seed: int = 0) -> Path:
    prepare(
        [write_text(folder / "text.txt", seed=seed)], folder / "data", tokenizer=folder / "vocab.txt",
        lines="sentence", heldout_fraction=0.1, quiet=True,
    )  # fmt: skip
    return folder / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("corpus"))


def train(data: Path, out: Path, changes: dict[str, Any] | None = None, **options: Any) -> Any:
    sizes = SIZES | options.pop("sizes", {})
    settings: dict[str, Any] = {"model": "tiny", "quiet": True, "device": "cpu", **options}
    return pretrain(data, out, changes=RUN | (changes or {}), encoder_changes=sizes, **settings)


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps, never interrupted; the preset's Muon, counted words and local heads included."""
    out = tmp_path_factory.mktemp("base") / "run"
    train(data, out)
    return out


def rows(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock decides."""
    return without_clock(run / "metrics.jsonl")


def regular_rows(run: Path) -> list[dict[str, float]]:
    """Without the evaluation that a run makes where it is stopped."""
    return [row for row in rows(run) if "loss" in row or row["step"] % RUN["eval_every"] == 0]


def state(run: Path, step: int = 8) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "state.safetensors")


def assert_same_run(ours: Path, theirs: Path, step: int = 8) -> None:
    """Parameters, optimizer state, metrics and model directories, bit for bit."""
    one, two = state(ours, step), state(theirs, step)
    assert one.keys() == two.keys() and any(name.startswith("optimizer/") for name in one)
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert regular_rows(ours) == regular_rows(theirs)
    for part in ("discriminator", "generator"):
        name = f"{part}/model.safetensors"
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def stop_at(folder: Path, source: Path, step: int) -> Path:
    """A copy of a finished run as it was after `step` steps (its newest checkpoint is of that step)."""
    shutil.copytree(source, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return folder


SLOW_RUN = """
import sys, time
from pathlib import Path
from electra_core.cli import main
from electra_core.pretraining import batches
from electra_core.runs.stop_request import StopRequest, tell_python
agreed, whole, asked = StopRequest.agreed, batches.Batches.__call__, []
def counted(self):
    asked.append(self)
    if len(asked) == 5:
        Path(sys.argv[1]).touch()
    return agreed(self)
def slow(self, step):
    end = time.monotonic() + 120
    while step >= 5 and not (asked and asked[0].reason) and time.monotonic() < end:
        time.sleep(0.02)
    if step >= 5:
        Path(sys.argv[1] + "-seen").touch()
        time.sleep(float(sys.argv[2]))
    return whole(self, step)
StopRequest.agreed, batches.Batches.__call__ = counted, slow
sys.exit(main(sys.argv[3:]))
"""
"""`electra` with arguments FLAG SECONDS ...: after 5 steps of pre-training it makes the file FLAG and waits for a
signal, in the middle of the 6th; then it makes FLAG-seen and goes on after so many seconds."""
