"""The original's Adam (google-research/electra, model/optimization.py):

    m = beta1 m + (1 - beta1) g
    v = beta2 v + (1 - beta2) g^2
    p = p - lr (m / (sqrt(v) + eps) + decay p)

There is **no bias correction**. Adam as published divides m by (1 - beta1^t) and v by (1 - beta2^t); here
update t is (1 - beta1^t) / sqrt(1 - beta2^t) times as long as Adam's (3.2 at t = 1, at most 6.6, at t = 12; 1.3 at
t = 1000), which the warm-up absorbs.

If the attribute `found_inf`, a scalar on the parameters' device, is 1, `step` changes nothing: this is torch's
convention for fused optimizers, which skips a step without waiting for the device. The convention's other
attribute is `grad_scale`, by which `step` divides the gradients; `torch.amp.GradScaler` sets both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from electra_core.execution.sharding import local


class ElectraAdam(torch.optim.Optimizer):
    """The original's Adam: no bias correction, decoupled weight decay (formulas in the file's header).

    Args:
        params: parameters, or groups of them (`parameter_groups`).
        lr: learning rate; a tensor on the parameters' device if the step is captured in a CUDA graph.
        fused: True: torch's fused AdamW kernel; False: the formulas, operation by operation; None: the kernel
            wherever it runs. Results are equal up to rounding; the kernel reads each tensor once.
    """

    _step_supports_amp_scaling = True  # torch's name for "reads found_inf"

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
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not isinstance(value, Tensor) and not 0.0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number, not negative, got {value}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "lr_scale": 1.0}
        super().__init__(params, defaults)
        self.fused = fused
        # The kernel divides by 1 - beta^step. An infinite step makes both corrections exactly 1.
        self._forever: dict[torch.device, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along; of torch's optimizers it is groups and state alone."""
        return {**super().__getstate__(), "fused": self.fused}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """`load_state_dict` calls it, too, with groups and state alone: the rest stays."""
        super().__setstate__({"fused": None, "_forever": {}, **vars(self), **state})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
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
        ms = [local(self.state[p]["exp_avg"]) for p in params]  # the update is element-wise, so shards suffice
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
