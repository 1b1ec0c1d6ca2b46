"""Texts with any number of labels: how they are learned, predicted, judged, and opened elsewhere."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from finetune_runs import QUICK, model, run  # noqa: F401
from multilabel_rows import examples, read, rows
from reading import write_lines

from electra_core import model_dir
from electra_core.cli import main
from electra_core.downstream.classify import Classify, Regress
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.task_files import save_task, task_to_json
from electra_core.errors import UserError
from electra_core.finetuning.folder import _differences
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.labelled import BadRows, MultiLabelExample, TextExample
from electra_core.metrics import multilabel_metrics, per_label_metrics
from electra_core.packing import from_padded
from electra_core.predict import Predictor, evaluate, load, predict_file
from electra_core.reports.task_report import make_report, to_json
from electra_core.tasks import SequenceClassifier, multilabel_loss
from electra_core.tokenizer import load_tokenizer

LABELS = ("calm", "loud", "odd")


# ---- the loss, and other libraries


def saved(model: Path, folder: Path, labels: tuple[str, ...] = LABELS) -> tuple[Path, SequenceClassifier]:
    """A model directory as fine-tuning writes it, and the model."""
    ours = model_dir.load(SequenceClassifier, model, labels=labels, seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        ours.classifier.out_proj.bias.normal_()
    task = MultiLabel(labels=labels, max_length=64)
    with task.as_saved(ours) as as_saved:
        model_dir.save_pretrained(ours, folder, tokenizer=load_tokenizer(model))
        save_task(as_saved, folder)
    assert not ours.multi_label
    return folder, ours


@pytest.mark.parametrize("labels", [LABELS, ("only",)], ids=len)
def test_transformers_computes_the_same_loss(model: Path, tmp_path: Path, labels: tuple[str, ...]) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    folder, ours = saved(model, tmp_path / "m", labels)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert theirs.config.problem_type == "multi_label_classification"
    assert tuple(theirs.config.id2label.values()) == labels
    ids = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9)[None] < torch.tensor([9, 4, 7, 2])[:, None]).long()
    marks = torch.randint(0, 2, (4, len(labels)), generator=torch.Generator().manual_seed(2))
    output = theirs(input_ids=ids * mask, attention_mask=mask, labels=marks.float())
    logits = ours(from_padded(ids * mask, mask, torch.zeros_like(ids)))
    torch.testing.assert_close(logits, output.logits, rtol=1e-5, atol=1e-5)
    loss = multilabel_loss(logits, marks.to(torch.uint8))
    torch.testing.assert_close(loss, output.loss, rtol=1e-5, atol=1e-6)
    for one in (loss, output.loss):
        one.backward()
    torch.testing.assert_close(
        ours.classifier.dense.weight.grad, theirs.classifier.dense.weight.grad, rtol=1e-4, atol=1e-6
    )


def test_a_directory_of_the_hub_predicts(model: Path, tmp_path: Path) -> None:
    folder, _ = saved(model, tmp_path / "m")
    with_task = load(folder)("the film is great")
    (folder / "task.json").unlink()
    predictor = load(folder)
    assert isinstance(predictor.task, MultiLabel) and predictor.task.labels == LABELS
    assert predictor("the film is great") == with_task and [*with_task["scores"]] == [*LABELS]


def test_what_is_said_of_the_problem_follows_the_task(model: Path, tmp_path: Path) -> None:
    folder, _ = saved(model, tmp_path / "m")
    again = model_dir.load(SequenceClassifier, folder)
    model_dir.save_pretrained(again, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["problem_type"] == "multi_label_classification"
    files = [tiny_model.reviews(tmp_path / "a.tsv", 16)] * 2
    run(folder, files, tmp_path / "classes", settings=replace(QUICK, epochs=1))
    assert "problem_type" not in json.loads((tmp_path / "classes/config.json").read_text())


# ---- predictions and figures


def pipeline(model: Path, threshold: float = 0.5) -> Predictor:
    made = model_dir.load(SequenceClassifier, model, labels=LABELS, seed=3)
    with torch.no_grad():
        made.classifier.out_proj.bias.copy_(torch.tensor([-1.0, 2.0, 1.0]))
    return Predictor(made, MultiLabel(labels=LABELS, threshold=threshold), load_tokenizer(model))


def test_labels_are_those_above_the_threshold_the_most_probable_first(model: Path) -> None:
    prediction = pipeline(model)("the film is great")
    assert prediction["labels"] == ["loud", "odd"] and [*prediction["scores"]] == [*LABELS]
    assert prediction["scores"]["loud"] > prediction["scores"]["odd"] > 0.5 > prediction["scores"]["calm"]
    assert pipeline(model, 0.0)("the film")["labels"] == ["loud", "odd", "calm"]
    assert pipeline(model, 1.0)("the film")["labels"] == []
    certain = MultiLabel(labels=("a", "b")).decode([], None, [np.array([[900.0, -900.0]], dtype=np.float32)])  # type: ignore[arg-type]
    assert certain == [{"labels": ["a"], "scores": {"a": 1.0, "b": 0.0}}]
    even = MultiLabel(labels=("a", "b")).decode([], None, [np.array([[0.0, -0.1]], dtype=np.float32)])  # type: ignore[arg-type]
    assert even[0]["labels"] == ["a"], "a probability that is the threshold is enough"


def test_a_csv_of_predictions_is_read_again(model: Path, tmp_path: Path) -> None:
    sink = io.StringIO()
    predict_file(pipeline(model), write_lines(tmp_path / "a.txt", "the film", "ann"), sink, form="csv")
    header, first, _ = csv.reader(io.StringIO(sink.getvalue()))
    assert header == ["id", "labels", "scores_calm", "scores_loud", "scores_odd"]
    assert first[1] == '["loud", "odd"]'
    file = tmp_path / "again.csv"
    file.write_text(sink.getvalue().replace("id,labels", "text,labels", 1))
    assert read(file) == [("loud", "odd")] * 2


def test_figures_are_scikit_learn_s() -> None:
    from sklearn import metrics

    draw = np.random.default_rng(0)
    truth, scores = draw.integers(0, 2, (40, 3)), draw.random((40, 3))
    truth[:, 1] *= draw.random(40) < 0.2
    predicted = (scores >= 0.5).astype(int)
    assert multilabel_metrics(truth, predicted, scores) == pytest.approx(
        {
            "mean_average_precision": metrics.average_precision_score(truth, scores, average="macro"),
            "micro_f1": metrics.f1_score(truth, predicted, average="micro"),
            "macro_f1": metrics.f1_score(truth, predicted, average="macro"),
            "subset_accuracy": metrics.accuracy_score(truth, predicted),
        }
    )
    # Of labels that never occur there is no average precision; nobody is blamed for one that is not predicted.
    rare = truth * [1, 0, 1]
    expected = metrics.average_precision_score(rare[:, [0, 2]], scores[:, [0, 2]], average="macro")
    assert multilabel_metrics(rare, predicted, scores)["mean_average_precision"] == pytest.approx(expected)
    assert set(multilabel_metrics(rare * 0, rare * 0, scores).values()) == {0.0, 1.0}
    lost = np.where(np.arange(3) == 1, np.nan, scores)  # a model that has diverged
    assert np.isnan(multilabel_metrics(truth, predicted, lost)["mean_average_precision"])
    assert np.isfinite(multilabel_metrics(rare, predicted, lost)["mean_average_precision"]), "it does not occur"


def test_a_single_label_is_no_two_classes() -> None:
    truth, predicted = np.array([[1], [0], [0], [1]]), np.array([[1], [1], [0], [0]])
    (row,) = per_label_metrics(truth, predicted, ["only"])
    assert row == {"label": "only", "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    figures = multilabel_metrics(truth, predicted, truth * 0.5)
    assert figures == {
        "mean_average_precision": 1.0, "micro_f1": 0.5, "macro_f1": 0.5, "subset_accuracy": 0.5
    }  # fmt: skip


def test_the_report(model: Path) -> None:
    made = examples(("loud", "odd"), ("calm",), ())
    predictions = [
        {"labels": ["loud", "odd"], "scores": {"calm": 0.1, "loud": 0.9, "odd": 0.6}},
        {"labels": ["loud", "calm"], "scores": {"calm": 0.7, "loud": 0.95, "odd": 0.2}},
        {"labels": ["odd"], "scores": {"calm": 0.1, "loud": 0.3, "odd": 0.6}},
    ]
    task = MultiLabel(labels=LABELS)
    from electra_core.predict import Evaluation

    found = to_json(make_report(Evaluation(task, task.score(made, predictions), made, predictions, BadRows("x"))))
    assert [(row["label"], row["recall"], row["support"]) for row in found["per_label"]] == [
        ("calm", 1.0, 1), ("loud", 1.0, 1), ("odd", 1.0, 1)
    ]  # fmt: skip
    assert [(row["line"], row["missing"], row["too many"]) for row in found["worst_mistakes"]] == [
        (3, "", "loud"), (4, "", "odd")
    ]  # fmt: skip
    assert [row["average_precision"] for row in found["per_label"]] == [1.0, 0.5, 0.5]
    assert found["thresholds"][9] == {"threshold": 0.7, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}
    assert sum(row["count"] for row in found["calibration"]) == 9
    assert found["constant_guess"]["subset_accuracy"] == pytest.approx(1 / 3)


def test_the_report_at_another_threshold() -> None:
    """Mistakes are those of the threshold; how far probabilities can be trusted does not depend on it."""
    from electra_core.predict import Evaluation

    task, made = MultiLabel(labels=("a", "b"), threshold=0.9), examples(("a",))
    predictions = [{"labels": [], "scores": {"a": 0.7, "b": 0.8}}]
    found = to_json(make_report(Evaluation(task, task.score(made, predictions), made, predictions, BadRows("x"))))
    (mistake,) = found["worst_mistakes"]
    assert (mistake["missing"], mistake["too many"]) == ("a", "") and mistake["off by"] == pytest.approx(0.3)
    assert [(row["confidence"], row["accuracy"]) for row in found["calibration"]] == [(0.7, 1.0), (0.8, 0.0)]


# ---- from the command line, and from memory


def test_the_three_commands(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = tiny_model.several_labels(tmp_path / "train.jsonl", 60)
    read_rows = [json.loads(line) for line in train.read_text().splitlines()]
    names = ("praise", "blame", "person")
    table = write_lines(
        tmp_path / "train.csv", "comment_text,praise,blame,person",
        *(",".join([row["text"], *(str(int(name in row["labels"])) for name in names)]) for row in read_rows),
    )  # fmt: skip
    flags = ["--text-column", "comment_text", "--label-columns", *names, "--device", "cpu", "--quiet"]
    out = tmp_path / "out"
    command = ["finetune", "--model", str(model), "--task", "multilabel", "--train", str(table), "--out", str(out)]
    assert main([*command, "--epochs", "1", "--cache", "none", *flags]) == 0
    assert json.loads((out / "task.json").read_text())["labels"] == [*names]
    capsys.readouterr()
    evaluated = []
    for data, threshold in ((table, "0"), (table, "1"), (train, "0")):
        more = ["--label-column", "labels", "--text-column", "text"] if data == train else []
        ask = ["evaluate", "--model", str(out), "--data", str(data), "--threshold", threshold, "--json", *more]
        assert main([*ask, "--quiet"]) == 0
        evaluated.append(json.loads(capsys.readouterr().out))
    all_of_them, none, other_form = evaluated
    assert all_of_them == pytest.approx(other_form) and none["micro_f1"] == 0 < all_of_them["micro_f1"]
    assert none["mean_average_precision"] == all_of_them["mean_average_precision"] > 0
    ask = ["predict", "--model", str(out), "--input", str(table), "--threshold", "0", "--quiet"]
    assert main(ask) == 0
    assert {*json.loads(capsys.readouterr().out.splitlines()[0])["labels"]} == {*names}


def test_flags_that_do_not_fit(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = rows(tmp_path / "a.jsonl", [["a"]])
    command = ["finetune", "--model", str(model), "--task", "multilabel", "--train", str(file), "--out", "x"]
    for flags, said in (
        (
            ["--label-column", "a", "--label-columns", "b"],
            "--label-column, --label-columns: give one of them, not both",
        ),
        (["--label-columns", "a", "--label-separator", ";"], "--label-separator: no effect with --label-columns"),
        (["--label-separator", ""], "--label-separator: expected at least one character"),
    ):
        assert main([*command, *flags]) == 2 and said in capsys.readouterr().err
    folder, _ = saved(model, tmp_path / "m")
    ask = ["evaluate", "--model", str(folder), "--data", str(file), "--threshold", "1.5"]
    assert main(ask) == 2 and "--threshold: expected a probability from 0 to 1, got 1.5" in capsys.readouterr().err
    save_task(Regress(labels=LABELS, scale=1.0, max_length=64), folder)
    assert main(ask) == 2
    assert (
        "--threshold: no effect with a model for regress, only with one for two classes, multilabel or qa"
        in capsys.readouterr().err
    )


def test_rows_in_memory(model: Path, tmp_path: Path) -> None:
    file = tiny_model.several_labels(tmp_path / "train.jsonl", 40)
    data = [json.loads(line) for line in file.read_text().splitlines()]
    kinds = (list, tuple, np.array)
    data = [{**row, "labels": kinds[n % 3](row["labels"])} for n, row in enumerate(data)]
    run(model, (data, data), tmp_path / "out", MultiLabel(), replace(QUICK, epochs=1))
    assert evaluate(load(tmp_path / "out"), data).metrics == pytest.approx(
        evaluate(load(tmp_path / "out"), file).metrics
    )
    bad = [{"text": "a", "toxic": 1}, {"text": "b", "toxic": "yes"}]
    with pytest.raises(
        UserError, match=r"no label column 'threat'; .*name those of 0 and 1 with Columns\(labels=...\)"
    ):
        run(model, (bad, bad), tmp_path / "x", MultiLabel(columns=Columns(labels=("toxic", "threat"))))
    with pytest.raises(UserError, match=r"\(for several labels per text: MultiLabel\(\)\)"):
        run(model, ([{"text": "a", "label": ["x"]}],) * 2, tmp_path / "x", Classify())


def test_columns_of_an_earlier_version_are_the_same_ones() -> None:
    """A checkpoint that does not know of labels in columns of their own is gone on with."""
    now = {"task": json.loads(json.dumps(task_to_json(Classify(columns=Columns(text="a")))))}
    columns = {key: value for key, value in now["task"]["columns"].items() if key not in ("labels", "separator")}
    was = {"task": {**now["task"], "columns": columns}}
    assert _differences(was, now) == ""
    assert "columns was" in _differences({"task": {**was["task"], "columns": {**columns, "text": "b"}}}, now)


def test_pairs_and_texts_without_labels(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", '{"text": "a", "pair": "b"}')
    (example,) = MultiLabel(labels=LABELS).read(file, BadRows(file), labelled=False)
    assert isinstance(example, MultiLabelExample) and (example.pair, example.labels) == ("b", None)
    features = MultiLabel(labels=LABELS).encode([example], load_tokenizer(model))
    assert not features.has_targets
    single: TextExample = MultiLabel(labels=LABELS).from_value("a", "1")
    assert single.pair is None
