"""Parameter groups, learning rates, gradient clipping, and the optimizer state that a checkpoint keeps.

The optimizers themselves are the original's Adam (`adam.py`) and, for hidden matrices, Muon (`muon.py`). A group's
`lr` is the schedule's rate times its `lr_scale` (`set_learning_rate`), which is 1 without layer-wise decay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from electra_core.adam import ElectraAdam
from electra_core.config import PretrainConfig
from electra_core.execution.sharding import is_sharded, local, norm_over_shards, placed_like
from electra_core.muon import Muon


def learning_rate(step: int, peak: float, steps: int, warmup_steps: int) -> float:
    """The original's schedule: peak (1 - t/steps) min(1, t/warmup), t = `step` from 0.

    The decay runs during the warm-up too (so the peak is never quite reached), and the first update is zero.
    """
    warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return peak * max(0.0, 1.0 - step / steps) * warmup


def linear_schedule(step: int, peak: float, steps: int, warmup_steps: int) -> float:
    """Fine-tuning's usual schedule: up to `peak` over `warmup_steps`, then linearly down to 0 at `steps`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * max(0.0, (steps - step) / max(1, steps - warmup_steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float | Tensor) -> None:
    """Sets every group's rate to `lr_scale` times `rate`; in place where rates are tensors."""
    if (rates := getattr(optimizer, "rates", None)) is not None:
        torch.mul(rates[1], rate, out=rates[0])  # in one launch; fine-tuning has two groups for every layer
        return
    for group in optimizer.param_groups:
        scale = group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate).mul_(scale)
        else:
            group["lr"] = rate * scale


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Turns rates into fp32 tensors on `device`, so that a captured step reads what was last written to them.

    They are views of one tensor, `optimizer.rates[0]`; `rates[1]` holds every group's `lr_scale`.
    """
    groups = optimizer.param_groups
    scales = torch.tensor([group.get("lr_scale", 1.0) for group in groups], dtype=torch.float32, device=device)
    rates = torch.tensor([float(group["lr"]) for group in groups], dtype=torch.float32, device=device)
    optimizer.rates = rates, scales  # type: ignore[attr-defined]
    for group, rate in zip(groups, rates.unbind()):
        group["lr"] = rate
        if "capturable" in group:  # torch's own optimizers require it
            group["capturable"] = True


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients so that their norm as one vector is at most `max_norm`, in place.

    The factor is exactly max_norm / max(norm, max_norm), as in the original (torch's divides by norm + 1e-6).

    Returns:
        The norm before clipping, a scalar on the gradients' device; nothing waits for it.

    Raises:
        ValueError: no parameter has a gradient.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    if not with_gradient:
        raise ValueError("parameters: expected at least one with a gradient, got none")
    norm = gradient_norm(with_gradient)
    gradients = [local(p.grad) for p in with_gradient]  # type: ignore[arg-type]
    torch._foreach_mul_(gradients, max_norm / norm.clamp(min=max_norm))
    return norm


def gradient_norm(with_gradient: Sequence[nn.Parameter]) -> Tensor:
    """Scalar on the gradients' device: the norm of all gradients as one vector, in their precision."""
    gradients = [local(p.grad) for p in with_gradient]  # type: ignore[arg-type]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm_over_shards(norm) if any(is_sharded(p) for p in with_gradient) else norm


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    layerwise_decay: float | None = None,
    num_layers: int | None = None,
    original_depths: bool = False,
) -> list[dict[str, Any]]:
    """Groups parameters by weight decay and learning rate, ready for an optimizer.

    Biases and LayerNorm (everything with one dimension) get no weight decay. With `layerwise_decay` d and n
    layers, heads learn at the full rate, the top layer at d times it, each layer below at d times the one above,
    and the embeddings at d^(n + 1). What an encoder of one's own adds learns as its top layer does, or as the
    embeddings if its name begins with `embeddings`.

    Args:
        model: with `layerwise_decay`, its encoder must be an attribute named `encoder`.
        num_layers: n; read from `model.encoder` if None.
        original_depths: use the original's table, with the top layer at d^2 and embeddings at d^(n + 2).

    Returns:
        Groups with `params` (name, parameter), `lr`, `lr_scale` and `weight_decay`.

    Raises:
        ValueError: `layerwise_decay` for a model without an attribute `encoder` somewhere in it.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    if layerwise_decay is not None:
        if not any("encoder" in name.split(".") for name, _ in model.named_parameters()):
            raise ValueError(
                "model: layerwise_decay needs the model's layers under an attribute `encoder`, found none"
            )
        if num_layers is None:
            num_layers = _number_of_layers(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if layerwise_decay is not None:
            assert num_layers is not None
            scale = layerwise_decay ** _levels_below_head(name, num_layers, original_depths)
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = {"params": [], "lr": learning_rate * scale, "lr_scale": scale, "weight_decay": decay}
        groups.setdefault((scale, decay), group)["params"].append((name, parameter))
    return list(groups.values())


def _number_of_layers(model: nn.Module) -> int:
    """Number of layers of `model.encoder`."""
    if not hasattr(model, "encoder"):
        raise ValueError("num_layers: required, because the model has no `encoder` to take it from")
    return int(model.encoder.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]


def _levels_below_head(name: str, num_layers: int, original_depths: bool) -> int:
    """0 for a head; 1 (in the original 2) for the encoder's top layer and for what is not known to lie below it,
    and one more for each layer below."""
    parts = name.split(".")
    if "encoder" not in parts:
        return 0
    below = parts[parts.index("encoder") + 1 :]
    if below[0] == "layers":
        depth = int(below[1]) + 1
    else:  # embeddings and their projection, or an own encoder's final LayerNorm, say
        depth = 0 if below[0].startswith("embeddings") else num_layers
    return num_layers + (2 if original_depths else 1) - depth


def build_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over the model's parameter groups; rates are set at every step."""
    groups = parameter_groups(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "muon":
        return Muon(_with_muon(groups, config), **settings)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    return ElectraAdam(groups, **settings)


def _with_muon(groups: list[dict[str, Any]], config: PretrainConfig) -> list[dict[str, Any]]:
    """Moves the matrices inside layers into separate groups with Muon's rate."""
    scale = config.muon_learning_rate / config.learning_rate
    for_hidden = {"lr": config.muon_learning_rate, "lr_scale": scale, "muon": True}
    split = []
    for group in groups:
        others: list[Any] = []
        hidden: list[Any] = []
        for name, p in group["params"]:
            (hidden if ".layers." in name and p.ndim == 2 else others).append((name, p))
        split += [group | {"params": others}, group | for_hidden | {"params": hidden}]
    return [group for group in split if group["params"]]


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's whole state as flat tensors named "<parameter>/<state>"; empty before the first step.

    Hyper-parameters are not included: they come from the run's configuration, rates from its schedule.
    """
    tensors = {}
    for name, parameter in _named(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value
    return tensors


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores what `state_tensors` returned, bit for bit, on each parameter's device.

    Raises:
        ValueError: a tensor for a parameter that the optimizer does not have, or of another shape.
    """
    parameters = dict(_named(optimizer))
    state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("/", 1)
        if name not in parameters:
            raise ValueError(f"tensors: state for {name!r}, which the optimizer does not train")
        parameter = parameters[name]
        if value.ndim and value.shape != parameter.shape:
            expected, got = list(parameter.shape), list(value.shape)
            raise ValueError(f"tensors: {full_name} expected {expected}, got {got}")
        state[parameter][key] = placed_like(value.clone(), parameter)
    optimizer.state.clear()
    optimizer.state.update(state)


def _named(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, nn.Parameter]]:
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]
        yield from zip(names, group["params"])
