"""Fine-tuning from a fine-tuned model: outputs are kept by their labels' names, wherever they stand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
import torch
from finetune_runs import QUICK, changed, data, model, run, weights  # noqa: F401
from safetensors.torch import load_file, save_file

from electra_core.config import EncoderConfig
from electra_core.downstream.choices import Choose
from electra_core.downstream.classify import Classify, Regress
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag
from electra_core.downstream.task_files import save_task
from electra_core.encoder import Encoder
from electra_core.finetuning.kept_head import OldHead, old_head, rows_by_name, told
from electra_core.finetuning.model import starting_model
from electra_core.model_dir import save_pretrained
from electra_core.predict import load
from electra_core.tasks import MultipleChoice, QuestionAnswerer, SequenceClassifier, TokenClassifier

CONFIG = EncoderConfig(
    vocab_size=20, embedding_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
)
STILL = replace(QUICK, epochs=1, learning_rate=1e-12)
"""Training that changes nothing."""


def saved(kind, folder: Path, labels=(), **more):
    """A model of the kind whose head has weights of its own, saved."""
    made = kind(CONFIG, labels, encoder=Encoder(CONFIG), **more)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if not name.startswith("encoder."):
                value.copy_(torch.randn(value.shape, generator=generator))
    save_pretrained(made, folder)
    return made


def same_head(left, right) -> bool:
    mine, theirs = (
        {name: value for name, value in one.named_parameters() if not name.startswith("encoder.")}
        for one in (left, right)
    )
    return all(torch.allclose(value, theirs[name], rtol=1e-5) for name, value in mine.items())


@pytest.mark.parametrize(
    "known, labels, rows",
    [
        (("a", "b"), ("a", "b"), (0, 1)),
        (("b", "a"), ("a", "b"), (1, 0)),
        (("a", "b"), ("a", "c", "b"), (0, None, 1)),
        (("a", "b", "c"), ("b", "c"), (1, 2)),
        (("NEGATIVE", "POSITIVE"), ("negative", "positive"), (0, 1)),
        (("Us", "us"), ("US", "them"), (None, None)),  # either may be meant
        (("us", "b"), ("US", "Us"), (None, None)),
        (("us", "b"), ("US", "us"), (None, 0)),
        (("LABEL_0", "LABEL_1"), ("0", "1"), (0, 1)),
        (("LABEL_0", "LABEL_1"), ("0", "1", "2"), (0, 1, None)),
        (("LABEL_0", "LABEL_1"), ("1", "2"), (None, None)),  # of stars the first is most likely LABEL_0
        (("LABEL_0", "LABEL_1"), ("bad", "good"), (None, None)),
        (("LABEL_0", "LABEL_1"), ("LABEL_1", "LABEL_0"), (1, 0)),
    ],
)
def test_outputs_are_found_by_name(known, labels, rows):
    assert rows_by_name(known, labels) == rows


@pytest.mark.parametrize("kind, task", [(SequenceClassifier, Classify()), (TokenClassifier, Tag())])
def test_known_labels_keep_their_outputs_wherever_they_stand(tmp_path, kind, task):
    before = saved(kind, tmp_path, ("c", "a", "b"))
    task = replace(task, labels=("a", "b", "new"))
    after = starting_model(task, tmp_path, QUICK, 3)
    last = "classifier.out_proj" if kind is SequenceClassifier else "classifier"
    old, new = before.get_submodule(last), after.get_submodule(last)
    assert after.labels == task.labels and new.weight.shape == (3, 8) and new.out_features == 3
    assert torch.equal(new.weight[:2], old.weight[1:]) and torch.equal(new.bias[:2], old.bias[1:])
    assert new.bias[2] == 0 and not torch.isin(new.weight[2], old.weight).any()
    if kind is SequenceClassifier:
        assert torch.equal(after.classifier.dense.weight, before.classifier.dense.weight)
    assert torch.equal(new.weight, starting_model(task, tmp_path, QUICK, 3).get_submodule(last).weight)
    assert not torch.equal(new.weight[2], starting_model(task, tmp_path, QUICK, 4).get_submodule(last).weight[2])
    assert all(parameter.requires_grad for parameter in after.parameters())


@pytest.mark.parametrize("labels", [("x", "y"), ("x", "y", "z")])
@pytest.mark.parametrize("start", ["other labels", "no names", "a tagger", "a number", "random"])
def test_a_head_of_other_labels_is_new_as_from_a_pretrained_model(tmp_path, labels, start):
    kind = TokenClassifier if start == "a tagger" else SequenceClassifier
    known = {"a number": ("x",), "random": ("x", "y")}.get(start, ("a", "b"))
    before = saved(kind, tmp_path / "a", known)
    if start == "no names":
        changed(tmp_path / "a", id2label=None, label2id=None)
    settings = replace(QUICK, random_start=start == "random")
    after = starting_model(Classify(labels=labels), tmp_path / "a", settings, 3)
    new = SequenceClassifier(CONFIG, labels, encoder=before.encoder)
    save_pretrained(new, tmp_path / "b")
    changed(tmp_path / "b", architectures=["ElectraForPreTraining"])
    assert same_head(after, starting_model(Classify(labels=labels), tmp_path / "b", settings, 3))
    assert not after.multi_label


def test_a_config_that_does_not_fit_its_head_gives_a_new_one(tmp_path):
    before = saved(SequenceClassifier, tmp_path, ("a", "b"))
    task = Classify(labels=("a", "b"))
    for names in ({"0": "a", "1": "b", "2": "c"}, {"0": "a", "1": "a"}, {"1": "a", "2": "b"}):
        changed(tmp_path, id2label=names)
        assert old_head(task, tmp_path) is None
        assert not same_head(starting_model(task, tmp_path, QUICK, 0), before)
    changed(tmp_path, id2label={"0": "a", "1": "b"}, architectures=None)
    assert same_head(starting_model(task, tmp_path, QUICK, 0), before)


def test_a_number_is_brought_to_the_scale_of_training(tmp_path):
    before = saved(SequenceClassifier, tmp_path, ("value",))
    task = Regress(offset=3.0, scale=2.0)
    after = starting_model(task, tmp_path, QUICK, 0)
    assert torch.equal(after.classifier.out_proj.weight, before.classifier.out_proj.weight / 2)
    assert torch.equal(after.classifier.out_proj.bias, (before.classifier.out_proj.bias - 3) / 2)
    with task.as_saved(after):
        assert same_head(after, before)
    old = old_head(task, tmp_path)
    assert old is not None and told(task, old) == "the head is kept"
    changed(tmp_path, problem_type="multi_label_classification")
    assert old_head(task, tmp_path) is None
    one = MultiLabel(labels=("value",))
    assert same_head(starting_model(one, tmp_path, QUICK, 0), before)


def test_a_number_of_a_folder_with_its_scale_in_task_json_is_brought_to_that_of_training(tmp_path):
    """As versions before 28 November 2026 wrote it."""
    before = saved(SequenceClassifier, tmp_path, ("value",))
    save_task(Regress(offset=4.0, scale=0.5), tmp_path)
    now = Regress(offset=3.0, scale=2.0)
    after = starting_model(now, tmp_path, QUICK, 0)
    with now.as_saved(after), Regress(offset=4.0, scale=0.5).as_saved(before):
        assert same_head(after, before)
    (tmp_path / "task.json").write_text('{"kind": "another"}')
    assert old_head(now, tmp_path) == OldHead((), ())


@pytest.mark.parametrize("kind, task", [(QuestionAnswerer, Answer()), (MultipleChoice, Choose())])
def test_questions_and_choices_keep_their_head(tmp_path, kind, task):
    before = saved(kind, tmp_path)
    assert same_head(starting_model(task, tmp_path, replace(QUICK, freeze="encoder"), 0), before)
    old = old_head(task, tmp_path)
    assert old is not None and told(task, old) == "the head is kept"


def test_dropout_and_frozen_layers_leave_the_kept_head(tmp_path):
    before = saved(SequenceClassifier, tmp_path, ("b", "a"))
    settings = replace(QUICK, dropout=0.3, freeze="encoder")
    after = starting_model(Classify(labels=("b", "a")), tmp_path, settings, 0)
    assert same_head(after, before) and after.head_dropout == 0.3
    assert {name.split(".")[0] for name, p in after.named_parameters() if p.requires_grad} == {"classifier"}


def test_one_label_or_several_makes_no_difference_but_in_what_is_saved(tmp_path):
    before = saved(SequenceClassifier, tmp_path, ("a", "b"), multi_label=True)
    after = starting_model(Classify(labels=("a", "b")), tmp_path, QUICK, 0)
    assert same_head(after, before) and not after.multi_label


@pytest.mark.parametrize(
    "known, labels, line",
    [
        (("b", "a"), ("a", "b"), "the head is kept: the labels are the same"),
        (("a", "b"), ("a", "b", "c"), "the head is kept for 2 labels; new: 'c'"),
        (("a", "b", "c"), ("a", "d"), "the head is kept for 1 label; new: 'd'; left out: 'b', 'c'"),
        (
            tuple("abcdefg"), ("x", "y"),
            "the head is new: it knows 'a', 'b', 'c', 'd', 'e' and 2 others, none of which is a label of the data",
        ),
    ],
)  # fmt: skip
def test_what_is_kept_is_told(tmp_path, known, labels, line):
    saved(SequenceClassifier, tmp_path, known)
    task = Classify(labels=labels)
    old = old_head(task, tmp_path)
    assert old is not None and told(task, old) == line


def test_a_start_warns_of_what_is_odd_and_not_of_a_new_head(tmp_path, caplog):
    """All warnings were silenced with the one about the head."""
    saved(SequenceClassifier, tmp_path, ("a", "b"))
    starting_model(Classify(labels=("c", "d", "e")), tmp_path, QUICK, seed=1)
    assert not caplog.messages
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "loss_fct.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    starting_model(Classify(labels=("c", "d", "e")), tmp_path, QUICK, seed=1)
    assert caplog.messages == [f"{tmp_path}: tensors that this model has no use for: loss_fct.weight"]


def renamed(file: Path, folder: Path, **names: str) -> Path:
    text = file.read_text()
    for name, other in names.items():
        text = text.replace(f"\t{name}\n", f"\t{other}\n")
    (folder / file.name).write_text(text)
    return folder / file.name


def with_one_more_class(data, folder: Path) -> list[Path]:
    files = [folder / file.name for file in data]
    for file, before in zip(files, data):
        file.write_text(before.read_text() + "ann\tmixed\nbob was\tmixed\neve is\tmixed\n")
    return files


@pytest.fixture(scope="module")
def classifier(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("classifier") / "out"
    assert run(model, data, out)["best"]["accuracy"] > 0.9
    return out


def accuracy(report) -> float:
    return report["best"]["accuracy"]


def accuracy_of(folder: Path) -> float:
    return accuracy(json.loads((folder / "metrics.json").read_text()))


def test_training_goes_on_with_labels_in_another_order(classifier, data, tmp_path):
    """Somebody's classifier may have its labels in any order; ours are in that of the alphabet."""
    start = shutil.copytree(classifier, tmp_path / "start")
    task = Classify(labels=("pos", "neg"))
    lines: list[str] = []
    report = run(start, data, tmp_path / "out", task, STILL, say=lines.append)
    assert (
        accuracy(report) == accuracy_of(start) and f"{start}: the head is kept: the labels are the same" in lines
    )
    assert torch.equal(weights(tmp_path / "out")["classifier.out_proj.weight"].flip(0),
                       weights(start)["classifier.out_proj.weight"])  # fmt: skip


