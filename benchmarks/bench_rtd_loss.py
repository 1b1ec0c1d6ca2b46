"""rtd_loss and rtd_head against their twins and PyTorch's binary cross-entropy, eager and under torch.compile.

    python -m benchmarks.bench_rtd_loss [--out FILE] [--no-compile]

Losses and gradients are compared before timing. Not run on a GPU so far; on a CPU it uses tiny shapes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from electra_kernels import rtd_head, rtd_loss
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

# (T, D): ELECTRA-Small at 128 and 1024 sequences of 128 tokens, Base at 256 of 512.
GPU_SHAPES = ((16384, 256), (131072, 256), (131072, 768))
CPU_SHAPES = ((100, 32),)


def our_loss(logits_T: Tensor, labels_T: Tensor) -> Tensor:
    """Loss over all tokens."""
    return rtd_loss(logits_T, labels_T)


def torch_loss(logits_T: Tensor, labels_T: Tensor) -> Tensor:
    """PyTorch's numerically stable loss, in fp32."""
    return F.binary_cross_entropy_with_logits(logits_T.float(), labels_T.float())


def our_head(hidden_TD: Tensor, weight_D: Tensor, bias: Tensor, labels_T: Tensor) -> Tensor:
    """GELU, the projection D -> 1 and the loss in one kernel."""
    return rtd_head(hidden_TD, weight_D, bias, labels_T).loss


def torch_head(hidden_TD: Tensor, weight_D: Tensor, bias: Tensor, labels_T: Tensor) -> Tensor:
    """The same, operation by operation."""
    return torch_loss(F.gelu(hidden_TD) @ weight_D + bias, labels_T)


def inputs(tokens: int, size: int, device: str) -> tuple[Tensor, ...]:
    """Pre-activations, weight and bias (bf16 on a GPU), labels."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    leaves = (
        torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in ((tokens, size), (size,), (1,))
    )
    return *leaves, (torch.rand(tokens, generator=generator) < 0.1).to(device)


def run(
    case: str,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    moved: float,
    options: argparse.Namespace,
) -> None:
    """Compares with PyTorch in fp32, then measures forward + backward."""
    contenders = {"ours": by_kernel(ours), "twin, eager": twin(ours), "PyTorch, eager": theirs}
    if options.compile:
        contenders |= {"twin, torch.compile": twin(compiled(ours)), "PyTorch, torch.compile": compiled(theirs)}
    leaves = len(tensors) - 1
    both = {name: with_gradients(function, leaves) for name, function in contenders.items()}
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors[:leaves]]
    wanted = with_gradients(theirs, leaves)(*exact, tensors[-1])
    both = agreeing(case, both, wanted, tensors, options, 1e-4 if options.device == "cpu" else 3e-2)
    compare(case, both, tensors, options, Work(moved))


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Checks, measures and prints."""
    options = settle(parser(__doc__ or "").parse_args(arguments))
    for tokens, size in CPU_SHAPES if options.device == "cpu" else GPU_SHAPES:
        with one_case(f"rtd_loss and rtd_head T={tokens} D={size}", options):
            hidden_TD, weight_D, bias, labels_T = inputs(tokens, size, options.device)
            logits_T = hidden_TD.detach()[:, 0].contiguous().requires_grad_()
            moved = 2.0 * tokens * logits_T.element_size() + tokens
            run(f"rtd_loss T={tokens} both", our_loss, torch_loss, (logits_T, labels_T), moved, options)
            moved += 3.0 * tokens * size * hidden_TD.element_size()  # read twice, gradient written once
            tensors = (hidden_TD, weight_D, bias, labels_T)
            run(f"rtd_head T={tokens} D={size} both", our_head, torch_head, tensors, moved, options)
    return report(options)


if __name__ == "__main__":
    main()
