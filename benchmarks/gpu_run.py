"""Uses a GPU that is available for minutes only: the most valuable pieces first, and nothing is lost when it goes.

    python -m benchmarks gpu --minutes 9 --out FOLDER [--archive FILE.tar.gz]

Runs `gpu_pieces.PIECES` in order, each as a process with its own time limit, which never exceeds the time left. A
piece that does not fit is left out, and the summary says so. The same command with the same folder continues:
first with pieces that were never started or were stopped early, last with those that failed. At any moment the
folder holds `summary.md` (what ran, what is wrong, what is left, what to type next), the same as `summary.json`,
and a result and a log for each piece, at most `KEEP_SECONDS` old. `--archive` also keeps the folder as a single
file, rewritten as often; if the archive exists and the folder does not (on another machine, say), it is unpacked
first.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import gpu_summary
from benchmarks.gpu_pieces import PIECES, Piece
from benchmarks.harness import BEING_WRITTEN, TIME_UP

ROOT = Path(__file__).parent.parent
RESERVE = 6.0
"""Seconds kept for the end: stopping a piece's processes, the summary, the archive."""
KEEP_SECONDS = 15.0
"""Seconds between two summaries (and archives) while a piece runs: the machine may go in the middle of it."""
GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL."""
SETTLED = ("done", "faults")
"""States of pieces that are not run again."""
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0",
}  # fmt: skip
"""No program uses the network, where a request may hang, and output is unbuffered, so that none is lost."""

Start = Callable[[list[str], Path, float], int | None]
"""(command, log, seconds) -> exit status, or None if the time limit stopped it."""


@dataclass
class Run:
    """A folder, the state of each piece in it, and the seconds available."""

    folder: Path
    seconds: float
    archive: Path | None = None
    pieces: Sequence[Piece] = PIECES
    clock: Callable[[], float] = time.monotonic
    states: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = self.clock()
        self.command = f"python3 -m benchmarks gpu --minutes {self.seconds / 60:g} --out {self.folder}"
        self.command += f" --archive {self.archive}" if self.archive else ""
        if self.archive and self.archive.exists() and not self.folder.exists():
            _unpack(self.archive, self.folder)
        self.folder = self.folder.absolute()  # pieces run in the project's folder
        self.archive = self.archive and self.archive.absolute()  # in the folder it is not packed into itself
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "summary.json"
        if path.exists():
            self.states = json.loads(path.read_text(encoding="utf-8"))["pieces"]
        for state in self.states.values():
            if state["state"] == "running":  # the machine disappeared, or this command was killed
                state["state"] = "stopped"

    @property
    def left(self) -> float:
        """Seconds left for pieces."""
        return self.seconds - RESERVE - (self.clock() - self.started)

    def state(self, piece: Piece) -> str:
        """A piece's state; "" if it was never started."""
        return str(self.states.get(piece.name, {}).get("state", ""))

    def keep(self) -> None:
        """Writes the summary and the archive."""
        gpu_summary.write(self.folder, self.states, self.pieces, self.command)
        if self.archive:
            _pack(self.folder, self.archive)


def run_pieces(run: Run, start: Start) -> None:
    """Runs every piece that is not settled and fits into the time left."""
    for piece in in_order(run):
        if piece.needs and shutil.which(piece.needs) is None:
            run.states[piece.name] = {"state": "absent", "why": f"{piece.needs} is not installed"}
        elif run.left < piece.seconds:
            if run.state(piece) in ("", "left out"):
                why = f"takes about {piece.seconds} s, {max(0, run.left):.0f} s were left"
                run.states[piece.name] = {"state": "left out", "why": why}
        else:
            run_piece(run, piece, start)
    run.keep()


def in_order(run: Run) -> list[Piece]:
    """Pieces that are not settled, by value; last those that failed, or would restart and be stopped again."""
    left = [piece for piece in run.pieces if run.state(piece) not in SETTLED]

    def tried(piece: Piece) -> bool:
        return run.state(piece) == "failed" or (run.state(piece) == "stopped" and not piece.resumes)

    return sorted(left, key=tried)


