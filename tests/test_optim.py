"""Optimizers against formulas written out in NumPy, groups and schedules against the recipe."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from electra_core import muon, optim
from electra_core.adam import ElectraAdam
from electra_core.config import PRESETS, EncoderConfig, PretrainConfig
from electra_core.electra import Discriminator, Electra
from electra_core.execution.capture import capturing
from electra_core.muon import Muon, orthogonalise

TINY = EncoderConfig(
    vocab_size=50, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=48, max_position_embeddings=16,
)  # fmt: skip
PRETRAIN = PretrainConfig(
    generator_hidden_size=8, generator_attention_heads=1, generator_intermediate_size=16, generator_layers=2
)


def matrices(dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (5,), (33, 16), (1,), (3, 3)]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 10.0 ** (step - 2)


@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "formulas"])
def test_electra_adam_is_the_formula(fused: bool) -> None:
    params = matrices(torch.float64)
    expected = [p.detach().numpy().copy() for p in params]
    m, v = [np.zeros_like(e) for e in expected], [np.zeros_like(e) for e in expected]
    optimizer = ElectraAdam(params, lr=0.1, fused=fused)  # what else it is given by default is the original's
    for step in range(5):
        gradients(params, step)
        optimizer.step()
        for i, p in enumerate(params):
            g = p.grad.numpy()
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            expected[i] = expected[i] - 0.1 * (m[i] / (np.sqrt(v[i]) + 1e-6) + 0.01 * expected[i])
            np.testing.assert_allclose(p.detach().numpy(), expected[i], rtol=1e-12, atol=1e-12)


def test_kernel_and_formulas_agree_in_fp32() -> None:
    ours, plain = matrices(), matrices()
    fast, slow = ElectraAdam(ours, fused=True), ElectraAdam(plain, fused=False)
    for step in range(4):
        for params, optimizer in ((ours, fast), (plain, slow)):
            gradients(params, step)
            optimizer.step()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["kernel", "formulas", "muon"])
def test_a_gradient_scaler_changes_nothing_but_the_scale(kind: str) -> None:
    runs = []
    for enabled in (False, True):
        params = matrices()
        if kind == "muon":
            groups = [{"params": [("w", params[0])], "muon": True}, {"params": [("b", params[1])]}]
            optimizer: ElectraAdam = Muon(groups, lr=0.1, eps=1e-2)
        else:
            optimizer = ElectraAdam(params, lr=0.1, eps=1e-2, fused=kind == "kernel")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        for _ in range(3):
            scaler.scale(sum((p * p).sum() for p in params[:2])).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        runs.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))  # by a power of two: not a bit is rounded
    assert not torch.equal(runs[0][0], matrices()[0])


def test_the_formulas_drop_a_step_that_is_not_finite_as_the_kernel_does() -> None:
    params = matrices()[:1]
    optimizer: Any = ElectraAdam(params, fused=False)
    gradients(params, 2)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    before = [t.clone() for t in (*params, *optimizer.state[params[0]].values())]
    params[0].grad = torch.full_like(params[0], torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    after = (*params, *optimizer.state[params[0]].values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(params[0], matrices()[0])


def test_a_learning_rate_tensor_is_written_in_place() -> None:
    params = matrices()
    rate = torch.tensor(0.0)
    optimizer = ElectraAdam(params, lr=rate)
    before = [p.detach().clone() for p in params]
    gradients(params, 0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True)), "a rate of zero moves nothing"
    optim.set_learning_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.5
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_groups_without_a_scale_of_their_own_learn_at_the_rate() -> None:
    """As in an optimizer of torch over a model's parameters."""
    optimizer = torch.optim.AdamW(matrices(), fused=True)
    optim.set_learning_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5
    optim.make_capturable(optimizer, torch.device("cpu"))
    optim.set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"].item() == 0.25


