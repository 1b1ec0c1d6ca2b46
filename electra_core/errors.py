"""Errors that the user can fix: exceptions with a clear one-line message, and words for disk and memory errors.

Also what makes text from files safe to print: `printable` and `one_line`."""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A clear one-line message for the user; the command line prints it and exits with status 2."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback through the package: the line, in a notebook too."""
        return [f"{type(self).__name__}: {one_line(str(self))}"]


class AnotherRankFailed(UserError):
    """A UserError that another process of the run has found, and reports."""


_on_command_line = False


@contextmanager
def on_command_line() -> Iterator[None]:
    """A context in which messages refer to arguments and settings as flags; for `cli.main`."""
    global _on_command_line
    before, _on_command_line = _on_command_line, True
    try:
        yield
    finally:
        _on_command_line = before


def is_on_command_line() -> bool:
    """Whether messages are for a user of the command line."""
    return _on_command_line


def option(name: str, value: object = None) -> str:
    """An argument or setting as the reader of a message gives it, optionally with a value that it could have.

    >>> option("max_minutes"), option("embedding_init", "normal")
    ('max_minutes', "embedding_init='normal'")
    >>> with on_command_line():
    ...     option("max_minutes"), option("embedding_init", "normal")
    ('--max-minutes', '--embedding-init normal')
    """
    if is_on_command_line():
        return f"--{name.replace('_', '-')}" + ("" if value is None else f" {value}")
    return name if value is None else f"{name}={value!r}"


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_OUR_LISTS = "\n  "
"""Begins each entry of a list in a message."""
LONGEST_MESSAGE = 6000  # characters
LONGEST_ENTRY = 400


def printable(text: str) -> str:
    """`text` from a file or a name, for a terminal: control characters but tabs and line feeds become \\xNN.

    Escape sequences could move the cursor, set the title, or write over what was printed before.
    """
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def one_line(message: str) -> str:
    """A message with control characters and line feeds as \\xNN; if it is very long, or an entry of a list in it,
    without the middle."""
    first, *entries = message.split(_OUR_LISTS)
    message = _OUR_LISTS.join([first, *(_shortened(entry, LONGEST_ENTRY) for entry in entries)])
    message = _shortened(message, LONGEST_MESSAGE)
    return _OUR_LISTS.join(part.replace("\n", "\\x0a") for part in printable(message).split(_OUR_LISTS))


def _shortened(text: str, longest: int) -> str:
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; the name of its type if it says nothing.

    >>> first_line(RuntimeError("\\n  no such kernel \\nat ...")), first_line(MemoryError())
    ('no such kernel', 'MemoryError')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def listed(items: Sequence[str], most: int) -> str:
    """The first `most` items, for a message: "a, b and 3 others"."""
    more = f" and {len(items) - most:,} others" if len(items) > most else ""
    return f"{', '.join(items[:most])}{more}"


_OURS, _BELOW_US = (__name__.partition(".")[0], "electra_kernels"), ("torch", "triton", *sys.stdlib_module_names)


def place_of(error: BaseException) -> str:
    """FILE:LINE where an error arose: the innermost line of a program that uses this package, else of ours."""
    frames = [
        (frame.f_globals.get("__name__", "").partition(".")[0], f"{Path(frame.f_code.co_filename).name}:{line}")
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    theirs = [place for package, place in frames if package not in (*_OURS, *_BELOW_US)]
    ours = [place for package, place in frames if package in _OURS]
    return (theirs or ours or [place for _, place in frames] or ["?"])[-1]


_DISK_TROUBLE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is exceeded",
    errno.EROFS: "the disk is read-only",
    errno.EFBIG: "the file system does not allow a file of this size",
}


def disk_trouble(error: BaseException | None) -> str | None:
    """Message for a disk that is full or over its quota; None for any other exception."""
    return _DISK_TROUBLE.get(error.errno or 0) if isinstance(error, OSError) else None


_UNREADABLE = (errno.ENAMETOOLONG, errno.EIO, errno.ESTALE, errno.ELOOP)


