"""A fine-tuning that was killed or stopped goes on, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
from finetune_runs import (  # noqa: F401
    SETTINGS,
    Killed,
    assert_same_end,
    at_step,
    data,
    killed,
    model,
    train,
    without_times,
)
from safetensors.torch import load_file

from electra_core.downstream.classify import Classify
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.squad import Answer
from electra_core.errors import UserError, on_command_line
from electra_core.finetune import finetune
from electra_core.finetuning import folder as finetune_folder
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.predict import evaluate, load
from electra_core.runs.metrics_log import read_metrics
from electra_core.runs.state import read_state


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupted(model, data, out: Path, settings: FinetuneSettings = SETTINGS) -> dict:
    """The report of a training that `interrupt` ends."""
    with pytest.raises(KeyboardInterrupt, match="resume=True continues"):
        train(model, data, out, settings)
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize("optimizer", ["electra-adam", "adamw"])
@pytest.mark.parametrize("seed, step", [(0, 3), (0, 13), (1, 7)])
def test_a_killed_run_ends_as_the_one_that_was_not(model, data, tmp_path, monkeypatch, seed, step, optimizer):
    settings = replace(SETTINGS, seeds=2, optimizer=optimizer)
    train(model, data, tmp_path / "whole", settings)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, step, killed, seed)
        train(model, data, tmp_path / "out", settings)
    assert not (tmp_path / "out/metrics.json").exists()
    lines: list[str] = []
    train(model, data, tmp_path / "out", settings, resume=True, say=lines.append)
    assert [line for line in lines if "continuing" in line] == (
        [f"continuing at step {20 * seed + step // 5 * 5}"] if step > 5 else []
    )
    assert_same_end(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out/checkpoints").exists()


def test_a_stopped_run_holds_the_best_so_far_and_ends_the_same(model, data, tmp_path, monkeypatch):
    train(model, data, tmp_path / "whole")
    for step in (13, 3):  # after an evaluation, and before the first one
        out = tmp_path / f"out{step}"
        with monkeypatch.context() as patch:
            at_step(patch, step, interrupt)
            report = interrupted(model, data, out)
        assert report["stopped_by"] == "SIGINT" and report["seeds"][0]["steps"] == step
        assert evaluate(load(out), data[1]).metrics["accuracy"] == pytest.approx(report["best"]["accuracy"])
        train(model, data, out, resume=True)
        assert_same_end(out, tmp_path / "whole")


def test_a_seed_that_is_stopped_before_its_first_evaluation_is_no_result(model, data, tmp_path, monkeypatch):
    settings = replace(SETTINGS, seeds=2)
    train(model, data, tmp_path / "whole", settings)
    with monkeypatch.context() as patch:
        at_step(patch, 2, interrupt, seed=1)
        report = interrupted(model, data, tmp_path / "out", settings)
    assert [run["seed"] for run in report["seeds"]] == [0] and report["stopped_by"] == "SIGINT"
    train(model, data, tmp_path / "out", settings, resume=True)
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_after_another_signal_python_gets_the_report_and_a_warning(model, data, tmp_path, monkeypatch, caplog):
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    report = finetune(model, Classify(), *data, tmp_path / "out", SETTINGS, quiet=True)
    assert report["stopped_by"] == "SIGTERM"
    (line,) = [record for record in caplog.records if "stopped by" in record.getMessage()]
    assert line.levelname == "WARNING" and "resume=True continues" in line.getMessage()


def test_on_the_command_line_an_interrupt_is_no_exception(model, data, tmp_path, monkeypatch):
    at_step(monkeypatch, 3, interrupt)
    lines: list[str] = []
    with on_command_line():
        report = train(model, data, tmp_path / "out", say=lines.append)
    assert report["stopped_by"] == "SIGINT"
    assert [line for line in lines if "stopped by SIGINT" in line and "--resume continues" in line]


def test_early_stopping_counts_on(model, data, tmp_path, monkeypatch):
    settings = replace(SETTINGS, epochs=5, learning_rate=1e-12, patience=3, evaluations=1)  # never gets better
    train(model, data, tmp_path / "whole", settings)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 25, killed)
        train(model, data, tmp_path / "out", settings)
    report = train(model, data, tmp_path / "out", settings, resume=True)
    assert report["seeds"][0]["steps"] == 40
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_rows_of_labels_go_on_in_bf16_too(model, tmp_path, monkeypatch):
    """And what was judged in training is judged the same afterwards."""
    files = [
        tiny_model.several_labels(tmp_path / f"{name}.jsonl", count, seed)
        for name, count, seed in (("train", 64, 0), ("dev", 24, 1))
    ]
    settings, task = replace(SETTINGS, evaluations=1, checkpoint_every=3, precision="bf16"), MultiLabel()
    report = train(model, files, tmp_path / "whole", settings, task)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 7, killed)
        train(model, files, tmp_path / "out", settings, task)
    train(model, files, tmp_path / "out", settings, task, resume=True)
    assert_same_end(tmp_path / "out", tmp_path / "whole")
    again = evaluate(load(tmp_path / "out", precision="bf16"), files[1]).metrics
    assert again == pytest.approx({name: report["best"][name] for name in again})


def test_questions_with_a_tuned_threshold_go_on_between_evaluations(model, tmp_path, monkeypatch):
    files = [
        tiny_model.questions(tmp_path / f"{name}.json", count, seed, unanswerable=True)
        for name, count, seed in (("train", 64, 0), ("dev", 24, 1))
    ]
    settings = replace(SETTINGS, evaluations=1, checkpoint_every=3)
    task = Answer(max_length=64)
    train(model, files, tmp_path / "whole", settings, task)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 7, killed)
        train(model, files, tmp_path / "out", settings, task)
    lines: list[str] = []
    train(model, files, tmp_path / "out", settings, task, resume=True, say=lines.append)
    assert "continuing at step 6" in lines
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_sigkill_of_the_command(model, data, tmp_path):
    command = [
        sys.executable, "-m", "electra_core", "finetune", "--model", model, "--task", "classify",
        "--train", data[0], "--dev", data[1], "--batch-size", "4", "--epochs", "8", "--dropout", "0.1",
        "--cache", "none", "--quiet",
    ]  # fmt: skip
    command = [str(part) for part in command]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert list((tmp_path / "out").glob("checkpoints/step-*"))
    done = subprocess.run([*command, "--out", str(tmp_path / "out"), "--resume"], capture_output=True, text=True)
    assert done.returncode == 0 and "continuing at step" in done.stderr
    assert_same_end(tmp_path / "out", tmp_path / "whole")


# ---- what does not go together ---------------------------------------------------------------------------


@pytest.fixture
def stopped(model, data, tmp_path, monkeypatch) -> Path:
    with monkeypatch.context() as patch:
        at_step(patch, 13, interrupt)
        interrupted(model, data, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def another(model, data, tmp_path) -> dict[str, tuple[Path, tuple[Path, Path], FinetuneSettings]]:
    """What makes it another fine-tuning, and what is said of it."""
    other = tiny_model.make_model(tmp_path / "other", dropout=0.1)
    weights = load_file(other / "model.safetensors")
    weights["electra.embeddings.LayerNorm.bias"] += 1
    from safetensors.torch import save_file

    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    fewer = tiny_model.reviews(tmp_path / "fewer.tsv", 158)
    return {
        "epochs was 2, is now 3": (model, data, replace(SETTINGS, epochs=3)),
        "metric was 'accuracy', is now 'macro_f1'": (model, data, replace(SETTINGS, metric="macro_f1")),
        "training data differs": (model, (fewer, data[1]), SETTINGS),
        "development data differs": (model, (data[0], fewer), SETTINGS),
        "weights differs": (other, data, SETTINGS),
    }


def test_another_run_does_not_go_on(model, data, stopped, another):
    before = sorted(path.name for path in stopped.rglob("*"))
    for message, (start, files, settings) in another.items():
        with pytest.raises(UserError, match=message) as caught:
            train(start, files, stopped, settings, resume=True)
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in stopped.rglob("*")) == before
    train(model, data, stopped, replace(SETTINGS, log_every=7), resume=True)  # how it is watched may change


def test_what_was_finished_is_not_trained_again(model, data, another, tmp_path):
    report = train(model, data, tmp_path / "out")
    written = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    lines: list[str] = []
    assert train(model, data, tmp_path / "out", resume=True, say=lines.append) == report
    assert lines == [
        f"{data[0]}: 160 rows, text 'sentence', label 'label' (neg 80, pos 80)",
        f"{tmp_path / 'out'}: already finished",
    ]
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == written
    for message, (start, files, settings) in another.items():
        with pytest.raises(UserError, match=f"another finished model; .*{message}.*; overwrite replaces it$"):
            train(start, files, tmp_path / "out", settings, resume=True)
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == written


def test_what_an_earlier_version_finished_is_finished(model, data, tmp_path):
    """It did not have all of today's settings; they are what it did."""
    report = train(model, data, tmp_path / "out", replace(SETTINGS, epochs=1))
    before = {name: value for name, value in report["settings"].items() if name != "original_depths"}
    (tmp_path / "out/metrics.json").write_text(json.dumps(report | {"settings": before}))
    train(model, data, tmp_path / "out", replace(SETTINGS, epochs=1), resume=True)
    with pytest.raises(UserError, match="original_depths was False, is now True"):
        train(model, data, tmp_path / "out", replace(SETTINGS, epochs=1, original_depths=True), resume=True)


