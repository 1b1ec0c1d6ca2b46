"""Texts with any number of labels as files and callers have them: what is read, refused, told of, and held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import QUICK, model, run  # noqa: F401
from multilabel_rows import examples, read, rows
from reading import write_lines

from electra_core.downstream.classify import Classify
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.named_tasks import choose_task, for_reading
from electra_core.downstream.task_files import task_from_json, task_to_json
from electra_core.errors import UserError
from electra_core.finetuning import data_warnings, dev_split
from electra_core.finetuning.data import read_data
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.labelled import BadRows

LABELS = ("calm", "loud", "odd")


@pytest.mark.parametrize(
    "value, labels",
    [
        (["b", "a"], ("b", "a")),
        ([2, 13.0, True, "x"], ("2", "13", "1", "x")),
        (["a", " a", "a"], ("a",)),  # once, however often
        ([], ()),
        ("", ()),
        (None, ()),  # pandas' missing cell
        ("a, b,,a ", ("a", "b")),
        ("2,13", ("2", "13")),
        (7, ("7",)),
        ("['a b', 'c,d']", ("a b", "c,d")),  # pandas writes a list into a CSV like that
        ('["a", 3]', ("a", "3")),
        ("[]", ()),
        ([0, 1], ("0", "1")),  # of three or more, 0 and 1 are marks for every label
        ("[CLS]", ("[CLS]",)),
        ("nan", ()),
    ],
    ids=str,
)
def test_what_a_cell_holds(value: Any, labels: tuple[str, ...], tmp_path: Path) -> None:
    assert read(rows(tmp_path / "a.jsonl", [value])) == [labels]


@pytest.mark.parametrize(
    "value, problem",
    [
        ({"a": 1}, "the label is a dict, expected a list of labels, a string or a number"),
        ([["a"]], "a label in a list is a list, expected a string or a number"),
        (["a", ""], "a label in a list is empty"),
        (["a", None], "a label in a list is empty"),
        ([0, 1.0, 0], "a list of 0 and 1, apparently for every label .*--label-columns"),
    ],
    ids=str,
)
def test_cells_of_no_use_are_named(value: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"a.jsonl:2: {problem}"):
        read(rows(tmp_path / "a.jsonl", ["a", value]))


def test_a_row_without_the_field_is_bad(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", '{"text": "a", "labels": ["x"]}', '{"text": "b"}')
    with pytest.raises(UserError, match=r"a.jsonl:2: the label is missing \(no field 'labels'; an empty list"):
        read(file)


def test_labels_between_other_separators(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.tsv", "text\tlabel", "one\tbig, small | odd", "two\t", "three\todd")
    assert read(file, separator="|") == [("big, small", "odd"), (), ("odd",)]


def test_a_column_for_each_label(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "a.csv", "id,comment,toxic,other,threat", "7,a,1,x,0", "8,b,0.0,y,1.0", "9,c,False,z,FALSE"
    )
    assert read(file, labels=("threat", "toxic")) == [("toxic",), ("threat",), ()]
    headless = write_lines(tmp_path / "b.csv", "a,1,0", "b,1,1")
    assert read(headless, text="1", labels=["2", "3", "2"], header=False) == [("2",), ("2", "3")]


@pytest.mark.parametrize(
    "cell, problem",
    [
        ("yes", r"a label column holds neither 0 nor 1 \('yes' in column 'toxic'\)"),
        ("-1", r"a label column holds neither 0 nor 1 \('-1' in column 'toxic'\)"),
        ("", r"the label is missing \(column 'toxic' is empty, expected 0 or 1\)"),
        ("NaN", r"the label is missing \(column 'toxic' is empty, expected 0 or 1\)"),
    ],
)
def test_columns_that_hold_neither_0_nor_1(cell: str, problem: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.csv", "text,toxic,threat", "a,1,0", f"b,{cell},1")
    with pytest.raises(UserError, match=f"a.csv:3: {problem}"):
        read(file, labels=("toxic", "threat"))


@pytest.mark.parametrize(
    "columns, said",
    [
        (
            {},
            r"no column has a usual name for the label; .*-column, or one column of 0 and 1 .*--label-columns",
        ),
        (
            {"labels": ("toxic", "rude", "mild")},
            r"no label columns 'rude', 'mild'; the columns are text, ",
        ),
        ({"label": "toxik"}, "no label column 'toxik'"),
    ],
    ids=str,
)
def test_columns_that_are_not_there(columns: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read(write_lines(tmp_path / "a.csv", "text,toxic,threat", "a,1,0"), **columns)


def test_a_model_of_columns_reads_a_file_s_one_usual_column(tmp_path: Path) -> None:
    """As for other names that the training file had; but what is named for this very file has to be there."""
    trained = MultiLabel(labels=("calm", "odd"), columns=Columns(labels=("calm", "odd")))
    file = rows(tmp_path / "a.jsonl", [["odd"], []])
    assert read(file, for_reading(trained, Columns())) == [("odd",), ()]  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no label columns 'calm', 'odd'"):
        read(file, for_reading(trained, Columns(labels=("calm", "odd"))))  # type: ignore[arg-type]
    other = write_lines(tmp_path / "b.csv", "text,odd,calm", "a,1,0")
    of_one = MultiLabel(labels=("calm", "odd"), columns=Columns(label="tags"))
    assert read(other, for_reading(of_one, Columns(labels=("calm", "odd")))) == [("odd",)]  # type: ignore[arg-type]


def test_lists_in_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "labels": [["x", "y"], []]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [("x", "y"), ()]


def test_folders_have_one_label_a_text(tmp_path: Path) -> None:
    for name in ("neg", "pos"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_text("fine")
    assert read(tmp_path) == [("neg",), ("pos",)]


def test_numbers_as_pandas_writes_them_are_the_same_labels(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "a.csv", "text,label", "a,1.0", "b,", "c,2.0")
    assert read(train) == [("1",), (), ("2",)]
    task = MultiLabel(labels=("1", "2"))
    assert read(write_lines(tmp_path / "b.csv", "text,label", "a,2.0", 'b,"1,2"'), task) == [("2",), ("1", "2")]


def test_what_training_learns_of_the_labels() -> None:
    fitted = MultiLabel().fitted(examples(("10", "b"), (), ("9", "a")))
    assert fitted.labels == ("9", "10", "a", "b") and fitted.pairs is False
    assert task_from_json(json.loads(json.dumps(task_to_json(fitted))), "x") == fitted
    own = MultiLabel(columns=Columns(labels=("b", "never", "a")))
    assert own.fitted(examples(("a",), ("b",))).labels == ("b", "never", "a")
    assert own.fitted(examples(("a",), ("a", "b"))).labels == ("b", "never", "a")
    with pytest.raises(UserError, match="no training example has a label; there is nothing to learn"):
        own.fitted(examples((), ()))
    with pytest.raises(UserError, match=r"every training example has the same labels \(a, b\)"):
        MultiLabel().fitted(examples(("a", "b"), ("b", "a")))


def test_a_label_that_training_had_not_makes_a_bad_row(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"a.jsonl:2: a label is not in the training data \('new'; known: calm, loud"
    ):
        read(rows(tmp_path / "a.jsonl", [["odd"], ["odd", "new"]]), MultiLabel(labels=LABELS))
    file = write_lines(tmp_path / "a.csv", "text,calm,loud", "a,1,0")
    task = MultiLabel(labels=LABELS, columns=Columns(labels=("calm", "loud")))
    with pytest.raises(UserError, match=r"one column per label of the model \(calm, loud, odd\), got calm, loud"):
        read(file, task)


def test_one_label_a_text_says_what_to_do_with_several(tmp_path: Path) -> None:
    file = rows(tmp_path / "a.jsonl", [["a"], ["b"]])
    with pytest.raises(
        UserError, match=r"the label is a list, .* \(for several labels per text: --task multilabel\)"
    ):
        list(Classify().read(file, BadRows(file)))
    for columns, flag in (
        (Columns(labels=("a", "b")), "--label-columns"),
        (Columns(separator=";"), "--label-sep"),
    ):
        with pytest.raises(UserError, match=rf"{flag}.*: no effect with classify, only with multilabel"):
            choose_task("classify", columns)
    assert isinstance(choose_task("multilabel", Columns(labels=("a", "b")))[0], MultiLabel)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"labels": "ab"}, "labels: expected column names"),
        ({"labels": ()}, "labels: expected column names"),
        ({"labels": ("a",), "label": "b"}, "not both"),
        ({"separator": ""}, "separator: expected at least one character"),
    ],
    ids=str,
)
def test_columns_that_make_no_sense(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Columns(**wrong)
    with pytest.raises(ValueError, match=r"threshold: expected a probability from 0 to 1, got 1.5"):
        MultiLabel(threshold=1.5)


# ---- what is told of the data


def test_the_data_are_told_of(tmp_path: Path) -> None:
    said: list[str] = []
    file = write_lines(tmp_path / "a.csv", "text,a,b,c", *(f"row {n},{n % 2},{int(n > 14)},0" for n in range(30)))
    task = MultiLabel(columns=Columns(labels=("a", "b", "c")))
    read_data(task, file, None, FinetuneSettings(), said.append)
    assert said[0] == f"{file}: 30 rows, text 'text', labels by column (a 15, b 15; 8 without a label)"
    assert any("no training example has the label 'c' (cannot be learned)" in line for line in said)
    with pytest.raises(UserError, match=r"class_weights: no effect on.* a lower threshold finds more"):
        read_data(task, file, None, FinetuneSettings(class_weights=True), said.append)
    task = read_data(task, file, None, FinetuneSettings(metric="micro_f1"), said.append)[0]
    assert task.metric == "micro_f1"


def test_labels_that_nobody_cut_are_told_of() -> None:
    uncut = data_warnings.labels_uncut("a", examples(("x|y",), ("x",), ("y|z",))) or ""
    assert "2 of the 3 labels contain '|'" in uncut and "--label-separator '|'" in uncut
    assert data_warnings.labels_uncut("a", examples(("x|y",), ("x", "y"))) is None
    assert data_warnings.labels_uncut("a", examples(("x",), ())) is None
    several = data_warnings.labels_of_several("a", ("x", "y", "x, y")) or ""
    assert "'x, y' combines other labels" in several and "--task multilabel" in several
    assert data_warnings.labels_of_several("a", ("x", "x,z")) is None
    assert "if it means no label, leave the cell empty" in (
        data_warnings.labels_of_none("a", examples(("None",), ("x",))) or ""
    )


def test_each_set_of_labels_has_its_share_of_what_is_held_out() -> None:
    made = examples(*[()] * 160, *[("a",)] * 20, *[("a", "b")] * 20)
    train, held = dev_split.split(made, "a", by_label=True)
    assert [sum(e.labels == labels for e in held) for labels in ((), ("a",), ("a", "b"))] == [16, 2, 2]
    assert len(train) == 180
