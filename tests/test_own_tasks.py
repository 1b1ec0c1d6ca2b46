"""Tasks that users write: registered, they train, are loaded, evaluated and reported as ours are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tiny_model import make_model, reviews

import electra_core
from electra_core import Classify, FinetuneSettings, SequenceClassifier, UserError, cli, register_task
from electra_core.conversion.onnx_export import export
from electra_core.downstream.choices import ChoiceExample, Choose
from electra_core.downstream.classify import Regress, softmax
from electra_core.downstream.interface import Task
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.named_tasks import choose_task
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag
from electra_core.downstream.task_files import KINDS, task_from_json, task_to_json
from electra_core.finetune import finetune
from electra_core.labelled_data.labelled import MultiLabelExample, TextExample
from electra_core.labelled_data.squad_files import QuestionExample
from electra_core.labelled_data.tagged_files import TaggedExample, from_text
from electra_core.metrics import OF_SCORES
from electra_core.model_dir import load_config
from electra_core.predict import Predictor, evaluate, load
from electra_core.reports.task_report import make_report, to_html, to_text
from electra_core.tokenizer import load_tokenizer


class Flipped(SequenceClassifier):
    def forward(self, batch: Any, seed: Any = None) -> torch.Tensor:
        return -super().forward(batch, seed)


@dataclass(frozen=True)
class Sure(Classify):
    """Predicts a label without a score."""

    kind: ClassVar[str] = "sure"
    model_class: ClassVar[Any] = Flipped
    sure: float = 2.0

    def decode(self, examples: Any, features: Any, outputs: Any) -> list[dict[str, Any]]:
        return [{"label": self.labels[int(np.argmax(row[0]))]} for row in outputs]

    def constant_guess(self, examples: Any) -> tuple[str, list[dict[str, Any]]] | None:
        return super().constant_guess(examples)


@dataclass(frozen=True)
class Alone(Sure):
    """With nothing to compare it with."""

    kind: ClassVar[str] = "alone"

    def constant_guess(self, examples: Any) -> None:
        return None


@pytest.fixture(autouse=True)
def only_ours() -> Iterator[None]:
    """Takes back what a test registers."""
    before = dict(KINDS)
    yield
    KINDS.clear()
    KINDS.update(before)


def trained(task: Classify, folder: Path, **options: Any) -> dict[str, Any]:
    make_model(folder / "model")
    reviews(folder / "train.tsv", 24)
    settings = FinetuneSettings(epochs=1, batch_size=8, max_length=16)
    files = folder / "train.tsv", folder / "train.tsv"
    return finetune(folder / "model", task, *files, folder / "out", settings, quiet=True, **options)


@pytest.mark.parametrize("kind", [Sure, Alone])
def test_a_registered_task_is_one_of_ours(
    kind: type[Sure], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert register_task(kind) is kind and register_task(kind) is kind
    report = trained(kind(sure=3.0), tmp_path)
    assert report["task"] == kind.kind and "accuracy" in report["best"]
    predictor = load(tmp_path / "out")
    assert type(predictor.task) is kind and predictor.task.sure == 3.0 and type(predictor.model) is Flipped
    assert predictor("a fine film")["label"] in ("neg", "pos")
    evaluation = evaluate(predictor, tmp_path / "train.tsv")
    assert evaluation.metrics["accuracy"] == pytest.approx(report["best"]["accuracy"])
    assert type(choose_task(kind.kind)[0]) is kind
    files = "--model", str(tmp_path / "out"), "--data", str(tmp_path / "train.tsv")
    assert cli.main(["evaluate", *files, "--report", str(tmp_path / "report.json"), "--quiet"]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["metrics"]["accuracy"] == pytest.approx(report["best"]["accuracy"])
    assert found["constant_guess"].get("accuracy") == (0.5 if kind is Sure else None)
    for shown in (to_text(make_report(evaluation)), to_html(make_report(evaluation))):
        assert "accuracy" in shown and ("constant guess" in shown) == (kind is Sure)


class Probabilities:
    """What `decode` gives under a name of one's own, and a figure of it."""

    labels: tuple[str, ...]

    @property
    def figures(self) -> tuple[str, ...]:
        return ("right",)

    def decode(self, examples: Any, features: Any, outputs: Any) -> list[dict[str, Any]]:
        return [{"label": self.labels[0], "p": dict(zip(self.labels, softmax(row[0])))} for row in outputs]

    def score(self, examples: Any, predictions: Any) -> dict[str, float]:
        return {"right": float(np.mean([p["p"][e.label] for e, p in zip(examples, predictions)]))}


@dataclass(frozen=True)
class Brier(Probabilities, Classify):
    kind: ClassVar[str] = "brier"
    metric: str = "right"


