"""What people put in the place of a layer, or hang onto it, is what computes: adapters, pruning, hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from electra_kernels import RTDHead
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from electra_core import linear
from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.electra import Discriminator, DiscriminatorPredictions, Electra, Generator
from electra_core.encoder import Encoder
from electra_core.initialisation import initialise
from electra_core.linear import Linear
from electra_core.masking import mask_tokens
from electra_core.packing import pack

CONFIG = EncoderConfig(
    vocab_size=50, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=16,
)  # fmt: skip
BATCH = pack([[2, 7, 8, 9, 3], [2, 30, 3]])
NARROW = {"generator_hidden_size": 8, "generator_attention_heads": 1, "generator_intermediate_size": 16}
PLACES = ("embeddings_project", "layers.1.attention.qkv", "layers.0.attention.dense",
          "layers.0.intermediate", "layers.1.output")  # fmt: skip


class LoRA(nn.Module):
    """As written by hand: knows nothing of `add_bias`, and has no weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = torch.randn(base.in_features, 2) * 0.3, torch.randn(2, base.out_features) * 0.3

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.down.to(x.dtype)) @ self.up.to(x.dtype)  # type: ignore[no-any-return]

    def weight_of_both(self) -> Tensor:
        return self.base.weight + (self.down @ self.up).T


class LoRASubclass(Linear):
    """The same, as a kind of our own layer that leaves out the second argument."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.change = torch.randn(base.out_features, base.in_features) * 0.1

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input) + input @ self.change.T.to(input.dtype)

    def weight_of_both(self) -> Tensor:
        return self.weight + self.change


class Tripled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight


def with_lora(layer: Any) -> tuple[nn.Module, Tensor]:
    adapter = LoRA(layer)
    return adapter, adapter.weight_of_both()


def with_subclass(layer: Any) -> tuple[nn.Module, Tensor]:
    adapter = LoRASubclass(layer)
    return adapter, adapter.weight_of_both()


def with_torchs_linear(layer: Any) -> tuple[nn.Module, Tensor]:
    other = nn.Linear(layer.in_features, layer.out_features)
    other.bias.data.copy_(layer.bias)
    return other, other.weight


def with_parametrization(layer: Any) -> tuple[nn.Module, Tensor]:
    weight = 3 * layer.weight
    parametrize.register_parametrization(layer, "weight", Tripled())
    return layer, weight


def with_pruned_weight(layer: Any) -> tuple[nn.Module, Tensor]:
    """Pruning computes `weight` before every call, so between a step and a call it is the old one."""
    prune.random_unstructured(layer, "weight", amount=0.5)
    with torch.no_grad():
        layer.weight_orig.mul_(3)
    return layer, layer.weight_orig * layer.weight_mask


def with_hook(layer: Any) -> tuple[nn.Module, Tensor]:
    """That changes what the product is: all inputs doubled."""
    layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0], *inputs[1:]))
    return layer, 2 * layer.weight


CHANGES = pytest.mark.parametrize(
    "change",
    [
        with_lora,
        with_subclass,
        with_torchs_linear,
        with_parametrization,
        with_pruned_weight,
        with_hook,
    ],
    ids=lambda change: change.__name__,
)


def pair(change: Callable[[Any], tuple[nn.Module, Tensor]], place: str) -> tuple[Encoder, Encoder]:
    """An encoder changed at `place`, and one whose weight there says the same."""
    torch.manual_seed(0)
    changed = Encoder(CONFIG)
    initialise(changed, 0.3, seed=0)
    with torch.no_grad():
        for p in changed.parameters():
            p.add_(0.3 * torch.randn_like(p))  # biases, too: one that is added twice, or not at all, shows
    merged = copy.deepcopy(changed)
    parent, _, name = place.rpartition(".")
    layer, weight = change(changed.get_submodule(place))
    setattr(changed.get_submodule(parent), name, layer)
    with torch.no_grad():
        merged.get_parameter(f"{place}.weight").copy_(weight)
    return changed.eval(), merged.eval()


@CHANGES
@pytest.mark.parametrize("place", PLACES)
def test_a_changed_layer_gives_what_merged_weights_give(change: Any, place: str) -> None:
    changed, merged = pair(change, place)
    torch.testing.assert_close(changed(BATCH), merged(BATCH), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("any_processor")
@CHANGES
@pytest.mark.parametrize("place", PLACES)
def test_the_same_without_gradient_in_fast_bf16(change: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where GELU is computed in the product."""
    monkeypatch.setattr(linear, "has_fast_bf16", lambda: True)
    changed, merged = pair(change, place)
    with torch.no_grad():
        exact = merged(BATCH)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            error, fair = ((model(BATCH).float() - exact).norm() / exact.norm() for model in (changed, merged))
    assert error < 3 * fair + 0.01


