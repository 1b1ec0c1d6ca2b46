"""The evaluation report: its figures are right, its three forms hold the same, hostile text stays text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from electra_core.downstream.choices import ChoiceExample, Choose
from electra_core.downstream.classify import Classify, Regress
from electra_core.downstream.interface import Task
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag
from electra_core.errors import UserError
from electra_core.finetune import _at_the_baseline
from electra_core.labelled_data.labelled import BadRows, MultiLabelExample, TextExample
from electra_core.labelled_data.squad_files import QuestionExample
from electra_core.labelled_data.tagged_files import TaggedExample
from electra_core.predict import Evaluation
from electra_core.reports.task_report import (
    Table,
    TaskReport,
    make_report,
    to_html,
    to_json,
    to_text,
    write_report,
)


def report_of(task: Task, examples: list, predictions: list) -> TaskReport:
    metrics = task.score(examples, predictions)
    return make_report(Evaluation(task, metrics, examples, predictions, BadRows("x")), "MODEL", "DATA")


def sure_of(label: str, score: float, labels: tuple[str, ...]) -> dict[str, Any]:
    """A classifier's prediction, the other classes sharing what is left of the probability."""
    others = dict.fromkeys(labels, (1 - score) / (len(labels) - 1))
    return {"label": label, "score": score, "scores": others | {label: score}}


@pytest.fixture
def classes() -> TaskReport:
    labels = ["neg", "neg", "neg", "pos", "pos"]
    examples = [TextExample(str(n), n, f"text {n} <script>", None, label) for n, label in enumerate(labels, 2)]
    given = [("neg", 0.9), ("pos", 0.6), ("pos", 0.95), ("pos", 0.8), ("pos", 0.7)]
    predictions = [sure_of(label, score, ("neg", "pos")) for label, score in given]
    return report_of(Classify(labels=("neg", "pos")), examples, predictions)


def test_classes(classes):
    found = to_json(classes)
    assert found["metrics"]["accuracy"] == pytest.approx(3 / 5)
    assert found["constant_guess"]["accuracy"] == pytest.approx(3 / 5)  # three of five are neg
    assert found["confusion"] == [{"truth": "neg", "neg": 1, "pos": 2}, {"truth": "pos", "neg": 0, "pos": 2}]
    assert [row["support"] for row in found["per_class"]] == [3, 2]
    assert [(row["line"], row["score"]) for row in found["worst_mistakes"]] == [(4, 0.95), (3, 0.6)]
    assert sum(row["count"] for row in found["calibration"]) == 5


def two_classes(truth: str, scores: list[float]) -> TaskReport:
    """Of a classifier of a and b: the examples' classes, and how sure the model is of b."""
    examples = [TextExample(str(n), n, "text", None, label) for n, label in enumerate(truth, 1)]
    predictions = [sure_of("b" if score > 0.5 else "a", max(score, 1 - score), ("a", "b")) for score in scores]
    return report_of(Classify(labels=("a", "b")), examples, predictions)


def test_two_classes_are_ranked_and_the_positive_one_is_named():
    report = two_classes("aaab", [0.1, 0.3, 0.3, 0.3])
    found, text = to_json(report), to_text(report)
    assert (found["metrics"]["auc"], found["metrics"]["average_precision"]) == pytest.approx((2 / 3, 1 / 3))
    assert found["constant_guess"]["auc"] == 0.5 and found["constant_guess"]["average_precision"] == 0.25
    assert found["positive_class"] == "b" and "f1 (b)" in text and "average_precision (b)" in text
    assert [row["average_precision"] for row in found["per_class"]] == pytest.approx([5 / 6, 1 / 3])
    three = Classify(labels=("a", "b", "c"))
    other = to_json(report_of(three, [TextExample("1", 1, "", None, "a")], [sure_of("a", 0.9, three.labels)]))
    assert "positive_class" not in other and "auc" not in other["metrics"] and "thresholds" not in other


