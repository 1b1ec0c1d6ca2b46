"""The tile sweep behind the tables in `attention_triton.py`.

    python -m benchmarks.tune [--head-dim 64] [--length 512] [--dropout 0.1] [--repeats 30] [--json FILE]

Times every tile of a small grid for each kernel, best first; candidates that do not fit on the chip are
left out. Paste the winners into the tables (after `benchmarks.compile_report --check`: a spilling tile may win
by chance of one shape). This has not been run on a GPU yet: the present tables come from the compile report.
Without a GPU it needs TRITON_INTERPRET=1 and takes one tiny shape, which checks this program and nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from electra_kernels import attention_triton
from electra_kernels.attention_triton import Tile
from torch import Tensor

from benchmarks.timing import machine, measure

GRID = [Tile(*sizes) for sizes in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))]
TINY_GRID = [Tile(16, 16, 1, 1), Tile(16, 32, 1, 1)]
SHORT_WARPS = (1, 2, 4, 8, 16)


def _calls(
    lengths: list[int], head_dim: int, dropout_p: float, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(forward, backward) of one batch through the operators themselves."""
    tokens, heads, longest = sum(lengths), 12 if device.type == "cuda" else 1, max(lengths)
    qkv = torch.randn(tokens, 3, heads, head_dim, device=device).to(dtype)
    dout = torch.randn(tokens, heads, head_dim, device=device).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    seed = torch.tensor([1, 0], device=device)
    numbers = (longest, dropout_p, 0, head_dim**-0.5)

    def forward() -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = attention_triton.forward(qkv, cu_seqlens, seed, *numbers)
        return result

    out, lse = forward()

    def backward() -> Tensor:
        gradient: Tensor = attention_triton.backward(dout, out, lse, qkv, cu_seqlens, seed, *numbers)
        return gradient

    return forward, backward


def _time(run: Callable[[], Any], device: torch.device, repeats: int) -> float | None:
    """Median milliseconds, or None if the tile does not fit on the chip."""
    from triton.runtime.errors import OutOfResources

    try:
        return measure(run, device, repeats, warmup=min(5, repeats)).median_ms
    except OutOfResources:
        return None


def sweep_general(
    lengths: list[int],
    head_dim: int,
    dropout_p: float,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    grid: list[Tile],
) -> Iterator[dict[str, Any]]:
    """Each of the three general kernels over the grid, the other two at their table's tile."""
    table = attention_triton.tile
    with mock.patch.object(attention_triton, "_is_short", lambda *_: False):
        forward, backward = _calls(lengths, head_dim, dropout_p, dtype, device)
        for kernel in ("forward", "queries", "keys"):
            for candidate in grid:

                def chosen(name: str, *rest: Any, kernel: str = kernel, candidate: Tile = candidate) -> Tile:
                    return candidate if name == kernel else table(name, *rest)

                with mock.patch.object(attention_triton, "tile", chosen):
                    ms = _time(forward if kernel == "forward" else backward, device, repeats)
                yield {"kernel": kernel, "tile": list(candidate), "ms": ms}


def sweep_short(
    lengths: list[int], head_dim: int, dropout_p: float, dtype: torch.dtype, device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """Warps of the short kernels."""
    options = attention_triton._short_options
    with mock.patch.object(attention_triton, "_is_short", lambda *_: True):
        for warps in SHORT_WARPS if device.type == "cuda" else SHORT_WARPS[:1]:

            def chosen(*arguments: Any, warps: int = warps) -> dict[str, int]:
                return {**options(*arguments), "num_warps": warps}

            with mock.patch.object(attention_triton, "_short_options", chosen):
                forward, backward = _calls(lengths, head_dim, dropout_p, dtype, device)
                for kernel, run in (("short forward", forward), ("short backward", backward)):
                    yield {"kernel": kernel, "tile": [warps], "ms": _time(run, device, repeats)}


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--head-dim", type=int, default=64, choices=[16, 32, 64, 128])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype, grid = (torch.bfloat16, GRID) if on_gpu else (torch.float32, TINY_GRID)
    long = [options.length] * max(1, 2**17 // options.length) if on_gpu else [options.length]
    short = [128] * 1024 if on_gpu else [16]
    shape = (options.head_dim, options.dropout, dtype, device, options.repeats)
    rows = [*sweep_short(short, *shape), *sweep_general(long, *shape, grid)]
    rows.sort(key=lambda row: (row["kernel"], row["ms"] is None, row["ms"]))
    for row in rows:
        time = "does not fit" if row["ms"] is None else f"{row['ms']:9.4f} ms"
        print(f"{row['kernel']:<16} {row['tile']!s:<20} {time}")
    if options.json:
        about = {**machine(device), "head_dim": options.head_dim, "dropout": options.dropout}
        options.json.write_text(json.dumps({"machine": about, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