def test_other_labels_get_a_new_head(classifier, data, tmp_path):
    """Kept by their order, the outputs of labels with other names would be wrong about everything."""
    files = [renamed(file, tmp_path, neg="zz", pos="aa") for file in data]
    lines: list[str] = []
    run(classifier, files, tmp_path / "out", settings=STILL, say=lines.append)
    assert f"{classifier}: the head is new: it knows 'neg', 'pos', none of which is a label of the data" in lines
    before, after = weights(classifier), weights(tmp_path / "out")
    assert not torch.equal(before["classifier.out_proj.weight"], after["classifier.out_proj.weight"])
    assert not torch.equal(before["classifier.dense.weight"], after["classifier.dense.weight"])


def test_one_more_class_later(classifier, data, tmp_path):
    """What is known stays known."""
    files = with_one_more_class(data, tmp_path)
    lines: list[str] = []
    run(classifier, files, tmp_path / "out", settings=STILL, say=lines.append)
    assert f"{classifier}: the head is kept for 2 labels; new: 'mixed'" in lines
    answers, before = load(tmp_path / "out"), load(classifier)
    for text in ("the film was great", "the plot is dull"):
        mine, theirs = answers(text)["scores"], before(text)["scores"]
        assert mine["pos"] / mine["neg"] == pytest.approx(theirs["pos"] / theirs["neg"], rel=1e-4)


