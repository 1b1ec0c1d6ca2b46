"""Fine-tuning on what cannot be right: users' mistakes are one line and leave nothing behind, doubts are said."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from finetune_runs import QUICK, data, model, run  # noqa: F401
from reading import write_lines

from electra_core.config import EncoderConfig, PretrainConfig, updated
from electra_core.downstream.classify import Classify
from electra_core.errors import UserError, writing
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.labelled_data.columns import Columns
from electra_core.tasks import SequenceClassifier
from electra_core.tokenizer import WordPieceTokenizer


def test_users_errors_leave_nothing_behind(model, data, tmp_path):
    cases = {
        "dev.tsv:2: the label is not in the training data ('maybe'; known: neg, pos)": (
            (data[0], write_lines(tmp_path / "dev.tsv", "sentence\tlabel", "a film\tmaybe")), {},
        ),
        "there is nothing to learn": (
            (write_lines(tmp_path / "one.tsv", "sentence\tlabel", "a film\tpos"), data[1]), {},
        ),
        "the columns are sentence, label": (data, {"task": Classify(columns=Columns(text="satz"))}),
        "empty.tsv: holds no rows": ((data[0], write_lines(tmp_path / "empty.tsv", "sentence\tlabel")), {}),
        "no such model directory": (data, {"model": tmp_path / "nowhere"}),
    }  # fmt: skip
    for message, (files, more) in cases.items():
        with pytest.raises(UserError) as caught:
            run(more.get("model", model), files, tmp_path / "out", more.get("task"))
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_full_folder_is_not_overwritten_unasked(model, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty; resume .*, overwrite"):
        run(model, data, tmp_path / "out")
    run(model, data, tmp_path / "out", settings=replace(QUICK, epochs=1), overwrite=True)
    assert (tmp_path / "out/mine.txt").exists() and (tmp_path / "out/model.safetensors").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(data, tmp_path):
    folder = tiny_model.make_model(tmp_path / "model")
    words = (folder / "vocab.txt").read_text() + "zebra\n"
    (tmp_path / "vocab.txt").write_text(words)
    WordPieceTokenizer.from_vocab(tmp_path / "vocab.txt").save(folder)
    with pytest.raises(UserError, match="vocabulary sizes differ: 87 in the tokenizer, 86 in the model"):
        run(folder, data, tmp_path / "out")


def test_skipped_rows_and_cut_texts_are_counted(model, data, tmp_path):
    rows = data[0].read_text().rstrip("\n").split("\n")
    files = write_lines(tmp_path / "train.tsv", *rows, "no label\t", " \tpos"), data[1]
    lines = []
    settings = replace(QUICK, epochs=1, skip_bad_rows=True, max_length=8)
    report = run(model, files, tmp_path / "out", settings=settings, say=lines.append)
    assert report["skipped_rows"] == 2 and report["train_examples"] == 160
    assert any("skipped 2 bad rows" in line and "train.tsv:162" in line for line in lines)
    assert sum("longer than 8 tokens" in line for line in lines) == 1


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "refused"), FileNotFoundError(2, "none", "/a/b")])
def test_an_error_of_the_caller_s_own_function_is_the_caller_s(model, data, tmp_path, error):
    def report(figures):
        raise error

    with pytest.raises(type(error)) as caught:
        run(model, data, tmp_path / "out", settings=replace(QUICK, epochs=1), on_evaluation=report)
    assert caught.value is error


def test_which_errors_are_of_the_folder_that_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for error, ours in (
        (PermissionError(13, "no", "out/config.json"), True),
        (PermissionError(13, "no", str(tmp_path / "out/config.json")), True),
        (PermissionError(13, "no", str(tmp_path / "other/config.json")), False),
        (OSError(28, "No space left on device"), True),
        (OSError("no number"), False),
        (OSError(9, "a descriptor", 3), False),
    ):
        with pytest.raises(UserError if ours else type(error)), writing("out", only_in=Path("out")):
            raise error
    with pytest.raises(UserError, match="here: cannot be written"), writing("here"):
        raise OSError("no number")


def test_a_number_of_frozen_layers_may_be_a_number() -> None:
    assert FinetuneSettings(freeze=2) == FinetuneSettings(freeze="2")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("epochs", 0.0, "a number above 0"),
        ("truncate", "middle", "one of head, tail, both"),
        ("freeze", "all", "none, embeddings, encoder or a number of layers"),
        ("seeds", 0, "at least 1"),
        ("precision", "fp8", "one of auto, bf16, fp32"),
        ("max_length", 4, "at least 8, or 0 for the task's"),
        ("epochs", math.inf, "a number above 0"),
        ("epochs", math.nan, "a number above 0"),
        ("learning_rate", -1e-4, "a number from 0"),
        ("learning_rate", math.nan, "a number from 0"),
        ("layerwise_decay", 1.1, "a number from 0 to 1"),
        ("weight_decay", -0.01, "a number from 0"),
        ("warmup", 1.0, "a number from 0 to below 1"),
        ("clip_norm", 0.0, "a number above 0"),
        ("clip_norm", math.inf, "a finite number, at most 3.4e+38"),
        ("clip_norm", 1e308, "a finite number, at most 3.4e+38"),
        ("dropout", -math.inf, "a finite number, at most 3.4e+38"),
        ("batch_size", 10**30, "a whole number of 32 bits"),
        ("tokens_per_batch", 10**30, "a whole number of 64 bits"),
        ("seed", -(10**30), "a whole number of 64 bits"),
        ("epochs", 1e308, "a finite number, at most 3.4e+38"),
        ("epochs", 2_000_000.0, "at most 1,000,000"),
        ("tokens_per_batch", -1, "a number from 0"),
        ("patience", -1, "a number from 0"),
        ("freeze", "²", "none, embeddings, encoder or a number of layers"),
    ],
)
def test_settings_out_of_range_are_named_with_their_range(name, value, expected):
    with pytest.raises(UserError) as caught:
        FinetuneSettings(**{name: value})
    assert str(caught.value) == f"{name}: expected {expected}, got {value!r}"


def test_a_whole_number_of_any_size_may_be_a_fraction_s_value() -> None:
    """But as a float: TOML's readers take whole numbers of 64 bits only."""
    for settings in (FinetuneSettings(clip_norm=10**30), PretrainConfig(clip_norm=10**30)):
        assert type(settings.clip_norm) is float and settings.clip_norm == 1e30
    assert type(FinetuneSettings(clip_norm=1).clip_norm) is int
    finite = r"clip_norm: expected a finite number, at most 3.4e\+38, got"
    for config in (PretrainConfig, FinetuneSettings):
        for number, got in ((10**400, "10{79}"), (10**39, r"1e\+39")):
            with pytest.raises(UserError, match=rf"^{finite} {got}$"):
                config(clip_norm=number)
    with pytest.raises(UserError, match=r"^epochs: expected at most 1,000,000, got 1e\+30$"):
        FinetuneSettings(epochs=10**30)
    with pytest.raises(UserError, match=rf"^run.toml: {finite} 10{{79}}$"):
        updated(PretrainConfig(), {"clip_norm": 10**400}, "run.toml")


