"""Processors with a matrix unit for bf16 (AMX tiles): what is done differently there.

Their bf16 products are several times as fast as fp32 ones, and sums are kept in fp32. So an fp32 product whose
operands are bf16 numbers already loses nothing there: `products_in_bf16` lets oneDNN do it, fp32 in, fp32 out.

A product that sums over the tokens, dW = dyᵀ x, reads one operand against the grain, which costs oneDNN as much as
the product itself. `product_over_rows` turns the smaller one over first, by a loop in C (`c/turn.c`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from electra_kernels import native
from electra_kernels.dispatch import is_fake
from electra_kernels.native import c_int
from torch import Tensor

SPREAD = 32
"""Numbers between the rows of a turned matrix: rows a power of two apart compete for the same cache lines."""


@torch.compiler.assume_constant_result
def has_bf16_tiles() -> bool:
    """Whether the processor has them."""
    return _has_bf16_tiles()


@functools.cache
def _has_bf16_tiles() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


@contextmanager
def products_in_bf16(wanted: bool) -> Iterator[None]:
    """Inside, fp32 matrix products on a CPU with tiles round their operands to bf16, if `wanted`.

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
    if native.problem() is not None or is_fake(a_TO) or not a_TO.numel():
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
