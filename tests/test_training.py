"""The loop that pre-training and fine-tuning share: steps that are not finite, and what the host waits for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from electra_core.adam import ElectraAdam
from electra_core.config import PRESETS
from electra_core.execution.engine import static_steps
from electra_core.optim import build_optimizer, state_tensors
from electra_core.training import LateNumber, Loop, StepResult, training_steps


def small_network() -> nn.Module:
    """Matrices that Muon takes (inside `layers`), and biases that it does not."""
    torch.manual_seed(0)
    network = nn.Module()
    network.layers = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    return network


def everything(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in state_tensors(optimizer).items()}
    return state | {name: p.detach().clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("optimizer", ["muon", "electra-adam", "adamw"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(optimizer: str, poison: float) -> None:
    config = PRESETS["tiny"].pretrain
    network = nn.ModuleDict({"net": small_network()})
    optimizer_ = build_optimizer(network, type(config)(**(vars(config) | {"optimizer": optimizer})))
    bad = {1, 3}

    def loss_function(step: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss = network["net"].layers(torch.ones(3, 4)).square().mean()  # type: ignore[operator]
        return (loss * poison if step in bad else loss), {}

    before: dict[str, Tensor] = {}
    results: list[StepResult] = []
    for result in training_steps(
        Loop(network, optimizer_, loss_function, schedule=lambda step: 0.01, steps=5, seed=0, clip_norm=1.0),
        lambda step: [step],
    ):  # fmt: skip
        after = everything(network, optimizer_)
        if result.step - 1 in bad:
            assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in after)
        elif before:
            assert all(not torch.equal(after[n], before[n]) for n in after if "weight" in n and "/step" not in n)
        before = after
        results.append(result)
    assert [bool(result.skipped) for result in results] == [False, True, False, True, False]


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is() -> None:
    parameter = nn.Parameter(torch.ones(1))
    loop = Loop(
        nn.ParameterList([parameter]), ElectraAdam([parameter]),
        lambda part, seed: (parameter.sum() + math.inf, {}),
        schedule=lambda step: 0.1, steps=3, seed=0, clip_norm=1.0,
    )  # fmt: skip
    result = next(training_steps(loop, lambda step: [step]))
    assert result.skipped and result.gradient_norm == 1.0 and parameter.item() == 1.0


def test_every_step_is_taken_at_the_rate_of_the_schedule() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = ElectraAdam([parameter], lr=9.0, betas=(0.0, 0.0), weight_decay=0.0)  # moves by the rate
    rates, moved = [0.0, 0.5, 0.25], []
    loop = Loop(
        nn.ParameterList([parameter]), optimizer, lambda part, seed: (parameter.sum(), {}),
        schedule=lambda step: rates[step], steps=3, seed=0, clip_norm=1.0,
    )  # fmt: skip
    for result in training_steps(loop, lambda step: [step]):
        moved.append(1.0 - parameter.item())
        assert result.learning_rate == rates[result.step - 1]
    assert moved == pytest.approx([0.0, 0.5, 0.75], rel=1e-5)


def test_an_optimizer_that_cannot_drop_a_step_itself() -> None:
    """Its step is left out; in fixed shapes, where nothing may wait for the device, it is refused."""
    network = nn.Linear(4, 8)
    optimizer = torch.optim.SGD(
        [{"params": [network.weight]}, {"params": [network.bias], "lr_scale": 0.5}], momentum=0.9
    )
    loop = Loop(
        network, optimizer, lambda factor, seed: (network(torch.ones(4)).sum() * factor, {}),
        schedule=lambda step: 0.01, steps=4, seed=0, clip_norm=1.0,
    )  # fmt: skip
    moved, before = [], network.weight.clone()
    for result in training_steps(loop, lambda step: [math.nan if step == 1 else 1.0]):
        moved.append(not torch.equal(network.weight, before))
        before = network.weight.detach().clone()
        assert bool(result.skipped) == (result.step == 2)
    assert moved == [True, False, True, True] and network.weight.isfinite().all()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.005]
    with pytest.raises(ValueError, match=r"optimizer: expected .* fixed shapes .* got SGD; .*_step_supports_amp"):
        next(static_steps(loop, lambda step: [1.0], shapes=None, device=torch.device("cpu"), capture=False))  # type: ignore[arg-type]


def test_a_dropped_step_is_not_heeded_afterwards() -> None:
    """Whoever goes on with the optimizer in a loop of their own would else never move again."""
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = ElectraAdam([parameter], lr=0.1)
    loop = Loop(
        nn.ParameterList([parameter]), optimizer, lambda part, seed: (parameter.sum() * part, {}),
        schedule=lambda step: 0.1, steps=3, seed=0, clip_norm=1.0,
    )  # fmt: skip
    steps = training_steps(loop, lambda step: [1.0 if step < 2 else math.nan])
    assert [bool(result.skipped) for result in steps] == [False, False, True]
    before = parameter.item()
    parameter.sum().backward()
    optimizer.step()
    assert parameter.item() < before


def test_a_figure_of_some_parts_is_summed_over_these() -> None:
    """As one of the rare labels is, which the last part need not hold."""
    parameter = nn.Parameter(torch.ones(1))
    loop = Loop(
        nn.ParameterList([parameter]), ElectraAdam([parameter]),
        lambda part, seed: (parameter.sum(), {part: torch.tensor(2.0)}),
        schedule=lambda step: 0.1, steps=1, seed=0, clip_norm=1.0,
    )  # fmt: skip
    (result,) = training_steps(loop, lambda step: ["often", "rarely", "often"])
    assert result.figures == {"often": 4.0, "rarely": 2.0} and result.loss == 3.0


@pytest.mark.parametrize(
    ("trained", "parts", "message"), [(False, [0], "model: expected a parameter"), (True, [], "batches: expected")]
)
def test_nothing_to_train_and_nothing_to_train_on_are_refused(
    trained: bool, parts: list[int], message: str
) -> None:
    network = small_network().requires_grad_(trained)
    loop = Loop(
        network, ElectraAdam([nn.Parameter(torch.ones(1))]), lambda part, seed: (torch.ones(()), {}),
        schedule=lambda step: 0.01, steps=1, seed=0, clip_norm=1.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        next(training_steps(loop, lambda step: parts))


def test_a_number_on_the_host_is_read_at_once() -> None:
    late = LateNumber()
    assert [late.read(torch.tensor(float(i))) for i in range(3)] == [0, 1, 2]


@pytest.mark.gpu
def test_a_number_on_a_gpu_is_read_one_call_later() -> None:
    late = LateNumber()
    assert [late.read(torch.tensor(float(i + 1), device="cuda")) for i in range(4)] == [0, 1, 2, 3]
