"""What a pre-training run may be resumed from: damage is passed over, and what does not fit is refused by name."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import contents
from safetensors.torch import load_file
from small_runs import assert_same_run, base, data, make_data, one_thread, rows, stop_at, train  # noqa: F401

from electra_core import checkpoint
from electra_core.checkpoint import newest_intact
from electra_core.config import PretrainConfig
from electra_core.errors import UserError
from electra_core.pretraining import run_folder
from electra_core.runs.folder import find_checkpoint
from electra_core.runs.state import read_state


def cut_short(path: Path) -> None:
    (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "state.safetensors").read_bytes())
    content[len(content) // 2] ^= 4
    (path / "state.safetensors").write_bytes(content)


def lose_the_tensors(path: Path) -> None:
    (path / "state.safetensors").unlink()


def spoil_the_record(path: Path) -> None:
    (path / "state.json").write_text('{"step": 8, "sha', encoding="utf-8")


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, lose_the_tensors, spoil_the_record])
def test_a_damaged_checkpoint_is_passed_over(
    data: Path, base: Path, tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = stop_at(tmp_path / "run", base, 8)
    damage(run / "checkpoints" / "step-00000008")
    train(data, run, resume=True, quiet=False)
    assert "step-00000008: damaged" in caplog.text
    assert_same_run(run, base)


def test_no_intact_checkpoint_is_an_error_and_nothing_is_removed(data: Path, base: Path, tmp_path: Path) -> None:
    run = stop_at(tmp_path / "run", base, 8)
    for path in (run / "checkpoints").iterdir():
        flip_a_bit(path)
    with pytest.raises(UserError, match="no intact checkpoint"):
        train(data, run, resume=True)
    assert rows(run) == rows(base) and len(list((run / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "sizes", "said"),
    [
        ({"learning_rate": 2e-3}, {}, "learning_rate was 0.001, is now 0.002"),
        ({"batch_size": 16, "seed": 3}, {}, "batch_size was 8, is now 16; seed was 0, is now 3"),
        ({"steps": 9}, {}, "steps was 8, is now 9"),
        ({}, {"hidden_dropout_prob": 0.2}, "hidden_dropout_prob was 0.1, is now 0.2"),
    ],
    ids=["rate", "two", "steps", "encoder"],
)
def test_another_configuration_cannot_go_on(
    data: Path, base: Path, tmp_path: Path, changes: dict, sizes: dict, said: str
) -> None:
    run = stop_at(tmp_path / "run", base, 4)
    with pytest.raises(UserError, match="cannot resume") as error:
        train(data, run, changes, sizes=sizes, resume=True)
    assert said in str(error.value)
    assert rows(run) == rows(base) and (run / "config.toml").read_text() == (base / "config.toml").read_text()


def test_a_run_with_examples_cut_by_other_rules_cannot_go_on(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rules had no number, and their runs have none in their checkpoints."""
    run = stop_at(tmp_path / "run", base, 4)
    newest, _ = newest_intact(run / "checkpoints")
    assert newest is not None and newest.meta["identity"]["examples"] == run_folder.RULES == 2
    now = newest.meta["identity"]
    before = {name: value for name, value in now.items() if name != "examples"}
    with pytest.raises(UserError, match="cuts text into other examples"):
        run_folder.check_identity(replace(newest, meta={"identity": before}), now)
    run_folder.check_identity(replace(newest, meta={"identity": before}), now | {"examples": 1})
    monkeypatch.setattr(run_folder, "RULES", 3)
    with pytest.raises(UserError, match=r"cannot resume .* a version that cuts text into other examples"):
        train(data, run, resume=True)


def test_a_setting_that_older_versions_did_not_have_was_as_its_default(base: Path) -> None:
    newest, _ = newest_intact(base / "checkpoints")
    assert newest is not None
    now = newest.meta["identity"]
    assert now["pretrain"]["one_segment_probability"] == PretrainConfig().one_segment_probability
    before = now["pretrain"].copy()
    del before["one_segment_probability"]
    older = replace(newest, meta={"identity": now | {"pretrain": before}})
    run_folder.check_identity(older, now)
    with pytest.raises(UserError, match=r"one_segment_probability was 0\.1, is now 1\.0"):
        run_folder.check_identity(older, now | {"pretrain": before | {"one_segment_probability": 1.0}})


