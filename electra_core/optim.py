"""Optimizers, parameter groups and schedules.

`ElectraAdam` is the original's Adam (google-research/electra, model/optimization.py):

    m = beta1 m + (1 - beta1) g
    v = beta2 v + (1 - beta2) g^2
    p = p - lr (m / (sqrt(v) + eps) + decay p)

There is **no bias correction**. Adam as published divides m by (1 - beta1^t) and v by (1 - beta2^t); here
the first updates are about sqrt(0.001)^-1 * 0.1 = 3.2 times as long as Adam's, which the warm-up absorbs.

`Muon` (Jordan et al. 2024, kellerjordan.github.io/posts/muon) moves hidden matrices along the nearest
orthogonal matrix to their momentum; every other parameter stays on `ElectraAdam`.

A group's `lr_scale` times the schedule's rate is its `lr` (`set_learning_rate`): 1 without layer-wise decay.

Where the attribute `found_inf`, a scalar on the parameters' device, is 1, `step` changes nothing: torch's
convention for fused optimizers, by which a step is dropped without waiting for the device. The other half of it
is `grad_scale`, which `step` divides gradients by: `torch.amp.GradScaler` sets both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from electra_kernels.fast_bf16 import has_fast_bf16, has_gpu_bf16
from torch import Tensor, nn

from electra_core.config import PretrainConfig
from electra_core.distributed import is_sharded, local, norm_over_shards, placed_like


def learning_rate(step: int, peak: float, steps: int, warmup_steps: int) -> float:
    """The original's schedule: peak (1 - t/T) min(1, t/warmup), t = `step` from 0.

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
    """Gives every group its `lr_scale` times `rate`; where rates are tensors, in place."""
    if (rates := getattr(optimizer, "rates", None)) is not None:
        torch.mul(rates[1], rate, out=rates[0])  # all groups in one launch; fine-tuning has one for every layer
        return
    for group in optimizer.param_groups:
        scale = group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate).mul_(scale)
        else:
            group["lr"] = rate * scale


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Rates become fp32 tensors on `device`, so that a captured step reads what was last written to them.

    They are views of one tensor, `optimizer.rates[0]`; `rates[1]` holds every group's `lr_scale`.
    """
    groups = optimizer.param_groups
    scales = torch.tensor([group.get("lr_scale", 1.0) for group in groups], dtype=torch.float32, device=device)
    rates = torch.tensor([float(group["lr"]) for group in groups], dtype=torch.float32, device=device)
    optimizer.rates = rates, scales  # type: ignore[attr-defined]
    for group, rate in zip(groups, rates.unbind()):
        group["lr"] = rate
        if "capturable" in group:  # torch's own ask for it
            group["capturable"] = True


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients so that their norm as one vector is at most `max_norm`, in place.

    By max_norm / max(norm, max_norm), exactly, as the original does (torch's own divides by norm + 1e-6).

    Returns:
        The norm before, a scalar on the gradients' device; nothing waits for it.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = gradient_norm(with_gradient)
    gradients = [local(p.grad) for p in with_gradient]  # type: ignore[arg-type]
    torch._foreach_mul_(gradients, max_norm / norm.clamp(min=max_norm))
    return norm


def gradient_norm(with_gradient: Sequence[nn.Parameter]) -> Tensor:
    """Of all gradients as one vector, in their precision; a scalar on their device."""
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
    """Parameters by weight decay and learning rate, ready for an optimizer.

    Biases and LayerNorm (everything with one dimension) get no weight decay. With `layerwise_decay` d and n
    layers, heads learn at the full rate, the top layer at d, each one below at d times the next, and the
    embeddings at d^(n + 1).

    Args:
        model: with `layerwise_decay` its encoder is known by its attribute's name, `encoder`.
        num_layers: n; read from `model.encoder` if None.
        original_depths: the original's table, whose top layer is at d^2 and embeddings at d^(n + 2).

    Returns:
        Groups with `params` (name, parameter), `lr`, `lr_scale` and `weight_decay`.

    Raises:
        ValueError: `layerwise_decay` for a model without an attribute `encoder` somewhere in it.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    if layerwise_decay is not None:
        if not any("encoder" in name.split(".") for name, _ in model.named_parameters()):
            raise ValueError("model: layerwise_decay expects its layers below an attribute `encoder`, found none")
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
    """Of `model.encoder`."""
    if not hasattr(model, "encoder"):
        raise ValueError("num_layers: expected a number, because `model.encoder` is not there to be asked")
    return int(model.encoder.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]


