"""The attention benchmark and the tile sweep, at tiny shapes: that they run, count right and write JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_attention, timing, tune
from benchmarks.bench_attention import Batch, Workload

CPU = torch.device("cpu")


def test_bench_attention_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_attention.main(["--device", "cpu", "--repeats", "2", "--json", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    printed = capsys.readouterr().out
    assert "No GPU" in printed and written["machine"]["torch"] == torch.__version__
    assert [row["contestant"] for row in written["results"]][:3] == ["ours (twin)", "SDPA, boolean mask", "SDPA"]
    for row in written["results"]:
        assert row["failed"] is None and row["forward"]["median_ms"] > 0 and row["both"]["median_ms"] > 0
        assert f"{row['both']['median_ms']:9.4f}" in printed
        if row["workload"] == "mixed":
            assert abs(row["kept"] - 0.9) < 0.01


def test_contestants_compute_the_same() -> None:
    work = Workload("mixed", (3, 7, 5), 2, 16, 0.0)
    batch = Batch.of(work, torch.float32, CPU)
    x, run, _ = bench_attention._packed("reference")(batch)
    y, masked, _ = bench_attention._sdpa(None, masked=True)(batch)
    torch.testing.assert_close(
        batch.padded(run(x)), (masked(y).transpose(1, 2) * batch.mask_N11S()[:, 0, 0, :, None, None])
    )


def test_counts() -> None:
    work = Workload("two", (2, 3), 4, 16, 0.0)
    assert work.flops(False) == 4 * (4 + 9) * 4 * 16 and work.flops(True) == 14 * 13 * 64
    assert work.bytes_moved(False, 2) == 4 * 5 * 64 * 2 and work.bytes_moved(True, 2) == 11 * 5 * 64 * 2
    assert work.longest == 3 and not work.is_equal


def test_measure_takes_the_median() -> None:
    calls = []
    result = timing.measure(lambda: calls.append(1), CPU, repeats=5, warmup=2)
    assert len(calls) == 7 and result.repeats == 5 and result.peak_bytes is None
    assert result.low_ms <= result.median_ms <= result.high_ms


@pytest.mark.skipif(torch.cuda.is_available(), reason="sweeps for real on a GPU: make tune")
def test_tune_sweeps_every_kernel(tmp_path: Path) -> None:
    tune.main(["--head-dim", "16", "--length", "20", "--repeats", "1", "--json", str(tmp_path / "tiles.json")])
    rows = json.loads((tmp_path / "tiles.json").read_text())["results"]
    kernels = {row["kernel"] for row in rows}
    assert kernels == {"short forward", "short backward", "forward", "queries", "keys"}
    assert all(row["ms"] > 0 for row in rows) and len(rows) == 2 + 3 * len(tune.TINY_GRID)
