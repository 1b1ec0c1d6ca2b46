"""Data in memory train, and are complained of, as the file that holds them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from datetime import date, datetime
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from uuid import UUID

import numpy as np
import pytest
import tiny_model
import torch
from finetune_runs import model  # noqa: F401
from safetensors.torch import load_file

from electra_core.downstream.choices import Choose
from electra_core.downstream.classify import Classify, Regress
from electra_core.downstream.in_memory import as_files
from electra_core.downstream.interface import Task, read_all
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag
from electra_core.errors import UserError, on_command_line, option
from electra_core.finetune import finetune
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.labelled_data.columns import Columns
from electra_core.predict import Predictor, evaluate, load

QUICK = FinetuneSettings(epochs=1, batch_size=16, learning_rate=3e-3, precision="fp32")


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
    assert "already finished" in lines[-1] and again["train_examples"] == 48
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


def test_what_nobody_reads_may_be_anything(tmp_path: Path) -> None:
    row = {
        "text": "a film",
        "label": 1,
        "seen": {1, 2},
        "when": datetime(2020, 3, 23, 12),
        "day": date(2020, 3, 23),
    }
    row |= {"id": UUID(int=7), ("a", "b"): object(), "nested": [{3}]}
    with as_files(print, Classify(), dev=[row]) as (files, _):
        (line,) = files["dev"].read_text().splitlines()
    assert json.loads(line) == {
        "text": "a film", "label": 1, "seen": None, "when": "2020-03-23T12:00:00", "day": "2020-03-23",
        "id": "00000000-0000-0000-0000-000000000007", "('a', 'b')": None, "nested": None,
    }  # fmt: skip
    for columns, name in ((Columns("seen"), "seen"), (Columns(label=("x", "3")), "seen"), (Columns(), "Text")):
        with (
            pytest.raises(ValueError, match=f"dev: row 1: column '{name}': expected texts.*, got set"),
            as_files(print, Classify(columns=columns), dev=[{"text": "a", "label": 1, name: {1}}]),
        ):
            pass


class HubData(list[dict[str, Any]]):
    """As far as a data set of the Hub's library is asked: classes are numbers, and `features` names them."""

    features: ClassVar = {
        "text": SimpleNamespace(dtype="string"),
        "label": SimpleNamespace(names=["neg", "neu", "pos"]),
        "tags": SimpleNamespace(feature=SimpleNamespace(names=["O", "B-PER"])),  # of a list
        "older": [SimpleNamespace(names=["no", "yes"])],
    }


def test_classes_of_the_hubs_data_have_their_names() -> None:
    rows = HubData(
        [
            {"text": "a", "label": 2, "tags": [0, 1], "older": [1, 0]},
            {"text": "b", "label": -1, "tags": np.array([1]), "older": []},
            {"text": "c", "label": np.int64(0), "tags": None, "older": None},
        ]
    )

    def read(task: Task | None, column: str = "label") -> list[Any]:
        with as_files(print, task, dev=rows) as (files, _):
            return [json.loads(line)[column] for line in files["dev"].read_text().splitlines()]

    assert read(None) == read(Classify()) == read(Classify(labels=("NEG", "POS", "x"))) == ["pos", None, "neg"]
    assert read(None, "tags") == [["O", "B-PER"], ["B-PER"], None]
    assert read(None, "older") == [["yes", "no"], [], None]
    assert read(Regress()) == read(Classify(labels=("LABEL_0", "LABEL_1"))) == [2, -1, 0], "they are numbers there"


def test_a_model_learns_the_names_of_the_hubs_data(model: Path, tmp_path: Path) -> None:
    rows = HubData({**row, "label": 2 * (row["label"] == "pos")} for row in reviews(tmp_path, 16))
    finetune(model, Classify(), rows, rows, tmp_path / "out", QUICK, quiet=True)
    predictor = load(tmp_path / "out")
    assert predictor.task.labels == ("neg", "pos")
    assert evaluate(predictor, rows).metrics["accuracy"] >= 0


def test_what_holds_rows_is_asked_for_them(model: Path, tmp_path: Path) -> None:
    class LazyFrame:
        columns = ("text",)

    for data, message in (
        (
            {"test": HubData(), "train": HubData()},
            r"a dict of data sets \(test, train\); give one, data\['train'\]",
        ),
        ({"text": ["a"], "label": ["b"]}, r"got a dict \(text, label\); give a list with a dict for each row"),
        (LazyFrame(), r"got a LazyFrame; call its collect\(\) first"),
    ):
        with pytest.raises(ValueError, match=f"^train: expected .*{message}$"):
            finetune(model, Classify(), data, None, tmp_path / "out", QUICK)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^inputs: expected rows or a table, got a LazyFrame"):
        predictor_of(Classify())(LazyFrame())
    with pytest.raises(ValueError, match=r"^inputs: expected rows, got a dict of data sets \(test\); give one"):
        predictor_of(Classify())({"test": HubData()})


