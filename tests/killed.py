"""Processes that are waited for or killed at work, and what lies in a folder afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file at any depth, by its path in the folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def wait_until(ready: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def wait_for(flag: Path, process: subprocess.Popen[Any]) -> None:
    """Until there is the file, or the process has ended."""
    wait_until(lambda: flag.exists() or process.poll() is not None, 240)


def forked(work: Callable[[], object]) -> int:
    """How a forked process ends that does `work`: 0, 1 if it raises, or less than 0 by a signal."""
    pid, status = os.fork(), 1
    if pid == 0:
        try:
            work()
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_child(work: Callable[[], object]) -> None:
    """Run `work` in a forked process that SIGKILL ends at its end."""

    def killed() -> None:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(killed) == -signal.SIGKILL
