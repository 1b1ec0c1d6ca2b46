"""The tile sweeps: which candidates there are, and what becomes of one that fails."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from benchmarks import tune


def sweep_of(operation: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = tune.Sweep("it", lambda _: nullcontext(), [1, 2], operation, ())
    monkeypatch.setattr(tune, "attention_sweeps", lambda _: [sweep])
    for others in ("mlm_sweeps", "row_sweeps"):
        monkeypatch.setattr(tune, others, lambda _: [])


@pytest.mark.parametrize(
    ("error", "again"),
    {
        "too-large": (OutOfResources(2, 1, "shared memory"), False),
        "launch": (RuntimeError("CUDA error: unspecified launch failure"), True),
    }.values(),
    ids=("too-large", "launch"),
)
def test_only_what_the_compiler_refuses_is_not_tried_again(
    error: Exception, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fails() -> None:
        calls.append(1)
        raise error

    sweep_of(fails, monkeypatch)
    options, rows = argparse.Namespace(minutes=1.0, only=[""], repetitions=1, out=None), []
    assert tune.time_all(options, rows) and len(calls) == 2
    assert tune.time_all(options, rows) and len(calls) == (4 if again else 2)
    assert [row["tile"] for row in rows] == [1, 2], "a row each, the later one"


def test_a_gpu_that_is_lost_ends_the_sweep_and_blames_no_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter([lambda: None, lambda: None, fail])  # once to compile, once timed, and then
    sweep_of(lambda: next(steps)(), monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    out = tmp_path / "tune.json"
    options = argparse.Namespace(
        minutes=1.0, only=[""], repetitions=1, out=out, environment={}, head_dim=64, length=8, dropout=0.1
    )
    with pytest.raises(SystemExit, match="it, 2: RuntimeError: CUDA error: an illegal memory access\nafter it"):
        tune.time_all(options, [])
    (row,) = json.loads(out.read_text())["results"]
    assert row["tile"] == 1 and row["ms"] is not None


def fail() -> None:
    raise RuntimeError("CUDA error: an illegal memory access\nCUDA kernel errors might be reported later")


def test_processes_compile_every_candidate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known is left alone, and what does not compile keeps no process from the rest."""
    tried: list[int] = []
    installed = [0]

    def install(candidate: int) -> nullcontext[None]:
        installed[0] = candidate
        return nullcontext()

    def operation() -> None:
        tried.append(installed[0])
        if installed[0] == 2:
            raise OutOfResources(2, 1, "shared memory")

    monkeypatch.setattr(tune, "attention_sweeps", lambda _: [tune.Sweep("it", install, range(6), operation, ())])
    for others in ("mlm_sweeps", "row_sweeps"):
        monkeypatch.setattr(tune, others, lambda _: [])
    known = [{"sweep": "it", "tile": 4, "ms": 1.0, "note": ""}]
    for share in range(2):
        tune.compile_share(argparse.Namespace(only=[""], share=(share, 2)), known)
    assert sorted(tried) == [0, 1, 2, 3, 5] and tried[:3] == [0, 2, 5]


def test_processes_that_compile_end_with_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/words\nexec sleep 60\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(tune.sys, "executable", str(stand_in))
    monkeypatch.setattr(tune, "processes", lambda: 2)
    tune.compile_first(["--out", "x"], time.monotonic() + 2)
    words = sorted((tmp_path / "words").read_text().split("\n"))[1:]
    assert words == [f"-m benchmarks.tune --out x --share {share} 2" for share in range(2)]


def test_no_two_candidates_compile_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the sums over rows have a step of their own: the others' is a tile of words."""
    options = argparse.Namespace(on_gpu=True, device="meta", dtype=torch.bfloat16)
    monkeypatch.setattr(tune, "architecture", lambda _: 90)
    sizes = {sweep.name: list(sweep.candidates) for sweep in tune.mlm_sweeps(options)}
    assert all(len(candidates) == len(set(candidates)) for candidates in sizes.values())
    for name in ("forward", "dhidden"):
        assert {tile.step for tile in sizes[f"mlm_head narrow {name}"]} == {128}
        assert len(sizes[f"mlm_head narrow {name}"]) == 8
    assert {tile.step for tile in sizes["mlm_head narrow dembedding"]} == {32, 64, 128}