def test_a_fine_tuning_is_not_resumed_as_a_pre_training(data: Path, base: Path, tmp_path: Path) -> None:
    run = stop_at(tmp_path / "run", base, 4)
    newest, _ = newest_intact(run / "checkpoints")
    assert newest is not None
    fine_tuning = {"runs": [], "identity": {"settings": {"epochs": 1}, "task": {}, "start": {}, "rules": {}}}
    with pytest.raises(UserError, match=r"cannot resume .* it is not a checkpoint of a pre-training run"):
        run_folder.check_identity(replace(newest, meta=fine_tuning), newest.meta["identity"])


def test_other_data_cannot_go_on(base: Path, tmp_path: Path) -> None:
    run, other = stop_at(tmp_path / "run", base, 4), make_data(tmp_path, seed=1)
    with pytest.raises(UserError, match=r"corpus .* differs"):
        train(other, run, resume=True)


def test_how_a_run_is_watched_may_change(data: Path, base: Path, tmp_path: Path) -> None:
    run = stop_at(tmp_path / "run", base, 4)
    train(data, run, {"eval_every": 100, "log_every": 2, "checkpoint_every": 2, "accumulate": 2}, resume=True)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 4, 6, 8, 8]


def test_nothing_else_may_change(base: Path) -> None:
    newest, _ = newest_intact(base / "checkpoints")
    assert newest is not None
    settings = {setting.name for setting in fields(PretrainConfig)}
    assert settings - newest.meta["identity"]["pretrain"].keys() == {
        "eval_every", "eval_examples", "log_every", "checkpoint_every", "keep_checkpoints",  # watched and saved
        "accumulate", "engine", "recompute", "sharding",  # computed
    }  # fmt: skip


def test_until_it_saves_a_resumed_run_holds_what_it_went_on_from(data: Path, base: Path, tmp_path: Path) -> None:
    """Its state says so: if it is killed and loses its checkpoints, it is not begun anew. Older ones are gone."""
    run, saved = stop_at(tmp_path / "run", base, 4), []
    (run / "checkpoints" / "step-00000002").mkdir()

    def look(figures: dict[str, float]) -> None:
        kept = [path.name for path in (run / "checkpoints").iterdir()]
        saved.append((figures["step"], read_state(run)["saved"], kept))

    train(data, run, {"keep_checkpoints": 1}, resume=True, on_evaluation=look)
    assert saved == [(8, 4, ["step-00000004"])]


def test_going_on_from_a_pair_of_model_directories(data: Path, base: Path, tmp_path: Path) -> None:
    """Continued pre-training starts from both halves' weights: at next to no rate it ends with them."""
    still = {"learning_rate": 1e-30, "weight_decay": 0.0, "optimizer": "adamw"}
    pair = {"init_discriminator": base / "discriminator", "init_generator": base / "generator"}
    train(data, tmp_path / "more", still, **pair)
    for kind in ("discriminator", "generator"):
        before = load_file(base / kind / "model.safetensors")
        after = load_file(tmp_path / "more" / kind / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_that_goes_on_started_from_the_given_pair_or_says_so(data: Path, base: Path, tmp_path: Path) -> None:
    """Weights decide: the folders may have other names by then, or be gone. No pair is as good as the same one."""
    models = {"init_discriminator": tmp_path / "was/discriminator", "init_generator": tmp_path / "was/generator"}
    other, slow = tmp_path / "whole" / "discriminator", {"learning_rate": 1e-4}
    for model in models.values():
        shutil.copytree(base / model.name, model)
    train(data, tmp_path / "whole", slow, **models)
    stop_at(tmp_path / "run", tmp_path / "whole", 4)
    with pytest.raises(UserError, match=f"{other}', but the run was started with {tmp_path}/was"):
        train(data, tmp_path / "run", slow, resume=True, **models | {"init_discriminator": other})
    assert rows(tmp_path / "run") == rows(tmp_path / "whole"), "nothing was removed"
    train(data, tmp_path / "run", slow, resume=True, init_discriminator=base, init_generator=base)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    train(data, tmp_path / "run", slow, resume=True)
    shutil.copytree(other, models["init_discriminator"], dirs_exist_ok=True)
    with pytest.raises(UserError, match="was started with other weights of that name"):
        train(data, tmp_path / "run", slow, resume=True, **models)
    shutil.rmtree(tmp_path / "was")
    train(data, tmp_path / "run", slow, resume=True, **models)
    with pytest.raises(UserError, match=r"init_discriminator=.*, but the run was started without"):
        train(data, stop_at(tmp_path / "bare", base, 4), resume=True, **models)


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}], ids=str)
def test_a_run_does_not_go_over_the_model_it_starts_from(
    data: Path, base: Path, tmp_path: Path, options: dict[str, bool]
) -> None:
    """Neither where it lies in RUN, whatever the way there, nor where RUN has links to it; nothing is removed."""
    run, apart = shutil.copytree(base, tmp_path / "run"), shutil.copytree(base, tmp_path / "apart")
    linked, bare = tmp_path / "linked", tmp_path / "bare"
    linked.symlink_to(run)
    for kind in ("discriminator", "generator"):
        (tmp_path / "files" / kind).mkdir(parents=True)
        for file in (run / kind).iterdir():
            (tmp_path / "files" / kind / file.name).symlink_to(file)
        (bare / kind).parent.mkdir(exist_ok=True)
        (bare / kind).symlink_to(apart / kind)
    before = contents(tmp_path)
    for out, ours, theirs in (
        (run, run / "discriminator", apart / "generator"), (run, apart / "discriminator", run / "generator"),
        (run, run, run), (run, linked, linked), (linked, run, run), (run / "discriminator", run, run),
        (run, tmp_path / "files/discriminator", tmp_path / "files/generator"), (bare, apart, apart),
    ):  # fmt: skip
        with pytest.raises(
            UserError, match=r"holds the model to start from .*write the new run to another folder"
        ):
            train(data, out, init_discriminator=ours, init_generator=theirs, **options)
    assert contents(tmp_path) == before
    train(data, tmp_path / "run" / "more", {"steps": 1}, init_discriminator=run, init_generator=run)


