"""Global and shared memory of the PTX machine, with the checks of compute-sanitizer: bounds, alignment, races.

Addresses and values are arrays with one element per thread that takes part. A race is a pair of accesses to one
byte, at least one of which writes, by threads that nothing orders:

- in shared memory, threads of two warps with no barrier between, or two threads of one warp with neither a barrier
  nor a warp's barrier between;
- in global memory, two programs of one launch.

Writing the value that is there already is no race: Triton lets threads that hold the same element all store it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np
import triton
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SHARED_BASE = 1024  # no valid address is near 0; tensor cores want tiles at multiples of 1024
NOBODY, SEVERAL = -1, -2
# Before a product that reads what cp.async has written the PTX ISA asks for a fence. Triton 3.6 sets none there.
COPIES_NEED_A_FENCE = not triton.__version__.startswith("3.6.")


class MemoryFault(Exception):
    """An access that a GPU refuses, or whose result it does not promise."""


def _aligned(addresses: Array, width: int, what: str) -> None:
    if len(addresses) and (addresses % np.uint64(width)).any():
        raise MemoryFault(f"{what}: {width} bytes at an address that is no multiple of it")


class Region:
    """The bytes of one tensor's storage, and who touched them in this launch."""

    def __init__(self, base: int, size: int):
        self.base, self.size = base, size
        self.bytes = np.frombuffer((ctypes.c_uint8 * size).from_address(base), np.uint8)
        # By number, from 1 on, 0 for nobody: pages that nobody touches take no memory, however large the tensor.
        self.writer, self.reader = np.zeros(size, np.int32), np.zeros(size, np.int32)


class GlobalMemory:
    """What the tensors among a kernel's arguments hold, and nothing else."""

    def __init__(self, tensors: Iterable[Tensor]):
        spans = sorted({(s.data_ptr(), s.nbytes()) for s in (t.untyped_storage() for t in tensors) if s.nbytes()})
        self.regions = [Region(base, size) for base, size in spans]

    def _locate(self, addresses: Array, size: int, what: str) -> tuple[Region, Array]:
        """The region and the offsets in it; one access touches one tensor."""
        for region in self.regions:
            if region.base <= int(addresses[0]) < region.base + region.size:
                offsets = addresses.astype(np.int64) - region.base
                if offsets.min() < 0 or offsets.max() + size > region.size:
                    break
                return region, offsets
        raise MemoryFault(f"{what}: {size} bytes outside of every argument")

    def load(self, addresses: Array, width: int, count: int, program: int) -> list[Array]:
        """`count` neighbours of `width` bytes at each address, as `count` arrays."""
        size = width * count
        _aligned(addresses, size, "global load")
        region, offsets = self._locate(addresses, size, "global load")
        places = offsets[:, None] + np.arange(size)
        others = region.writer[places]
        if ((others != 0) & (others != program)).any():
            raise MemoryFault("global load: another program of this launch wrote here")
        seen = region.reader[places]
        region.reader[places] = np.where((seen == 0) | (seen == program), program, SEVERAL)
        return list(region.bytes[places].view(UNSIGNED[width]).T)

    def store(self, addresses: Array, values: list[Array], program: int) -> None:
        """The inverse of `load`."""
        width = values[0].dtype.itemsize
        size = width * len(values)
        _aligned(addresses, size, "global store")
        region, offsets = self._locate(addresses, size, "global store")
        places = offsets[:, None] + np.arange(size)
        new = np.ascontiguousarray(np.stack(values, 1)).view(np.uint8)
        for who, did in ((region.writer[places], "wrote"), (region.reader[places], "read")):
            foreign = (who != 0) & (who != program)
            if (foreign & (new != region.bytes[places])).any():
                raise MemoryFault(f"global store: another program of this launch {did} here")
        region.writer[places] = program
        region.bytes[places] = new


