"""Models from a run's checkpoints: the same files that the run itself writes, while it goes on or afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_runs import base, data, one_thread, stop_at, train  # noqa: F401

from electra_core import Discriminator, UserError, convert_run, load_tokenizer
from electra_core.checkpoint import Checkpoint, save_checkpoint
from electra_core.cli import main
from electra_core.runs.checkpoint_files import folder_name


def checkpoint(run: Path, step: int = 8) -> Path:
    return run / "checkpoints" / folder_name(step)


def under_way(run: Path, folder: Path, step: int) -> Path:
    """The run as it was after `step` steps, without the models of its end."""
    stop_at(folder, run, step)
    for kind in ("discriminator", "generator"):
        shutil.rmtree(folder / kind)
    return folder


def test_the_last_checkpoint_is_the_run_s_own_models(base, tmp_path):
    written = convert_run(base, tmp_path)
    assert written == [tmp_path / "discriminator", tmp_path / "generator"]
    for path in written:
        ours = {file.name: file.read_bytes() for file in path.iterdir()}
        theirs = {file.name: file.read_bytes() for file in (base / path.name).iterdir()}
        cards = [files.pop("README.md").decode() for files in (ours, theirs)]
        assert ours == theirs
        assert cards[0].split("on the corpus")[0] == cards[1].split("on a corpus")[0]
        assert cards[0].split("vocabulary")[1] == cards[1].split("vocabulary")[1]  # versions, held-out figures


def test_an_earlier_checkpoint_is_the_model_of_that_step(base, data, tmp_path):
    """As a run has it that is stopped there."""
    train(data, tmp_path / "stopped", on_evaluation=lambda figures: figures["step"] == 4)
    convert_run(checkpoint(base, 4), tmp_path / "models")
    for kind in ("discriminator", "generator"):
        ours, theirs = (
            load_file(tmp_path / place / kind / "model.safetensors") for place in ("models", "stopped")
        )
        assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    assert "4 of 8 steps" in (tmp_path / "models/discriminator/README.md").read_text()


def test_a_run_under_way_needs_its_corpus_for_the_tokenizer(base, data, tmp_path, capsys):
    run = under_way(base, tmp_path / "run", 4)
    with pytest.raises(UserError, match="has written no model yet, whose tokenizer could be taken; give data"):
        convert_run(run, tmp_path / "models")
    given = ["--checkpoint", str(run), "--out", str(tmp_path / "models"), "--data", str(data)]
    assert main(["convert", *given]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"wrote {tmp_path / 'models' / kind}" for kind in ("discriminator", "generator")]
    assert Discriminator.from_pretrained(tmp_path / "models").config.vocab_size
    told = load_tokenizer(tmp_path / "models/discriminator")
    assert told.encode("some words") == load_tokenizer(base / "discriminator").encode("some words")


@pytest.mark.parametrize("objective", ["mlm", "all-tokens-mlm"])
def test_the_models_of_another_objective(objective, data, tmp_path):
    train(data, tmp_path / "run", {"objective": objective, "steps": 2})
    for path in convert_run(tmp_path / "run", tmp_path / "models"):
        theirs = tmp_path / "run" / path.name / "model.safetensors"
        assert (path / "model.safetensors").read_bytes() == theirs.read_bytes()


def test_what_is_no_checkpoint_is_refused(base, tmp_path):
    with pytest.raises(UserError, match="not a checkpoint; expected a folder in RUN/checkpoints"):
        convert_run(base / "discriminator", tmp_path / "models")
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no checkpoint"):
        convert_run(tmp_path / "empty", tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_run_s_own_models_are_not_replaced(base, tmp_path):
    with pytest.raises(UserError, match="is the run's own folder"):
        convert_run(checkpoint(base, 4), base)
    for kind in ("discriminator", "generator"):
        assert "8 of 8 steps" in (base / kind / "README.md").read_text()


def test_a_checkpoint_that_its_run_removes_meanwhile(base, tmp_path, monkeypatch):
    run = stop_at(tmp_path / "run", base, 8)
    whole = Checkpoint.restore_model

    def late(self, model):
        shutil.rmtree(self.path)
        return whole(self, model)

    monkeypatch.setattr(Checkpoint, "restore_model", late)
    with pytest.raises(UserError, match="step-00000004: removed by its run meanwhile"):
        convert_run(checkpoint(run, 4), tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_damaged_checkpoint_is_refused(base, tmp_path):
    run = stop_at(tmp_path / "run", base, 8)
    weights = checkpoint(run) / "state.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"step-00000008: damaged \(the checksum does not match\)"):
        convert_run(checkpoint(run), tmp_path / "models")
    convert_run(run, tmp_path / "models")  # the newest intact one
    assert "4 of 8 steps" in (tmp_path / "models/generator/README.md").read_text()


def test_a_relative_path(base, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoint(base))
    assert len(convert_run(".", tmp_path)) == 2


def test_a_fine_tuning_s_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path / "run/checkpoints", 3, {}, {"identity": {"settings": {}}}, keep=2)
    with pytest.raises(UserError, match="step-00000003: not a checkpoint of a pre-training run"):
        convert_run(tmp_path / "run", tmp_path / "models")


def test_a_run_without_models_says_how_to_get_one(base, tmp_path, capsys):
    run = under_way(base, tmp_path / "run", 8)
    for given in (run, checkpoint(run)):
        assert main(["detect", "--model", str(given), "some words"]) == 2
        assert (
            "`electra convert --checkpoint` makes a model of a pre-training's checkpoint"
            in capsys.readouterr().err
        )
