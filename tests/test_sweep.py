"""The throughput sweep and the input benchmark: checks before clocks, rows that are kept, the page."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_input, harness, render, sweep, sweep_programs
from benchmarks.sweep_programs import EAGER, OURS, SDPA, Case
from electra_core.flops import training_step_flops

CPU = torch.device("cpu")


def case(program: str, objective: str = "electra", **changes: Any) -> Case:
    about = {"batch": 2, "length": 16, "precision": "fp32", "device": "cpu", "threads": 1, "steps": 1}
    return Case(**{"model": "tiny", "objective": objective, "program": program, **about, **changes})


@pytest.mark.parametrize("objective", ["electra", "mlm"])
@pytest.mark.parametrize("program", [OURS, EAGER, SDPA])
def test_every_program_computes_our_losses_and_trains(program: str, objective: str) -> None:
    one = case(program, objective)
    assert sweep_programs.check_same(one, CPU) < sweep_programs.LOSS_TOLERANCE
    loop = sweep_programs.steps_of(one, CPU)
    assert len([next(loop) for _ in range(2)]) == 2


def test_attention_is_the_one_that_the_row_names() -> None:
    for program, name in ((EAGER, "eager"), (SDPA, "sdpa")):
        model = sweep_programs.their_model(case(program), *case(program).configs)
        assert {part.config._attn_implementation for part in model.children()} == {name}


def test_a_difference_is_a_row_without_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_programs, "LOSS_TOLERANCE", -1.0)
    (answer,) = sweep_programs.worker(case(SDPA), rounds=1)
    assert "computes other losses than ours" in answer["note"]


def works_until(case: Case, rounds: int) -> Iterator[Any]:
    """A stand-in for `sweep_programs.worker` that fails, or ends, in the second round if its program says so."""
    yield {"difference": 0.0}
    for turn in range(rounds):
        if turn and case.program == "killed":
            os._exit(1)
        if turn and case.program == "fails":
            yield {"note": "OutOfMemoryError: of the second round"}
            return
        yield [1.0, 0.5]
    yield 100.0


def test_a_program_that_ends_in_the_middle_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "worker", works_until)
    rows = list(sweep.measure([case(program) for program in ("killed", OURS, "fails")], 3, None))
    notes = ["the process ended (out of memory?)", None, "OutOfMemoryError: of the second round"]
    assert [row.get("note") for row in rows] == notes
    assert rows[1]["rounds"] == [[1.0, 0.5]] * 3 and rows[1]["peak_mib"] == 100


def test_rows_and_their_figures() -> None:
    one = case(OURS, steps=3)
    rows = [[2.0, 1.0], [1.0, 0.5], [4.0, 2.0]]
    row = sweep._row(one, rows, 100.4, {"difference": 0.0}, peak=1e9)
    assert row["tokens_per_second"] == {"median": 48.0, "low": 24.0, "high": 96.0}
    assert row["by_processor_time"]["median"] == 96.0 and row["peak_mib"] == 100
    assert row["mfu"] == pytest.approx(48.0 * training_step_flops(*one.configs) / 32 / 1e9)
    assert sweep._row(one, [], None, {"note": "no room"}, None)["note"] == "no room"
    ended = sweep._row(one, [{"note": "the process ended"}], 1.0, {"difference": 0.0}, None)
    assert ended["note"] == "the process ended" and "tokens_per_second" not in ended


def test_the_command_goes_on_behind_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, asked = tmp_path / "sweep.jsonl", []

    def measure(cases: list[Case], rounds: int, peak: float) -> Any:
        asked.append([one.name for one in cases])
        for one in cases:
            note = "RuntimeError: ended" if one.name == lost else "OutOfResources: not really"
            yield {"piece": one.name, "kind": "throughput", "note": note}

    lost = None

    monkeypatch.setattr(sweep, "measure", measure)
    monkeypatch.setattr(sweep, "cpu_peak", lambda precision, threads: 1.0)
    monkeypatch.setattr(sweep, "split_row", lambda options, shape: {"kind": "split"})
    monkeypatch.setattr(sweep, "_about", lambda device, options: {"environment": {"device": "A"}})
    arguments = [
        "--out",
        str(out),
        "--model",
        "tiny",
        "--shapes",
        "2x16",
        "1x32",
        "--device",
        "cpu",
        "--objectives",
        "mlm",
    ]
    sweep.main(arguments)
    assert [len(names) for names in asked] == [5, 3], (
        "two compiled ones at the first shape alone; on a CPU ours is eager"
    )
    kept = out.read_text().split("\n")
    out.write_text("\n".join(kept[:3]) + "\n" + kept[3][:20])  # environment, two rows, and one that was cut off
    sweep.main(arguments)
    assert [len(names) for names in asked[2:]] == [3, 3] and not set(asked[2]) & {json.loads(kept[1])["piece"]}
    sweep.main(arguments)
    assert len(asked) == 4
    rows = harness.read_rows(out)
    lost = rows[1]["piece"]
    rows[1]["note"] = "RuntimeError: ended"
    harness.write_rows(out, rows)
    with pytest.raises(SystemExit) as ended:
        sweep.main([*arguments, "--minutes", "0"])
    assert ended.value.code == harness.TIME_UP and len(asked) == 4
    for _ in range(2):
        sweep.main(arguments)
    assert asked[4:] == [[lost], [lost]], "what the compiler did not refuse is measured again"
    assert [row.get("piece") for row in harness.read_rows(out)].count(lost) == 1
    monkeypatch.setattr(sweep, "_about", lambda device, options: {"environment": {"device": "B"}})
    with pytest.raises(SystemExit, match="another machine"):
        sweep.main([*arguments, "--objectives", "electra"])


def test_input_is_checked_timed_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_input, "DOCUMENTS", 200)
    out = tmp_path / "input.json"
    options = "--rounds 1 --seconds 0.05 --ways 1x2 --batch 16 --length 32".split()
    monkeypatch.setattr("sys.argv", ["bench_input.py", *options, "--out", str(out)])
    bench_input.main()
    report = json.loads(out.read_text())
    (row,) = report["ways"]
    assert (row["processes"], row["threads"]) == (1, 2) and set(row["nanoseconds_per_token"]) == {
        "plan",
        "read",
        "mask",
    }
    assert row["tokens_per_second"]["median"] > 0 and report["environment"]["device"]
    assert str(tmp_path) not in report["environment"]["command"], "no folder of this machine"
    examples = bench_input.Load(None, 16, 32, 0.0).examples()
    monkeypatch.setattr(examples, "one", lambda index: None)
    with pytest.raises(SystemExit, match="plans differ from the rules"):
        bench_input.check_same(examples)


def throughput(program: str, batch: int, rate: float, **more: Any) -> dict[str, Any]:
    spread = {"median": rate, "low": rate - 1, "high": rate + 1}
    about = {"kind": "throughput", "model": "small", "objective": "mlm", "batch": batch, "length": 128}
    return {**about, "program": program, "tokens_per_second": spread, "by_processor_time": spread, "mfu": 0.25,
            "peak_mib": 1234, **more}  # fmt: skip


def test_what_the_page_shows(tmp_path: Path) -> None:
    spread = {"median": 4e6, "low": 3e6, "high": 5e6}
    stages = {"plan": {"median": 81.0, "low": 80.0, "high": 82.0}}
    rates = {"tokens_per_second": spread, "tokens_per_second_by_processor_time": spread}
    way = {"processes": 2, "threads": 1, **rates, "nanoseconds_per_token": stages}
    settings = {"batch": 128, "length": 128, "planned": 1024, "corpus": "words"}
    plan = {"together": spread, "one_at_a_time": spread}
    input_report = {
        "ways": [way],
        "plan": plan,
        "settings": settings,
        "environment": {"device": "machine A", "date": "2026-01-02T"},
    }
    rows = [{"kind": "environment", "environment": {"device": "machine B"}}, throughput(OURS, 16, 300.0),
            throughput(SDPA, 16, 100.0), throughput(OURS, 64, 400.0),
            {**throughput(EAGER, 64, 1.0), "note": "out | of memory"}]  # fmt: skip
    other = {
        "machine": "machine C",
        "command": "python -m it --out x",
        "inputs": 12000,
        "rows": [{"a_b": 1.5, "c": None}],
    }
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "input.json").write_text(json.dumps(input_report))
    (tmp_path / "cpu" / "sweep_small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "cpu" / "else.json").write_text(json.dumps(other))
    pages = render.pages(tmp_path)
    page = pages["benchmarks.md"]
    assert "| 2 x 1 | 4 (3 to 5) | 4 (3 to 5) | 81 (80 to 82) |" in page
    assert f"| small mlm | 16 x 128 | {SDPA} | 100 (99 to 101) | 3.00 | 3.00 | 25.0% | 1,234 |" in page
    assert (
        "out / of memory" in page
        and "| inputs | 12,000 |" in page
        and "| a b | c |\n|---|---|\n| 1.5 |  |" in page
    )
    assert "[input](#input)" in page and "machine A, 2026-01-02" in page and "not yet measured" in page
    for machine in ("machine A", "machine B", "machine C"):
        assert page.count(machine) == 2, "in the overview and over its table"
    assert {"benchmarks/cpu_input.svg", "benchmarks/cpu_sweep_small_mlm.svg"} <= pages.keys()
