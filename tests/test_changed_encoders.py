"""Encoders with classes of the user's own: built, trained, saved as what they are, opened by the same classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from doc_pages import DOCS, blocks
from hub_models import PROJECTED, make
from small_runs import ORIGINAL, data, one_thread, train  # noqa: F401
from tiny_model import make_model
from torch import nn

import electra_core
from electra_core import cli, electra, tasks
from electra_core.config import PretrainConfig
from electra_core.conversion.onnx_export import export
from electra_core.downstream.classify import Classify
from electra_core.downstream.task_files import save_task
from electra_core.encoder import Encoder, Layer, SelfAttention, rows_of
from electra_core.errors import UserError
from electra_core.finetune import finetune
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.finetuning.steps import task_optimizer
from electra_core.hub.layout import CHANGED
from electra_core.linear import Linear, bias_after, product_of
from electra_core.packing import pack
from electra_core.predict import load
from electra_core.tokenizer import load_tokenizer

BATCH = pack([[2, 17, 23, 44, 3], [2, 9, 3]])


class Negative(SelfAttention):
    """The same parameters, another function of them."""

    def forward(self, hidden_TD: Any, batch: Any, seed: Any, rows_R: Any = None) -> Any:
        return -super().forward(hidden_TD, batch, seed, rows_R)


class Gated(Layer):
    """A feed-forward block with further parameters."""

    def __init__(self, config: Any, first_stream: int) -> None:
        super().__init__(config, first_stream)
        self.gate = Linear(config.hidden_size, config.intermediate_size)
        self.strength = nn.Parameter(torch.ones(()))

    def forward(self, hidden_TD: Any, residual_TD: Any, batch: Any, seed: Any, rows_R: Any = None) -> Any:
        branch_TD = self.attention(hidden_TD, batch, seed, rows_R)
        bias_D, first, second = bias_after(self.attention.dense), *self.streams
        residual_TD = rows_of(residual_TD, rows_R)
        hidden_TD, residual_TD = self.add_norm(branch_TD, bias_D, residual_TD, self.attention_norm, seed, first)
        inner_TF = F.silu(self.gate(hidden_TD)) * self.intermediate(hidden_TD) * self.strength
        branch_TD = product_of(self.output, inner_TF)
        return self.add_norm(branch_TD, bias_after(self.output), residual_TD, self.output_norm, seed, second)


class NormedEncoder(Encoder):
    """A LayerNorm after the last layer."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.final_norm = nn.LayerNorm(self.config.hidden_size)

    def forward(self, batch: Any, seed: Any = None, rows_R: Any = None) -> Any:
        return self.final_norm(super().forward(batch, seed, rows_R))


class Normed(electra_core.Discriminator):
    encoder_class: ClassVar[type[Encoder]] = NormedEncoder


def set_classes(patch: pytest.MonkeyPatch, **classes: Any) -> None:
    for name, kind in classes.items():
        patch.setattr(Layer if name == "attention_class" else Encoder, name, kind)


CLASSES = pytest.mark.parametrize(
    ("classes", "names"),
    [({"attention_class": Negative}, ["Negative"]), ({"layer_class": Gated}, ["Gated"]),
     ({"attention_class": Negative, "layer_class": Gated}, ["Gated", "Negative"])],
    ids=["attention", "layer", "both"],
)  # fmt: skip


def test_the_page_s_hook_gives_the_weights_that_attention_uses() -> None:
    (hook,) = (block for block in blocks(DOCS / "changing_models.md") if "def keep_weights" in block.text)
    page: dict[str, Any] = {"torch": torch, "pack": pack, "Discriminator": electra_core.Discriminator}
    exec(hook.text, page)
    attention, seen = page["model"].encoder.layers[1].attention, []
    attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        page["model"](pack([[2, 17, 23, 44, 3]]))
        (hidden_TD, output_TD), weights_HSS = seen[0], page["maps"][1]
        _, _, values = attention.qkv(hidden_TD).view(-1, 3, attention.num_heads, attention.head_size).unbind(1)
        context_TD = torch.einsum("hst,thk->shk", weights_HSS, values).flatten(1)
        torch.testing.assert_close(product_of(attention.dense, context_TD), output_TD)


@CLASSES
def test_a_changed_encoder_comes_back_where_its_classes_are_set(
    classes: Any, names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_classes(monkeypatch, **classes)
    model = make("ElectraForPreTraining")
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["model_type"], fields["changed_classes"]) == (CHANGED, names)
    again = electra_core.Discriminator.from_pretrained(tmp_path)
    assert {type(layer) for layer in again.encoder.layers} == {type(layer) for layer in model.encoder.layers}
    torch.testing.assert_close(again(BATCH), model(BATCH))


