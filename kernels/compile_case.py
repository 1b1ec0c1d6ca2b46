"""What ahead-of-time compilation needs to know about one kernel at one tile.

Each module with kernels exposes

    def compile_cases(capability: int) -> Iterator[CompileCase]

which yields its kernels at every tile in their table for that architecture (`CAPABILITIES`), with the types and
specialisations that the launcher uses. `benchmarks.compile_report` compiles all of them without a GPU. Its test
asserts that nothing spills, that tensor cores and wide accesses are used, and that shared memory suffices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CAPABILITIES = (80, 90, 100)
"""Architectures that have their own tables of tiles."""


def signature_of(kernel: Any, types: Mapping[str, str], constexprs: Mapping[str, object]) -> dict[str, str]:
    """The type of each argument of `kernel` that is not a constexpr; `*fp32` where `types` does not name it."""
    return {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constexprs}


def tiles_of(capability: int) -> int:
    """The architecture whose tiles a GPU uses; those of sm_80 fit into the shared memory of every newer one."""
    return {9: 90, 10: 100}.get(capability // 10, 80)


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one tile, as a launch would compile it."""

    name: str
    """Unique and readable: `attention_short_forward[bf16 S=128 K=64 dropout]`."""
    kernel: Any
    """The function under `@triton.jit`."""
    signature: Mapping[str, str]
    """Type of every argument that is not a constexpr: `*bf16`, `*i64`, `i32`, `fp32`. Pointers are taken to be
    16-byte aligned, as torch's allocator makes them."""
    constexprs: Mapping[str, object]
    """Value of every constexpr argument."""
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool = True
    """Whether the launch passes `FUSED` or `ROUNDED` (`blocks_triton`)."""
    multiples_of_16: Sequence[str] = ()
    """Integer arguments that are multiples of 16 in this case (Triton specialises on that at launch)."""
    needs_dot: bool = False
    """Contains matrix products in half precision, so tensor-core instructions are asserted."""
    streaming: bool = False
    """Bound by memory traffic, so 128-bit global loads are asserted."""
    wide_stores: bool = False
    """Stores whole tiles (not a number per row), so 128-bit global stores are asserted too."""
