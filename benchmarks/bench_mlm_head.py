"""mlm_head against the same with stored logits: eager, torch.compile, chunks, and liger-kernel where installed.

    python -m benchmarks.bench_mlm_head [--out FILE] [--no-compile]

Every contender computes loss, gradients and one exact draw per masked word, except liger-kernel's fused loss,
which draws nothing (and says so). Before timing, losses and gradients of all are compared. Not run on a GPU
so far; on a CPU it takes tiny shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from electra_kernels import mlm_head
from torch import Tensor

from benchmarks.kernel_timing import Result, Work, compare, parser, report, same, settle, with_gradients

# (M, V, E): ELECTRA-Small's generator at 128 and 1024 sequences of 128 tokens, Base's at 256 of 512.
GPU_SHAPES = ((2458, 30522, 128), (19661, 30522, 128), (19661, 30522, 768))
CPU_SHAPES = ((24, 500, 32),)
CHUNK_ROWS = 512


def ours(hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, targets_M: Tensor, seed: Tensor) -> Tensor:
    """The loss; the draw comes with it."""
    return mlm_head(hidden_ME, embedding_VE, bias_V, targets_M, seed=seed).loss_M.mean()


def stored(hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, targets_M: Tensor, seed: Tensor) -> Tensor:
    """Logits stored; the draw by the Gumbel trick, the cheapest exact one that torch offers."""
    logits_MV = F.linear(hidden_ME, embedding_VE, bias_V).float()
    with torch.no_grad():
        noise_MV = torch.empty_like(logits_MV).exponential_()
        (logits_MV - noise_MV.log()).argmax(-1)
    return F.cross_entropy(logits_MV, targets_M)


def chunked(hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, targets_M: Tensor, seed: Tensor) -> Tensor:
    """`stored` over chunks of rows whose logits are computed again in the backward pass."""
    total = hidden_ME.new_zeros((), dtype=torch.float32)
    for rows_RE, targets_R in zip(hidden_ME.split(CHUNK_ROWS), targets_M.split(CHUNK_ROWS)):
        loss = torch.utils.checkpoint.checkpoint(
            stored, rows_RE, embedding_VE, bias_V, targets_R, seed, use_reentrant=False, preserve_rng_state=False
        )
        total = total + loss * len(rows_RE)
    return total / len(hidden_ME)


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
    contenders: dict[str, Callable[..., Tensor]] = {"ours": ours, "stored logits, eager": stored}
    if options.compile:
        contenders["stored logits, torch.compile"] = torch.compile(stored)
    contenders[f"chunks of {CHUNK_ROWS} rows, eager"] = chunked
    if options.device != "cpu" and (fused := liger()) is not None:
        contenders["liger-kernel, NO DRAW"] = fused
    results = []
    for rows, vocabulary, size in CPU_SHAPES if options.device == "cpu" else GPU_SHAPES:
        tensors = inputs(rows, vocabulary, size, options.device)
        wanted = with_gradients(stored, 3)(*tensors)
        for name, function in contenders.items():
            same(name, with_gradients(function, 3)(*tensors), wanted, 1e-3 if options.device == "cpu" else 3e-2)
        case, product = f"mlm_head M={rows} V={vocabulary} E={size}", 2.0 * rows * vocabulary * size
        moved = sum(t.numel() * t.element_size() for t in tensors[:3])
        forward = {name: torch.no_grad()(function) for name, function in contenders.items()}
        results += compare(f"{case} forward", forward, tensors, options, Work(moved, product))
        both = {name: with_gradients(function, 3) for name, function in contenders.items()}
        results += compare(f"{case} both", both, tensors, options, Work(3 * moved, 3 * product))
    report(results, options)
    return results


if __name__ == "__main__":
    main()
