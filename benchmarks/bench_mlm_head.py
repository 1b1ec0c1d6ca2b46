"""mlm_head against its twin, stored logits (eager, torch.compile), chunks, and liger-kernel where installed.

    python -m benchmarks.bench_mlm_head [--out FILE] [--no-compile]

Every contender computes the loss, gradients and one exact draw per masked token, and returns the draw, so that no
compiler can remove it. Those without a draw say so in their names; they show what the draw costs ("tile sums
alone" is the kernel that reads the vocabulary, without the small one that merges and draws). Before timing, all
losses and gradients are compared. Not run on a GPU so far; on a CPU it uses tiny shapes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from electra_kernels import mlm_head
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
    with_gradients,
)

# (M, V, E): ELECTRA-Small's generator at 128 and 1024 sequences of 128 tokens, Base's at 256 of 512.
GPU_SHAPES = ((2458, 30522, 128), (19661, 30522, 128), (19661, 30522, 768))
CPU_SHAPES = ((24, 500, 32),)
CHUNK_ROWS = 512


Draws = tuple[Tensor, Tensor]  # the mean loss, and the ids drawn


def ours(hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, targets_M: Tensor, seed: Tensor) -> Draws:
    """Mean loss, and the draws."""
    loss_M, drawn_M = mlm_head(hidden_ME, embedding_VE, bias_V, targets_M, seed=seed)
    return loss_M.mean(), drawn_M


def tile_sums(hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, targets_M: Tensor, seed: Tensor) -> Tensor:
    """Our forward pass up to the tile sums: no loss, no draw."""
    from electra_kernels import mlm_head_triton

    tiles = -(-len(embedding_VE) // 128)
    sums = torch.empty(2, len(hidden_ME), tiles, device=hidden_ME.device)
    mlm_head_triton._kernels(hidden_ME).tile_sums(hidden_ME, embedding_VE, bias_V, (sums[0], *(sums[1],) * 2), 1.0)
    return sums


def stored(hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, targets_M: Tensor, seed: Tensor) -> Draws:
    """Stored logits, with a draw by the Gumbel trick, the cheapest exact one that torch offers."""
    logits_MV = F.linear(hidden_ME, embedding_VE, bias_V).float()
    with torch.no_grad():
        noise_MV = torch.empty_like(logits_MV).exponential_()
        drawn_M = (logits_MV - noise_MV.log()).argmax(-1)
    return F.cross_entropy(logits_MV, targets_M), drawn_M


def without_draw(
    hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, targets_M: Tensor, seed: Tensor
) -> Tensor:
    """`stored` without its draw."""
    return F.cross_entropy(F.linear(hidden_ME, embedding_VE, bias_V).float(), targets_M)


def chunked(hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, targets_M: Tensor, seed: Tensor) -> Draws:
    """`stored` over chunks of rows whose logits the backward pass recomputes."""
    total, draws = hidden_ME.new_zeros((), dtype=torch.float32), []
    for rows_RE, targets_R in zip(hidden_ME.split(CHUNK_ROWS), targets_M.split(CHUNK_ROWS)):
        loss, drawn_R = torch.utils.checkpoint.checkpoint(
            stored, rows_RE, embedding_VE, bias_V, targets_R, seed, use_reentrant=False, preserve_rng_state=False
        )
        total, draws = total + loss * len(rows_RE), [*draws, drawn_R]
    return total / len(hidden_ME), torch.cat(draws)


def liger() -> Callable[..., Tensor] | None:
    """liger-kernel's fused projection + cross-entropy (no draw), or None where it is not installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, embedding, bias, targets, seed: loss(embedding, hidden, targets, bias)


def inputs(rows: int, vocabulary: int, size: int, device: str) -> tuple[Tensor, ...]:
    """Leaves in the compute dtype (bf16 on a GPU, fp32 on a CPU), targets, seed."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    leaves = (
        (scale * torch.randn(*shape, generator=generator)).to(device, dtype).requires_grad_()
        for scale, shape in ((1.0, (rows, size)), (2 / size**0.5, (vocabulary, size)), (0.1, (vocabulary,)))
    )
    targets_M = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    return *leaves, targets_M, torch.tensor([1, 0], device=device)


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Checks, measures and prints."""
    options = settle(parser(__doc__ or "").parse_args(arguments))
    for rows, vocabulary, size in CPU_SHAPES if options.device == "cpu" else GPU_SHAPES:
        case = f"mlm_head M={rows} V={vocabulary} E={size}"
        with one_case(case, options):
            bench(case, inputs(rows, vocabulary, size, options.device), options)
    return report(options)


def bench(case: str, tensors: tuple[Tensor, ...], options: argparse.Namespace) -> None:
    """Checks and measures one shape."""
    on_gpu, (hidden_ME, embedding_VE) = options.device != "cpu", tensors[:2]
    contenders, product = contestants(on_gpu, options.compile), 2.0 * len(hidden_ME) * embedding_VE.numel()
    moved = sum(t.numel() * t.element_size() for t in tensors[:3])
    both = {name: with_gradients(function, 3) for name, function in contenders.items()}
    exact = [t.detach().float().requires_grad_() if t.is_floating_point() else t for t in tensors]
    wanted = with_gradients(chunked, 3)(*exact)  # stored, the logits in fp32 would take 10 GB
    both = agreeing(case, both, wanted, tensors, options, 3e-2 if on_gpu else 1e-3)
    forward: dict[str, Callable[..., Any]] = {name: torch.no_grad()(contenders[name]) for name in both}
    if on_gpu:
        forward["ours, tile sums alone, NO LOSS OR DRAW"] = torch.no_grad()(tile_sums)
    compare(f"{case} forward", forward, tensors, options, Work(moved, product))
    compare(f"{case} both", both, tensors, options, Work(3 * moved, 3 * product))


def contestants(on_gpu: bool, compiles: bool) -> dict[str, Callable[..., Any]]:
    """All contestants, ours first."""
    found: dict[str, Callable[..., Any]] = {
        "ours": by_kernel(ours),
        "twin, eager": twin(ours),
        "stored logits, eager": stored,
    }
    if compiles:
        found |= {
            "twin, torch.compile": twin(compiled(ours), chunked=False),
            "stored logits, torch.compile": compiled(stored),
        }
        found["stored logits, torch.compile, NO DRAW"] = compiled(without_draw)
    found["stored logits, eager, NO DRAW"] = without_draw
    found[f"chunks of {CHUNK_ROWS} rows, eager"] = chunked
    if on_gpu and (fused := liger()) is not None:
        found["liger-kernel, NO DRAW"] = fused
    return found


if __name__ == "__main__":
    main()
