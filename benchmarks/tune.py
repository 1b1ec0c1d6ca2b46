"""The tile sweeps behind the tables of the kernels.

    python -m benchmarks.tune [--only TEXT…] [--head-dim 64] [--length 512] [--dropout 0.1] [--minutes 9]
        [--compile-first] [--out FILE]

Each sweep times one kernel's operation, forward or backward as a whole, over a small grid of its tiles, while all
other kernels keep theirs. The present tile is timed first; results are shown best first. Candidates that do not
fit on the chip or that the compiler refuses are named and left out; those that failed otherwise are tried again by
the next call. After `--minutes` it stops between two candidates. Candidates with a result in `--out` are not
measured again, so the same command continues where it stopped. Most of a sweep's time is compilation:
`--compile-first` compiles the candidates first, in one process per core. Write the winners into the tables they
are named after, and run `benchmarks.compile_report --check`: a tile that spills may win at one shape by chance.

Not run on a GPU so far: the present tables come from the compile report. Without a GPU it needs
TRITON_INTERPRET=1 and uses tiny shapes and grids, which tests only this program.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from electra_kernels import (
    attention,
    bias_gelu,
    bias_gelu_triton,
    dropout_add_layer_norm_twice,
    layer_norm_triton,
    mlm_head,
    mlm_head_narrow_triton,
    mlm_head_wide_triton,
    rtd_head,
    rtd_loss_triton,
    sample_and_replace,
    use,
)
from electra_kernels import attention_triton as attention_tiles
from electra_kernels import sample_replace_triton as sampling
from electra_kernels.operators import architecture
from torch import Tensor

from benchmarks.harness import ONE_THREAD, processes, replace_text, use_device
from benchmarks.kernel_report import clocks_under_load, environment, in_a_line, refused, require_device
from benchmarks.kernel_timing import measure, with_gradients

Operation = Callable[..., Any]


@dataclass(frozen=True)
class Sweep:
    """One table entry: how to install a candidate, the candidates, and what is timed."""

    name: str
    install: Callable[[Any], AbstractContextManager[Any]]
    candidates: Sequence[Any]
    operation: Operation
    inputs: tuple[Any, ...]


def _normal(options: argparse.Namespace, *shape: int) -> Tensor:
    return torch.randn(*shape, device=options.device).to(options.dtype).requires_grad_()


def _constant(module: Any, name: str) -> Callable[[Any], AbstractContextManager[Any]]:
    return lambda candidate: mock.patch.object(module, name, candidate)


def _function(module: Any, name: str) -> Callable[[Any], AbstractContextManager[Any]]:
    return lambda candidate: mock.patch.object(module, name, lambda *_: candidate)


def _first(present: Any, candidates: Sequence[Any]) -> list[Any]:
    """The candidates, with the present one first."""
    return list(dict.fromkeys([present, *candidates]))


# ---------------------------------------------------------------- what is swept


def attention_sweeps(options: argparse.Namespace) -> Iterator[Sweep]:
    """Warps of the short kernels; tiles of the three general ones."""
    capability = architecture(torch.device(options.device))
    limit = attention_tiles.short_limit(capability, options.dtype, options.head_dim)
    short, general = (limit, options.length) if options.on_gpu else (16, 20)
    warps = (1, 2, 4, 8, 16) if options.on_gpu else (1,)
    name = "SHORT_WARPS" if options.dtype.itemsize == 2 else "SHORT_WARPS_FLOAT32"
    table = getattr(attention_tiles, name)

    def with_warps(count: int) -> AbstractContextManager[Any]:
        return mock.patch.object(
            attention_tiles, name, {**table, short: count} if isinstance(table, dict) else count
        )

    for what, operation, inputs in _attention(options, short):
        yield Sweep(f"attention short {what}", with_warps, warps, operation, inputs)

    grid = [(64, 128), (32, 64, 128), (4, 8), (2, 3, 4)] if options.on_gpu else [(16,), (16, 32), (1,), (1,)]
    tiles = [attention_tiles.Tile(*sizes) for sizes in product(*grid)]
    chosen = attention_tiles.tile

    def in_place_of(kernel: str) -> Callable[[Any], AbstractContextManager[Any]]:
        def tile(candidate: Any) -> Any:
            return lambda name, *rest: candidate if name == kernel else chosen(name, *rest)

        return lambda candidate: mock.patch.multiple(
            attention_tiles, tile=tile(candidate), _is_short=lambda *_: False
        )

    (_, forward, inputs), (_, both, _) = _attention(options, general)
    for kernel, operation in (("forward", forward), ("queries", both), ("keys", both)):
        present = chosen(kernel, architecture(inputs[0].device), options.dtype, options.head_dim)
        yield Sweep(f"attention {kernel}", in_place_of(kernel), _first(present, tiles), operation, inputs)


def _attention(options: argparse.Namespace, length: int) -> Iterator[tuple[str, Operation, tuple[Any, ...]]]:
    count, heads = (max(1, 2**17 // length), 12) if options.on_gpu else (1, 1)
    qkv = _normal(options, count * length, 3, heads, options.head_dim)
    dout = torch.randn(count * length, heads, options.head_dim, device=options.device).to(options.dtype)
    cu_seqlens = torch.arange(count + 1, device=options.device, dtype=torch.int32) * length
    seed = torch.tensor([1, 0], device=options.device)

    def forward(qkv: Tensor, _: Tensor) -> Tensor:
        return attention(qkv, cu_seqlens, length, dropout_p=options.dropout, seed=seed)

    yield "forward", torch.no_grad()(forward), (qkv, dout)
    yield "both", with_gradients(forward, 1), (qkv, dout)


def mlm_sweeps(options: argparse.Namespace) -> Iterator[Sweep]:
    """The narrow kernels' three tiles and the wide ones' shared one."""
    rows, vocabulary, narrow_size, wide_size = (19661, 30522, 128, 768) if options.on_gpu else (5, 140, 16, 136)

    def loss(*inputs: Tensor) -> Tensor:
        return mlm_head(*inputs[:4], seed=inputs[4]).loss_M.mean()

    def inputs(size: int) -> tuple[Tensor, ...]:
        leaves = _normal(options, rows, size), _normal(options, vocabulary, size), _normal(options, vocabulary)
        targets = torch.randint(vocabulary, (rows,), device=options.device)
        return *leaves, targets, torch.tensor([1, 0], device=options.device)

    narrow, tile = mlm_head_narrow_triton, mlm_head_narrow_triton.Tile
    blocks, steps, *rest = (
        [(64, 128), (32, 64, 128), (4, 8), (2, 3)] if options.on_gpu else [(64,), (16,), (4,), (1,)]
    )
    for name in ("forward", "dhidden", "dembedding"):

        def install(candidate: Any, name: str = name) -> AbstractContextManager[Any]:
            changed = {key: value._replace(**{name: candidate}) for key, value in narrow.TILES.items()}
            return mock.patch.object(narrow, "TILES", changed)

        operation = torch.no_grad()(loss) if name == "forward" else with_gradients(loss, 3)
        leaves = inputs(narrow_size)
        present = getattr(narrow.TILES[architecture(leaves[0].device)], name)
        own_steps = steps if name == "dembedding" else (present.step,)  # the others' step is fixed: `TILE_V`
        tiles = [tile(*sizes) for sizes in product(blocks, own_steps, *rest)]
        yield Sweep(f"mlm_head narrow {name}", install, _first(present, tiles), operation, leaves)
    grid = [(64, 128), (32, 64), (4, 8), (2, 3, 4)] if options.on_gpu else [(16,), (32,), (4,), (1,)]
    install_wide = _function(mlm_head_wide_triton, "_tile")
    candidates = _first(mlm_head_wide_triton._tile(options.dtype.itemsize), list(product(*grid)))
    yield Sweep("mlm_head wide", install_wide, candidates, with_gradients(loss, 3), inputs(wide_size))


def row_sweeps(options: argparse.Namespace) -> Iterator[Sweep]:
    """How many elements (in `sample_replace`, tiles) a program of the streaming kernels holds at a time."""
    tokens, size, vocabulary = (131072, 256, 30528) if options.on_gpu else (20, 16, 140)
    elements = (1024, 2048, 4096, 8192, 16384) if options.on_gpu else (256, 512)
    seed = torch.tensor([1, 0], device=options.device)
    matrix, vector = _normal(options, tokens, size), _normal(options, size)

    def norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor, dout: Tensor) -> Any:
        outs = dropout_add_layer_norm_twice(
            x, residual, weight, bias, eps=1e-12, x_bias_D=x_bias, dropout_p=options.dropout, seed=seed
        )
        return torch.autograd.grad(outs, (x, residual, weight, bias, x_bias), (dout, dout))

    vectors = (vector, _normal(options, size), _normal(options, size))
    inputs = (matrix, _normal(options, tokens, size), *vectors, matrix.detach())
    yield Sweep("layer_norm", _constant(layer_norm_triton, "ELEMENTS"), elements, norm, inputs)

    wide = _normal(options, tokens, 4 * size)
    inputs = (wide, _normal(options, 4 * size), wide.detach())
    gelu = with_gradients(lambda x, bias, _: bias_gelu(x, bias), 2)
    yield Sweep("bias_gelu", _constant(bias_gelu_triton, "ELEMENTS"), elements, gelu, inputs)

    def head(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return rtd_head(hidden, weight, bias, labels).loss

    inputs = (matrix, vector, _normal(options, 1), torch.rand(tokens, device=options.device) < 0.1)
    yield Sweep("rtd_head", _constant(rtd_loss_triton, "HEAD_ELEMENTS"), elements, with_gradients(head, 3), inputs)

    rows = 2458 if options.on_gpu else 4
    ids, positions = torch.zeros(2 * rows, dtype=torch.int64, device=options.device), torch.arange(rows)
    inputs = (_normal(options, rows, vocabulary).detach(), ids, positions.to(options.device))

    def sample(*inputs: Tensor) -> Any:
        return sample_and_replace(*inputs, seed=seed)

    yield Sweep("sample_and_replace", _constant(sampling, "TILES_PER_STEP"), (8, 16, 32, 64), sample, inputs)


# ---------------------------------------------------------------- command line


def time_one(sweep: Sweep, candidate: Any, repetitions: int) -> dict[str, Any]:
    """Median milliseconds; or None and the reason, if the tile does not fit or does not compile.

    Raises:
        SystemExit: the GPU can no longer be used.
    """
    row = {"sweep": sweep.name, "tile": _plain(candidate), "ms": None, "note": ""}
    try:
        with sweep.install(candidate), use("triton"):
            row["ms"] = measure(sweep.operation, sweep.inputs, repetitions).milliseconds
    except Exception as error:  # one tile of hundreds failed; the others are still worth timing
        row["note"] = in_a_line(error)
        if not refused(row["note"]):
            require_device(f"{sweep.name}, {row['tile']}", error)
    return row


def compile_first(given: Sequence[str], end: float) -> None:
    """Compiles the candidates into Triton's cache, in processes that take a share each."""
    jobs = processes()
    command = [sys.executable, "-m", "benchmarks.tune", *given, "--share"]
    shares = [
        subprocess.Popen([*command, str(share), str(jobs)], env=os.environ | ONE_THREAD) for share in range(jobs)
    ]
    for process in shares:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def compile_share(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Calls each candidate in this process's share once; `time_one` will meet any failure again."""
    share, jobs = options.share
    for index, (sweep, candidate) in enumerate(candidates(options, rows)):
        if index % jobs == share:
            try:
                with sweep.install(candidate), use("triton"):
                    sweep.operation(*sweep.inputs)
            except Exception as error:
                require_device(f"{sweep.name}, {_plain(candidate)}", error)


def candidates(options: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[tuple[Sweep, Any]]:
    """The candidates to be timed that have no row yet."""
    for sweeps in (attention_sweeps, mlm_sweeps, row_sweeps):
        for sweep in sweeps(options):
            if any(text in sweep.name for text in options.only):
                known = [row["tile"] for row in rows if row["sweep"] == sweep.name]
                yield from ((sweep, c) for c in sweep.candidates if _plain(c) not in known)


def _plain(candidate: Any) -> Any:
    """A candidate as it is after a round trip through JSON."""
    return list(candidate) if isinstance(candidate, tuple) else candidate


def time_all(options: argparse.Namespace, rows: list[dict[str, Any]], started: float | None = None) -> bool:
    """Times the candidates that are not in `rows`, and writes the rows after each; False if time ran out."""
    end = (time.monotonic() if started is None else started) + 60 * options.minutes
    rows[:] = [row for row in rows if row["ms"] is not None or refused(row["note"])]
    complete = True
    for sweep, candidate in candidates(options, rows):
        if time.monotonic() > end:
            complete = False
            break
        rows.append(time_one(sweep, candidate, options.repetitions))
        write(options, rows)
    for name in dict.fromkeys(row["sweep"] for row in rows):
        show([row for row in rows if row["sweep"] == name])
    return complete


def show(rows: list[dict[str, Any]]) -> None:
    """Prints one sweep's candidates, best first."""
    for row in sorted(rows, key=lambda row: (row["ms"] is None, row["ms"])):
        time = row["note"] if row["ms"] is None else f"{row['ms']:9.4f} ms"
        print(f"{row['sweep']:<28} {row['tile']!s:<24} {time}", flush=True)


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Writes the results as JSON, if `--out` is given."""
    if options.out:
        shape = {"head_dim": options.head_dim, "length": options.length, "dropout": options.dropout}
        written = {"environment": options.environment, **shape, "results": rows}
        replace_text(options.out, json.dumps(written, indent=1) + "\n")


def read(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of an earlier call with the same shapes; with other shapes they are measured again."""
    if not options.out or not options.out.exists():
        return []
    written = json.loads(options.out.read_text(encoding="utf-8"))
    same = all(written[name] == getattr(options, name) for name in ("head_dim", "length", "dropout"))
    same &= written["environment"]["device"] == options.environment["device"]
    return list(written["results"]) if same else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=[""], help="only sweeps whose name contains one of these texts"
    )
    parser.add_argument("--head-dim", type=int, default=64, choices=[16, 32, 64, 128])
    parser.add_argument("--length", type=int, default=512, help="sequence length on attention's general path")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="stop after this; to continue, repeat the command"
    )
    parser.add_argument(
        "--compile-first", action="store_true", help="compile everything first, one process per core"
    )
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    options.on_gpu = torch.cuda.is_available()
    options.device = "cuda" if options.on_gpu else "cpu"
    options.dtype = torch.bfloat16 if options.on_gpu else torch.float32
    use_device(torch.device(options.device))
    if not options.on_gpu:
        print("No GPU: tiny shapes, to check this program; the figures say nothing about the tiles.")
    if options.share:
        options.environment = environment(options.device, {})
        compile_share(options, read(options))
        return
    started = time.monotonic()
    if options.compile_first:
        compile_first(given, started + 60 * options.minutes)
    clocks = clocks_under_load(options.device) if options.on_gpu else {}
    options.environment = environment(options.device, clocks)
    if not time_all(options, read(options), started):
        print(f"stopped after {options.minutes} minutes; to continue, repeat the command")


if __name__ == "__main__":
    main()
