"""Models without task.json, as most of the Hub's: the task and its labels as config.json gives them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
import torch
from finetune_runs import QUICK, changed
from reading import write

from electra_core.cli import main
from electra_core.downstream.classify import Classify, Regress
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.tagging import Tag, as_iob
from electra_core.errors import UserError
from electra_core.finetune import finetune
from electra_core.finetuning.kept_head import old_head
from electra_core.initialisation import initialise
from electra_core.model_dir import load_config, save_pretrained
from electra_core.predict import evaluate, load
from electra_core.tasks import MultipleChoice, QuestionAnswerer, SequenceClassifier, TokenClassifier


def stranger(folder: Path, kind, labels=(), problem_type: str | None = None, **sizes) -> Path:
    """A folder as of the Hub: a model with random weights and its tokenizer, no task.json."""
    config = replace(load_config(tiny_model.make_model(folder))[0], **sizes)
    made = kind(config, tuple(f"label {i}" for i in range(len(labels))))
    initialise(made, 0.5, seed=3)
    save_pretrained(made, folder)
    if labels:
        changed(folder, id2label=dict(enumerate(labels)), label2id=None, problem_type=problem_type)
    return folder


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- what config.json says


def test_several_numbers_are_refused(tmp_path):
    folder = stranger(tmp_path, SequenceClassifier, ("valence", "arousal", "dominance"), "regression")
    with pytest.raises(UserError, match=r'config\.json: problem_type "regression" with 3 outputs; only one'):
        load(folder)
    assert old_head(Classify(labels=("valence", "arousal", "dominance")), folder) is None


@pytest.mark.parametrize("problem_type", [None, "regression"])
def test_one_output_is_a_number_and_what_others_make_of_it_is_said(problem_type, tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    folder = stranger(tmp_path, SequenceClassifier, ("value",), problem_type)
    value = load(folder, precision="fp32")("the film was fine")["value"]
    lines = said(caplog)
    pipeline = transformers.pipeline("text-classification", model=str(folder), tokenizer=str(folder))
    theirs = pipeline("the film was fine")[0]["score"]
    if problem_type:
        assert not lines and theirs == pytest.approx(value, abs=1e-5)
    else:
        (line,) = lines
        assert "its value is given as it is; the pipelines of transformers apply a sigmoid" in line
        assert theirs == pytest.approx(torch.tensor(value).sigmoid().item(), abs=1e-5)


@pytest.mark.parametrize(
    "labels, tags",
    [
        (("O", "PER-B", "PER-I"), ("O", "B-PER", "I-PER")),
        (("o", "b-per", "i-per"), ("O", "B-per", "I-per")),
        (("O", "B_PER", "I_PER"), ("O", "B-PER", "I-PER")),
        (("I-LOC", "I-PER", "B-LOC", "O"), ("I-LOC", "I-PER", "B-LOC", "O")),
        (("B", "i", "O"), ("B", "I", "O")),
        (("[PAD]", "O", "B-PER"), ("[PAD]", "O", "B-PER")),
        (("NOUN", "x"), ("NOUN", "x")),
        (("O", "B-PER", "b-PER"), ("O", "B-PER", "b-PER")),
    ],
)
def test_labels_of_spans_are_read_as_a_file_s_tags(labels, tags):
    assert as_iob(labels) == tags


def test_span_labels_keep_their_outputs_in_fine_tuning(tmp_path):
    folder = stranger(tmp_path, TokenClassifier, ("PER-I", "O", "PER-B"))
    old = old_head(Tag(labels=("O", "B-PER", "I-PER")), folder)
    assert old is not None and old.rows == (1, 2, 0)


@pytest.mark.parametrize("kind", [QuestionAnswerer, MultipleChoice])
def test_a_model_of_single_texts_takes_no_others(kind, tmp_path, capsys):
    folder = stranger(tmp_path / "model", kind, type_vocab_size=1)
    with pytest.raises(UserError, match=r"the model reads single texts only \(type_vocab_size is 1"):
        load(folder)
    file = tiny_model.questions(tmp_path / "q.json", 4)
    train = file if kind is QuestionAnswerer else tiny_model.choices(tmp_path / "c.jsonl", 4)
    task = "qa" if kind is QuestionAnswerer else "choose"
    command = ["finetune", "--model", str(folder), "--task", task, "--train", str(train), "--cache", "none"]
    assert main([*command, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "single texts only" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_pairs_for_a_model_of_single_texts(tmp_path):
    classify = load(stranger(tmp_path / "model", SequenceClassifier, ("a", "b"), type_vocab_size=1))
    assert classify("the film")["label"] in ("a", "b")
    with pytest.raises(UserError, match="inputs: the model reads single texts only"):
        classify([("the film", "the plot")])
    rows = [{"sentence1": "the film", "sentence2": "the plot", "label": "ab"[i % 2]} for i in range(20)]
    with pytest.raises(UserError, match="model: the model reads single texts only"):
        finetune(tmp_path / "model", Classify(), rows, rows, tmp_path / "out", QUICK)


# ---- labels that are called differently in the data


def texts(path: Path, *labels: object) -> Path:
    rows = [
        {"text": f"the film was {word}", "label": label} for word, label in zip(("fine", "dull", "bad"), labels)
    ]
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "known, given, expected, told",
    [
        (("LABEL_0", "LABEL_1"), (0, 1, 1), ("LABEL_0", "LABEL_1", "LABEL_1"),
         "'0' is 'LABEL_0', '1' is 'LABEL_1'"),
        (("LABEL_0", "LABEL_1"), ("1.0", "1.0", "0.0"), ("LABEL_1", "LABEL_1", "LABEL_0"),
         "'0' is 'LABEL_0', '1' is 'LABEL_1'"),
        (("NEG", "POS"), ("pos", "neg", "pos"), ("POS", "NEG", "POS"), "'neg' is 'NEG', 'pos' is 'POS'"),
        ((0, 1), (0, 1.0, "true"), ("0", "1", "1"), "'true' is '1'"),
        (("neg", "pos"), ("pos", "neg", "pos"), ("pos", "neg", "pos"), ""),
    ],
)  # fmt: skip
def test_classes_are_matched_by_name(known, given, expected, told, tmp_path, caplog):
    model = load(stranger(tmp_path / "model", SequenceClassifier, known))
    result = evaluate(model, file := texts(tmp_path / "dev.jsonl", *given))
    assert tuple(example.label for example in result.examples) == expected
    right = [e.label == p["label"] for e, p in zip(result.examples, result.predictions)]
    assert result.metrics["accuracy"] == pytest.approx(sum(right) / 3)
    assert said(caplog) == ([f"{file}: labels matched with the model's: {told}"] if told else [])


def test_classes_of_other_names_are_still_refused(tmp_path):
    model = load(stranger(tmp_path / "model", SequenceClassifier, ("NEGATIVE", "POSITIVE")))
    with pytest.raises(UserError) as caught:
        evaluate(model, texts(tmp_path / "dev.jsonl", 0, 1, "positive"))
    message = str(caught.value)
    assert "dev.jsonl:1: the label is not one of the model's ('0'; known: NEGATIVE, POSITIVE)" in message
    assert "and 1 more bad row" in message and "id2label" not in message, "the other label matched"
    skipped = evaluate(model, texts(tmp_path / "dev.jsonl", 0, 1, "positive"), skip_bad_rows=True)
    assert len(skipped.examples) == 1 and skipped.skipped.count == 2
    with pytest.raises(UserError, match=r"all 3 rows are bad.*; write .* into id2label in the model's config"):
        evaluate(model, texts(tmp_path / "dev.jsonl", 0, 1, 1))
    with pytest.raises(UserError, match=r"no usable row \(.*dev.jsonl:1: the label is not"):
        evaluate(model, texts(tmp_path / "dev.jsonl", 0, 1, 1), skip_bad_rows=True)


def test_a_row_with_another_number_does_not_keep_the_others_from_matching(tmp_path):
    model = load(stranger(tmp_path / "model", SequenceClassifier, ("LABEL_0", "LABEL_1")))
    result = evaluate(model, texts(tmp_path / "dev.jsonl", 0, 1, -1), skip_bad_rows=True)
    assert [example.label for example in result.examples] == ["LABEL_0", "LABEL_1"] and result.skipped.count == 1
    with pytest.raises(UserError, match=r"the label is not one of the model's \('-1'"):
        evaluate(model, texts(tmp_path / "dev.jsonl", 0, 1, -1))
    with pytest.raises(UserError, match="all 2 rows are bad"):
        evaluate(model, texts(tmp_path / "one.jsonl", 1, 1))


def test_several_labels_are_matched_too(tmp_path, caplog):
    model = load(
        stranger(tmp_path / "model", SequenceClassifier, ("TOXIC", "LABEL_1"), "multi_label_classification")
    )
    assert isinstance(model.task, MultiLabel)
    rows = [{"text": "the film", "labels": ["toxic", "LABEL_1"]}, {"text": "the plot", "labels": []}]
    result = evaluate(model, rows)
    assert [example.labels for example in result.examples] == [("TOXIC", "LABEL_1"), ()]
    assert said(caplog) == ["data.jsonl: labels matched with the model's: 'toxic' is 'TOXIC'"]


def test_label_columns_have_to_be_the_models(tmp_path, capsys):
    folder = stranger(tmp_path / "model", SequenceClassifier, ("TOXIC", "RUDE"), "multi_label_classification")
    data = write(tmp_path / "a.csv", "text,toxic,rude\nthe film,1,0\nthe plot,0,0\n")
    command = ["evaluate", "--model", str(folder), "--data", str(data), "--json", "--label-columns"]
    assert main([*command, "toxic", "rude"]) == 0
    capsys.readouterr()
    assert main([*command, "toxic"]) == 2
    assert "expected one column per label of the model (TOXIC, RUDE), got toxic" in capsys.readouterr().err


CONLL = {
    "iob1": "John I-PER\nmet O\nLondon I-LOC\n",
    "iob2": "John B-PER\nmet O\nLondon B-LOC\n",
    "type first": "John PER-B\nmet O\nLondon LOC-B\n",
    "lower": "John b-per\nmet o\nLondon b-loc\n",
}


@pytest.mark.parametrize("form", CONLL)
@pytest.mark.parametrize(
    "labels",
    [
        ("B-LOC", "I-LOC", "I-PER", "O"),
        ("O", "PER-B", "PER-I", "LOC-B", "LOC-I"),
        ("o", "b-per", "i-per", "b-loc", "i-loc"),
    ],
    ids=str,
)
def test_spans_are_compared_by_their_types(labels, form, tmp_path):
    """A model of IOB1 labels has no B-PER: after to_iob2 its spans begin with one all the same."""
    model = load(stranger(tmp_path / "model", TokenClassifier, labels))
    result = evaluate(model, write(tmp_path / "a.conll", CONLL[form]))
    (example,) = result.examples
    per, loc = ("per", "loc") if "o" in labels else ("PER", "LOC")
    assert example.tags == (f"B-{per}", "O", f"B-{loc}") and "f1" in result.metrics
    perfect = [{"text": "John met London", "tags": list(example.tags)}]
    assert model.task.score(result.examples, perfect)["f1"] == 1
    with pytest.raises(UserError, match="the label is not one of the model's"):
        evaluate(model, write(tmp_path / "b.conll", CONLL[form] + "\nEU B-ORG\nrejects O\n"))


def test_tags_that_are_no_spans(tmp_path):
    model = load(stranger(tmp_path / "model", TokenClassifier, ("NOUN", "VERB")))
    result = evaluate(model, write(tmp_path / "a.conll", "John noun\nmet verb\n"))
    assert result.examples[0].tags == ("NOUN", "VERB") and "accuracy" in result.metrics


# ---- questions without an answer


def test_questions_without_an_answer_are_seen_in_the_data(tmp_path, caplog):
    model = load(stranger(tmp_path / "model", QuestionAnswerer))
    assert not said(caplog)
    plain = evaluate(model, tiny_model.questions(tmp_path / "a.json", 6))
    assert "best_f1" not in plain.metrics and not said(caplog)
    result = evaluate(model, tiny_model.questions(tmp_path / "b.json", 6, unanswerable=True))
    assert {"best_f1", "best_f1_threshold"} <= result.metrics.keys() and result.task.unanswerable
    (line,) = said(caplog)
    assert 'b.json: holds questions without an answer, so "no answer" is possible here' in line
    assert not model.task.unanswerable, "what else it is asked is not of that kind"
    caplog.clear()
    question = {"question": "who?", "context": "the film"}
    assert model(question)["answer"] and model(question)["answer"]
    (line,) = said(caplog)
    assert 'every question gets an answer; "no answer"' in line and "unanswerable=True" in line
    model.task = replace(model.task, unanswerable=True, null_threshold=-1e9)
    assert model(question)["answer"] == ""


def test_an_evaluation_leaves_the_predictor_its_task(tmp_path, monkeypatch):
    """Also while it runs: another thread may predict with it."""
    model, seen = load(stranger(tmp_path / "model", QuestionAnswerer)), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda *given: [seen.append(model.task), logits(*given)][1])
    result = evaluate(model, tiny_model.questions(tmp_path / "b.json", 6, unanswerable=True))
    assert seen == [model.task] and result.task != model.task


def test_no_answer_on_the_command_line(tmp_path, capsys, caplog):
    folder = str(stranger(tmp_path / "model", QuestionAnswerer))
    data = str(tiny_model.questions(tmp_path / "b.json", 6, unanswerable=True))
    command = ["predict", "--model", folder, "--input", data]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert all(json.loads(line)["answer"] for line in output.splitlines())
    (line,) = said(caplog)
    assert "every question gets an answer" in line and line.endswith("--threshold 0")
    caplog.clear()
    assert main([*command, "--threshold", "-9999.5"]) == 0
    output = capsys.readouterr().out
    assert not any(json.loads(line)["answer"] for line in output.splitlines()) and not said(caplog)
    assert main([*command, "--threshold", "nan"]) == 2
    assert "--threshold: expected a finite number" in capsys.readouterr().err
    assert main(["evaluate", "--model", folder, "--data", data, "--json", "--quiet"]) == 0
    assert "best_f1_threshold" in json.loads(capsys.readouterr().out)


def test_a_trained_task_stays_as_it_is(tmp_path):
    """With task.json nothing is guessed: other names are still refused."""
    folder = stranger(tmp_path / "model", SequenceClassifier, ("NEG", "POS"))
    (folder / "task.json").write_text(json.dumps({"kind": "classify", "labels": ["NEG", "POS"], "max_length": 64}))
    with pytest.raises(UserError, match="the label is not in the training data"):
        evaluate(load(folder), texts(tmp_path / "dev.jsonl", "neg", "pos"))


def test_numbers_are_read_as_before(tmp_path):
    model = load(stranger(tmp_path / "model", SequenceClassifier, ("value",), "regression"))
    assert isinstance(model.task, Regress)
    assert "mse" in evaluate(model, texts(tmp_path / "dev.jsonl", 1, 2.5, 3)).metrics
