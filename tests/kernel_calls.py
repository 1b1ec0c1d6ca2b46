"""One call of every operation, forward and backward, for what is asked of all of them alike.

That is: the same bits every time, replay in a CUDA graph, no waiting for the device, and a clean run under
compute-sanitizer (`python tests/kernel_calls.py`). Under the interpreter the shapes are tiny.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from electra_kernels import (
    attention,
    bias_gelu,
    dropout_add_layer_norm_twice,
    embedding_layer_norm,
    mlm_head,
    rtd_head,
    rtd_loss,
    sample_and_replace,
    use,
)
from kernel_helpers import DEVICE, INTERPRETED
from torch import Tensor

T = TypeVar("T")
Call = Callable[[Tensor], tuple[Tensor, ...]]
"""Seed tensor `[key, first_row]` -> results and gradients, by the Triton kernels."""

DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
DRAWING = ("attention-short", "attention-general", "mlm-narrow", "mlm-wide", "sample", "layer-norm", "embedding")
"""The calls whose results depend on the seed."""


def _normal(*shape: int, number: int = 0) -> Tensor:
    """Tensors of one shape need a number each: of equal ones neither a race nor a mix-up shows."""
    generator = torch.Generator().manual_seed(sum(shape) + 10_000 * number)
    return torch.randn(*shape, generator=generator).to(DEVICE, DTYPE).requires_grad_()


def _ids(count: int, upper: int) -> Tensor:
    return torch.randint(upper, (count,), generator=torch.Generator().manual_seed(upper)).to(DEVICE)


def _differentiated(function: Callable[[Tensor], tuple[Tensor, ...]], leaves: list[Tensor]) -> Call:
    """`function`, and the gradients that its first result sends to `leaves`."""

    def run(seed: Tensor) -> tuple[Tensor, ...]:
        with use("triton"):
            results = function(seed)
            gradients = torch.autograd.grad(results[0].float().square().sum(), leaves)
        return *(result.detach() for result in results), *gradients

    return run


def _attention(lengths: list[int]) -> Call:
    qkv = _normal(sum(lengths), 3, 2, 16 if INTERPRETED else 64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    longest = max(lengths)
    return _differentiated(lambda seed: (attention(qkv, cu_seqlens, longest, dropout_p=0.1, seed=seed),), [qkv])


def _mlm(rows: int, vocabulary: int, size: int) -> Call:
    leaves = [_normal(rows, size), _normal(vocabulary, size), _normal(vocabulary)]
    targets = _ids(rows, vocabulary)
    return _differentiated(lambda seed: tuple(mlm_head(*leaves, targets, seed=seed)), leaves)


def _sample(rows: int, vocabulary: int, tokens: int) -> Call:
    logits, ids = _normal(rows, vocabulary).detach(), _ids(tokens, vocabulary)
    positions = torch.arange(0, 2 * rows, 2, device=DEVICE)

    def run(seed: Tensor) -> tuple[Tensor, ...]:
        with use("triton"):
            return tuple(sample_and_replace(logits, ids, positions, seed=seed))

    return run


def _rtd(tokens: int, size: int) -> Call:
    leaves = [_normal(tokens, size), _normal(size), _normal(1)]
    labels = _ids(tokens, 2).bool()

    def both(_: Tensor) -> tuple[Tensor, ...]:
        head = rtd_head(*leaves, labels)
        return head.loss + rtd_loss(leaves[0][:, 0], labels), head.logits_T, head.counts

    return _differentiated(both, leaves)


def _layer_norm(tokens: int, size: int) -> Call:
    rows = [_normal(tokens, size, number=number) for number in range(2)]
    leaves = [*rows, *(_normal(size, number=number) for number in range(3))]

    def for_two_readers(seed: Tensor) -> tuple[Tensor, ...]:
        *tensors, x_bias = leaves
        first, second = dropout_add_layer_norm_twice(*tensors, eps=1e-6, x_bias_D=x_bias, dropout_p=0.1, seed=seed)
        return (first + second.square(),)

    return _differentiated(for_two_readers, leaves)


def _bias_gelu(tokens: int, size: int) -> Call:
    leaves = [_normal(tokens, size), _normal(size)]
    return _differentiated(lambda _: (bias_gelu(*leaves),), leaves)


def _embedding(tokens: int, size: int) -> Call:
    tables = [_normal(50, size), _normal(64, size), _normal(2, size)]
    leaves = [*tables, _normal(size), _normal(size, number=1)]
    ids = [_ids(tokens, upper) for upper in (50, 64, 2)]
    return _differentiated(
        lambda seed: (embedding_layer_norm(*ids, *leaves, eps=1e-6, dropout_p=0.1, seed=seed),), leaves
    )


def _sizes(gpu: T, compiled: T, interpreted: T) -> T:
    """On a GPU real shapes; on the PTX machine a few tiles, the last partial; in the interpreter tiny ones."""
    return gpu if DEVICE == "cuda" else interpreted if INTERPRETED else compiled


CALLS: dict[str, Callable[[], Call]] = {
    "attention-short": lambda: _attention(_sizes([128, 0, 77, 1], [128, 0, 77, 1], [16, 0, 9])),
    "attention-general": lambda: _attention(_sizes([512, 300], [200, 70], [40, 3])),
    "mlm-narrow": lambda: _mlm(*_sizes((300, 1000, 128), (140, 400, 128), (5, 140, 16))),
    "mlm-wide": lambda: _mlm(*_sizes((300, 1000, 768), (140, 270, 136), (5, 140, 136))),
    "sample": lambda: _sample(*_sizes((64, 5000, 300), (4, 5000, 300), (4, 140, 9))),
    "rtd": lambda: _rtd(*_sizes((2000, 256), (1104, 256), (50, 24))),
    "layer-norm": lambda: _layer_norm(*_sizes((300, 256), (300, 256), (9, 24))),
    "bias-gelu": lambda: _bias_gelu(*_sizes((300, 1024), (150, 300), (9, 24))),
    # Above 3,072 tokens PyTorch computes a table's gradient on a GPU by other kernels, which sort.
    "embedding": lambda: _embedding(*_sizes((4000, 128), (300, 128), (9, 24))),
}


def seed_of(key: int) -> Tensor:
    """The tensor that a call takes."""
    return torch.tensor([key, 0], device=DEVICE)


def main() -> None:
    """Every call once: what `make sanitize` runs under compute-sanitizer."""
    for name, make in CALLS.items():
        make()(seed_of(1))
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        print(f"{name} ran on {DEVICE}", flush=True)


if __name__ == "__main__":
    main()
