"""The kernel benchmarks run to their end on a CPU, after their own checks that all contenders agree."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import threading
import time
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pretend_graphs
import pytest
import torch
from electra_kernels import dispatch

from benchmarks import harness, kernel_report, kernel_timing
from benchmarks.kernel_report import Mismatch

BENCHMARKS = (
    "bench_attention",
    "bench_mlm_head",
    "bench_sample_replace",
    "bench_rtd_loss",
    "bench_layer_norm",
    "bench_bias_gelu",
)


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


def options(*arguments: str) -> argparse.Namespace:
    return kernel_timing.settle(kernel_timing.parser("").parse_args(["--device", "cpu", *arguments]))


def test_the_kernels_time_is_never_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU whose launcher does not work "auto" would take the twin, which would then be called ours."""
    chosen: list[str] = []
    ours = kernel_timing.by_kernel(lambda *_: chosen.append(dispatch._choice))
    ours(torch.ones(1))
    monkeypatch.setattr(kernel_timing, "_on_gpu", lambda _: True)
    ours(torch.ones(1))
    kernel_timing.twin(lambda *_: chosen.append(dispatch._choice))(torch.ones(1))
    assert chosen == ["auto", "triton", "reference"] and dispatch._choice == "auto"


def test_percentiles_of_few_repetitions_lie_among_them() -> None:
    for times in ([2.0], [1.0, 3.0], [1.0, 3.0, 3.1], [5.0, 5.1, 5.2, 9.0]):
        spread = harness.deciles(times)
        assert min(times) <= spread.low <= spread.median <= spread.high <= max(times)
    hundred = harness.deciles([float(value) for value in range(101)])
    assert hundred == harness.Spread(50.0, 10.0, 90.0)


def test_a_contender_that_cannot_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    def refuses() -> None:
        raise TypeError("No kernel for this shape.\nDetails")

    settled = options()
    result = kernel_timing.run("case", "peer", refuses, (), settled, kernel_timing.Work(1.0))
    kernel_report.report(settled)
    assert (
        result.timing is None and "cannot run: TypeError: No kernel for this shape.\n" in capsys.readouterr().out
    )


def test_results_so_far_survive_a_benchmark_that_is_stopped(tmp_path: Path) -> None:
    settled = options("--out", str(tmp_path / "out.json"), "--repetitions", "1")
    kernel_timing.run("case", "ours", lambda: None, (), settled, kernel_timing.Work(1.0))
    assert len(json.loads((tmp_path / "out.part").read_text())["results"]) == 1
    kernel_report.report(settled)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize("name", ["mlm_head", "sample_replace", "rtd_loss", "layer_norm", "bias_gelu"])
def test_a_shape_without_its_memory_ends_no_other(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU too small for a tensor, or for the reference in fp32."""
    module = importlib.import_module(f"benchmarks.bench_{name}")
    shape = module.CPU_SHAPES[0]
    monkeypatch.setattr(module, "CPU_SHAPES", ((shape[0] + 1, *shape[1:]), shape))
    usual, first = torch.randn, iter([True])

    def lacking(*sizes: int, **named: Any) -> torch.Tensor:
        if next(first, False):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return usual(*sizes, **named)

    monkeypatch.setattr(torch, "randn", lacking)
    with pytest.raises(SystemExit, match=rf"={shape[0] + 1} .*, ours: cannot run: OutOfMemoryError"):
        module.main(["--device", "cpu", "--repetitions", "1"])
    assert re.search(rf"={shape[0]} .* ours ", capsys.readouterr().out)


def test_the_word_heads_reference_stores_few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 all of them, with their gradients, are more than a small GPU has."""
    module = importlib.import_module("benchmarks.bench_mlm_head")
    rows: list[int] = []
    loss = torch.nn.functional.cross_entropy

    def seen(logits_MV: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(logits_MV))
        return loss(logits_MV, *rest)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", seen)
    monkeypatch.setattr(module, "contestants", lambda *_: {"ours": module.ours})
    monkeypatch.setattr(module, "CHUNK_ROWS", 8)
    module.main(["--device", "cpu", "--repetitions", "1"])
    assert max(rows) == 8


def test_without_memory_for_the_ceilings_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(_: str) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernel_timing, "ceilings", lacking)
    assert options().ceilings is None


def test_share_of_the_ceiling_takes_the_longer_of_the_two() -> None:
    settled = options()
    settled.ceilings = kernel_report.Ceilings(bytes_per_second=1e6, operations_per_second=1e9)
    for work, seconds in ((kernel_timing.Work(2.0, 500.0), 2e-6), (kernel_timing.Work(2.0, 5000.0), 5e-6)):
        result = kernel_timing.run("case", "ours", lambda: None, (), settled, work)
        assert result.timing is not None
        assert result.of_ceiling == pytest.approx(seconds / (result.timing.milliseconds * 1e-3))