@pytest.mark.parametrize(
    "config, error", [(FinetuneSettings, UserError), (PretrainConfig, UserError), (EncoderConfig, ValueError)]
)
def test_settings_are_of_pythons_types(config, error):
    """What JSON and TOML can hold; an array of NumPy or a tensor has its own."""
    whole, real, of_type = "batch_size", "learning_rate", "expected a value of type"
    if config is EncoderConfig:
        whole, real = "hidden_size", "layer_norm_eps"
    for number in (np.int64(48), torch.tensor(48)):
        assert type(getattr(config(**{whole: number}), whole)) is int
    for number in (np.float64(0.5), np.float32(0.5), torch.tensor(0.5)):
        assert type(getattr(config(**{real: number}), real)) is float
    assert getattr(config(**{real: 1}), real) == 1, "an int is a number, too"
    for name, value, said in (
        (real, "1e-4", f"{of_type} float, got '1e-4' (str)"),
        (real, None, f"{of_type} float, got None (NoneType)"),
        (real, True, f"{of_type} float, got True (bool)"),
        (whole, 48.0, f"{of_type} int, got 48.0 (float)"),
        (whole, np.array([48, 48]), f"{of_type} int, got array([48, 48]) (ndarray)"),
    ):
        with pytest.raises(error) as caught:
            config(**{name: value})
        assert str(caught.value) == f"{name}: {said}"


def test_few_steps_and_a_model_that_only_guesses_are_said(model, data, tmp_path):
    alike = write_lines(
        tmp_path / "alike.tsv", "sentence\tlabel", *["a film\tpos", "a film\tpos", "a film\tneg"] * 8
    )
    for settings, files, expected in (
        (
            replace(QUICK, epochs=1),
            (alike, alike),
            [
                "1 text occurs with different labels",
                "24 of the 24 dev texts are also in",
                "only 2 steps in total",
                "most frequent class",
            ],
        ),
        (replace(QUICK, epochs=5), data, []),  # 50 steps, and learned
    ):
        lines = []
        run(model, files, tmp_path / "out", settings=settings, say=lines.append, overwrite=True)
        warnings = [line for line in lines if line.startswith("warning: ")]
        assert len(warnings) == len(expected) and all(e in w for e, w in zip(expected, warnings, strict=True))


def test_diverging_runs_say_so(model, data, tmp_path):
    with pytest.raises(UserError, match="lower learning rate"):
        run(model, data, tmp_path / "out", settings=replace(QUICK, learning_rate=1e30, epochs=8, warmup=0.0))


def test_a_diverging_run_too_short_for_twenty_bad_steps_says_so_too(model, data, tmp_path):
    settings = replace(QUICK, learning_rate=1e30, epochs=1, warmup=0.0)  # ten steps
    with pytest.raises(UserError, match="last 9 of 10 steps; try a lower learning rate"):
        run(model, data, tmp_path / "out", settings=settings)


def test_last_steps_that_changed_nothing_are_said(model, data, tmp_path, monkeypatch):
    whole, lines, steps = Classify.loss, [], itertools.count(1)
    monkeypatch.setattr(Classify, "loss", lambda *a: whole(*a) * (math.nan if next(steps) > 8 else 1.0))
    run(model, data, tmp_path / "out", settings=replace(QUICK, epochs=1), say=lines.append)  # ten steps
    assert [line for line in lines if "No finite loss" in line] == [
        "warning: No finite loss and gradient in the last 2 steps: the model is as it was after step 8."
    ]


def test_a_model_whose_outputs_are_no_numbers_is_not_judged(model, data, tmp_path, monkeypatch):
    """Its first class would be read from them, with a plausible accuracy."""
    forward = SequenceClassifier.forward

    def diverged(self, *arguments, **options):
        logits = forward(self, *arguments, **options)
        return logits if self.training else logits * math.nan

    monkeypatch.setattr(SequenceClassifier, "forward", diverged)
    said = r"^the model's outputs for 40 of 40 sequences are not finite numbers; .* try a lower learning rate$"
    with pytest.raises(UserError, match=said):
        run(model, data, tmp_path / "out", settings=replace(QUICK, epochs=1))
    assert not (tmp_path / "out/model.safetensors").exists()
