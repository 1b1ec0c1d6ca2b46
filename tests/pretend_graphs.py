"""CUDA graphs without a GPU: what a captured step does on a CPU, operator by operator.

A graph replays kernels on the addresses and with the numbers they were captured with. So does this one: while it
captures it writes down every operator with its tensors and numbers, and a replay calls them again, each putting
its result where it was the first time. What a step takes from Python alone (a learning rate that is a float, a
tensor that is made anew) has its first value in every replay; a test that compares with steps which were not
captured sees that. Reading a value while capturing raises, as it does on a GPU.

`on_a_cpu` puts it in the place of the parts of `torch.cuda` that `step_runners.GraphRunner` uses. There is one
stream.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


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

    def __init__(self, graph: Graph, **_: Any):
        super().__init__()
        self.graph = graph
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.inside: set[int] = set()

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
            raise RuntimeError("operation failed due to a previous error during capture")


class Stream:
    """In place of `torch.cuda.Stream`: everything happens in the order in which it is asked for."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        """Nothing to wait for."""


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def flat(tensor: Tensor) -> Tensor:
    """All bytes of the memory that a tensor lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())


def on_a_cpu(patch: pytest.MonkeyPatch) -> None:
    """Until the test's end `step_runners.GraphRunner` works on a CPU."""
    Graph.made = []
    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "graph", Capture)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    patch.setattr(torch.cuda, "current_stream", Stream)
    patch.setattr(Tensor, "record_stream", lambda *_: None)
    without_checks(patch)


def without_checks(patch: pytest.MonkeyPatch) -> None:
    """Until the test's end the kernels do not look at values, as on a GPU."""
    for module in ("checks", "attention"):
        patch.setattr(sys.modules[f"electra_kernels.{module}"], "checks_values", lambda _: False)