def test_a_number_goes_on_where_it_was(model, data, tmp_path):
    files = [renamed(file, tmp_path, neg="1.0", pos="4.0") for file in data]
    first = run(model, files, tmp_path / "a", Regress())["best"]
    again = run(tmp_path / "a", files, tmp_path / "b", Regress(), STILL)["best"]
    assert again["mse"] == pytest.approx(first["mse"], rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_resumed_run_from_a_classifier_ends_with_the_same_bits(
    seed, classifier, data, tmp_path
):  # fmt: skip
    """Each of its seeds begins with the kept head and a new row of its own."""
    files = with_one_more_class(data, tmp_path)
    settings = replace(QUICK, epochs=1, seeds=2, evaluations=3)
    whole = run(classifier, files, tmp_path / "whole", settings=settings)
    evaluated: list[float] = []

    def kill(figures: dict[str, float]) -> None:
        evaluated.append(figures["seed"])
        if evaluated.count(seed) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(classifier, files, tmp_path / "out", settings=settings, on_evaluation=kill)
    lines: list[str] = []
    report = run(classifier, files, tmp_path / "out", settings=settings, resume=True, say=lines.append)
    assert any("continuing at step" in line for line in lines) and not any("the head" in line for line in lines)
    assert [one["metrics"] for one in report["seeds"]] == [one["metrics"] for one in whole["seeds"]]
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_a_folder_of_transformers_without_names_goes_on_with_its_numbers(classifier, data, tmp_path):
    start = shutil.copytree(classifier, tmp_path / "start")
    changed(start, id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    files = [renamed(file, tmp_path, neg="0", pos="1") for file in data]
    assert accuracy(run(start, files, tmp_path / "out", settings=STILL)) == accuracy_of(start)


def test_a_tagger_goes_on_with_tags_in_another_order(model, tmp_path):
    files = [tiny_model.names_to_tag(tmp_path / f"{name}.conll", 160, seed) for seed, name in enumerate("ab")]
    first = run(model, files, tmp_path / "a", Tag(), replace(QUICK, epochs=8))["best"]
    labels = tuple(reversed(json.loads((tmp_path / "a/config.json").read_text())["label2id"]))
    again = run(tmp_path / "a", files, tmp_path / "b", Tag(labels=labels), STILL)["best"]
    assert again["f1"] == first["f1"] > 0.5
