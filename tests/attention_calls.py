"""Calls of attention for its tests: inputs, and what one implementation makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from electra_kernels import attention, attention_reference, attention_triton, rng, use
from electra_kernels.dispatch import use_triton
from kernel_helpers import DEVICE, INTERPRETED
from torch import Tensor

SEED = torch.tensor([-1234567890123, 7])


@pytest.fixture(autouse=True)
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Under the interpreter: blocks so small that tiny sequences already make several."""
    if INTERPRETED:
        monkeypatch.setattr(attention_triton, "tile", lambda *_: attention_triton.Tile(32, 16, 1, 1))
    yield


def dropout_mask(
    tokens: int,
    keys: int,
    heads: int,
    *,
    dropout_p: float,
    seed: rng.Seed,
    stream: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """bool [heads, tokens, keys]: which probabilities attention keeps; key j is position j of the own sequence."""
    seed_2 = rng.seed_tensor(seed, device)
    if use_triton(seed_2):
        return attention_triton.dropout_mask(tokens, keys, heads, dropout_p, seed_2, stream)
    rows = torch.arange(tokens, device=device)
    return attention_reference.dropout_mask(rows, keys, heads, dropout_p, seed_2, stream)


def offsets(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def inputs(lengths: Sequence[int], heads: int = 2, head_dim: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(qkv, gradient of the output), float64 on the host, with logits large enough for a peaked softmax."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    qkv = torch.randn(tokens, 3, heads, head_dim, dtype=torch.float64, generator=generator)
    qkv[:, 0] *= 2
    return qkv, torch.randn(tokens, heads, head_dim, dtype=torch.float64, generator=generator)


def largest_logit(qkv: Tensor, lengths: Sequence[int]) -> float:
    """max |q k / sqrt(head_dim)| over all pairs of tokens of one sequence; 0 without tokens."""
    parts = (part for part in qkv.detach().split(list(lengths)) if len(part))
    extremes = [torch.aminmax(part[:, 0].transpose(0, 1) @ part[:, 1].permute(1, 2, 0)) for part in parts]
    return max((abs(score.item()) for pair in extremes for score in pair), default=0.0) / qkv.shape[-1] ** 0.5


def run(
    implementation: str,
    qkv: Tensor,
    dout: Tensor,
    lengths: Sequence[int],
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    device: str = DEVICE,
) -> tuple[Tensor, Tensor]:
    """(output, gradient of qkv) of one implementation in one dtype."""
    x = qkv.to(device, dtype).requires_grad_()
    with use(implementation):  # type: ignore[arg-type]
        out = attention(
            x,
            offsets(lengths).to(device),
            max(lengths, default=0),
            dropout_p=dropout_p,
            seed=SEED.to(device),
            stream=3,
        )
        (grad,) = torch.autograd.grad(out, x, dout.to(device, dtype))
    return out.detach(), grad
