"""Where the Triton kernels can run, and where not, why: one line for the user.

Three things can stand in the way:

- the software: Triton is missing, broken or too old (`import_problem`);
- the kind of GPU: too old, not NVIDIA's, or one on which the kernels computed something wrong (`kind_problem`);
- the machine: at its first launch Triton compiles a C file, looks for the driver and writes to its cache. Each of
  these may fail, so a small kernel is launched on every GPU before any other (`launch_problem`).

ELECTRA_TRITON=0 turns the kernels off; ELECTRA_TRITON=1 runs them on every kind of GPU that can launch them.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess

import torch
from torch.utils._python_dispatch import _disable_current_modes

OLDEST_TRITON = (3, 6)
TENSOR_CORES = (8, 0)
"""Compute capability from which the kernels support every precision, as does Triton itself."""
FP32_ONLY = (7, 5)
"""Compute capability from which they support fp32. Below `TENSOR_CORES`, Triton compiles products in half
precision without tensor cores, and their tiles need more shared memory (128 KB) than such a GPU has."""
TENSOR_MEMORY, UNFENCED = (10, 11), "3.7.0"
"""Compute capabilities (major) whose tensor cores read shared memory behind a fence, and the Triton that sets none
between a loop's copies and its products (`docs/kernels.md`, "What it found")."""
DISTRUSTED: dict[torch.device, str] = {}
"""GPUs on which the kernels were found to compute something wrong, and what it was."""


def switch() -> str:
    """The value of ELECTRA_TRITON: "0", "1" or ""."""
    return os.environ.get("ELECTRA_TRITON", "")


def import_problem() -> str | None:
    """Why there is no Triton to use, or None."""
    return "ELECTRA_TRITON=0 is set" if switch() == "0" else _import_problem()


@functools.cache
def _import_problem() -> str | None:
    try:
        import triton
        import triton.language
    except ImportError as error:
        return f"triton is not installed ({error}); pip install triton"
    except Exception as error:  # a broken installation may raise anything
        return f"triton cannot be imported ({in_words(error)})"
    version = [int(number) for number in re.findall(r"\d+", triton.__version__)[:2]]
    if tuple(version) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {triton.__version__} is too old; the kernels need {oldest} or newer: pip install -U triton"
    return None


def kind_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not support this kind of GPU in this precision, or None. Nothing is launched."""
    if switch() == "1":
        return None
    if device in DISTRUSTED:
        return DISTRUSTED[device]
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if torch.version.hip:
        return f"the kernels are written for NVIDIA GPUs and untested on AMD's ({name})"
    architecture = f"{name}, sm_{capability[0]}{capability[1]}"
    in_half = dtype.is_floating_point and dtype.itemsize < 4
    if in_half and _leaves_out_fences(capability):
        return f"triton {UNFENCED} leaves out fences on this GPU ({architecture}): pip install triton==3.7.1"
    if capability < FP32_ONLY:
        return f"the kernels need a GPU of sm_{FP32_ONLY[0]}{FP32_ONLY[1]} or newer ({architecture})"
    if in_half and capability < TENSOR_CORES:
        return f"before sm_{TENSOR_CORES[0]}{TENSOR_CORES[1]} the kernels support fp32 only ({architecture})"
    return None


def _leaves_out_fences(capability: tuple[int, int]) -> bool:
    import triton

    return capability[0] in TENSOR_MEMORY and triton.__version__ == UNFENCED


def launch_problem(device: torch.device) -> str | None:
    """Why launching a small kernel on `device` failed, or None if it ran. The first call waits for the device.

    While a CUDA graph is being captured nothing may wait; then the answer is None and is not cached.
    """
    if torch.cuda.is_current_stream_capturing():
        return None
    return _launch_problem(device)


@functools.cache
def _launch_problem(device: torch.device) -> str | None:
    try:
        from electra_kernels import probe_triton

        with _disable_current_modes():  # real tensors, even while a step is being traced
            probe_triton.launch(device)
    except Exception as error:
        return in_words(error)
    return None


def in_words(error: Exception) -> str:
    """One line about an error that importing or launching Triton raised."""
    if isinstance(error, subprocess.CalledProcessError):
        program = error.cmd if isinstance(error.cmd, str) else str(error.cmd[0])
        return (
            f"Triton compiles a C file when it first launches a kernel, and {program} failed, as above; often "
            "Python's headers are missing: apt-get install python3-dev"
        )
    if "Failed to find C compiler" in str(error):
        return "Triton needs a C compiler when it first launches a kernel: apt-get install gcc, or set CC"
    if isinstance(error, PermissionError):  # in a container, the home folder may be /
        return f"Triton may not write {error.filename}: set TRITON_CACHE_DIR to a folder that it may write"
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
