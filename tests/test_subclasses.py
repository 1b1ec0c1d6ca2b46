"""Model directories of classes that people derive from ours, and of models that they have changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_models import PROJECTED, make
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize, prune

import electra_core
from electra_core import electra
from electra_core.config import PretrainConfig
from electra_core.errors import UserError


class Tagger(electra_core.TokenClassifier):
    """With parts of its own of every kind."""

    def __init__(self, config: Any, labels: Any = ("O", "B"), **more: Any) -> None:
        super().__init__(config, labels, **more)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.between = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        nn.init.eye_(self.between.weight)
        self.kinds = nn.Embedding(5, 4)
        self.transitions = nn.Parameter(torch.full((2, 2), 7.0))
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("class_weights", torch.tensor([1.0, 5.0]))
        self.register_buffer("counts", torch.tensor([4, 2]))
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.plain = torch.arange(4)


def poison() -> None:
    """Leaves numbers in the memory that is handed out next."""
    junk = [torch.full((n,), 3e30) for n in (1, 2, 4, 20, 24, 576) * 200]
    del junk


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    make("ElectraForPreTraining").save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


def test_parts_of_its_own_are_as_the_constructor_makes_them(pretrained: Path) -> None:
    poison()
    state = torch.get_rng_state()
    model: Any = Tagger.from_pretrained(pretrained, labels=["O", "B"], seed=1)
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"
    assert torch.equal(model.norm.weight, torch.ones(24)) and torch.equal(model.norm.bias, torch.zeros(24))
    assert torch.equal(model.between.weight, torch.eye(24)) and torch.equal(
        model.transitions, torch.full((2, 2), 7.0)
    )
    assert model.scale == 3.0 and model.class_weights.tolist() == [1, 5] and model.counts.tolist() == [4, 2]
    assert model.table.tolist() == [0, 1, 2] and model.plain.tolist() == [0, 1, 2, 3]
    same: Any = Tagger.from_pretrained(pretrained, labels=["O", "B"], seed=1)
    other: Any = Tagger.from_pretrained(pretrained, labels=["O", "B"], seed=2)
    assert torch.equal(model.kinds.weight, same.kinds.weight)
    assert not torch.equal(model.kinds.weight, other.kinds.weight)


def test_head_and_encoder_are_those_of_the_class_above(pretrained: Path) -> None:
    model: Any = Tagger.from_pretrained(pretrained, labels=["O", "B"], seed=1)
    above: Any = electra_core.TokenClassifier.from_pretrained(pretrained, labels=["O", "B"], seed=1)
    ours = dict(model.named_parameters())
    assert all(torch.equal(ours[name], parameter) for name, parameter in above.named_parameters())


@pytest.mark.parametrize("half", [False, True], ids=["as it is", "bf16"])
def test_it_comes_back_with_its_buffers(pretrained: Path, half: bool, tmp_path: Path) -> None:
    model: Any = Tagger.from_pretrained(pretrained, labels=["O", "B"])
    with torch.no_grad():
        for tensor in (model.transitions, model.scale, model.class_weights, model.counts, model.table):
            tensor.add_(1)
    model.save_pretrained(tmp_path / "saved", dtype=torch.bfloat16 if half else None)
    assert load_file(tmp_path / "saved" / "model.safetensors")["counts"].dtype == torch.int64
    poison()
    again: Any = Tagger.from_pretrained(tmp_path / "saved")
    state = model.state_dict()
    for name, value in again.state_dict().items():
        wanted = state[name].bfloat16() if half and state[name].is_floating_point() else state[name]
        assert torch.equal(value, wanted.to(value.dtype)), name
    assert again.table.tolist() == [0, 1, 2], "not saved, so the constructor's"


def test_a_directory_of_before_buffers_were_saved(pretrained: Path, tmp_path: Path) -> None:
    class WithBuffer(electra_core.Discriminator):
        def __init__(self, config: Any, *more: Any) -> None:
            super().__init__(config, *more)
            self.register_buffer("mean", torch.full((3,), 2.0))

    model: Any = WithBuffer.from_pretrained(pretrained)
    assert model.mean.tolist() == [2, 2, 2]


def test_integers_are_read_for_buffers_only(pretrained: Path, tmp_path: Path) -> None:
    Tagger.from_pretrained(pretrained, labels=["O", "B"]).save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="counts has dtype I64"):
        electra_core.TokenClassifier.from_pretrained(tmp_path / "saved")


# Models that were changed -------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def wrap(layer: Any) -> None:
    layer.intermediate = Wrapped(layer.intermediate)


def prune_weight(layer: Any) -> None:
    prune.random_unstructured(layer.attention.qkv, "weight", amount=0.5)


def parametrized(layer: Any) -> None:
    parametrize.register_parametrization(layer.output, "weight", Doubled())


def added(layer: Any) -> None:
    layer.intermediate.extra = nn.Parameter(torch.zeros(3))


def narrower(layer: Any) -> None:
    layer.intermediate, layer.output = nn.Linear(24, 8), nn.Linear(8, 24)


@pytest.mark.parametrize("subclass", [False, True], ids=["our class", "derived"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (wrap, r"has no encoder\.layers\.1\.intermediate\.weight"),
        (prune_weight, r"has no encoder\.layers\.1\.attention\.qkv\.weight"),
        (parametrized, r"has no encoder\.layers\.1\.output\.weight"),
        (added, r"has encoder\.layers\.1\.intermediate\.extra"),
        (narrower, r"intermediate\.weight of shape \[8, 24\], not \[40, 24\]"),
    ],
)
def test_what_nobody_could_load_is_not_written(change: Any, said: str, subclass: bool, tmp_path: Path) -> None:
    model = Tagger(PROJECTED) if subclass else make("ElectraForSequenceClassification")
    change(model.encoder.layers[1])
    with pytest.raises(ValueError, match=f"model: .*{said}.*; merge or remove"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_changed_head_is_not_written(tmp_path: Path) -> None:
    model = make("ElectraForSequenceClassification")
    model.classifier.dense = Wrapped(model.classifier.dense)
    with pytest.raises(ValueError, match=r"has no classifier\.dense\.weight"):
        model.save_pretrained(tmp_path / "model")


def test_a_merged_model_is_written(tmp_path: Path) -> None:
    model = make("ElectraForSequenceClassification")
    prune_weight(model.encoder.layers[1])
    prune.remove(model.encoder.layers[1].attention.qkv, "weight")
    model.save_pretrained(tmp_path / "model")
    again = electra_core.SequenceClassifier.from_pretrained(tmp_path / "model")
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters())


class Part(torch.Tensor):
    """What tells a DTensor."""

    def full_tensor(self) -> None: ...


def test_a_sharded_model_is_not_written(tmp_path: Path) -> None:
    model = make("ElectraForPreTraining")
    model.encoder.layers[0].output.bias = nn.Parameter(torch.zeros(24).as_subclass(Part))
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.output\.bias is a DTensor"):
        model.save_pretrained(tmp_path / "model")


def test_the_halves_of_a_pair_read_and_write_folders(tmp_path: Path) -> None:
    pair = electra_core.Electra(PROJECTED, PretrainConfig(generator_layers=1))
    assert isinstance(pair.discriminator, electra_core.Discriminator)
    assert isinstance(pair.generator, electra_core.Generator)
    pair.discriminator.save_pretrained(tmp_path / "d")
    again = electra_core.Discriminator.from_pretrained(tmp_path / "d")
    assert all(torch.equal(p, q) for p, q in zip(pair.discriminator.parameters(), again.parameters()))
    assert json.loads((tmp_path / "d" / "config.json").read_text())["architectures"] == ["ElectraForPreTraining"]
    assert isinstance(pair, electra.Electra)
