"""Processors that multiply bf16 faster than fp32, and what this package does differently on them.

| | bf16, one core | fp32, one core |
|---|---|---|
| Intel with tiles (AMX), since Sapphire Rapids | 1,180 GFLOP/s | 180 |
| AMD with AVX-512 BF16, since Zen 4 | 220 GFLOP/s | 97 |
| Intel with AVX-512 BF16 and no tiles | 42 GFLOP/s | 78 |

(oneDNN, 2.3 to 2.6 GHz, docs/decisions.md.) A processor that supports bf16 need not be fast at it, so
`has_fast_bf16` is true only of the first two rows. All of them accumulate in fp32.

A product that sums over the tokens, dW = dyᵀ x, reads one operand across its rows, which with AMX costs oneDNN as
much as the product itself. `product_over_rows` first transposes the smaller operand by a loop in C (`c/turn.c`).
"""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

import torch
from electra_kernels import native
from electra_kernels.dispatch import is_fake
from electra_kernels.native import c_int
from torch import Tensor

SPREAD = 32
"""Padding between the rows of a transposed matrix: rows a power of two apart compete for the same cache lines."""


@torch.compiler.assume_constant_result
def has_fast_bf16() -> bool:
    """Whether the processor multiplies bf16 faster than fp32."""
    return _has_fast_bf16()


@torch.compiler.assume_constant_result
def has_gpu_bf16(device: torch.device) -> bool:
    """Whether a GPU has bf16 in hardware: NVIDIA's since Ampere (sm_80), and, according to torch, all of AMD's.

    `torch.cuda.is_bf16_supported` is also true of older GPUs, which emulate it several times slower than fp32.
    """
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _has_fast_bf16() -> bool:
    return _has_amx() or (torch.cpu._is_avx512_bf16_supported() and _maker() == "AuthenticAMD")


@functools.cache
def _has_amx() -> bool:
    """Whether the processor has AMX, a matrix unit for bf16 whose registers Intel calls tiles."""
    return bool(torch.cpu._is_amx_tile_supported())


def _maker() -> str:
    """The processor's vendor id, e.g. "GenuineIntel"; "" if it is not known."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        # Windows: "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD"
        return platform.processor().rpartition(", ")[2]
    found = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else ""


def product_over_rows(a_TO: Tensor, b_TI: Tensor) -> Tensor:
    """aᵀ b, [O, I], for two contiguous bf16 matrices on a CPU."""
    if not _has_amx() or native.problem() is not None or is_fake(a_TO) or not a_TO.numel():
        return a_TO.T @ b_TI
    if a_TO.shape[1] <= b_TI.shape[1]:
        return turned(a_TO) @ b_TI
    return turned(turned(b_TI) @ a_TO).contiguous()


def turned(matrix_RC: Tensor) -> Tensor:
    """The transpose of a contiguous bf16 matrix on a CPU, with `SPREAD` numbers of padding between rows."""
    rows, columns = matrix_RC.shape
    out_CR = matrix_RC.new_empty(columns, rows + SPREAD)
    out_CR[:, rows:] = 0  # oneDNN reads whole tiles; it multiplies the padding by 0, but inf or NaN would give NaN
    native.call("turn", matrix_RC, out_CR, rows, columns, rows + SPREAD, c_int(torch.get_num_threads()))
    return out_CR[:, :rows]