@pytest.mark.parametrize("betas", [(1.0, 0.999), (0.9, -0.1)])
def test_either_beta_out_of_range_is_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="betas: expected two numbers"):
        ElectraAdam(matrices(), betas=betas)


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a finite number, not negative, got {value}"):
        ElectraAdam([nn.Parameter(torch.ones(1))], **{name: value})


def test_nothing_to_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="parameters: expected at least one with a gradient, got none"):
        optim.clip_gradients([nn.Parameter(torch.ones(1))], 1.0)


def test_a_closure_computes_the_gradients_and_its_loss_is_handed_back() -> None:
    """As with torch's own optimizers."""
    parameter = nn.Parameter(torch.tensor([3.0]))
    optimizer = ElectraAdam([parameter], lr=0.1)

    def closure() -> torch.Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == 9.0 and parameter.item() < 3.0


def test_parameters_without_gradient_are_left_alone() -> None:
    params = matrices()
    gradients(params, 0)
    params[2].grad = None
    before = params[2].detach().clone()
    optimizer = ElectraAdam(params)
    optimizer.step()
    assert torch.equal(params[2], before) and params[2] not in optimizer.state


@pytest.mark.parametrize("fast_bf16", [True, False])
def test_orthogonalise_keeps_directions_and_flattens_the_spectrum(
    fast_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "has_fast_bf16", lambda: fast_bf16)
    torch.manual_seed(0)
    for rows, columns in [(16, 16), (48, 16), (16, 64)]:
        g = torch.randn(3, rows, columns, dtype=torch.float64)
        out = orthogonalise(g)
        singular = torch.linalg.svdvals(out)
        assert 0.3 < singular.min() and singular.max() < 1.3
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        rotated = u.mT @ out @ vh.mT  # diagonal if the singular vectors are unchanged
        off_diagonal = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
        assert off_diagonal.abs().max() < 1e-8
        rounded = orthogonalise(g.float())  # in bf16 where the processor is fast at it
        assert rounded.dtype == torch.float32 and (rounded - out).norm() < 0.03 * out.norm()
        large_beside_small = torch.stack((g[0], 1e-3 * g[1]))
        torch.testing.assert_close(orthogonalise(large_beside_small), out[:2], rtol=1e-3, atol=1e-3)


def test_muon_takes_the_three_parts_of_qkv_one_by_one() -> None:
    """Updating a fused qkv is updating query, key and value as matrices of their own."""
    torch.manual_seed(0)
    start, grad = torch.randn(24, 8), torch.randn(24, 8)
    fused = nn.Parameter(start.clone())
    parts: list[Any] = [nn.Parameter(part.clone()) for part in start.chunk(3)]
    fused.grad = grad.clone()
    for p, g in zip(parts, grad.chunk(3), strict=True):
        p.grad = g.clone()
    one = [{"params": [("x.qkv.weight", fused)], "muon": True}]
    three = [{"params": [(name, p) for name, p in zip("qkv", parts, strict=True)], "muon": True}]
    for groups in (one, three):
        optimizer = Muon(groups, lr=0.02)
        for _ in range(3):
            optimizer.step()
    torch.testing.assert_close(fused, torch.cat(parts))
    whole = [{"params": [("x.dense.weight", other := nn.Parameter(start.clone()))], "muon": True}]
    other.grad = grad.clone()
    Muon(whole, lr=0.02).step()
    assert not torch.allclose(other, fused, atol=1e-4)


def test_muon_by_hand() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(32, 8, dtype=torch.float64))
    expected, buffer = p.detach().clone(), torch.zeros(32, 8, dtype=torch.float64)
    optimizer = Muon([{"params": [("w", p)], "muon": True}], lr=0.02, weight_decay=0.1)
    for _ in range(2):  # the first does not show the momentum, which is a mere factor there
        p.grad = torch.randn(32, 8, dtype=torch.float64)
        optimizer.step()
        buffer = 0.95 * buffer + p.grad
        step = 2.0 * orthogonalise((p.grad + 0.95 * buffer)[None])[0]  # sqrt(32 / 8)
        expected = expected - 0.02 * (step + 0.1 * expected)
        torch.testing.assert_close(p.detach(), expected)


