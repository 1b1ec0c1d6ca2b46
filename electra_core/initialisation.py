"""Initial values of all parameters: one function, whose docstring is the table.

A narrow model with the original's initial values (normal, 0.02) computes next to nothing at first: with D = 128
the entries of a query are about 0.02 sqrt(128) = 0.23 in size, so all attention is uniform, and no gradient tells
a head which neighbour to look at. With `position_init = "local"`, the heads of the first two layers start by
reading the token 1, 2, ... positions before or after:

    position p starts as  (sin w_f p, cos w_f p)  for frequencies w_f from pi down to 2 pi / S
    query = rotation by w_f delta of the position, key = the position, on each head's K / 2 fastest pairs
    so  query(t) . key(s) = sum_f cos(w_f (t + delta - s)),  which peaks at s = t + delta

From there everything is trained as usual, and the file format is the same.
`docs/tiny_history.md` has the measurements.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from electra_kernels.dispatch import is_fake
from torch import Tensor, nn

from electra_core.config import EncoderConfig
from electra_core.encoder import DisentangledEmbeddings, Embeddings, Encoder, SelfAttention

Started = TypeVar("Started", bound=nn.Module)
GLOROT = ("embeddings_project", "dense_prediction", "classifier", "qa_outputs", "summary")
LOCAL_OFFSETS = (-1, 1, -2, 2, -3, 3, -4, 4)
LOCAL_LAYERS = 2
LOCAL_SHARPNESS = 1.3
"""Magnitude of the query and key weights. Positions are about a third of the LayerNormed sum, so on random text a
head of `tiny` gives its neighbour 12 to 19% of its attention (test_initialisation); uniform would be 1%."""


def initialise(
    model: nn.Module, initializer_range: float, seed: int | None, position_init: str = "normal"
) -> None:
    """Initialises every parameter in place. One seed gives the same values on every machine and torch version;
    without a seed they are drawn from torch's own random generator.

    | parameter | starts from |
    |---|---|
    | weights of linear layers and embeddings | normal(0, initializer_range), truncated at two deviations |
    | `embeddings_project`, `dense_prediction`, task heads | Glorot uniform, the original's framework's default |
    | biases | 0 |
    | LayerNorm | weight 1, bias 0 |
    | position embeddings, if position_init is "sinusoidal" | sines and cosines (Vaswani et al. 2017) |
    | the same and two layers' queries and keys, if "local" | see the header |
    | what is frozen (`requires_grad_(False)`) | as it is |
    """
    if is_fake(next(model.parameters())):
        return  # a fake tensor has no values (execution/fake_step.py)
    frozen = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
    generator = None if seed is None else torch.Generator().manual_seed(seed % 2**63)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            _truncated_normal(module.weight, initializer_range, generator)
        elif isinstance(module, nn.Linear):
            if any(part in GLOROT for part in name.split(".")):
                nn.init.xavier_uniform_(module.weight, generator=generator)
            else:
                _truncated_normal(module.weight, initializer_range, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    waves = {"sinusoidal": _slow_waves, "local": _fast_waves}.get(position_init)
    for module in model.modules():
        if isinstance(module, Embeddings) and waves is not None:
            weight_SE = module.position_embeddings.weight
            _fill_with_waves(weight_SE, waves(weight_SE), initializer_range)
        if isinstance(module, Encoder) and position_init == "local":
            _look_at_neighbours(module)
        if isinstance(module, DisentangledEmbeddings):  # the sum starts as exactly the generator's matrix
            nn.init.zeros_(module.word_embeddings.weight)
    for parameter, values in frozen:
        parameter.copy_(values)  # not skipped above, so that all others are drawn as they would be without


def started(model: Started) -> Started:
    """`model`, initialised as its config says from torch's own random generator, as torch's modules are. For a new
    model by itself: a pair of models is initialised by the class that builds the pair."""
    config: EncoderConfig = model.config  # type: ignore[assignment]
    initialise(model, config.initializer_range, None)
    return model


@torch.no_grad()
def _truncated_normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Redraws values beyond two standard deviations. PyTorch's own function gives different numbers in 2.11."""
    weight.normal_(0.0, std, generator=generator)
    if generator is None:
        _draw_again(weight.view(-1), std)
        return
    while (beyond := weight.abs() > 2 * std).any():
        again = torch.empty_like(weight).normal_(0.0, std, generator=generator)
        weight.copy_(torch.where(beyond, again, weight))