def _levels_below_head(name: str, num_layers: int, original_depths: bool) -> int:
    """0 for a head; for the encoder 1 (or the original's 2) at the top layer, and one more for each below."""
    parts = name.split(".")
    if "encoder" not in parts:
        return 0
    below = parts[parts.index("encoder") + 1 :]
    depth = int(below[1]) + 1 if below[0] == "layers" else 0  # embeddings and their projection are depth 0
    return num_layers + (2 if original_depths else 1) - depth


class ElectraAdam(torch.optim.Optimizer):
    """The original's Adam: no bias correction, decoupled weight decay (formulas in the file's header).

    Args:
        params: parameters, or groups of them (`parameter_groups`).
        lr: learning rate; a tensor on the parameters' device if the step is captured in a CUDA graph.
        fused: True for torch's fused AdamW kernel, False for the formulas as they stand, None for the kernel
            wherever it runs. Both give the same up to rounding; the kernel reads each tensor once.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        fused: bool | None = None,
    ):
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "lr_scale": 1.0}
        super().__init__(params, defaults)
        self.fused = fused
        self._step_supports_amp_scaling = True  # torch's name for "reads found_inf"
        # The kernel divides by 1 - beta^step. An infinite step makes both corrections exactly 1.
        self._forever: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if (scale := getattr(self, "grad_scale", None)) is not None:
            gradients = [
                local(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None
            ]
            torch._foreach_div_(gradients, scale)
        for group in self.param_groups:
            self._update_group(group)
        return loss

    def _update_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        ms = [local(self.state[p]["exp_avg"]) for p in params]  # where sharded: number by number, a part is enough
        vs = [local(self.state[p]["exp_avg_sq"]) for p in params]
        grads, found_inf = [local(p.grad) for p in params], getattr(self, "found_inf", None)
        params = [local(p) for p in params]
        if self._use_kernel(params):
            _fused_adam_(params, grads, ms, vs, group, self._infinite_step(params[0].device), found_inf)
        elif not found_inf:
            _plain_adam_(params, grads, ms, vs, group)

    def _use_kernel(self, params: list[Tensor]) -> bool:
        if self.fused is not None:
            return self.fused
        return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in params)

    def _infinite_step(self, device: torch.device) -> Tensor:
        if device not in self._forever:
            self._forever[device] = torch.tensor(math.inf, device=device)
        return self._forever[device]


def _plain_adam_(
    params: list[Tensor], grads: list[Tensor], ms: list[Tensor], vs: list[Tensor], group: dict
) -> None:
    """The formulas, one tensor at a time: the specification of `_fused_adam_`."""
    beta1, beta2 = group["betas"]
    for p, g, m, v in zip(params, grads, ms, vs):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.sub_(group["lr"] * (m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p))


def _fused_adam_(
    params: list[Tensor], grads: list[Tensor], ms: list[Tensor], vs: list[Tensor], group: dict, step: Tensor,
    found_inf: Tensor | None,
) -> None:  # fmt: skip
    """The same in one pass over memory, by the kernel behind torch.optim.AdamW(fused=True)."""
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        params, grads, ms, vs, [], [step] * len(params), amsgrad=False, lr=group["lr"], beta1=beta1, beta2=beta2,
        weight_decay=group["weight_decay"], eps=group["eps"], maximize=False, found_inf=found_inf,
    )  # fmt: skip


class Muon(ElectraAdam):
    """Muon for groups with `muon=True` (given with their parameters' names), `ElectraAdam` for the others.

    For each matrix W with gradient G:

        B = momentum B + G
        U = orthogonalise(G + momentum B)          (Nesterov)
        W = W - lr (sqrt(max(1, rows / columns)) U + decay W)

    A fused [3D, D] query-key-value weight is three matrices. Matrices of one shape go through the
    Newton-Schulz iteration together.
    """

    def __init__(self, params: Iterable[Any], *args: Any, momentum: float = 0.95, **kwargs: Any):
        super().__init__(params, *args, **kwargs)
        for group in self.param_groups:
            group.setdefault("muon", False)
            group.setdefault("momentum", momentum)

    def _update_group(self, group: dict[str, Any]) -> None:
        if not group["muon"]:
            return super()._update_group(group)
        alike: dict[tuple[torch.Size, int], list[nn.Parameter]] = defaultdict(list)
        for name, p in zip(group["param_names"], group["params"]):
            if p.grad is not None:
                alike[p.shape, 3 if ".qkv." in name else 1].append(p)
        for (_, parts), params in alike.items():
            self._update_matrices(params, parts, group)

    def _update_matrices(self, params: list[Any], parts: int, group: dict[str, Any]) -> None:
        """Updates `params`, all of one shape, each holding `parts` matrices one above the other."""
        for p in params:
            if not self.state[p]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        gradients, momentum, rate = [p.grad for p in params], group["momentum"], group["lr"]
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            # With 1, 0 and 0 in place of momentum, gradient and rate, B and W below stay the same numbers.
            dropped = found_inf.bool()
            gradients = [torch.where(dropped, 0.0, g) for g in gradients]
            momentum, rate = (torch.where(dropped, *pair) for pair in ((1.0, momentum), (0.0, rate)))
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, gradients)
        ahead = torch.stack(momenta).mul_(momentum).add_(torch.stack(gradients))
        rows, columns = ahead.shape[1] // parts, ahead.shape[2]
        updates = orthogonalise(ahead.view(-1, rows, columns)).reshape(ahead.shape)
        updates *= rate * math.sqrt(max(1.0, rows / columns))
        torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        torch._foreach_sub_(params, list(updates.unbind()))


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximately U V^T of each matrix U S V^T in [B, rows, columns], by a quintic Newton-Schulz iteration.

    The coefficients trade convergence for a steep slope at 0: singular values end between about 0.7 and 1.2.
    bf16 on a GPU that has it and on processors that are fast at it, where it is enough and several times as fast.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    fast_cpu = matrices.is_cpu and matrices.dtype == torch.float32 and has_fast_bf16()
    fast_gpu = matrices.is_cuda and has_gpu_bf16(matrices.device)
    x = matrices.to(torch.bfloat16) if fast_gpu or fast_cpu else matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def build_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over the model's parameter groups; rates are set step by step."""
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
    """Moves the matrices inside layers into groups of their own, at Muon's rate."""
    scale = config.muon_learning_rate / config.learning_rate
    split = []
    for group in groups:
        hidden = [(name, p) for name, p in group["params"] if ".layers." in name and p.ndim == 2]
        others = [(name, p) for name, p in group["params"] if not (".layers." in name and p.ndim == 2)]
        if others:
            split.append(group | {"params": others})
        if hidden:
            rate = {"lr": config.muon_learning_rate, "lr_scale": scale}
            split.append(group | rate | {"params": hidden, "muon": True})
    return split


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's whole state as flat tensors named "<parameter>/<state>"; empty before the first step.

    Hyper-parameters are not in it: they come from the run's configuration, rates from its schedule.
    """
    tensors = {}
    for name, parameter in _named(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value
    return tensors


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `state_tensors` gave, bit for bit, on each parameter's device.

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