@pytest.mark.parametrize("place", PLACES)
def test_hooks_see_all_of_a_layer_s_output(place: str) -> None:
    """With its bias, which other layers are added to together with something else."""
    encoder, _ = pair(with_torchs_linear, "layers.0.output")
    layer: Any = encoder.get_submodule(place)
    before, seen = encoder(BATCH), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    torch.testing.assert_close(encoder(BATCH), before, rtol=1e-5, atol=1e-5)
    ((inputs, output),) = seen
    torch.testing.assert_close(output, nn.functional.linear(inputs, layer.weight, layer.bias))


@pytest.mark.parametrize("place", PLACES)
def test_a_forward_put_in_the_place_of_a_layer_s(place: str) -> None:
    """Which takes what `nn.Linear` takes; the layers before the residual sums gave it a second argument."""
    encoder, _ = pair(with_torchs_linear, "layers.0.output")
    doubled, layer = copy.deepcopy(encoder), encoder.get_submodule(place)
    before: Any = layer.forward
    layer.forward = lambda input: 2 * before(input)
    with torch.no_grad():
        for parameter in doubled.get_submodule(place).parameters():
            parameter.mul_(2)
    torch.testing.assert_close(encoder(BATCH), doubled(BATCH), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("any_processor")
def test_hooks_see_every_layer_in_fast_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_fast_bf16", lambda: True)
    encoder, seen = Encoder(CONFIG).eval(), []
    for layer in encoder.layers:
        layer.get_submodule("intermediate").register_forward_hook(lambda *call: seen.append(call[2].shape))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        encoder(BATCH)
    assert seen == [(8, 32), (8, 32)]


def test_weights_are_not_cast_together_where_they_are_computed_before_a_call() -> None:
    pruned = prune.random_unstructured(Linear(8, 8), "weight", amount=0.5)
    assert not linear.by_its_parts(pruned) and not linear.by_its_parts(LoRASubclass(Linear(8, 8)))
    assert linear.by_its_parts(Linear(8, 8)) and not linear.by_its_parts(Linear(8, 8, bias=False))


def test_a_layer_without_bias() -> None:
    encoder = Encoder(CONFIG).eval()
    before: Any = copy.deepcopy(encoder)
    for layer, old in zip(encoder.layers, before.layers):
        layer.output, layer.intermediate = Linear(32, 16, bias=False), Linear(16, 32, bias=False)
        for name in ("output", "intermediate"):
            layer.get_parameter(f"{name}.weight").data.copy_(getattr(old, name).weight)
            getattr(old, name).bias.data.zero_()
    torch.testing.assert_close(encoder(BATCH), before(BATCH))


def with_hook_on_output(layer: Any) -> tuple[nn.Module, Tensor]:
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer, 2 * layer.weight


def without_bias(layer: Any) -> tuple[nn.Module, Tensor]:
    other = nn.Linear(layer.in_features, layer.out_features, bias=False)
    return other, other.weight


@pytest.mark.parametrize(
    "change",
    [with_lora, with_pruned_weight, with_hook_on_output, without_bias],
    ids=lambda change: change.__name__,
)
def test_the_discriminator_s_last_layer(change: Any) -> None:
    model = Discriminator(CONFIG).eval()
    head: Any = model.discriminator_predictions
    head.dense_prediction, weight = change(head.dense_prediction)
    replaced_T = torch.arange(8) % 2 == 0
    judged = model.judge(BATCH, replaced_T)
    wanted = model(BATCH)
    torch.testing.assert_close(judged.logits_T, wanted)
    loss = nn.functional.binary_cross_entropy_with_logits(wanted, replaced_T.float())
    torch.testing.assert_close(judged.loss, loss)
    assert weight.shape == (1, 16) and int(judged.counts.sum()) == 8


def test_a_head_of_one_s_own() -> None:
    class Doubtful(DiscriminatorPredictions):
        def forward(self, hidden_TD: Tensor) -> Tensor:
            return super().forward(hidden_TD) / 2

    model, replaced_T = Discriminator(CONFIG).eval(), torch.arange(8) % 2 == 0
    model.discriminator_predictions = Doubtful(CONFIG)
    torch.testing.assert_close(model.judge(BATCH, replaced_T).logits_T, model(BATCH))


class Halved(Discriminator):
    def forward(self, tokens: Any, seed: Any = None) -> Tensor:
        return super().forward(tokens, seed) / 2


class HalvedWords(Generator):
    def forward(self, tokens: Any, positions_M: Any = None, seed: Any = None) -> Tensor:
        return super().forward(tokens, positions_M, seed) / 2


def of_a_subclass() -> Discriminator:
    return Halved(CONFIG)


def of_a_subclass_with_its_own_loss() -> Discriminator:
    class WithLoss(Halved):
        def judge(self, tokens: Any, is_replaced_T: Tensor, weights_T: Any = None, seed: Any = None) -> RTDHead:
            head = super().judge(tokens, is_replaced_T, weights_T, seed)
            return head._replace(loss=head.loss + 1)

    return WithLoss(CONFIG)


def with_a_hook() -> Discriminator:
    model = Discriminator(CONFIG)
    model.register_forward_hook(lambda module, inputs, output: output / 2)
    return model


def with_a_hook_on_the_head() -> Discriminator:
    model = Discriminator(CONFIG)
    model.discriminator_predictions.register_forward_hook(lambda module, inputs, output: output / 2)
    return model


def with_a_forward_put_in_its_place() -> Discriminator:
    model: Any = Discriminator(CONFIG)
    before = model.forward
    model.forward = lambda tokens, seed=None: before(tokens, seed) / 2
    return model  # type: ignore[no-any-return]


def with_another_kind_of_head() -> Discriminator:
    model: Any = Discriminator(CONFIG)
    model.discriminator_predictions = nn.Sequential(nn.Linear(16, 1), nn.Flatten(0))
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "make",
    [of_a_subclass, of_a_subclass_with_its_own_loss, with_a_hook, with_a_hook_on_the_head,
     with_a_forward_put_in_its_place, with_another_kind_of_head],
    ids=lambda make: make.__name__,
)  # fmt: skip
def test_what_a_discriminator_is_called_for_is_what_it_trains(make: Any) -> None:
    model, replaced_T = make().eval(), torch.arange(8) % 2 == 0
    judged, wanted = model.judge(BATCH, replaced_T), model(BATCH)
    torch.testing.assert_close(judged.logits_T, wanted)
    loss = nn.functional.binary_cross_entropy_with_logits(wanted, replaced_T.float())
    torch.testing.assert_close(judged.loss, loss + (make is of_a_subclass_with_its_own_loss))


