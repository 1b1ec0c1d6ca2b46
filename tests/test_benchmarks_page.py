"""The one command for benchmarks, the page made from its results, and the learning study's plan."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as command
from benchmarks import render, render_speed, svg
from benchmarks.catalogue import CATALOGUE, RESULTS, Benchmark


def test_the_page_is_what_the_results_give() -> None:
    made = render.pages(RESULTS)
    assert not render.stale(made), "figures of results that are gone: python -m benchmarks render"
    for name, text in made.items():
        path = render.DOCS / name
        assert path.is_file() and path.read_text(encoding="utf-8") == text, (
            f"{path} is out of date: python -m benchmarks render"
        )


def test_a_figure_in_the_json_is_the_figure_on_the_page(tmp_path: Path) -> None:
    row = {name: {"median": 7.0, "low": 6.0, "high": 8.0} for name in ("ours", "theirs", "ratio")}
    by_processor = {**row["ratio"], "median": 7.77}
    report = {
        "comparisons": [
            {
                "figure": "f",
                "unit": "u",
                "peer": "p",
                **row,
                "ratio_by_processor_time": by_processor,
            }
        ],
        "environment": {"device": "a machine", "command": "python -m it"},
    }
    for place in ("cpu", "gpu"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "it.json").write_text(json.dumps(report))
    page = render.pages(tmp_path)
    assert page["benchmarks.md"].count("7.77") == 1 and "7.77" not in page["benchmarks/gpu_it.svg"], (
        "on a GPU the processor's time is the host's"
    )
    assert "7.77" in page["benchmarks.md"] and "7.77" in page["benchmarks/cpu_it.svg"]
    assert "a machine" in page["benchmarks.md"] and "python -m it" in page["benchmarks.md"]
    assert page["benchmarks.md"].count("not yet measured") >= len(CATALOGUE)


def test_a_steps_stages_are_a_table_with_their_sum(tmp_path: Path) -> None:
    stages = {"draw": {"milliseconds": 1.25, "launches": 0}, "backward": {"milliseconds": 30.5, "launches": 621}}
    report = {"environment": {"device": "a machine"}, "stages": stages, "launches": 621}
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "step.json").write_text(json.dumps(report))
    page = render.pages(tmp_path)["benchmarks.md"]
    assert "| backward | 30.5 | 621 |" in page and "| **all** | 31.8 | 621 |" in page


def test_figures_are_svg_even_with_nothing_in_them() -> None:
    curve = svg.Curve("a < b", [(0.0, [1.0, 2.0, 4.0]), (5.0, [3.0])])
    for figure in (svg.bars("t & u", "x", []), svg.curves("t", "x", "y", []), svg.curves("t", "x", "y", [curve])):
        assert ElementTree.fromstring(figure).tag.endswith("svg")
        assert "prefers-color-scheme" in figure


def test_every_benchmark_names_a_module_that_is_there() -> None:
    for benchmark in CATALOGUE:
        assert (Path(render.__file__).parent.parent / f"{benchmark.module.replace('.', '/')}.py").is_file()


def test_a_result_that_is_there_is_not_measured_again(tmp_path: Path) -> None:
    program = tmp_path / "count.py"
    program.write_text("import sys; open(sys.argv[-1], 'a').write('x')")
    benchmark = Benchmark("it", "", "count", cpu=())
    options = argparse.Namespace(quick=False, again=False, corpus=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        assert all(command.measure(benchmark, "cpu", tmp_path / "out", options) for _ in range(2))
        assert (tmp_path / "out" / "it.json").read_text() == "x"
        failing = Benchmark("bad", "", "no_such_module", cpu=())
        assert not command.measure(failing, "cpu", tmp_path / "out", options)


def test_on_a_gpu_ratios_are_of_the_clock(tmp_path: Path) -> None:
    ways = {way: {"examples_per_second": 2.0, "peak_mib": 3.0} for way in ("ours", "hub, dynamic")}
    result = {
        "ways": ways,
        "speedups": {"hub, dynamic": 5.55},
        "speedups_by_processor_time": {"hub, dynamic": 9.99},
    }
    report = {"environment": {}, "workloads": {}, "results": {"sst2 train": result}}
    for place, shown in (("cpu", "9.99"), ("gpu", "5.55")):
        (tmp_path / place).mkdir()
        path = tmp_path / place / "it.json"
        path.write_text(json.dumps(report))
        text, figures = render.section(path)
        assert f"{shown} x" in text and shown in figures["it.svg"]
        assert ("by processor time" in text) == (place == "cpu")
    rate = {"median": 4.0, "low": 3.0, "high": 5.0}
    row = {
        "kind": "throughput", "model": "small", "objective": "mlm", "batch": 1, "length": 2, "program": "ours",
        "tokens_per_second": rate, "by_processor_time": rate, "mfu": None, "peak_mib": 1,
    }  # fmt: skip
    rows = [row, {**row, "program": "peer"}, {**row, "program": "other", "note": "no"}]
    for on_gpu, columns in ((True, 7), (False, 8)):
        table = render_speed.sweep_tables(rows, on_gpu)
        assert {line.count("|") - 1 for line in table} == {columns}
