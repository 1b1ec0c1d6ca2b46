"""What is the user's to mend, not the program's: exceptions with a clear line, and what disks say in words."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A clear one-line message for the person at the keyboard; the command line prints it and exits 2."""


class AnotherRankFailed(UserError):
    """A user's error that another process of the run has found, and says."""


_on_command_line = False


@contextmanager
def on_command_line() -> Iterator[None]:
    """A context in which arguments and settings are called as flags; for `cli.main`."""
    global _on_command_line
    before, _on_command_line = _on_command_line, True
    try:
        yield
    finally:
        _on_command_line = before


def is_on_command_line() -> bool:
    """Whether messages are for somebody who types flags."""
    return _on_command_line


def option(name: str, value: object = None) -> str:
    """What whoever reads a message calls an argument or setting, perhaps with a value that it could have.

    >>> option("max_minutes"), option("embedding_init", "normal")
    ('max_minutes', "embedding_init='normal'")
    >>> with on_command_line():
    ...     option("max_minutes"), option("embedding_init", "normal")
    ('--max-minutes', '--embedding-init normal')
    """
    if is_on_command_line():
        return f"--{name.replace('_', '-')}" + ("" if value is None else f" {value}")
    return name if value is None else f"{name}={value!r}"


_DISK_TROUBLE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is exceeded",
    errno.EROFS: "the disk is read-only",
    errno.EFBIG: "the file system does not allow a file of this size",
}


def disk_trouble(error: BaseException | None) -> str | None:
    """What to say of a disk that is full or over its quota; None for any other exception."""
    return _DISK_TROUBLE.get(error.errno or 0) if isinstance(error, OSError) else None


# What torch's allocators, the CUDA and HIP runtimes and cuBLAS say; all of them in RuntimeErrors.
_MEMORY_TROUBLE = re.compile(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED")
_ELSEWHERE = "--device cpu uses main memory instead"
_MORE_MEMORY = {
    "pretrain": "continue with --resume --accumulate 0 (as few parts as fit) or --recompute (keeps less in "
                "memory); neither changes the result beyond rounding",
    "finetune": "try a smaller --batch-size and as many times the --accumulate, or a smaller --max-length",
    "evaluate": _ELSEWHERE, "predict": _ELSEWHERE, "demo": _ELSEWHERE,
}  # fmt: skip
"""Command -> what it can do with less."""


def memory_trouble(error: BaseException | None, command: str) -> str | None:
    """A line: memory does not suffice, and what `command` can do about it; None for any other exception.

    The first exception of those that led to `error` counts: what ends a CUDA graph's capture hides it.
    """
    found = [e for e in _led_to(error) if isinstance(e, RuntimeError) and _MEMORY_TROUBLE.search(str(e))]
    if not found:
        return None
    said = str(found[-1]).strip().splitlines()[0]
    way_out = _MORE_MEMORY.get(command)
    if way_out is None or (way_out == _ELSEWHERE and "alloc_cpu" in said):
        return said
    said = re.split(r" Including non-PyTorch| Of the allocated memory", said)[0]  # of torch's own bookkeeping
    return f"{said.rstrip('. ')}; {way_out}"


def is_of_the_gpu(error: BaseException) -> bool:
    """Whether Triton or the GPU's runtime raised it, or what led to it: then the kernels may be at fault."""
    texts = ("Triton Error", "CUDA error", "HIP error")
    return any(
        type(e).__module__.split(".")[0] == "triton" or any(text in str(e) for text in texts)
        for e in _led_to(error)
    )


def _led_to(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and those that caused it, back to the first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def writing(what: str, only_in: Path | None = None) -> Iterator[None]:
    """A context in which an OSError is the user's to mend: `what`, a flag or a path, cannot be written.

    Args:
        only_in: for a block that does other things, too (a caller's function may not reach its server): only
            errors of a disk that takes nothing, and of files in this folder, are meant.

    Raises:
        UserError: instead of it.
    """
    try:
        yield
    except OSError as error:
        if only_in is not None and not _is_inside(error.filename, only_in) and disk_trouble(error) is None:
            raise
        raise UserError(f"{what}: cannot be written ({error.strerror or error})") from None


def _is_inside(file: object, folder: Path) -> bool:
    """Whether an OSError's `filename` is a path, and in the folder."""
    if not isinstance(file, str | os.PathLike):
        return False
    return Path(os.path.abspath(os.fspath(file))).is_relative_to(os.path.abspath(folder))


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
