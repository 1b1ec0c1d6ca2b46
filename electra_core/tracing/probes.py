"""Probes of a running pre-training step: gradients of each part of the model, and all shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from electra_core.electra import Electra


@dataclass(frozen=True)
class PartGradient:
    """How strongly each loss pulls on one part of the model: norms of the weighted losses' gradients."""

    part: str
    parameters: int
    mlm: float
    rtd: float
    both: float


@dataclass(frozen=True)
class Shape:
    """A tensor of the step, or the output of one module of the running model."""

    owner: str
    """batch | generator | discriminator"""
    name: str
    legend: str
    """The shape in the project's letters: "T D"."""
    shape: tuple[int, ...]


# ------------------------------------------------------------------------------------------------- gradients


def part_gradients(electra: Electra, mlm_loss: Tensor, rtd_loss: Tensor) -> list[PartGradient]:
    """Gradient norms of both weighted losses and of their sum, for each part of the model."""
    named = list(electra.named_parameters())
    parameters = [parameter for _, parameter in named]
    weighted = (electra.config.generator_weight * mlm_loss, electra.config.discriminator_weight * rtd_loss)
    mlm, rtd = (
        torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in weighted
    )
    shared = {id(p) for p in electra.generator.parameters()} & {id(p) for p in electra.discriminator.parameters()}
    groups: dict[str, list[int]] = {}
    for index, (name, parameter) in enumerate(named):
        groups.setdefault(_part(name, id(parameter) in shared), []).append(index)
    found = [_part_gradient(part, [mlm[i] for i in rows], [rtd[i] for i in rows]) for part, rows in groups.items()]
    return sorted(found, key=lambda gradient: ("shared" not in gradient.part, gradient.mlm == 0))


def _part(name: str, is_shared: bool) -> str:
    """Which part of the model a parameter belongs to, by its name."""
    owner, _, rest = name.partition(".")
    if rest.startswith("encoder.embeddings."):
        return "embeddings, shared" if is_shared else f"{owner}'s embeddings"
    if rest.startswith("encoder."):
        return "encoder, shared" if is_shared else f"{owner}'s encoder"
    return f"{owner}'s head"


def _part_gradient(part: str, mlm: list[Tensor], rtd: list[Tensor]) -> PartGradient:
    both = [a + b for a, b in zip(mlm, rtd)]
    return PartGradient(part, sum(g.numel() for g in both), _norm(mlm), _norm(rtd), _norm(both))


def _norm(gradients: list[Tensor]) -> float:
    return torch.stack([g.float().norm() for g in gradients]).norm().item()


# ---------------------------------------------------------------------------------------------------- shapes

# Module of a generator or discriminator -> its output in the project's letters; D is the model's own width.
_LEGENDS = {
    "encoder.embeddings": "T E",
    "encoder.embeddings_project": "T D",
    "attention.qkv": "T 3·D",
    "attention": "T D",
    "intermediate": "T F",
    "output_norm": "T D",
    "encoder": "T D",
    "generator_predictions": "M E",
    "discriminator_predictions.dense": "T D",
}


@contextmanager
def recorded_shapes(electra: Electra, found: list[Shape]) -> Iterator[None]:
    """Inside, `found` collects output shapes of the modules in `_LEGENDS`; the first layer stands for all."""
    handles = []
    for owner in ("generator", "discriminator"):
        for name, module in electra.get_submodule(owner).named_modules():
            short = name.removeprefix("encoder.layers.0.")
            if short in _LEGENDS:
                handles.append(module.register_forward_hook(_note(owner, name, _LEGENDS[short], found)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(owner: str, name: str, legend: str, found: list[Shape]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not any(shape.owner == owner and shape.name == name for shape in found):
            found.append(Shape(owner, name, legend, tuple(output.shape)))

    return hook
