"""sm_100's tensor cores on the PTX machine: tensor memory, tcgen05 instructions, the barriers they arrive at.

Tensor memory is 128 lanes x 512 columns of 32 bits; an address is lane << 16 | column. A warp reaches the quarter
of the lanes with its number (modulo 4). A product of 128 rows has row i in lane i, one of 64 rows takes a half of
each quarter. fp32 results take a column each, 16-bit factors share one by pairs.

Everything runs at once. What products read counts as being read until a wait for their barrier has succeeded, and
accesses to tensor memory must be in an order that something promises (`ptx_order`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from ptx_matrix import LANES, halves, shared_tile
from ptx_memory import Array, MemoryFault
from ptx_order import Access, TensorOrder, set_of

if TYPE_CHECKING:
    from ptx_machine import Machine
    from ptx_program import Instruction, Operand

SWIZZLES = {2: 128, 4: 64, 6: 32}  # of a descriptor, in bytes
FORMATS = {0: "f16", 1: "bf16"}
WHOLE_WARP = 0xFFFFFFFF
SIZES = (32, 64, 128, 256, 512)  # of an allocation, in columns
# What an mbarrier's bytes hold here: no program may look, but one may store over them.
ALIVE, DEAD = np.uint64(0x6261727269657221), np.uint64(0)


@dataclass
class Barrier:
    """An mbarrier for one arrival per phase: each commit ends one."""

    committed: int = 0
    waited: int = 0
    """The phases that a wait has seen the end of."""
    products: list[Access] = field(default_factory=list)
    """Those whose end it reports, and that not every thread knows to be over."""


@dataclass
class TensorMemory:
    """A program's."""

    words: Array = field(default_factory=lambda: np.full((128, 512), 0xFFFFFFFF, np.uint32))
    allocated: dict[int, int] = field(default_factory=dict)
    """First column -> columns."""
    may_allocate: bool = True
    order: TensorOrder = field(default_factory=TensorOrder)

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


def _check_threads(machine: Machine, instruction: Instruction) -> None:
    """Of a warp all lanes or none; for some instructions one warp, for others one thread."""
    what, lanes = instruction.opcode[1], machine.active.reshape(-1, 32).sum(1)
    if "sync" in instruction.opcode and not np.isin(lanes, (0, 32)).all():
        raise MemoryFault(f"tcgen05.{what}: some lanes of a warp are not there")
    if what in ("alloc", "dealloc") and np.count_nonzero(lanes) != 1:
        raise MemoryFault(f"tcgen05.{what}: is for one warp")
    if what in ("mma", "commit") and lanes.sum() != 1:
        raise MemoryFault(f"tcgen05.{what}: is for one thread")


def tcgen05(machine: Machine, instruction: Instruction) -> None:
    """All instructions of the family."""
    _check_threads(machine, instruction)
    tensor, active = machine.tensor_memory, set_of(machine.active)
    match instruction.opcode[1]:
        case "alloc":
            _allocate(machine, instruction)
        case "dealloc":
            _deallocate(machine, instruction)
        case "relinquish_alloc_permit":
            tensor.may_allocate = False
        case "ld" | "st":
            _load_or_store(machine, instruction)
        case "mma":
            _multiply(machine, instruction)
        case "commit":
            barrier = _living(machine, instruction.operands[0], "tcgen05.commit")
            barrier.committed += 1
            barrier.products += tensor.order.commit(active)
        case "wait":
            tensor.order.wait(instruction.opcode[2], active)
        case "fence":  # before_thread_sync: the barriers that this machine knows order what was waited for
            if instruction.opcode[2] == "after_thread_sync":
                tensor.order.fence(active)
        case _:
            raise NotImplementedError(instruction.text)


def _allocate(machine: Machine, instruction: Instruction) -> None:
    """Writes the first column's address to shared memory."""
    tensor, (place, operand) = machine.tensor_memory, instruction.operands
    columns = int(str(operand))
    first = max((base + size for base, size in tensor.allocated.items()), default=0)
    if not tensor.may_allocate or columns not in SIZES:
        raise MemoryFault(f"tcgen05.alloc: after relinquish_alloc_permit, or not of {SIZES} columns")
    if first + columns > 512:
        raise MemoryFault("tcgen05.alloc: 512 columns are all there are")
    tensor.allocated[first] = columns
    leader = machine.every[machine.active][:1]
    machine.shared.store(machine.address(place)[:1], [np.full(1, first, np.uint32)], leader)


def _deallocate(machine: Machine, instruction: Instruction) -> None:
    """Once every access to these columns is over."""
    tensor, (start, columns) = machine.tensor_memory, (str(operand) for operand in instruction.operands)
    first = _one(machine.read(start, 4)[machine.active], "tcgen05.dealloc")
    if tensor.allocated.get(first) != int(columns):
        raise MemoryFault("tcgen05.dealloc: was not allocated like that")
    everything = tensor.columns(first, int(columns))
    tensor.order.check(Access("dealloc", set_of(machine.active), (1 << 128) - 1, everything, writes=True))
    del tensor.allocated[first]


def _load_or_store(machine: Machine, instruction: Instruction) -> None:
    """32x32b: lane l of a warp has lane l of its quarter. 16x32bx2: lanes from 16 on, others' other columns."""
    is_load = instruction.opcode[1] == "ld"
    shape, operands = instruction.opcode[4], list(instruction.operands)
    names = operands.pop(0 if is_load else -1)
    names = names if isinstance(names, tuple) else (names,)
    further = int(str(operands[1])) if shape == "16x32bx2" else 0
    if shape not in ("32x32b", "16x32bx2") or len(instruction.opcode) > 7:  # .pack::16b, .unpack::16b
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
            owner = WHOLE_WARP << 32 * int(warp)
            tensor.order.begin(Access(instruction.opcode[1], owner, _rows(lanes[part]), columns, not is_load))
            if is_load:
                values[threads][part] = tensor.words[lanes[part], columns]
            else:
                tensor.words[lanes[part], columns] = values[threads][part]
    if is_load:
        for register, name in enumerate(names):
            machine.write(name, np.ascontiguousarray(values[:, register]))


