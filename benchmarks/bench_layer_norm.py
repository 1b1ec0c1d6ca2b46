"""dropout_add_layer_norm and embedding_layer_norm against their twins and PyTorch, eager and under torch.compile.

    python -m benchmarks.bench_layer_norm [--out FILE] [--no-compile]

dropout_add_layer_norm is timed as an encoder calls it: with x_bias, and with two readers of the result that each
send back their own gradient. Without dropout, values and gradients are compared with PyTorch's in fp32 before
timing. With dropout, PyTorch draws other masks, so ours are compared with the twin. Not run on a GPU so far; on a
CPU it uses tiny shapes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from electra_kernels import dropout_add_layer_norm_twice, embedding_layer_norm
from torch import Tensor

from benchmarks.kernel_report import Result, report
from benchmarks.kernel_timing import (
    Work,
    agreeing,
    by_kernel,
    compare,
    compiled,
    one_case,
    parser,
    settle,
    twin,
)

# (T, D): ELECTRA-Small at 128 and 1024 sequences of 128 tokens, Base at 256 of 512.
GPU_SHAPES = ((16384, 256), (131072, 256), (131072, 768))
CPU_SHAPES = ((60, 32),)
EPS, WORDS = 1e-12, 30522
Step = Callable[..., Tensor | tuple[Tensor, Tensor]]


def residual_inputs(tokens: int, size: int, device: str) -> tuple[Tensor, ...]:
    """x, residual, weight, bias and x_bias as leaves (bf16 on a GPU), the two readers' gradients, the seed."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shapes = (tokens, size), (tokens, size), (size,), (size,), (size,)
    leaves = (torch.randn(*shape, device=device, dtype=dtype).requires_grad_() for shape in shapes)
    douts = torch.randn(2, tokens, size, device=device, dtype=dtype)
    return *leaves, douts, torch.tensor([1, 0], device=device)


def residual_steps(dropout_p: float) -> dict[str, Step]:
    """Forward functions of the tensors of `residual_inputs`, with results for two readers."""

    def ours(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, residual, weight, bias, x_bias, _, seed = inputs
        numbers: dict[str, Any] = {"eps": EPS, "dropout_p": dropout_p, "seed": seed}
        return dropout_add_layer_norm_twice(x, residual, weight, bias, x_bias_D=x_bias, **numbers)

    def eager(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, residual, weight, bias, x_bias, *_ = inputs
        out = F.layer_norm(F.dropout(x + x_bias, dropout_p) + residual, x.shape[1:], weight, bias, EPS)
        return out, out

    return {"ours": ours, "eager": eager}


def embedding_inputs(tokens: int, size: int, device: str) -> tuple[Tensor, ...]:
    """Three fp32 tables, weight and bias as leaves, the result's gradient, the seed, three tensors of ids."""
    shapes = (WORDS, size), (512, size), (2, size), (size,), (size,)
    leaves = (torch.randn(*shape, device=device).requires_grad_() for shape in shapes)
    ids = (torch.randint(upper, (tokens,), device=device) for upper in (WORDS, 512, 2))
    return *leaves, torch.randn(1, tokens, size, device=device), torch.tensor([1, 0], device=device), *ids


def embedding_steps(dropout_p: float) -> dict[str, Step]:
    """Forward functions of the tensors of `embedding_inputs`."""

    def ours(*inputs: Tensor) -> Tensor:
        tables, seed, ids = inputs[:5], inputs[6], inputs[7:]
        return embedding_layer_norm(*ids, *tables, eps=EPS, dropout_p=dropout_p, seed=seed)

    def eager(*inputs: Tensor) -> Tensor:
        words, positions, segments = (F.embedding(i, table) for i, table in zip(inputs[7:], inputs[:3]))
        normed = F.layer_norm(words + positions + segments, words.shape[1:], inputs[3], inputs[4], EPS)
        return F.dropout(normed, dropout_p)

    return {"ours": ours, "eager": eager}


def for_all_readers(function: Step, leaves: int) -> Callable[..., tuple[Tensor, ...]]:
    """`function`'s value and the gradients of its first `leaves` arguments; the argument after these holds the
    gradients that the readers of the value send back."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        results = function(*inputs)
        results = (results,) if isinstance(results, Tensor) else results
        return results[0].detach(), *torch.autograd.grad(results, inputs[:leaves], list(inputs[leaves]))

    return run


def residual_bytes(tokens: int, size: int, itemsize: int, dropout_p: float) -> float:
    """Reads x and residual twice and two gradients once; writes the result, ds and, with dropout, dx."""
    return float((9 if dropout_p else 8) * tokens * size * itemsize)


def embedding_bytes(tokens: int, size: int, dropout_p: float) -> float:
    """Writes the result, ds and the gradient of the table of words; reads the result's gradient and, in both
    passes, rows of words, each at most once. Positions and segments stay in the L2 cache."""
    return 4.0 * size * (3 * tokens + WORDS + 2 * min(tokens, WORDS))


def run(
    name: str,
    steps: Callable[[float], dict[str, Step]],
    inputs: tuple[Tensor, ...],
    moved: Callable[[float], float],
    options: argparse.Namespace,
) -> None:
    """Compares, then measures forward + backward, with and without dropout."""
    leaves = sum(tensor.requires_grad for tensor in inputs)
    exact = [t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs]
    for dropout_p in (0.1, 0.0):
        ours, eager = steps(dropout_p).values()
        contenders = {"ours": by_kernel(ours), "twin, eager": twin(ours), "PyTorch, eager": eager}
        if options.compile:
            contenders |= {"twin, torch.compile": twin(compiled(ours)), "PyTorch, torch.compile": compiled(eager)}
        both = {contender: for_all_readers(function, leaves) for contender, function in contenders.items()}
        wanted = for_all_readers(twin(ours) if dropout_p else eager, leaves)(*exact)
        same_masks = {c: f for c, f in both.items() if not dropout_p or not c.startswith("PyTorch")}
        case, tolerance = f"{name} p={dropout_p} both", 1e-4 if options.device == "cpu" else 3e-2
        agreed = agreeing(case, same_masks, wanted, inputs, options, tolerance)
        timed = {c: f for c, f in both.items() if c in agreed or c not in same_masks}
        compare(case, timed, inputs, options, Work(moved(dropout_p)))


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Checks, measures and prints."""
    options = settle(parser(__doc__ or "").parse_args(arguments))
    torch.manual_seed(0)
    for tokens, size in CPU_SHAPES if options.device == "cpu" else GPU_SHAPES:
        with one_case(case := f"dropout_add_layer_norm T={tokens} D={size}", options):
            inputs = residual_inputs(tokens, size, options.device)
            moved = partial(residual_bytes, tokens, size, inputs[0].element_size())
            run(case, residual_steps, inputs, moved, options)
        with one_case(case := f"embedding_layer_norm T={tokens} E={size}", options):
            inputs = embedding_inputs(tokens, size, options.device)
            run(case, embedding_steps, inputs, partial(embedding_bytes, tokens, size), options)
    return report(options)


if __name__ == "__main__":
    main()
