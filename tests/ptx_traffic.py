"""How well a kernel's accesses use the memory: counted from the addresses that the PTX machine sees.

Global memory moves sectors of 32 bytes: a warp's access takes as many as its threads touch, and needs as many as
its bytes fill. Shared memory has 32 banks of 4 bytes and serves each once per wavefront: threads that want
different words of one bank wait for each other. (16-byte accesses go a quarter of a warp at a time, 8-byte ones
half. Matrices by `ldmatrix` and `stmatrix` are not counted.)

    ELECTRA_PTX=90 python tests/ptx_traffic.py [CALL…]      the calls of `kernel_calls`, as compiled for sm_90
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import ptx_instructions
from ptx_machine import Machine
from ptx_memory import Array
from ptx_program import Instruction, names_of


@dataclass
class Count:
    """Sectors or wavefronts: how many an access took, and how few it could have."""

    taken: int = 0
    needed: int = 0

    @property
    def waste(self) -> float:
        """1 is perfect."""
        return self.taken / max(1, self.needed)


Traffic = dict[tuple[str, str], Count]
"""(kernel, "global load" | "global store" | "shared") -> count."""


def _sectors(addresses: Array, size: int, lanes: Array) -> Count:
    touched = np.unique(addresses[:, None] + np.arange(size))
    return Count(len(np.unique(touched // 32)), -(-len(touched) // 32))


def _wavefronts(addresses: Array, size: int, lanes: Array) -> Count:
    at_once = min(32, 128 // max(4, size))
    count = Count()
    for part in np.unique(lanes // at_once):
        here = addresses[lanes // at_once == part]
        words = np.unique((here[:, None] + np.arange(0, max(size, 4), 4)) // 4)
        count.taken += int(np.bincount(words % 32).max())
        count.needed += 1
    return count


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Counts what kernels do inside the block."""
    traffic: Traffic = defaultdict(Count)

    def note(machine: Machine, kind: str, operand: Any, size: int) -> None:
        addresses, threads = machine.address(operand), machine.every[machine.active]
        for warp in np.unique(threads // 32):
            mine = threads // 32 == warp
            count = (_wavefronts if kind == "shared" else _sectors)(addresses[mine], size, threads[mine] % 32)
            traffic[machine.program.name, kind].taken += count.taken
            traffic[machine.program.name, kind].needed += count.needed

    def before(name: str, look: Callable[[Machine, Instruction], None]) -> Callable[[Machine, Instruction], None]:
        operation = ptx_instructions.OPERATIONS[name]

        def run(machine: Machine, instruction: Instruction) -> None:
            look(machine, instruction)
            operation(machine, instruction)

        return run

    def look(machine: Machine, instruction: Instruction) -> None:
        name, space = instruction.opcode[:2]
        value, place = instruction.operands[:: 1 if name == "ld" else -1]
        size = int(instruction.opcode[-1][1:]) // 8 * len(names_of(value))
        if space != "param":
            kind = "shared" if space == "shared" else f"global {'load' if name == 'ld' else 'store'}"
            note(machine, kind, place, size)

    def look_at_copy(machine: Machine, instruction: Instruction) -> None:
        if instruction.opcode[2] not in ("commit_group", "wait_group"):
            to, source, size = instruction.operands[:3]
            note(machine, "shared", to, int(str(size), 0))
            note(machine, "global load", source, int(str(size), 0))

    looks = {"ld": look, "st": look, "cp": look_at_copy}
    with mock.patch.dict(ptx_instructions.OPERATIONS, {name: before(name, look) for name, look in looks.items()}):
        yield traffic


def main() -> None:
    """Prints what each kernel of the named calls moves."""
    import triton
    from kernel_calls import CALLS, seed_of
    from ptx_driver import ptx_gpu

    capability = int(os.environ["ELECTRA_PTX"])
    print(
        f"Triton {triton.__version__}, sm_{capability}: sectors (global) and wavefronts (shared), taken and needed"
    )
    for name in sys.argv[1:] or CALLS:
        with ptx_gpu(capability), counted() as traffic:
            CALLS[name]()(seed_of(1))
        for (kernel, kind), count in traffic.items():
            print(f"{name:<18}{kernel:<26}{kind:<14}{count.taken:>9,}{count.needed:>9,}{count.waste:>7.2f}")


if __name__ == "__main__":
    main()
