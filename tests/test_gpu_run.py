"""A GPU that is there for minutes: pretended pieces, a pretended clock, and processes that end."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import gpu_run, gpu_summary
from benchmarks.catalogue import BY_NAME, LEFT_OUT
from benchmarks.gpu_pieces import PIECES, Piece
from benchmarks.gpu_run import Run, run_pieces, start_process
from benchmarks.harness import BEGUN, TIME_UP

ROOT = Path(gpu_run.__file__).parent.parent


class Clock:
    """Seconds that pass when a piece says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def piece(name: str, seconds: int = 10, limit: int = 40, **more: object) -> Piece:
    return Piece(name, f"about {name}", ("{python}", "{out}", "{seconds}"), seconds, limit, **more)  # type: ignore[arg-type]


class Machine:
    """In place of processes: what each piece takes and how it ends, and what was started with how much time."""

    def __init__(self, clock: Clock, **takes: tuple[float, int]):
        self.clock, self.takes = clock, takes
        self.started: list[tuple[str, float]] = []

    def __call__(self, words: list[str], log: Path, seconds: float) -> int | None:
        name = log.stem
        self.started.append((name, seconds))
        took, status = self.takes[name]
        log.write_text(f"{name} printed this\n")
        self.clock.now += min(took, seconds)
        if took > seconds:
            return None
        if status == 0:
            Path(words[1]).write_text("{}")
        return status


def spend(folder: Path, seconds: float, pieces: Sequence[Piece], **takes: tuple[float, int]) -> Machine:
    clock = Clock()
    machine = Machine(clock, **takes)
    run_pieces(Run(folder, seconds, pieces=pieces, clock=clock), machine)
    return machine


def states(folder: Path) -> dict[str, str]:
    found = json.loads((folder / "summary.json").read_text())["pieces"]
    return {name: row["state"] for name, row in found.items()}


def test_the_budget_is_spent_in_order_and_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    pieces = [piece("a"), piece("b", seconds=60, limit=60), piece("c", limit=20), piece("d", seconds=1)]
    machine = spend(tmp_path, 56, pieces, a=(15, 0), c=(99, 0), d=(99, 0))
    assert machine.started == [("a", 40.0), ("c", 20.0), ("d", 15.0)], "its own limit, and never more than is left"
    assert states(tmp_path) == {"a": "done", "b": "left out", "c": "stopped", "d": "stopped"}
    page = (tmp_path / "summary.md").read_text()
    assert "| b | left out: takes about 60 s, 35 s were left |" in page and "c printed this" in page


def test_called_again_it_goes_on_and_tries_last_what_failed(tmp_path: Path) -> None:
    pieces = [piece("good"), piece("bad"), piece("slow"), piece("rows", resumes=True), piece("late")]
    takes = {"good": (1, 0), "bad": (1, 7), "slow": (99, 0), "rows": (99, 0)}
    spend(tmp_path, 95, pieces, **takes)
    assert states(tmp_path) == {
        "good": "done", "bad": "failed", "slow": "stopped", "rows": "stopped", "late": "left out"
    }  # fmt: skip
    again = spend(tmp_path, 100, pieces, bad=(1, 0), slow=(1, 0), rows=(1, 0), late=(1, 0))
    assert [name for name, _ in again.started] == ["rows", "late", "bad", "slow"]
    assert set(states(tmp_path).values()) == {"done"}
    assert "Nothing: every piece that can run has run." in (tmp_path / "summary.md").read_text()
    assert not spend(tmp_path, 100, pieces).started


@pytest.mark.parametrize(
    ("status", "judges", "new", "resumes", "state"),
    [
        (0, False, False, False, "done"),
        (1, True, False, True, "faults"),  # kernels that are wrong, tests that fail
        (1, False, True, False, "faults"),  # a result, with contenders that computed something else
        (1, False, False, False, "failed"),
        (1, False, True, True, "failed"),  # rows of a sweep that ended early
        (3, True, True, True, "failed"),  # tests of which not all were run
        (-9, True, True, False, "failed"),
        (None, True, True, True, "stopped"),
        (TIME_UP, True, True, True, "stopped"),  # by its own time limit
    ],
)
def test_what_an_exit_status_means(status: int | None, judges: bool, new: bool, resumes: bool, state: str) -> None:
    assert gpu_run.outcome(piece("it", judges=judges, resumes=resumes), status, new) == state


