"""The one command for benchmarks, the page made from its results, and the learning study's plan."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as command
from benchmarks import harness, render, render_about, render_learning, render_speed, svg
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
    assert "| masks | 1.25 | 0 |" in page, "an earlier name, which the generator's draw would have as well"


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


RATE = {"median": 4.0, "low": 3.0, "high": 5.0}
EPYC = "AMD EPYC (avx2, avx512f, avx512_bf16)"
ZEN4, ZEN5 = "AuthenticAMD family 25 model 17", "AuthenticAMD family 26 model 2"


def pretraining(folder: Path, name: str, environment: dict[str, object], **settings: object) -> None:
    """A result of `bench_pretrain` in a folder."""
    row = {"figure": "electra", "unit": "tokens/s", "peer": "p", "ours": RATE, "theirs": RATE}
    row |= {"ratio": {**RATE, "median": 6.5}, "ratio_by_processor_time": {**RATE, "median": 7.5}}
    about = {"model": "base", "batch": 16, "length": 128, "precision": "bf16", "their_precision": None}
    report = {"comparisons": [row], "settings": {**about, "threads": 2, **settings}, "relative_differences": {}}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**report, "environment": environment}))


def test_one_table_for_all_machines_says_what_was_measured(tmp_path: Path) -> None:
    first = {"device": EPYC, "date": "2026-11-28T1", "commit": "0123456789abc+changes", "command": "python -m one"}
    pretraining(tmp_path / "cpu", "pretrain_base_bf16", first)
    second = {"device": EPYC, "processor": ZEN5, "date": "2026-11-30T1", "commit": "0123456789abc"}
    pretraining(tmp_path / "cpu", "pretrain_small_bf16", second, model="small", length=512)
    page = render.pages(tmp_path)
    text = page["benchmarks.md"]
    assert (
        "| base | 16 x 128 | bf16 | 2 | C: Zen 4 | electra | p | 4 (3 to 5) | 4 (3 to 5) | 6.5 (3 to 5) |" in text
    )
    assert "| small | 16 x 512 | bf16 | 2 | D: Zen 5 | electra | p |" in text
    assert text.count("with uncommitted changes") == 1 and "`python -m one`" in text
    assert (
        "| [pretrain](#pretrain) | Pre-training beside `transformers` (`pretrain_small_bf16`) | "
        "C, D, 2026-11-28 to 2026-11-30 |" in text
    ), "there is no program for Base on a CPU, so no name to start one by"
    assert "C, base, bf16, 2 threads / p" in page["benchmarks/cpu_pretrain_electra.svg"]


@pytest.mark.parametrize(
    ("name", "device", "processor", "letter"),
    [
        ("x", "Intel(R) Xeon(R) Processor (avx2, avx512f, avx512_bf16, amx_bf16)", None, "A"),
        ("x", "Intel(R) Xeon(R) Processor (avx2, avx512f, avx512_bf16)", None, "B"),
        ("x_amd", EPYC, None, "C"),
        ("x_zen5_fp32", EPYC, None, "D"),
        ("x_zen5", EPYC, ZEN4, "C"),
        ("x", EPYC, ZEN5, "D"),
        ("x", "AMD EPYC (avx2)", "AuthenticAMD family 25 model 1", "E"),
        ("x", "AMD EPYC (avx2)", "AuthenticAMD family 23 model 49", None),
        ("x", "AMD Ryzen (avx2)", "AuthenticAMD family 25 model 33", None),
        ("x", "Intel(R) Xeon(R) Processor (avx2, amx_bf16)", "GenuineIntel family 6 model 1", None),
        ("x", "a GPU", None, None),
    ],
)
def test_which_machine(name: str, device: str, processor: str | None, letter: str | None) -> None:
    environment = {"device": device} | ({"processor": processor} if processor else {})
    assert render_about.letter_of(name, environment) == letter
    shown = render_about.machine(Path("cpu") / f"{name}.json", environment)
    assert shown.startswith(f"{letter}: " if letter else device) and (letter or processor or "") in shown


ON_ARM = """processor\t: 0
BogoMIPS\t: 125.00
Features\t: fp asimd evtstrm aes {features}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: {part}
"""


def test_machines_with_arm_processors_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux has neither `flags` nor `model name` for them."""
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(harness, "CPUINFO", info)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    shown = []
    for part, features in (("0xd40", "asimddp sve i8mm bf16"), ("0xd4f", "asimddp sve i8mm bf16"), ("0xd0c", "")):
        info.write_text(ON_ARM.format(part=part, features=features))
        shown.append(harness.environment(harness.torch.device("cpu"))["device"])
    assert shown == [
        "aarch64 0x41/0xd40 (asimddp, sve, bf16, i8mm)",
        "aarch64 0x41/0xd4f (asimddp, sve, bf16, i8mm)",
        "aarch64 0x41/0xd0c ()",
    ]
    assert harness.processor_name() == "aarch64 0x41/0xd0c"


