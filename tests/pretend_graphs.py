"""CUDA graphs without a GPU: what a captured step does on a CPU, operator by operator.

A graph replays kernels on the addresses and with the numbers they were captured with. So does this one: while it
captures it writes down every operator with its tensors and numbers, and a replay calls them again, each putting
its result where it was the first time. What a step takes from Python alone (a learning rate that is a float, a
tensor that is made anew) has its first value in every replay; a test that compares with steps which were not
captured sees that. Reading a value while capturing raises, as it does on a GPU, and so it does in the mode that
finds out who waits for the device.

A capture that fails leaves behind what torch 2.11 leaves (`electra_core/execution/capture.py`): its stream as the
current one, a memory pool, and a generator that refuses. `left_behind` says what of it there is.

`on_a_cpu` puts it in the place of the parts of `torch.cuda` that `step_runners.GraphRunner`, `capture.py` and the
benchmarks use. All streams do their work at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Stream:
    """In place of `torch.cuda.Stream`: everything happens in the order in which it is asked for."""

    device, device_index = torch.device("cpu"), 1
    """A GPU that is not the first."""
    default: ClassVar[Stream]
    current: ClassVar[Stream]

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        """Nothing to wait for."""

    @staticmethod
    def make_current(stream: Stream) -> None:
        Stream.current = stream


Stream.default = Stream.current = Stream()


class Left:
    """What captures have left behind, for the whole process."""

    pools: ClassVar[list[tuple[int, object]]] = []
    """(device, pool) for which the allocator reserves memory."""
    kept: ClassVar[list[tuple[int, object]]] = []
    """Those of failed captures whose memory is not released."""
    generator_refuses: ClassVar[bool] = False

    @staticmethod
    def end_pool(device: int, pool: object) -> None:
        """In place of `torch._C._cuda_endAllocateToPool`."""
        if (device, pool) not in Left.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        Left.pools.remove((device, pool))

    @staticmethod
    def release_pool(device: int, pool: object) -> None:
        """In place of `torch._C._cuda_releasePool`."""
        Left.kept.remove((device, pool))


def left_behind() -> list[str]:
    """What spoils the rest of the process; nothing if all captures succeeded or were cleaned up after."""
    found = {
        "stream": Stream.current is not Stream.default,
        "allocator": bool(Left.pools),
        "memory": bool(Left.kept),
        "generator": Left.generator_refuses,
    }
    return [name for name, is_left in found.items() if is_left]


class Graph:
    """In place of `torch.cuda.CUDAGraph`."""

    made: ClassVar[list[Graph]] = []
    """Since the test began."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.replays = 0
        Graph.made.append(self)

    def replay(self) -> None:
        """Every operator again, its results to where they were."""
        self.replays += 1
        with torch._C._AutoDispatchBelowAutograd():
            for operator, arguments, named, results in self.calls:
                for result, again in zip(results, tensors(operator(*arguments, **named)), strict=True):
                    if result.untyped_storage().data_ptr() != again.untyped_storage().data_ptr():
                        result.copy_(again)


class Capture(TorchDispatchMode):
    """In place of `torch.cuda.graph`: fills a graph, and leaves every tensor that was there before as it was."""

    def __init__(self, graph: Graph, pool: object = None, stream: Stream | None = None, **_: Any):
        super().__init__()
        self.graph, self.stream = graph, stream or Stream()
        self.pool = self.stream.device_index, pool or object()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.inside: set[int] = set()

    def __enter__(self) -> Capture:
        self.stream_before, Stream.current = Stream.current, self.stream
        Left.pools.append(self.pool)
        super().__enter__()
        return self

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if operator in READS:
            raise RuntimeError(f"{operator}: operation not permitted when stream is capturing")
        named = named or {}
        for tensor in tensors((arguments, named)):
            if (address := tensor.untyped_storage().data_ptr()) not in self.inside | self.before.keys():
                whole = flat(tensor)
                self.before[address] = whole, whole.clone()
        result = operator(*arguments, **named)
        results = tensors(result)
        self.inside |= {t.untyped_storage().data_ptr() for t in results} - self.before.keys()
        self.graph.calls.append((operator, arguments, named, results))
        return result

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        for whole, saved in self.before.values():
            whole.copy_(saved)
        if problem[0] is not None:  # as the end of a capture that CUDA has given up
            Left.kept.append(self.pool)
            Left.generator_refuses = True
            raise RuntimeError("operation failed due to a previous error during capture")
        Left.end_pool(*self.pool)
        Left.generator_refuses, Stream.current = False, self.stream_before


class Waits(TorchDispatchMode):
    """The mode "error" of `torch.cuda.set_sync_debug_mode`."""

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if operator in READS:
            raise RuntimeError("called a synchronizing CUDA operation")
        return operator(*arguments, **named or {})

    @staticmethod
    def setter() -> Callable[[str], None]:
        """In place of `torch.cuda.set_sync_debug_mode`."""
        entered: list[Waits] = []

        def set_mode(mode: str) -> None:
            if mode == "error":
                entered.append(Waits())
                entered[-1].__enter__()
            elif entered:
                entered.pop().__exit__(None, None, None)

        return set_mode


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    """In place of `torch.cuda.stream`."""
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before


def may_refuse(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A random operation as it is after a capture; "cuda" stands for the CPU."""

    @wraps(draw)
    def random(*sizes: Any, **named: Any) -> Tensor:
        if Left.generator_refuses and named.get("generator") is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        on_gpu = torch.device(named.get("device") or "cpu").type == "cuda"
        return draw(*sizes, **named | ({"device": "cpu"} if on_gpu else {}))

    return random


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def flat(tensor: Tensor) -> Tensor:
    """All bytes of the memory that a tensor lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())


def on_a_cpu(patch: pytest.MonkeyPatch) -> None:
    """Until the test's end graphs are captured and replayed on a CPU."""
    Graph.made, Left.pools, Left.kept, Left.generator_refuses = [], [], [], False
    Stream.current = Stream.default
    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "graph", Capture)
    patch.setattr(torch.cuda, "graph_pool_handle", object)
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "stream", on_stream)
    patch.setattr(torch.cuda, "set_stream", Stream.make_current)
    patch.setattr(torch.cuda, "current_stream", lambda *_: Stream.current)
    patch.setattr(torch.cuda, "default_stream", lambda *_: Stream.default)
    patch.setattr(torch.cuda, "current_device", lambda: Stream.device_index)
    patch.setattr("electra_core.execution.step_runners._streams", {})
    patch.setattr(torch.cuda, "set_sync_debug_mode", Waits.setter())
    patch.setattr(torch._C, "_cuda_endAllocateToPool", Left.end_pool)
    patch.setattr(torch._C, "_cuda_releasePool", Left.release_pool)
    for name in ("rand", "randn"):
        patch.setattr(torch, name, may_refuse(getattr(torch, name)))
    patch.setattr(Tensor, "record_stream", lambda *_: None)
    without_checks(patch)


def without_checks(patch: pytest.MonkeyPatch) -> None:
    """Until the test's end the kernels do not look at values, as on a GPU."""
    for module in ("checks", "attention"):
        patch.setattr(import_module(f"electra_kernels.{module}"), "checks_values", lambda _: False)