@pytest.mark.parametrize("kind", [Discriminator, DiscriminatorPredictions])
def test_a_forward_put_into_a_class_is_what_trains(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, replaced_T, before = Discriminator(CONFIG).eval(), torch.arange(8) % 2 == 0, kind.forward
    expected = model(BATCH) / 2
    monkeypatch.setattr(kind, "forward", lambda self, *arguments: before(self, *arguments) / 2)
    torch.testing.assert_close(model.judge(BATCH, replaced_T).logits_T, expected)


def test_gradients_reach_a_backward_hook_on_the_discriminator() -> None:
    model, seen = Discriminator(CONFIG).eval(), []
    model.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    model.judge(BATCH, torch.arange(8) % 2 == 0).loss.backward()
    assert seen == [(8,)]


@pytest.mark.filterwarnings("ignore:.*backward hook")
@pytest.mark.parametrize(
    "register",
    [register_module_forward_pre_hook, register_module_forward_hook, register_module_full_backward_pre_hook,
     register_module_full_backward_hook],
    ids=lambda register: register.__name__,
)  # fmt: skip
def test_hooks_on_all_modules_see_every_one(register: Any) -> None:
    """As profilers register them, who would have missed both halves and the last linear layer of the head."""
    model, seen = Electra(CONFIG, PretrainConfig(generator_layers=1, **NARROW)), set()
    ids = pack([[2, *range(5, 17), 3]])
    batch = mask_tokens(ids, range(1), seed=0, mask_id=4, special_ids=[2, 3], fraction=0.5, max_predictions=8)
    handle = register(lambda module, *values: seen.add(module) if module in names else None)
    names = {module: name for name, module in model.named_modules()}
    try:
        model(batch, 0).loss.backward()
    finally:
        handle.remove()
    called = {names[module] for module in seen}
    head = "discriminator.discriminator_predictions"
    assert {"generator", "discriminator", head, f"{head}.dense", f"{head}.dense_prediction"} <= called


def test_torchs_flop_counter_counts_each_product_where_it_is() -> None:
    """It knows by hooks on all modules which one it is in."""
    model = Discriminator(CONFIG).eval()
    with FlopCounterMode(display=False) as counter:
        model.judge(BATCH, torch.arange(8) % 2 == 0)
    counts = {place: sum(of.values()) for place, of in counter.get_flop_counts().items()}
    assert counts["Discriminator.discriminator_predictions.dense_prediction"] == 2 * 8 * 16
    assert counts["Discriminator"] == counts["Global"]


class HalvedPair(Electra):
    generator_class, discriminator_class = HalvedWords, Halved


@pytest.mark.parametrize("changes", [{}, {"disallow_correct": True}, {"temperature": 2.0}], ids=repr)
def test_pre_training_takes_the_forward_of_both_halves(changes: dict[str, Any]) -> None:
    model = HalvedPair(CONFIG, PretrainConfig(generator_layers=1, **NARROW, **changes)).eval()
    plain: Any = Electra(CONFIG, PretrainConfig(generator_layers=1, **NARROW, **changes)).eval()
    batch = mask_tokens(BATCH, [0, 1], seed=0, mask_id=4, special_ids=[2, 3, 4], fraction=0.5, max_predictions=3)
    masked, corrupted = batch.tokens.with_ids(batch.masked_ids_T), batch.tokens.with_ids
    output = model(batch, 1)
    logits_MV, originals_M = model.generator(masked, batch.masked_positions_M), batch.target_ids_M
    torch.testing.assert_close(output.mlm_loss, nn.functional.cross_entropy(logits_MV, originals_M))
    torch.testing.assert_close(output.rtd_logits_T, model.discriminator(corrupted(output.corrupted_ids_T)))
    # Halved features draw as halved logits do, from the same random numbers.
    plain.generator.output_bias.data.zero_()
    for parameter in plain.generator.generator_predictions.LayerNorm.parameters():
        parameter.data.div_(2)
    assert torch.equal(plain(batch, 1).corrupted_ids_T, output.corrupted_ids_T)
    assert output.is_replaced_T.any()


def test_pre_training_with_adapters() -> None:
    """Only the adapters learn, and they do."""
    model: Any = Electra(CONFIG, PretrainConfig(generator_layers=1, **NARROW))
    model.requires_grad_(False)
    adapters = []
    for layer in model.discriminator.encoder.layers:
        for parent, name in ((layer.attention, "qkv"), (layer.attention, "dense"), (layer, "output")):
            adapter = LoRA(getattr(parent, name))
            adapter.down, adapter.up = nn.Parameter(adapter.down), nn.Parameter(adapter.up)
            setattr(parent, name, adapter)
            adapters.append(adapter)
    batch = mask_tokens(BATCH, [0, 1], seed=0, mask_id=4, special_ids=[2, 3, 4], fraction=0.15, max_predictions=3)
    model.train()(batch, 1).loss.backward()
    assert all(adapter.down.grad.abs().max() > 0 and adapter.base.weight.grad is None for adapter in adapters)