def test_a_group_that_is_added_later_is_adam_s() -> None:
    """As torch's optimizers take further groups: layers that are trained from some step on."""
    later, alone = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([{"params": [("w", nn.Parameter(torch.ones(2, 2)))], "muon": True}], lr=0.1)
    optimizer.add_param_group({"params": [("later", later)]})
    later.grad = alone.grad = torch.full((2, 2), 0.5)
    optimizer.step()
    ElectraAdam([alone], lr=0.1).step()
    assert torch.equal(later, alone) and optimizer.param_groups[1]["muon"] is False


@pytest.mark.parametrize("name", ["electra-adam", "adamw", "muon"])
def test_state_round_trips_bit_for_bit(name: str) -> None:
    config = dataclasses.replace(PRETRAIN, optimizer=name)
    model, twin = Electra(TINY, config), Electra(TINY, config)
    optimizer, restored = optim.build_optimizer(model, config), optim.build_optimizer(twin, config)
    assert optim.state_tensors(optimizer) == {}
    for step in range(4):
        if step == 2:
            twin.load_state_dict(model.state_dict())
            optim.load_state_tensors(restored, optim.state_tensors(optimizer))
        for m, o in ((model, optimizer), (twin, restored))[: 1 + step // 2]:
            gradients(list(m.parameters()), step)
            optim.set_learning_rate(o, 1e-3)
            o.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    optim.load_state_tensors(restored, {})  # that of a run before its first step
    assert optim.state_tensors(restored) == {}


def test_state_of_a_stranger_is_refused() -> None:
    optimizer = ElectraAdam([("weight", nn.Parameter(torch.zeros(2, 3)))])
    with pytest.raises(ValueError, match="'bias'"):
        optim.load_state_tensors(optimizer, {"bias/exp_avg": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"weight/exp_avg expected \[2, 3\], got \[3, 2\]"):
        optim.load_state_tensors(optimizer, {"weight/exp_avg": torch.zeros(3, 2)})


def test_every_trained_parameter_is_in_exactly_one_group() -> None:
    for name in ("electra-adam", "adamw", "muon"):
        config = dataclasses.replace(PRETRAIN, optimizer=name)
        model = Electra(TINY, config)
        optimizer = optim.build_optimizer(model, config)
        ours = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in ours} == {id(p) for p in model.parameters()}
        assert len(ours) == len(list(model.parameters()))


def test_muon_takes_the_matrices_of_layers_and_nothing_else() -> None:
    config = dataclasses.replace(PRETRAIN, optimizer="muon")
    optimizer = optim.build_optimizer(Electra(TINY, config), config)
    names = [n for g in optimizer.param_groups if g["muon"] for n in g["param_names"]]
    assert len(names) == 2 * 2 * 4  # two models, two layers; qkv, dense, intermediate, output
    assert all(n.endswith("weight") and ".layers." in n and "norm" not in n for n in names)
    optim.set_learning_rate(optimizer, PRETRAIN.learning_rate / 2)
    rates = {g["muon"]: g["lr"] for g in optimizer.param_groups}
    assert rates == {True: pytest.approx(0.01), False: pytest.approx(PRETRAIN.learning_rate / 2)}


def test_layerwise_decay_without_an_encoder_by_that_name_is_refused() -> None:
    body = Discriminator(TINY).encoder
    settings: dict[str, Any] = {"learning_rate": 1.0, "weight_decay": 0.0, "layerwise_decay": 0.5}
    for model in (nn.ModuleDict({"body": body}), nn.Linear(2, 2)):
        with pytest.raises(
            ValueError, match="model: layerwise_decay needs the model's layers under an attribute `encoder`"
        ):
            optim.parameter_groups(model, num_layers=2, **settings)
    inside = nn.ModuleDict({"model": Discriminator(TINY)})
    with pytest.raises(ValueError, match="num_layers: required, because the model has no `encoder`"):
        optim.parameter_groups(inside, **settings)
    scales = {group["lr_scale"] for group in optim.parameter_groups(inside, num_layers=2, **settings)}
    assert scales == {1.0, 0.5, 0.25, 0.125}


def test_frozen_parameters_are_not_trained() -> None:
    model = Discriminator(TINY)
    model.encoder.embeddings.requires_grad_(False)
    groups = optim.parameter_groups(model, learning_rate=1.0, weight_decay=0.01)
    assert not any("embeddings." in name for g in groups for name, _ in g["params"])


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_clipping_is_exact(size: float) -> None:
    params = matrices(torch.float64)
    for p in params[:-1]:
        p.grad = torch.ones_like(p) * size
    count = sum(p.numel() for p in params[:-1])
    norm = optim.clip_gradients(params, 1.0)
    assert norm.item() == pytest.approx(size * count**0.5, rel=1e-12)
    after = torch.cat([p.grad.flatten() for p in params[:-1]]).norm().item()
    assert after == pytest.approx(min(1.0, size * count**0.5), rel=1e-12)


def test_linear_schedule() -> None:
    rates = [optim.linear_schedule(step, 1.0, 10, 2) for step in range(11)]
    assert rates == pytest.approx([0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0])
    assert optim.linear_schedule(0, 1.0, 10, 0) == 1.0


@pytest.mark.parametrize("name", ["electra-adam", "adamw", "muon"])
def test_the_optimizer_has_the_numbers_of_the_configuration(name: str) -> None:
    numbers = {"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 0.125, "weight_decay": 0.25}
    config = dataclasses.replace(PRETRAIN, optimizer=name, learning_rate=0.0625, **numbers)
    groups = optim.build_optimizer(Electra(TINY, config), config).param_groups
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.5, 0.75), 0.125)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25}
    assert {group["lr"] for group in groups if not group.get("muon")} == {0.0625}


