"""What only the PTX machine shows of the compiled kernels (`make test-ptx`): barriers count, no access is wasted.

That they compute the right thing is what all other tests of kernels show when they run on it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kernel_helpers import ON_PTX_MACHINE

if not ON_PTX_MACHINE:
    pytest.skip("needs ELECTRA_PTX (make test-ptx)", allow_module_level=True)

import ptx_driver
import ptx_machine
import torch
from electra_kernels import use
from kernel_calls import CALLS, seed_of
from ptx_machine import Machine
from ptx_memory import GlobalMemory, MemoryFault
from ptx_program import Instruction, Program
from ptx_traffic import counted
from tiny_steps import CONFIG, ENCODER, batch_of
from torch import Tensor

from electra_core.config import updated
from electra_core.initialisation import initialise
from electra_core.objectives import build_objective

NEEDED = ("cp.async.wait_group", "tcgen05.commit", "mbarrier.try_wait", "wgmma.commit", "wgmma.wait")
NEEDED_OR_NOT = ("bar", "fence.proxy.async", "tcgen05.wait", "wgmma.fence")
"""Of these the compiler sets some that nothing needs."""


def orders(instruction: Instruction) -> bool:
    """Whether it makes threads, copies or products wait for each other."""
    return ".".join(instruction.opcode).startswith((*NEEDED, *NEEDED_OR_NOT))


def without(program: Program, place: int) -> Program:
    """The program with an instruction that does nothing at `place`; a wait in a loop has always succeeded."""
    old = program.instructions[place]
    nothing = dataclasses.replace(old, opcode=("mov", "b32"), operands=("_", "0"), guard=None)
    if old.opcode[:2] == ("mbarrier", "try_wait"):
        nothing = dataclasses.replace(old, opcode=("mov", "pred"), operands=(old.operands[0], "1"))
    changed = (*program.instructions[:place], nothing, *program.instructions[place + 1 :])
    return dataclasses.replace(program, instructions=changed)


Launch = tuple[Sequence[int], tuple[int, int, int], Sequence[Tensor], int]
"""What a program runs with: arguments, grid, tensors, bytes of shared memory."""


def outcome(program: Program, launch: Launch) -> list[bytes]:
    """What the first program of a grid, alone, leaves in the tensors; they are as before afterwards."""
    arguments, grid, tensors, shared_bytes = launch
    memory = GlobalMemory(tensors)
    before = [region.bytes.copy() for region in memory.regions]
    try:
        with np.errstate(all="ignore"):
            Machine(program, arguments, grid, (0, 0, 0), memory, shared_bytes).run()
        return [region.bytes.tobytes() for region in memory.regions]
    finally:
        for region, old in zip(memory.regions, before, strict=True):
            region.bytes[:] = old


@pytest.mark.parametrize("name", ["attention-short", "layer-norm", "sample"])
def test_a_missing_barrier_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each barrier, wait, commit and fence left out by itself, in one program of every kernel."""
    run_all, seen = ptx_machine.launch, set()
    found, missed = [], []

    def watched(program: Program, *launch: Any) -> None:
        places = [place for place, instruction in enumerate(program.instructions) if orders(instruction)]
        if program.name not in seen and places:
            seen.add(program.name)
            expected = outcome(program, launch)
            for place in places:
                try:
                    same = outcome(without(program, place), launch) == expected
                except MemoryFault:
                    same = False
                (missed if same else found).append(".".join(program.instructions[place].opcode))
        run_all(program, *launch)

    monkeypatch.setattr(ptx_driver.ptx_machine, "launch", watched)
    CALLS[name]()(seed_of(1))
    barriers = [opcode for opcode in missed if opcode.startswith("bar")]
    print(f"{name}: {len(found)} found, {Counter(missed)} not")
    assert len(found) >= 5 and len(barriers) <= len(found) // 5, missed
    assert not [opcode for opcode in missed if opcode.startswith(NEEDED)], missed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pretraining_step_is_the_twins(precision: str) -> None:
    """Forward and backward of generator and discriminator, with dropout: the same words drawn, gradients alike."""
    config = updated(CONFIG, {}, "test")
    encoder = replace(ENCODER, hidden_size=64, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    (part, *_) = batch_of(0, config)
    outputs, gradients = [], []
    for implementation in ("triton", "reference"):
        model = build_objective(encoder, config)
        initialise(model, 0.1, seed=0)
        with use(implementation), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):  # type: ignore
            output = model(part, 5)
        output.loss.backward()
        outputs.append(output)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    ours, twins = outputs
    assert torch.equal(ours.corrupted_ids_T, twins.corrupted_ids_T)
    close = {"fp32": 1e-5, "bf16": 2e-2}[precision]
    torch.testing.assert_close(ours.loss, twins.loss, rtol=close, atol=0)
    assert (gradients[0] - gradients[1]).norm() <= close * gradients[1].norm()


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
