"""What is the user's to mend, not the program's: exceptions with a clear line, and what disks say in words."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A clear one-line message for the person at the keyboard; the command line prints it and exits 2."""


class AnotherRankFailed(UserError):
    """A user's error that another process of the run has found, and says."""


_DISK_TROUBLE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EFBIG: "the file system takes no file of this size",
}


def disk_trouble(error: BaseException | None) -> str | None:
    """In words, that a disk takes nothing more; None for any other exception."""
    return _DISK_TROUBLE.get(error.errno or 0) if isinstance(error, OSError) else None


@contextmanager
def writing(what: str) -> Iterator[None]:
    """A context in which an OSError is the user's to mend: `what`, a flag or a path, cannot be written.

    Raises:
        UserError: instead of it.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: cannot be written ({error.strerror or error})") from None


@contextmanager
def threads_quiet_about_disks() -> Iterator[None]:
    """A context in which a thread (TensorBoard's) that meets a full disk prints no traceback: whoever waits for it
    gets the exception, and says so in one line."""
    before = threading.excepthook
    threading.excepthook = lambda given: None if disk_trouble(given.exc_value) else before(given)
    try:
        yield
    finally:
        threading.excepthook = before