class SharedMemory:
    """A program's shared memory; what nobody wrote reads as NaN."""

    def __init__(self, size: int, threads: int):
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.epoch = 0  # barriers so far
        self.warp_epoch = np.zeros(threads // 32, np.int64)  # a warp's own barriers so far
        # Of each byte's last write and last read: when, and which thread (SEVERAL: of one warp; its warp is kept).
        self.last = {kind: np.full((4, size), NOBODY, np.int64) for kind in ("write", "read")}
        # Products of matrices read by a way of their own ("the asynchronous proxy"), in their own time.
        self.unfenced = np.zeros(size, bool)  # written by threads, with no fence for that way since
        self.in_use = np.zeros(size, np.int16)  # products under way that read here
        self.landing = np.zeros(size, np.int16)  # copies (cp.async) under way to here

    def barrier(self) -> None:
        """All threads have met."""
        self.epoch += 1

    def fence(self, threads: Array) -> None:
        """fence.proxy.async: products see what these threads have written, or a barrier has told them of."""
        epoch, _, thread, _ = self.last["write"]
        everybody = len(threads) == 32 * len(self.warp_epoch)
        self.unfenced &= False if everybody else (epoch == self.epoch) & ~np.isin(thread, threads)

    def places(self, addresses: Array, size: int, what: str) -> Array:
        """[len(addresses), size] indices of bytes."""
        offsets = addresses.astype(np.int64) - SHARED_BASE
        if len(offsets) and (offsets.min() < 0 or offsets.max() + size > len(self.bytes)):
            raise MemoryFault(f"shared {what}: {size} bytes outside of the program's {len(self.bytes)}")
        return np.asarray(offsets[:, None] + np.arange(size))

    def _conflicts(self, kind: str, places: Array, threads: Array) -> Array:
        """Where the last access of this kind, by another thread, is ordered by nothing."""
        epoch, warp_epoch, thread, warp = self.last[kind][:, places]
        now, mine = threads[:, None], threads[:, None] // 32
        across = (warp != mine) | (warp == SEVERAL)
        within = (warp == mine) & (thread != now) & (warp_epoch == self.warp_epoch[mine])
        return np.asarray((epoch == self.epoch) & (across | within))

    def _note(self, kind: str, places: Array, threads: Array) -> None:
        """Remember this access: the later one counts, several threads of one epoch as SEVERAL."""
        record, now = self.last[kind], np.broadcast_to(threads[:, None], places.shape)
        order = np.argsort(places, axis=None, kind="stable")
        flat, who = places.ravel()[order], now.ravel()[order]
        first = np.flatnonzero(np.r_[True, flat[1:] != flat[:-1]])
        unique, low, high = flat[first], np.minimum.reduceat(who, first), np.maximum.reduceat(who, first)
        thread = np.where(low == high, low, SEVERAL)
        warp = np.where(low // 32 == high // 32, low // 32, SEVERAL)
        old_epoch, old_warp_epoch, old_thread, old_warp = record[:, unique]
        again = old_epoch == self.epoch
        same_warp = again & (old_warp == warp)
        warp_epoch = self.warp_epoch[np.maximum(warp, 0)]
        thread = np.where(same_warp & (old_warp_epoch == warp_epoch) & (old_thread != thread), SEVERAL, thread)
        warp = np.where(again & ~same_warp, SEVERAL, warp)
        for row, value in enumerate((self.epoch, warp_epoch, thread, warp)):
            record[row, unique] = value

    def load(self, addresses: Array, width: int, count: int, threads: Array) -> list[Array]:
        """`count` neighbours of `width` bytes for each of `threads`, as `count` arrays."""
        _aligned(addresses, width * count, "shared load")
        return list(self.read(self.places(addresses, width * count, "load"), threads).view(UNSIGNED[width]).T)

    def read(self, places: Array, threads: Array) -> Array:
        """The bytes at `places`, row i for thread i."""
        if self._conflicts("write", places, threads).any():
            raise MemoryFault("shared load: another thread wrote here, and no barrier has come between")
        if self.landing[places].any():
            raise MemoryFault("shared load: a cp.async to here was not waited for")
        self._note("read", places, threads)
        return np.ascontiguousarray(self.bytes[places])

    def store(self, addresses: Array, values: list[Array], threads: Array) -> None:
        """The inverse of `load`."""
        size = values[0].dtype.itemsize * len(values)
        _aligned(addresses, size, "shared store")
        self.write(self.places(addresses, size, "store"), np.stack(values, 1), threads)

    def write(self, places: Array, values: Array, threads: Array) -> None:
        """Row i of `values`, as bytes, to row i of `places`, by thread i."""
        new = np.ascontiguousarray(values).view(np.uint8).reshape(places.shape)
        different = new != self.bytes[places]
        for kind, did in (("write", "wrote"), ("read", "read")):
            if (self._conflicts(kind, places, threads) & different).any():
                raise MemoryFault(f"shared store: another thread {did} here, and no barrier has come between")
        if (different & (self.in_use[places] > 0)).any():
            raise MemoryFault("shared store: a product that reads here was not waited for")
        if self.landing[places].any():
            raise MemoryFault("shared store: a cp.async to here was not waited for")
        self.bytes[places] = new
        if (self.bytes[places] != new).any():
            raise MemoryFault("shared store: two threads write different values to one place")
        self._note("write", places, threads)
        self.unfenced[places] = True

    def copy_begins(self, places: Array, threads: Array) -> None:
        """A cp.async may write here from now on, until `copy_lands`."""
        for kind, did in (("write", "wrote"), ("read", "read")):
            if self._conflicts(kind, places, threads).any():
                raise MemoryFault(f"cp.async: another thread {did} here, and no barrier has come between")
        if self.in_use[places].any():
            raise MemoryFault("cp.async: a product that reads here was not waited for")
        self.landing[places] += 1

    def copy_lands(self, places: Array, values: Array, threads: Array) -> None:
        """It has been waited for by its threads; others see it after a barrier."""
        self.landing[places] -= 1
        self.write(places, values, threads)
        self.unfenced[places] = COPIES_NEED_A_FENCE

    def read_by_product(self, places: Array) -> Array:
        """The bytes at `places`, read by tensor cores until `product_ended` says that it was waited for."""
        if self.unfenced[places].any():
            raise MemoryFault("a product reads what was written without a fence.proxy.async since")
        if self.landing[places].any() or (self.last["write"][0][places] == self.epoch).any():
            raise MemoryFault("a product reads what was written since the last barrier")
        self.in_use[places] += 1
        return np.ascontiguousarray(self.bytes[places])

    def product_ended(self, places: Array, everybody_knows: bool) -> None:
        """Waited for by all threads, or by some: then others may write here only after a barrier."""
        self.in_use[places] -= 1
        if everybody_knows:
            return
        for row, value in enumerate((self.epoch, 0, SEVERAL, SEVERAL)):
            self.last["read"][row, places] = value
