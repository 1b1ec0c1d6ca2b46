"""What ahead-of-time compilation needs to know about one kernel at one tile.

Every `*_triton.py` exposes

    def compile_cases(capability: int) -> Iterator[CompileCase]

which yields each of its kernels at each tile its table holds for that architecture (`CAPABILITIES`), with the
types and the specialisations its launcher really uses. `benchmarks.compile_report` compiles them all,
without a GPU, and its test asserts no spills, tensor cores, wide accesses and shared memory within the chip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CAPABILITIES = (80, 90, 100)
"""Architectures with tables of tiles of their own."""


def signature_of(kernel: Any, types: Mapping[str, str], constexprs: Mapping[str, object]) -> dict[str, str]:
    """The type of each argument of `kernel` that is no constexpr; those that `types` does not name are `*fp32`."""
    return {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constexprs}


def tiles_of(capability: int) -> int:
    """Which architecture's tiles a GPU takes; those of sm_80 fit into any newer one's shared memory."""
    return {9: 90, 10: 100}.get(capability // 10, 80)


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one tile, as a launch would compile it."""

    name: str
    """Unique and readable: `attention_short_forward[bf16 S=128 K=64 dropout]`."""
    kernel: Any
    """The function under `@triton.jit`."""
    signature: Mapping[str, str]
    """Type of every argument that is not a constexpr: `*bf16`, `*i64`, `i32`, `fp32`. Pointers count as
    16-byte aligned, as those of torch's allocator are."""
    constexprs: Mapping[str, object]
    """Value of every constexpr argument."""
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool = True
    """Whether the launch says `FUSED` or `ROUNDED` (`blocks_triton`)."""
    multiples_of_16: Sequence[str] = ()
    """Integer arguments which are multiples of 16 in this case (Triton specialises on that at launch)."""
    needs_dot: bool = False
    """Holds matrix products in half precision, so tensor-core instructions are asserted."""
    streaming: bool = False
    """Bound by memory traffic, so 128-bit global loads are asserted."""
    wide_stores: bool = False
    """Stores whole tiles (not a number per row), so 128-bit global stores are asserted too."""