@dataclass(frozen=True)
class OfScores(Classify):
    """Another figure of what `Classify.decode` gives."""

    kind: ClassVar[str] = "of-scores"
    metric: str = "right"
    figures = Probabilities.figures  # type: ignore[assignment]

    def score(self, examples: Any, predictions: Any) -> dict[str, float]:
        assert all(p["score"] == p["scores"][p["label"]] == max(p["scores"].values()) for p in predictions)
        return {"right": float(np.mean([p["scores"][e.label] for e, p in zip(examples, predictions)]))}


@pytest.mark.parametrize("kind", [Brier, OfScores])
def test_figures_of_more_than_the_label(kind: type[Classify], tmp_path: Path) -> None:
    """A constant guess of another form than the predictions ended in a KeyError after the training."""
    assert 0 < trained(register_task(kind)(), tmp_path)["best"]["right"] < 1
    report = make_report(evaluate(load(tmp_path / "out"), tmp_path / "train.tsv"))
    assert report.baseline == ({} if kind is Brier else pytest.approx({"right": 0.5}))
    assert "right" in to_text(report)


EXAMPLES: dict[str, tuple[Task, list[Any]]] = {
    "a class": (Classify(labels=("x", "y")), [TextExample("1", 1, "a film", None, "y")]),
    "labels": (MultiLabel(labels=("x", "y")), [MultiLabelExample("1", 1, "a film", None, None, ("y",))]),
    "a number": (Regress(scale=1.0), [TextExample("1", 1, "a film", None, "2")]),
    "spans": (Tag(labels=("O", "B-X", "I-X")), [replace(from_text("a film, fine"), tags=("O", "B-X", "O", "O"))]),
    "tags": (Tag(labels=("DT", "NN", "JJ")), [TaggedExample("1", 1, ("a", "film"), ("DT", "NN"))]),
    "an answer": (Answer(), [QuestionExample("1", "1", "who?", "ann met bob", (("ann", 0),))]),
    "perhaps no answer": (Answer(unanswerable=True), [QuestionExample("1", "1", "who?", "ann met bob", ())]),
    "a choice": (
        Choose(),
        [ChoiceExample(str(n), n, "a", ("film", "plot", "actor")[:n], n - 1) for n in (3, 3, 2)],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_constant_guess_has_the_form_of_a_prediction(name: str, tmp_path: Path) -> None:
    """A class of the user's own may score whatever `decode` gives."""
    task, examples = EXAMPLES[name]
    tokenizer = load_tokenizer(make_model(tmp_path))
    model = task.model_class(load_config(tmp_path)[0], task.labels)
    predictor = Predictor(model, task, tokenizer)
    guess = task.constant_guess(examples)
    assert guess is not None
    for prediction, guessed in zip(predictor.predict(examples), guess[1], strict=True):
        assert {key: type(value) for key, value in guessed.items()} == {
            key: type(value) for key, value in prediction.items()
        }
        assert all(guessed.get(key) == prediction.get(key) for key in ("id", "words"))


def test_a_guessed_choice_is_one_that_the_question_has() -> None:
    task, examples = EXAMPLES["a choice"]
    guess = task.constant_guess(examples)
    assert guess is not None
    chosen = [(p["choice"], p["text"], p["scores"]) for p in guess[1]]
    assert chosen[0] == chosen[1] == (2, "actor", [0, pytest.approx(1 / 3), pytest.approx(2 / 3)])
    assert chosen[2] == (1, "plot", [0, pytest.approx(1 / 3)])


def test_a_metric_that_is_no_figure_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^metric: expected one of accuracy, .*, got 'kappa'$"):
        trained(Classify(metric="kappa"), tmp_path)
    assert not (tmp_path / "out").exists(), "it is known before training"


def test_a_figure_that_its_labels_cannot_have_is_named_before_training(tmp_path: Path) -> None:
    for metric in (*OF_SCORES, "f1", "acc_and_f1"):
        hint = f"{metric} is a figure of two classes, not of 3"
        with pytest.raises(UserError, match=f"^metric: expected .* mcc, macro_f1, got '{metric}'; {hint}$"):
            trained(Classify(metric=metric, labels=("neg", "pos", "so-so")), tmp_path)
    assert not (tmp_path / "out").exists()


@dataclass(frozen=True)
class Halved(Classify):
    """Has a figure that `figures`, which is inherited, does not name."""

    kind: ClassVar[str] = "halved"
    metric: str = "half"

    def score(self, examples: Any, predictions: Any) -> dict[str, float]:
        figures = super().score(examples, predictions)
        return figures | {"half": figures["accuracy"] / 2}


def test_a_task_need_not_list_its_own_figure(tmp_path: Path) -> None:
    assert 0 < trained(register_task(Halved)(), tmp_path)["best"]["half"] <= 0.5


class OneScore(SequenceClassifier):
    """With fewer outputs than labels."""

    def __init__(self, config: Any, labels: Any = ("0", "1"), **more: Any) -> None:
        super().__init__(config, labels, **more)
        self.classifier.out_proj = torch.nn.Linear(config.hidden_size, 1)
        self.thresholds = torch.nn.Parameter(torch.zeros(len(self.labels) - 1))

    def forward(self, batch: Any, seed: Any = None) -> torch.Tensor:
        score_N1 = super().forward(batch, seed) - self.thresholds
        return torch.cat((-score_N1, score_N1), dim=1)


@dataclass(frozen=True)
class Scored(Sure):
    kind: ClassVar[str] = "scored"
    model_class: ClassVar[Any] = OneScore


def test_a_head_of_another_form_is_new_where_a_classifier_s_would_be_kept(tmp_path: Path) -> None:
    trained(Classify(), tmp_path)
    register_task(Scored)
    files, settings = (tmp_path / "train.tsv",) * 2, FinetuneSettings(epochs=1, batch_size=8, max_length=16)
    said: list[str] = []
    for model, out in (("out", "scored"), ("scored", "again")):
        finetune(tmp_path / model, Scored(), *files, tmp_path / out, settings, quiet=True, say=said.append)
    assert load(tmp_path / "again").model.thresholds.shape == (1,) and not any("head is" in line for line in said)


def test_training_says_at_once_that_a_task_is_not_registered(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task: Sure is not registered, .*@register_task above the class"):
        trained(Sure(), tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_kind_that_is_another_task_s_is_refused(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Nameless(Classify):
        pass

    owner = r"electra_core\.downstream\.classify\.Classify"
    with pytest.raises(
        ValueError, match=rf"Nameless\.kind: expected a name of its own, got 'classify', {owner}'s"
    ):
        register_task(Nameless)
    with pytest.raises(ValueError, match="task: Nameless is not registered"):
        trained(Nameless(), tmp_path)


@pytest.mark.parametrize("kind", [SequenceClassifier, "sure", type("Bare", (Classify,), {"kind": "bare"})])
def test_what_is_no_task_is_refused(kind: Any) -> None:
    with pytest.raises(
        ValueError, match=r"kind: expected a class derived from Task, with @dataclass\(frozen=True\)"
    ):
        register_task(kind)


def test_a_name_in_upper_case_could_not_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sure, "kind", "Sure")
    with pytest.raises(ValueError, match=r"Sure\.kind: expected a name in lower case, got 'Sure'"):
        register_task(Sure)


def test_a_class_defined_again_replaces_itself() -> None:
    def define() -> Any:
        @register_task
        @dataclass(frozen=True)
        class Mine(Classify):
            kind: ClassVar[str] = "mine"

        return Mine

    first, second = define(), define()
    assert KINDS["mine"] is second is not first
    assert type(task_from_json(task_to_json(first()), "task.json")) is second


def test_a_task_with_another_threshold_may_have_none() -> None:
    @register_task
    @dataclass(frozen=True)
    class Strict(Classify):
        kind: ClassVar[str] = "strict"
        threshold: float | None = 0.9

    for task in (Strict(labels=("a", "b")), Strict(labels=("a", "b"), threshold=None)):
        assert task_from_json(task_to_json(task), "task.json") == task


def test_a_folder_of_a_task_that_is_not_registered_here(tmp_path: Path) -> None:
    register_task(Sure)
    trained(Sure(), tmp_path)
    del KINDS["sure"]
    with pytest.raises(UserError, match=r"task\.json: kind: expected one of .*, got 'sure'; .*@register_task"):
        load(tmp_path / "out")


def test_a_registered_task_does_not_claim_folders_of_the_hub(tmp_path: Path) -> None:
    @register_task
    @dataclass(frozen=True)
    class Bare(Classify):
        kind: ClassVar[str] = "bare-encoder"
        model_class: ClassVar[Any] = type("Plain", (Flipped,), {"architecture": "ElectraForPreTraining"})

    make_model(tmp_path / "model")
    with pytest.raises(UserError, match="ElectraForPreTraining is not fine-tuned for a task"):
        load(tmp_path / "model")


def test_export_names_the_model_s_class(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    register_task(Sure)
    trained(Sure(), tmp_path)
    with pytest.raises(UserError, match="only this package's classes can be exported, got Flipped"):
        export(tmp_path / "out", tmp_path / "x.onnx")


def test_the_name_is_public() -> None:
    assert electra_core.register_task is register_task and "register_task" in electra_core.__all__