def test_a_label_of_an_enum_is_its_value() -> None:
    class Mood(Enum):
        GOOD = "good"

    class Grade(int, Enum):
        BEST = 1

    with as_files(print, dev=[{"label": Mood.GOOD}, {"label": Grade.BEST}, {"label": [Mood.GOOD]}]) as (files, _):
        labels = [json.loads(line)["label"] for line in files["dev"].read_text().splitlines()]
    assert labels == ["good", 1, ["good"]]


class Series:
    """As far as a Series of pandas is asked: a row of a table, whose index are the columns, or a column."""

    def __init__(self, cells: dict[Any, Any], name: Any = 0) -> None:
        self.index, self.name, self._cells = list(cells), name, cells

    def to_dict(self) -> dict[Any, Any]:
        return self._cells

    def __iter__(self) -> Iterator[Any]:
        return iter(self._cells.values())


def test_a_row_of_a_table_is_one_input_and_a_column_several() -> None:
    predictor = predictor_of(
        Classify(labels=("0", "1"), columns=Columns("review", None, "sentiment"), pairs=False)
    )
    wanted = predictor("a fine film")
    assert predictor(Series({"stars": 3, "text": "other", "review": "a fine film"})) == wanted
    assert predictor(Series({"stars": 3, "text": "a fine film"})) == wanted
    assert predictor(Series({0: "a fine film", 1: "dull"})) == predictor(["a fine film", "dull"])
    assert predictor(Series({"7a": "a fine film", "7b": "dull"})) == predictor(["a fine film", "dull"])
    assert predictor(Series({"stars": 3, "text": "a fine film"}, name="7a")) == wanted
    for name in ("review", "Text", None):  # a column, indexed by words
        column = Series({"film": "a fine film", "text": "dull"}, name)
        assert predictor(column) == predictor(["a fine film", "dull"])
    with pytest.raises(UserError, match=r"^inputs: "):
        predictor(Series({"stars": 3, "label": "x"}))


def test_a_column_of_arrow_is_several_inputs() -> None:
    class Column:
        def to_pylist(self) -> list[str]:
            return ["a fine film", "dull"]

    predictor = predictor_of(Classify(labels=("0", "1"), pairs=False))
    assert predictor(Column()) == predictor(["a fine film", "dull"])


class Table:
    """As far as a table of pandas, Polars or Arrow is asked."""

    def __init__(self, rows: list[dict[str, Any]], method: str = "to_dict", how: tuple[str, ...] = ("records",)):
        self.columns = list(rows[0]) if rows else []

        def as_rows(*given: str) -> list[dict[str, Any]]:
            assert given == how
            return rows

        setattr(self, method, as_rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


@pytest.mark.parametrize("method, how", [("to_dict", ("records",)), ("to_dicts", ()), ("to_pylist", ())])
def test_a_table_is_predicted_by_its_columns(method: str, how: tuple[str, ...]) -> None:
    predictor = predictor_of(
        Classify(labels=("0", "1"), columns=Columns("review", None, "sentiment"), pairs=False)
    )
    rows = [{"stars": 3, "text": "other", "review": "a fine film"}, {"stars": 1, "text": "x", "review": "dull"}]
    assert predictor(Table(rows, method, how)) == predictor(["a fine film", "dull"])
    assert predictor(Table([{"text": "dull"}])) == predictor(["dull"])
    assert predictor(Table([])) == []
    with pytest.raises(UserError, match=r"^inputs: .*stars") as caught:
        predictor(Table([{"stars": 3}]))
    assert "\n" not in str(caught.value) and "Columns(" not in str(caught.value)
    with pytest.raises(UserError, match=r"^inputs: row 2: column 'review' is missing") as caught:
        predictor(Table([{"review": "dull"}, {"review": None}]))
    assert "skip_bad_rows" not in str(caught.value)


def test_dicts_are_read_by_the_columns_of_training() -> None:
    """As a table with these columns is."""
    pairs = Classify(labels=("0", "1"), columns=Columns("premise", "hypothesis", "label"), pairs=True)
    row = {"premise": "a man sleeps", "hypothesis": "nobody is awake"}
    predictor = predictor_of(pairs)
    assert (
        predictor([row, row])
        == predictor([("a man sleeps", "nobody is awake")] * 2)
        == predictor(Table([row] * 2))
    )
    assert predictor(row) == predictor({"text": "a man sleeps", "pair": "nobody is awake"})
    with pytest.raises(UserError, match=r"inputs: .*the columns are sentence"):
        predictor([{"sentence": "a man sleeps"}])


def predictor_of(task: Task) -> Predictor:
    """A predictor whose answers are the texts it was asked."""

    class Echo(Predictor):
        def __init__(self) -> None:
            self.task = task

        def predict(self, examples: Any, bar: Any = None) -> list[dict[str, Any]]:
            return [{"example": dataclasses.replace(example, id="", line=0)} for example in examples]

    return Echo()


def test_a_tuple_is_one_input_where_it_can_be_nothing_else() -> None:
    question, chooser = ("Who?", "Ann met Bob."), ("Ann", ["met Bob", "was"])
    assert predictor_of(Choose())(chooser) == predictor_of(Choose())([chooser])[0]
    assert predictor_of(Choose())((chooser, chooser)) == predictor_of(Choose())([chooser, chooser])
    pairs, texts = Classify(labels=("0", "1"), pairs=True), Classify(labels=("0", "1"), pairs=False)
    assert predictor_of(pairs)(question) == predictor_of(pairs)([question])[0]
    assert len(predictor_of(texts)(question)) == 2
    echo = predictor_of(Answer())
    echo.predict = lambda examples, bar=None: [{"question": e.question} for e in examples]  # type: ignore
    assert echo(question) == {"question": "Who?"} and echo((question,)) == [{"question": "Who?"}]


def test_complaints_name_the_row(model: Path, tmp_path: Path) -> None:
    train = reviews(tmp_path, 16)
    with pytest.raises(UserError, match=r"^train\.jsonl:3: "):
        finetune(model, Classify(), [*train[:2], {"text": "no label"}], None, tmp_path / "a", QUICK)
    for rows, message in {
        "pairs": ([("a film", "pos")], r"train: expected a dict for row 1, got tuple: \('a film', 'pos'\)"),
        "numbers": (5, "train: expected a file or rows, got int"),
        "things": (
            [train[0], {"text": "a", "label": object()}],
            "train: row 2: column 'label': expected texts, numbers.*object",
        ),
    }.values():
        with pytest.raises(ValueError, match=message):
            finetune(model, Classify(), rows, None, tmp_path / "a", QUICK)  # type: ignore[arg-type]
    for task, settings, message in [
        ("sst-2", QUICK, "task: expected a task, such as .*, got str 'sst-2'"),
        (Classify(), {"epochs": 3}, r"settings: expected FinetuneSettings\(\.\.\.\), got dict"),
        (Classify, QUICK, "task: expected a task, such as .*, got ABCMeta"),
    ]:
        with pytest.raises(ValueError, match=message):
            finetune(model, task, train, None, tmp_path / "a", settings)  # type: ignore[arg-type]
    loaded: Any = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"model: expected a folder or a name, got Linear; .*training_steps"):
        finetune(loaded, Classify(), train, None, tmp_path / "a", QUICK)
    assert not (tmp_path / "a").exists()


