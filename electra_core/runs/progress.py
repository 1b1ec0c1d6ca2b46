"""Shows a progress bar on a terminal, occasional plain lines elsewhere, and only what is to be said when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
"""At first; it grows to `MOST_SECONDS_BETWEEN_LINES` with the time that has passed, of which it is a twentieth."""
MOST_SECONDS_BETWEEN_LINES = 600.0


class Progress(Protocol):
    """One running bar: `update` adds to the amount done, `note` sets the figures shown after the bar.

    `say` prints a line once, however often it is given.
    """

    def update(self, amount: int = 1) -> None: ...

    def note(self, **figures: object) -> None: ...

    def say(self, line: str) -> None: ...


class _Quiet:
    """Shows no progress."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._said: set[str] = set()

    def update(self, amount: int = 1) -> None:
        pass

    def note(self, **figures: object) -> None:
        pass

    def say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._print(line)

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class _Bar(_Quiet):
    """For terminals: tqdm's bar, which is drawn anew below what is said."""

    def __init__(self, bar: tqdm, stream: TextIO) -> None:
        super().__init__(stream)
        self._bar = bar

    def update(self, amount: int = 1) -> None:
        self._bar.update(amount)

    def note(self, **figures: object) -> None:
        self._bar.set_postfix({key: str(value) for key, value in figures.items()}, refresh=False)

    def _print(self, line: str) -> None:
        self._bar.write(line, file=self._bar.fp)


class _Lines(_Quiet):
    """For log files: lines with rate and time left, farther and farther apart, and one at the end."""

    def __init__(self, title: str, total: int | None, unit: str, stream: TextIO, before: int) -> None:
        super().__init__(stream)
        self._title, self._total, self._unit = title, total, unit
        self._done = self._before = before
        self._start = self._last = time.monotonic()
        self._figures: dict[str, object] = {}
        self._written: tuple[int, dict[str, object]] | None = None

    def update(self, amount: int = 1) -> None:
        self._done += amount
        now = time.monotonic()
        wait = min((now - self._start) / 20, MOST_SECONDS_BETWEEN_LINES)
        if now - self._last >= max(SECONDS_BETWEEN_LINES, wait):
            self._last = now
            self.write()

    def note(self, **figures: object) -> None:
        self._figures = figures

    def end(self) -> None:
        """Writes the last line, unless it has just been written."""
        if self._written != (self._done, self._figures):
            self.write()

    def write(self) -> None:
        self._written = self._done, self._figures
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._before) / elapsed
        parts = [tqdm.format_sizeof(self._done)]
        if self._total:
            parts = [f"{tqdm.format_sizeof(self._done)}/{tqdm.format_sizeof(self._total)} {self._unit}"]
            parts.append(f"{100 * self._done / self._total:.0f}%")
        parts.append(f"{tqdm.format_sizeof(rate)} {self._unit}/s")
        parts.append(f"{tqdm.format_interval(elapsed)} elapsed")
        if self._total and rate > 0:
            parts.append(f"{tqdm.format_interval(max(self._total - self._done, 0) / rate)} left")
        parts += [f"{key} {value}" for key, value in self._figures.items()]
        self._print(f"{self._title}: {', '.join(parts)}")


@contextmanager
def progress(
    title: str, total: int | None, unit: str = "it", *, before: int = 0, quiet: bool = False,
    stream: TextIO | None = None,
) -> Iterator[Progress]:  # fmt: skip
    """Shows progress on stderr, or if `quiet` only what `say` is given. `total` is in `unit`s, None if unknown.

    The unit "B" means bytes; large numbers get SI prefixes. What was done `before`, by an interrupted process,
    counts as done, but not for the rate and the time left.
    """
    stream = stream or sys.stderr
    if quiet:
        yield _Quiet(stream)
    elif stream.isatty():
        with tqdm(
            total=total, initial=before, desc=title, unit=unit, unit_scale=True, file=stream, dynamic_ncols=True
        ) as bar:
            yield _Bar(bar, stream)
    else:
        lines = _Lines(title, total, unit, stream, before)
        yield lines
        lines.end()
