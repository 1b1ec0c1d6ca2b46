"""Task models beyond training: what others make of them, what they refuse, and how they are used by hand."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from finetune_runs import model  # noqa: F401

from electra_core import model_dir
from electra_core.config import PRESETS, EncoderConfig
from electra_core.downstream.classify import Classify, Regress
from electra_core.electra import Discriminator, Electra
from electra_core.encoder import set_recompute
from electra_core.finetune import finetune
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.initialisation import initialise
from electra_core.model_dir import save_pretrained
from electra_core.packing import from_lengths
from electra_core.predict import Predictor, load
from electra_core.tasks import MultipleChoice, SequenceClassifier, TaskModel
from electra_core.tokenizer import load_tokenizer

QUICK = FinetuneSettings(epochs=4, batch_size=16, learning_rate=3e-3, layerwise_decay=1.0, log_every=1)


def test_a_number_comes_out_of_the_saved_model_itself(model: Path, tmp_path: Path) -> None:
    """Whatever reads the directory: the scale that the labels were trained in is in its last layer."""
    transformers = pytest.importorskip("transformers")
    file = tiny_model.reviews(tmp_path / "numbers.tsv", 160)
    rows = [line.split("\t") for line in file.read_text().splitlines()[1:]]
    lines = ["\t".join([row[0], "104.0" if row[1] == "pos" else "101.0"]) for row in rows]
    file.write_text("\n".join(["text\tlabel", *lines]))
    report = finetune(model, Regress(), file, file, tmp_path / "out", QUICK, quiet=True)
    text = "the film is great"
    value = load(tmp_path / "out", precision="fp32")(text)["value"]
    assert value == pytest.approx(104, abs=1) and report["best"]["mse"] < 0.5
    hub = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert float(hub(**tokenizer(text, return_tensors="pt")).logits.detach()) == pytest.approx(value, rel=1e-5)
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "out"))
    assert pipeline(text)[0]["score"] == pytest.approx(value, rel=1e-5)


def test_saving_leaves_a_model_as_it_is() -> None:
    config = EncoderConfig(hidden_size=16, embedding_size=16, num_attention_heads=1, num_hidden_layers=1)
    model, task = SequenceClassifier(config, labels=["value"]), Regress(scale=3.0, offset=1.0)
    last = model.classifier.out_proj
    before = last.weight.clone(), last.bias.clone()
    with task.as_saved(model) as saved:
        assert (saved.scale, saved.offset) == (1.0, 0.0)
        torch.testing.assert_close(last.weight, 3 * before[0])
        torch.testing.assert_close(last.bias, 3 * before[1] + 1)
    assert torch.equal(last.weight, before[0]) and torch.equal(last.bias, before[1])


def test_pairs_are_not_single_texts(model: Path, tmp_path: Path) -> None:
    pairs = Classify(labels=("a", "b"), pairs=True)
    config = model_dir.load_config(model)[0]
    both = Predictor(SequenceClassifier(config, labels=["a", "b"]), pairs, load_tokenizer(model))
    assert both(("the film", "is great"))["label"] in "ab" and len(both([("the film", "is great")])) == 1
    with pytest.raises(ValueError, match="trained on pairs of texts, got a single text: 'the film'"):
        both("the film")
    single = Predictor(both.model, replace(pairs, pairs=False), both.tokenizer)
    assert len(single(("the film", "is great"))) == 2
    with pytest.raises(ValueError, match="trained on single texts, got a pair of texts"):
        single([("the film", "is great")])
    one, two = ("the film", "a film"), ("a plot", "the plot")
    assert both(one) == both([one])[0] and both((one, two)) == both([one, two])


@pytest.mark.parametrize("kind", [SequenceClassifier, MultipleChoice])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_last_layer_finishes_only_cls(kind: type[TaskModel], recompute: bool) -> None:
    """The same logits and gradients as from all tokens' hidden states, of which [CLS] is picked."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = EncoderConfig(
        hidden_size=16, embedding_size=16, num_attention_heads=2, num_hidden_layers=2, **no_dropout
    )
    model = kind(config, labels=["a", "b"])
    initialise(model, 0.2, seed=1)
    set_recompute(model, recompute)
    batch = from_lengths(torch.arange(5, 16), torch.zeros(11, dtype=torch.int64), [5, 2, 4])
    rows: dict[int, set[int]] = {0: set(), 1: set()}
    for number, seen in rows.items():
        layer = model.encoder.layers[number]
        layer.intermediate.register_forward_pre_hook(lambda _, given, seen=seen: seen.add(len(given[0])))  # type: ignore[misc]
        layer.attention.dense.register_forward_pre_hook(lambda _, given, seen=seen: seen.add(len(given[0])))  # type: ignore[misc]
    results = []
    for pick in (model._cls, lambda batch, seed: model.encoder(batch, seed)[batch.cu_seqlens[:-1]]):
        model._cls = pick  # type: ignore[method-assign]
        model.zero_grad()
        logits = model(batch)
        logits.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((logits.detach(), gradients, [set(seen) for seen in rows.values()]))
    (logits, gradients, few), (expected, wanted, all_rows) = results
    assert few == [{11}, {3}] and all_rows == [{11}, {3, 11}]
    torch.testing.assert_close(logits, expected)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


@pytest.mark.parametrize("labels", [3, [0, 1], "pos"], ids=str)
def test_labels_that_are_no_names_are_refused(model: Path, labels: Any) -> None:
    with pytest.raises(ValueError, match="labels: expected a list of names, got "):
        model_dir.load(SequenceClassifier, model, labels=labels)


def test_only_models_with_a_place_in_the_hub_s_layout_are_saved(tmp_path: Path) -> None:
    electra = Electra(PRESETS["tiny"].discriminator, PRESETS["tiny"].pretrain)
    with pytest.raises(ValueError, match="model: expected a Discriminator, Generator or task model, got Electra"):
        save_pretrained(electra, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("batch", [torch.ones(1, 4, dtype=torch.int64), [[2, 3]]], ids=["padded", "lists"])
def test_a_batch_that_is_not_packed_is_refused(model: Path, batch: object) -> None:
    for kind in (SequenceClassifier, Discriminator):
        with pytest.raises(ValueError, match=r"batch: expected a TokenBatch \(packing.pack, "):
            kind(model_dir.load_config(model)[0])(batch)


def test_training_without_a_seed_says_that_nothing_is_dropped(model: Path) -> None:
    config = replace(model_dir.load_config(model)[0], hidden_dropout_prob=0.1)
    classifier, batch = SequenceClassifier(config), from_lengths(*[torch.ones(4, dtype=torch.int64)] * 2, [4])
    with pytest.warns(UserWarning, match="trains without dropout") as warned:
        classifier.train()(batch)
    assert warned[0].filename == __file__  # names the user's line, not one of the package
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier(batch, seed=1)
        classifier.eval()(batch)
        with torch.no_grad():
            classifier.train()(batch)
