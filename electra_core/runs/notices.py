"""Lines from a run to its user, and where they go: what `say` means throughout."""

from __future__ import annotations

import logging
from collections.abc import Callable

Say = Callable[[str], None]
"""Receives a line for the user: `print`, `to_log`, or a caller's function."""
log = logging.getLogger("electra_core")


class Lost(str):
    """A line about data that were not used as they are: not worded as a warning, but logged as one."""


def to_log(line: str) -> None:
    """Logs a line: warnings and `Lost` lines at level WARNING, which Python shows even if logging is not set up,
    and the rest at level INFO, which it does not show."""
    is_warning = isinstance(line, Lost) or line.startswith("warning: ")
    log.log(logging.WARNING if is_warning else logging.INFO, "%s", line)
