"""A plugin for pytest: a row of JSON for every test as it ends, so that a killed run leaves what it knows.

    python -m pytest -p benchmarks.pytest_rows --rows FILE.jsonl [--claims FOLDER] tests/...

Rows: `{"collected": number}`; `{"test", "outcome": "begun", "pid", "at"}`; and `{"test", "outcome": "passed" |
"failed" | "skipped", "seconds", "line", "text"}`. Tests that have an outcome in the file already are left out;
those that were begun and did not end come last.

Several processes with one folder of claims share the tests: each takes the next that nobody has taken. (xdist
cannot have many workers end: its scheduler by groups fails where two are replaced at a time.) After an error
that leaves the GPU computing nothing more, an illegal access, say, the process ends with `LOST`: every later
test in it would fail, and not by its own fault.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import pytest_runtest_protocol

from benchmarks.harness import add_row
from benchmarks.kernel_tests import GROUP, LOST, outcomes

CHARACTERS = 3000


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--rows FILE`, `--claims FOLDER`."""
    parser.addoption("--rows", help="JSON lines, a row for every test")
    parser.addoption("--claims", help="folder by which several processes share the tests")


def pytest_configure(config: pytest.Config) -> None:
    """Nothing without `--rows`."""
    if path := config.getoption("--rows"):
        claims = config.getoption("--claims")
        config.pluginmanager.register(Rows(Path(path).absolute(), Path(claims) if claims else None), "rows")


class Rows:
    """Chooses tests, and writes what becomes of them."""

    def __init__(self, path: Path, claims: Path | None):
        self.path, self.claims = path, claims
        self.known = outcomes(path)
        self.lost = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leaves out what has an outcome."""
        if self._claim("collected"):
            add_row(self.path, {"collected": len(items)})
        states = [(item, self.known.get(item.nodeid, {}).get("outcome")) for item in items]
        config.hook.pytest_deselected(items=[item for item, state in states if state not in (None, "begun")])
        items[:] = [item for item, state in states if state is None]
        items += [item for item, state in states if state == "begun"]

    def pytest_runtest_protocol(self, item: pytest.Item) -> bool:
        """Tests of one group (`xdist_group`) are one process's, so never run beside each other."""
        group = item.get_closest_marker("xdist_group")
        if (group is None or self._claim(f"{GROUP}{group.args or group.kwargs}")) and self._claim(item.nodeid):
            # The next item may be another process's, so no fixture is kept for it.
            pytest_runtest_protocol(item, None)
        return True

    def _claim(self, name: str) -> bool:
        """Whether it is this process's: nobody's before, or its own."""
        if self.claims is None:
            return True
        prefix = GROUP if name.startswith(GROUP) else ""
        file = self.claims / (prefix + hashlib.sha1(name.encode()).hexdigest())
        try:
            with file.open("x", encoding="utf-8") as claim:
                claim.write(str(os.getpid()))
            return True
        except FileExistsError:
            return file.read_text(encoding="utf-8") == str(os.getpid())

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        add_row(self.path, {"test": nodeid, "outcome": "begun", "pid": os.getpid(), "at": time.time()})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One outcome a test: of its call, or of what went wrong before or after."""
        if report.when == "call" or not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self._ended(report, report.outcome, crash.message if crash else _reason(report))
        # Asked after failures alone: the question waits for the device.
        self.lost = self.lost or (report.failed and gpu_is_lost())

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is a failure of its own."""
        if report.failed and self._claim(f"import of {report.nodeid}"):
            lines = [line for line in report.longreprtext.split("\n") if line.startswith("E ")]
            self._ended(report, "failed", (lines or [report.longreprtext])[-1])

    def _ended(self, report: Any, outcome: str, line: str) -> None:
        text = report.longreprtext[-CHARACTERS:] if report.failed else ""
        took = round(getattr(report, "duration", 0.0), 2)
        row = {"test": report.nodeid, "outcome": outcome, "seconds": took, "line": first_line(line), "text": text}
        add_row(self.path, row)

    def pytest_runtest_logfinish(self) -> None:
        """Its rows are written."""
        if self.lost:
            os._exit(LOST)  # pytest.exit would tear fixtures down, which may wait for the GPU


def gpu_is_lost() -> bool:
    """Whether CUDA was used here and answers no more."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # AcceleratorError, RuntimeError: by version
        return True
    return False


def first_line(text: str) -> str:
    """As much as a summary shows."""
    return text.strip().partition("\n")[0][:400]


def _reason(report: pytest.TestReport) -> str:
    """Why a test was skipped, or what there is of an error."""
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