def test_what_was_running_when_the_machine_went_is_begun_again(tmp_path: Path) -> None:
    def gone(*_: object) -> int:
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["pieces"]["a"]["state"] == "running", "known before it ends"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pieces(Run(tmp_path, 60, pieces=[piece("a")]), gone)
    machine = spend(tmp_path, 60, [piece("a")], a=(1, 0))
    assert machine.started and states(tmp_path) == {"a": "done"}


def test_what_a_piece_has_found_is_kept_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may go at any moment, and with it all but the archive."""
    archive, checks, threads = tmp_path / "all.tar.gz", piece("checks", suffix=".jsonl"), threading.active_count()
    monkeypatch.setattr(gpu_run, "KEEP_SECONDS", 0.05)
    row = {"kernel": "attention", "dtype": "bfloat16", "problem": "off by 1", "error": "", "seconds": 1.0}

    def packed() -> dict[str, str]:
        with tarfile.open(archive) as files:
            found = {name: files.extractfile(name) for name in files.getnames()}
            return {name: file.read().decode() for name, file in found.items() if file is not None}

    def runs(words: list[str], *_: object) -> int:
        Path(words[1]).write_text(json.dumps(row) + "\n")
        (tmp_path / "here" / "facts.json.new").write_text("half of it")
        began = time.monotonic()
        while "checks.jsonl" not in packed() or "WRONG attention" not in packed()["summary.md"]:
            assert time.monotonic() - began < 30
            time.sleep(0.05)
        return 0

    run_pieces(Run(tmp_path / "here", 60, archive, [checks]), runs)
    assert "facts.json.new" not in packed() and states(tmp_path / "here") == {"checks": "done"}
    assert threading.active_count() == threads


@pytest.fixture
def heeded_sighup() -> Iterator[None]:
    """Under nohup it is ignored, which is what its user wants."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeded_sighup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_who_is_asked_to_end_leaves_a_summary_and_no_process(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGHUP: the terminal has gone."""
    words = ("{python}", "-c", f"import os, time; os.kill({os.getpid()}, {int(number)}); time.sleep(60)")
    monkeypatch.setattr(gpu_run, "Run", partial(Run, pieces=[Piece("it", "about it", words, 1, 50)]))
    with pytest.raises(SystemExit, match="to continue, repeat the command"):
        gpu_run.main(1, tmp_path, None)
    assert states(tmp_path) == {"it": "stopped"} and signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.usefixtures("heeded_sighup")
