"""The kernel benchmarks run to their end on a CPU, after their own checks that all contenders agree."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = ("bench_attention", "bench_mlm_head", "bench_sample_replace", "bench_rtd_loss", "bench_layer_norm")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_runs_on_a_cpu(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    results = module.main(["--device", "cpu", "--repetitions", "2", "--out", str(tmp_path / "new" / "out.json")])
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "new" / "out.json").read_text())
    assert "says nothing about the kernels" in written["environment"]["note"] and written["ceilings"] is None
    assert written["environment"]["versions"]["torch"] == torch.__version__
    assert len(written["results"]) == len(results) >= 3
    for row in written["results"]:
        assert row["timing"]["low"] <= row["timing"]["milliseconds"] <= row["timing"]["high"]
        assert row["gigabytes_per_second"] > 0 and f"{row['timing']['milliseconds']:9.3f}" in printed
    assert len({result.contender for result in results}) > 1 and results[0].contender.startswith("ours")


def test_a_contender_that_cannot_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    timing = importlib.import_module("benchmarks.kernel_timing")

    def refuses() -> None:
        raise RuntimeError("No kernel for this shape.\nDetails")

    options = timing.settle(timing.parser("").parse_args(["--device", "cpu"]))
    result = timing.run("case", "peer", refuses, (), options, timing.Work(1.0))
    timing.report([result], options)
    assert result.timing is None and "cannot run: No kernel for this shape.\n" in capsys.readouterr().out


def test_share_of_the_ceiling_takes_the_longer_of_the_two() -> None:
    timing = importlib.import_module("benchmarks.kernel_timing")
    options = timing.settle(timing.parser("").parse_args(["--device", "cpu"]))
    options.ceilings = timing.Ceilings(bytes_per_second=1e6, operations_per_second=1e9)
    for work, seconds in ((timing.Work(2.0, 500.0), 2e-6), (timing.Work(2.0, 5000.0), 5e-6)):
        result = timing.run("case", "ours", lambda: None, (), options, work)
        assert result.of_ceiling == pytest.approx(seconds / (result.timing.milliseconds * 1e-3))


def test_a_contender_that_computes_something_else_stops_the_benchmark() -> None:
    timing = importlib.import_module("benchmarks.kernel_timing")
    with pytest.raises(SystemExit, match="odd one: result 0 differs by 1"):
        timing.same("odd one", [torch.ones(2)], [torch.zeros(2)], 1e-3)
    with pytest.raises(SystemExit, match="differs by nan"):
        timing.same("odd one", [torch.full((2,), torch.nan)], [torch.zeros(2)], 1e-3)
    sampling = importlib.import_module("benchmarks.bench_sample_replace")
    with pytest.raises(SystemExit, match="do not follow the softmax"):
        sampling.check_distribution("argmax", lambda x, ids, *_: (x.argmax(-1), ids), "cpu")