def test_presets_build_their_optimizer() -> None:
    preset = PRESETS["tiny"]
    optimizer = optim.build_optimizer(Electra(preset.discriminator, preset.pretrain), preset.pretrain)
    assert isinstance(optimizer, ElectraAdam) and optimizer.defaults["eps"] == 1e-6


@pytest.mark.gpu
def test_kernel_on_a_gpu_is_the_formula_and_follows_the_rate_in_a_graph() -> None:
    ours = [nn.Parameter(p.detach().cuda()) for p in matrices()]
    plain = matrices()
    rate = torch.tensor(1e-2, device="cuda")
    fast, slow = ElectraAdam(ours, lr=rate), ElectraAdam(plain, lr=1e-2, fused=False)
    for params in (ours, plain):
        gradients_of(params, 0)
    fast.step()  # makes the state, outside of the graph
    slow.step()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, torch.cuda.graph_pool_handle()):
        fast.step()
    for scale in (1e-2, 5e-3, 0.0):
        optim.set_learning_rate(fast, scale)
        optim.set_learning_rate(slow, scale)
        graph.replay()
        slow.step()
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_muon_on_a_gpu_is_close_to_muon_in_fp32() -> None:
    torch.manual_seed(0)
    start, grad = torch.randn(96, 32), torch.randn(96, 32)
    results = []
    for device in ("cpu", "cuda"):
        p = nn.Parameter(start.clone().to(device))
        p.grad = grad.to(device)
        Muon([{"params": [("x.qkv.weight", p)], "muon": True}], lr=0.02).step()
        results.append(p.detach().cpu() - start)
    assert (results[0] - results[1]).norm() / results[0].norm() < 0.05  # bf16 products


def gradients_of(params: list[Any], step: int) -> None:
    """`gradients`, on whatever device the parameters are."""
    twins = matrices()
    gradients(twins, step)
    for p, twin in zip(params, twins, strict=True):
        p.grad = twin.grad.to(p.device)
