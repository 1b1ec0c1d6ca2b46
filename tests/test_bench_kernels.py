"""The kernel benchmarks run to their end on a CPU, after their own checks that all contenders agree."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

BENCHMARKS = ("bench_mlm_head", "bench_sample_replace", "bench_rtd_loss", "bench_layer_norm")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_runs_on_a_cpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    results = module.main(["--device", "cpu", "--repetitions", "1", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert "says nothing about the kernels" in printed["environment"]["note"]
    assert len(printed["results"]) == len(results) >= 3
    assert all(result.milliseconds > 0 for result in results)
    assert {result.contender for result in results} > {"ours"}


def test_a_contender_that_computes_something_else_stops_the_benchmark() -> None:
    timing = importlib.import_module("benchmarks.kernel_timing")
    with pytest.raises(SystemExit, match="odd one: result 0 differs by 1"):
        timing.same("odd one", [torch.ones(2)], [torch.zeros(2)], 1e-3)
    with pytest.raises(SystemExit, match="differs by nan"):
        timing.same("odd one", [torch.full((2,), torch.nan)], [torch.zeros(2)], 1e-3)
    sampling = importlib.import_module("benchmarks.bench_sample_replace")
    with pytest.raises(SystemExit, match="do not follow the softmax"):
        sampling.check_distribution("argmax", lambda x, ids, *_: (x.argmax(-1), ids), "cpu")