def reading_trouble(error: OSError) -> str | None:
    """Message for a path that this user, or nobody, can read; None for any other error.

    Readers use `reading`; this one is for code that only asks whether a file exists.
    """
    if not isinstance(error, PermissionError) and error.errno not in _UNREADABLE:
        return None
    return f"cannot be read ({error.strerror or error})"


# What torch's allocators, the CUDA and HIP runtimes and cuBLAS say; all of them in RuntimeErrors.
_MEMORY_TROUBLE = re.compile(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED")
_ELSEWHERE = "--device cpu uses main memory instead"
_MORE_MEMORY = {
    "pretrain": "continue with --resume --accumulate 0 (as few parts as fit) or --recompute (keeps less in "
                "memory); neither changes the result beyond rounding",
    "finetune": "try a smaller --batch-size and as many times the --accumulate, or a smaller --max-length",
    "evaluate": _ELSEWHERE, "predict": _ELSEWHERE, "demo": _ELSEWHERE,
}  # fmt: skip
"""Command -> how it can do with less memory."""


def memory_trouble(error: BaseException | None, command: str) -> str | None:
    """One line: memory does not suffice, and what `command` can do about it; None for any other exception.

    Of the exceptions that led to `error` the first counts: one that ends a CUDA graph's capture may hide it.
    """
    found = [e for e in _led_to(error) if _is_of_memory(e)]
    if not found:
        return None
    said = first_line(found[-1]) if str(found[-1]).strip() else "out of memory"
    on_the_cpu = isinstance(found[-1], MemoryError) or "alloc_cpu" in said
    way_out = _MORE_MEMORY.get(command)
    if way_out is None or (way_out == _ELSEWHERE and on_the_cpu):
        return said
    said = re.split(r" Including non-PyTorch| Of the allocated memory", said)[0]  # of torch's own bookkeeping
    return f"{said.rstrip('. ')}; {way_out}"


def _is_of_memory(error: BaseException) -> bool:
    """Python's own error (of a file that decompresses to more than there is), or torch's."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and _MEMORY_TROUBLE.search(str(error)) is not None


# What gloo and NCCL say, in RuntimeErrors, when the process at the other end has gone.
_LOST = re.compile(
    r"Connection (closed by|reset by) peer|Socket closed|Broken pipe|ncclRemoteError|remote process exited", re.I
)


def lost_rank(error: BaseException) -> str | None:
    """The first line of an error about another process of the run that has gone; None for any other exception."""
    if not isinstance(error, RuntimeError) or not _LOST.search(str(error)):
        return None
    return first_line(error)


def is_of_the_gpu(error: BaseException) -> bool:
    """Whether Triton or the GPU's runtime raised `error` or a cause of it: the kernels may then be at fault."""
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
def reading(what: str | Path) -> Iterator[None]:
    """A context in which an OSError becomes a UserError: `what`, a path, cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: cannot be read ({error.strerror or error})") from None


@contextmanager
def writing(what: str, only_in: Path | None = None) -> Iterator[None]:
    """A context in which an OSError becomes a UserError: `what`, a flag or a path, cannot be written.

    Args:
        only_in: for a block that does other things, too (a caller's function may not reach its server): only a
            full disk, and errors about files in this folder, are converted.

    Raises:
        UserError: instead of the OSError.
    """
    try:
        yield
    except OSError as error:
        if only_in is not None and not _is_inside(error.filename, only_in) and disk_trouble(error) is None:
            raise
        raise UserError(f"{what}: cannot be written ({error.strerror or error})") from None


def _is_inside(file: object, folder: Path) -> bool:
    """Whether `file`, an OSError's `filename`, is a path inside the folder."""
    if not isinstance(file, str | os.PathLike):
        return False
    return Path(os.path.abspath(os.fspath(file))).is_relative_to(os.path.abspath(folder))


@contextmanager
def threads_quiet_about_disks() -> Iterator[None]:
    """A context in which a thread (TensorBoard's) that hits a full disk prints no traceback: the caller that waits
    for it gets the exception, and reports it in one line."""
    before = threading.excepthook
    threading.excepthook = lambda given: None if disk_trouble(given.exc_value) else before(given)
    try:
        yield
    finally:
        threading.excepthook = before
