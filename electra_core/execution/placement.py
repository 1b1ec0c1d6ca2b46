"""Where a model computes, and in which precision: `--device` and `--precision`, resolved for this machine."""

from __future__ import annotations

import ctypes
import functools
import logging
from contextlib import AbstractContextManager
from typing import Any

import torch
from electra_kernels.dispatch import numbered
from electra_kernels.fast_bf16 import has_fast_bf16, has_gpu_bf16

from electra_core.errors import UserError, first_line, option
from electra_core.execution import torchrun

KEPT_BETWEEN_BATCHES = 2**30  # bytes
OTHER_GPUS = {"mps": "Apple computer", "xpu": "Intel computer"}
NOT_BUILT_FOR = ("no kernel image", "invalid device function")  # CUDA's and HIP's errors for other GPUs' code
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # as in glibc's malloc.h
log = logging.getLogger("electra_core")


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" | "cpu" | "cuda" | "cuda:1" -> a device that computes; several processes get a GPU each.

    "auto" is the CPU if there is no GPU, or only one that this torch was not built for, which is then logged. A
    GPU has its number, as "the current one" is another in another thread (which prepares batches).

    Raises:
        UserError: CUDA requested without a GPU, or with too few; a GPU that does not compute; another type of
            device.
    """
    wanted = device = str(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device}: this torch ({torch.__version__}) sees no CUDA device")
    if device == "cuda" and torchrun.is_used():
        if torchrun.local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node: expected at most {torch.cuda.device_count()} processes, one per GPU; if each "
                f"sees only its own (CUDA_VISIBLE_DEVICES), set {option('device')} to cuda:0"
            )
        device = f"cuda:{torchrun.local_rank()}"
    try:
        place = torch.device(device)
    except RuntimeError:
        place = torch.device("meta")  # as unknown here as torch's other devices
    if place.type not in ("cpu", "cuda"):
        unused = f"; the GPU of an {OTHER_GPUS[place.type]} is not used" if place.type in OTHER_GPUS else ""
        raise UserError(f"device {device}: expected auto, cpu or cuda{unused}")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")
    return place if place.type == "cpu" else _computing(place, wanted)


def _computing(place: torch.device, wanted: str) -> torch.device:
    """`place` if it computes; the CPU if "auto" was requested and this torch is not built for the GPU."""
    if (problem := gpu_trouble(place)) is None:
        return numbered(place)
    name = _name(place)
    if not any(text in problem for text in NOT_BUILT_FOR):
        raise UserError(f"device {wanted}: {name} does not compute: {problem}; use the device cpu instead")
    problem = f"this torch ({torch.__version__}) is not built for {name}; pytorch.org/get-started has other builds"
    if wanted != "auto" or torchrun.is_used():  # ranks on different devices cannot communicate
        raise UserError(f"device {wanted}: {problem}; use the device cpu instead")
    log.warning("%s; using the CPU", problem)
    return torch.device("cpu")


def gpu_trouble(place: torch.device) -> str | None:
    """The first line of torch's error when the GPU adds some numbers; None if it works."""
    try:
        torch.ones(2, device=place).sum().item()
    except Exception as error:  # torch's own are RuntimeErrors, those of CUDA's first start are not
        return first_line(error)
    return None


def _name(place: torch.device) -> str:
    """A GPU's product name; the device's name if a GPU that does not start does not report it."""
    try:
        return torch.cuda.get_device_name(place)
    except Exception:
        return str(place)


@functools.cache
def _warn_once(line: str) -> None:
    log.warning(line)


def resolve_precision(precision: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The compute dtype for "auto" | "bf16" | "fp32", or for one of the two dtypes itself.

    "auto" is bf16 where it is faster: on a GPU that has it, and on a processor with
    `has_fast_bf16`.

    Raises:
        UserError: any other value.
    """
    if isinstance(precision, torch.dtype):
        precision = {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(precision, str(precision))
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"precision {precision}: expected auto, bf16 or fp32")
    has_bf16 = has_gpu_bf16(device) if device.type == "cuda" else has_fast_bf16()
    if precision == "bf16" and device.type == "cuda" and not has_bf16:
        _warn_once(f"precision bf16: {_name(device)} has no bf16 and emulates it; fp32 is faster")
    if precision == "fp32" and device.type == "cuda" and has_bf16 and _multiplies_in_tf32():
        _warn_once(
            "precision fp32: PyTorch computes products in TF32 (torch.set_float32_matmul_precision, or "
            "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE in the environment)"
        )
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and has_bf16) else torch.float32


def _multiplies_in_tf32() -> bool:
    """Whether a GPU with TF32 (all of these have bf16, too) rounds the operands of fp32 products to it."""
    # (torch.get_float32_matmul_precision raises if a caller has set one of the newer names.)
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def autocast_context(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision: parameters stay fp32, products are done in `dtype`."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def keep_freed_memory(most: int | None = None) -> None:
    """Makes glibc's allocator keep freed memory for the rest of the process.

    Every step allocates about the same memory again. By default large blocks are returned to the system each time
    and come back page by page, set to zero: 15% of a training step of `base`, a quarter of inference on long texts
    with `small` (docs/decisions.md). The peak is the same, but other programs cannot use the memory in between.

    Args:
        most: bytes; None: keep everything, in blocks of any size, for steps that always have the same shapes, so
            that memory freed by one fits the next. With varying shapes the heap would grow slowly; with `most`,
            blocks of more than 32 MB are still returned at once, and so is free memory beyond `most` at the heap's
            end.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    if most is None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TOP_PAD, 64 * 2**20)
    else:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if most is None else most)


def keep_memory_between_batches(device: torch.device) -> None:
    """`keep_freed_memory` on a CPU for batches that differ in shape: fine-tuning, prediction."""
    if device.type == "cpu":
        keep_freed_memory(KEPT_BETWEEN_BATCHES)
