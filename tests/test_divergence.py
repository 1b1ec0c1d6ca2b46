"""Runs that end before twenty steps in a row were not finite: diverged, or whole with a warning."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pretend_graphs
import pytest
import torch
from small_objectives import make, make_batch
from small_runs import data, one_thread, rows, train  # noqa: F401
from torch import Tensor, nn

from electra_core import electra
from electra_core.adam import ElectraAdam
from electra_core.electra import Electra, PretrainBatch
from electra_core.execution.engine import static_steps
from electra_core.execution.static_batch import Shapes
from electra_core.optim import gradient_norm
from electra_core.packing import from_lengths
from electra_core.pretraining.batches import Batches
from electra_core.runs.guards import examine, left_out
from electra_core.runs.state import FAILED, read_state
from electra_core.training import Diverged, LateNumber, Loop, StepResult, training_steps

CPU = torch.device("cpu")


class OneLate(LateNumber):
    """Reads on a CPU as on a GPU: what the number was at the call before."""

    def read(self, number: Tensor) -> float:
        before, self.kept = getattr(self, "kept", 0.0), float(number)
        return before


def part(step: int) -> list[PretrainBatch]:
    """Two sequences whose first token says whether the step is to be spoiled."""
    ids_T = torch.full((8,), step)
    return [PretrainBatch(from_lengths(ids_T, ids_T * 0, [4, 4]), ids_T, torch.tensor([0, 1]))]


def steps_of(engine: str, bad: set[int], steps: int, first_step: int = 0, before: int = 0) -> list[StepResult]:
    """The steps of a run of one weight, of which those in `bad` have a loss that is NaN."""
    model = nn.Linear(1, 1)
    factors = torch.tensor([math.nan if step in bad else 1.0 for step in range(steps)])

    def loss_function(batch: PretrainBatch, seed: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return model.weight.square().sum() * factors[batch.tokens.input_ids_T[:1]].squeeze(), {}

    loop = Loop(
        model, ElectraAdam(model.parameters()), loss_function, schedule=lambda step: 0.01, steps=steps, seed=0,
        clip_norm=1.0, first_step=first_step, skipped_before=before,
    )  # fmt: skip
    if engine == "eager":
        return list(training_steps(loop, part))
    shapes = Shapes(sequences=2, max_length=4, max_predictions=1)
    return list(static_steps(loop, part, shapes=shapes, device=CPU, capture=engine == "graph"))


@pytest.fixture(params=["eager", "static", "graph", "eager, late", "graph, late"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, late = request.param.partition(", ")
    if name == "graph":
        pretend_graphs.on_a_cpu(monkeypatch)
    if late:
        for module in ("training", "execution.engine"):
            monkeypatch.setattr(f"electra_core.{module}.LateNumber", OneLate)
    return name


@pytest.mark.parametrize(
    ("bad", "steps", "said"),
    [
        (range(1), 1, "step 1: .* last 1 of 1"),
        (range(6), 6, "step 6: .* last 6 of 6"),
        (range(1, 6), 6, "step 6: .* last 5 of 6"),
        (range(3, 6), 6, "step 6: .* last 3 of 6"),
        (range(40, 60), 60, "step 60: .* (20 steps in a row|last 20 of 60)"),
        (range(41, 60), 60, ""),
        (range(4, 6), 6, ""),
        (range(5), 6, ""),
    ],
)
def test_a_run_that_ends_amid_skipped_steps(engine: str, bad: range, steps: int, said: str) -> None:
    if said:
        with pytest.raises(Diverged, match=said) as caught:
            steps_of(engine, set(bad), steps)
        assert caught.value.step == steps - 1
        return
    results = steps_of(engine, set(bad), steps)
    row = steps - bad.start if bad.stop == steps else 0
    assert [int(result.in_a_row) for result in results][-1] == row
    assert len(left_out(results[-1])) == (row > 0)


def test_the_count_goes_on_where_a_run_does(engine: str) -> None:
    with pytest.raises(Diverged, match=r"step 3[12]: .* 20 steps in a row"):
        steps_of(engine, set(range(10, 60)), 60, first_step=30, before=19)
    assert not left_out(steps_of(engine, {8}, 10, first_step=8, before=3)[-1])


def spoil(monkeypatch: pytest.MonkeyPatch, when: Callable[[Electra], bool]) -> None:
    """Losses are NaN where `when`."""
    whole = Electra.forward

    def forward(self: Electra, batch: Any, seed: Any) -> Any:
        output = whole(self, batch, seed)
        if not when(self):
            return output
        bad = {name: getattr(output, name) * math.nan for name in ("loss", "mlm_loss")}
        return dataclasses.replace(output, **bad)

    monkeypatch.setattr(Electra, "forward", forward)


def spoil_from(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """The losses of training are NaN from step `first` (from 0) on."""
    place, whole = {"step": 0}, Batches.__call__

    def batches(self: Batches, step: int) -> list[PretrainBatch]:
        place["step"] = step
        return whole(self, step)

    monkeypatch.setattr(Batches, "__call__", batches)
    spoil(monkeypatch, lambda model: model.training and place["step"] >= first)


def test_a_killed_run_diverges_where_it_would_have(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After six of eight steps: the four before the checkpoint, of which two were skipped, count."""
    spoil_from(monkeypatch, 2)
    for out in ("whole", "killed"):
        with pytest.raises(Diverged, match=r"step 8: .* last 6 of 8"):
            train(data, tmp_path / out, resume=out == "killed")
        assert read_state(tmp_path / out)["state"] == FAILED
        assert not (tmp_path / out / "discriminator").exists()
    with pytest.raises(Diverged, match=r"step 8: .* last 6 of 8"):
        train(data, tmp_path / "killed", resume=True)
    assert json.loads((tmp_path / "killed" / "postmortem.json").read_text())["step"] == 8
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    saved = json.loads((tmp_path / "killed" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert saved["skipped_in_a_row"] == 2


def test_a_few_skipped_steps_at_the_end_are_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_from(monkeypatch, 6)
    told = train(data, tmp_path / "run", {"eval_every": 7}, quiet=True).warnings
    assert f"warning: {told[-1]}\n" in capsys.readouterr().err
    assert told[-1] == "No finite loss and gradient in the last 2 steps: the model is as it was after step 6."
    *_, before, _, last = rows(tmp_path / "run")
    assert (before["step"], last["step"], last["warnings"]) == (7, 8, told)
    assert not any("No finite" in line for line in before.get("warnings", [])), "step 7 is not the end"


def test_a_model_without_a_finite_loss_on_other_text_has_diverged(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda model: not model.training)
    with pytest.raises(Diverged, match=r"step 8: no finite loss on held-out text; .*postmortem\.json"):
        train(data, tmp_path / "run")
    assert read_state(tmp_path / "run")["state"] == FAILED
    assert not (tmp_path / "run" / "discriminator").exists()


def test_a_discriminator_that_is_not_finite_is_evaluated(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Electra.forward

    def forward(self: Electra, batch: Any, seed: Any) -> Any:
        output = whole(self, batch, seed)
        return (
            output if self.training else dataclasses.replace(output, rtd_logits_T=output.rtd_logits_T * math.nan)
        )

    monkeypatch.setattr(Electra, "forward", forward)
    evaluation = train(data, tmp_path / "run").evaluation
    assert math.isnan(evaluation["eval_rtd_auc"]) and math.isfinite(evaluation["eval_rtd_loss"])


def test_a_post_mortem_computes_what_the_step_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """And looks at each module of it, without the logits over the vocabulary that a hook on the generator asks
    for."""
    model, batch, calls = make("electra"), make_batch(), []
    for name in ("mlm_head", "rtd_head"):
        monkeypatch.setattr(electra, name, counted(getattr(electra, name), calls))

    def loss(part: Any, seed: Any) -> Any:
        output = model(part, seed)
        return output.loss, {"rtd_loss": output.rtd_loss}

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss(batch, 3)[0].backward()
        norm = gradient_norm(list(model.parameters())).item()
        of_the_step = {"loss": loss(batch, 3)[0].item(), "rtd_loss": loss(batch, 3)[1]["rtd_loss"].item()}
    calls.clear()
    found = examine(model, loss, [batch], 3, torch.autocast("cpu", dtype=torch.bfloat16))
    assert calls == ["mlm_head", "rtd_head", "mlm_head"], "as the step, then with its head called in parts"
    assert found["losses"] == of_the_step and found["gradient_norm"] == norm
    seen = {row["module"] for row in found["layers"] if row["output_rms"] is not None}
    assert {
        "discriminator.discriminator_predictions.dense_prediction",
        "generator.generator_predictions.dense",
    } <= seen
    model.generator.encoder.register_forward_hook(lambda module, inputs, output: output * math.nan)
    model.generator.register_forward_hook(lambda module, inputs, output: output)
    calls.clear()
    found = examine(model, loss, [batch], 3, nullcontext())
    assert found["first_not_finite"]["module"] == "generator.encoder"
    assert calls == ["rtd_head"], "with somebody's hook the step takes the logits, and so does its post-mortem"


def counted(head: Any, calls: list[str]) -> Any:
    def called(*arguments: Any, **named: Any) -> Any:
        calls.append(head.__name__)
        return head(*arguments, **named)

    return called


def test_a_post_mortem_looks_into_a_compiled_model() -> None:
    """Which was compiled without hooks; its steps were taken for finite."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    compiled = torch.compile(model, backend="aot_eager")

    def loss(batch: torch.Tensor, seed: int) -> Any:
        return compiled(batch).sum(), {}

    loss(torch.ones(2, 3), 0)[0].backward()
    with torch.no_grad():
        model[0].bias.fill_(9.0)
        model[2].weight.fill_(3e38)
    found = examine(model, loss, [torch.ones(2, 3)], 0, nullcontext())
    assert found["first_not_finite"]["module"] == "2" and found["layers"][0]["output_rms"] > 0


def test_gradients_too_large_for_their_norm_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 1))
    verdict = examine(
        model, lambda batch, seed: (model(batch).sum() * 1e30, {}), [torch.ones(2, 3)], 0, nullcontext()
    )
    assert "so large that the norm" in verdict["verdict"] and verdict["gradient_norm"] == "inf"