def test_a_second_signal_leaves_no_process_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that is closed sends SIGTERM and SIGHUP, and the piece may ignore the first."""
    monkeypatch.setattr(gpu_run, "GRACE", 1.0)
    text = f"""if True:
        import os, signal, time
        from pathlib import Path
        signal.signal(signal.SIGTERM, lambda *_: os.kill({os.getpid()}, signal.SIGHUP))
        Path({str(tmp_path / "child")!r}).write_text(str(os.getpid()))
        os.kill({os.getpid()}, signal.SIGTERM)
        while True:
            time.sleep(0.05)
    """
    script = tmp_path / "piece.py"
    script.write_text(text)
    pieces = [Piece("it", "about it", ("{python}", str(script)), 1, 50)]
    monkeypatch.setattr(gpu_run, "Run", partial(Run, pieces=pieces))
    with pytest.raises(SystemExit, match="to continue, repeat the command"):
        gpu_run.main(1, tmp_path / "here", None)
    began = time.monotonic()
    while alive(int((tmp_path / "child").read_text())):
        assert time.monotonic() - began < 10
        time.sleep(0.05)
    assert states(tmp_path / "here") == {"it": "stopped"}


def test_a_program_that_is_not_installed_is_said(tmp_path: Path) -> None:
    assert not spend(tmp_path, 60, [piece("a", needs="no-such-program")]).started
    assert "no-such-program is not installed" in (tmp_path / "summary.md").read_text()


def test_another_machine_goes_on_from_the_archive(tmp_path: Path) -> None:
    here, archive = tmp_path / "here", tmp_path / "kept" / "all.tar.gz"
    clock = Clock()
    pieces = [piece("a"), piece("b")]
    run_pieces(Run(here, 60, archive, pieces, clock), Machine(clock, a=(1, 0), b=(99, 0)))
    with tarfile.open(archive) as packed:
        assert set(packed.getnames()) == {"a.json", "a.log", "b.log", "summary.json", "summary.md"}
    shutil.rmtree(here)
    machine = Machine(clock, b=(1, 0))
    run_pieces(Run(here, 60, archive, pieces, clock), machine)
    assert [name for name, _ in machine.started] == ["b"] and (here / "a.json").exists()


def test_an_archive_in_the_folder_does_not_hold_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would grow with every summary."""
    monkeypatch.chdir(tmp_path)
    run, clock = partial(Run, Path("here"), 60, Path("here/all.tar.gz"), [piece("a"), piece("b")]), Clock()
    run_pieces(run(clock), Machine(clock, a=(1, 0), b=(1, 0)))
    with tarfile.open(tmp_path / "here" / "all.tar.gz") as packed:
        assert set(packed.getnames()) == {"a.json", "a.log", "b.json", "b.log", "summary.json", "summary.md"}
    assert "--archive here/all.tar.gz" in run(clock).command


# ---- processes -----------------------------------------------------------------------------------------------


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


@pytest.mark.parametrize(
    ("text", "status"),
    [("print('hello')", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)],
    ids=["fast", "failing", "killed"],
)
def test_a_process_and_its_log(text: str, status: int, tmp_path: Path) -> None:
    log = tmp_path / "it.log"
    assert start_process(python(text), log, 60) == status
    assert log.read_text().startswith("$ ") and ("hello" in log.read_text().split("\n")) == (status == 0)


def test_a_hanging_process_ends_with_all_it_started_though_it_ignores_the_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_run, "GRACE", 0.5)
    child = tmp_path / "child"
    text = f"trap '' TERM; sleep 60 & echo $! > {child}; echo began; sleep 60"
    began = time.monotonic()
    assert start_process(["sh", "-c", text], tmp_path / "it.log", 3) is None
    assert time.monotonic() - began < 30 and "began" in (tmp_path / "it.log").read_text()
    while alive(int(child.read_text())):  # a process that was killed may need a moment to go
        assert time.monotonic() - began < 30
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """A process that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_nothing_asks_a_network(tmp_path: Path) -> None:
    text = "import os; print(os.environ['HF_HUB_OFFLINE'], os.environ['TRITON_INTERPRET'])"
    start_process(python(text), tmp_path / "it.log", 60)
    assert "1 0" in (tmp_path / "it.log").read_text().split("\n")


# ---- the pieces ----------------------------------------------------------------------------------------------


class Parsed(Exception):
    """The command line is right; nothing more is done with it."""


def parse(self: argparse.ArgumentParser, words: list[str] | None = None) -> argparse.Namespace:
    found, unknown = self.parse_known_args(words)
    assert not unknown
    raise Parsed(found)


def test_pieces_are_programs_that_take_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong word would be found on the GPU, and cost it: every command line is parsed by its program."""
    assert len({piece.name for piece in PIECES}) == len(PIECES)
    assert all(piece.seconds <= piece.limit for piece in PIECES)
    for each in PIECES:
        words = each.command("FOLDER", 50)
        if words[1:2] != ["-m"]:
            assert (ROOT / words[-1]).is_file()
            continue
        monkeypatch.setattr(sys, "argv", words[2:])
        with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse)
            importlib.import_module(words[2]).main()
        assert f"FOLDER/{each.result}" in map(str, vars(parsed.value.args[0]).values())


