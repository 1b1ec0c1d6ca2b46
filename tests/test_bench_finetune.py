"""The fine-tuning benchmark's own program for a GPU, in the same fixed shapes on a CPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_finetune
from benchmarks.bench_finetune import (
    DYNAMIC,
    MAXIMUM,
    OURS,
    SORTED,
    WAYS,
    WORKLOADS,
    batches_of,
    last_pass,
    make_directory,
    measure,
    sequences,
    ways_of,
)
from electra_core.execution import engine
from electra_core.tasks import SequenceClassifier


def test_the_last_pass_is_timed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 sentences are two batches: four steps before the clock starts, two under it."""
    steps: list[int] = []
    take = engine.take_step

    def counted(*arguments: object) -> engine.Done:
        steps.append(len(clock))
        return take(*arguments)  # type: ignore[arg-type]

    clock: list[float] = []
    monkeypatch.setattr(engine, "take_step", counted)
    monkeypatch.setattr(bench_finetune, "wait_for", lambda _: clock.append(0.0))
    make_directory("tiny", tmp_path)
    seconds, processor = last_pass(
        tmp_path, WORKLOADS["sst2"], sequences(WORKLOADS["sst2"], 40, 8192), "cpu", "fp32"
    )
    assert steps == [0] * 4 + [1] * 2
    assert seconds > 0 and processor > 0


def test_logits_that_are_no_numbers_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_directory("tiny", tmp_path)
    assert bench_finetune.check_logits(tmp_path, "cpu") < 1e-4
    forward = SequenceClassifier.forward
    monkeypatch.setattr(SequenceClassifier, "forward", lambda *given: forward(*given) * float("nan"))
    with pytest.raises(SystemExit, match="logits by up to nan; nothing was timed"):
        bench_finetune.check_logits(tmp_path, "cpu")


def test_each_way_measures_the_same_examples(tmp_path: Path) -> None:
    make_directory("tiny", tmp_path)
    options = argparse.Namespace(
        folder=tmp_path, device="cpu", precision="fp32", examples=40, model="tiny", keep_freed_memory="ours"
    )
    assert ways_of(True, "cpu") == ways_of(False, "cuda") and len(ways_of(True, "cuda:1")) == 5
    measured = measure(OURS, WORKLOADS["sst2"], True, options)
    assert measured["examples_per_second"] * measured["seconds"] == pytest.approx(40)
    assert torch.tensor(list(measured.values())).gt(0).all()


def test_what_is_measured_is_printed_before_the_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def machine_gone(_: str, way: str, *rest: object) -> dict[str, float]:
        if way != OURS:
            raise KeyboardInterrupt
        return {"tokens_per_second": 12345.6}

    monkeypatch.setattr(bench_finetune, "run_child", machine_gone)
    with pytest.raises(KeyboardInterrupt):
        bench_finetune.compare("", "sst2", "train", WAYS, argparse.Namespace(rounds=1, device="cpu"))
    assert "sst2, train: ours 12346 tokens/s" in capsys.readouterr().out


FIGURES = {"seconds": 2.0, "processor_seconds": 2.0, "examples_per_second": 3.0, "tokens_per_second": 40.0,
           "peak_mib": 5.0}  # fmt: skip


def program(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_finetune", "--model", "tiny", "--workloads", "sst2", *words])
    bench_finetune.main()


def test_what_is_measured_is_written_before_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(6))

    def measured(*_: object) -> dict[str, float]:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return FIGURES

    monkeypatch.setattr(bench_finetune, "run_child", measured)
    words = "--modes", "infer", "train", "--rounds", "1", "--device", "cpu", "--json", str(tmp_path / "found.json")
    with pytest.raises(KeyboardInterrupt):
        program(monkeypatch, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["found.part"]
    found = json.loads((tmp_path / "found.part").read_text())["results"]
    assert found["sst2 infer"]["speedups"] == dict.fromkeys((SORTED, DYNAMIC, MAXIMUM), 1.0)
    assert list(found["sst2 train"]["ways"]) == [OURS] and found["sst2 train"]["speedups"] == {}
    monkeypatch.setattr(bench_finetune, "run_child", lambda *_: FIGURES)
    program(monkeypatch, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_a_gpu_without_the_library_measures_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> float:
        raise ModuleNotFoundError("No module named 'transformers'")

    monkeypatch.setattr(bench_finetune, "check_logits", missing)
    with pytest.raises(ModuleNotFoundError):
        bench_finetune.checked(tmp_path, "cpu")
    for name in ("use_device", "environment", "resolve_precision"):
        monkeypatch.setattr(bench_finetune, name, lambda *_: None)
    monkeypatch.setattr(bench_finetune, "run_child", lambda *_: FIGURES)
    program(monkeypatch, "--rounds", "1", "--device", "cuda", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert list(found["sst2 train"]["ways"]) == ["ours", "ours, eager"]
    assert list(found["sst2 infer"]["ways"]) == ["ours"]
    assert "transformers: left out, cannot run: " in capsys.readouterr().out


@pytest.mark.parametrize("train", [True, False])
def test_the_peers_batches_hold_every_text_once(train: bool) -> None:
    """And the more a way cares about lengths, the less padding it has."""
    workload = WORKLOADS["sst2"]
    rows = sequences(workload, 4 * workload.infer_batch, 8192)
    words, padded = {}, {}
    for way in (SORTED, DYNAMIC, MAXIMUM):
        batches = list(batches_of(way, workload, rows, train))
        words[way] = sorted(tuple(ids[ids != 0].tolist()) for batch in batches for ids in batch["input_ids"])
        padded[way] = sum(batch["input_ids"].numel() for batch in batches)
    assert words[SORTED] == words[DYNAMIC] == words[MAXIMUM] == sorted(tuple(ids.tolist()) for ids in rows)
    assert sum(map(len, rows)) < padded[SORTED] < 0.7 * padded[DYNAMIC] < 0.7 * padded[MAXIMUM]
