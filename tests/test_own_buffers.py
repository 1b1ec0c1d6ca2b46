"""Buffers of a user's own model, which a forward pass writes: no trial and no other process spoils them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contrastive  # noqa: F401
import pretend_graphs
import pytest
import torch
from ranks import pretrain_own, pretrain_own_stopped, run_ranks
from small_runs import (  # noqa: F401
    ORIGINAL,
    RUN,
    SIZES,
    assert_same_run,
    data,
    one_thread,
    regular_rows,
    state,
    train,
)
from torch import Tensor, nn

from electra_core.corpus import Corpus
from electra_core.execution import cross_check
from electra_core.execution.cross_check import check_pretraining, check_task_model
from electra_core.execution.torch_state import buffers_kept
from electra_core.objectives import build_objective
from electra_core.pretraining import setup
from electra_core.pretraining.setup import resolve_config
from electra_core.tasks import SequenceClassifier

OWN: dict[str, Any] = ORIGINAL | {"objective": "running"}
CPU = torch.device("cpu")


class Averaging(SequenceClassifier):
    """Has seen so many batches."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        self.batches += 1
        return super().forward(*arguments, **named)


def test_buffers_are_put_back_at_their_addresses() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model.register_buffer("nothing", None)
    model.register_buffer("queue", torch.zeros(2))
    before = {name: (buffer.data_ptr(), buffer.clone()) for name, buffer in model.named_buffers()}
    with pytest.raises(KeyError), buffers_kept(model) as replaced:
        model(torch.full((4, 3), torch.nan))
        assert not replaced()
        model.queue, model[0].running_mean = torch.ones(2), torch.ones(3)
        assert replaced() == ["queue", "0.running_mean"]
        raise KeyError
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    for name, (address, value) in before.items():
        assert after[name].data_ptr() == address and torch.equal(after[name], value), name


def test_dummy_steps_before_the_first_leave_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(data, tmp_path / "static", OWN | {"engine": "static"})
    monkeypatch.setattr(setup, "choose_engine", lambda *_: "graph")
    pretend_graphs.on_a_cpu(monkeypatch)
    train(data, tmp_path / "graph", OWN)
    assert sum(graph.replays for graph in pretend_graphs.Graph.made) > 0
    ours = state(tmp_path / "graph")["model/mean_D"]
    assert ours.isfinite().all() and ours.abs().sum() > 0
    assert_same_run(tmp_path / "graph", tmp_path / "static")


def test_checked_kernels_leave_them(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(cross_check, "_uses_kernels", lambda *_: True)
    monkeypatch.setattr(cross_check, "distrust", lambda _, reason: told.append(reason))
    encoder, config = resolve_config("tiny", RUN | OWN, SIZES, Corpus.open(data))
    model: Any = build_objective(encoder, config).train()
    assert check_pretraining(model, CPU, torch.float32, config.max_length, static=True) and not told
    assert not model.mean_D.any() and not model.seen
    task: Any = Averaging(encoder)
    for training in (True, False):
        assert check_task_model(task, CPU, torch.float32, 24, training=training) and not told
    assert task.batches == 0


def test_gradients_are_checked_with_the_same_buffers(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise right kernels would be distrusted: what is compared would differ by the buffer alone."""
    monkeypatch.setattr(cross_check, "_uses_kernels", lambda *_: True)
    encoder, config = resolve_config("tiny", RUN | OWN, SIZES, Corpus.open(data))
    model: Any = build_objective(encoder, config).train()
    found: list[dict[str, Tensor]] = []
    gradients = cross_check._gradients

    def seen(*arguments: Any) -> dict[str, Tensor]:
        found.append(gradients(*arguments))
        return found[-1]

    monkeypatch.setattr(cross_check, "_gradients", seen)
    check_pretraining(model, CPU, torch.float32, config.max_length, static=False)
    assert len(found) == 3
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_processes_have_the_first_ones_and_are_resumed(data: Path, tmp_path: Path, sharding: str) -> None:
    settings = RUN | OWN | {"engine": "eager" if sharding == "fsdp" else "static", "sharding": sharding}
    whole = run_ranks(2, pretrain_own, data, tmp_path / "whole", settings, SIZES)
    stopped = run_ranks(2, pretrain_own_stopped, data, tmp_path / "run", settings, SIZES)
    assert [report[0] for report in stopped] == [4, 4]
    resumed = run_ranks(2, pretrain_own, data, tmp_path / "run", settings, SIZES, {"resume": True})
    assert resumed[0] == resumed[1] == whole[0]
    ours, theirs = state(tmp_path / "run"), state(tmp_path / "whole")
    assert ours["model/seen"] and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert regular_rows(tmp_path / "run") == regular_rows(tmp_path / "whole")