def _draw_again(flat: Tensor, std: float) -> None:
    """The same without a seed: draws only as many values as lie beyond, which takes a third of the time."""
    beyond = (flat.abs() > 2 * std).nonzero().squeeze(1)
    while len(beyond):
        again = flat.new_empty(len(beyond)).normal_(0.0, std)
        flat[beyond] = again
        beyond = beyond[again.abs() > 2 * std]


def _slow_waves(weight_SE: Tensor) -> Tensor:
    """[ceil(E / 2)] frequencies from 1 down to 1 / 10000 (Vaswani et al. 2017)."""
    return torch.exp(torch.arange(0, weight_SE.shape[1], 2) * (-math.log(10000.0) / weight_SE.shape[1]))


def _fast_waves(weight_SE: Tensor) -> Tensor:
    """[ceil(E / 2)] frequencies from pi (wavelength 2) down to 2 pi / S."""
    positions, width = weight_SE.shape
    return math.pi * (2 / positions) ** torch.linspace(0, 1, (width + 1) // 2)


@torch.no_grad()
def _fill_with_waves(weight_SE: Tensor, frequencies: Tensor, rms: float) -> None:
    """Position p becomes (sin w_0 p, cos w_0 p, sin w_1 p, ...), of root mean square `rms` if E is even."""
    angles = torch.arange(len(weight_SE))[:, None] * frequencies
    weight_SE[:, 0::2] = torch.sin(angles) * rms * math.sqrt(2)
    weight_SE[:, 1::2] = torch.cos(angles[:, : weight_SE.shape[1] // 2]) * rms * math.sqrt(2)


@torch.no_grad()
def _look_at_neighbours(encoder: Encoder) -> None:
    """Sets queries and keys of the first layers as in the header. If embeddings are projected to another width,
    the projection mixes up the positions, and the layers stay as they are."""
    if encoder.embeddings_project is not None:
        return
    frequencies = _fast_waves(encoder.embeddings.position_embeddings.weight)
    for index, layer in enumerate(list(encoder.layers)[:LOCAL_LAYERS]):
        attention: SelfAttention = layer.attention  # type: ignore[assignment]
        width = attention.num_heads * attention.head_size
        query_HKD, key_HKD, _ = attention.qkv.weight.view(3, attention.num_heads, attention.head_size, width)
        query_HKD.zero_()
        key_HKD.zero_()
        for head in range(attention.num_heads):
            offset = LOCAL_OFFSETS[(index * attention.num_heads + head) % len(LOCAL_OFFSETS)]
            _point_at(query_HKD[head], key_HKD[head], frequencies, offset)


def _point_at(query_KD: Tensor, key_KD: Tensor, frequencies: Tensor, offset: int) -> None:
    """One head's weights: keys copy K / 2 wave pairs, queries copy them rotated to position + offset."""
    for pair in range(min(len(query_KD), query_KD.shape[1]) // 2):
        sine, cosine = 2 * pair, 2 * pair + 1
        angle = float(frequencies[pair]) * offset
        key_KD[sine, sine] = key_KD[cosine, cosine] = LOCAL_SHARPNESS
        # sin w(p + d) = sin wp cos wd + cos wp sin wd;  cos w(p + d) = cos wp cos wd - sin wp sin wd
        query_KD[sine, sine] = query_KD[cosine, cosine] = LOCAL_SHARPNESS * math.cos(angle)
        query_KD[sine, cosine] = LOCAL_SHARPNESS * math.sin(angle)
        query_KD[cosine, sine] = -LOCAL_SHARPNESS * math.sin(angle)
