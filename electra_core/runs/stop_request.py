"""Stops a run from outside: a signal or time limit is noted, and the loop responds between two steps."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from electra_core.config import plain
from electra_core.errors import UserError, is_on_command_line, option
from electra_core.execution import torchrun
from electra_core.execution.distributed import Ranks

ON_EVALUATION = "on_evaluation"
"""The reason for which a run stops that its caller's function has stopped."""
OLDEST = 24 * 3600.0  # seconds
FARTHEST = 10 * 365 * 24 * 3600.0  # seconds


class StopRequest(AbstractContextManager["StopRequest"]):
    """Notes SIGINT, SIGTERM, SIGUSR1 or a time limit, so that the loop can save and leave.

    A second signal ends the process at once, as if it were not caught; saved files stay intact. (In a notebook
    or at Python's prompt, a second SIGINT is a KeyboardInterrupt, as usual there.) But a scheduler's signal often
    arrives twice: from the scheduler, which signals all processes of a job, and from the job's script or torchrun,
    which pass it on, perhaps as another one. So SIGTERM or SIGUSR1 within `SAME_SIGNAL` seconds of the first
    counts as the first; SIGINT, which people send, only under torchrun.

    Args:
        deadline: the time limit, in `time.monotonic()`'s seconds (`deadline_of`).
        ranks: the processes that train together; `agreed` is the reason for which they all stop.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    REASONS = ("time limit", *(number.name for number in SIGNALS))
    SAME_SIGNAL = 5.0

    def __init__(self, deadline: float | None = None, ranks: Ranks | None = None):
        self.reason: str | None = None
        self.ranks = ranks or Ranks()
        self.deadline = deadline
        self._previous: dict[signal.Signals, Any] = {}
        self._first: tuple[int, float] | None = None
        self._told: Callable[[], Tensor] | None = None

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: signals are left to the caller
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = self.REASONS[0]
        return self.reason is not None

    def agreed(self) -> str | None:
        """The reason to stop, the same on all ranks at the same call; None to continue.

        With several ranks, each call sends this rank's reason and returns what all ranks sent in the call before,
        so no rank waits. A single process gets its own reason at once.
        """
        if self.ranks.size == 1:
            return self.reason if self else None
        wanted = [float(bool(self) and self.reason == reason) for reason in self.REASONS]
        before, self._told = self._told, self.ranks.later_sum(torch.tensor(wanted))
        counts = before().tolist() if before else []
        return next((reason for reason, count in zip(self.REASONS, counts) if count), None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first, self.reason = (number, time.monotonic()), signal.Signals(number).name
        elif not self._is_the_first_again(number):
            if number == signal.SIGINT and _has_a_prompt():
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _is_the_first_again(self, number: int) -> bool:
        """Whether this later signal is the first one, having come another way."""
        assert self._first is not None
        first, at = self._first
        handed_on = torchrun.hands_on_signals() or signal.SIGINT not in (first, number)
        return handed_on and time.monotonic() - at <= self.SAME_SIGNAL


def asks_to_stop(on_evaluation: Callable[[dict[str, float]], object] | None, figures: dict[str, float]) -> bool:
    """Shows the caller's function an evaluation; whether it returned True. Anything else that it returns has no
    effect: a function that logs may return what its logger does."""
    return on_evaluation is not None and plain(on_evaluation(figures)) is True


def deadline_of(began: float, max_minutes: float | None, stop_at: float | None) -> float | None:
    """The earlier of two time limits, in `time.monotonic()`'s seconds; None without either.

    The time of day is read here and nowhere else: a scheduler says in it when a job ends, and all restarts within
    the job have that end. It is converted once, so a clock that is set later moves nothing.

    Args:
        began: `time.monotonic()` when the run was started, from which `max_minutes` count.
        stop_at: Unix time, in seconds.
    """
    limits = [] if max_minutes is None else [began + 60 * max_minutes]
    if stop_at is not None:
        limits.append(time.monotonic() + stop_at - time.time())
    return min(limits, default=None)


def check_time(stop_at: Any, typed: str = "") -> None:
    """Checks a Unix time at which to stop.

    Args:
        typed: how the user gave it, if not as this number.

    Raises:
        UserError: not a number, or so long ago (`OLDEST` seconds) or so far away (`FARTHEST`) that it cannot be
            meant.
    """
    if isinstance(stop_at, bool) or not isinstance(stop_at, int | float):
        got = f"{type(stop_at).__name__} {stop_at!r:.80}"
        raise UserError(f"{option('stop_at')}: expected seconds since 1970, got {got}")
    ahead, got = stop_at - time.time(), repr(typed) if typed else f"{stop_at:.15g}"
    if not ahead > -OLDEST:
        raise UserError(f"{option('stop_at')}: expected a time to come, in seconds since 1970, got {got}")
    if ahead > FARTHEST:
        raise UserError(
            f"{option('stop_at')}: expected a time within ten years, got {got} (in seconds, not milliseconds?)"
        )


def _has_a_prompt() -> bool:
    """Whether the process is an interactive session, which ending it would lose."""
    return "ipykernel" in sys.modules or hasattr(sys, "ps1")


def tell_python(reason: str | None, caught: str | None, saved: str, say: Callable[[str], None]) -> None:
    """Tells a caller in Python, once all is saved, that the run ended early; the command line has its exit status.

    Ctrl-C is then a KeyboardInterrupt, as anywhere in Python: a loop over several runs ends with the one that was
    interrupted, and nobody takes its result for a finished one.

    Args:
        reason: what ended the run; None: nothing.
        caught: `StopRequest.reason`: what this process was asked by, perhaps too late to stop anything.
        saved: what there is now, for the message.
        say: receives the message for any other reason than Ctrl-C, as a warning.

    Raises:
        KeyboardInterrupt: SIGINT came, though it may have ended nothing.
    """
    interrupted = signal.SIGINT.name in (reason, caught)
    if is_on_command_line() or (reason is None and not interrupted):
        return
    if reason is None:
        raise KeyboardInterrupt(f"it came too late to stop this run, which is finished; {saved}")
    line = f"stopped by {reason}; {saved}; resume=True continues"
    if interrupted:
        raise KeyboardInterrupt(line)
    say(f"warning: {line}")