@CLASSES
def test_it_opens_nowhere_else(
    classes: Any, names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        set_classes(patch, **classes)
        make("ElectraForPreTraining").save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=rf"classes of its user's own, {', '.join(names)}, .*Layer\.attention_class"
    ):
        electra_core.Discriminator.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"own, {', '.join(names)}, which"):
        electra_core.model_dir.load_into(make("ElectraForPreTraining"), tmp_path)
    set_classes(monkeypatch, attention_class=type("Other", (SelfAttention,), {}))
    with pytest.raises(UserError, match=r"\(here: Other\)"):
        electra_core.Discriminator.from_pretrained(tmp_path)


def test_transformers_does_not_take_it_for_an_electra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    set_classes(monkeypatch, attention_class=Negative)
    make("ElectraForPreTraining").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=CHANGED):
        transformers.AutoModelForPreTraining.from_pretrained(tmp_path)


def test_a_changed_encoder_may_start_from_an_electra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = make("ElectraForPreTraining")
    model.save_pretrained(tmp_path)
    set_classes(monkeypatch, attention_class=Negative)
    other = electra_core.Discriminator.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    assert not torch.allclose(model(BATCH), other(BATCH))


def test_what_this_program_would_load_as_something_else_is_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = make("ElectraForPreTraining")
    model = make("ElectraForPreTraining")
    model.encoder.layers[1].attention.__class__ = Negative
    said = (
        r"encoder\.layers\.1\.attention is of class Negative, not SelfAttention; .*Layer\.attention_class.*torch"
    )
    with pytest.raises(ValueError, match=said):
        model.save_pretrained(tmp_path / "model")
    given = electra_core.Discriminator(PROJECTED, type("Same", (Encoder,), {})(PROJECTED))
    with pytest.raises(ValueError, match=r"encoder is of class Same, not Encoder; .*encoder_class"):
        given.save_pretrained(tmp_path / "model")
    set_classes(monkeypatch, attention_class=Negative)
    with pytest.raises(ValueError, match=r"attention is of class SelfAttention, not Negative"):
        plain.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_layer_with_further_parameters_that_is_not_set_is_named(tmp_path: Path) -> None:
    model = make("ElectraForPreTraining")
    model.encoder.layers[1] = Gated(PROJECTED, 0)
    with pytest.raises(ValueError, match=r"has encoder\.layers\.1\.strength; .*Encoder\.layer_class"):
        model.save_pretrained(tmp_path / "model")


def test_torchs_own_layers_and_merged_adapters_stay_an_electra(tmp_path: Path) -> None:
    model = make("ElectraForPreTraining")
    inner = model.encoder.layers[0].intermediate
    model.encoder.layers[0].intermediate = nn.Linear(inner.in_features, inner.out_features)
    model.encoder.layers[1].register_forward_hook(lambda *call: None)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == "electra" and "changed_classes" not in fields


def test_an_encoder_class_of_a_model(tmp_path: Path) -> None:
    model = Normed(PROJECTED)
    assert isinstance(model.encoder, NormedEncoder)
    model.save_pretrained(tmp_path)
    again = Normed.from_pretrained(tmp_path)
    torch.testing.assert_close(again(BATCH), model.eval()(BATCH))
    with pytest.raises(UserError, match="own, NormedEncoder, which"):
        electra_core.Discriminator.from_pretrained(tmp_path)


def test_a_pair_takes_the_encoder_classes_of_its_halves() -> None:
    class Pair(electra_core.Electra):
        discriminator_class = Normed

    pair = Pair(PROJECTED, PretrainConfig(generator_layers=1))
    assert type(pair.generator.encoder) is Encoder and type(pair.discriminator.encoder) is NormedEncoder
    assert pair.generator.encoder.embeddings is pair.discriminator.encoder.embeddings


@pytest.mark.parametrize("original_depths", [False, True])
def test_what_an_encoder_adds_learns_as_its_top_layer_does(original_depths: bool) -> None:
    """It lies above the layers most likely, and is pre-trained as they are; it learned at the embeddings' rate."""

    class Longer(NormedEncoder):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.scale = nn.Parameter(torch.ones(3))
            self.more_layers = nn.ModuleList([nn.Linear(4, 4)])
            self.embeddings_filter = nn.Linear(4, 4)

    class Classifier(electra_core.SequenceClassifier):
        encoder_class: ClassVar[type[Encoder]] = Longer

    model, settings = Classifier(PROJECTED), FinetuneSettings(layerwise_decay=0.5, original_depths=original_depths)
    groups = task_optimizer(model, settings).param_groups
    scales = {name: group["lr_scale"] for group in groups for name in group["param_names"]}
    top, n = 0.25 if original_depths else 0.5, PROJECTED.num_hidden_layers
    added = ("final_norm.weight", "final_norm.bias", "scale", "more_layers.0.weight")
    assert {scales[f"encoder.{name}"] for name in (*added, f"layers.{n - 1}.output.weight")} == {top}
    lowest = ("embeddings_filter.weight", "embeddings_project.weight", "embeddings.LayerNorm.bias")
    assert {scales[f"encoder.{name}"] for name in lowest} == {top * 0.5**n}
    assert scales["classifier.out_proj.weight"] == 1


