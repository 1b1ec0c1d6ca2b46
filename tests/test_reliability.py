"""What is promised of runs that are killed, damaged or diverge: nothing is lost, and one clear line says so."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import names
from torch import nn

from electra_core import checkpoint as module
from electra_core.adam import ElectraAdam
from electra_core.checkpoint import CheckpointWriter, newest_intact, save_checkpoint, snapshot
from electra_core.errors import UserError
from electra_core.runs.guards import examine, spike, with_postmortem
from electra_core.runs.metrics_log import MetricsLog, read_metrics
from electra_core.training import Diverged, Loop

ROOT = Path(__file__).parent.parent


# Checkpoints --------------------------------------------------------------------------------------------------


def trained() -> tuple[nn.Linear, ElectraAdam]:
    model = nn.Linear(40, 40)
    optimizer = ElectraAdam(model.parameters())
    model(torch.ones(2, 40)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder: Path, step: int, keep: int = 2, **meta: Any) -> Path:
    return save_checkpoint(folder, step, snapshot(*trained()), meta, keep)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, score in enumerate([3.0, 1.0, 2.0, math.nan, 2.5], start=1):
        save(tmp_path, step, score=score)
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"], "no score, not the best"
    save(tmp_path, 7, keep=0)
    assert names(tmp_path) == ["step-00000007"], "not the best either, where none is to be kept"


def test_whoever_may_read_the_record_may_read_the_state(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


def test_a_damaged_newer_checkpoint_pushes_no_intact_one_out(tmp_path: Path) -> None:
    save(tmp_path, 4)
    spoiled = save(tmp_path, 8) / "state.safetensors"
    spoiled.write_bytes(spoiled.read_bytes()[:-1])
    CheckpointWriter(tmp_path, 1, resumed_from=4)
    assert names(tmp_path) == ["step-00000004", "step-00000008"], "nothing is removed before something is saved"
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-00000005"]


def test_every_bit_of_the_record_counts(tmp_path: Path) -> None:
    file = save(tmp_path, 4, tokens=1234) / "state.json"
    content = json.loads(file.read_text())
    assert content["versions"]["torch"] == torch.__version__
    file.write_text(json.dumps(content | {"tokens": 1235}))
    checkpoint, damaged = newest_intact(tmp_path)
    assert checkpoint is None and "state.json does not match" in damaged[0]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A quota: writing beyond `size` bytes of a file fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("call", ["wait", "save"])
def test_a_full_disk_during_a_save_is_told_at_the_next_call_and_spoils_nothing(tmp_path: Path, call: str) -> None:
    model, optimizer = trained()
    with CheckpointWriter(tmp_path, 2) as writer:
        writer.save(1, snapshot(model, optimizer), {})
        writer.wait()
        with largest_file(2000):
            writer.save(2, snapshot(model, optimizer), {})  # comes back at once
            with pytest.raises(UserError, match=r"step-00000002.*older checkpoints are unchanged") as error:
                writer.wait() if call == "wait" else writer.save(2, snapshot(model, optimizer), {})
        assert "\n" not in str(error.value)
        writer.save(3, snapshot(model, optimizer), {})
    assert names(tmp_path) == ["step-00000001", "step-00000003"], "the last save is waited for"
    checkpoint, damaged = newest_intact(tmp_path)
    assert checkpoint is not None and checkpoint.step == 3 and not damaged


def test_a_last_save_that_fails_is_told_at_the_end_unless_something_else_went_wrong(tmp_path: Path) -> None:
    state = snapshot(*trained())
    with largest_file(2000):
        with pytest.raises(UserError, match="older checkpoints are unchanged"):
            with CheckpointWriter(tmp_path, 2) as writer:
                writer.save(1, state, {})
        with pytest.raises(KeyError), CheckpointWriter(tmp_path, 2) as writer:
            writer.save(1, state, {})
            raise KeyError
    assert names(tmp_path) == []


def test_ranks_that_do_not_save_keep_no_copy() -> None:
    assert snapshot(*trained(), keep=False) == {} != snapshot(*trained())


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is the state when `save` was called, whatever happens to the model meanwhile."""
    from threading import Event

    changed, whole = Event(), module.write_weights

    def late(*arguments: Any) -> None:
        assert changed.wait(60)
        whole(*arguments)

    monkeypatch.setattr(module, "write_weights", late)
    model, optimizer = trained()
    before = model.weight.detach().clone()
    with CheckpointWriter(tmp_path, 2) as writer:
        writer.save(1, snapshot(model, optimizer), {})
        with torch.no_grad():
            model.weight.zero_()
        changed.set()
    checkpoint, _ = newest_intact(tmp_path)
    assert checkpoint is not None
    checkpoint.restore(model, optimizer)
    assert torch.equal(model.weight, before)