def run_piece(run: Run, piece: Piece, start: Start) -> None:
    """Runs one piece and records its state."""
    limit, log = min(float(piece.limit), run.left), run.folder / f"{piece.name}.log"
    before = _changed(run.folder / piece.result)
    took = run.states.get(piece.name, {}).get("seconds", 0.0)
    run.states[piece.name] = {"state": "running", "seconds": took}
    run.keep()
    print(f"[{run.clock() - run.started:4.0f} s] {piece.name}: {piece.about}, {limit:.0f} s at most", flush=True)
    began = run.clock()
    with _keeping(run):
        status = start(piece.command(str(run.folder), limit), log, limit)
    took += run.clock() - began
    new = _changed(run.folder / piece.result) != before
    run.states[piece.name] = {"state": outcome(piece, status, new), "seconds": round(took, 1), "status": status}
    run.keep()
    found = gpu_summary.digest(run.folder, piece)
    print(
        f"[{run.clock() - run.started:4.0f} s] {piece.name}: {run.state(piece)}",
        *found[:3],
        sep="\n    ",
        flush=True,
    )


@contextmanager
def _keeping(run: Run) -> Iterator[None]:
    """Inside, a thread writes the summary and the archive every `KEEP_SECONDS`."""
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(KEEP_SECONDS):
            with suppress(OSError):  # a file that the piece is just replacing; the next time it is there
                run.keep()

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def outcome(piece: Piece, status: int | None, new: bool) -> str:
    """The state that an exit status stands for.

    Returns:
        "done"; "faults": it finished and found something wrong; "stopped" by a time limit; "failed".
    """
    if status in (None, TIME_UP):
        return "stopped"
    if status == 0:
        return "done"
    return "faults" if status == 1 and (piece.judges or (new and not piece.resumes)) else "failed"


def start_process(command: list[str], log: Path, seconds: float) -> int | None:
    """Runs a command in its own process group, which is ended as a whole, and appends its output to the log."""
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=os.environ | OFFLINE, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            output.write(f"ended after {seconds:.0f} s\n".encode())
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it has started."""
    for number, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(wait if number == signal.SIGKILL or process.poll() is None else 0.1)
        except subprocess.TimeoutExpired:
            continue


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _pack(folder: Path, archive: Path) -> None:
    """Writes the folder's files to one archive, without subfolders, which may be large."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(archive.name + ".part")
    with tarfile.open(part, "w:gz", compresslevel=3) as packed:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix != BEING_WRITTEN and path not in (part, archive):
                packed.add(path, path.name)
    part.replace(archive)


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(archive) as packed:
        for member in packed.getmembers():
            if member.isfile() and Path(member.name).name == member.name:
                source = packed.extractfile(member)
                if source is not None:
                    (folder / member.name).write_bytes(source.read())


@contextmanager
def _ends_in_order() -> Iterator[None]:
    """Turns SIGTERM, and SIGHUP unless it is ignored, into an exception, so that no process stays behind and the
    summary is written. Often both come, one right after the other; the second may not disturb that."""

    def leave(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise SystemExit("ended by a signal; to continue, repeat the command")

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = [(number, signal.signal(number, leave)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def main(minutes: float, folder: Path, archive: Path | None) -> int:
    """Use the minutes; 1 if a piece failed or found something wrong."""
    run = Run(folder, 60 * minutes, archive)
    with _ends_in_order():
        try:
            run_pieces(run, start_process)
        except BaseException:
            for state in run.states.values():
                if state["state"] == "running":
                    state["state"] = "stopped"
            run.keep()
            raise
    print((folder / "summary.md").read_text(encoding="utf-8"))
    return int(any(state["state"] in ("faults", "failed") for state in run.states.values()))
