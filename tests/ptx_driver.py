"""A driver for Triton whose GPU is the PTX machine: kernels are compiled as for a GPU and run on CPU tensors.

with ptx_gpu(90):
    ...  # kernel[grid](...) compiles for sm_90 and runs the PTX
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Iterator
from typing import Any
from unittest import mock

import ptx_machine
import torch
import triton
from electra_kernels import dispatch, mlm_head_triton
from electra_kernels.compile_case import tiles_of
from ptx_program import Program, parse
from torch import Tensor
from triton.backends.compiler import GPUTarget

# A program's at most (CUDA programming guide).
SHARED_KB = {75: 64, 80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
TILED = ("attention_triton", "mlm_head_narrow_triton")
LAUNCHED: dict[str, int] = {}
"""Kernel -> launches so far."""


class _Utilities:
    """What Triton asks a driver's library for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1024 * SHARED_KB[self.capability], "multiprocessor_count": 1, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """(module, function, registers, spills, most threads)."""
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


class _Launcher:
    """Runs a compiled kernel's PTX; Triton makes one per compiled kernel."""

    def __init__(self, source: Any, metadata: Any):
        self.shared, self.name = metadata.shared, metadata.name
        constants = {path[0] if isinstance(path, tuple) else path for path in source.constants}
        types = list(source.signature.values())
        self.passed = [i for i, type_ in enumerate(types) if type_ != "constexpr" and i not in constants]
        self.types = types
        self.scratch = metadata.global_scratch_size

    def __call__(self, x: int, y: int, z: int, stream: int, function: Program, *rest: Any) -> None:
        values = rest[4:]  # after the metadata and the hooks
        assert self.scratch == 0, "global scratch memory is not emulated"
        arguments = [_bits(values[i], self.types[i]) for i in self.passed] + [0, 0]
        tensors = [value for value in values if isinstance(value, Tensor)]
        LAUNCHED[self.name] = LAUNCHED.get(self.name, 0) + 1
        ptx_machine.launch(function, arguments, (x, y, z), tensors, self.shared)


def _bits(value: Any, type_: str) -> int:
    """An argument as the bits of its parameter."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if type_ in ("fp32", "f32"):
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    if type_ in ("fp64", "f64"):
        return int(struct.unpack("<Q", struct.pack("<d", value))[0])
    return int(value)


class Driver:
    """The parts of Triton's `GPUDriver` that a launch uses."""

    launcher_cls = _Launcher

    def __init__(self, capability: int):
        self.capability, self.utils = capability, _Utilities(capability)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _kernels_of_a_gpu(hidden_ME: Tensor) -> Any:
    """As on a GPU: where `mlm_head_triton._kernels` sees a CPU, it chooses for the interpreter."""
    narrow = mlm_head_triton.narrow
    return narrow if hidden_ME.shape[1] <= narrow.WIDEST and hidden_ME.itemsize == 2 else mlm_head_triton.wide


parsed = functools.cache(parse)


@contextlib.contextmanager
def ptx_gpu(capability: int) -> Iterator[None]:
    """Launches inside the block compile for this architecture and run on the PTX machine."""
    from triton.compiler.compiler import CompiledKernel

    def init_handles(kernel: Any) -> None:
        original(kernel)
        kernel.function = parsed(kernel.asm["ptx"])

    original, driver = CompiledKernel._init_handles, triton.runtime.driver
    with contextlib.ExitStack() as stack:
        replace = stack.enter_context
        replace(mock.patch.object(CompiledKernel, "_init_handles", init_handles))
        replace(mock.patch.object(dispatch, "interpreting", lambda: True))
        for name in TILED:  # which tables of tiles they take
            replace(mock.patch(f"electra_kernels.{name}.architecture", lambda device: tiles_of(capability)))
        replace(mock.patch.object(mlm_head_triton, "_kernels", _kernels_of_a_gpu))
        driver.set_active(Driver(capability))
        stack.callback(driver.set_active, None)
        yield
