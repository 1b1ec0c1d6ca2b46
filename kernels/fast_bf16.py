"""Processors that multiply bf16 faster than fp32, and what is done differently there.

| | bf16, one core | fp32, one core |
|---|---|---|
| Intel with tiles (AMX), since Sapphire Rapids | 1,180 GFLOP/s | 180 |
| AMD with AVX-512 BF16, since Zen 4 | 220 GFLOP/s | 97 |
| Intel with AVX-512 BF16 and no tiles | 42 GFLOP/s | 78 |

(oneDNN, 2.3 to 2.6 GHz, docs/decisions.md.) So what a processor can do does not say what it does fast, and
`has_fast_bf16` goes by the first two rows. Sums are kept in fp32 on all of them.

An fp32 product whose operands are bf16 numbers already loses nothing in bf16: on tiles `products_in_bf16` lets
oneDNN do it, fp32 in, fp32 out. Elsewhere oneDNN has no such product, and does its own in fp32.

A product that sums over the tokens, dW = dyᵀ x, reads one operand against the grain, which on tiles costs oneDNN
as much as the product itself. `product_over_rows` turns the smaller one over first, by a loop in C (`c/turn.c`).
"""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from electra_kernels import native
from electra_kernels.dispatch import is_fake
from electra_kernels.native import c_int
from torch import Tensor

SPREAD = 32
"""Numbers between the rows of a turned matrix: rows a power of two apart compete for the same cache lines."""


@torch.compiler.assume_constant_result
def has_fast_bf16() -> bool:
    """Whether the processor is one of those."""
    return _has_fast_bf16()


@torch.compiler.assume_constant_result
def has_amx() -> bool:
    """Whether it has a matrix unit for bf16 (AMX, whose registers are Intel's "tiles")."""
    return _has_amx()


@torch.compiler.assume_constant_result
def has_gpu_bf16(device: torch.device) -> bool:
    """Whether a GPU computes in bf16 by itself: NVIDIA's since Ampere (sm_80); of AMD's, torch says so of all.

    `torch.cuda.is_bf16_supported` is true of older ones, too, which emulate it, several times slower than fp32.
    """
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _has_fast_bf16() -> bool:
    return _has_amx() or (torch.cpu._is_avx512_bf16_supported() and _maker() == "AuthenticAMD")


@functools.cache
def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def _maker() -> str:
    """The processor's maker as it calls itself, e.g. "GenuineIntel"; "" if nobody says."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        # Windows: "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD"
        return platform.processor().rpartition(", ")[2]
    found = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else ""


@contextmanager
def products_in_bf16(wanted: bool) -> Iterator[None]:
    """Inside, fp32 matrix products on a CPU round their operands to bf16 where it has tiles, if `wanted`.

    The switch is torch's own, and the whole process's while it is on.
    """
    if not wanted:
        yield
        return
    setting: Any = torch.backends.mkldnn
    before, setting.matmul.fp32_precision = setting.matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.matmul.fp32_precision = before


def product_over_rows(a_TO: Tensor, b_TI: Tensor) -> Tensor:
    """aᵀ b, [O, I], of two contiguous bf16 matrices on a CPU."""
    if not _has_amx() or native.problem() is not None or is_fake(a_TO) or not a_TO.numel():
        return a_TO.T @ b_TI
    if a_TO.shape[1] <= b_TI.shape[1]:
        return turned(a_TO) @ b_TI
    return turned(turned(b_TI) @ a_TO).contiguous()


def turned(matrix_RC: Tensor) -> Tensor:
    """The transpose of a contiguous bf16 matrix on a CPU, its rows `SPREAD` numbers apart."""
    rows, columns = matrix_RC.shape
    out_CR = matrix_RC.new_empty(columns, rows + SPREAD)
    out_CR[:, rows:] = 0  # oneDNN reads on to whole tiles; times 0, but what is not finite makes NaN
    native.call("turn", matrix_RC, out_CR, rows, columns, rows + SPREAD, c_int(torch.get_num_threads()))
    return out_CR[:, :rows]