def test_a_version_with_other_batches_is_told(model, data, stopped, tmp_path, monkeypatch):
    """What it has begun is not resumed; what it has finished is finished, though it told data otherwise."""
    report = train(model, data, tmp_path / "done", replace(SETTINGS, epochs=1))
    monkeypatch.setattr(finetune_folder, "RULES", finetune_folder.RULES + 1)
    with pytest.raises(
        UserError, match=r"cannot resume .* begun by a version with other batches, dropout or heads; finish it"
    ):
        train(model, data, stopped, resume=True)
    assert train(model, data, tmp_path / "done", replace(SETTINGS, epochs=1), resume=True) == report
    before = report["identity"] | {"start": report["identity"]["start"] | {"training data": "told otherwise"}}
    (tmp_path / "done/metrics.json").write_text(json.dumps(report | {"identity": before}))
    train(model, data, tmp_path / "done", replace(SETTINGS, epochs=1), resume=True)
    other = tiny_model.make_model(tmp_path / "other", dropout=0.1)
    with pytest.raises(UserError, match="another finished model"):
        train(other, data, tmp_path / "done", replace(SETTINGS, epochs=1, seed=1), resume=True)


def test_a_model_stays_until_there_is_another_unless_it_is_overwritten(model, data, tmp_path, monkeypatch):
    """metrics.json has gone, so it is not known to be finished, and there is no checkpoint."""
    train(model, data, tmp_path / "out", replace(SETTINGS, epochs=1))
    (tmp_path / "out/metrics.json").unlink()
    at_step(monkeypatch, 1, killed)
    with pytest.raises(Killed):
        train(model, data, tmp_path / "out", replace(SETTINGS, epochs=1), resume=True)
    assert (tmp_path / "out/model.safetensors").is_file()
    with pytest.raises(Killed):
        train(model, data, tmp_path / "out", replace(SETTINGS, epochs=1), overwrite=True)
    assert not (tmp_path / "out/model.safetensors").exists()


