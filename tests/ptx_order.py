"""Order of what runs beside the threads: accesses to sm_100's tensor memory, and the registers of wgmma.

The machine executes in the order of the program; a GPU does not. So what these instructions touch is remembered
until the program has waited for it, and whatever needs an end that nothing promises is a `MemoryFault`. The rules
are those of NVIDIA, "Parallel Thread Execution ISA", "Memory Consistency Model for 5th generation of TensorCore
operations", and of `wgmma.fence` and `wgmma.wait_group`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import triton
from ptx_memory import Array, MemoryFault
from ptx_program import Instruction, Operand, names_of

Places = list[Array]
"""Bytes of shared memory that products read."""


def set_of(members: Array) -> int:
    """A set of threads or lanes, from one bool for each, as the bits of a number."""
    return int.from_bytes(np.packbits(members, bitorder="little").tobytes(), "little")


# ---------------------------------------------------------------- tensor memory


@dataclass
class Access:
    """What one instruction of one warp (mma: of one thread) does to a rectangle of tensor memory."""

    what: str
    """As in the PTX: ld, st, mma, dealloc."""
    threads: int
    """Whose it is; like `lanes` and `over_for` a `set_of`."""
    lanes: int
    columns: slice
    writes: bool
    accumulator: tuple[int, ...] = ()
    """Of products: the place, rows and columns of what they add to."""
    reads_shared: Places = field(default_factory=list)
    over_for: int = 0
    """The threads that know of its end: they waited for it, or have met one that did at a barrier."""

    def touches(self, other: Access) -> bool:
        """Whether they have a word in common that one of them writes."""
        apart = other.columns.stop <= self.columns.start or self.columns.stop <= other.columns.start
        return (self.writes or other.writes) and not apart and bool(self.lanes & other.lanes)

    def follows(self, other: Access) -> bool:
        """Whether they keep their order: products of one thread into one accumulator do."""
        return bool(self.accumulator) and (self.accumulator, self.threads) == (other.accumulator, other.threads)


WAITED_BY = {"ld": "tcgen05.wait::ld", "st": "tcgen05.wait::st", "mma": "commit and mbarrier.try_wait"}


class TensorOrder:
    """The accesses of one program that not all of its threads know to be over.

    tcgen05.ld, .st and .mma are asynchronous: not even one thread's keep their order, except products into one
    accumulator. The registers that tcgen05.ld writes may be used at once, as the ISA says ("Register dependencies,
    same thread"): only what next happens to the memory needs its wait.
    """

    def __init__(self) -> None:
        self.pending: list[Access] = []
        self.unfenced: list[tuple[Access, int]] = []
        """Ends, and the threads that learned of them by a relaxed wait."""

    def begin(self, access: Access) -> None:
        """Under way from now on."""
        self.check(access)
        self.pending.append(access)

    def check(self, access: Access) -> None:
        """Raises if anything that is under way, for these threads, touches the same words."""
        for other in self.pending:
            if access.threads & ~other.over_for and access.touches(other) and not access.follows(other):
                what = f"tcgen05.{access.what}: a tcgen05.{other.what} here was"
                if not other.over_for:
                    raise MemoryFault(f"{what} not waited for ({WAITED_BY[other.what]})")
                raise MemoryFault(f"{what} waited for by other threads, and no barrier has come between")

    def wait(self, what: str, threads: int) -> None:
        """tcgen05.wait::ld or ::st: these threads' own are over, for them."""
        for access in self.pending:
            if access.what == what and not access.threads & ~threads:
                access.over_for |= access.threads

    def commit(self, thread: int) -> list[Access]:
        """The products whose end a barrier will report: all of this thread so far, committed before or not."""
        return [access for access in self.pending if access.what == "mma" and access.threads == thread]

    def reported(self, products: Iterable[Access], threads: int, relaxed: bool) -> None:
        """These threads have seen the barrier of a commit; after a relaxed wait that orders nothing yet."""
        for access in products:
            if relaxed:
                self.unfenced.append((access, threads))
            else:
                access.over_for |= threads

    def fence(self, threads: int) -> None:
        """tcgen05.fence::after_thread_sync."""
        for access, learned in self.unfenced:
            access.over_for |= learned & threads

    def barrier(self) -> None:
        """All threads have met: each knows what any of them knew."""
        self.pending = [access for access in self.pending if not access.over_for]

    def warp_barrier(self, warps: Array) -> None:
        """The threads of each of these warps have met."""
        for warp in np.flatnonzero(warps):
            whole = 0xFFFFFFFF << 32 * int(warp)
            for access in self.pending:
                if access.over_for & whole:
                    access.over_for |= whole


# ---------------------------------------------------------------- wgmma's registers

Names = frozenset[str]
# Triton 3.6 and 3.7 compute factors between fence and product, against the ISA; ptxas puts them before both.
FACTORS_NEED_A_FENCE = not triton.__version__.startswith(("3.6.", "3.7."))


class RegisterOrder:
    """The registers that a program's wgmma use: accumulators, and factors that are not in shared memory.

    Until they are waited for, only wgmma may touch them. Before wgmma touches them, a wgmma.fence must follow
    every other access; so must it between two shapes, and before the first of all.
    """

    def __init__(self) -> None:
        self.under_way: list[list[tuple[Names, Names]]] = [[]]
        """Accumulators and factors, in groups of which the last is still open."""
        self.began = False
        self.touched: dict[str, str] = {}
        """Since the last fence: register -> the shape of the wgmma that did, or nothing."""

    def look(self, instruction: Instruction) -> None:
        """An instruction that is no wgmma."""
        names = instruction.registers
        if any(names & sums or names & factors for group in self.under_way for sums, factors in group):
            raise MemoryFault("a register that a wgmma works on is used, and the wgmma was not waited for")
        self.touched.update(dict.fromkeys(names, ""))

    def begin(self, shape: str, sums: Names, factors: Names) -> None:
        """wgmma.mma_async."""
        if any(factors & theirs or sums & used for group in self.under_way for theirs, used in group):
            raise MemoryFault("wgmma: another one works on these registers and was not waited for")
        otherwise = any(self.touched.get(name, shape) != shape for name in sums)
        late = FACTORS_NEED_A_FENCE and not factors.isdisjoint(self.touched)
        if otherwise or late or not self.began:
            raise MemoryFault("wgmma: no wgmma.fence since its registers were used otherwise")
        self.touched.update(dict.fromkeys(sums, shape))
        self.under_way[-1].append((sums, factors))

    def fence(self) -> None:
        """wgmma.fence."""
        self.began = True
        self.touched.clear()

    def commit(self) -> None:
        """wgmma.commit_group."""
        self.under_way.append([])

    def finish(self, still_open: int) -> None:
        """wgmma.wait_group."""
        del self.under_way[: max(0, len(self.under_way) - 1 - still_open)]


def registers_of(operand: Operand) -> Names:
    """Those among a vector's members."""
    return frozenset(name for name in names_of(operand) if name.startswith("%"))
