"""Creates a folder that appears complete or not at all, however the writing process ends.

It is filled as `.NAME.PID.tmp` beside its target, and then renamed. The writer holds a lock on the file
`.NAME.PID.tmp.lock`, which the kernel releases with the process, so the next writer can tell leftovers of a killed
writer (and removes them) from a folder being written. On file systems without locks leftovers stay, but nothing
else is lost: a later process with the same PID, as is common in containers, takes the next number.

The lock is on a file open for writing, not on the folder: NFS gives an exclusive lock only on those (flock(2)). It
lies beside the folder, so that it holds until after the renaming, and the finished folder has no trace of it.
Whoever holds it may remove the file; whoever locks one that was removed meanwhile tries again.
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
_LEFTOVER = re.compile(r"\.(.+)\.\d+\.(tmp|tmp\.lock|old)", re.DOTALL)
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
        _make(target.parent)
        remove_leftovers(target.parent, target.name)
        lock = _locked(partial)
        if lock is None:
            raise UserError(f"{target}: another process is writing this")
        try:
            _make(partial)
            try:
                yield partial
                sync_folder(partial)
                _replace(target, partial)
            except BaseException as error:
                if not (isinstance(error, KeyboardInterrupt) and journal and (partial / journal).is_file()):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        finally:
            _unlock(partial, lock, may_stay=True)
    except OSError as error:
        raise users_error(target, error) from None


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
            _unlock(temporary, lock)
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
    matches = [match for path in folder.iterdir() if (match := _LEFTOVER.fullmatch(path.name))]
    found = [match for match in matches if name in (None, match[1])]
    for temporary in {match[0].removesuffix(".lock") for match in found if match[2] != "old"}:
        _remove_if_abandoned(folder / temporary)
    for path, target in [(folder / match[0], folder / match[1]) for match in found if match[2] == "old"]:
        if target.exists():
            _remove(path)
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
    """Locks and makes a folder beside `target`; returns it and the descriptor that holds the lock."""
    number = os.getpid()
    while True:
        temporary, number = target.with_name(f".{target.name}.{number}.tmp"), number + 1
        try:
            lock = _locked(temporary)
        except PermissionError:
            if _lock_of(temporary).exists():  # another user's leftover
                continue
            raise
        if lock is None:  # another machine's process
            continue
        try:
            temporary.mkdir()
        except OSError as error:
            _unlock(temporary, lock)
            if isinstance(error, FileExistsError):  # the same, or a leftover, on a file system without locks
                continue
            raise
        return temporary, lock


def _remove_if_abandoned(temporary: Path) -> None:
    """Removes a folder whose writer is dead: its lock is free."""
    try:
        lock = _locked(temporary, to_write=False)
    except FileNotFoundError:
        _remove_if_abandoned_earlier(temporary)
        return
    except OSError:  # somebody else's
        return
    if lock is not None:
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(temporary, lock)


def _remove_if_abandoned_earlier(temporary: Path) -> None:
    """As `_remove_if_abandoned`, for a folder without the lock's file: an earlier version's, which locked the
    folder itself, or one whose writer has just finished (then its path leads elsewhere by now)."""
    with suppress(OSError):  # somebody else's, being written, or on a file system without such locks
        descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_new = _lock_of(temporary).exists()
            if not is_new and os.path.samestat(os.stat(temporary), os.fstat(descriptor)):
                shutil.rmtree(temporary, ignore_errors=True)
        finally:
            os.close(descriptor)


def _locked(folder: Path, to_write: bool = True) -> int | None:
    """The descriptor that holds the lock on a temporary folder; None if another process holds it.

    Args:
        to_write: makes the lock's file, and where there are no locks, an unlocked descriptor will do. Otherwise
            the file must exist (FileNotFoundError), and the result without locks is None.
    """
    file = _lock_of(folder)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if to_write else 0), 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if to_write and not isinstance(error, BlockingIOError):
                return descriptor
            os.close(descriptor)
            return None
        with suppress(OSError):  # (a count of links would not do: NFS keeps a removed file under another name)
            if os.path.samestat(os.stat(file), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)  # removed by the process that had it before


def _unlock(folder: Path, descriptor: int, may_stay: bool = False) -> None:
    """Lets go of a temporary folder's lock and removes its file, unless the folder could not be removed.

    Args:
        may_stay: whether the folder may be there still.
    """
    with suppress(OSError):  # a disk that has become read-only: an exception on its way tells more
        if may_stay or not folder.exists():
            _lock_of(folder).unlink()
    os.close(descriptor)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _replace(target: Path, temporary: Path) -> None:
    # `remove_leftovers` leaves an .old alone while there is a .tmp of its stem.
    stem = temporary.stem if temporary.suffix == ".tmp" else f".{target.name}.{os.getpid()}"
    old = target.with_name(f"{stem}.old")
    if os.path.lexists(target):  # a link, too, that leads nowhere
        target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        if os.path.lexists(old):
            old.rename(target)
        raise
    sync_folder(target.parent)
    _remove(old)


def _remove(path: Path) -> None:
    """Removes a folder, or a link to one but not what it leads to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
