"""Lines that a fine-tuning tells its user, and where they go: what `say` is throughout."""

from __future__ import annotations

import logging
from collections.abc import Callable

Say = Callable[[str], None]
"""Takes a line for the user: `print`, `to_log`, or what a caller gives."""
log = logging.getLogger("electra_core")


class Lost(str):
    """A line that tells what of the data was not used as it is: no warning in its words, but one to the log."""


def to_log(line: str) -> None:
    """Logs a line: warnings and what was lost of the data as warnings, which Python shows where nobody has set up
    logging, and the rest as information, which it does not."""
    is_warning = isinstance(line, Lost) or line.startswith("warning: ")
    log.log(logging.WARNING if is_warning else logging.INFO, "%s", line)
