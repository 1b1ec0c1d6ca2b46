"""bias_gelu against its twin and PyTorch, eager and under torch.compile.

    python -m benchmarks.bench_bias_gelu [--out FILE] [--no-compile]

Values and gradients are compared with PyTorch's in fp32 before timing. Not run on a GPU so far; on a CPU it uses
tiny shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from electra_kernels import bias_gelu
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

# (T, F): ELECTRA-Small at 128 and 1024 sequences of 128 tokens, Base at 256 of 512.
GPU_SHAPES = ((16384, 1024), (131072, 1024), (131072, 3072))
CPU_SHAPES = ((60, 48),)


def ours(x_TF: Tensor, bias_F: Tensor, _: Tensor) -> Tensor:
    """GELU(x + bias) by the kernel."""
    return bias_gelu(x_TF, bias_F)


def eager(x_TF: Tensor, bias_F: Tensor, _: Tensor) -> Tensor:
    """GELU(x + bias) by PyTorch's operations; for the bias, autograd sums over the tokens separately."""
    return F.gelu(x_TF + bias_F)


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Checks, measures and prints forward + backward."""
    options = settle(parser(__doc__ or "").parse_args(arguments))
    torch.manual_seed(0)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    for tokens, size in CPU_SHAPES if options.device == "cpu" else GPU_SHAPES:
        with one_case(case := f"bias_gelu T={tokens} F={size} both", options):
            shapes = (tokens, size), (size,), (tokens, size)
            x, bias, dout = (torch.randn(*shape, device=options.device, dtype=dtype) for shape in shapes)
            inputs = (x.requires_grad_(), bias.requires_grad_(), dout)
            contenders = {"ours": by_kernel(ours), "twin, eager": twin(ours), "PyTorch, eager": eager}
            if options.compile:
                contenders |= {"PyTorch, torch.compile": compiled(eager)}
            both = {name: with_gradients(function, 2) for name, function in contenders.items()}
            exact = [t.detach().float().requires_grad_(t.requires_grad) for t in inputs]
            tolerance = 1e-4 if options.device == "cpu" else 3e-2
            agreed = agreeing(case, both, with_gradients(eager, 2)(*exact), inputs, options, tolerance)
            moved = 5.0 * tokens * size * x.element_size()  # read x twice and dout; write out and dx
            compare(case, agreed, inputs, options, Work(moved))
    return report(options)


if __name__ == "__main__":
    main()