def test_thresholds_are_those_of_the_rarer_of_two_classes():
    found = to_text(two_classes("aaab", [0.1, 0.25, 0.25, 0.45]))
    note = "Of 'b', if all texts that score at least this for it count as 'b'. F1 is best at --threshold 0.3;"
    assert note in " ".join(found.split())
    rarer = " ".join(to_text(two_classes("abbb", [0.45, 0.9, 0.9, 0.9])).split())
    assert "Of 'a', if" in rarer and "F1 is best at --positive-class a --threshold 0.1;" in rarer
    assert "Of 'b', if" in " ".join(to_text(two_classes("ab", [0.45, 0.9])).split())
    one = two_classes("aaa", [0.1, 0.2, 0.6])
    assert "thresholds" not in to_json(one) and not {"auc", "average_precision"} & {*one.metrics}


def test_a_reader_sees_the_worst_mistakes_and_a_program_all():
    report = two_classes("a" * 30, [0.9] * 30)
    assert len(to_json(report)["worst_mistakes"]) == 30
    for shown in (to_text(report), to_html(report)):
        assert "30 of 30 are wrong; most confident first. The first 20 of 30; a .json report has all." in " ".join(
            shown.split()
        )
    assert to_html(report).count('<td class="words">text</td>') == 20
    assert re.search(r"\n\.scroll td\.words, [^}]*unicode-bidi: plaintext;", to_html(report))  # for Arabic texts
    assert "a .json report" not in to_text(two_classes("a" * 20, [0.9] * 20))


def test_labels_and_texts_cannot_steer_the_terminal():
    label = "\x1b[31mneg"
    examples = [TextExample(str(n), n, "a \x9b2J film", None, label) for n in range(4)]
    predictions = [sure_of("pos", 0.9, (label, "pos"))] * 4
    shown = to_text(report_of(Classify(labels=(label, "pos")), examples, predictions))
    assert r"\x1b[31mneg" in shown and r"a \x9b2J film" in shown
    assert "\x1b" not in shown and "\x9b" not in shown and shown.endswith("\n")


def test_the_three_forms_hold_the_same(classes, tmp_path):
    for suffix in ("html", "json", "txt"):
        write_report(classes, tmp_path / f"report.{suffix}")
    html = (tmp_path / "report.html").read_text()
    text = (tmp_path / "report.txt").read_text()
    assert json.loads((tmp_path / "report.json").read_text()) == to_json(classes)
    for table in classes.tables:
        assert table.title in text and f"<h2>{table.title}</h2>" in html
    assert "0.950" in text and "<td>0.950</td>" in html
    assert "text 4 &lt;script&gt;" in html and '<script>"' not in html and "text 4 <script>" not in html
    with pytest.raises(UserError, match=r"expected a name that ends in .html, .json or .txt, got .pdf"):
        write_report(classes, tmp_path / "report.pdf")


@pytest.mark.parametrize("suffix", ["html", "json", "txt"])
def test_a_model_whose_name_is_not_utf_8(classes, tmp_path, suffix):
    named = replace(classes, model="m\udcff")  # as Python reads the byte 0xff in a file's name
    write_report(named, tmp_path / f"report.{suffix}")
    assert "m\\udcff" in (tmp_path / f"report.{suffix}").read_text(encoding="utf-8")


@pytest.fixture
def many() -> TaskReport:
    """30 classes, of which the last 5 neither occur nor are predicted; class n occurs n + 1 times."""
    task = Classify(labels=tuple(f"class {n}" for n in range(30)))
    truth = [n for n in range(24) for _ in range(n + 1)]
    examples = [TextExample(str(n), n, "text", None, f"class {label}") for n, label in enumerate(truth, 1)]
    given = [24 if label == 20 else 0 if label == 23 else label for label in truth]
    predictions = [sure_of(f"class {label}", 0.9, task.labels) for label in given]
    return report_of(task, examples, predictions)


def test_many_classes_are_shown_by_their_size_and_confused_in_pairs(many):
    found, text, html = to_json(many), to_text(many), to_html(many)
    assert [row["support"] for row in found["per_class"]] == [*range(24, 0, -1), 0]
    assert found["per_class"][-1]["label"] == "class 24"  # predicted, never true
    assert "Per class - 5 labels do not occur and were not predicted." in text
    assert found["commonest_confusions"] == [
        {"truth": "class 23", "prediction": "class 0", "count": 24},
        {"truth": "class 20", "prediction": "class 24", "count": 21},
    ]
    assert "Commonest confusions - 2 of 2 pairs" in text and "<h2>Commonest confusions</h2>" in html
    assert len(found["confusion"]) == 30  # for programs
    assert "columns the prediction" not in text and "<h2>Confusion</h2>" not in html
    assert max(map(len, text.split("\n"))) <= 100


