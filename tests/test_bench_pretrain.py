"""The pre-training benchmark: both sides compute the same, and a difference is noticed before timing."""

from __future__ import annotations

import itertools
import json
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pretend_graphs
import pytest
import torch

from benchmarks import bench_pretrain, harness, pretrain_peers
from electra_core.config import EncoderConfig, PretrainConfig

CPU = torch.device("cpu")
ENCODER = EncoderConfig(
    vocab_size=300, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=32,
)  # fmt: skip
PRETRAIN = PretrainConfig(
    batch_size=2, max_length=24, generator_hidden_size=16, generator_attention_heads=1,
    generator_intermediate_size=32, generator_layers=1,
)  # fmt: skip


@pytest.mark.parametrize("objective", ["electra", "mlm"])
def test_both_sides_compute_the_same(objective: str) -> None:
    differences = bench_pretrain.check_same(ENCODER, replace(PRETRAIN, objective=objective), CPU)
    assert differences["loss"] < bench_pretrain.LOSS_TOLERANCE
    assert differences["gradient_norm"] < bench_pretrain.GRADIENT_TOLERANCE


def test_a_difference_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bench_pretrain.hub_model
    wrong = replace(PRETRAIN, discriminator_weight=50.1)
    monkeypatch.setattr(bench_pretrain, "hub_model", lambda config, _, name: model(config, wrong, name))
    with pytest.raises(SystemExit, match="do not compute the same"):
        bench_pretrain.check_same(ENCODER, PRETRAIN, CPU)


def test_what_is_no_number_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the second program's, after a first one whose difference is a number."""
    losses, calls = bench_pretrain.losses_with_our_weights, itertools.count()

    def spoiled(*given: Any) -> Any:
        return [loss * (float("nan") if next(calls) else 1.0) for loss in losses(*given)[:1]]

    monkeypatch.setattr(bench_pretrain, "losses_with_our_weights", spoiled)
    with pytest.raises(SystemExit, match="'loss': nan"):
        bench_pretrain.check_same(ENCODER, PRETRAIN, CPU)


def test_the_library_trains_every_weight_on_the_same_words() -> None:
    (batch,) = bench_pretrain.batches_like_text(ENCODER.vocab_size, 2, 24, PRETRAIN, count=1)
    padded = bench_pretrain.padded_inputs(batch)
    assert padded["input_ids"].shape == (2, 24) and bool(padded["attention_mask"].all())
    assert torch.equal(padded["input_ids"].flatten(), batch.masked_ids_T)
    assert int((padded["labels"] != -100).sum()) == len(batch.masked_positions_M) > 0
    for name in bench_pretrain.peers(PRETRAIN):
        model = bench_pretrain.hub_model(ENCODER, PRETRAIN, name)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        bench_pretrain.take(bench_pretrain.hub_steps(model, [padded], PRETRAIN, nullcontext()), 1)
        assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def test_programs_take_turns_and_ratios_are_within_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    programs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    so_far: list[list[int]] = []
    after_round = lambda rounds: so_far.append([len(rows) for rows in rounds.values()])  # noqa: E731
    rounds = harness.interleave(programs, rounds=3, device=CPU, after_round=after_round)
    assert "".join(order) == "ab" + "abbaab" and so_far == [[1, 1], [2, 2], [3, 3]]
    assert [len(rows) for rows in rounds.values()] == [3, 3]

    running = harness.OwnProcess(harness.timed, partial, time.sleep, 0.05)
    ((wall, _),) = harness.interleave({"it": running}, rounds=1, device=CPU)["it"]
    running.close()
    assert 0.05 <= wall < 5.0

    seconds = {"ours": [(1.0, 2.0), (4.0, 2.0)], "theirs": [(3.0, 3.0), (4.0, 4.0)]}
    (found,) = harness.compare("speed", "tokens/s", 12.0, seconds, "ours")
    assert found.ours == harness.Spread(7.5, 3.0, 12.0) and found.theirs == harness.Spread(3.5, 3.0, 4.0)
    assert found.ratio == harness.Spread(2.0, 1.0, 3.0)
    assert found.ratio_by_processor_time == harness.Spread(1.75, 1.5, 2.0)


