"""Data in memory train, and are complained of, as the file that holds them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch
from safetensors.torch import load_file

from electra_core.choices import Choose
from electra_core.classify import Classify, Regress
from electra_core.downstream import Task, read_all
from electra_core.errors import UserError
from electra_core.finetune import finetune
from electra_core.finetune_settings import FinetuneSettings
from electra_core.in_memory import as_files
from electra_core.predict import evaluate, load
from electra_core.squad import Answer
from electra_core.tagging import Tag

QUICK = FinetuneSettings(epochs=1, batch_size=16, learning_rate=3e-3, precision="fp32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_model(tmp_path_factory.mktemp("model"))


def reviews(folder: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    _, *lines = tiny_model.reviews(folder / "x.tsv", count, seed).read_text().splitlines()
    return [dict(zip(("text", "label"), line.split("\t"))) for line in lines]


def test_the_same_model_as_from_files(model: Path, tmp_path: Path) -> None:
    train, dev = reviews(tmp_path, 48), reviews(tmp_path, 16, seed=1)
    files = []
    for name, rows in (("train", train), ("dev", dev)):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines: list[str] = []
    finetune(model, Classify(), *files, tmp_path / "files", QUICK, quiet=True)
    finetune(model, Classify(), train, dev, tmp_path / "rows", QUICK, quiet=True, say=lines.append)
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("files", "rows"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    trained = load(tmp_path / "rows")
    assert evaluate(trained, iter(dev)).metrics == evaluate(trained, files[1]).metrics
    assert not any("/" in line for line in lines if "dev.jsonl" in line or "train.jsonl" in line)
    again = finetune(model, Classify(), train, dev, tmp_path / "rows", QUICK, resume=True, say=lines.append)
    assert "all is done already" in lines[-1] and again["train_examples"] == 48
    seen: list[dict[str, float]] = []
    settings = dataclasses.replace(QUICK, epochs=2, seeds=2)
    held_out = finetune(
        model, Classify(), train, None, tmp_path / "held", settings, quiet=True, on_evaluation=seen.append
    )
    assert held_out["train_examples"] + held_out["dev_examples"] == 48
    assert [(row["seed"], row["step"]) for row in seen] == [(0, 3), (0, 6), (1, 3), (1, 6)]
    assert max(row["accuracy"] for row in seen) == held_out["best"]["accuracy"]


ROWS: dict[str, tuple[Task, list[dict[str, Any]]]] = {
    "numbers": (Regress(), [{"text": "a film", "label": np.float32(0.5)}, {"text": "a plot", "label": 2}]),
    "pairs": (
        Classify(),
        [{"text": "a", "pair": "b", "label": np.int64(1)}, {"text": "c", "pair": "d", "label": 0}],
    ),
    "tags": (Tag(), [{"tokens": np.array(["ann", "met"]), "tags": ("B-PER", "O")}]),
    "questions": (
        Answer(),
        [{"question": "who", "context": "ann met", "answers": {"text": ["ann"], "answer_start": [0]}}],
    ),
    "choices": (Choose(), [{"text": "ann", "choices": ["met", "was"], "label": 1}]),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_task_reads_rows(name: str, tmp_path: Path) -> None:
    task, rows = ROWS[name]
    with as_files(print, train=rows) as (files, _):
        read, _ = read_all(task, files["train"])
        assert len(read) == len(rows)
    assert not files["train"].parent.exists()
    plain = json.loads(json.dumps(rows, default=lambda value: value.tolist()))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    expected, _ = read_all(task, tmp_path / "train.jsonl")
    assert [dataclasses.replace(e) for e in read] == expected


def test_a_table_of_pandas(tmp_path: Path) -> None:
    class Table:
        """As far as pandas' DataFrame is asked; a missing value is NaN there."""

        columns = ("text", "label")

        def to_dict(self, how: str) -> list[dict[str, Any]]:
            assert how == "records"
            return [{"text": "a film", "label": 1.0}, {"text": "a plot", "label": float("nan")}]

    with as_files(print, dev=Table()) as (files, _):
        lines = files["dev"].read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [1.0, None]


def test_complaints_name_the_row(model: Path, tmp_path: Path) -> None:
    train = reviews(tmp_path, 16)
    with pytest.raises(UserError, match=r"^train\.jsonl:3: "):
        finetune(model, Classify(), [*train[:2], {"text": "no label"}], None, tmp_path / "a", QUICK)
    for rows, message in {
        "pairs": ([("a film", "pos")], r"train: expected a dict for row 1, got tuple: \('a film', 'pos'\)"),
        "numbers": (5, "train: expected a file or rows, got int"),
        "things": ([train[0], {"text": "a", "label": object()}], "train: row 2: expected texts, numbers.*object"),
    }.values():
        with pytest.raises(ValueError, match=message):
            finetune(model, Classify(), rows, None, tmp_path / "a", QUICK)  # type: ignore[arg-type]
    for task, settings, message in [
        ("sst-2", QUICK, "task: expected one, such as .*, got str 'sst-2'"),
        (Classify(), {"epochs": 3}, r"settings: expected FinetuneSettings\(\.\.\.\), got dict"),
        (Classify, QUICK, "task: expected one, such as .*, got ABCMeta"),
    ]:
        with pytest.raises(ValueError, match=message):
            finetune(model, task, train, None, tmp_path / "a", settings)  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()


def test_a_tagger_takes_a_dict() -> None:
    task = Tag(labels=("O", "B-PER", "I-PER"))
    assert task.from_value({"tokens": ["ann", "met"]}, "1").words == ("ann", "met")
    assert task.from_value({"text": "ann met"}, "1").words == task.from_value("ann met", "1").words
    for no_words in ({"words": None}, [], ["ann", 2]):
        with pytest.raises(ValueError, match="expected a text or a list of words"):
            task.from_value(no_words, "1")


def test_complaints_of_rows_name_no_flags(model: Path, tmp_path: Path) -> None:
    rows = [{"satz": "fine", "label": 1}, {"satz": "dull", "label": 0}]
    with pytest.raises(UserError, match=r"columns are satz, label; name it with Columns\(text=...\)$"):
        finetune(model, Classify(), rows, rows, tmp_path / "out", QUICK)
    twice = [{"text": "fine", "label": 1, "id": 7}] * 2 + [
        {"text": "dull", "label": None},
        {"text": "a", "label": 0},
    ]
    said = r"train.jsonl:2: duplicated id .*: Columns\(id=\"none\"\); skip_bad_rows=True leaves bad rows out$"
    with pytest.raises(UserError, match=said):
        finetune(model, Classify(), twice, rows, tmp_path / "out", QUICK)
