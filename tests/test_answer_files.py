"""`electra predict --output FILE`: what a stopped command has written is kept and gone on with."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from untrained_predictor import untrained

from electra_core import predict as module
from electra_core.cli import main
from electra_core.downstream.answer_files import AnswerFile
from electra_core.downstream.classify import Classify
from electra_core.downstream.task_files import save_task
from electra_core.errors import UserError
from electra_core.model_dir import save_pretrained
from electra_core.predict import Predictor, predict_file

LABELS = ("neg", "pos, perhaps\nnot")


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return untrained(Classify(labels=LABELS, max_length=32), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_pretrained(predictor.model, folder, tokenizer=predictor.tokenizer)  # type: ignore[arg-type]
    save_task(predictor.task, folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Texts with ids that need quotes in CSV, and a row that cannot be used."""
    rows: list[dict[str, Any]] = [{"text": f"a fine film {n}", "id": f'{n},\n"é"'} for n in range(12)]
    rows.insert(5, {"text": "", "id": "none"})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path / "in.jsonl"


def rounded(answers: str) -> str:
    """Scores depend in their last digits on the texts that are answered together."""
    return re.sub(r"\d\.\d+(e-\d+)?", lambda number: f"{float(number[0]):.4f}", answers)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_wherever_writing_stopped_the_file_becomes_the_same(
    predictor: Predictor, source: Path, tmp_path: Path, form: str
) -> None:
    whole = io.StringIO()
    assert predict_file(predictor, source, whole, form=form, skip_bad_rows=True).count == 1
    content, out = whole.getvalue().encode(), tmp_path / f"out.{form}"
    seen, examples = [], 0
    run = predictor.predict
    for length in range(0, len(content) + 1, 7):
        out.write_bytes(content[:length])
        predictor.predict = lambda chunk: (seen.append(len(chunk)), run(chunk))[1]  # type: ignore[method-assign]
        with open(out, "a", encoding="utf-8") as sink:
            bad = predict_file(predictor, source, sink, form=form, skip_bad_rows=True, begun=out)
        del predictor.predict
        assert rounded(out.read_text("utf-8")) == rounded(whole.getvalue()) and bad.count == 1, length
        examples += 12
    assert sum(seen) < 0.7 * examples, "what was answered is not answered again"


def test_another_file_s_or_model_s_answers_are_refused(predictor: Predictor, source: Path, tmp_path: Path) -> None:
    def go_on(content: str, form: str = "jsonl", by: Predictor = predictor) -> str:
        out = tmp_path / f"out.{form}"
        out.write_text(content, encoding="utf-8")
        with pytest.raises(UserError) as caught:
            predict_file(by, source, io.StringIO(), form=form, skip_bad_rows=True, begun=out)
        assert out.read_text(encoding="utf-8") == content
        return str(caught.value)

    whole = io.StringIO()
    predict_file(predictor, source, whole, skip_bad_rows=True)
    lines = whole.getvalue().splitlines(keepends=True)
    said = go_on("".join([lines[0], *lines[2:]]))
    assert "out.jsonl: does not hold the beginning of the answers to " in said and "row 2 answers id '2," in said
    assert "has no more rows there; write to another file" in go_on(whole.getvalue() + lines[0])
    assert "row 2 is not an answer of electra predict in jsonl" in go_on(lines[0] + "a film\n")
    assert "row 1 is not an answer of electra predict in csv" in go_on("text,label\na,b\n", "csv")
    other = untrained(Classify(labels=("a", "b"), max_length=32), tmp_path / "other")
    assert "holds answers of another model, with id, label, score, scores_neg, " in go_on(lines[0], by=other)


def in_csv(*rows: dict[str, Any]) -> str:
    sink, answers = io.StringIO(), AnswerFile("csv")
    for row in rows:
        answers.write(sink, row)
    return sink.getvalue()


def test_a_cell_may_be_long_and_hold_a_carriage_return(tmp_path: Path) -> None:
    rows = [{"id": "old\rMac", "tags": ["O"]}, {"id": "a book", "tags": ["B-PERSON"] * 20_000}, {"id": "3"}]
    out, examples = tmp_path / "out.csv", [SimpleNamespace(id=row["id"]) for row in rows]
    out.write_bytes(in_csv(*rows).encode())
    csv.field_size_limit(1 << 17)  # Python's own
    begun = AnswerFile("csv", out)
    begun.pass_over(iter(examples), "in.jsonl")
    assert begun.rows == 3 and begun.end == out.stat().st_size


def test_rows_behind_a_broken_one_are_not_cut_off(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    content = in_csv({"id": "1", "label": "a"}) + '"2"x,b\n3,c\n'
    out.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"out\.csv: row 2 is not an answer of .* in csv; write to another file"):
        AnswerFile("csv", out).pass_over(iter([SimpleNamespace(id=name) for name in "123"]), "in.jsonl")


def test_what_is_no_file_cannot_have_been_begun(folder: Path, source: Path) -> None:
    command = ["predict", "--model", str(folder), "--input", str(source), "--skip-bad-rows", "--quiet"]
    assert main([*command, "--output", os.devnull, "--resume"]) == 0


def test_on_the_command_line(
    folder: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    out, whole = tmp_path / "out.csv", tmp_path / "whole.csv"
    command = ["predict", "--model", str(folder), "--input", str(source), "--skip-bad-rows", "--quiet"]
    assert main([*command, "--resume"]) == 2
    assert "electra predict: --resume: no effect without --output" in capsys.readouterr().err
    assert main([*command, "--output", str(whole)]) == 0
    monkeypatch.setattr(module, "CHUNK", 4)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict", _until(3, Predictor.predict))
        assert main([*command, "--output", str(out), "--resume"]) == 130, "there is nothing to resume yet"
    hint, last = capsys.readouterr().err.strip().splitlines()
    assert hint == f"{out}: holds the answers so far; --resume goes on behind them" and "interrupted" in last
    assert 0 < out.stat().st_size < whole.stat().st_size
    assert main([*command, "--output", str(out), "--resume"]) == 0
    assert rounded(out.read_text("utf-8")) == rounded(whole.read_text("utf-8"))
    assert main([*command, "--output", str(out)]) == 0
    assert rounded(out.read_text("utf-8")) == rounded(whole.read_text("utf-8")), "written anew, not twice"


def _until(call: int, predict: Callable[..., Any]) -> Callable[..., Any]:
    """`predict`, in the given call of which the user presses Ctrl-C."""
    calls: list[None] = []

    def stopped(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return predict(*arguments, **options)

    return stopped
