"""Of two classes one is the positive: the user's choice, which figures, thresholds and reports go by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
from finetune_runs import QUICK, Killed, at_step, killed, model, without_times  # noqa: F401
from sklearn import metrics
from untrained_predictor import untrained

from electra_core.cli import main
from electra_core.downstream.classify import Classify
from electra_core.downstream.task_files import load_task, task_from_json, task_to_json
from electra_core.errors import UserError
from electra_core.finetune import finetune
from electra_core.labelled_data.features import Features
from electra_core.labelled_data.labelled import TextExample
from electra_core.predict import Predictor, evaluate
from electra_core.reports.task_report import make_report, to_json, to_text

LABELS = ("is relapse", "stable {0}")
"""The guess, the later one, is not what one wants to find."""
SIZES = ["--epochs", "1", "--batch-size", "16", "--cache", "none", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return untrained(Classify(labels=LABELS, max_length=32), tmp_path_factory.mktemp("model"))


@pytest.fixture
def rows() -> list[dict[str, str]]:
    draw = np.random.default_rng(0)
    words = ("fine", "dull", "great", "bad", "film", "plot")
    return [{"text": " ".join(draw.choice(words, 4)), "label": LABELS[int(n % 3 > 0)]} for n in range(30)]


def with_task(predictor: Predictor, **changes: Any) -> Predictor:
    assert isinstance(predictor.task, Classify)
    return Predictor(predictor.model, replace(predictor.task, **changes), predictor.tokenizer)  # type: ignore[arg-type]


def test_figures_are_those_of_the_chosen_class(predictor: Predictor, rows: list[dict[str, str]]) -> None:
    guessed = evaluate(predictor, rows)
    assert guessed.task.positive == LABELS[1]
    for label in LABELS:
        found = evaluate(with_task(predictor, positive_class=label), rows)
        truth = np.array([row["label"] == label for row in rows])
        scores = [prediction["scores"][label] for prediction in found.predictions]
        answers = [prediction["label"] == label for prediction in found.predictions]
        assert found.metrics["f1"] == pytest.approx(metrics.f1_score(truth, answers))
        assert found.metrics["average_precision"] == pytest.approx(metrics.average_precision_score(truth, scores))
        assert found.metrics["auc"] == pytest.approx(guessed.metrics["auc"])
        report = make_report(found)
        assert to_json(report)["positive_class"] == label and f"f1 ({label})" in to_text(report)
        assert f"Of '{label}', if all" in " ".join(to_text(report).split()), "chosen, so not the rarer one"
        assert "F1 is best at --threshold 0." in " ".join(to_text(report).split())
    assert "F1 is best at --positive-class 'is relapse' --threshold" in " ".join(
        to_text(make_report(guessed)).split()
    )


def test_a_threshold_is_of_the_positive_class(predictor: Predictor, rows: list[dict[str, str]]) -> None:
    texts = [row["text"] for row in rows]
    scores = sorted(answer["scores"][LABELS[0]] for answer in predictor(texts))
    limit = scores[7]  # reached by all but seven
    for label, count in ((LABELS[0], 23), (LABELS[1], 30 - 7)):
        at = limit if label == LABELS[0] else sorted(1 - score for score in scores)[7]
        answers = with_task(predictor, positive_class=label, threshold=at - 1e-9)(texts)
        assert sum(answer["label"] == label for answer in answers) == count
        for answer in answers:
            assert (answer["scores"][label] >= at - 1e-9) == (answer["label"] == label)
            assert answer["score"] == answer["scores"][answer["label"]]
    for at, label in ((0.0, LABELS[1]), (1.0, LABELS[0])):
        assert {answer["label"] for answer in with_task(predictor, threshold=at)(texts)} == {label}
    for label in LABELS:  # a score that is the threshold is enough
        task = Classify(labels=LABELS, positive_class=label, threshold=0.5)
        (answer,) = task.decode([], Features(2, 3), [np.zeros((1, 2), dtype=np.float32)])
        assert answer["label"] == label and answer["score"] == 0.5
    found = evaluate(with_task(predictor, threshold=0.0), rows)
    assert found.metrics["accuracy"] == pytest.approx(2 / 3) and found.metrics["mcc"] == 0
    assert "Per class - At a threshold of 0 for 'stable {0}';" in to_text(make_report(found))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"positive_class": "relapse"}, "positive_class: expected 'a' or 'b', got 'relapse'"),
        ({"threshold": 1.5}, "threshold: expected a probability from 0 to 1, got 1.5"),
        ({"threshold": float("nan")}, "threshold: expected a probability from 0 to 1, got nan"),
        ({"labels": ("a", "b", "c"), "positive_class": "a"}, "positive_class: no effect with 3 classes, only"),
        ({"labels": ("a", "b", "c"), "threshold": 0.2}, "threshold: no effect with 3 classes, only with two"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        Classify(**{"labels": ("a", "b"), **changes})


@pytest.mark.parametrize(
    "given, labels, names, expected",
    [
        (0, ("0", "1"), (), "0"),
        ("1.0", ("0", "1"), (), "1"),
        (True, ("0", "1"), (), "1"),
        ("true", ("0", "1"), (), "1"),
        ("0", ("negative", "positive"), (("0", "negative"), ("1", "positive")), "negative"),
        (" b ", ("a", "b"), (), "b"),
        ("", ("a", "b"), (), ""),
        ("yes", (), (), "yes"),
    ],
)
def test_forms_of_a_class_s_name(given: Any, labels: Any, names: Any, expected: str) -> None:
    assert Classify(labels=labels, label_names=names, positive_class=given).positive_class == expected


def test_the_choice_is_checked_once_the_labels_are_known() -> None:
    examples = [TextExample(str(n), n, "a film", None, "ab"[n % 2]) for n in range(4)]
    assert Classify(positive_class="a").fitted(examples).positive == "a"
    with pytest.raises(UserError, match=r"^positive_class: expected 'a' or 'b', got 'c'$"):
        Classify(positive_class="c").fitted(examples)


def test_a_task_without_a_choice_is_described_as_before() -> None:
    """Its description is part of what a checkpoint and the cache of tokens are recognised by."""
    assert not {"positive_class", "threshold"} & task_to_json(Classify(labels=LABELS)).keys()
    chosen = Classify(labels=LABELS, positive_class=LABELS[0], threshold=0.25)
    assert task_from_json(json.loads(json.dumps(task_to_json(chosen))), "task.json") == chosen


def test_a_training_is_resumed_with_its_own_choice_only(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    file = tiny_model.reviews(tmp_path / "train.tsv", 64)
    settings = replace(QUICK, epochs=1, evaluations=2)

    def train(out: str, positive: str = "neg", **more: Any) -> dict[str, Any]:
        task = Classify(positive_class=positive)
        return finetune(model, task, file, file, tmp_path / out, settings, quiet=True, **more)

    whole = train("whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 3, killed)
        train("out")
    for other in ("", "pos"):
        with pytest.raises(UserError, match=f"positive_class was 'neg', is now '{other}'"):
            train("out", other, resume=True)
    assert without_times(train("out", resume=True)) == without_times(whole)
    assert whole["positive_class"] == "neg" and load_task(tmp_path / "out").positive == "neg"


def test_on_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, out = str(tiny_model.reviews(tmp_path / "train.tsv", 64)), str(tmp_path / "out")
    command = ["finetune", "--model", str(model), "--task", "classify", "--train", train, "--out", out, *SIZES]
    assert main([*command, "--positive-class", "Neg"]) == 2
    assert "train.tsv: --positive-class: expected 'neg' or 'pos', got 'Neg'" in capsys.readouterr().err
    assert main([*command, "--positive-class", "neg", "--metric", "f1"]) == 0
    capsys.readouterr()
    assert "f1 (neg)" in (tmp_path / "out/README.md").read_text()

    def ask(command: str, *flags: str) -> tuple[int, str, str]:
        data = ["--data", train, "--json"] if command == "evaluate" else ["--input", train]
        status = main([command, "--model", out, *data, "--quiet", *flags])
        return status, *capsys.readouterr()

    assert json.loads(ask("evaluate")[1])["positive_class"] == "neg", "the model's"
    assert json.loads(ask("evaluate", "--positive-class", "pos")[1])["positive_class"] == "pos"
    for at, label in (("0", "neg"), ("1", "pos")):
        status, lines, said = ask("predict", "--threshold", at)
        assert status == 0 and {json.loads(line)["label"] for line in lines.splitlines()} == {label} and not said
    _, lines, _ = ask("predict", "--threshold", "0", "--positive-class", "pos")
    assert {json.loads(line)["label"] for line in lines.splitlines()} == {"pos"}
    assert "--positive-class: no effect without --threshold" in ask("predict", "--positive-class", "pos")[2]
    assert "--threshold: expected a probability from 0 to 1, got 2" in ask("predict", "--threshold", "2")[2]


def test_a_threshold_of_a_guessed_class_says_which_one_it_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, out = str(tiny_model.reviews(tmp_path / "train.tsv", 32)), str(tmp_path / "out")
    command = ["finetune", "--model", str(model), "--task", "classify", "--train", train, "--out", out, *SIZES]
    assert main(command) == 0
    capsys.readouterr()
    assert main(["predict", "--model", out, "--input", train, "--threshold", "0.2", "--quiet"]) == 0
    said = "--threshold 0.2 is for the class 'pos'; for 'neg', add --positive-class neg\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("task", ["regress", "multilabel", "qa"])
def test_other_tasks_have_no_positive_class(
    task: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", "--model", str(model), "--task", task, "--train", "x", "--out", str(tmp_path / "out")]
    assert main([*command, "--positive-class", "a"]) == 2
    assert f"--positive-class: no effect with {task}, only with classify" in capsys.readouterr().err
