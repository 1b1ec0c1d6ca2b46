"""A pytest plugin that writes a row of JSON for every test as it ends, so that a killed run keeps its results.

    python -m pytest -p benchmarks.pytest_rows --rows FILE.jsonl [--claims FOLDER] tests/...

Rows: `{"collected": number}`; `{"test", "outcome": "begun", "pid", "at"}`; and `{"test", "outcome": "passed" |
"failed" | "skipped", "seconds", "line", "text"}`. Tests that already have an outcome in the file are left out;
those that started and did not end come last.

Several processes with the same folder of claims share the tests: each takes the next one that no process has
claimed. (xdist does not survive many dying workers: its scheduler by groups fails when two are replaced at the
same time.) After an error that leaves the GPU unusable, such as an illegal access or a capture of a CUDA graph
that failed, the process ends with `LOST`, because every later test in it might fail, too.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import pytest_runtest_protocol

from benchmarks.harness import add_row, require_cuda
from benchmarks.kernel_tests import GROUP, LOST, outcomes

CHARACTERS = 3000


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--rows FILE`, `--claims FOLDER`."""
    parser.addoption("--rows", help="JSON lines, a row for every test")
    parser.addoption("--claims", help="folder by which several processes share the tests")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the plugin if `--rows` is given."""
    if path := config.getoption("--rows"):
        claims = config.getoption("--claims")
        config.pluginmanager.register(Rows(Path(path).absolute(), Path(claims) if claims else None), "rows")


class Rows:
    """Chooses tests and writes their rows."""

    def __init__(self, path: Path, claims: Path | None):
        self.path, self.claims = path, claims
        self.known = outcomes(path)
        self.lost = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leaves out tests that have an outcome."""
        if self._claim("collected"):
            add_row(self.path, {"collected": len(items)})
        states = [(item, self.known.get(item.nodeid, {}).get("outcome")) for item in items]
        config.hook.pytest_deselected(items=[item for item, state in states if state not in (None, "begun")])
        items[:] = [item for item, state in states if state is None]
        items += [item for item, state in states if state == "begun"]

    def pytest_runtest_protocol(self, item: pytest.Item) -> bool:
        """Claims a test, or its whole group (`xdist_group`): a group's tests never run at the same time."""
        group = item.get_closest_marker("xdist_group")
        if (group is None or self._claim(f"{GROUP}{group.args or group.kwargs}")) and self._claim(item.nodeid):
            # Another process may take the next item, so no fixture is kept for it.
            pytest_runtest_protocol(item, None)
        return True

    def _claim(self, name: str) -> bool:
        """Whether this process holds the claim, newly or from before."""
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
        """Writes that a test has started."""
        add_row(self.path, {"test": nodeid, "outcome": "begun", "pid": os.getpid(), "at": time.time()})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Writes one outcome per test: that of its call, or of a failure before or after."""
        if report.when == "call" or not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self._ended(report, report.outcome, crash.message if crash else _reason(report))
        # Checked only after failures, because the check waits for the device.
        self.lost = self.lost or (report.failed and gpu_is_lost())

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Writes a failure for a file that cannot be imported."""
        if report.failed and self._claim(f"import of {report.nodeid}"):
            lines = [line for line in report.longreprtext.split("\n") if line.startswith("E ")]
            self._ended(report, "failed", (lines or [report.longreprtext])[-1])

    def _ended(self, report: Any, outcome: str, line: str) -> None:
        text = report.longreprtext[-CHARACTERS:] if report.failed else ""
        took = round(getattr(report, "duration", 0.0), 2)
        row = {"test": report.nodeid, "outcome": outcome, "seconds": took, "line": first_line(line), "text": text}
        add_row(self.path, row)

    def pytest_runtest_logfinish(self) -> None:
        """Ends the process if the test has lost the GPU; its rows are written by now."""
        if self.lost:
            os._exit(LOST)  # pytest.exit would tear fixtures down, which may wait for the GPU


def gpu_is_lost() -> bool:
    """Whether CUDA was used in this process and no longer works there as before (`harness.require_cuda`)."""
    try:
        require_cuda()
    except Exception:  # AcceleratorError or RuntimeError, depending on the version
        return True
    return False


def first_line(text: str) -> str:
    """The first line of a text, as much as a summary shows."""
    return text.strip().partition("\n")[0][:400]


def _reason(report: pytest.TestReport) -> str:
    """Why a test was skipped, or the text of its error."""
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
