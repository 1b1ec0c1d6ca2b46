"""The attention benchmark and the tile sweep, at tiny shapes: that they run, count right and write JSON."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_attention, catalogue, tune
from benchmarks.bench_attention import Batch, Workload
from benchmarks.kernel_report import Mismatch

CPU = torch.device("cpu")


def test_a_peers_kept_fraction_is_measured() -> None:
    results = bench_attention.main(["--device", "cpu", "--repetitions", "1", "--only", "mixed"])
    kept = [float(result.note.removeprefix("keeps ")) for result in results]
    assert len(kept) == 4 and all(abs(share - 0.9) < 0.01 for share in kept)


def test_contestants_compute_the_same() -> None:
    work = Workload("mixed", (3, 7, 5), 2, 16, 0.1)
    for setup in (bench_attention._ours("reference"), bench_attention._sdpa(None, masked=True)):
        bench_attention.check("peer", setup, work, torch.float32, CPU)
    with pytest.raises(Mismatch, match="no mask: result 0 differs"):
        bench_attention.check("no mask", bench_attention._sdpa(None), work, torch.float32, CPU)


def test_what_is_padded_is_packed_again() -> None:
    batch = Batch.of(Workload("mixed", (3, 7, 5), 2, 16, 0.0), torch.float32, CPU)
    padded = batch.padded(batch.dout_THK)
    assert padded.shape == (3, 2, 7, 16) and torch.equal(batch.packed(padded), batch.dout_THK)


def test_on_a_gpu_the_peers_that_count_are_there() -> None:
    options = argparse.Namespace(device="cuda", compile=True)
    found = {
        work.name: set(bench_attention.contestants(work, options)) for work in bench_attention.workloads(True)
    }
    always = {"ours", "twin, eager", "SDPA, boolean mask", "aten FlashAttention 2, varlen"}
    equal = {"SDPA, FlashAttention", "SDPA, cuDNN"}
    assert found["Small, 8 to 128, p=0.0"] == always
    assert found["Small, 8 to 128, p=0.1"] == always - {"twin, eager"}
    assert found["Small, 128, p=0.1"] == always | equal | {"twin, torch.compile"}
    assert found["Base, 8192, p=0.0"] == always | equal


def test_a_twin_that_takes_too_long_is_left_out_and_the_table_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_attention, "leaves_out_twin", lambda work, _: not work.is_equal)
    results = bench_attention.main(["--device", "cpu", "--repetitions", "1"])
    left_out = [row for row in results if row.timing is None]
    assert [(row.case, row.contender) for row in left_out] == [("mixed", "twin, eager")]
    assert left_out[0].note in capsys.readouterr().out and left_out[0].note.startswith(catalogue.LEFT_OUT)


def test_a_workload_without_its_tensors_ends_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of = Batch.of

    def full(work: Workload, *rest: Any) -> Batch:
        if work.name == "equal 16":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return of(work, *rest)

    monkeypatch.setattr(Batch, "of", staticmethod(full))
    with pytest.raises(SystemExit, match=r"equal 16, ours \(twin\): cannot run: OutOfMemoryError"):
        bench_attention.main(["--device", "cpu", "--repetitions", "1"])
    assert "mixed forward" in capsys.readouterr().out


def test_counts() -> None:
    work = Workload("two", (2, 3), 4, 16, 0.0)
    assert work.flops(False) == 4 * (4 + 9) * 4 * 16 and work.flops(True) == 14 * 13 * 64
    assert work.bytes_moved(False, 2) == 4 * 5 * 64 * 2 and work.bytes_moved(True, 2) == 11 * 5 * 64 * 2
    assert work.longest == 3 and not work.is_equal


@pytest.mark.skipif(torch.cuda.is_available(), reason="sweeps for real on a GPU: make tune")
def test_tune_sweeps_every_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.main(["--head-dim", "16", "--repetitions", "1", "--out", str(tmp_path / "tiles.json")])
    rows = json.loads((tmp_path / "tiles.json").read_text())["results"]
    swept = {row["sweep"] for row in rows}
    assert swept == {
        *(f"attention {kernel}" for kernel in ("short forward", "short both", "forward", "queries", "keys")),
        *(f"mlm_head narrow {kernel}" for kernel in ("forward", "dhidden", "dembedding")),
        *("mlm_head wide", "layer_norm", "bias_gelu", "rtd_head", "sample_and_replace"),
    }
    assert all(row["ms"] > 0 for row in rows) and len(rows) > len(swept)
    monkeypatch.setattr(tune, "time_one", None)  # nothing is left to be timed
    tune.main(["--head-dim", "16", "--repetitions", "1", "--out", str(tmp_path / "tiles.json")])
    assert json.loads((tmp_path / "tiles.json").read_text())["results"] == rows


def test_a_tile_that_does_not_compile_ends_no_sweep(tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("out of resources\nDetails")

    sweep = tune.Sweep("attention", lambda _: nullcontext(), [(16, 16)], refuse, ())
    assert tune.time_one(sweep, (16, 16), 1) == {
        "sweep": "attention", "tile": [16, 16], "ms": None, "note": "RuntimeError: out of resources"
    }  # fmt: skip


def test_a_sweep_without_time_stops(capsys: pytest.CaptureFixture[str]) -> None:
    tune.main(["--head-dim", "16", "--minutes", "0"])
    assert "to continue, repeat the command" in capsys.readouterr().out
