"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): moves each matrix along the orthogonal matrix
nearest to its momentum. Of the presets, only `tiny` uses it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from electra_kernels.fast_bf16 import has_fast_bf16, has_gpu_bf16
from torch import Tensor, nn

from electra_core.adam import ElectraAdam


class Muon(ElectraAdam):
    """Muon for groups with `muon=True` (given with their parameters' names), `ElectraAdam` for the others.

    For each matrix W with gradient G:

        B = momentum B + G
        U = orthogonalise(G + momentum B)          (Nesterov)
        W = W - lr (sqrt(max(1, rows / columns)) U + decay W)

    A fused [3D, D] query-key-value weight counts as three matrices. Matrices of the same shape go through the
    Newton-Schulz iteration together.
    """

    def __init__(self, params: Iterable[Any], *args: Any, momentum: float = 0.95, **kwargs: Any):
        super().__init__(params, *args, **kwargs)
        self.defaults |= {"muon": False, "momentum": momentum}  # also of groups that are added later
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
        """Updates `params`, all of the same shape, each `parts` matrices stacked along the rows."""
        for p in params:
            if not self.state[p]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        gradients, momentum, rate = [p.grad for p in params], group["momentum"], group["lr"]
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            # Replacing momentum, gradient and rate with 1, 0 and 0 leaves B and W below unchanged.
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
    In bf16, which is enough and several times as fast, on GPUs that have it and processors that are fast at it.
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
