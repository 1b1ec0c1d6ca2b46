"""Creates a folder that appears complete or not at all, however the writing process ends.

It is filled as `.NAME.PID.tmp` beside its target, and then renamed. The writer holds a lock on that folder, which
the kernel releases with the process, so the next writer can tell leftovers of a killed writer (and removes them)
from a folder being written. On file systems without locks leftovers stay, but nothing else is lost: a later
process with the same PID, as is common in containers, takes the next number.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from electra_core.errors import UserError, disk_trouble
from electra_core.files.unix import fcntl

_USERS_ERRORS = {
    errno.EACCES: "no permission to write here",
    errno.EPERM: "no permission to write here",
    errno.ENOTDIR: "a part of this path is a file",
    errno.EEXIST: "a part of this path is a file",
}
_LEFTOVER = re.compile(r"\.(.+)\.\d+\.(tmp|old)", re.DOTALL)
"""NAME is compared afterwards: a pattern for each name would stay in the cache of `re`."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `target`, which takes its place when the block ends without an exception.

    What was at `target` is replaced; the caller has to make sure that it may be. After an exception (Ctrl-C
    included) nothing is left, and `target` is unchanged. After SIGKILL, the next writer of `target` cleans up.

    Raises:
        UserError: instead of an OSError that the user can fix, such as a full disk.
    """
    target = Path(os.path.abspath(target))
    with temporary_folder(target) as temporary:
        yield temporary
        sync_folder(temporary)
        _replace(target, temporary)


@contextmanager
def partial_folder(target: Path, journal: str = "") -> Iterator[Path]:
    """As `new_folder`, for hours of work: a killed writer leaves its folder to the next writer of `target`.

    The folder, `.NAME.partial`, is new or a leftover in any state, so its writer has to keep a journal. After an
    exception nothing is left, as with `new_folder`; after Ctrl-C the folder stays if it can be resumed.

    Args:
        journal: name of a file whose presence in the folder means that it can be resumed.

    Raises:
        UserError: as `new_folder`, or another process is writing `target`.
    """
    target = Path(os.path.abspath(target))
    partial = target.with_name(f".{target.name}.partial")
    try:
        _make(partial)
        remove_leftovers(target.parent, target.name)
        lock = os.open(partial, os.O_RDONLY)
        try:
            _lock_partial(lock, target)
            try:
                yield partial
                sync_folder(partial)
                _replace(target, partial)
            except BaseException as error:
                if not (isinstance(error, KeyboardInterrupt) and journal and (partial / journal).is_file()):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        finally:
            os.close(lock)
    except OSError as error:
        raise users_error(target, error) from None


def _lock_partial(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{target}: another process is writing this") from None
    except OSError:  # a file system without locks
        pass


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A locked folder beside `target` to write into; removed after the block, unless the block renamed it.

    Raises:
        UserError: as `new_folder`.
    """
    target = Path(os.path.abspath(target))
    try:
        _make(target.parent)
        remove_leftovers(target.parent, target.name)
        temporary, lock = _claim(target)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        raise users_error(target, error) from None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # in /proc and the like
        raise UserError(f"{folder.parent}: no folder can be made here") from None


def users_error(path: Path, error: OSError) -> Exception:
    """A UserError for a problem that the user can fix, such as a full disk; otherwise `error` itself."""
    reason = disk_trouble(error) or _USERS_ERRORS.get(error.errno or 0)
    return UserError(f"{path}: {reason}; nothing was kept") if reason else error


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what killed writers of `folder`/`name` left behind (None: of anything in `folder`).

    A folder that was moved aside but never replaced is moved back.
    """
    found = [(path, match) for path in folder.iterdir() if (match := _LEFTOVER.fullmatch(path.name))]
    found = [(path, match) for path, match in found if name in (None, match[1])]
    for path, match in sorted(found, reverse=True):  # .tmp before .old
        target = folder / match[1]
        if match[2] == "tmp":
            _remove_if_abandoned(path)
        elif target.exists():
            shutil.rmtree(path, ignore_errors=True)
        elif not path.with_suffix(".tmp").exists():  # otherwise a process is between the two renames of `_replace`
            path.rename(target)


def sync_folder(folder: Path) -> None:
    """Makes the directory entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _claim(target: Path) -> tuple[Path, int]:
    """Makes a folder beside `target` and locks it; returns it and the descriptor that holds the lock."""
    number = os.getpid()
    while True:
        temporary, number = target.with_name(f".{target.name}.{number}.tmp"), number + 1
        try:
            temporary.mkdir()
        except FileExistsError:  # another machine's process, or a leftover on a file system without locks
            continue
        descriptor = os.open(temporary, os.O_RDONLY)
        with suppress(OSError):  # no locks here; or another process is about to remove the folder
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink and temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


def _remove_if_abandoned(temporary: Path) -> None:
    """Removes a folder whose writer is dead: its lock is free."""
    try:
        descriptor = os.open(temporary, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(temporary, ignore_errors=True)
    except OSError:  # its writer is alive, or there are no locks
        pass
    finally:
        os.close(descriptor)


def _replace(target: Path, temporary: Path) -> None:
    # `remove_leftovers` leaves an .old alone while there is a .tmp of its stem.
    stem = temporary.stem if temporary.suffix == ".tmp" else f".{target.name}.{os.getpid()}"
    old = target.with_name(f"{stem}.old")
    if target.exists():
        target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