def test_another_model_is_told_in_one_line(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint, _ = newest_intact(tmp_path)
    assert checkpoint is not None
    for other, said in (
        (nn.Linear(40, 41), "weight has shape"),
        (nn.Sequential(nn.Linear(40, 40)), "belongs to another model"),
        (nn.Linear(40, 40, bias=False), r"belongs to another model \(1 tensors differ: bias"),
    ):
        with pytest.raises(UserError, match=said) as error:
            checkpoint.restore(other, ElectraAdam(other.parameters()))
        assert "\n" not in str(error.value)


def test_the_log_survives_what_a_crash_left_in_it(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(1, loss=3.0)
    log.write(2, loss=2.5, eval_mlm_loss=2.0)
    log.write(3, loss=2.0)
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n"x"\n{"loss": 1}\n\xff\xfe\n{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    resumed = MetricsLog(tmp_path, first_step=2)
    assert list(resumed.recent_losses) == [3.0, 2.5] and resumed.last_evaluation == {"eval_mlm_loss": 2.0}
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
    resumed.close()


def test_wandb_is_asked_for_and_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        MetricsLog(tmp_path, wandb="project")


# Guards -------------------------------------------------------------------------------------------------------


def test_a_spike_is_far_above_the_rows_before() -> None:
    steady = [3.0, 3.1, 2.9, 3.0, 3.05, 2.95, 3.0, 3.1]
    assert spike(steady, 3.3) is None and spike(steady[:7], 9.0) is None
    assert "jumped to 4.2" in str(spike(steady, 4.2))
    assert spike([math.nan, *steady, math.inf], 3.3) is None and spike([math.nan, *steady], 4.2) is not None
    assert spike([math.nan, *steady[1:]], 9.0) is None, "too few rows that say anything"
    assert spike([9.0, 8, 7, 6, 5, 4, 3, 2], 9.5) is None, "a falling loss varies much"
    assert spike([2.0] * 8, 2.19) is None and spike([2.0] * 8, 2.21), "by a tenth, where nothing varies"


class Poisoned(nn.Module):
    """Divides by zero: finite in, infinite out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 0


def test_the_post_mortem_names_the_first_module_that_went_wrong(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Poisoned(), nn.Linear(3, 1))

    def loss(batch: torch.Tensor, seed: int) -> tuple[torch.Tensor, dict]:
        return model(batch).sum(), {}

    def steps() -> Iterator[int]:
        yield 1
        raise Diverged("step 3: no finite loss", 2)

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loop = Loop(model, optimizer, loss, schedule=lambda step: 0.01, steps=3, seed=7, clip_norm=1.0)
    file = tmp_path / "postmortem.json"
    with pytest.raises(Diverged, match=r"that of 2 \(Poisoned\), from finite inputs"):
        list(with_postmortem(steps(), file, loop, lambda step: [torch.ones(2, 3)], batch_size=4))
    found = json.loads(file.read_text())
    assert found["step"] == 3 and found["examples"] == {"first": 8, "last": 11}
    assert found["first_not_finite"]["module"] == "2" and not found["weights_not_finite"]
    assert [row["module"] for row in found["layers"]] == ["0", "3"]
    assert isinstance(found["layers"][0]["weight_norm"], float)
    model[2] = nn.Tanh()
    assert "suspect the hardware" in examine(model, loss, [torch.ones(2, 3)], 0, nullcontext())["verdict"]
    with torch.no_grad():
        model[3].weight[0, 0] = math.nan
    assert "such as 3.weight" in examine(model, loss, [torch.ones(2, 3)], 0, nullcontext())["verdict"]


@pytest.mark.parametrize(
    ("spoiled", "verdict"),
    [
        (lambda x: x.sum() / 0, "every module's output is finite, but loss is not"),
        (lambda x: (0 * x).sqrt().sum(), "the gradients of 1 weights are not, such as 0.weight"),
    ],
    ids=["loss", "gradients"],
)
def test_the_post_mortem_tells_a_loss_from_gradients(
    spoiled: Callable[[torch.Tensor], torch.Tensor], verdict: str
) -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model.unused = nn.Linear(2, 2)  # has no gradient
    found = examine(model, lambda batch, seed: (spoiled(model[0](batch)), {}), [torch.eye(2)], 0, nullcontext())
    assert verdict in found["verdict"]


def test_the_figures_of_a_post_mortem() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0]]))
    found = examine(model, lambda batch, seed: (model[0](batch).sum(), {}), [torch.eye(2)] * 2, 0, nullcontext())
    norms = {"weight_norm": 5.0, "gradient_norm": pytest.approx(8**0.5), "output_rms": pytest.approx(12.5**0.5)}
    assert found["layers"][0] == {"module": "0", **norms}
    assert found["layers"][1]["gradient_norm"] == 0.0 and found["layers"][1]["output_rms"] is None
    assert found["losses"] == {"loss of part 0": 7.0, "loss of part 1": 7.0}
    assert found["gradient_norm"] == pytest.approx(8**0.5) and all(p.grad is None for p in model.parameters())


# SIGKILL ------------------------------------------------------------------------------------------------------


def test_three_kills_change_nothing(tmp_path: Path) -> None:
    """benchmarks/kill_test.py, the short version; it exits with a difference."""
    command = [sys.executable, "-m", "benchmarks.kill_test", "--kills", "3", "--steps", "8"]
    out = tmp_path / "kill.json"
    subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=600
    )
    record = json.loads(out.read_text())
    assert record["kills"] == 3 and record["stories_equal_to_the_uninterrupted_one"] >= 1
