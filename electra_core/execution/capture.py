"""The capture of a CUDA graph, and what has to be put right after one that failed.

In torch before 2.14 a failed capture spoils the rest of the process. Three things are left behind:

- CUDA's generator still counts as being captured: every random operation outside a graph raises "Offset increment
  outside graph capture encountered unexpectedly". Only the end of a capture that succeeds resets it.
- The stream of the capture stays the current one: `torch.cuda.graph` ends the capture, which raises, before it
  restores the stream.
- The allocator still reserves memory for the graph's pool, and never releases the pool.

This was read in torch's source (2.11), not seen on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """As `torch.cuda.graph`; if the capture fails, the process can go on without it.

    Args:
        pool: a handle by `torch.cuda.graph_pool_handle`.
        stream: the stream to capture on (default: one of torch's own).
    """
    before = torch.cuda.current_stream()
    try:
        with _capture(graph, pool, stream):
            yield
    except BaseException:
        after_failed_capture(pool, before)
        raise


def after_failed_capture(pool: Any, stream: torch.cuda.Stream) -> None:
    """Restores what a failed capture left behind; see the file's header.

    Args:
        pool: the pool of that capture.
        stream: the current stream before it.
    """
    _leave(pool, stream)
    own = torch.cuda.graph_pool_handle()
    try:  # a capture that succeeds resets the generator
        with _capture(torch.cuda.CUDAGraph(), own, torch.cuda.Stream(stream.device)):
            torch.zeros(1, device=stream.device)
    except Exception:  # nothing can be captured here; the first failure, which is on its way, says more
        _leave(own, stream)


def _capture(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream | None) -> torch.cuda.graph:
    # Other threads (a checkpoint's writer) may use the device meanwhile.
    return torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")


def _leave(pool: Any, stream: torch.cuda.Stream) -> None:
    """Makes `stream` current, and ends the reservation for `pool` where torch has not."""
    torch.cuda.set_stream(stream)
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        torch._C._cuda_releasePool(stream.device_index, pool)