def test_new_results_tell_generations_of_a_processor_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n")
    monkeypatch.setattr(harness, "CPUINFO", info)
    about = harness.environment(harness.torch.device("cpu"))
    assert about["processor"] == ZEN5 and about["device"] == "AMD EPYC ()"
    monkeypatch.setattr(harness, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(sys, "argv", ["it", "--peers", "one, two"])
    assert harness.environment(harness.torch.device("cpu"))["command"].endswith("--peers 'one, two'"), (
        "can be pasted"
    )
    assert "processor" not in harness.environment(harness.torch.device("cpu"))


def test_what_another_page_shows_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    report = {"kills": 50, "environment": {"device": "a machine", "command": "python -m it"}}
    (tmp_path / "cpu" / "kill_test.json").write_text(json.dumps(report))
    text = render.pages(tmp_path)["benchmarks.md"]
    assert "](reliability.md#what-was-shown): a machine, `python -m it` ([JSON](" in text
    assert "| kills |" not in text and "kill_test](#" not in text


def test_measured_and_calculated_are_told_apart() -> None:
    optimizer = {
        "milliseconds": None, "launches": 9, "kept_bytes_per_token": 0, "moved_megabytes": 454.3,
        "floor_milliseconds_h200": 0.0924,
    }  # fmt: skip
    head = {**optimizer, "launches": 3, "floor_milliseconds_h200": 0.0027}
    report = {"command": "it", "stages": {"detection head": head, "optimizer": optimizer}, "launches": 12}
    first, *table = render_speed.split_table(report, "A step")
    assert "Nothing is measured" in first and "calculated" in first and "milliseconds measured" not in table[0]
    assert "| optimizer | 9 | 0 | 454.3 |  |" in table, "bytes are no floor of products"
    assert "| detection head | 3 | 0 | 454.3 | 0.0027 |" in table
    timed = {**report, "stages": {"optimizer": {**optimizer, "milliseconds": 8.5}}}
    first, *table = render_speed.split_table(timed, "A step")
    assert "measured on the machine" in first and "| optimizer | 8.5 | 9 | 0 | 454.3 |" in table


def test_scores_of_runs_of_equal_time_need_every_task() -> None:
    runs = [("flops", 0.4), ("seconds", 0.3)]
    about = {"objective": "mlm", "seed": 0, "point": 0, "trial": None}
    rows = [
        {**about, "equal": equal, "kind": "pretraining", "flops": 3e12, "steps": 1, "tokens": 1, "seconds": 1.0,
         "evaluation": {}}
        for equal, _ in runs
    ]  # fmt: skip
    judged = {**about, "kind": "finetuning", "metric": "f1"}
    rows += [{**judged, "equal": equal, "task": "one", "value": value} for equal, value in runs]
    rows.append({**judged, "equal": "flops", "task": "two", "value": 0.9})
    scores = [line for line in render_learning.tables(rows) if line.startswith("| mlm") and "e+12 |" in line]
    assert any("| 40.0 | 90.0 |" in line for line in scores) and not any("30.0" in line for line in scores)


def test_figures_have_room_for_their_words() -> None:
    name, unit = "a name that is longer than what forty-seven signs take, fp32", "million tokens/s"
    drawn = ElementTree.fromstring(svg.bars("t", unit, [svg.Bar(name, 13.55, 13.4, 13.6)]))
    room = float(drawn.attrib["viewBox"].split()[2])
    for text in drawn.iter("{http://www.w3.org/2000/svg}text"):
        at, wide = float(text.attrib["x"]), 7 * len(text.text or "")
        assert at - wide >= 0 if text.get("text-anchor") == "end" else at + wide <= room, text.text
    drawn = ElementTree.fromstring(svg.curves("t", "x", "y", [svg.Curve(name, [(1.0, [2.0]), (2.0, [3.0])])]))
    (text,) = (each for each in drawn.iter("{http://www.w3.org/2000/svg}text") if each.text == name)
    assert float(text.attrib["x"]) + 7 * len(name) <= float(drawn.attrib["viewBox"].split()[2])
