"""What each PTX instruction does to a `Machine` (NVIDIA, "Parallel Thread Execution ISA", section 9.7)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import ptx_blackwell
import ptx_matrix
from ptx_matrix import bf16_to_f32, halves
from ptx_memory import UNSIGNED, Array, MemoryFault
from ptx_program import names_of

if TYPE_CHECKING:
    from ptx_machine import Machine
    from ptx_program import Instruction

TYPES: dict[str, Any] = {
    "f32": np.float32, "f64": np.float64, "f16": np.float16,
    **{f"{kind}{bits}": np.dtype(f"{code}{bits // 8}") for kind, code in (("s", "i"), ("u", "u"), ("b", "u"))
       for bits in (8, 16, 32, 64)},
}  # fmt: skip
WIDER = {"s32": np.int64, "u32": np.uint64, "s16": np.int32, "u16": np.uint32}


def f32_to_bf16(values: Array) -> Array:
    """Rounded to the nearest, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def typed(machine: Machine, name: object, type_: str) -> Array:
    """An operand's value."""
    assert isinstance(name, str)
    if type_ == "pred":
        return machine.predicate(name)
    if type_ == "bf16":
        return bf16_to_f32(machine.read(name, 2))
    if type_ == "f32x2":
        return machine.read(name, 8).view(np.float32).reshape(-1, 2)
    dtype = np.dtype(TYPES[type_])
    return machine.read(name, dtype.itemsize).view(dtype)


def bits_of(value: Array, type_: str) -> Array:
    """What of a value stands in a register."""
    if type_ == "pred":
        return value
    if type_ == "bf16":
        return f32_to_bf16(value.astype(np.float32, copy=False))
    if type_ == "f32x2":
        return np.ascontiguousarray(bits_of(value, "f32")).view(np.uint64).ravel()
    dtype = np.dtype(TYPES[type_])
    bits = np.ascontiguousarray(value.astype(dtype, copy=False)).view(UNSIGNED[dtype.itemsize])
    if dtype.kind == "f":  # a GPU knows one NaN; an x86 passes on the one it was given
        bits = np.where(np.isnan(value), UNSIGNED[dtype.itemsize](2 ** (8 * dtype.itemsize - 1) - 1), bits)
    return bits


# ---------------------------------------------------------------- arithmetic


def _flush(value: Array) -> Array:
    """.ftz: subnormal numbers count as zero."""
    return np.where(np.abs(value) < np.finfo(value.dtype).tiny, np.copysign(value.dtype.type(0), value), value)


def _fma(a: Array, b: Array, c: Array) -> Array:
    """a·b + c of fp32, in fp64: the product is exact there. (The sum is rounded twice, once in 2^29 wrongly.)"""
    if a.dtype == np.float64:
        return np.asarray(a * b + c)
    return np.asarray((a.astype(np.float64) * b + c).astype(np.float32))


def _max(*values: Array) -> Array:
    """Of a number and NaN the number, for floats."""
    return functools.reduce(np.fmax if values[0].dtype.kind == "f" else np.maximum, values)


def _min(*values: Array) -> Array:
    return functools.reduce(np.fmin if values[0].dtype.kind == "f" else np.minimum, values)


def _shl(a: Array, count: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), a.dtype.type(0))


def _shr(a: Array, count: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, a.dtype.type(0))


def _bfe(a: Array, first: Array, length: Array) -> Array:
    """`length` bits from `first` on, signed where the type is."""
    bits = 8 * a.dtype.itemsize
    first, length = first.astype(np.int64), length.astype(np.int64)
    left = (bits - first - length).astype(a.dtype)
    return np.asarray((a << left) >> (bits - length).astype(a.dtype))


