"""A process that is killed at work, and what lies in a folder afterwards."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_child(work: Any) -> None:
    """Run `work` in a forked process that SIGKILL ends at its end."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
