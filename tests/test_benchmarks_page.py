"""The one command for benchmarks, the page made from its results, and the learning study's plan."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as command
from benchmarks import render, svg
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
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "it.json").write_text(json.dumps(report))
    page = render.pages(tmp_path)
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