def test_a_contender_that_computes_something_else_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Mismatch, match="odd one: result 0 differs by 1"):
        kernel_timing.same("odd one", [torch.ones(2)], [torch.zeros(2)], 1e-3)
    with pytest.raises(Mismatch, match="differs by nan"):
        kernel_timing.same("odd one", [torch.full((2,), torch.nan)], [torch.zeros(2)], 1e-3)
    settled, contenders = options(), {"ours": lambda x: [x], "odd one": lambda x: [x + 1]}
    agreed = kernel_timing.agreeing("case", contenders, [torch.ones(2)], (torch.ones(2),), settled, 1e-3)
    assert list(agreed) == ["ours"]
    with pytest.raises(SystemExit, match="case, odd one: WRONG RESULT: odd one: result 0 differs by 1"):
        kernel_report.report(settled)
    sampling = importlib.import_module("benchmarks.bench_sample_replace")
    with pytest.raises(Mismatch, match="do not follow the softmax"):
        sampling.check_distribution("argmax", lambda x, ids, *_: (x.argmax(-1), ids), "cpu")


@pytest.mark.parametrize("where", ["before", "while-timed"])
def test_without_a_time_of_ours_there_is_no_result(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def ours(x: torch.Tensor) -> list[torch.Tensor]:
        calls.append(1)
        if where == "before" or len(calls) > 1:
            raise RuntimeError("out of memory")
        return [x]

    settled = options("--out", str(tmp_path / "out.json"), "--repetitions", "1")
    contenders = {"ours": ours, "twin, eager": lambda x: [x * 1], "ours, a part": lambda x: [x]}
    inputs = (torch.ones(2),)
    agreed = kernel_timing.agreeing("case", contenders, [torch.ones(2)], inputs, settled, 1e-3)
    kernel_timing.compare("case", agreed, inputs, settled, kernel_timing.Work(1.0))
    with pytest.raises(SystemExit, match=r"^case, ours: cannot run: RuntimeError: out of memory$"):
        kernel_report.report(settled)
    assert [path.name for path in tmp_path.iterdir()] == ["out.part"], "so it counts as not measured"
    lines = [line for line in capsys.readouterr().out.split("\n") if line.startswith("case ")]
    twin = next(line for line in lines if "twin" in line).split()
    assert len(lines) == 4 and twin[4] == "-", "no ratio to anything else"


def test_after_a_lost_gpu_nothing_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nDetails")

    settled = options("--out", str(tmp_path / "out.json"), "--repetitions", "1")
    work, inputs = kernel_timing.Work(1.0), (torch.ones(2),)
    pretend_graphs.on_a_cpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert kernel_timing.run("case", "peer", lost, inputs, settled, work).timing is None, "the GPU goes on"
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(SystemExit, match=r"case, peer: RuntimeError: CUDA error: an illegal .*\nafter it,"):
        kernel_timing.run("case", "peer", lost, inputs, settled, work)
    with pytest.raises(SystemExit, match="case, ours: RuntimeError"):
        kernel_timing.agreeing("case", {"ours": lost}, [torch.ones(2)], inputs, settled, 1e-3)
    assert len(json.loads((tmp_path / "out.part").read_text())["results"]) == 3


def test_bytes_that_cannot_be_avoided() -> None:
    layer_norm = importlib.import_module("benchmarks.bench_layer_norm")
    with_dropout, without = (layer_norm.residual_bytes(10, 4, 2, dropout_p) for dropout_p in (0.1, 0.0))
    assert (with_dropout, without) == (9 * 80, 8 * 80), "without dropout dx is ds, not stored again"
    few, many = (layer_norm.embedding_bytes(tokens, 2, 0.1) / 8 for tokens in (100, 40_000))
    assert few == 3 * 100 + 30522 + 200 and many == 3 * 40_000 + 3 * 30522, "a row is read once a pass"


def test_a_draw_is_returned_but_is_no_part_of_the_comparison() -> None:
    x = torch.ones(3, requires_grad=True)
    value, gradient = kernel_timing.with_gradients(lambda x: (2 * x.sum(), torch.rand(3)), 1)(x)
    assert value == 6 and torch.equal(gradient, torch.full((3,), 2.0))


def test_the_gpu_that_is_named_is_the_current_one_and_products_are_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    torch.set_float32_matmul_precision("high")
    try:
        for device in ("cpu", "cuda", "cuda:1"):  # without a number it is the current one already
            harness.use_device(torch.device(device))
        assert current == [torch.device("cuda", 1)] and torch.get_float32_matmul_precision() == "highest"
        assert harness.environment(torch.device("cpu"))["float32_matmul_precision"] == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


class FakeEvent:
    """A device event that takes 2 ms from one to the next."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, _: FakeEvent) -> float:
        return 2.0


def test_the_way_of_a_gpu_through_the_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything that only a GPU has replaced: a slip there would be found when one is lent, and cost it."""
    waits: list[int] = []
    monkeypatch.setattr(kernel_timing, "_on_gpu", lambda _: True)
    monkeypatch.setattr(kernel_timing, "COLD_BYTES", 64)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1 << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 20)
    monkeypatch.setattr(torch.cuda, "_sleep", waits.append)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    timing = kernel_timing.measure(lambda x: x + 1, (torch.ones(3),), 7)
    assert (timing.milliseconds, timing.low, timing.high, timing.peak_megabytes) == (2.0, 2.0, 2.0, 2.0)
    assert timing.submit_milliseconds is not None and len(waits) == 7
    assert all(cycles > 1e-3 * timing.submit_milliseconds * 1e9 for cycles in waits)
    calls: list[int] = []
    kernel_timing.measure(lambda x: (time.sleep(0.2), calls.append(1)), (torch.ones(3),), 100)
    assert len(calls) == 1 + 1 + 3 + 3  # compiles, memory, submission, and the fewest repetitions


