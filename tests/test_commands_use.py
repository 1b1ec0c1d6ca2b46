"""`electra evaluate`, `predict` and `detect` on files and texts that are not as the model's training data were."""

from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_model

from electra_core.cli import build_parser, main
from electra_core.electra import Discriminator, Generator
from electra_core.files.row_files import read_rows
from electra_core.files.text_lines import at_hand
from electra_core.model_dir import load_config, save_pretrained

FINETUNE = ["finetune", "--task", "classify", "--device", "cpu", "--quiet", "--epochs", "1", "--batch-size", "16",
            "--cache", "none"]  # fmt: skip


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`texts` was trained on the columns satz and urteil, `pairs` on the usual ones."""
    folder = tmp_path_factory.mktemp("models")
    start = str(tiny_model.make_model(folder / "start"))
    rows = tiny_model.reviews(folder / "train.tsv", 64).read_text().splitlines()[1:]
    train = write(folder / "train.tsv", "\n".join(["satz\turteil", *rows]) + "\n")
    columns = ["--text-column", "satz", "--label-column", "urteil"]
    assert main([*FINETUNE, "--model", start, "--train", train, "--out", str(folder / "texts"), *columns]) == 0
    pairs = [row.replace("\t", "\tthe film\t") for row in rows]
    train = write(folder / "pairs.tsv", "\n".join(["sentence1\tsentence2\tlabel", *pairs]) + "\n")
    assert main([*FINETUNE, "--model", start, "--train", train, "--out", str(folder / "pairs")]) == 0
    return folder


def evaluate(folder: Path, data: str, *flags: str) -> int:
    return main(["evaluate", "--model", str(folder / "texts"), "--data", data, "--quiet", "--json", *flags])


def predict(folder: Path, source: str, *flags: str, model: str = "texts") -> int:
    return main(["predict", "--model", str(folder / model), "--input", source, "--quiet", *flags])


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.strip().split("\n")
    return line


def test_models_are_described_by_what_they_are(folder, tmp_path, capsys):
    config = load_config(folder / "start")[0]
    generator = Generator(config)
    save_pretrained(generator, tmp_path)
    count = sum(parameter.numel() for parameter in generator.parameters())
    encoder = sum(parameter.numel() for parameter in generator.encoder.parameters())
    for model, name, number in ((tmp_path, "generator", count), (folder / "texts", "encoder", encoder)):
        for command in ("info", "flops"):
            assert main([command, "--model", str(model), "--json"]) == 0
            figures = json.loads(capsys.readouterr().out)
            assert {key: figures[key] for key in figures if key.endswith("_parameters")} == {
                f"{name}_parameters": number
            }


def test_detect_takes_a_vocabulary_padded_in_the_model_only(tmp_path, capsys):
    """30,528 rows for 30,522 tokens, as trainers round up."""
    model = tiny_model.make_model(tmp_path)
    config = load_config(model)[0]
    save_pretrained(Discriminator(replace(config, vocab_size=config.vocab_size + 6)), model)
    assert main(["detect", "the film was fine", "--model", str(model), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 4


# ---- columns


def test_the_usual_columns_need_no_flags(folder, tmp_path, capsys):
    data = write(tmp_path / "a.csv", "id,text,label\n1,a fine film,pos\n2,a dull film,neg\n")
    assert evaluate(folder, data) == 0 and predict(folder, data) == 0
    metrics, *predictions = map(json.loads, capsys.readouterr().out.splitlines())
    assert "accuracy" in metrics and [row["id"] for row in predictions] == ["1", "2"]


def test_columns_may_be_named(folder, tmp_path, capsys):
    data = write(tmp_path / "a.csv", "eins,zwei\na fine film,pos\na dull film,neg\n")
    assert evaluate(folder, data) == predict(folder, data) == 2
    said = capsys.readouterr().err
    assert "no text column 'satz' and no label column 'urteil'; the columns are eins, zwei; name others" in said
    assert "no text column 'satz'; the columns are eins, zwei; name another with --text-column" in said
    assert evaluate(folder, data, "--text-column", "eins") == 2
    assert "no label column 'urteil'" in complaint(capsys)
    assert evaluate(folder, data, "--text-column", "eins", "--label-column", "zwei") == 0
    assert predict(folder, data, "--text-column", "eins") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_numbers_and_the_header(folder, tmp_path, capsys):
    rows = "a fine film,pos\na dull film,neg\n"
    numbers = ["--text-column", "1", "--label-column", "2"]
    assert evaluate(folder, write(tmp_path / "none.csv", rows), *numbers) == 0
    data = write(tmp_path / "a.csv", "Kommentar,Note\n" + rows)
    capsys.readouterr()
    assert evaluate(folder, data, *numbers) == 2
    assert "a.csv:1: the label is not in the training data ('Note'" in (said := complaint(capsys))
    assert "if this line is the header: --header" in said
    assert evaluate(folder, data, *numbers, "--header") == 0
    capsys.readouterr()
    for flag, count in (("--header", 2), ("--no-header", 3)):
        assert predict(folder, data, "--text-column", "1", flag) == 0
        assert len(capsys.readouterr().out.splitlines()) == count


@pytest.mark.parametrize("command", ["finetune", "evaluate", "predict"])
def test_messages_name_only_flags_that_the_command_has(command):
    parser = build_parser()._subparsers._group_actions[0].choices[command]  # type: ignore[union-attr, index]
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {"--text-column", "--text-pair-column", "--header", "--no-header", "--skip-bad-rows"} <= flags
    assert ("--label-column" in flags) == (command != "predict")  # which reads no labels, so complains of none


def test_pairs_from_standard_input(folder, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert "JSON lines (fields: text, and pair for pairs;" in " ".join(capsys.readouterr().out.split())
    line = json.dumps({"text": "a fine film", "pair": "the film"})
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(line.encode())))
    assert predict(folder, "-", model="pairs") == 0
    assert json.loads(capsys.readouterr().out)["label"] in ("neg", "pos")


def test_the_form_of_the_input_may_be_said(folder, tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "a.data", "n,text\n1,fine film\n2,dull\n")
    assert predict(folder, file, "--input-format", "csv") == 0
    from_file = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path(file).read_bytes())))
    assert predict(folder, "-", "--input-format", "csv", "--header") == 0
    assert capsys.readouterr().out == from_file and len(from_file.splitlines()) == 2
    assert predict(folder, str(tmp_path), "--input-format", "csv") == 2
    assert f"--input-format csv: no effect with {tmp_path}, which is a folder" in complaint(capsys)
    assert predict(folder, file, "--input-format", "jsonl", "--header") == 2
    assert "--header: no effect with" in complaint(capsys)


# ---- paths


@pytest.mark.parametrize("name", ["nowhere", "nowhere.tsv", "nowhere.parquet"])
def test_a_path_that_is_not_there(folder, tmp_path, capsys, name):
    path = str(tmp_path / name)
    for status in (evaluate(folder, path), predict(folder, path)):
        assert status == 2
    assert capsys.readouterr().err.count(f"{name}: no such file or folder") == 2
    start = str(folder / "start")
    assert main([*FINETUNE, "--model", start, "--train", path, "--out", str(tmp_path / "out")]) == 2
    assert "no such file or folder" in complaint(capsys)


# ---- words that the vocabulary has not


def test_text_in_another_script_is_told_of(folder, tmp_path, capsys):
    strange = write(tmp_path / "a.tsv", "satz\turteil\nfine 東京\tpos\ndull 東京\tneg\n")
    said = "a.tsv: 66.7% of the tokens are [UNK]; the vocabulary does not suit this text"
    for command in (evaluate, predict):
        assert command(folder, strange) == 0
        assert said in complaint(capsys)
    known = write(tmp_path / "b.tsv", "satz\turteil\na fine film\tpos\na dull film\tneg\n")
    assert evaluate(folder, known) == 0 and predict(folder, known) == 0
    assert not capsys.readouterr().err


def test_detect_tells_of_another_script(folder, capsys):
    detect = ["detect", "--model", str(folder / "start")]
    assert main([*detect, "fine 東京"]) == 0
    assert complaint(capsys) == "warning: 66.7% of the tokens are [UNK]; the vocabulary does not suit this text"
    assert main([*detect, "a fine film"]) == 0
    assert not capsys.readouterr().err


def test_text_that_is_not_utf_8_is_refused(folder, capsys, monkeypatch):
    detect = ["detect", "--model", str(folder / "start")]
    assert main([*detect, "caf\udce9 film"]) == 2  # as Python passes on a byte of the command line
    assert complaint(capsys) == "electra detect: the text is not valid UTF-8 (byte 0xe9 at character 4)"
    assert main([*detect, "half \ud83d"]) == 2
    assert "lone surrogate U+D83D" in complaint(capsys)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors="strict"))
    assert main([*detect, "-"]) == 2
    assert "byte 0xe9 at character 4" in complaint(capsys)


def test_a_byte_of_the_command_line(folder):
    command = [sys.executable, "-m", "electra_core", "detect", "--model", str(folder / "start"), b"caf\xe9 film"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "byte 0xe9" in done.stderr and "Traceback" not in done.stderr


# ---- figures


def test_f1_says_of_which_class_it_is(folder, tmp_path, capsys):
    data = write(tmp_path / "a.csv", "text,label\na fine film,pos\na dull film,neg\n")
    model = str(folder / "texts")
    assert main(["evaluate", "--model", model, "--data", data, "--quiet", "--report", f"{tmp_path}/r.html"]) == 0
    assert "f1 (pos)" in capsys.readouterr().out and "f1 (pos)" in (tmp_path / "r.html").read_text()
    assert "f1 (pos)" in (folder / "texts" / "README.md").read_text()
    assert evaluate(folder, data) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"f1", "auc", "average_precision"} < figures.keys() and figures["positive_class"] == "pos"
    report = json.loads((folder / "texts" / "metrics.json").read_text())
    assert "f1" in report["best"] and report["positive_class"] == "pos"


def test_what_the_best_evaluation_is_chosen_by(folder, tmp_path, capsys):
    finetune = [*FINETUNE, "--model", str(folder / "start"), "--train", str(folder / "pairs.tsv")]
    assert main([*finetune, "--out", str(tmp_path / "out"), "--metric", "macro_f1"]) == 0
    report = json.loads((tmp_path / "out/metrics.json").read_text())
    assert report["metric"] == "macro_f1" and report["over_seeds"]["max"] == report["best"]["macro_f1"]
    assert json.loads((tmp_path / "out/task.json").read_text())["metric"] == "macro_f1"
    capsys.readouterr()
    assert main([*finetune, "--out", str(tmp_path / "other"), "--metric", "F1"]) == 2
    known = "accuracy, mcc, macro_f1, f1, acc_and_f1, auc, average_precision"
    assert f"--metric: expected one of {known}, got 'F1'" in complaint(capsys)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--epochs", "-1"], "--epochs: expected a number above 0"),
        (["--freeze", "9"], "--freeze: the model has"),
        (["--task", "multilabel", "--class-weights"], "--class-weights: no effect on multilabel"),
    ],
)
def test_a_setting_is_called_by_its_flag(folder, tmp_path, capsys, flags, message):
    start, train = str(folder / "start"), str(folder / "pairs.tsv")
    assert main([*FINETUNE, "--model", start, "--train", train, "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in complaint(capsys)


# ---- standard input as a conversation


@pytest.mark.parametrize("form", ["{}", '{{"text": "{}"}}'], ids=["lines", "json"])
def test_a_line_on_standard_input_is_answered_before_the_next_one(folder, form):
    command = [sys.executable, "-m", "electra_core", "predict", "--model", str(folder / "texts"), "--input", "-"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    for lines in (["a fine film"], ["dull", "great plot", "a bad actor"], ["what was good"]):
        process.stdin.write("".join(form.format(line) + "\n" for line in lines))
        process.stdin.flush()
        for _ in lines:
            assert select.select([process.stdout], [], [], 120)[0], "nothing came"
            assert json.loads(process.stdout.buffer.raw.readline())["label"] in ("neg", "pos")
    process.stdin.write(form.format("the end"))
    process.stdin.close()
    assert json.loads(process.stdout.read())["id"] == "6" and process.wait(60) == 0


def test_what_has_come_of_standard_input_is_taken_together(monkeypatch):
    """A full pipe as a file; of a conversation what need not be waited for, whatever blanks are behind it."""
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe, open(writing, "wb", buffering=0) as other:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe))
        other.write(b"one\ntwo\n\n \n")
        rows = read_rows(Path("-"))
        assert [row.cells["text"] for row in at_hand(rows, 9, "-")] == ["one", "two"]
        other.write(b"three\nfour\nfive")
        assert [row.cells["text"] for row in at_hand(rows, 1, "-")] == ["three"]
        other.close()
        assert [row.cells["text"] for row in at_hand(rows, 9, "-")] == ["four", "five"]
