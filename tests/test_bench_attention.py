"""The attention benchmark and the tile sweep, at tiny shapes: that they run, count right and write JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_attention, tune
from benchmarks.bench_attention import Batch, Workload

CPU = torch.device("cpu")


def test_a_peers_kept_fraction_is_measured() -> None:
    results = bench_attention.main(["--device", "cpu", "--repetitions", "1", "--only", "mixed"])
    kept = [float(result.note.removeprefix("keeps ")) for result in results]
    assert len(kept) == 4 and all(abs(share - 0.9) < 0.01 for share in kept)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="sweeps for real on a GPU: make tune")
def test_tune_sweeps_every_table(tmp_path: Path) -> None:
    tune.main(["--head-dim", "16", "--repetitions", "1", "--out", str(tmp_path / "tiles.json")])
    rows = json.loads((tmp_path / "tiles.json").read_text())["results"]
    swept = {row["sweep"] for row in rows}
    assert swept == {
        *(f"attention {kernel}" for kernel in ("short forward", "short both", "forward", "queries", "keys")),
        *(f"mlm_head narrow {kernel}" for kernel in ("forward", "dhidden", "dembedding")),
        *("mlm_head wide", "layer_norm", "rtd_head", "sample_and_replace"),
    }
    assert all(row["ms"] > 0 for row in rows) and len(rows) > len(swept)
