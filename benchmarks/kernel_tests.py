"""Runs the tests that need a GPU, the most informative first, one process per core; a row for each test.

    python -m benchmarks.kernel_tests --out FILE.jsonl [--others] [--jobs 16] [-- MORE FOR PYTEST]

This is `make test-gpu` for a machine that may be gone in minutes. It needs pytest and no plugin, survives tests
that crash or hang, and, called again, continues with the tests that have no outcome (`benchmarks/pytest_rows.py`).
`--others` runs the tests that need a GPU in files that are not about kernels. Exit status 0: all passed; 1: some
failed; 3: not all were run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import ONE_THREAD, add_row, processes, whole_rows

ROOT = Path(__file__).parent.parent
KERNELS = (
    "every_kernel", "attention_gpu", "attention", "mlm_head", "layer_norm", "sample_replace", "rtd_loss",
    "bias_gelu", "embedding_layer_norm", "attention_contract", "rng",
)  # fmt: skip
"""Files of `make test-gpu`, except the one that compiles without a GPU."""
OTHERS = ("engine", "training", "optim", "finetune")
"""Other files with tests marked `gpu`."""
TEST_SECONDS = 120.0
"""Seconds after which a test counts as hanging."""
NOT_ALL = 3
GROUP = "group-"
"""Prefix of the names of groups' claims."""
LOST = 17
"""Exit status of a process whose GPU is lost."""


ALONE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **ONE_THREAD}
"""No plugins that happen to be installed, and one thread for each process."""


def command(out: Path, claims: Path, paths: Sequence[str], extra: Sequence[str] = ()) -> list[str]:
    """The command line of pytest."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.pytest_rows", "--rows", str(out),
             "--claims", str(claims), "-p", "no:cacheprovider",
             "--continue-on-collection-errors", "--tb=short"]  # fmt: skip
    return [*words, *extra, *paths]


def outcomes(path: Path) -> dict[str, dict[str, Any]]:
    """Test -> its row with the outcome; for a test that started and did not end, its "begun" row."""
    found: dict[str, dict[str, Any]] = {}
    for row in whole_rows(path):
        if "test" in row and (row["outcome"] != "begun" or found.get(row["test"], row)["outcome"] == "begun"):
            found[row["test"]] = row
    return found


def collected(path: Path) -> int:
    """The number of tests, without those in files that cannot be imported."""
    return max((row["collected"] for row in whole_rows(path) if "collected" in row), default=0)


def run(words: list[str], out: Path, claims: Path) -> None:
    """Runs pytest until no test is left, restarting it after a test that lost the GPU, crashed or hung."""
    while True:
        since, process = time.time(), subprocess.Popen(words, cwd=ROOT, env=os.environ | ALONE)
        while (status := process.poll()) is None:
            time.sleep(0.5)
            if time.time() - min(_begun_by(out, process.pid, since).values(), default=time.time()) > TEST_SECONDS:
                process.kill()
        for claim in claims.glob(f"{GROUP}*"):
            if claim.read_text(encoding="utf-8") == str(process.pid):
                claim.unlink()  # any process may take the rest of the group
        crashed = _begun_by(out, process.pid, since)
        for name in crashed:
            line = f"the process ended in it, with status {status} (-9: it took more than {TEST_SECONDS:.0f} s)"
            add_row(out, {"test": name, "outcome": "failed", "seconds": None, "line": line, "text": ""})
        if not crashed and status != LOST:  # all tests are taken, or pytest cannot start
            return


def _begun_by(out: Path, pid: int, since: float) -> dict[str, float]:
    """Test -> the time at which it started, for tests that have not ended."""
    begun = {name: row for name, row in outcomes(out).items() if row["outcome"] == "begun"}
    return {name: row["at"] for name, row in begun.items() if row["pid"] == pid and row["at"] >= since}


def run_all(out: Path, paths: Sequence[str], jobs: int, extra: Sequence[str]) -> None:
    """Runs the tests that have no outcome in `jobs` processes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="claims-") as claims, ThreadPoolExecutor(jobs) as pool:
        words = command(out, Path(claims), paths, extra)
        list(pool.map(lambda _: run(words, out, Path(claims)), range(jobs)))


def show(out: Path) -> str:
    """Counts, and a line for each test that failed."""
    rows = outcomes(out).values()
    counts = {
        name: sum(row["outcome"] == name for row in rows) for name in ("passed", "failed", "skipped", "begun")
    }
    failed = [f"{row['test']}: {row['line']}" for row in rows if row["outcome"] == "failed"]
    counted = ", ".join(f"{count} {name}" for name, count in counts.items())
    return "\n".join([f"{counted}, of {collected(out)}", *failed])


def status(out: Path) -> int:
    """The exit status that the rows imply."""
    found = {name: row["outcome"] for name, row in outcomes(out).items()}
    ended = [name for name, outcome in found.items() if outcome != "begun" and "::" in name]  # others are files
    if not ended or len(ended) < collected(out):
        return NOT_ALL
    return int("failed" in found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests that have no outcome."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--others", action="store_true")
    parser.add_argument("--jobs", type=int, default=0, help="processes (default: as the GPU and the cores take)")
    parser.add_argument("pytest", nargs="*", help="more for pytest, after --")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed: no tests")
        return NOT_ALL
    paths = [f"tests/test_{name}.py" for name in (OTHERS if options.others else KERNELS)]
    extra = [*(["-m", "gpu"] if options.others else []), *options.pytest]
    run_all(options.out.absolute(), paths, options.jobs or processes(), extra)
    print(show(options.out))
    return status(options.out)


if __name__ == "__main__":
    sys.exit(main())
