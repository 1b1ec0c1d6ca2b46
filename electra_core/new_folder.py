"""A folder that appears complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from electra_core.errors import UserError

_USERS_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "no permission to write here",
    errno.EPERM: "no permission to write here",
    errno.EROFS: "the disk is read-only",
    errno.EFBIG: "the file system takes no file of this size",
    errno.ENOTDIR: "a part of this path is a file",
}


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `target`, which takes its place when the block ends without an exception.

    What was at `target` is replaced; whoever calls has made sure that it may be. After an exception (Ctrl-C
    included) nothing is left, and `target` is as it was.

    Raises:
        UserError: instead of an OSError that is the user's to mend, such as a full disk.
    """
    target = Path(os.path.abspath(target))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync(temporary)
        _replace(target, temporary)
    except OSError as error:
        if reason := _USERS_ERRORS.get(error.errno or 0):
            raise UserError(f"{target}: {reason}; nothing was kept") from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(target: Path, temporary: Path) -> None:
    old = temporary.with_suffix(".old")
    if target.exists():
        target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