def test_on_a_gpu_ours_is_what_a_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one CUDA graph beside those without; `sweep` takes the same."""
    pretend_graphs.on_a_cpu(monkeypatch)
    batches = bench_pretrain.batches_like_text(ENCODER.vocab_size, 2, 24, PRETRAIN)
    given = ENCODER, PRETRAIN, batches, "fp32", CPU, 3, torch.get_num_threads()
    for engine, replays in (("static", []), ("graph", [1 + 3])):  # once in vain, to capture it
        monkeypatch.setattr(bench_pretrain, "run_engine", lambda *_, engine=engine: engine)
        bench_pretrain.program(*given, bench_pretrain.OURS)()
        assert [graph.replays for graph in pretend_graphs.Graph.made] == replays
    bench_pretrain.program(*given, bench_pretrain.OURS_EAGER)()
    assert len(pretend_graphs.Graph.made) == 1
    assert programs_of("cuda") - programs_of("cpu") == {bench_pretrain.OURS_EAGER}


def programs_of(device: str) -> set[str]:
    """Names of what is timed there."""
    found: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_pretrain, "program", lambda *_: lambda: None)
        patch.setattr(bench_pretrain, "OwnProcess", lambda *_: type("Nothing", (), {"close": lambda self: None})())
        patch.setattr(bench_pretrain, "interleave", lambda programs, *_: found.update(programs) or {})
        patch.setattr(bench_pretrain, "compare", lambda *_: [])
        batches = bench_pretrain.batches_like_text(ENCODER.vocab_size, 2, 24, PRETRAIN, 1)
        bench_pretrain.measure(ENCODER, PRETRAIN, batches, ("fp32", "fp32"), torch.device(device), 1, 1)
    return found


def test_the_library_s_programs_for_an_objective() -> None:
    states = "transformers, masked states"
    of_mlm = (pretrain_peers.LABELS, states, f"{states}, eager attention")
    assert bench_pretrain.peers(replace(PRETRAIN, objective="mlm")) == of_mlm
    assert {*bench_pretrain.peers(PRETRAIN)} == {*of_mlm, "transformers, masked logits"}
    compiled = [name for name in bench_pretrain.PEERS if name not in bench_pretrain.BY_DEFAULT]
    assert compiled == [f"{states}, compiled", f"{states}, eager attention, compiled"]


def test_a_compiled_peer_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is looked at here, not the compiler's work, which takes minutes and which a run checks."""
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    name = "transformers, masked states, compiled"
    differences = bench_pretrain.check_same(ENCODER, PRETRAIN, CPU, [name])
    assert compiled == ["ElectraModel"] * 2 and differences["loss"] < bench_pretrain.LOSS_TOLERANCE


def test_peers_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    options = "--model tiny --batch 2 --length 16 --rounds 1 --precision fp32 --device cpu --threads 1".split()
    timed: list[tuple[str, str]] = []

    def process(_: object, *given: Any) -> None:
        timed.append((given[2].objective, given[-2]))

    monkeypatch.setattr(bench_pretrain, "OwnProcess", process)
    monkeypatch.setattr(bench_pretrain, "interleave", lambda programs, *_: programs.clear())
    monkeypatch.setattr(bench_pretrain, "compare", lambda *_: [])
    bench_pretrain.main([*options, "--peers", "transformers, masked logits"])  # which the MLM does not have
    ours = bench_pretrain.OURS
    assert timed == [("electra", ours), ("electra", "transformers, masked logits"), ("mlm", ours)]


def test_on_a_gpu_a_peer_that_cannot_run_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As without the library. On a CPU, where nobody is in a hurry, it ends the run."""

    def check(*given: Any) -> dict[str, float]:
        if given[-1] == [pretrain_peers.LABELS]:
            raise ModuleNotFoundError("No module named 'transformers'")
        return {"loss": 1e-6 * len(given[-1][0])}

    monkeypatch.setattr(bench_pretrain, "check_same", check)
    chosen = [pretrain_peers.LABELS, "transformers, masked logits", "transformers, masked states"]
    found, differences = bench_pretrain.checked(ENCODER, PRETRAIN, torch.device("cuda"), chosen)
    assert found == chosen[1:] and differences == {"loss": 1e-6 * len(chosen[1])}
    assert bench_pretrain.checked(ENCODER, PRETRAIN, torch.device("cuda"), chosen[:1]) == ([], {})
    assert "transformers: left out, cannot run: ModuleNotFoundError: No module" in capsys.readouterr().out
    with pytest.raises(ModuleNotFoundError):
        bench_pretrain.checked(ENCODER, PRETRAIN, CPU, chosen)


def test_what_a_stopped_run_has_measured_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "it.json"
    seconds = iter([1.0] * 6)  # two warm-ups of two programs, and one round

    def machine_gone(*_: object) -> tuple[float, float]:
        return (second := next(seconds)), second

    monkeypatch.setattr(bench_pretrain, "OwnProcess", lambda *_: None)
    monkeypatch.setattr(harness, "_seconds", machine_gone)
    options = (
        "--model tiny --objectives mlm --batch 2 --length 16 --rounds 9 --precision fp32 --device cpu".split()
    )
    with pytest.raises(StopIteration):
        bench_pretrain.main([*options, "--threads", "1", "--peers", pretrain_peers.LABELS, "--out", str(out)])
    (row,) = json.loads(out.with_suffix(".part").read_text())["comparisons"]
    assert row["rounds"] == 1 and not out.exists(), "so it counts as not measured"


def test_the_command_writes_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "tiny.json"
    options = (
        "--model tiny --objectives mlm --batch 2 --length 16 --rounds 1 --precision fp32 --device cpu".split()
    )
    bench_pretrain.main([*options, "--threads", "1", "--peers", pretrain_peers.LABELS, "--out", str(out)])
    report = json.loads(out.read_text())
    (row,) = report["comparisons"]
    assert row["figure"] == "mlm" and row["peer"] == pretrain_peers.LABELS and row["rounds"] == 1
    assert row["ratio"]["median"] == pytest.approx(row["ours"]["median"] / row["theirs"]["median"], rel=2e-3)
    assert report["settings"]["batch"] == 2 and report["environment"]["versions"]["torch"]
    assert "tokens/s" in capsys.readouterr().out and not out.with_suffix(".part").exists()