def test_the_most_telling_comes_first() -> None:
    """What is wrong with the kernels, and how fast a step is: should the machine go after minutes."""
    assert [piece.name for piece in PIECES[:4]] == ["facts", "checks", "pretrain_small_bf16", "tests"]


def test_the_catalogue_is_whole() -> None:
    """Everything that has something to do on a GPU, but for what needs a corpus."""
    modules = {piece.words[2] for piece in PIECES}
    assert {b.module for b in BY_NAME.values() if b.gpu is not None and not b.needs_corpus} <= modules


@pytest.mark.parametrize("target", ["bench-kernels", "tune", "bench-gpu", "test-gpu"])
def test_without_an_environment_make_takes_the_python_at_hand(target: str, tmp_path: Path) -> None:
    """A stand-in for it, since make starts recipes that call make even where it is only to print them."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/words\n')
    python.chmod(0o755)
    words = ["make", target, "VENV=", f"PYTHON={python}", "MINUTES=9"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    started = (tmp_path / "words").read_text()
    assert done.returncode == 0 and ".venv" not in done.stdout + done.stderr + started
    expected = {"test-gpu": "--dist loadgroup -n", "bench-gpu": "gpu --minutes 9 --out build/gpu"}
    assert expected.get(target, "-m benchmarks.") in started


@pytest.mark.parametrize("words", [["attention", "--minutes", "9"], ["gpu", "--minutes", "0"]])
def test_minutes_are_the_gpus(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="--minutes: expected with gpu alone"):
        command.main(words)


@pytest.mark.skipif("CUDA_VISIBLE_DEVICES" in os.environ, reason="there may be a GPU")
def test_without_a_gpu_it_says_so() -> None:
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="expected a CUDA device"):
            command.main(["gpu", "--minutes", "9"])


# ---- the page ------------------------------------------------------------------------------------------------

SPREAD = {"median": 2.0, "low": 1.0, "high": 3.0}
TIMING = {"milliseconds": 2.0}
RESULTS: dict[str, tuple[object, str]] = {
    "comparisons": (
        {"comparisons": [{"figure": "electra", "unit": "tokens/s", "peer": "p", "ours": SPREAD, "ratio": SPREAD}]},
        "electra: 2 tokens/s, 2.00 times as fast as p",
    ),
    "kernels": (
        {
            "results": [
                {"case": "c", "contender": "ours", "timing": TIMING, "of_ceiling": 0.5, "note": ""},
                {
                    "case": "c",
                    "contender": "eager",
                    "timing": {"milliseconds": 5.0},
                    "of_ceiling": 0.1,
                    "note": "",
                },
                {"case": "c", "contender": "flash", "timing": None, "of_ceiling": None, "note": "cannot run: it"},
                {"case": "c", "contender": "twin", "timing": None, "of_ceiling": None, "note": f"{LEFT_OUT} slow"},
            ]
        },
        "c: 2.000 ms, 2.50 times as fast as eager, 50% of the ceiling|c, flash: cannot run: it",
    ),
    "tiles": (
        {"results": [{"sweep": "s", "tile": 1, "ms": 2.0, "note": ""}, {"sweep": "s", "tile": 4, "ms": 1.0}]},
        "s: best tile 4, 1.0000 ms; first tile 1, 2.0000 ms",
    ),
    "finetuning": (
        {"results": {"sst2 train": {"ways": {"ours": {"tokens_per_second": 3}}, "speedups": {"hub": 2.0}}}},
        "sst2 train: 3 tokens/s, 2.00 times as fast as hub",
    ),
    "stages": ({"stages": {"backward": {"milliseconds": 3.5}}}, "backward: 3.5 ms"),
    "strange": ({"comparisons": [{}]}, "strange.json cannot be read: KeyError: 'figure'"),
    "unknown": ({"x": 1}, ""),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_in_lines(name: str, tmp_path: Path) -> None:
    found, lines = RESULTS[name]
    (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert "|".join(gpu_summary.digest(tmp_path, piece(name))) == lines


def test_results_of_a_benchmark_that_was_stopped_are_shown(tmp_path: Path) -> None:
    found, lines = RESULTS["kernels"]
    (tmp_path / "it.part").write_text(json.dumps(found))
    assert "|".join(gpu_summary.digest(tmp_path, piece("it"))) == lines


def test_checks_and_tests_in_lines_though_the_last_row_is_cut_off(tmp_path: Path) -> None:
    checks = [
        {"kernel": "a", "dtype": "bfloat16", "problem": "begun", "error": "", "seconds": None},
        {"kernel": "a", "dtype": "bfloat16", "problem": None, "error": "", "seconds": 2.5},
        {"kernel": "b", "dtype": "float32", "problem": "result 0 is off", "error": "", "seconds": 1.0},
        {"kernel": "d", "dtype": "float32", "problem": BEGUN, "error": "", "seconds": None},
    ]
    rows = "".join(json.dumps(row) + "\n" for row in checks)
    (tmp_path / "checks.jsonl").write_text(rows + '{"kernel": "c", "dty')
    first, *others = gpu_summary.digest(tmp_path, piece("checks", suffix=".jsonl"))
    assert first.startswith("1 of the 3 begun are right; slowest first call: a, 2.5 s")
    assert others == ["WRONG b, float32: result 0 is off", f"NO ANSWER d, float32: {BEGUN}"]
    tests = [{"collected": 3}, {"test": "x::a", "outcome": "begun"}, {"test": "x::a", "outcome": "passed"}]
    tests += [{"test": f"x::{n}", "outcome": "failed", "line": "assert 0"} for n in range(20)]
    (tmp_path / "tests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tests))
    lines = gpu_summary.digest(tmp_path, piece("tests", suffix=".jsonl"))
    assert lines[:2] == ["1 passed, 20 failed, 0 skipped, of 3 tests", "x::0: assert 0"]
    assert lines[-1] == "and 8 more"


def test_a_run_without_graphs_or_kernels_is_told_though_it_succeeded(tmp_path: Path) -> None:
    """Its figures look like any others. That the program says so in these words: test_engine.py."""
    line = "engine='graph': a step cannot be captured (it); launching its kernels one by one instead"
    (tmp_path / "it.log").write_text(f"begins\n{line}\n{line}\nUserWarning: use that instead\n")
    gpu_summary.write(tmp_path, {"it": {"state": "done"}}, [piece("it")], "type this")
    page = (tmp_path / "summary.md").read_text()
    assert page.count(f"NOTE {line}\n") == 1 and "use that" not in page


def test_the_machine_stands_on_the_page(tmp_path: Path) -> None:
    facts = {
        "environment": {
            "device": "a GPU", "versions": {"torch": "2"}, "commit": "abc",
        },
        "clocks_under_load": {"clocks.sm": "1980 MHz", "driver_version": "580"},
        "ceilings": {"bytes_per_second": 4.3e12, "operations_per_second": 7.9e14}, "kernels": {"triton": "yes"},
    }  # fmt: skip
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    gpu_summary.write(tmp_path, {"facts": {"state": "done", "seconds": 9.0}}, [piece("facts")], "type this")
    page = (tmp_path / "summary.md").read_text()
    assert "a GPU, 1980 MHz under load, driver 580; torch 2; commit abc. A large copy reaches 4.30 TB/s" in page
    (tmp_path / "facts.json").write_text('{"environment": "RuntimeError: it"}')
    gpu_summary.write(tmp_path, {}, [replace(piece("facts"), limit=99)], "type this")
    page = (tmp_path / "summary.md").read_text()
    assert "The machine is unknown." in page and "    type this" in page