@pytest.fixture
def slow_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a GPU has, replaced, and graphs that work on a CPU."""
    pretend_graphs.on_a_cpu(monkeypatch)
    for name, stand_in in {"synchronize": lambda: None, "_sleep": lambda _: None, "Event": FakeEvent}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(kernel_timing, "_on_gpu", lambda _: True)
    monkeypatch.setattr(kernel_timing, "COLD_BYTES", 64)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)


def test_more_launches_than_the_queue_takes_are_replayed(slow_host: None) -> None:
    calls: list[int] = []

    def many(x: torch.Tensor, reads: bool) -> torch.Tensor:
        calls.append(1)
        time.sleep(0.01)
        return x + x.sum().item() if reads else x + 1

    result = kernel_timing.run("case", "twin", many, (torch.ones(3), False), options(), kernel_timing.Work(1.0))
    (graph,) = pretend_graphs.Graph.made
    assert result.note == kernel_timing.REPLAYED and result.timing is not None
    assert len(calls) == 1 + 1 + 3 + 1 + 1 and graph.replays == 1 + 2 + 3  # tried, submitted, timed
    assert result.timing.submit_milliseconds is not None and result.timing.submit_milliseconds >= 10
    settled = options()
    settled.ceilings = kernel_report.Ceilings(bytes_per_second=1e6, operations_per_second=1e9)
    result = kernel_timing.run("case", "twin", many, (torch.ones(3), True), settled, kernel_timing.Work(1.0))
    assert (
        result.note == kernel_timing.HOST_BOUND
        and result.of_ceiling is None
        and len(pretend_graphs.Graph.made) == 1
    ), "it waits for the device, so its capture is not tried"
    torch.ones(1).item()  # and who waits afterwards may


def test_a_capture_that_fails_spoils_nothing_that_follows(slow_host: None) -> None:
    """After it, other contenders draw, on the usual stream."""

    def not_captured(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        if pretend_graphs.Left.pools:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x + 1

    inputs, work = (torch.ones(3),), kernel_timing.Work(1.0)
    result = kernel_timing.run("case", "peer", not_captured, inputs, options(), work)
    assert result.timing is not None and result.note == kernel_timing.HOST_BOUND
    assert pretend_graphs.left_behind() == []
    torch.randn(3)


def test_facts_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[int] = []
    monkeypatch.setattr(torch, "mm", lambda *_: products.append(1))
    monkeypatch.setattr(kernel_report, "BUSY_SECONDS", 0.0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: time.sleep(0.001))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    properties = types.SimpleNamespace(uuid="12-ab", multi_processor_count=16, total_memory=18 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.ones(2, 2))
    before = threading.active_count()
    printed = "1980 MHz, 2619 MHz, 1980 MHz, 500.00 W, 700.00 W, 50, 570.1"
    done = subprocess.CompletedProcess([], 0, stdout=printed + "\n")

    def smi(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        before = len(products)
        time.sleep(0.2)
        assert len(products) > before, "the GPU has work for as long as it takes"
        return done

    with mock.patch.object(kernel_report.subprocess, "run", side_effect=smi) as asked:
        clocks = kernel_report.clocks_under_load("cpu")
    assert threading.active_count() == before, "the work ends"
    assert "--id=GPU-12-ab" in asked.call_args.args[0], "nvidia-smi does not count as torch does"
    assert clocks["clocks.sm"] == "1980 MHz" and clocks["driver_version"] == "570.1"
    facts = kernel_report.environment("cuda", clocks)
    assert facts["device"] == "a GPU" and facts["clocks_under_load"] == clocks
    assert (facts["multiprocessors"], facts["memory_megabytes"]) == (16, 18000), "of a slice, a slice's"
    assert {"cudnn", "liger-kernel", "torch", "triton"} <= set(facts["versions"])
    with mock.patch.object(kernel_report.subprocess, "run", side_effect=FileNotFoundError("no nvidia-smi")):
        assert kernel_report.clocks_under_load("cpu") == {"clocks.sm": "no nvidia-smi"}
    for others, expected in (("", "570.1"), (f"\n{printed}", None)):  # a slice, whose id nvidia-smi does not know
        answers = [subprocess.CompletedProcess([], 6, stdout="No devices were found\n"),
                   subprocess.CompletedProcess([], 0, stdout=f"{printed}{others}\n")]  # fmt: skip
        with mock.patch.object(kernel_report.subprocess, "run", side_effect=answers):
            clocks = kernel_report.clocks_under_load("cpu")
        assert clocks.get("driver_version") == expected
        assert clocks["clocks.sm"] == ("1980 MHz" if expected else "No devices were found")
        assert ("of" in clocks) == bool(expected)