def test_a_new_run_is_not_mixed_up_with_checkpoints_that_no_state_belongs_to(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ends before its first checkpoint would be resumed from them."""
    run = stop_at(tmp_path / "run", base, 8)
    (run / "state.json").unlink()

    def fails(*_: object, **__: object) -> None:
        raise UserError("no step is taken")

    monkeypatch.setattr("electra_core.pretrain.training_steps", fails)
    with pytest.raises(UserError, match="no step is taken"):
        train(data, run, overwrite=True)
    assert not list((run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("name", ["electra-core", "torch", "python", "machine"])
def test_going_on_with_another_version_is_told(
    base: Path, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_checkpoint(base, resume=True, overwrite=False)
    assert not caplog.messages
    now = checkpoint.versions()
    monkeypatch.setattr(checkpoint, "versions", lambda: now | {name: "9.9"})
    find_checkpoint(base, resume=True, overwrite=False)
    said = f"{base}: continues, but perhaps not bit for bit: {name} {now[name]}, now 9.9"
    assert caplog.messages == [said]


def test_a_folder_without_a_run_is_not_resumed(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that was killed before its first checkpoint begins anew, somebody's files stay what they are."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "README.md").write_text("mine")
    with pytest.raises(UserError, match="theirs: not empty, but holds no run to resume"):
        train(data, tmp_path / "theirs", resume=True)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["README.md"]
    for place, name in enumerate(("state.json", "config.toml", "")):
        run = tmp_path / str(place)
        run.mkdir()
        if name:
            (run / name).write_text("")
        with caplog.at_level("INFO"):
            assert train(data, run, {"steps": 1}, resume=True).steps == 1
        assert caplog.messages.count(f"{run}: nothing to resume; starting at step 0") == 1
    train(data, run, {"steps": 1}, resume=True)
    assert caplog.messages.count(f"{run}: nothing to resume; starting at step 0") == 1


def test_a_pair_of_other_words_is_refused(data: Path, base: Path, tmp_path: Path) -> None:
    """As many words in another order: everything fits, and means something else."""
    pair = {
        f"init_{kind}": shutil.copytree(base / kind, tmp_path / kind) for kind in ("discriminator", "generator")
    }
    words = (data / "tokenizer" / "vocab.txt").read_text(encoding="utf-8").split("\n")
    for file in pair["init_discriminator"].glob("tokenizer*.json"):
        file.unlink()
    vocabulary = pair["init_discriminator"] / "vocab.txt"
    vocabulary.write_text("\n".join([*words[:5], words[6], words[5], *words[7:]]), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"its tokenizer differs from the corpus's; .* words are added .*add_tokens"
    ):
        train(data, tmp_path / "run", **pair)
    assert not (tmp_path / "run").exists()
    vocabulary.unlink()  # without a tokenizer there is nothing to compare with
    train(data, tmp_path / "run", {"steps": 1}, **pair)
