"""Tests run for their rows: whatever ends a process, or keeps it from ending, hides no other test."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import harness, kernel_tests
from benchmarks.harness import add_row, whole_rows
from benchmarks.kernel_tests import NOT_ALL, collected, outcomes, run_all, show, status

SUITE = """
import os, time, pytest

@pytest.mark.parametrize("i", range(4))
def test_right(i): assert os.environ["OMP_NUM_THREADS"] == "1"

def test_wrong(): assert 1 == 2, "first line\\nsecond"

def test_skipped(): pytest.skip("why")

@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("i", ["a@b", "crash", "c"])
def test_of_a_group(i):
    with open("group", "a") as file: file.write(f"{os.getpid()} ")
    if i == "crash": os.kill(os.getpid(), 11)

def test_crash(): os.kill(os.getpid(), 11)

def test_end(): os._exit(0)

def test_hang(): time.sleep(60)

def test_lost(monkeypatch):
    import benchmarks.pytest_rows as rows
    rows.gpu_is_lost = lambda: True
    assert 0, "an illegal access"

@pytest.fixture
def broken(): raise RuntimeError("in a fixture")

def test_broken(broken): pass

@pytest.mark.parametrize("i", range(6))
class TestOfAClass:
    def test_it(self, i): time.sleep(0.05)
"""
OTHER_FILE = """
import time, pytest

@pytest.fixture(scope="module")
def kept(): yield 1

@pytest.mark.parametrize("i", range(6))
def test_of_another_file(i, kept): time.sleep(0.05)
"""
LINES = {
    "test_wrong": "AssertionError: first line",
    "test_crash": "the process ended in it, with status -11",
    "test_end": "the process ended in it, with status 0",
    "test_of_a_group[crash]": "the process ended in it, with status -11",
    "test_hang": "the process ended in it, with status -9",
    "test_lost": "AssertionError: an illegal access",
    "test_broken": "RuntimeError: in a fixture",
}


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with tests, which is the project's for the while."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(SUITE)
    (tmp_path / "tests" / "test_more.py").write_text(OTHER_FILE)
    (tmp_path / "tests" / "test_not_importable.py").write_text("import no_such_module\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    xdist_group(name): together\n")
    monkeypatch.setenv("PYTHONPATH", str(Path(kernel_tests.__file__).parent.parent))
    monkeypatch.setattr(kernel_tests, "ROOT", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    yield tmp_path


def test_every_test_has_an_outcome_whatever_the_others_do(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_tests, "TEST_SECONDS", 8.0)
    rows = suite / "rows.jsonl"
    run_all(rows, ["tests"], 2, ["-q"])
    found = {name.rpartition("::")[2]: row for name, row in outcomes(rows).items()}
    assert [found[f"test_right[{i}]"]["outcome"] for i in range(4)] == ["passed"] * 4
    assert found["test_skipped"]["outcome"] == "skipped" and "why" in found["test_skipped"]["line"]
    for name, line in LINES.items():
        assert found[name]["outcome"] == "failed" and found[name]["line"].startswith(line), found[name]
    assert "no_such_module" in found["tests/test_not_importable.py"]["line"]
    group = (suite / "group").read_text().split()
    assert group[0] == group[1] != group[2], "a group is one process's, and behind its end another's"
    begun = [row["test"] for row in whole_rows(rows) if row.get("outcome") == "begun"]
    assert len(begun) == len(set(begun)) == collected(rows) == 26, "each once, though processes began anew"
    assert status(rows) == 1 and "18 passed, 8 failed, 1 skipped" in show(rows)
    run_all(rows, ["tests"], 1, ["-q"])
    assert sum(row.get("outcome") == "begun" for row in whole_rows(rows)) == 26, "nothing is run again"


def test_what_was_begun_and_did_not_end_comes_last(suite: Path) -> None:
    for name in ("not_importable", "more"):
        (suite / "tests" / f"test_{name}.py").unlink()
    (suite / "tests" / "test_it.py").write_text("def test_a(): pass\ndef test_b(): pass\ndef test_c(): pass\n")
    rows = suite / "rows.jsonl"
    names = [f"tests/test_it.py::test_{letter}" for letter in "abc"]
    add_row(rows, {"collected": 3})
    add_row(rows, {"test": names[0], "outcome": "begun", "pid": 1, "at": 0.0})
    add_row(rows, {"test": names[1], "outcome": "passed", "seconds": 0.0, "line": "", "text": ""})
    with rows.open("a") as file:
        file.write('{"test": "cut off')  # the machine was gone
    assert status(rows) == NOT_ALL
    with rows.open("a") as file:
        file.write("\n")
    run_all(rows, ["tests"], 1, ["-q"])
    passed = [row["test"] for row in whole_rows(rows) if row.get("outcome") == "passed"]
    assert passed == [names[1], names[2], names[0]] and status(rows) == 0


def test_a_pytest_that_does_not_start_ends(suite: Path) -> None:
    run_all(suite / "rows.jsonl", ["tests/no_such_file.py"], 1, ["-q"])
    assert status(suite / "rows.jsonl") == NOT_ALL


def test_it_runs_the_files_of_the_makefile() -> None:
    root = Path(__file__).parent.parent
    makefile = (root / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(line for line in makefile.split("\n") if line.startswith("KERNEL_TESTS"))
    words = line.partition("suffix .py,")[2].rstrip(")").split()
    assert {*words, "attention_gpu"} == {*kernel_tests.KERNELS, "compile_report"}
    marked = {path.stem.removeprefix("test_") for path in (root / "tests").glob("test_*.py") if marks_gpu(path)}
    assert marked - set(kernel_tests.KERNELS) == set(kernel_tests.OTHERS)


def marks_gpu(path: Path) -> bool:
    return "\n@pytest.mark.gpu\n" in path.read_text(encoding="utf-8")


def test_rows_are_written_in_one_piece(tmp_path: Path) -> None:
    add_row(tmp_path / "rows", {"text": "x" * 100_000})
    assert json.loads((tmp_path / "rows").read_text())["text"]


def test_without_pytest_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel_tests.importlib.util, "find_spec", lambda _: None)
    assert kernel_tests.main(["--out", str(tmp_path / "rows.jsonl")]) == NOT_ALL
    assert "pytest is not installed" in capsys.readouterr().out
    source = Path(kernel_tests.__file__).read_text(encoding="utf-8")
    assert "import pytest" not in source and "pytest_rows import" not in source


@pytest.mark.parametrize(("mode", "most"), [("Default", 16), ("Exclusive_Process", 1), (None, 16)])
def test_how_many_processes_share_a_gpu(mode: str | None, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def smi(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        if mode is None:
            raise FileNotFoundError("nvidia-smi")
        return subprocess.CompletedProcess([], 0, stdout=mode + "\n")

    monkeypatch.setattr(harness.subprocess, "run", smi)
    monkeypatch.setattr(harness.os, "cpu_count", lambda: 64)
    assert harness.processes() == most
