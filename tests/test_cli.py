"""The command line in one process: help, and the whole spine on a little text (bad input: test_cli_refusals)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import tiny_model
from spine_run import FINETUNE, PRETRAIN, spine, write  # noqa: F401

from electra_core import flops, model_dir
from electra_core.cli import build_parser, main
from electra_core.commands.train import ENCODER_FLAGS, FINETUNE_GROUPS, PRETRAIN_GROUPS
from electra_core.config import PRESETS, EncoderConfig, PretrainConfig
from electra_core.errors import UserError
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.hub import model_places
from electra_core.pretrain import pretrain

COMMANDS = tuple(build_parser()._subparsers._group_actions[0].choices)  # type: ignore[union-attr, arg-type]


# Help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert "example:" in said and f"electra {command}" in said
    undocumented = [
        action.option_strings
        for action in build_parser()._subparsers._group_actions[0].choices[command]._actions  # type: ignore
        if not action.help
    ]
    assert undocumented == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_one_form(command: str) -> None:
    """A phrase in lower case without a full stop, its default once; acronyms keep their capitals."""
    actions = build_parser()._subparsers._group_actions[0].choices[command]._actions  # type: ignore
    for action in actions:
        said = action.help
        assert not said.endswith(".") or said.endswith("..."), said
        assert said.count("(default") <= 1, said
        assert not re.match(r"[A-Z][a-z]", said) or re.match("SentencePiece", said), said


def test_every_setting_has_its_flag_under_one_heading() -> None:
    assert sorted(itertools.chain(*PRETRAIN_GROUPS.values())) == sorted(
        {field.name for field in dataclasses.fields(PretrainConfig)} - {"model"}
    )
    assert sorted(ENCODER_FLAGS) == sorted(
        {field.name for field in dataclasses.fields(EncoderConfig)} - {"vocab_size", "pad_token_id"}
    )
    assert sorted([*itertools.chain(*FINETUNE_GROUPS.values()), "skip_bad_rows"]) == sorted(
        field.name for field in dataclasses.fields(FinetuneSettings)
    )


def test_help_says_what_a_setting_is_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for command in ("finetune", "pretrain"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said[command] = " ".join(capsys.readouterr().out.split())
    assert "passes over the training data (default: 3)" in said["finetune"]
    assert "--precision fp32 (default" not in said["finetune"], "that of --precision"
    assert "optimizer steps (default: the preset's)" in said["pretrain"]
    assert "decay of Adam's first moment (default: 0.9)" in said["pretrain"]


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from electra_core.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


WINDOWS = """
import signal, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
del signal.SIGUSR1
from electra_core.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "command", ["status .", "predict --model M --input x", "pretrain --data D --out R", "trace x"]
)
def test_windows_is_told_where_it_runs(command: str) -> None:
    """In one line, however far a command's imports come."""
    done = subprocess.run([sys.executable, "-c", WINDOWS, *command.split()], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "needs Linux or macOS" in done.stderr and "WSL" in done.stderr


def test_what_the_terminal_has_no_letters_for_is_spelled_out() -> None:
    """Under a locale of ASCII or Latin-1, or where such is asked for."""
    program = "from electra_core.cli import main; main([]); print('cut \\u2026')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.endswith("cut \\u2026\n"), done.stderr


# The spine ----------------------------------------------------------------------------------------------------


def test_prepare_pretrain_finetune_leave_what_they_promise(spine: Path) -> None:
    for name in ("data/manifest.json", "data/tokenizer", "run/config.toml", "run/metrics.jsonl", "run/checkpoints",
                 "run/discriminator/model.safetensors", "run/generator/config.json", "model/model.safetensors",
                 "model/config.json"):  # fmt: skip
        assert (spine / name).exists(), name


def test_evaluate(spine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "--model", str(spine / "model"), "--data", str(spine / "dev.tsv")]
    assert main([*arguments, "--json", "--quiet", "--device", "cpu"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert 0 <= metrics["accuracy"] <= 1


def test_predict_one_line_per_input(spine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the film was great\nthe plot was awful and dull\n", encoding="utf-8")
    arguments = ["predict", "--model", str(spine / "model"), "--input", str(texts), "--quiet"]
    assert main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
    assert len(lines) == 2 and all(line["label"] in ("neg", "pos") for line in lines)
    assert main([*arguments, "--output", str(tmp_path / "nowhere" / "out.jsonl")]) == 2
    (said,) = capsys.readouterr().err.strip().split("\n")
    assert "out.jsonl: cannot be written (No such file or directory)" in said


def test_texts_that_were_cut_are_counted(spine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "long.tsv", "sentence\tlabel\n" + "fine " * 200 + "\tpos\nfine\tpos\n")
    for command, flag in (("predict", "--input"), ("evaluate", "--data")):
        assert main([command, "--model", str(spine / "model"), flag, data, "--quiet"]) == 0
        assert "long.tsv: 1 of the inputs are longer than 32 tokens and were truncated" in capsys.readouterr().err


def test_predict_writes_a_glue_submission(spine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\ta great film\n1\tdull\n", encoding="utf-8")
    predict = ["predict", "--model", str(spine / "model"), "--quiet", "--submission", "sst-2"]
    assert main([*predict, "--input", str(tmp_path), "--output", str(tmp_path / "glue")]) == 0
    file = tmp_path / "glue" / "SST-2.tsv"
    assert str(file) in capsys.readouterr().out and [path.name for path in file.parent.iterdir()] == [file.name]
    header, *rows = [line.split("\t") for line in file.read_text(encoding="utf-8").strip().split("\n")]
    assert header == ["index", "prediction"] and [index for index, _ in rows] == ["0", "1"]
    assert all(label in ("neg", "pos") for _, label in rows), "labels as the model was trained with"


def test_a_submission_of_another_kind_is_refused_and_of_other_labels_told(
    spine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict = ["predict", "--model", str(spine / "model"), "--quiet", "--output", str(tmp_path)]
    file = write(tmp_path / "test.tsv", "index\tsentence\n0\ta great film\n")
    assert main([*predict, "--submission", "sts-b", "--input", file]) == 2
    assert "expected a model fine-tuned for regress, got one for classify" in capsys.readouterr().err
    assert main([*predict, "--submission", "sst-2", "--input", file]) == 0
    assert capsys.readouterr().err == "warning: SST-2 has no label neg, pos; written unchanged\n"


def test_predictions_in_a_csv_are_csv(spine: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "x.txt", "fine\n")
    predict = ["predict", "--model", str(spine / "model"), "--quiet", "--input", file]
    for flags, first in (
        (["--output", "a.csv"], "i"),
        (["--output", "a.csv", "--format", "jsonl"], "{"),
        (["--output", "a.jsonl"], "{"),
    ):
        assert main([*predict, *flags[:1], str(tmp_path / flags[1]), *flags[2:]]) == 0
        assert (tmp_path / flags[1]).read_text()[0] == first


def test_detect(spine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    arguments = ["detect", "the cat sat on the mat", "--model", str(spine / "run")]
    assert main([*arguments, "--json", "--html", str(page)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "".join(token["token"].removeprefix("##") for token in told["tokens"]) == "thecatsatonthemat"
    assert all(0 < token["probability"] < 1 for token in told["tokens"])
    assert "<html" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["run", "run/generator", "model"])
def test_info(spine: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", str(spine / kind), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["hidden_size"], facts["num_hidden_layers"]) == (16, 1)


@pytest.mark.parametrize("model", ["small", "run"])
def test_flops(spine: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    if model == "small":
        expected = flops.summary(PRESETS["small"].discriminator, PRESETS["small"].pretrain)
    else:
        model = str(spine / model)
        expected = flops.summary(model_dir.load_config(model)[0])
    assert main(["flops", "--model", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected


def test_trace(spine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "trace.html"
    arguments = ["trace", "the cat sat on the mat and saw it", "--model", str(spine / "run")]
    assert main([*arguments, "--html", str(page)]) == 0
    assert "[CLS]" in capsys.readouterr().out and "<html" in page.read_text(encoding="utf-8")


def test_a_text_too_long_is_cut_and_said_once(
    spine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = tiny_model.reviews(tmp_path / "train.tsv", 24)
    with train.open("a", encoding="utf-8") as file:
        file.writelines("the film was fine and " * 30 + "good\tpos\n" for _ in range(3))
    model = str(spine / "run")
    caplog.set_level("INFO", "electra_core")
    assert main([*FINETUNE, "--model", model, "--train", str(train), "--out", str(tmp_path / "m")]) == 0
    said = [line for line in caplog.messages if "were truncated" in line]
    assert said == ["3 of 27 examples are longer than 32 tokens and were truncated"]


@pytest.mark.parametrize("name", ["t.txt", "t.md"])
@pytest.mark.parametrize("documents", [1, 2])
def test_prepare_says_what_comes_next(
    spine: Path, tmp_path: Path, documents: int, name: str, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Pre-training, if a document is held out, as one of two is; else what to do, and exit 2."""
    caplog.set_level("INFO", "electra_core")
    text = write(tmp_path / name, "\n\n".join(["the cat sat on the mat", "a big old dog saw it"][:documents]))
    tokenizer = str(spine / "data" / "tokenizer")
    out = str(tmp_path / "out")
    status = main(["prepare", "--text", text, "--out", out, "--tokenizer", tokenizer, "--quiet"])
    captured = capsys.readouterr()
    assert status == (2 if documents == 1 else 0)
    assert ("next: electra pretrain --data" in captured.out) == (documents == 2)
    assert ("the text is a single document" in captured.err) == (documents == 1)
    assert caplog.messages == ([f"{text}: no known suffix, read as plain text"] if name == "t.md" else [])
    assert main([*PRETRAIN, "--data", out, "--out", str(tmp_path / "run"), "--steps", "1"]) == status


def test_after_text_in_a_pair_s_words_comes_going_on_from_that_pair(
    spine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    text = write(tmp_path / "t.txt", "the cat sat on the mat\n\na big old dog saw it")
    run = spine / "run"
    words = tmp_path / "words"  # a tokenizer alone
    shutil.copytree(spine / "data" / "tokenizer", words)
    lone = tmp_path / "discriminator"
    shutil.copytree(run / "discriminator", lone)
    pairs = {"tiny": ("tiny", "tiny"), str(run): (str(run), str(run)), str(words): None, str(lone): None}
    pairs |= {str(run / kind): (str(run / "discriminator"), str(run / "generator"))
              for kind in ("discriminator", "generator")}  # fmt: skip
    monkeypatch.chdir(tmp_path)  # where no folder is called tiny
    for number, (tokenizer, pair) in enumerate(pairs.items()):
        out = str(tmp_path / f"out {number}")  # quoted in what is printed
        assert main(["prepare", "--text", text, "--out", out, "--tokenizer", tokenizer, "--quiet"]) == 0
        said = capsys.readouterr().out.splitlines()[-1]
        start = f" --init-discriminator {pair[0]} --init-generator {pair[1]}" if pair else ""
        assert said == f"next: electra pretrain --data '{out}' --out RUN{start}"
        if tokenizer == str(run):  # what is printed can be run
            onto = ["--data", out, "--out", str(tmp_path / "run"), "--steps", "1"]
            assert main([*PRETRAIN, *onto, *start.split()]) == 0


def test_the_hub_is_not_asked_for_the_other_half_of_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(model_places, "_fetch", lambda name, revision: asked.append(name))
    assert model_places.find_pair("google/electra-small-discriminator") is None and not asked


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("1900000000", 1.9e9),
        ("2030-03-17T17:46:40Z", 1.9e9),
        ("2030-03-17T18:46:40+01:00", 1.9e9),
        ("2030-03-17T17:46:40", datetime(2030, 3, 17, 17, 46, 40).timestamp()),
    ],
)
def test_a_time_to_stop_at(given: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*arguments: object, **options: object) -> None:
        raise UserError(f"stop_at is {options['stop_at']}")

    monkeypatch.setattr(sys.modules[pretrain.__module__], "pretrain", called)
    with pytest.raises(UserError, match=f"^stop_at is {seconds}$"):
        options = build_parser().parse_args(["pretrain", "--data", "D", "--out", "R", "--stop-at", given])
        options.run(options)
