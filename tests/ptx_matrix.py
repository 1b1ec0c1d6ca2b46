"""Tensor-core instructions of the PTX machine: which thread holds which element of a tile.

Names of indices: w warp, l lane, m/n/k row, column and inner index of a product. A lane's place is
(group, pair) = (lane // 4, lane % 4): it holds row `group` and columns 2·pair, 2·pair + 1 of an 8 x 8 tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from ptx_memory import Array, MemoryFault
from ptx_order import registers_of

if TYPE_CHECKING:
    from ptx_machine import Machine
    from ptx_program import Instruction

LANES = np.arange(32)
GROUP, PAIR = LANES // 4, LANES % 4


def _all_threads(machine: Machine) -> None:
    if not machine.active.all():
        raise MemoryFault("a warp's instruction in divergent code")


def bf16_to_f32(bits: Array) -> Array:
    """bf16 is the upper half of an fp32."""
    return np.asarray(bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def halves(registers: Array, kind: str) -> Array:
    """[..., 2·registers] float32 of registers that hold two numbers each, low half first."""
    pairs = np.ascontiguousarray(registers).view(np.uint16)
    if kind == "f16":
        return pairs.view(np.float16).astype(np.float32)
    return bf16_to_f32(pairs)


def _stack(machine: Machine, names: object) -> Array:
    """[warps, 32, len(names)] uint32."""
    assert isinstance(names, tuple)
    return np.stack([machine.read(name, 4) for name in names], -1).reshape(-1, 32, len(names))


# ---------------------------------------------------------------- 8 x 8 tiles from and to shared memory


def _matrix_places(machine: Machine, instruction: Instruction, operand: object, count: int) -> Array:
    """[warps, count, 8, 16]: the bytes of 8 x 8 tiles of 16-bit numbers; lane 8·i + r has row r of tile i."""
    _all_threads(machine)
    if "m8n8" not in instruction.opcode:
        raise NotImplementedError(instruction.text)
    address = machine.address(operand).reshape(-1, 32)[:, : 8 * count]  # type: ignore[arg-type]
    if (address % 16).any():
        raise MemoryFault("a matrix row at an address that is no multiple of 16")
    return machine.shared.places(address.ravel(), 16, "matrix").reshape(-1, count, 8, 16)


def _owners(machine: Machine, count: int) -> Array:
    return machine.every.reshape(-1, 32)[:, : 8 * count].ravel()


def load_matrix(machine: Machine, instruction: Instruction) -> None:
    """ldmatrix: register i of a lane gets its two elements of tile i, of its transpose with .trans."""
    names, operand = instruction.operands
    count = len(names)
    places = _matrix_places(machine, instruction, operand, count)
    rows = machine.shared.read(places.reshape(-1, 16), _owners(machine, count))
    tiles = rows.view(np.uint16).reshape(-1, count, 8, 8)
    if "trans" in instruction.opcode:
        tiles = tiles.swapaxes(-1, -2)
    held = np.ascontiguousarray(tiles).view(np.uint32).reshape(-1, count, 32)  # group · 4 + pair
    for i, name in enumerate(names):
        machine.write(name, np.ascontiguousarray(held[:, i]).ravel())


def store_matrix(machine: Machine, instruction: Instruction) -> None:
    """stmatrix, the inverse."""
    operand, names = instruction.operands
    count = len(names)
    places = _matrix_places(machine, instruction, operand, count)
    held = np.ascontiguousarray(_stack(machine, names).swapaxes(1, 2))  # [warps, count, 32]
    tiles = held.view(np.uint16).reshape(-1, count, 8, 8)
    if "trans" in instruction.opcode:
        tiles = np.ascontiguousarray(tiles.swapaxes(-1, -2))
    machine.shared.write(places.reshape(-1, 16), tiles.reshape(-1, 8).view(np.uint8), _owners(machine, count))


# ---------------------------------------------------------------- products


def _left_tile(registers: Array, kind: str) -> Array:
    """[w, 16, 16] from the four registers of each lane: rows group (+ 8 in 1 and 3), columns + 8 in 2 and 3."""
    values = halves(registers, kind).reshape(-1, 32, 4, 2)
    tile = np.empty((len(values), 16, 16), np.float32)
    for register in range(4):
        for half in range(2):
            tile[:, GROUP + 8 * (register % 2), 2 * PAIR + half + 8 * (register // 2)] = values[
                :, :, register, half
            ]
    return tile


def mma(machine: Machine, instruction: Instruction) -> None:
    """mma.m16n8k16: D = A B + C of each warp, fp32 sums; and the shapes of fp64."""
    _, _, _, shape, left, right, *types = instruction.opcode
    if types[0] == "f64":
        return _mma_f64(machine, instruction)
    if (shape, left, right, types[0], types[3]) != ("m16n8k16", "row", "col", "f32", "f32"):
        raise NotImplementedError(instruction.text)
    _all_threads(machine)
    out, a, b, c = instruction.operands
    kind = types[1]
    left_tile = _left_tile(_stack(machine, a), kind)
    values = halves(_stack(machine, b), kind).reshape(-1, 32, 2, 2)
    right_tile = np.empty((len(values), 16, 8), np.float32)
    for register in range(2):
        for half in range(2):
            right_tile[:, 2 * PAIR + half + 8 * register, GROUP] = values[:, :, register, half]
    product = left_tile.astype(np.float64) @ right_tile
    sums = _stack(machine, c).view(np.float32).astype(np.float64)
    for register in range(4):
        place = GROUP + 8 * (register // 2), 2 * PAIR + register % 2
        result = (sums[:, :, register] + product[:, place[0], place[1]]).astype(np.float32)
        machine.write(out[register], np.ascontiguousarray(result).view(np.uint32).ravel())
    return None


def _mma_f64(machine: Machine, instruction: Instruction) -> None:
    """m8n8k4 to m16n8k16: lane holds row `group` (+ 8) of A and column `group` of B, at every fourth k."""
    _all_threads(machine)
    out, a, b, c = ([operand] if isinstance(operand, str) else operand for operand in instruction.operands)
    blocks = len(c) // 2  # of eight rows
    product = np.zeros((machine.threads // 32, 8 * blocks, 8))
    for i, name in enumerate(a):
        left = machine.read(name, 8).view(np.float64).reshape(-1, 8, 4)
        right = machine.read(b[i // blocks], 8).view(np.float64).reshape(-1, 8, 4)
        product[:, 8 * (i % blocks) :][:, :8] += left @ right.swapaxes(1, 2)
    for i, name in enumerate(c):
        sums = machine.read(name, 8).view(np.float64).reshape(-1, 32)
        result = sums + product[:, GROUP + 8 * (i // 2), 2 * PAIR + i % 2]
        machine.write(out[i], result.view(np.uint64).ravel())


def shared_tile(
    machine: Machine, descriptor: int, swizzle: int | None, rows: int, transposed: bool, kind: str
) -> Array:
    """[rows, 16] of a matrix in shared memory, as a descriptor says it lies there, and that it is being read.

    Plain: the inner index k is contiguous; rows stand `swizzle` bytes apart in groups of 8, groups `stride` apart.
    Transposed: rows are contiguous, in runs of `swizzle` bytes `leading` apart; k in groups of 8 `stride` apart.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if swizzle is None or descriptor >> 49 & 7:
        raise NotImplementedError("a descriptor without a swizzle, or with a base offset")
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if transposed:
        run = swizzle // 2
        address = start + row // run * leading + row % run * 2 + k // 8 * stride + k % 8 * swizzle
    else:
        address = start + row // 8 * stride + row % 8 * swizzle + k * 2
    address = address ^ (address >> 7 & swizzle // 16 - 1) << 4  # the swizzle: 16-byte pieces change places
    places = machine.shared.places(address.ravel(), 2, "product")
    machine.products[-1].append(places)
    raw = machine.shared.read_by_product(places).view(np.uint16).reshape(rows, 16)
    return halves(raw.view(np.uint32), kind).reshape(rows, 16)


def wgmma(machine: Machine, instruction: Instruction) -> None:
    """wgmma.mma_async: D = A B (+ D) of four warps; A from shared memory or registers, B from shared memory.

    The product is there at once; what it reads counts as being read, and its registers as in use, until it is
    waited for.
    """
    match instruction.opcode[1]:
        case "commit_group":
            machine.product_registers.commit()
            return machine.products.append([])
        case "wait_group":
            return machine.finish_products(int(str(instruction.operands[0])))
        case "fence":
            return machine.product_registers.fence()
    _all_threads(machine)
    shape, result, kind = instruction.opcode[4:7]
    if result != "f32" or not shape.startswith("m64n") or not shape.endswith("k16"):
        raise NotImplementedError(instruction.text)
    columns = int(shape.removeprefix("m64n").removesuffix("k16"))
    out, a, b, accumulate, negate_a, negate_b, *transposed = instruction.operands
    if (negate_a, negate_b) != ("1", "1"):
        raise NotImplementedError("a negated factor")
    assert isinstance(out, tuple) and isinstance(b, str)
    factors = registers_of(a) if isinstance(a, tuple) else frozenset()
    machine.product_registers.begin(shape, registers_of(out), factors)
    groups = machine.threads // 128
    keep = machine.predicate(str(accumulate))
    left_registers = _left_tile(_stack(machine, a), kind) if isinstance(a, tuple) else None
    # What is not added to need not have been written.
    old = _stack(machine, out) if keep.any() else np.zeros((machine.threads // 32, 32, len(out)), np.uint32)
    sums = old.view(np.float32).reshape(groups, 4, 32, columns // 8, 2, 2)
    results = np.empty_like(sums)
    for group in range(groups):
        first = group * 128
        if left_registers is not None:
            left = left_registers[4 * group : 4 * group + 4].reshape(64, 16)
        else:
            description = _uniform(machine.read(str(a), 8)[first : first + 128])
            left = shared_tile(machine, description, _swizzle(description), 64, transposed[0] == "1", kind)
        description = _uniform(machine.read(b, 8)[first : first + 128])
        right = shared_tile(machine, description, _swizzle(description), columns, transposed[-1] == "1", kind)
        product = left.astype(np.float64) @ right.T.astype(np.float64)
        for warp in range(4):
            for i in range(2):  # rows 8·i + group of the warp's sixteen
                for half in range(2):
                    column = 8 * np.arange(columns // 8)[None, :] + 2 * PAIR[:, None] + half
                    before = sums[group, warp, :, :, i, half].astype(np.float64) if keep[first] else 0.0
                    new = product[(16 * warp + 8 * i + GROUP)[:, None], column]
                    results[group, warp, :, :, i, half] = before + new
    flat = results.view(np.uint32).reshape(machine.threads, len(out))
    for register, name in enumerate(out):
        machine.write(name, np.ascontiguousarray(flat[:, register]))
    return None


def _swizzle(descriptor: int) -> int | None:
    """Of wgmma's descriptors, in bytes."""
    return {1: 128, 2: 64, 3: 32}.get(descriptor >> 62 & 3)


def _uniform(values: Array) -> int:
    if (values != values[0]).any():
        raise MemoryFault("wgmma: the threads of a group name different matrices")
    return int(values[0])
