"""What this machine has and what a run would use of it: `electra info` without a model.

The first thing to look at, and to include in a report, when a GPU does not work as expected.
"""

from __future__ import annotations

import platform
from typing import Any

import electra_kernels
import torch

from electra_core.errors import UserError
from electra_core.execution.engine import choose_engine
from electra_core.execution.memory import free_bytes
from electra_core.execution.placement import resolve_device, resolve_precision
from electra_core.version import version


def facts() -> dict[str, Any]:
    """Versions; the device, precision and engine that "auto" means; what can run, or why not. All are strings.

    Launches a small kernel on the GPU, and builds the loops in C unless they are built.
    """
    versions = {"electra-core": version(), "python": platform.python_version(), "torch": torch.__version__}
    return {**versions, "triton": _triton_version(), **_choices(), **_implementations()}


def _triton_version() -> str:
    try:
        import triton
    except Exception as error:  # a broken installation may raise anything
        return type(error).__name__
    return str(triton.__version__)


def _choices() -> dict[str, str]:
    """What "auto" means here."""
    try:
        device = resolve_device("auto")
    except UserError as error:
        return {"device": str(error)}
    dtype = resolve_precision("auto", device)
    return {
        "device": _described(device),
        "memory free": _free(device),
        "precision": {torch.bfloat16: "bf16"}.get(dtype, "fp32"),
        "engine": choose_engine("auto", device, dtype=dtype),
    }


def _described(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    major, minor = torch.cuda.get_device_capability(device)
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"sm_{major}{minor}, CUDA {torch.version.cuda}"
    return f"{device}: {torch.cuda.get_device_name(device)}, {kind}"


def _free(device: torch.device) -> str:
    try:
        return f"{free_bytes(device) / 2**30:.1f} GiB"
    except UserError:
        return "?"


def _implementations() -> dict[str, str]:
    """Which implementations of the kernels can run."""
    names = {"triton": "Triton kernels", "native": "loops in C", "reference": "plain PyTorch"}
    available = electra_kernels.available()
    return {name: available[implementation] for implementation, name in names.items()}