def test_overwritten_checkpoints_are_gone_even_without_a_state(model, data, stopped, monkeypatch):
    (stopped / "state.json").unlink()
    at_step(monkeypatch, 1, killed)
    with pytest.raises(Killed):
        train(model, data, stopped, overwrite=True)
    assert not list(stopped.glob("checkpoints/step-*"))


def test_with_nothing_to_go_on_from_it_begins(model, data, tmp_path):
    train(model, data, tmp_path / "out", replace(SETTINGS, epochs=1), resume=True)
    assert (tmp_path / "out/model.safetensors").exists()


def test_nothing_to_resume_is_said(model, data, tmp_path):
    lines: list[str] = []
    for resume in (False, True):
        train(model, data, tmp_path / f"{resume}", replace(SETTINGS, epochs=1), resume=resume, say=lines.append)
    assert [line for line in lines if "resume" in line] == [
        f"{tmp_path / 'True'}: nothing to resume; starting at step 0"
    ]


def test_a_full_folder_is_neither_resumed_nor_overwritten_unasked(model, data, stopped):
    with pytest.raises(UserError, match="not empty; resume continues the run in it, overwrite starts a new one"):
        train(model, data, stopped)
    report = train(model, data, stopped, replace(SETTINGS, epochs=1), overwrite=True)
    assert report["seeds"][0]["steps"] == 10
    assert [row["step"] for row in read_metrics(stopped / "metrics.jsonl") if "loss" in row] == [*range(1, 11)]