def _rows(lanes: Array) -> int:
    """The set of these lanes of tensor memory."""
    return set_of(np.isin(np.arange(128), lanes))


def _lanes_of(rows: int) -> Array:
    """Where the rows of a matrix are."""
    row = np.arange(rows)
    return row if rows == 128 else row // 16 * 32 + row % 16


def _multiply(machine: Machine, instruction: Instruction) -> None:
    """tcgen05.mma.kind::f16 of one thread's wording: D = A B (+ D) in tensor memory, fp32 sums."""
    if instruction.opcode[2:] != ("cta_group", "1", "kind", "f16"):
        raise NotImplementedError(instruction.text)
    target, a, b, wording, accumulate = (str(operand) for operand in instruction.operands)
    here = machine.active
    format_ = int(machine.read(wording, 4)[here][0])
    rows, columns = (format_ >> 24 & 31) << 4, (format_ >> 17 & 63) << 3
    if format_ >> 4 & 3 != 1 or format_ >> 13 & 3 or rows not in (64, 128):
        raise NotImplementedError("results that are not fp32, a negated factor, or other numbers of rows")
    kinds = FORMATS[format_ >> 7 & 7], FORMATS[format_ >> 10 & 7]
    tensor, lanes, thread = machine.tensor_memory, _lanes_of(rows), set_of(here)
    if a.startswith("%rd"):
        left = _described(machine, int(machine.read(a, 8)[here][0]), rows, format_ >> 15 & 1, kinds[0])
    else:
        source = int(machine.address(a)[0])
        where = lanes + (source >> 16), tensor.columns(source & 0xFFFF, 8)
        tensor.order.begin(Access("mma", thread, _rows(where[0]), where[1], writes=False))
        left = halves(tensor.words[where], kinds[0])
    right = _described(machine, int(machine.read(b, 8)[here][0]), columns, format_ >> 16 & 1, kinds[1])
    place = int(machine.address(target)[0])
    where = lanes + (place >> 16), tensor.columns(place & 0xFFFF, columns)
    shared, machine.products = machine.products[-1], [[]]
    product = Access("mma", thread, _rows(where[0]), where[1], True, (place, rows, columns), shared)
    tensor.order.begin(product)
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
    what, place = f"mbarrier.{instruction.opcode[1]}", instruction.operands[0]
    if instruction.opcode[1] == "init":
        if instruction.operands[1] != "1":
            raise NotImplementedError("a barrier for several arrivals")
        machine.barriers[_one(machine.address(place), what)] = Barrier()
        _mark(machine, place, ALIVE)
    elif instruction.opcode[1] == "inval":
        barrier = _living(machine, place, what)
        if barrier.committed > barrier.waited:
            raise MemoryFault("mbarrier.inval: products that it reports were not waited for")
        del machine.barriers[_one(machine.address(place), what)]
        _mark(machine, place, DEAD)
    elif instruction.opcode[1:3] == ("try_wait", "parity"):
        out, place, parity = instruction.operands
        barrier = _living(machine, place, what)
        _wait(machine, barrier, _one(machine.read(str(parity), 4)[machine.active], what), instruction.opcode)
        machine.write(str(out), np.ones(machine.threads, bool))
    else:
        raise NotImplementedError(instruction.text)


def _mark(machine: Machine, place: Operand, value: np.uint64) -> None:
    threads = machine.every[machine.active]
    machine.shared.store(machine.address(place), [np.full(len(threads), value)], threads)


def _living(machine: Machine, place: Operand, what: str) -> Barrier:
    """The mbarrier at this address, which these threads must know to be initialised."""
    (held,) = machine.shared.load(machine.address(place), 8, 1, machine.every[machine.active])
    barrier = machine.barriers.get(_one(machine.address(place), what))
    if barrier is None or (held != ALIVE).any():
        raise MemoryFault(f"{what}: no mbarrier is here, or something was stored over it")
    return barrier


def _wait(machine: Machine, barrier: Barrier, parity: int, opcode: tuple[str, ...]) -> None:
    """For the phase that is under way, or with the other parity for the one before, which has ended."""
    under_way = barrier.committed - barrier.waited
    if parity == barrier.waited % 2:
        if under_way == 0:
            raise MemoryFault("mbarrier.try_wait: for what nobody has committed")
        if under_way > 1:
            raise MemoryFault("mbarrier.try_wait: two phases were committed, and it may see the end of either")
        barrier.waited += 1
    elif under_way:
        raise MemoryFault("mbarrier.try_wait: succeeds before the products that were committed have ended")
    everybody = bool(machine.active.all())
    for product in barrier.products:
        for places in product.reads_shared:
            machine.shared.product_ended(places, everybody)
        product.reads_shared = []
    machine.tensor_memory.order.reported(barrier.products, set_of(machine.active), "relaxed" in opcode)
    if everybody:
        barrier.products = []


def elect(machine: Machine, instruction: Instruction) -> None:
    """elect.sync leader|predicate: the first active lane of each warp."""
    leader, predicate = str(instruction.operands[0]).split("|")
    first = machine.active.reshape(-1, 32).argmax(1)
    machine.write(leader, np.repeat(first, 32).astype(np.uint32))
    machine.write(predicate, (LANES == first[:, None]).ravel())
