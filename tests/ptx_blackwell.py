"""sm_100's tensor cores on the PTX machine: tensor memory, tcgen05 instructions, the barriers they arrive at.

Tensor memory is 128 lanes x 512 columns of 32 bits; an address is lane << 16 | column. A warp reaches the quarter
of the lanes with its number (modulo 4). A product of 128 rows has row i in lane i, one of 64 rows takes a half of
each quarter. fp32 results take a column each, 16-bit factors share one by pairs.

Products run at once; what they read counts as being read until a wait for their barrier has succeeded. Not
checked: accesses to tensor memory itself that nothing orders.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from ptx_matrix import LANES, halves, shared_tile
from ptx_memory import Array, MemoryFault

if TYPE_CHECKING:
    from ptx_machine import Machine
    from ptx_program import Instruction

SWIZZLES = {2: 128, 4: 64, 6: 32}  # of a descriptor, in bytes
FORMATS = {0: "f16", 1: "bf16"}


@dataclass
class Barrier:
    """An mbarrier for one arrival per phase."""

    phase: int = 0
    arrived_for: list[Array] = field(default_factory=list)
    """Bytes that the products read whose end it reported."""


@dataclass
class TensorMemory:
    """A program's."""

    words: Array = field(default_factory=lambda: np.full((128, 512), 0xFFFFFFFF, np.uint32))
    allocated: dict[int, int] = field(default_factory=dict)
    """First column -> columns."""

    def columns(self, first: int, count: int) -> slice:
        """`count` columns, which one allocation must hold."""
        if not any(base <= first and first + count <= base + size for base, size in self.allocated.items()):
            raise MemoryFault(f"tensor memory: columns {first} to {first + count} are not allocated")
        return slice(first, first + count)


def _one(values: Array, what: str) -> int:
    """The value that all these threads name."""
    if len(values) == 0 or (values != values[0]).any():
        raise MemoryFault(f"{what}: its threads name different values")
    return int(values[0])


def tcgen05(machine: Machine, instruction: Instruction) -> None:
    """All instructions of the family; waits for loads and stores have nothing to wait for here."""
    match instruction.opcode[1]:
        case "alloc":
            _allocate(machine, instruction)
        case "dealloc":
            first = _one(machine.read(str(instruction.operands[0]), 4)[machine.active], "tcgen05.dealloc")
            if machine.tensor_memory.allocated.pop(first, None) != int(str(instruction.operands[1])):
                raise MemoryFault("tcgen05.dealloc: was not allocated like that")
        case "ld" | "st":
            _load_or_store(machine, instruction)
        case "mma":
            _multiply(machine, instruction)
        case "commit":
            address = _one(machine.address(instruction.operands[0]), "tcgen05.commit")
            barrier = machine.barriers[address]
            barrier.phase += 1
            barrier.arrived_for += machine.products.pop()
            machine.products.append([])
        case "wait" | "relinquish_alloc_permit":
            pass
        case _:
            raise NotImplementedError(instruction.text)


def _allocate(machine: Machine, instruction: Instruction) -> None:
    """Writes the first column's address to shared memory."""
    place, columns = instruction.operands
    first = max((base + size for base, size in machine.tensor_memory.allocated.items()), default=0)
    if first + int(str(columns)) > 512:
        raise MemoryFault("tcgen05.alloc: 512 columns are all there are")
    machine.tensor_memory.allocated[first] = int(str(columns))
    leader = machine.every[machine.active][:1]
    machine.shared.store(machine.address(place)[:1], [np.full(1, first, np.uint32)], leader)


def _load_or_store(machine: Machine, instruction: Instruction) -> None:
    """32x32b: lane l of a warp has lane l of its quarter. 16x32bx2: lanes from 16 on, others' other columns."""
    is_load = instruction.opcode[1] == "ld"
    shape, operands = instruction.opcode[4], list(instruction.operands)
    names = operands.pop(0 if is_load else -1)
    names = names if isinstance(names, tuple) else (names,)
    further = int(str(operands[1])) if shape == "16x32bx2" else 0
    if shape not in ("32x32b", "16x32bx2"):
        raise NotImplementedError(instruction.text)
    every, tensor = machine.address(operands[0]), machine.tensor_memory
    addresses = np.zeros(machine.threads, np.int64)
    addresses[machine.active] = every
    values = np.zeros((machine.threads, len(names)), np.uint32)
    if not is_load:
        values = np.stack([machine.read(name, 4) for name in names], 1)
    for warp in np.flatnonzero(machine.active.reshape(-1, 32).all(1)):
        threads = slice(32 * warp, 32 * warp + 32)
        address = _one(addresses[threads], "tcgen05.ld or st")
        if (address >> 16) % 128 // 32 != warp % 4:
            raise MemoryFault("tensor memory: a warp reaches only its quarter of the lanes")
        halves_apart = shape == "16x32bx2"
        lanes = (address >> 16) + (LANES % 16 if halves_apart else LANES)
        for part in (LANES < 16, LANES >= 16):
            first = (address & 0xFFFF) + (further if part[-1] else 0)
            columns = tensor.columns(first, len(names))
            if is_load:
                values[threads][part] = tensor.words[lanes[part], columns]
            else:
                tensor.words[lanes[part], columns] = values[threads][part]
    if is_load:
        for register, name in enumerate(names):
            machine.write(name, np.ascontiguousarray(values[:, register]))


