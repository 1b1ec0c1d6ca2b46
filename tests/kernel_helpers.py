"""The error budget of all kernel tests, and where they run.

A kernel may err from the float64 result at most twice as much as plain PyTorch does in the kernel's own
precision, plus a small absolute term (times the largest exact value) for results that PyTorch happens to hit.
Where the exact result is 0 everywhere, the term is relative to the call's other results instead: a GPU's
approximate instructions may leave an error there that PyTorch does not have.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from electra_kernels import use
from torch import Tensor

# Compiled kernels need neither a GPU (`ptx_machine`) nor the tiny tiles that the interpreter gets.
ON_PTX_MACHINE = "ELECTRA_PTX" in os.environ
DEVICE = "cuda" if torch.cuda.is_available() and not ON_PTX_MACHINE else "cpu"
INTERPRETED = DEVICE == "cpu" and not ON_PTX_MACHINE
# A second device that does not mix with the host's, without a GPU (`elsewhere.py`, `make test-elsewhere`).
ON_ANOTHER_DEVICE = INTERPRETED and "ELECTRA_ELSEWHERE" in os.environ
DEVICE = "meta" if ON_ANOTHER_DEVICE else DEVICE
# bfloat16 products are wrong in Triton's interpreter (it multiplies raw bits), float64 ones slow on a GPU.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])

# Four units in the last place: sums in another order differ by this much even where PyTorch is exact.
ALL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SMALL = {dtype: 4 * torch.finfo(dtype).eps for dtype in ALL_DTYPES}
ZERO = 64 * torch.finfo(torch.float64).eps


LARGE = pytest.mark.xdist_group("large")
"""Tests of more than 2^31 elements: one after the other in one worker (`make test-gpu`)."""


def skip_without_memory(gibibytes: float) -> None:
    """Skips a `LARGE` test where the GPU does not have as much free: another program's, or a small one."""
    if torch.cuda.is_available() and not ON_PTX_MACHINE:
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gibibytes:
            pytest.skip(f"takes {gibibytes:g} GiB of the GPU's memory, {free:.1f} are free")


def dtype_id(value: object) -> str | None:
    """Readable test ids for dtypes."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def assert_within_budget(
    name: str,
    got: Tensor,
    same_precision: Tensor,
    exact: Tensor,
    beside: Tensor | None = None,
    largest_logit: float = 0.0,
) -> None:
    """Fails unless `got` is about as near to `exact` (float64) as `same_precision` is; NaN always fails.

    Args:
        beside: exact results of the same call, whose largest value counts where `exact` is 0 up to the rounding
            of float64.
        largest_logit: of a softmax that is exp(logit - log of the sum), both in fp32: rounding each changes
            the probability by up to eps * |logit| of itself. PyTorch subtracts the largest logit first.
    """
    assert got.shape == exact.shape and got.dtype == same_precision.dtype, name
    if exact.numel() == 0:
        return
    largest = exact.abs().max().item()
    if beside is not None and largest <= ZERO * beside.abs().max().item():
        largest = beside.abs().max().item()
    small = (SMALL[got.dtype] + 2 * torch.finfo(torch.float32).eps * largest_logit) * largest
    got, same_precision, exact = (x.detach().cpu().double() for x in (got, same_precision, exact))
    error = (got - exact).abs().max().item()
    allowed = 2 * (same_precision - exact).abs().max().item() + small
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def value_and_gradients(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], dout: Tensor, *more: Any, **options: Any
) -> list[Tensor]:
    """What `function(*leaves, *more, **options)` returns, and for its gradient `dout` that of each leaf."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves, *more, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def implementations(*small: tuple[ModuleType, str, int]) -> Any:
    """A fixture that chooses the twin, then the kernels.

    Args:
        small: (module, name, value) of block sizes and numbers of programs, so that tiny shapes use all loops.
    """

    @pytest.fixture(params=["reference", "triton"])
    def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        for constant in small:
            monkeypatch.setattr(*constant)
        with use(request.param):
            yield request.param

    return path


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills every `torch.empty` with NaN (integers: with the largest), so that what no kernel wrote is seen.

    A side effect of deterministic mode; operations of PyTorch that cannot be deterministic on a GPU only warn.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
