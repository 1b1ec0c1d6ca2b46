"""Fine-tuning on several processes: the batches, losses and figures of one, one folder, and one fate."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch
from finetune_runs import QUICK, data, model, run, weights, without_times  # noqa: F401 (fixtures)
from ranks import (
    complaint,
    finetune_again,
    finetune_captured,
    finetune_on_other_data,
    finetune_pruned,
    finetune_rank,
    finetune_several,
    finetune_stopped_on_rank_1,
    run_ranks,
)

from electra_core.downstream.choices import Choose
from electra_core.downstream.classify import Classify
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag
from electra_core.execution.distributed import Ranks
from electra_core.finetuning.data import encode_data, plan_batches, read_data
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.finetuning.steps import Job, _full_step, _parts, shares
from electra_core.runs.metrics_log import read_metrics
from electra_core.tokenizer import load_tokenizer

SETTINGS = replace(QUICK, epochs=2, learning_rate=5e-4, dropout=0.0, evaluations=2, precision="fp32")
FILES = {
    Tag: (tiny_model.names_to_tag, "conll"),
    Answer: (tiny_model.questions, "json"),
    Choose: (tiny_model.choices, "jsonl"),
    MultiLabel: (tiny_model.several_labels, "jsonl"),
}


def on_ranks(
    size: int, model: Path, data: tuple[Path, Path], out: Path, settings: FinetuneSettings = SETTINGS,
    task: Any = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """A fine-tuning by `size` processes, each of which reports the same, and rank 0 alone says something."""
    arguments = (model, data, out, task or Classify(), settings, options)
    (report, *_), *others = run_ranks(size, finetune_rank, *arguments)
    for other, said, heard in others:
        assert without_times(other) == without_times(report) and not said and not heard
    return report


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def assert_like(ours: Path, theirs: Path) -> None:
    """Losses, dev figures and weights within the rounding of a sum in another order."""
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4, abs=1e-5)
    one, two = weights(ours), weights(theirs)
    assert one.keys() == two.keys()
    for name in one:  # a gradient near 0 may round to either side of it; Adam then takes a whole step there
        assert (one[name] - two[name]).abs().mean() < 2e-5, name


def test_shares_hold_every_unit_once_in_lengths_alike() -> None:
    units = np.arange(11)  # sorted by length
    assert [share.tolist() for share in shares(units, 3)] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]
    assert [share.tolist() for share in shares(units[:2], 4)] == [[0], [1], [0], [0]]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"batch_size": 100}])
def test_every_example_has_the_same_weight(model, data, tmp_path: Path, size: int, changes: dict) -> None:
    """161 examples: the rest is one, and with accumulation a step has fewer batches than others."""
    seen: dict[int, set[float]] = {}
    settings = replace(SETTINGS, **changes)
    lines = tiny_model.reviews(tmp_path / "train.tsv", 161)
    task, examples, _, _ = read_data(Classify(), lines, data[1], settings, lambda line: None)
    encoded = encode_data(task, examples, examples[:1], load_tokenizer(model), True, lambda line: None)
    plan = plan_batches(encoded.train, settings, seed=0)
    for rank in range(size):
        job = Job(task, model, settings, encoded, torch.device("cpu"), torch.float32, None, Ranks(rank, size))
        for step in range(len(plan)):
            for part in _parts(job, plan, _full_step(settings, plan), step):
                units = len(part.batch.unit_starts) - 1
                seen.setdefault(step, set()).add(round(float(part.share) / units, 6))
    weights = set.union(*seen.values()) - {0.0}
    full = settings.batch_size * settings.accumulate
    assert weights == {round(1 / full, 6)}


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        (3, {"accumulate": 2}),
        (2, {"engine": "static", "accumulate": 2}),
        (2, {"optimizer": "adamw", "freeze": "1", "class_weights": True}),
    ],
    ids=str,
)
def test_several_processes_train_as_one_does(model, data, tmp_path: Path, size: int, changes: dict) -> None:
    """161 examples: the last batch of an epoch is one, fewer than there are processes."""
    files = tiny_model.reviews(tmp_path / "train.tsv", 161), data[1]
    settings = replace(SETTINGS, **changes)
    alone = run(model, files, tmp_path / "one", settings=settings)
    report = on_ranks(size, model, files, tmp_path / "several", settings)
    assert_like(tmp_path / "several", tmp_path / "one")
    assert report["best"] == pytest.approx(alone["best"], rel=1e-3) and report["train_examples"] == 161
    assert not (tmp_path / "several" / "checkpoints").exists()


@pytest.mark.parametrize("task", [Tag, Answer, Choose, MultiLabel])
def test_every_kind_of_task(model, tmp_path: Path, task: type) -> None:
    write, ending = FILES[task]
    files = write(tmp_path / f"train.{ending}", 41), write(tmp_path / f"dev.{ending}", 15, seed=1)
    alone = run(model, files, tmp_path / "one", task(), SETTINGS)
    report = on_ranks(2, model, files, tmp_path / "two", task=task())
    assert_like(tmp_path / "two", tmp_path / "one")
    assert report["best"] == pytest.approx(alone["best"], rel=1e-3)


def test_captured_steps_are_the_same_bits(model, data, tmp_path: Path) -> None:
    """Over pretended graphs; each process has shapes of its own."""
    settings = replace(SETTINGS, engine="static", dropout=0.1)
    on_ranks(2, model, data, tmp_path / "static", settings)
    reports = run_ranks(2, finetune_captured, model, data, tmp_path / "graph", Classify(), settings)
    assert all(max(replays) >= 2 for _, replays in reports)
    ours, theirs = weights(tmp_path / "graph"), weights(tmp_path / "static")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_signal_to_one_stops_all_and_they_resume_bit_for_bit(model, data, tmp_path: Path) -> None:
    settings = replace(SETTINGS, dropout=0.1, seeds=2)
    whole = on_ranks(2, model, data, tmp_path / "whole", settings)
    arguments = (model, data, tmp_path / "run", Classify(), settings)
    reports = [report for report, _, _ in run_ranks(2, finetune_stopped_on_rank_1, *arguments)]
    assert [report["stopped_by"] for report in reports] == ["SIGTERM"] * 2
    assert [seed["steps"] for seed in reports[0]["seeds"]] == [8], "one step later than it was known"
    resumed = on_ranks(2, model, data, tmp_path / "run", settings, resume=True)
    assert without_times(resumed) == without_times(whole)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    done = on_ranks(2, model, data, tmp_path / "run", settings, resume=True)
    assert without_times(done) == without_times(whole), "which is finished"


def test_one_goes_on_with_what_two_have_begun(model, data, tmp_path: Path) -> None:
    run_ranks(2, finetune_stopped_on_rank_1, model, data, tmp_path / "run", Classify(), SETTINGS)
    run(model, data, tmp_path / "run", settings=SETTINGS, resume=True)
    run(model, data, tmp_path / "alone", settings=SETTINGS)
    assert_like(tmp_path / "run", tmp_path / "alone")


def test_processes_that_read_other_data_are_told(model, data, tmp_path: Path) -> None:
    arguments = (model, data, tmp_path / "run", Classify(), SETTINGS)
    first, second = run_ranks(2, finetune_on_other_data, *arguments)
    assert first == "AnotherRankFailed: rank 1 has an error"
    assert second.endswith("model, data or settings differ from those of rank 0")
    assert not (tmp_path / "run").exists()


def test_more_processes_than_a_batch_has_examples(model, data, tmp_path: Path) -> None:
    settings = replace(SETTINGS, batch_size=1)
    reports = run_ranks(2, finetune_rank, model, data, tmp_path / "run", Classify(), settings, {})
    assert reports[0] == "UserError: batch_size: expected at least 1 per process, 2 in all, got 1"


def test_a_mistake_is_told_once(model, data, tmp_path: Path) -> None:
    command = ["finetune", "--model", str(model), "--task", "classify", "--train", str(tmp_path / "none.tsv")]
    command += ["--out", str(tmp_path / "run"), "--device", "cpu"]
    reports = run_ranks(2, complaint, command, [])
    assert [status for status, _ in reports] == [2, 2]
    assert "".join(text for _, text in reports).count("none.tsv") == 1


def test_one_script_may_fine_tune_several_times(model, data, tmp_path: Path) -> None:
    """Also after an error that it has caught: the second finds a folder that is not empty."""
    outs = [tmp_path / name for name in ("one", "one", "two", "three")]
    settings = replace(SETTINGS, epochs=0.3)
    reports = run_ranks(2, finetune_several, model, data, outs, Classify(), settings)
    assert reports[0] == [3, "UserError", 3, 3] and reports[1] == [3, "AnotherRankFailed", 3, 3]


@pytest.mark.parametrize("where", ["model of a task", "check of a task", "evaluation of a task"])
def test_memory_that_one_lacks_ends_all_and_a_script_may_go_on(model, data, tmp_path: Path, where: str) -> None:
    settings = replace(SETTINGS, epochs=0.3)
    reports = run_ranks(2, finetune_again, model, data, tmp_path / "run", Classify(), settings, where)
    assert reports == [("AnotherRankFailed", 3), ("OutOfMemoryError", 3)]


def test_an_exception_of_the_caller_s_function_ends_all(model, data, tmp_path: Path) -> None:
    """As Optuna's TrialPruned: in a script that goes on with the next trial, the other process waited for it."""
    settings = replace(SETTINGS, epochs=1)
    reports = run_ranks(2, finetune_pruned, model, data, tmp_path / "run", Classify(), settings)
    assert reports == [("KeyError(5)", 10), ("AnotherRankFailed('rank 0 has an error')", 10)]


def test_torchrun(model, data, tmp_path: Path) -> None:
    """The command itself: what is printed is printed once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "electra_core", "finetune", "--model", str(model), "--task", "classify"]
    command += ["--train", str(data[0]), "--dev", str(data[1]), "--out", str(tmp_path / "run"), "--epochs", "0.5"]
    command += ["--device", "cpu", "--quiet"]
    ended = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                           timeout=240)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("fine-tuned model: ") == 1
    assert ended.stderr.count("steps in total, which may be too few") == 1
    assert (tmp_path / "run" / "model.safetensors").is_file()