def test_no_more_confusions_than_can_be_read():
    labels = tuple(map(str, range(40)))
    examples = [TextExample(label, 1, "text", None, label) for label in labels]
    predictions = [sure_of(labels[n - 1], 0.9, labels) for n in range(40)]
    report = report_of(Classify(labels=labels), examples, predictions)
    assert len(to_json(report)["commonest_confusions"]) == 15
    assert "15 of 40 pairs of truth and prediction" in to_text(report)
    assert "not predicted" not in to_text(report)


def test_labels_of_texts_that_have_several_are_left_out_where_they_do_not_occur():
    task = MultiLabel(labels=tuple(f"l{n}" for n in range(25)))
    examples = [MultiLabelExample(str(n), n, "a", labels=("l3",) if n else ("l3", "l7")) for n in range(3)]
    scores = dict.fromkeys(task.labels, 0.1) | {"l5": 0.9}
    found = report_of(task, examples, [{"labels": ["l5"], "scores": scores}] * 3)
    assert [(row["label"], row["support"]) for row in to_json(found)["per_label"]] == [
        ("l3", 3),
        ("l7", 1),
        ("l5", 0),
    ]
    note = "At a threshold of 0.5; average precision needs none. 22 labels do not occur and were not predicted."
    assert note in " ".join(to_text(found).split())


def test_no_threshold_is_recommended_where_none_finds_a_label():
    task, examples = MultiLabel(labels=("rare",)), [MultiLabelExample("1", 1, "a", labels=("rare",))]
    found = to_text(report_of(task, examples, [{"labels": [], "scores": {"rare": 0.001}}]))
    assert "None of them finds a label." in found and "best at --threshold" not in found
    found = to_text(report_of(task, examples, [{"labels": [], "scores": {"rare": 0.03}}]))
    assert "F1 is best at --threshold 0.01;" in found


def test_what_sure_answers_are_worth(classes):
    rows = to_json(classes)["if_only_sure_answers_count"]
    assert [(row["score"], row["count"]) for row in rows] == [(0.0, 5), (0.7, 4), (0.8, 3), (0.9, 2), (0.95, 1)]
    assert [row["accuracy"] for row in rows] == pytest.approx([3 / 5, 3 / 4, 2 / 3, 1 / 2, 0])


def test_numbers():
    examples = [TextExample(str(n), n, "text", None, str(float(n))) for n in range(4)]
    predictions = [{"value": value} for value in (0.0, 1.5, 2.0, 0.0)]
    found = to_json(report_of(Regress(scale=1.0), examples, predictions))
    assert found["worst_mistakes"][0]["line"] == 3 and found["worst_mistakes"][0]["error"] == -3
    assert found["constant_guess"]["mse"] == pytest.approx(1.25)  # variance of 0, 1, 2, 3
    assert found["metrics"]["mae"] == pytest.approx(3.5 / 4) and found["constant_guess"]["mae"] == pytest.approx(1)


def test_tags():
    task = Tag(labels=("O", "B-A", "I-A"))
    examples = [TaggedExample("1", 1, ("x", "y"), ("B-A", "I-A")), TaggedExample("4", 4, ("z",), ("O",))]
    report = report_of(task, examples, [{"tags": ["B-A", "O"]}, {"tags": ["O"]}])
    found = to_json(report)
    assert found["per_type"] == [{"label": "A", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}]
    assert [row["line"] for row in found["worst_mistakes"]] == [1]
    assert "y: I-A → O" in to_text(report)
    plain = report_of(
        Tag(labels=("DT", "NN")), [TaggedExample("1", 1, ("x", "y"), ("DT", "NN"))], [{"tags": ["NN", "NN"]}]
    )
    assert to_json(plain)["constant_guess"]["accuracy"] == 0.5 and "Per tag" in to_text(plain)


