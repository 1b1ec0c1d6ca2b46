"""A machine that runs PTX on a CPU: compiled kernels, one instruction at a time, for all threads of a program.

Triton's interpreter runs a kernel's Python. This runs what its compiler made of it for a GPU: layouts, shuffles,
shared memory and barriers, pipelined copies, tensor-core instructions. Every access is checked on the way
(`ptx_memory`), and so is the order of what runs beside the threads (`ptx_order`). What a real GPU may still do
differently: the last step, from PTX to machine code; approximate functions (here: NumPy's); the order of sums
inside a tensor core; and everything about time.

A register is an array of one element per thread, unsigned, as wide as the register. Asynchronous copies land when
they are waited for, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from ptx_blackwell import Barrier, TensorMemory
from ptx_instructions import execute
from ptx_memory import SHARED_BASE, UNSIGNED, Array, GlobalMemory, MemoryFault, SharedMemory
from ptx_order import RegisterOrder
from ptx_program import Operand, Program
from torch import Tensor

REGISTER_BYTES = {"rs": 2, "r": 4, "rd": 8, "p": 1}
LONGEST = 5_000_000  # instructions of one program, then it is taken to hang


@dataclass
class Path:
    """Threads that go on together from `counter`, until they come to `stop`."""

    counter: int
    threads: Array
    stop: int


class Machine:
    """One program (CUDA's block of threads): registers, shared memory, copies under way."""

    def __init__(
        self, program: Program, arguments: Sequence[int], grid: tuple[int, ...], place: tuple[int, ...],
        global_memory: GlobalMemory, shared_bytes: int,
    ):  # fmt: skip
        self.program, self.threads = program, program.threads
        self.arguments = dict(zip(program.parameters, arguments, strict=True))
        self.global_memory, self.shared = global_memory, SharedMemory(shared_bytes, program.threads)
        self.number = 1 + place[0] + grid[0] * (place[1] + grid[1] * place[2])  # which program of the launch
        self.registers: dict[str, Array] = {}
        self.every = np.arange(self.threads)
        self.special = {"%tid.x": self.every}
        for axis, here, size in zip("xyz", place, grid, strict=True):
            self.special[f"%ctaid.{axis}"] = np.full(self.threads, here)
            self.special[f"%nctaid.{axis}"] = np.full(self.threads, size)
        self.active: Array = np.ones(self.threads, bool)  # the threads that this instruction is for
        # Under way, in groups of which the last is still open: cp.async, and the bytes that wgmma reads.
        self.copies: list[list[Callable[[], None]]] = [[]]
        self.products: list[list[Array]] = [[]]
        self.product_registers = RegisterOrder()
        self.tensor_memory, self.barriers = TensorMemory(), dict[int, Barrier]()  # of sm_100
        self.constants: dict[tuple[str, int], Array] = {}

    # ------------------------------------------------------------ operands

    def read(self, name: str, width: int) -> Array:
        """An operand of `width` bytes, unsigned, for all threads."""
        if name.startswith("%") and name not in self.special:
            if name not in self.registers:
                raise MemoryFault(f"{name} is read and was never written")
            value = self.registers[name]
            return value if value.dtype.itemsize == width else value.astype(UNSIGNED[width])
        key = name, width
        if key not in self.constants:
            value = self.special[name] if name in self.special else np.full(self.threads, _constant(name, width))
            self.constants[key] = value.astype(UNSIGNED[width])
        return self.constants[key]

    def predicate(self, name: str) -> Array:
        """A predicate register or constant, with `!` in front for its opposite."""
        if name.startswith("!"):
            return ~self.predicate(name[1:])
        if not name.startswith("%"):
            return np.full(self.threads, bool(int(name)))
        if name not in self.registers:
            raise MemoryFault(f"{name} is read and was never written")
        return self.registers[name]

    def write(self, name: str, value: Array) -> None:
        """To the active threads' register; narrower values are extended by zeros."""
        if name == "_":
            return
        kind = name[1:].rstrip("0123456789")
        value = value if kind == "p" else value.astype(UNSIGNED[REGISTER_BYTES[kind]], copy=False)
        if not self.active.all():
            value = np.where(self.active, value, self.registers.get(name, np.zeros_like(value)))
        self.registers[name] = value

    def address(self, operand: Operand) -> Array:
        """The address `register + number` or `global_smem + number`, for the active threads."""
        assert isinstance(operand, str)
        base, _, offset = operand.partition("+")
        width = 8 if base.startswith("%rd") else 4
        start = self.read(base.strip(), width)[self.active].astype(np.int64)
        return np.asarray(start + int(offset or 0))

    # ------------------------------------------------------------ control

    def run(self) -> None:
        """Every thread, to its end.

        Threads that part at a branch meet again where its ways do: on the stack lie the threads that go on from
        there, above them those on either way.
        """
        end = len(self.program.instructions)
        stack = [Path(0, np.ones(self.threads, bool), end)]
        done = 0
        while stack:
            path = stack[-1]
            if path.counter == path.stop or not path.threads.any():
                stack.pop()
                continue
            instruction = self.program.instructions[path.counter]
            self.active = path.threads
            if instruction.guard is not None:
                self.active = path.threads & self.predicate(instruction.guard)
            done += 1
            if done > LONGEST:
                raise MemoryFault(f"{self.program.name} does not end")
            path.counter += 1
            try:
                match instruction.opcode[0]:
                    case "ret":
                        for waiting in stack:
                            waiting.threads = waiting.threads & ~self.active
                    case "bra":
                        stack += self._branch(path, self.program.labels[str(instruction.operands[0])])
                    case "bar" | "barrier" if instruction.opcode[1] == "sync":
                        if not (self.active == stack[0].threads).all():
                            raise MemoryFault("a barrier that not all threads reach")
                        self.shared.barrier()
                        self.tensor_memory.order.barrier()
                    case _ if self.active.any():
                        if self.product_registers.began and instruction.opcode[0] != "wgmma":
                            self.product_registers.look(instruction)
                        execute(self, instruction)
            except Exception as error:
                raise type(error)(f"{error}\n  at {self.program.name}: {instruction.text}") from error
        place = f"\n  at {self.program.name}: its end"
        if any(self.copies) or any(self.products):
            raise MemoryFault(f"the program ends before its cp.async or wgmma do{place}")
        if self.tensor_memory.allocated:
            raise MemoryFault(f"the program ends and has not deallocated its tensor memory{place}")

    def _branch(self, path: Path, target: int) -> list[Path]:
        """Paths to put on the stack; `path` goes on with them or after them."""
        taken, others = self.active, path.threads & ~self.active
        if not others.any():
            path.counter = target
        if not taken.any() or not others.any():
            return []
        further, path.counter = path.counter, self.program.meeting_points[path.counter - 1]
        return [Path(further, others, path.counter), Path(target, taken, path.counter)]

    # ------------------------------------------------------------ what is under way

    def finish_copies(self, still_open: int) -> None:
        """cp.async.wait_group: all committed groups but the last `still_open` land."""
        while len(self.copies) - 1 > still_open:
            for copy in self.copies.pop(0):
                copy()

    def finish_products(self, still_open: int) -> None:
        """wgmma.wait_group, likewise."""
        self.product_registers.finish(still_open)
        while len(self.products) - 1 > still_open:
            for places in self.products.pop(0):
                self.shared.product_ended(places, everybody_knows=False)


def _constant(name: str, width: int) -> int:
    """The bits of a literal or symbol."""
    if name == "global_smem":
        return SHARED_BASE
    if name[:2] in ("0f", "0d", "0F", "0D"):
        return int(name[2:], 16)
    if name in ("true", "false"):
        return int(name == "true")
    return int(name.rstrip("U"), 0) % (1 << 8 * width)


def launch(
    program: Program, arguments: Sequence[int], grid: tuple[int, int, int], tensors: Sequence[Tensor],
    shared_bytes: int,
) -> None:  # fmt: skip
    """All programs of a grid, one after the other, last one first: nothing promises an order."""
    global_memory = GlobalMemory(tensors)
    places = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    with np.errstate(all="ignore"):
        for place in reversed(places):
            Machine(program, arguments, grid, place, global_memory, shared_bytes).run()
