# mypy: allow-untyped-defs, allow-incomplete-defs
"""The smallest possible launch: it fails if anything is missing that Triton needs for its first launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from electra_kernels.blocks_triton import FUSED

COUNT = 16


@triton.jit
def _count_kernel(p_out, COUNT: tl.constexpr):
    o = tl.arange(0, COUNT)
    tl.store(p_out + o, o)


def launch(device: torch.device) -> None:
    """Runs a kernel that counts on `device`, and waits for it.

    Raises:
        RuntimeError: the kernel computed something else.
        Exception: anything that Triton raises.
    """
    out = torch.full((COUNT,), -1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(out):
        _count_kernel[(1,)](out, COUNT=COUNT, **FUSED)
    if (counted := out.tolist()) != list(range(COUNT)):
        raise RuntimeError(f"a kernel that counts to {COUNT} wrote {counted}")