def test_answers():
    task = Answer(unanswerable=True)
    examples = [
        QuestionExample("a", "1", "Who?", "Ann met Bob.", (("Ann", 0),)),
        QuestionExample("b", "2", "Whom?", "Ann met Bob.", ()),
    ]
    candidate = {"text": "Bob", "start": 8, "end": 11, "score": 0.9, "log_probability": 1.0}
    predictions = [{"answer": "Bob", "score": 0.9, "nbest": [candidate], "null_difference": -1.0}] * 2
    found = to_json(report_of(task, examples, predictions))
    assert found["metrics"]["f1"] == 0 and found["constant_guess"]["f1"] == 50
    assert [(row["id"], row["truth"]) for row in found["worst_mistakes"]] == [("a", "Ann"), ("b", "(none)")]
    predictions = [{**predictions[0], "score": 0.8}, predictions[1]]
    found = to_json(report_of(task, examples, predictions))
    assert [row["id"] for row in found["worst_mistakes"]] == ["b", "a"], "of equal F1 the most confident first"


def test_choices():
    examples = [ChoiceExample(str(n), n, "text", ("x", "y"), label) for n, label in enumerate((0, 0, 1))]
    predictions = [{"choice": 0, "text": "x", "score": score, "scores": []} for score in (0.6, 0.7, 0.8)]
    found = to_json(report_of(Choose(), examples, predictions))
    assert found["metrics"]["accuracy"] == found["constant_guess"]["accuracy"] == pytest.approx(2 / 3)
    assert [row["truth"] for row in found["worst_mistakes"]] == ["y"]


def test_the_terminals_columns_stay_narrow():
    long = "word " * 60
    table = Table("Worst mistakes", "", ("id", "truth", "text"), [("1", long, long), ("2", "a", "b")])
    report = TaskReport("m", "d", "qa", 2, {"f1": 0.5}, {}, [table])
    *_, first, second = [line for line in to_text(report).split("\n") if line]
    assert second == "  2   a" + " " * 59 + "  b"
    assert first.count("word") == 12 + 60  # the last column is not cut


@pytest.mark.parametrize(
    "task, examples, what, figure",
    [
        (Classify(labels=("neg", "pos")), [TextExample("1", 1, "a", None, "pos")], "the most frequent class", 1.0),
        (
            Regress(scale=1.0),
            [TextExample("1", 1, "a", None, "1"), TextExample("2", 2, "b", None, "3")],
            "the mean",
            0.0,
        ),
        (Tag(labels=("O", "B-A", "I-A")), [TaggedExample("1", 1, ("x", "y"), ("B-A", "O"))], "the tag O", 0.0),
        (
            Tag(labels=("DT", "NN"), metric="accuracy"),
            [TaggedExample("1", 1, ("x", "y", "z"), ("DT", "NN", "NN"))],
            "the most frequent tag",
            2 / 3,
        ),
        (Answer(unanswerable=True), [QuestionExample("a", "1", "Who?", "Ann", ())], "no answer", 100.0),
        (Choose(), [ChoiceExample("1", 1, "a", ("x", "y"), 1)], "the most frequent choice", 1.0),
        (
            MultiLabel(labels=("x", "y")),
            [
                MultiLabelExample(str(n), n, "a", labels=labels)
                for n, labels in enumerate([("x",), (), ("y", "x")])
            ],
            "the most frequent set of labels",
            (2 / 3 + 1 / 3) / 2,
        ),
    ],
    ids=["classes", "numbers", "spans", "tags", "answers", "choices", "label sets"],
)
def test_a_model_that_knows_no_more_than_one_answer_is_said_to(task, examples, what, figure):
    job: Any = SimpleNamespace(task=task, data=SimpleNamespace(dev_examples=examples))
    said = _at_the_baseline(job, {task.metric: figure}) or ""
    assert said.startswith(
        f"a constant guess ({what}) does as well on the dev data ({task.metric} {figure:.4g}); "
    )
    assert _at_the_baseline(job, {task.metric: figure + 0.01}) is None


def test_a_model_that_knows_only_the_common_class_is_told_of_weights():
    for common, weights, told in ((9, (), True), (6, (), False), (9, (0.5, 5.0), False)):
        examples = [TextExample(str(n), n, "a", None, "common" if n < common else "rare") for n in range(10)]
        task = Classify(labels=("common", "rare"), class_weights=weights)
        job: Any = SimpleNamespace(task=task, data=SimpleNamespace(dev_examples=examples))
        said = _at_the_baseline(job, {"accuracy": common / 10}) or ""
        assert said and said.endswith("; class_weights makes rare classes count") == told