def test_the_model_of_an_overwritten_fine_tuning_answers_no_more(model, data, stopped, monkeypatch):
    """Neither before the new one's first evaluation nor where that never comes."""

    def fails(*arguments, **options):
        raise UserError("no step is taken")

    monkeypatch.setattr("electra_core.finetuning.seed.finetuning_steps", fails)
    (stopped / "letter.txt").write_text("dear")
    assert {"model.safetensors", "config.json", "task.json", "vocab.txt"} <= {p.name for p in stopped.iterdir()}
    with pytest.raises(UserError, match="no step is taken"):
        train(model, data, stopped, overwrite=True)
    assert {path.name for path in stopped.iterdir()} == {".lock", "config.toml", "letter.txt", "state.json"}


def test_a_folder_that_no_fine_tuning_made_keeps_what_lies_in_it(model, data, tmp_path):
    kept = [tmp_path / "out" / name for name in ("seed-3/mine", "tensorboard/mine", "letter")]
    for file in kept:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("dear")
    train(model, data, tmp_path / "out", replace(SETTINGS, epochs=1), overwrite=True)
    assert [file.name for file in kept if not file.exists()] == []


def test_a_damaged_checkpoint_is_named(model, data, stopped, caplog):
    (file,) = stopped.glob("checkpoints/step-*/state.safetensors")
    file.write_bytes(file.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(UserError, match="no intact checkpoint to resume from"):
        train(model, data, stopped, resume=True)
    assert "the checksum does not match" in caplog.text


def test_checkpoints_out_of_sight_are_not_taken_for_none(model, data, stopped):
    shutil.rmtree(stopped / "checkpoints")
    before = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds a run but no checkpoint of it"):
        train(model, data, stopped, resume=True)
    (stopped / "checkpoints").symlink_to(stopped / "not mounted")
    for option in ("resume", "overwrite"):
        with pytest.raises(UserError, match=r"checkpoints: links to .*, which is not there"):
            train(model, data, stopped, **{option: True})
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_the_state_tells_of_checkpoints(stopped):
    (folder,) = stopped.glob("checkpoints/step-*")
    assert read_state(stopped)["saved"] == int(folder.name[5:])


def test_the_model_to_fine_tune_is_not_overwritten(model, data, tmp_path):
    shutil.copytree(model, tmp_path / "run/discriminator")
    for out in (tmp_path / "run", tmp_path / "run/discriminator"):
        with pytest.raises(UserError, match="holds the model to fine-tune"):
            train(tmp_path / "run/discriminator", data, out, overwrite=True)


def test_two_processes_do_not_train_in_one_folder(model, data, tmp_path):
    from electra_core.runs.state import RunState

    (tmp_path / "out").mkdir()
    with RunState(tmp_path / "out") as other:
        other.begin()
        with pytest.raises(UserError, match="is being trained by process"):
            train(model, data, tmp_path / "out", overwrite=True)