def _lanes_of(rows: int) -> Array:
    """Where the rows of a matrix are."""
    row = np.arange(rows)
    return row if rows == 128 else row // 16 * 32 + row % 16


def _multiply(machine: Machine, instruction: Instruction) -> None:
    """tcgen05.mma.kind::f16 of one thread's wording: D = A B (+ D) in tensor memory, fp32 sums."""
    if instruction.opcode[2:] != ("cta_group", "1", "kind", "f16"):
        raise NotImplementedError(instruction.text)
    target, a, b, wording, accumulate = (str(operand) for operand in instruction.operands)
    if machine.active.sum() != 1:
        raise MemoryFault("tcgen05.mma: is for one thread")
    here = machine.active
    format_ = int(machine.read(wording, 4)[here][0])
    rows, columns = (format_ >> 24 & 31) << 4, (format_ >> 17 & 63) << 3
    if format_ >> 4 & 3 != 1 or format_ >> 13 & 3 or rows not in (64, 128):
        raise NotImplementedError("results that are not fp32, a negated factor, or other numbers of rows")
    kinds = FORMATS[format_ >> 7 & 7], FORMATS[format_ >> 10 & 7]
    tensor, lanes = machine.tensor_memory, _lanes_of(rows)
    if a.startswith("%rd"):
        left = _described(machine, int(machine.read(a, 8)[here][0]), rows, format_ >> 15 & 1, kinds[0])
    else:
        source = int(machine.address(a)[0])
        packed = tensor.words[lanes + (source >> 16), tensor.columns(source & 0xFFFF, 8)]
        left = halves(packed, kinds[0])
    right = _described(machine, int(machine.read(b, 8)[here][0]), columns, format_ >> 16 & 1, kinds[1])
    place = int(machine.address(target)[0])
    first = place & 0xFFFF
    tensor.columns(first, columns)
    where = (lanes + (place >> 16))[:, None], np.arange(columns)[None, :] + first
    result = left.astype(np.float64) @ right.T.astype(np.float64)
    if machine.predicate(accumulate)[here][0]:
        result += tensor.words[where].view(np.float32)
    tensor.words[where] = result.astype(np.float32).view(np.uint32)


def _described(machine: Machine, descriptor: int, rows: int, transposed: int, kind: str) -> Array:
    """[rows, 16] in shared memory."""
    swizzle = SWIZZLES.get(descriptor >> 61 & 7)
    return shared_tile(machine, descriptor, swizzle, rows, bool(transposed), kind)


def mbarrier(machine: Machine, instruction: Instruction) -> None:
    """init, inval, and a wait for the end of a phase, given its parity."""
    if instruction.opcode[1] == "init":
        address = _one(machine.address(instruction.operands[0]), "mbarrier.init")
        if instruction.operands[1] != "1":
            raise NotImplementedError("a barrier for several arrivals")
        machine.barriers[address] = Barrier()
    elif instruction.opcode[1] == "inval":
        barrier = machine.barriers.pop(_one(machine.address(instruction.operands[0]), "mbarrier.inval"))
        if barrier.arrived_for:
            raise MemoryFault("mbarrier.inval: products that it reports were not waited for")
    elif instruction.opcode[1:4] == ("try_wait", "parity", "shared"):
        out, place, parity = instruction.operands
        barrier = machine.barriers[_one(machine.address(place), "mbarrier.try_wait")]
        wanted = machine.read(str(parity), 4)
        complete = np.full(machine.threads, barrier.phase % 2) != wanted
        if not complete[machine.active].any():
            raise MemoryFault("mbarrier.try_wait: for what nobody has committed")
        for places in barrier.arrived_for:
            machine.shared.product_ended(places, everybody_knows=bool(machine.active.all()))
        barrier.arrived_for = []
        machine.write(str(out), complete)
    else:
        raise NotImplementedError(instruction.text)


def elect(machine: Machine, instruction: Instruction) -> None:
    """elect.sync leader|predicate: the first active lane of each warp."""
    leader, predicate = str(instruction.operands[0]).split("|")
    first = machine.active.reshape(-1, 32).argmax(1)
    machine.write(leader, np.repeat(first, 32).astype(np.uint32))
    machine.write(predicate, (LANES == first[:, None]).ravel())
