"""Which implementation runs: chosen at call time, never at import.

`auto` (the default) takes Triton for CUDA tensors and the plain-PyTorch twin for everything else. float64 on a
GPU, a precision for checking results, takes the twin.
`TRITON_INTERPRET=1`, set before triton is imported, lets `use("triton")` run the kernels on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor

Implementation = Literal["auto", "triton", "reference"]
# A plain global, because torch.compile can read one (and guard on it) but no context variable.
_choice: Implementation = "auto"


@contextlib.contextmanager
def use(implementation: Implementation) -> Iterator[None]:
    """`with use("reference"): ...` overrides the choice inside the block, in all threads.

    Raises:
        ValueError: an implementation other than "auto", "triton", "reference".
    """
    global _choice
    if implementation not in ("auto", "triton", "reference"):
        raise ValueError(f'implementation: expected "auto", "triton" or "reference", got {implementation!r}')
    before, _choice = _choice, implementation
    try:
        yield
    finally:
        _choice = before


@torch.compiler.assume_constant_result
def triton_problem() -> str | None:
    """Why Triton cannot be imported here, or None."""
    return _import_problem()


@functools.cache
def _import_problem() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not installed ({error}); pip install triton"
    return None


def interpreting() -> bool:
    """True if Triton's interpreter is on, so kernels run on CPU tensors (slowly, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def available() -> dict[str, str]:
    """Implementation -> "yes", or the reason why it cannot run here."""
    problem = triton_problem()
    if problem is None and not torch.cuda.is_available() and not interpreting():
        problem = "no CUDA device is visible; TRITON_INTERPRET=1 runs the kernels on a CPU, for tests"
    return {"reference": "yes", "triton": problem or "yes"}


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether a call on `tensor` goes to Triton.

    Raises:
        RuntimeError: Triton was asked for with `use("triton")` and cannot run on this tensor.
    """
    if _choice == "reference" or (tensor.is_cuda and tensor.dtype == torch.float64):
        return False
    # A fake tensor (torch's FakeTensorMode) has a shape and no values: tracing it launches nothing.
    runnable = (tensor.is_cuda or interpreting() or is_fake(tensor)) and triton_problem() is None
    if _choice == "triton":
        if not runnable:
            reason = triton_problem() or f"tensor is on {tensor.device} and TRITON_INTERPRET is not set"
            raise RuntimeError(f"triton was asked for but cannot run: {reason}")
        return True
    return tensor.is_cuda and runnable


def is_fake(tensor: torch.Tensor) -> bool:
    """True for a tensor without values, as made under torch's FakeTensorMode."""
    return isinstance(tensor, FakeTensor)


def checks_values(tensor: torch.Tensor) -> bool:
    """Whether checks that need a tensor's values run: on the host yes, on a GPU (where they would wait for
    the device) only with ELECTRA_KERNELS_DEBUG=1, and never while torch.compile traces.
    """
    if torch.compiler.is_compiling() or is_fake(tensor):
        return False
    return tensor.device.type == "cpu" or os.environ.get("ELECTRA_KERNELS_DEBUG", "0") == "1"
