"""Several processes that train together, for tests: what torchrun does, without its ten seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 120


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` in `size` processes with torchrun's environment.

    Returns:
        What each rank returned; for one that raised, the exception's text.
    """
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["electra_core.pretrain", "torch.distributed.fsdp", __name__])
    results: Any = start.Queue()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        start.Process(target=_rank, args=(r, size, port, results, function, arguments)) for r in range(size)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=SECONDS) for _ in range(size))
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    return [found[rank] for rank in range(size)]


def _rank(rank: int, size: int, port: str, results: Any, function: Callable[..., Any], arguments: Any) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    try:
        results.put((rank, function(*arguments)))
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}"))
        traceback.print_exc()


def pretrain_rank(data: Path, out: Path, changes: dict[str, Any], sizes: dict[str, Any], options: dict) -> Any:
    """A pre-training run as one of its ranks sees it: (steps, tokens, evaluation, why it stopped)."""
    from electra_core.pretrain import pretrain

    result = pretrain(data, out, model="tiny", changes=changes, encoder_changes=sizes, quiet=True, device="cpu",
                      **options)  # fmt: skip
    return result.steps, result.tokens, result.evaluation, result.stopped_by
