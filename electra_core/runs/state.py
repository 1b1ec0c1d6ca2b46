"""Whether a run is running, and how it ended: a lock on RUN/.lock, and RUN/state.json beside the log.

The training process holds the lock, and the operating system releases it when the process ends for any reason. So
"running" is a fact, not a guess from a file's age; a second process on the same folder is refused; and a run
whose state.json says "running" while no process holds the lock was killed. The lock is on a file opened for
writing, not on the folder: on NFS, other machines would not see a folder's lock.

On a file system without locks (Lustre, if it is mounted so) nobody is refused by the kernel. There a run says in a
line that a second one would not be noticed, and refuses to start only beside a process of the same machine that
state.json names and that is alive. A process of another machine may have been killed just before its job was
requeued, so it is named but refuses nothing.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

from electra_core.errors import UserError, first_line
from electra_core.execution import torchrun
from electra_core.files.json_files import read_json
from electra_core.files.new_file import write_new
from electra_core.files.unix import fcntl

log = logging.getLogger("electra_core")
LOCK = ".lock"
RUNNING, FINISHED, STOPPED, FAILED, KILLED = "running", "finished", "stopped", "failed", "killed"


class RunState:
    """The lock on a run's folder during training, and state.json; a context around the training.

    Leaving the context by an exception writes "failed" and its first line; otherwise call `end`.

    Args:
        run: an existing folder.

    Raises:
        UserError: another process trains in it.
    """

    def __init__(self, run: Path):
        self.path = run / "state.json"
        descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        self._release = weakref.finalize(self, os.close, descriptor)
        self._facts: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
        got = _locked(descriptor)
        try:
            if got is False:
                raise UserError(
                    f"{run}: is being trained by {_named(_read(self.path))}; wait for it or stop it"
                    f"{torchrun.hint_about_srun()}"
                )
            if got is None:
                self._do_without(run)
        except UserError:
            self._release()
            raise

    def _do_without(self, run: Path) -> None:
        """Judges by state.json, where there are no locks, whether another process trains.

        Raises:
            UserError: it does, on this machine.
        """
        other, said = _read(self.path), torchrun.hint_about_srun()
        if other.get("state") == RUNNING:
            if other.get("host") != self._facts["host"]:
                said += f"; state.json says that {_named(other)} trains it"
            elif _is_another(other.get("pid")):
                raise UserError(
                    f"{run}: is being trained by {_named(other)}, says its state.json; wait for it or stop it, or "
                    "remove state.json if that process is another program's"
                )
        log.warning("%s: this file system has no locks: a second job here would not be noticed%s", run, said)

    def begin(self, **facts: Any) -> None:
        """Records that the run is running, and further `facts` (JSON values)."""
        self._facts |= facts
        self._write(RUNNING)

    def saved(self, step: int) -> None:
        """Records that a checkpoint of `step` is complete, while the run is running."""
        self.begin(saved=step)

    def end(self, step: int, stopped_by: str | None = None) -> None:
        """Records that the run is finished, or what stopped it."""
        self._facts["step"] = step
        self._write(STOPPED if stopped_by else FINISHED, stopped_by)

    def __enter__(self) -> RunState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                reason = first_line(error) if error is not None and str(error).strip() else ""
                self._write(FAILED, f"{kind.__name__}: {reason}" if reason else kind.__name__)
        except OSError:  # a full disk, most likely; the exception that led here tells more
            pass
        finally:
            self._release()

    def _write(self, state: str, reason: str | None = None) -> None:
        # The time is for people; nothing is computed from it.
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        content = {"state": state, **({"reason": reason} if reason else {}), "written": now, **self._facts}
        write_new(self.path, json.dumps(content, indent=1) + "\n")


def read_state(run: Path) -> dict[str, Any]:
    """The contents of state.json, "state" corrected by the lock: running, finished, stopped, failed or killed.

    Empty for a folder without a state.json in which no process trains.
    """
    content = _read(run / "state.json")
    if not (run / LOCK).is_file():  # so no process holds it
        return content | ({"state": KILLED} if content.get("state") == RUNNING else {})
    try:
        descriptor = os.open(run / LOCK, os.O_RDONLY)
    except OSError:  # somebody else's: rely on the file
        return content
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if content.get("state") == RUNNING:
            content["state"] = KILLED
    except BlockingIOError:
        content["state"] = RUNNING
    except OSError:  # no locks on this file system: rely on the file
        pass
    finally:
        os.close(descriptor)
    return content


def _locked(descriptor: int) -> bool | None:
    """Takes the lock; False if another process has it, None if this file system has none."""
    for attempt in range(20):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:  # `read_state` holds it for a moment, a training process for long
            time.sleep(0.05 * (attempt > 0))
        except OSError:
            return None
    return False


def _is_another(pid: Any) -> bool:
    """Whether another process of this machine has the number."""
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:  # somebody else's
        return True
    except (OSError, OverflowError):
        return False
    return True


def _named(state: dict[str, Any]) -> str:
    return f"process {state.get('pid', '?')} on {state.get('host', '?')}"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