def _divide(a: Array, b: Array) -> Array:
    """Integers towards zero, as C does."""
    if a.dtype.kind == "f":
        return np.asarray(a / b)
    if a.dtype.kind == "u":
        return np.asarray(a // b)
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return np.asarray((np.sign(a) * np.sign(b) * quotient).astype(a.dtype))


def _prmt(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes picked from the eight of b:a."""
    whole = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for place in range(4):
        pick = (selector >> np.uint32(4 * place)).astype(np.uint64) & np.uint64(15)
        if (pick > 7).any():
            raise NotImplementedError("prmt with the sign of a byte")
        byte = (whole >> (pick * np.uint64(8))) & np.uint64(0xFF)
        out |= byte.astype(np.uint32) << np.uint32(8 * place)
    return out


ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": _fma, "div": _divide,
    "min": _min, "max": _max, "abs": np.abs, "neg": np.negative, "mad": lambda a, b, c: a * b + c,
    "sqrt": np.sqrt, "rcp": lambda a: 1 / a, "ex2": np.exp2, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert, "shl": _shl, "shr": _shr, "bfe": _bfe, "prmt": _prmt,
}  # fmt: skip
COUNTS = {"shl": (1,), "shr": (1,), "bfe": (1, 2), "prmt": (2,)}
"""Which sources are unsigned 32-bit numbers whatever the instruction's type."""


def _arithmetic(machine: Machine, instruction: Instruction) -> None:
    name, *modifiers, type_ = instruction.opcode
    out, *sources = instruction.operands
    counts = COUNTS.get(name, ())
    types = ["u32" if i in counts else type_ for i in range(len(sources))]
    if modifiers[-1:] == ["f32"]:  # fp32 with factors in half precision
        types, type_ = [*[type_] * (len(sources) - 1), "f32"], "f32"
    values = [typed(machine, source, its) for source, its in zip(sources, types)]
    result_type = type_
    if "wide" in modifiers or "hi" in modifiers:
        values = [v.astype(WIDER[type_]) for v in values[:2]] + values[2:]
        wide_type = f"{type_[0]}{2 * int(type_[1:])}"
        if "wide" in modifiers:
            result_type = wide_type
            values[2:] = [typed(machine, s, wide_type) for s in sources[2:]]
    if "ftz" in modifiers:
        values = [_flush(v) for v in values]
    result = ARITHMETIC[name](*values)
    if "hi" in modifiers:
        result = result >> (8 * np.dtype(TYPES[type_]).itemsize)
    if "ftz" in modifiers:
        result = _flush(result)
    machine.write(str(out), bits_of(np.asarray(result), result_type))


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _compare(how: str, x: Array, y: Array) -> Array:
    unordered = (x != x) | (y != y)
    if how in ("nan", "num"):
        return unordered if how == "nan" else ~unordered
    if how in ("ne", "neu"):
        return np.asarray((x != y) & ~unordered if how == "ne" else x != y)
    if how in COMPARISONS:
        return COMPARISONS[how](x, y)
    return np.asarray(COMPARISONS[how.removesuffix("u")](x, y) | unordered)  # ltu, …: also if one of them is NaN


def _setp(machine: Machine, instruction: Instruction) -> None:
    """One predicate, or two (`p|q`) for the lower and the upper half of a packed type."""
    _, how, *_, type_ = instruction.opcode
    out, a, b = (str(operand) for operand in instruction.operands)
    if not type_.endswith("x2"):
        return machine.write(out, _compare(how, typed(machine, a, type_), typed(machine, b, type_)))
    for half, name in enumerate(out.split("|")):
        x, y = (halves(machine.read(s, 4), type_.removesuffix("x2"))[half::2] for s in (a, b))
        machine.write(name, _compare(how, x, y))
    return None


def _selp(machine: Machine, instruction: Instruction) -> None:
    type_ = instruction.opcode[-1]
    out, a, b, which = instruction.operands
    value = np.where(machine.predicate(str(which)), typed(machine, a, type_), typed(machine, b, type_))
    machine.write(str(out), bits_of(value, type_))


def _convert(machine: Machine, instruction: Instruction) -> None:
    target, source = instruction.opcode[-2:]
    out, *sources = instruction.operands
    values = [typed(machine, name, source) for name in sources]
    if target in ("bf16x2", "f16x2"):  # the first source is the upper half
        high, low = (bits_of(value, target[:-2]).astype(np.uint32) for value in values)
        return machine.write(str(out), high << np.uint32(16) | low)
    (value,) = values
    whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}.get(instruction.opcode[1])
    if value.dtype.kind == "f" and whole is not None:  # said from float to float, too: fp64's erf asks for it
        value = whole(value)
    return machine.write(str(out), bits_of(value, target))


# ---------------------------------------------------------------- moving


def _move(machine: Machine, instruction: Instruction) -> None:
    out, source = instruction.operands
    type_ = instruction.opcode[-1]
    if type_ == "pred":
        return machine.write(str(out), machine.predicate(str(source)))
    width = int(type_[1:]) // 8
    if isinstance(source, tuple):
        part = width // len(source)
        value = np.zeros(machine.threads, UNSIGNED[width])
        for place, name in enumerate(source):
            if name not in machine.registers and name.startswith("%"):
                continue  # half of a pair that nobody uses
            value |= machine.read(name, part).astype(UNSIGNED[width]) << UNSIGNED[width](8 * part * place)
        return machine.write(str(out), value)
    value = machine.read(source, width)
    if isinstance(out, tuple):
        part = width // len(out)
        for place, name in enumerate(out):
            machine.write(name, (value >> UNSIGNED[width](8 * part * place)).astype(UNSIGNED[part]))
        return None
    return machine.write(out, value)


def _spread(machine: Machine, values: Array) -> Array:
    """One element per thread from one per active thread."""
    out = np.zeros(machine.threads, values.dtype)
    out[machine.active] = values
    return out


def _load(machine: Machine, instruction: Instruction) -> None:
    space, type_ = instruction.opcode[1], instruction.opcode[-1]
    out, place = instruction.operands
    names, width = names_of(out), int(type_[1:]) // 8
    if space == "param":
        bits = machine.arguments[str(place)]
        value = np.full(machine.threads, bits % (1 << 8 * width)).astype(UNSIGNED[width])
        if type_[0] == "s":  # into a wider register
            value = value.view(TYPES[type_]).astype(np.int64).view(np.uint64)
        return machine.write(names[0], value)
    address = machine.address(place)
    if space == "global":
        loaded = machine.global_memory.load(address, width, len(names), machine.number)
    else:
        loaded = machine.shared.load(address, width, len(names), machine.every[machine.active])
    for name, value in zip(names, loaded):
        machine.write(name, _spread(machine, value))
    return None


def _store(machine: Machine, instruction: Instruction) -> None:
    width = int(instruction.opcode[-1][1:]) // 8
    place, source = instruction.operands
    values = [machine.read(name, width)[machine.active] for name in names_of(source)]
    address = machine.address(place)
    if instruction.opcode[1] == "global":
        machine.global_memory.store(address, values, machine.number)
    else:
        machine.shared.store(address, values, machine.every[machine.active])


def _copy(machine: Machine, instruction: Instruction) -> None:
    """cp.async: bytes from global to shared memory, zeros after the first `source_size`."""
    if instruction.opcode[2] == "commit_group":
        machine.copies.append([])
        return
    if instruction.opcode[2] == "wait_group":
        machine.finish_copies(int(str(instruction.operands[0])))
        return
    if instruction.opcode[2] not in ("ca", "cg"):
        raise NotImplementedError(f"{instruction.text}: this machine does not know it")
    to, source, size = instruction.operands[:3]
    length, threads = int(str(size), 0), machine.every[machine.active]
    wanted = (
        machine.read(str(instruction.operands[3]), 4)[machine.active] if len(instruction.operands) > 3 else length
    )
    reads = np.broadcast_to(wanted, threads.shape) > 0
    if not np.isin(wanted, (0, length)).all():
        raise NotImplementedError("cp.async of a part")
    values = np.zeros((len(threads), length), np.uint8)
    if reads.any():
        word = min(length, 8)
        addresses = machine.address(source)[reads]
        loaded = machine.global_memory.load(addresses, word, length // word, machine.number)
        values[reads] = np.ascontiguousarray(np.stack(loaded, 1)).view(np.uint8)
    address, shared = machine.address(to), machine.shared
    if (address % length).any():
        raise MemoryFault(f"cp.async: {length} bytes to an address that is no multiple of it")
    places = shared.places(address, length, "cp.async")
    shared.copy_begins(places, threads)
    machine.copies[-1].append(lambda: shared.copy_lands(places, values, threads))


# ---------------------------------------------------------------- across a warp


def _shuffle(machine: Machine, instruction: Instruction) -> None:
    """shfl.sync: another lane's value (lanes beyond the bound keep their own)."""
    mode = instruction.opcode[2]
    out, source, by, clamp, members = (str(operand) for operand in instruction.operands)
    lanes = np.arange(32)
    value = machine.read(source, 4).reshape(-1, 32)
    count = machine.read(by, 4).astype(np.int64).reshape(-1, 32)
    bound = machine.read(clamp, 4).astype(np.int64).reshape(-1, 32)
    if (bound >> 8).any() or int(members, 0) % 2**32 != 0xFFFFFFFF:
        raise NotImplementedError("shfl of a part of the warp")
    if not machine.active.reshape(-1, 32).all(1)[machine.active.reshape(-1, 32).any(1)].all():
        raise MemoryFault("shfl: some lanes of a warp are not there")
    from_lane = {"bfly": lanes ^ count, "up": lanes - count, "down": lanes + count, "idx": count & 31}[mode]
    valid = from_lane >= 0 if mode == "up" else from_lane <= bound
    picked = np.take_along_axis(value, np.where(valid, from_lane, lanes), 1)
    machine.write(out, picked.ravel())


def _reduce(machine: Machine, instruction: Instruction) -> None:
    """redux.sync: one value for the whole warp."""
    how, type_ = instruction.opcode[2], instruction.opcode[-1]
    out, source = instruction.operands[:2]
    value = typed(machine, source, type_).reshape(-1, 32)
    if value.dtype.kind == "f":
        how = {"max": "fmax", "min": "fmin"}[how]
    function = {
        "add": np.add,
        "fmax": np.fmax,
        "fmin": np.fmin,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
    }[how]
    result = function.reduce(value, axis=1, dtype=value.dtype)
    machine.write(str(out), bits_of(np.repeat(result, 32), type_))


def _warp_barrier(machine: Machine, instruction: Instruction) -> None:
    warps = machine.active.reshape(-1, 32)
    if not (warps.all(1) | ~warps.any(1)).all():
        raise MemoryFault("bar.warp.sync: some lanes of a warp are not there")
    machine.shared.warp_epoch[warps.all(1)] += 1
    machine.tensor_memory.order.warp_barrier(warps.all(1))


def _fence(machine: Machine, instruction: Instruction) -> None:
    if instruction.opcode[:3] == ("fence", "proxy", "async"):
        machine.shared.fence(machine.every[machine.active])


OPERATIONS: dict[str, Callable[[Machine, Instruction], None]] = {
    **dict.fromkeys(ARITHMETIC, _arithmetic),
    "setp": _setp, "selp": _selp, "cvt": _convert, "mov": _move, "ld": _load, "st": _store, "cp": _copy,
    "shfl": _shuffle, "redux": _reduce, "bar": _warp_barrier, "fence": _fence,
    "ldmatrix": ptx_matrix.load_matrix, "stmatrix": ptx_matrix.store_matrix, "mma": ptx_matrix.mma,
    "wgmma": ptx_matrix.wgmma, "tcgen05": ptx_blackwell.tcgen05, "mbarrier": ptx_blackwell.mbarrier,
    "elect": ptx_blackwell.elect,
}  # fmt: skip


def execute(machine: Machine, instruction: Instruction) -> None:
    """One instruction, for the machine's active threads."""
    operation = OPERATIONS.get(instruction.opcode[0])
    if operation is None:
        raise NotImplementedError(f"{'.'.join(instruction.opcode)}: this machine does not know it")
    operation(machine, instruction)
