"""What only the PTX machine shows of the compiled kernels (`make test-ptx`): barriers count, no access is wasted.

That they compute the right thing is what all other tests of kernels show when they run on it.
"""

from __future__ import annotations

import dataclasses

import pytest
from kernel_helpers import ON_PTX_MACHINE

if not ON_PTX_MACHINE:
    pytest.skip("needs ELECTRA_PTX (make test-ptx)", allow_module_level=True)

import ptx_driver
import ptx_machine
from kernel_calls import CALLS, seed_of
from ptx_memory import MemoryFault
from ptx_program import Instruction, Program
from ptx_traffic import counted

ORDERING = {"bar", "cp.async.wait_group", "fence.proxy.async"}


def orders(instruction: Instruction) -> bool:
    """Whether it makes threads or copies wait for each other."""
    return any(".".join(instruction.opcode).startswith(name) for name in ORDERING)


def without(program: Program, place: int) -> Program:
    """The program with an instruction that does nothing at `place`."""
    nothing = dataclasses.replace(
        program.instructions[place], opcode=("mov", "b32"), operands=("_", "0"), guard=None
    )
    changed = (*program.instructions[:place], nothing, *program.instructions[place + 1 :])
    return dataclasses.replace(program, instructions=changed)


@pytest.mark.parametrize("name", ["attention-short", "layer-norm", "sample"])
def test_a_missing_barrier_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each barrier, wait and fence left out by itself. (The compiler may set one that nothing needs.)"""
    launch, call, programs = ptx_machine.launch, CALLS[name](), {}

    def tampered(program: Program, *rest: object) -> None:
        programs[program.name] = program
        launch(without(program, left_out[1]) if program.name == left_out[0] else program, *rest)  # type: ignore

    monkeypatch.setattr(ptx_driver.ptx_machine, "launch", tampered)
    left_out = ("", 0)
    expected = call(seed_of(1))
    found, missed = 0, []
    for kernel, program in list(programs.items()):
        for place, instruction in enumerate(program.instructions):
            if orders(instruction):
                left_out = (kernel, place)
                try:
                    results = call(seed_of(1))
                except MemoryFault:
                    found += 1
                    continue
                same = all(bool((a == b).all()) for a, b in zip(results, expected))
                found, missed = found + (not same), missed + [f"{kernel}: {instruction.text}"] * same
    barriers = [text for text in missed if "bar" in text]
    assert found >= 8 and len(barriers) <= found // 5, missed


STREAMING = {  # sectors taken per sector needed
    "attention-short": 1.05, "attention-general": 1.05, "rtd": 1.05, "layer-norm": 1.05, "embedding": 1.05,
    "sample": 1.1, "mlm-narrow": 1.2, "mlm-wide": 1.2,
}  # fmt: skip
PER_ROW = {
    "_tile_sums_kernel",
    "_wide_tile_sums_kernel",
    "_finish_kernel",
    "_scale_kernel",
    "_finish_dhidden_kernel",
}
"""Kernels whose accesses are a few numbers per row, or small against what their neighbours move."""


@pytest.mark.parametrize(("name", "most"), STREAMING.items(), ids=STREAMING)
def test_accesses_fill_what_the_memory_moves(name: str, most: float) -> None:
    call = CALLS[name]()
    with counted() as traffic:
        call(seed_of(1))
    assert traffic
    for (kernel, kind), count in traffic.items():
        if kind == "shared":
            assert count.waste <= 1.25, f"{kernel}: bank conflicts, {count}"
        elif kernel not in PER_ROW:
            assert count.waste <= most, f"{kernel}, {kind}: {count}"
