"""Prediction: forms of input and output, order, constant memory, GLUE submissions, damaged task files."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import sys
import types

import numpy as np
import pytest
import tiny_model
import torch
from untrained_predictor import untrained

from electra_core import predict as module
from electra_core.downstream.choices import Choose
from electra_core.downstream.classify import Classify, Regress, softmax
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.named_tasks import find_task, write_submission
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag
from electra_core.downstream.task_files import save_task, task_from_json, task_to_json
from electra_core.errors import UserError
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.labelled import BadRows, TextExample
from electra_core.model_dir import load as load_model
from electra_core.model_dir import save_pretrained
from electra_core.packing import pack
from electra_core.predict import Predictor, evaluate, load, predict_file
from electra_core.tasks import SequenceClassifier
from electra_core.tokenizer import WordPieceTokenizer, load_tokenizer

LABELS = ("neg", "pos")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Predictor:
    return untrained(Classify(labels=LABELS, max_length=64), tmp_path_factory.mktemp("model"))


def test_predictions_are_the_softmax_of_the_models_logits(classifier):
    texts = ["a fine film", "the plot was awful and dull", "ann"]
    predictions = classifier(texts)
    tokenizer = classifier.tokenizer
    for text, prediction in zip(texts, predictions, strict=True):
        ids = [tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id]
        with torch.no_grad():
            scores = classifier.model(pack([ids])).softmax(-1)[0]
        assert list(prediction["scores"].values()) == pytest.approx(scores.tolist(), abs=1e-5)
        assert prediction["label"] == LABELS[int(scores.argmax())]
        assert prediction["score"] == max(prediction["scores"].values())
    assert len({prediction["score"] for prediction in predictions}) == 3


def test_order_and_results_do_not_depend_on_chunks_and_batches(classifier, monkeypatch):
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(tiny_model.WORDS, size=draw.integers(1, 40))) for _ in range(60)]
    whole = [prediction["score"] for prediction in classifier(texts)]
    monkeypatch.setattr(module, "CHUNK", 7)
    small = Predictor(classifier.model, classifier.task, classifier.tokenizer, tokens_per_batch=50)
    examples = [TextExample(str(n), n, text) for n, text in enumerate(texts)]
    streamed = [prediction["score"] for _, prediction in small.stream(examples)]
    assert streamed == pytest.approx(whole, abs=1e-5)


def test_a_stream_takes_no_more_than_a_chunk_ahead(classifier, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 5)
    taken = itertools.count()
    endless = (TextExample("", next(taken), "ann met bob") for _ in itertools.repeat(None))
    assert len(list(itertools.islice(classifier.stream(endless), 12))) == 12
    assert next(taken) == 15


def test_a_chunk_of_long_texts_has_fewer(classifier, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", 1000)
    taken = itertools.count()
    endless = (TextExample("", next(taken), "ann met bob " * 40) for _ in itertools.repeat(None))
    assert len(list(itertools.islice(classifier.stream(endless), 4))) == 4
    assert next(taken) == 4  # two chunks of two texts


def test_forms_of_input(classifier):
    single = classifier("ann")
    assert single == classifier(["ann"])[0] == classifier({"text": "ann"})
    pair = classifier([("ann", "bob")])[0]
    assert pair == classifier({"text": "ann", "pair": "bob"}) and pair["score"] != single["score"]
    for wrong in (3, ("ann", 3), ("ann", None), {"text": "ann", "pair": 3}, {"pair": "ann"}):
        with pytest.raises(ValueError, match="expected a text or a pair of texts, got "):
            classifier([wrong])
    for wrong in (None, 3, b"ann"):
        with pytest.raises(ValueError, match="inputs: expected a list of inputs or a single text, got "):
            classifier(wrong)


@pytest.mark.parametrize("empty", ["", "  ", {"text": ""}, ("ann", " "), {"text": "ann", "pair": ""}])
def test_an_empty_text_gets_no_class_whatever_it_comes_in(classifier, tmp_path, empty):
    with pytest.raises(ValueError, match=r"^inputs\[1\]: expected a text that is not empty, got "):
        classifier(["ok", empty])
    if not isinstance(empty, tuple):
        with pytest.raises(ValueError, match=r"^inputs: expected a text that is not empty, got "):
            classifier(empty)


def test_a_wrong_input_of_many_is_named_by_its_place(classifier):
    for wrong in (None, float("nan"), 3):
        with pytest.raises(ValueError, match=r"^inputs\[2\]: expected a text or a pair of texts, got "):
            classifier(["ann", "bob", wrong])
    with pytest.raises(ValueError, match=r"^inputs\[0\]: expected a question and context, none empty, got "):
        Predictor(classifier.model, Answer(), classifier.tokenizer)([("who?", " ")])
    with pytest.raises(ValueError, match=r"^inputs\[0\]: expected a text and endings, none empty, got "):
        Predictor(classifier.model, Choose(), classifier.tokenizer)([("ann", ["met", ""])])


def test_half_a_character_is_named_by_its_place(classifier):
    with pytest.raises(
        UserError, match=r"^inputs\[2\]: the text is not valid UTF-8 \(lone surrogate U\+D800 at character 3\)$"
    ):
        classifier(["ann", "bob", "a \ud800"])
    with pytest.raises(UserError, match=r"^inputs\[1\]: the text is not valid UTF-8"):
        classifier([("ann", "bob"), {"text": "ann", "pair": "\ud800"}])


def test_what_a_notebook_shows_of_a_model_and_its_figures_is_one_line(classifier, tmp_path):
    assert repr(classifier) == "Predictor(classify, 2 labels, 64 tokens, fp32 on cpu)"
    result = evaluate(classifier, tiny_model.reviews(tmp_path / "dev.tsv", 30))
    shown = f"Evaluation(classify, 30 examples, accuracy {result.metrics['accuracy']:.4g}, "
    assert repr(result).startswith(shown) and len(repr(result)) < 200


def test_files_in_and_out(classifier, tmp_path):
    rows = ["a fine film", "", "the plot, was awful"]
    files = {
        "a.txt": "\n".join(rows) + "\n",
        "a.jsonl": "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(rows) if text),
        "a.csv": "sentence\na fine film\n\"the plot, was awful\"\n",
    }  # fmt: skip
    expected = [prediction["score"] for prediction in classifier([rows[0], rows[2]])]
    ids = {"a.txt": ["1", "3"], "a.jsonl": ["0", "2"], "a.csv": ["2", "3"]}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        sink = io.StringIO()
        predict_file(classifier, tmp_path / name, sink)
        written = [json.loads(line) for line in sink.getvalue().splitlines()]
        assert [row["score"] for row in written] == pytest.approx(expected, abs=1e-5)
        assert [row["id"] for row in written] == ids[name]
    sink = io.StringIO()
    predict_file(classifier, tmp_path / "a.csv", sink, form="csv")
    table = list(csv.DictReader(io.StringIO(sink.getvalue())))
    assert list(table[0]) == ["id", "label", "score", "scores_neg", "scores_pos"]
    assert [float(row["score"]) for row in table] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("lines", ["a fine film\nann\n", '{"text": "a fine film"}\n{"text": "ann"}\n'])
def test_standard_input_holds_lines_or_json(classifier, monkeypatch, lines):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(lines.encode())))
    sink = io.StringIO()
    predict_file(classifier, "-", sink)
    scores = [json.loads(line)["score"] for line in sink.getvalue().splitlines()]
    assert scores == pytest.approx([p["score"] for p in classifier(["a fine film", "ann"])], abs=1e-5)


def test_an_empty_array_on_standard_input_is_no_text(classifier, monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b" []\n")))
    with pytest.raises(UserError, match="standard input: holds no rows"):
        predict_file(classifier, "-", io.StringIO())


def test_a_text_of_a_megabyte_is_cut_and_counted(classifier):
    before = classifier.truncated
    long, head = "the film was good " * 60_000, "the film was good " * 30
    assert classifier(long)["scores"] == pytest.approx(classifier(head)["scores"], abs=1e-5)
    assert classifier.truncated == before + 2


def test_raw_lines_are_tagged(tmp_path):
    tagger = untrained(Tag(labels=("O", "B-X", "I-X"), max_length=32), tmp_path / "model")
    (tmp_path / "a.txt").write_text("Ann met Bob.\n\nEve's plot\n")
    sink = io.StringIO()
    predict_file(tagger, tmp_path / "a.txt", sink)
    rows = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert [(row["id"], row["words"]) for row in rows] == [
        ("1", ["Ann", "met", "Bob", "."]),
        ("3", ["Eve's", "plot"]),
    ]


def test_bad_rows_are_named_after_the_good_ones_are_written(classifier, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "ann"}\n{"no": 1}\n{"text": "bob"}\n')
    sink = io.StringIO()
    with pytest.raises(UserError, match=r"a.jsonl:2: column 'text' is missing"):
        predict_file(classifier, file, sink)
    assert len(sink.getvalue().splitlines()) == 2
    assert predict_file(classifier, file, io.StringIO(), skip_bad_rows=True).count == 1


def test_what_cannot_be_predicted_opens_no_output(tmp_path):
    texts = untrained(Classify(labels=LABELS, max_length=64, pairs=False), tmp_path / "model")
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("sentence1,sentence2\na film,fine\n")
    opened = []
    with pytest.raises(UserError, match=r"pairs.csv:2: a pair of texts instead of a single text"):
        predict_file(texts, pairs, lambda: opened.append(io.StringIO()) or opened[-1])
    assert not opened
    bad = predict_file(texts, pairs, lambda: opened.append(io.StringIO()) or opened[-1], skip_bad_rows=True)
    assert bad.count == 1 and [sink.getvalue() for sink in opened] == [""]


@pytest.mark.parametrize("given", ["a folder", SequenceClassifier])
def test_evaluation_of_something_that_does_not_predict(given):
    with pytest.raises(
        ValueError, match=r"predictor: expected what predict\.load\(folder\) returns, got (str|type) "
    ):
        evaluate(given, [{"text": "a", "label": "b"}])


def test_evaluation_scores_its_own_predictions(classifier, tmp_path):
    file = tiny_model.reviews(tmp_path / "dev.tsv", 30)
    result = evaluate(classifier, file)
    right = [p["label"] == e.label for p, e in zip(result.predictions, result.examples, strict=True)]
    assert result.metrics["accuracy"] == pytest.approx(np.mean(right)) and len(right) == 30


def test_a_directory_of_another_library_needs_no_task_file(tmp_path):
    folder = tiny_model.make_model(tmp_path / "pretrained")
    with pytest.raises(UserError, match="ElectraForPreTraining is not fine-tuned"):
        load(folder)
    model = load_model(SequenceClassifier, folder, labels=("no", "yes", "maybe"))
    save_pretrained(model, tmp_path / "hub", tokenizer=load_tokenizer(folder))
    assert set(load(tmp_path / "hub")("ann")["scores"]) == {"no", "yes", "maybe"}
    one = load_model(SequenceClassifier, folder, labels=("LABEL_0",))
    save_pretrained(one, tmp_path / "one", tokenizer=load_tokenizer(folder))
    assert load(tmp_path / "one")("ann").keys() == {"value"}, "of one label there is nothing to choose: a number"
    (tmp_path / "hub/task.json").write_text('{"kind": "classify", "colour": 3}')
    with pytest.raises(UserError, match=r"task.json: not the description of a task"):
        load(tmp_path / "hub")
    for damaged in ('{"kind": "class', "[" * 100_000):
        (tmp_path / "hub/task.json").write_text(damaged)
        with pytest.raises(UserError, match=r"task.json: not valid JSON"):
            load(tmp_path / "hub")


# ---- offsets -------------------------------------------------------------------------------------------


def test_outputs_that_are_no_numbers_are_no_answers(classifier, tmp_path):
    """A class would be read from them all the same."""
    examples = tmp_path / "a.jsonl"
    examples.write_text('{"text": "a fine film", "label": "neg"}\n{"text": "ann", "label": "pos"}\n')
    logits = classifier.model.classifier.out_proj
    for lost in (math.nan, math.inf):
        before = logits.bias.clone()
        with torch.no_grad():
            logits.bias[1] = lost
        said = r"^the model's outputs for (1 of 1|2 of 2) sequences are not finite numbers; its weights"
        try:
            for ask in (lambda: classifier("ann"), lambda: evaluate(classifier, examples)):
                with pytest.raises(UserError, match=said):
                    ask()
        finally:
            with torch.no_grad():
                logits.bias.copy_(before)
    with torch.no_grad():
        logits.bias[1] = -math.inf  # a class that a task rules out
    try:
        assert classifier("ann")["scores"][classifier.task.labels[1]] == 0
    finally:
        with torch.no_grad():
            logits.bias.copy_(before)
    assert evaluate(classifier, examples).metrics


def test_softmax_of_large_logits():
    np.testing.assert_allclose(softmax(np.array([1000.0, 1000.0, -1000.0])), [0.5, 0.5, 0.0])


# ---- GLUE ----------------------------------------------------------------------------------------------


def test_glue_submissions(tmp_path):
    path = write_submission("RTE", [{"label": "entailment"}, {"label": "not_entailment"}], tmp_path)
    assert path.read_text() == "index\tprediction\n0\tentailment\n1\tnot_entailment\n" and path.name == "RTE.tsv"
    path = write_submission("sst2", [{"label": "positive"}, {"label": "negative"}], tmp_path)
    assert path.read_text() == "index\tprediction\n0\t1\n1\t0\n"
    path = write_submission("STS-B", [{"value": 3.14159}, {"value": 5.3}], tmp_path)
    assert path.read_text() == "index\tprediction\n0\t3.142\n1\t5.000\n"
    with pytest.raises(UserError, match=r"submission: expected one of .*, got 'squad'"):
        write_submission("squad", [], tmp_path)


def test_named_columns_read_files_without_labels(tmp_path):
    file = tmp_path / "test.tsv"
    file.write_text("index\tsentence\n0\tA sentence.\n")
    task = find_task("cola").task
    assert [e.text for e in task.read(file, BadRows(file), labelled=False)] == ["A sentence."]
    assert task.columns == Columns(("sentence", "4"), None, ("label", "2"))


# ---- task.json -----------------------------------------------------------------------------------------

DAMAGED_TASKS = {
    "no object": ([1], "expected a JSON object, got list"),
    "another kind": ({"kind": ["classify"]}, "kind: expected one of classify"),
    "another field": ({"colour": "red"}, "not the description of a task .*colour"),
    "another type": ({"max_length": "32"}, "max_length: expected a value like 128, got '32'"),
    "a truth as a number": ({"max_length": True}, "max_length: expected a value like 128, got True"),
    "a text as labels": ({"labels": "ab"}, r"labels: expected a value like \(\), got 'ab'"),
    "numbers as labels": ({"labels": [1, 2]}, "labels: expected strings"),
    "columns as a list": ({"columns": []}, "columns: expected a value like Columns"),
    "another truncation": ({"truncate": "middle"}, "not the description of a task .truncate: expected one of"),
    "a fraction as a column": (
        {"columns": {"text": 5.5}},
        "not the description of a task .text: expected a column",
    ),
    "a number as an encoding": ({"columns": {"encoding": 5}}, "columns: expected a value like Columns"),
    "lists of numbers": ({"label_names": [[1]]}, r"label_names: expected a value like \(\), got \(\(1,\),\)"),
    "texts as weights": ({"class_weights": ["x"]}, r"class_weights: expected a value like \(\)"),
    "no length": ({"max_length": 0}, "max_length: expected more than 0, got 0"),
    "too few labels": ({"labels": ["a"]}, "labels: expected 2 as the model has, got 1"),
    "longer than the model": ({"max_length": 65}, "max_length: expected 8 to 64, got 65"),
    "too short": ({"max_length": 2}, "max_length: expected 8 to 64, got 2"),
}


@pytest.mark.parametrize("changes, message", DAMAGED_TASKS.values(), ids=DAMAGED_TASKS)
def test_a_damaged_task_file_is_named(tmp_path, changes, message):
    made = untrained(Classify(labels=("a", "b"), max_length=32), tmp_path / "pretrained")
    save_pretrained(made.model, tmp_path / "model", tokenizer=made.tokenizer)
    save_task(made.task, tmp_path / "model")
    assert load(tmp_path / "model").task == made.task
    file = tmp_path / "model" / "task.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, **changes} if isinstance(changes, dict) else changes))
    with pytest.raises(UserError, match=f"task.json: {message}"):
        load(tmp_path / "model")


ODD_NUMBERS = {
    "stride 0": (Answer(), {"stride": 0}, "stride: expected more than 0, got 0"),
    "stride -1": (Answer(), {"stride": -1}, "stride: expected more than 0, got -1"),
    "threshold NaN": (
        Answer(),
        {"null_threshold": math.nan},
        "null_threshold: .*, got nan",
    ),
    "threshold inf": (
        Answer(),
        {"null_threshold": math.inf},
        "null_threshold: .*, got inf",
    ),
    "threshold huge": (
        Answer(),
        {"null_threshold": 10**400},
        "null_threshold: .*, got 1000",
    ),
    "scale 0": (Regress(scale=2.0), {"scale": 0}, "scale: expected more than 0, got 0"),
    "scale NaN": (Regress(scale=2.0), {"scale": math.nan}, "scale: expected a value like 0.0, got nan"),
    "offset inf": (Regress(scale=2.0), {"offset": -math.inf}, "offset: expected a value like 0.0, got -inf"),
}


@pytest.mark.parametrize("task, changes, message", ODD_NUMBERS.values(), ids=ODD_NUMBERS)
def test_numbers_that_a_task_cannot_use(task, changes, message):
    fields = json.loads(json.dumps(task_to_json(task)))
    assert task_from_json(fields, "task.json") == task
    with pytest.raises(UserError, match=f"task.json: {message}"):
        task_from_json({**fields, **changes}, "task.json")


EVERY_FIELD = [
    Classify(
        labels=("a", "b"), label_names=(("a", "A"),), class_weights=(1.0, 2.0), pairs=True, truncate="both",
        positive_class="a", threshold=0.25,
        columns=Columns(text=("t", "u"), label="l", header=True, encoding="cp1252"),
    ),
    MultiLabel(labels=("a",), columns=Columns(labels=("x", "y"), separator=";", quoting=False)),
    Regress(offset=-1.5, scale=3),
    Tag(labels=("O",)), Answer(null_threshold=-2), Choose(),
]  # fmt: skip


@pytest.mark.parametrize("task", EVERY_FIELD, ids=lambda task: task.kind)
def test_a_task_file_may_hold_whatever_a_task_does(task):
    assert task_from_json(json.loads(json.dumps(task_to_json(task))), "task.json") == task


def test_a_tokenizer_with_more_words_than_the_model_is_refused(tmp_path):
    made = untrained(Classify(labels=("a", "b"), max_length=32), tmp_path / "pretrained")
    more = WordPieceTokenizer.from_tokens([*made.tokenizer.tokens(range(made.tokenizer.vocab_size)), "zebra"])
    save_pretrained(made.model, tmp_path / "model", tokenizer=more)
    save_task(made.task, tmp_path / "model")
    with pytest.raises(UserError, match="model: vocabulary sizes differ: 87 in the tokenizer, 86 in the model"):
        load(tmp_path / "model")


def test_the_folder_of_an_exported_model_names_its_file(tmp_path):
    (tmp_path / "model.onnx").touch()
    (tmp_path / "task.json").touch()
    with pytest.raises(UserError, match=r"the folder of an exported model; give its file .*/model\.onnx$"):
        load(tmp_path)
