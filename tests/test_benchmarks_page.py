"""The one command for benchmarks, the page made from its results, and the learning study's plan."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import learning_study, render, svg
from benchmarks.catalogue import CATALOGUE, RESULTS, Benchmark
from benchmarks.learning_plan import BUDGETS, Finetuning, Pretraining, pieces, step_flops, steps_for_equal_flops
from electra_core.config import OBJECTIVES, PRESETS
from electra_core.flops import run_of
from electra_core.flops import step_flops as electra_step_flops


def test_the_page_is_what_the_results_give() -> None:
    for name, text in render.pages(RESULTS).items():
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


def test_a_runs_pieces_come_before_what_is_made_of_them() -> None:
    for budget in BUDGETS.values():
        seen: set[Pretraining] = set()
        names = []
        for piece in pieces(budget):
            names.append(piece.name)
            assert not isinstance(piece, Finetuning) or piece.run in seen
            if isinstance(piece, Pretraining):
                if piece.equal == "seconds":  # measured on the runs of equal FLOPs
                    assert {
                        replace(piece, equal="flops"),
                        replace(piece, equal="flops", objective="electra"),
                    } <= seen
                seen.add(piece)
        assert len(set(names)) == len(names)


def test_equal_flops() -> None:
    preset = PRESETS["tiny"]
    run = run_of(preset.discriminator, preset.pretrain)
    tokens = 16 * 128.0
    counted = electra_step_flops(run.model, run.generator, tokens=tokens, pairs=tokens * 128, masked=tokens * 0.15)
    assert step_flops(preset.discriminator, preset.pretrain) == pytest.approx(counted)
    budget, totals = BUDGETS["minutes"], {}
    for objective in OBJECTIVES:
        steps = steps_for_equal_flops(budget, Pretraining(objective, 2, 0), 8192)
        totals[objective] = steps * step_flops(preset.discriminator, replace(preset.pretrain, objective=objective))
    assert max(totals.values()) / min(totals.values()) < 1.01
    assert totals["electra"] == 600 * counted


def test_equal_seconds() -> None:
    rows = [
        {
            "kind": "pretraining",
            "objective": name,
            "point": 1,
            "seed": 0,
            "equal": "flops",
            "seconds": s,
            "steps": n,
        }
        for name, s, n in (("electra", 50.0, 100), ("mlm", 30.0, 120))
    ]
    assert learning_study.steps_for_equal_seconds(rows, Pretraining("mlm", 1, 0, "seconds")) == 200


def test_the_stopwatch_knows_what_pretraining_calls() -> None:
    with learning_study.stopwatch(lambda: 0.0) as elsewhere:
        assert elsewhere == [0.0]


def test_a_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    study = object.__new__(learning_study.Study)
    study.budget, study.device = BUDGETS["quick"], torch.device("cpu")
    study.options = argparse.Namespace(out=tmp_path / "s.jsonl", minutes=1e9)
    monkeypatch.setattr(study, "_environment", lambda: {"kind": "environment"})
    monkeypatch.setattr(learning_study, "summary", lambda row: "")

    def piece(piece: Pretraining | Finetuning) -> dict[str, str] | None:
        done.append(piece.name)
        return None if len(done) == 3 else {"kind": "x"}

    monkeypatch.setattr(study, "_pretrain", piece)
    monkeypatch.setattr(study, "_finetune", piece)
    for _ in range(2):
        study.rows = learning_study.read_rows(study.options.out)
        study.run()
    expected = [piece.name for piece in pieces(BUDGETS["quick"])]
    assert done == expected[:3] + expected[2:]  # the one that was cut off comes again