@pytest.mark.parametrize("objective", ["electra", "mlm", "replace-mlm"])
def test_pre_training_with_changed_layers(
    objective: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    set_classes(monkeypatch, attention_class=Negative, layer_class=Gated)
    for kind in (electra.Discriminator, electra.Generator, tasks.TaskModel):
        monkeypatch.setattr(kind, "encoder_class", NormedEncoder)
    train(data, tmp_path / "run", {**ORIGINAL, "steps": 2, "objective": objective})
    opened: Any = electra_core.Discriminator if objective == "electra" else electra_core.Generator
    model = opened.from_pretrained(tmp_path / "run" / "discriminator")
    assert type(model.encoder) is NormedEncoder and type(model.encoder.layers[0]) is Gated
    rows = [{"text": "the cat", "label": "a"}, {"text": "a dog", "label": "b"}] * 4
    settings = FinetuneSettings(epochs=1, max_length=8, dropout=0.1)
    finetune(tmp_path / "run", Classify(), rows, rows, tmp_path / "out", settings, quiet=True)
    assert type(load(tmp_path / "out").model.encoder) is NormedEncoder


def test_a_plain_model_is_a_start_and_not_a_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A fine-tuned ELECTRA opened in silence where classes were set, and predicted something else."""
    rows = [{"text": text, "label": label} for text, label in (("a fine film", "pos"), ("dull", "neg"))] * 4
    settings = FinetuneSettings(epochs=1, batch_size=4, max_length=12)

    def warned() -> list[str]:
        lines = [line.partition(": ")[2] for line in caplog.messages if "starts from" in line]
        caplog.clear()
        return lines

    make_model(tmp_path / "pretrained")
    finetune(tmp_path / "pretrained", Classify(), rows, rows, tmp_path / "plain", settings, quiet=True)
    load(tmp_path / "plain")
    set_classes(monkeypatch, attention_class=Negative)
    with pytest.raises(
        UserError, match=r"plain: was trained with ELECTRA's own classes, .*Negative; set them back"
    ):
        load(tmp_path / "plain")
    assert not warned()
    electra_core.SequenceClassifier.from_pretrained(tmp_path / "plain")
    assert warned() == ["an encoder with Negative starts from an ELECTRA's weights"]
    model = electra_core.Discriminator.from_pretrained(tmp_path / "pretrained")
    electra_core.model_dir.load_into(model, tmp_path / "pretrained")
    assert warned() == ["an encoder with Negative starts from an ELECTRA's weights"] * 2
    finetune(tmp_path / "plain", Classify(), rows, rows, tmp_path / "changed", settings, quiet=True)
    assert "an encoder with Negative starts from an ELECTRA's weights" in warned()
    load(tmp_path / "changed")
    electra_core.SequenceClassifier.from_pretrained(tmp_path / "changed")
    assert not warned(), "it has the classes that it was trained with"


def test_export_names_the_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_classes(monkeypatch, attention_class=Negative)
    folder = make_model(tmp_path / "pretrained")
    model = electra_core.SequenceClassifier.from_pretrained(folder, labels=["a", "b"])
    model.save_pretrained(tmp_path / "model", tokenizer=load_tokenizer(folder))
    save_task(Classify(labels=("a", "b"), max_length=12), tmp_path / "model")
    with pytest.raises(UserError, match="only this package's classes can be exported, got Negative"):
        export(tmp_path / "model", tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_info_and_flops_do_not_count_what_they_do_not_know(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        set_classes(patch, layer_class=Gated)
        make("ElectraForPreTraining").save_pretrained(tmp_path)
    assert cli.main(["info", "--model", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["changed_classes"] == "Gated" and "discriminator_parameters" not in facts
    assert cli.main(["flops", "--model", str(tmp_path)]) == 2
    assert "only ELECTRA's own layers can be counted; its encoder has Gated" in capsys.readouterr().err


@pytest.mark.parametrize("names", [None, [], "Gated", [1]])
def test_a_damaged_list_of_classes(names: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_classes(monkeypatch, layer_class=Gated)
    make("ElectraForPreTraining").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "changed_classes": names}))
    with pytest.raises(UserError, match=r"config\.json: changed_classes: expected a list of names"):
        electra_core.Discriminator.from_pretrained(tmp_path)