def test_a_tagger_takes_a_dict() -> None:
    task = Tag(labels=("O", "B-PER", "I-PER"))
    assert task.from_value({"tokens": ["ann", "met"]}, "1").words == ("ann", "met")
    assert task.from_value({"words": ["ann", "met"]}, "1").words == ("ann", "met")
    assert task.from_value({"text": "ann met"}, "1").words == task.from_value("ann met", "1").words
    for no_words in ({"words": None}, [], ["ann", 2]):
        with pytest.raises(ValueError, match="expected a text or a list of words"):
            task.from_value(no_words, "1")


def test_complaints_of_rows_name_no_flags(model: Path, tmp_path: Path) -> None:
    rows = [{"satz": "fine", "label": 1}, {"satz": "dull", "label": 0}]
    with pytest.raises(UserError, match=r"columns are satz, label; name one with Columns\(text=...\)$"):
        finetune(model, Classify(), rows, rows, tmp_path / "out", QUICK)
    twice = [{"text": "fine", "label": 1, "id": 7}] * 2 + [
        {"text": "dull", "label": None},
        {"text": "a", "label": 0},
    ]
    said = r"train.jsonl:2: duplicate id .*: Columns\(id=\"none\"\); skip_bad_rows=True skips bad rows$"
    with pytest.raises(UserError, match=said):
        finetune(model, Classify(), twice, rows, tmp_path / "out", QUICK)
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in twice))
    with pytest.raises(UserError, match=said):
        finetune(model, Classify(), file, rows, tmp_path / "out", QUICK)
    with (
        on_command_line(),
        pytest.raises(UserError, match=r"--id-column none; --skip-bad-rows skips bad rows$"),
    ):
        finetune(model, Classify(), file, file, tmp_path / "out", QUICK)


def test_options_are_called_as_whoever_reads_of_them_gives_them() -> None:
    assert (option("max_minutes"), option("sharding", "fsdp")) == ("max_minutes", "sharding='fsdp'")
    with on_command_line():
        assert (option("max_minutes"), option("sharding", "fsdp")) == ("--max-minutes", "--sharding fsdp")
    assert option("max_minutes") == "max_minutes"


def test_what_was_lost_of_the_data_is_a_warning_to_the_log(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Python shows warnings alone where nobody has set up logging."""
    train = [*reviews(tmp_path, 48), {"text": "a film", "label": None}, {"text": "film " * 40, "label": "pos"}]
    settings = dataclasses.replace(QUICK, skip_bad_rows=True, max_length=32)
    with caplog.at_level("INFO", "electra_core"):
        finetune(model, Classify(), train, reviews(tmp_path, 16, seed=1), tmp_path / "out", settings, quiet=True)
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    of = {
        said: [level for line, level in levels.items() if said in line]
        for said in ("train.jsonl: skipped 1 bad row", "and were truncated", "only 4 steps", "seed 0: ")
    }
    assert list(of.values()) == [["WARNING"], ["WARNING"], ["WARNING"], ["INFO"]], levels
