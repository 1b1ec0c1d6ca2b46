"""Which implementation runs: chosen at call time, never at import.

`auto` (the default) runs the Triton kernels on GPUs that they support, and the plain-PyTorch twin everywhere else.
The exception on a CPU: attention, dropout + LayerNorm and the MLM head run loops in C where these could be built
(`native`), in training and in bf16, because PyTorch has no fast counter-based random numbers, its bf16 goes
through copies in fp32, and it stores logits. Loops without threads are for fp32 on one thread, and for bf16. If a
GPU's kernels (`triton_support`) or a CPU's loops cannot run, the reason is logged once. float64 on a GPU, a
precision for checking results, takes the twin. `use("triton")` runs the kernels on any GPU that can launch them.
`TRITON_INTERPRET=1`, set before triton is imported, lets `use("triton")` run the kernels on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from electra_kernels import native, triton_support
from torch._subclasses.fake_tensor import FakeTensor

Implementation = Literal["auto", "triton", "native", "reference"]
# A plain global, because torch.compile can read one (and guard on it) but no context variable.
_choice: Implementation = "auto"
log = logging.getLogger("electra_kernels")


@contextlib.contextmanager
def use(implementation: Implementation) -> Iterator[None]:
    """`with use("reference"): ...` overrides the choice inside the block, in all threads.

    Raises:
        ValueError: not "auto", "triton", "native" or "reference".
    """
    global _choice
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation: expected one of {get_args(Implementation)}, got {implementation!r}")
    before, _choice = _choice, implementation
    try:
        yield
    finally:
        _choice = before


@torch.compiler.assume_constant_result
def triton_problem() -> str | None:
    """Why there is no Triton to use, or None."""
    return triton_support.import_problem()


@torch.compiler.assume_constant_result
def launch_problem(device: torch.device) -> str | None:
    """Why Triton cannot launch on this GPU, or None. The first call launches a small kernel and waits for it."""
    return triton_support.import_problem() or triton_support.launch_problem(numbered(device))


@torch.compiler.assume_constant_result
def gpu_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why "auto" takes the twins for tensors of `dtype` on this GPU, or None. The reason is logged once.

    Every call of an operation asks, so the answer is cached, except during the capture of a CUDA graph.
    """
    asked = numbered(device), dtype, triton_support.switch()
    if asked not in _answers:
        problem = _gpu_problem(*asked[:2])
        if torch.cuda.is_current_stream_capturing():
            return problem
        _answers[asked] = problem
    return _answers[asked]


_answers: dict[tuple[torch.device, torch.dtype, str], str | None] = {}


def distrust(device: torch.device, reason: str) -> None:
    """From now on "auto" takes the twins on this GPU, unless ELECTRA_TRITON=1 is set; the log says why."""
    device = numbered(device)
    triton_support.DISTRUSTED[device] = reason
    _answers.clear()
    gpu_problem(device, torch.float32)


def _gpu_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """The checks are ordered so that nothing is launched on a GPU of an unsupported kind."""
    problem = triton_support.import_problem() or triton_support.kind_problem(device, dtype)
    problem = problem or triton_support.launch_problem(device)
    if problem is not None:
        _say_once(f"{device}: using plain PyTorch instead of the Triton kernels, which is slower: {problem}")
    return problem


def numbered(device: torch.device) -> torch.device:
    """`device` with its number; `cuda` without one means the current device."""
    return device if device.index is not None else torch.device(device.type, torch.cuda.current_device())


@functools.cache
def _say_once(line: str) -> None:
    log.warning(line)


def interpreting() -> bool:
    """True if Triton's interpreter is on, so kernels run on CPU tensors (slowly, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def available() -> dict[str, str]:
    """Implementation -> "yes" (and if need be with what limits), or why it cannot run here (for Triton: on the
    current GPU, in fp32)."""
    problem = triton_problem()
    if problem is None and torch.cuda.is_available():
        problem = gpu_problem(torch.device("cuda"), torch.float32)
    elif problem is None and not interpreting():
        problem = "no CUDA device is visible; TRITON_INTERPRET=1 runs the kernels on a CPU, for tests"
    on_one_thread = f"yes, on one thread: {native.one_thread()}" if native.one_thread() else "yes"
    return {"reference": "yes", "native": native.problem() or on_one_thread, "triton": problem or "yes"}


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether a call on `tensor` goes to Triton.

    Raises:
        RuntimeError: `use("triton")` is active and Triton cannot run on this tensor.
    """
    if _choice == "reference" or (tensor.is_cuda and tensor.dtype == torch.float64):
        return False
    if _choice == "triton":
        if (problem := _asked_for_problem(tensor)) is not None:
            raise RuntimeError(f"triton was asked for but cannot run: {problem}")
        return True
    return tensor.is_cuda and gpu_problem(tensor.device, tensor.dtype) is None


def _asked_for_problem(tensor: torch.Tensor) -> str | None:
    """Why Triton cannot run on `tensor`, whether or not the kernels support this kind of GPU; or None."""
    if tensor.is_cuda:
        return launch_problem(tensor.device)
    # A fake tensor (torch's FakeTensorMode) has a shape but no values, so tracing it launches nothing.
    if interpreting() or is_fake(tensor):
        return triton_problem()
    return triton_problem() or f"tensor is on {tensor.device} and TRITON_INTERPRET is not set"


@torch.compiler.assume_constant_result
def native_problem() -> str | None:
    """Why the loops in C cannot run here (logged once), or None. The first call builds them in some seconds."""
    problem = native.problem()
    if problem not in (None, native.SWITCHED_OFF):
        _say_once(f"this CPU computes without the loops in C, which is slower: {problem}")
    return problem


@torch.compiler.assume_constant_result
def lacks_threads() -> bool:
    """Whether the loops in C run on one thread where PyTorch has several (logged once)."""
    threads, reason = torch.get_num_threads(), native.one_thread()
    if reason is None or threads == 1:
        return False
    _say_once(f"the loops in C use 1 of {threads} threads, so fp32 takes plain PyTorch: {reason}")
    return True


def use_native(tensor: torch.Tensor, *, training: bool, supported: bool, twin_is_faster: bool = False) -> bool:
    """Whether a call on `tensor` goes to the loops in C, after `use_triton` returned False.

    Args:
        training: whether the call is part of training; without, "auto" takes the loops only for bf16.
        supported: whether the loops support these dtypes and sizes.
        twin_is_faster: whether "auto" should take the twin instead.

    Raises:
        RuntimeError: `use("native")` is active and the loops cannot run on this tensor.
    """
    in_bf16 = tensor.dtype == torch.bfloat16
    if _choice == "reference" or (_choice == "auto" and (twin_is_faster or not (training or in_bf16))):
        return False
    runnable = supported and tensor.device.type == "cpu" and native_problem() is None
    if _choice == "native" and not runnable:
        reason = native_problem() or f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        raise RuntimeError(f"native was asked for but cannot run: {reason}")
    return runnable and not (_choice == "auto" and lacks_threads() and not in_bf16)


def is_fake(tensor: torch.Tensor) -> bool:
    """True for a tensor without values: on the `meta` device, or made under torch's FakeTensorMode."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def checks_values(tensor: torch.Tensor) -> bool:
    """Whether to run checks that read a tensor's values: always on a CPU, on a GPU (where they wait for the
    device) only with ELECTRA_KERNELS_DEBUG=1, and never while torch.compile traces.
    """
    if torch.compiler.is_compiling() or is_fake(tensor):
        return False
    return tensor.device.type == "cpu" or os.environ.get("ELECTRA_KERNELS_DEBUG", "0") == "1"
