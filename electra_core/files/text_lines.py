"""Streams the lines of text files and of standard input.

Files may be compressed (.gz, .xz, .zst). Lines end at "\\n" only: reviews contain U+0085 and the like, at which
`str.splitlines` would split.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from electra_core.errors import UserError
from electra_core.files.byte_files import ByteFile, check_utf8

BLOCK_BYTES = 1 << 20
MAX_ROW_BYTES = 1 << 27  # a row must fit into memory, whatever its file is decompressed to
LONG_LINE = (
    f"the line is longer than {MAX_ROW_BYTES >> 20} MiB; if it is a whole JSON file: decompress it, or "
    "jq . OLD > NEW"
)
ASCII = b'a,;\t|"\n'

Item = TypeVar("Item")


def check_exists(source: Path | str) -> None:
    """Raises UserError if the file does not exist ("-" is standard input)."""
    if str(source) != "-" and not os.path.exists(source):
        raise UserError(f"{source}: no such file or folder")


def read_lines(source: Path | str, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line without its end); undecodable bytes become lone surrogates.

    A byte-order mark is dropped. "-" is standard input.

    Args:
        encoding: None: UTF-8.

    Raises:
        UserError: the file is missing, unreadable, damaged, UTF-16, UTF-32 or binary, a line is longer than
            MAX_ROW_BYTES and than its file on disk, or the encoding is unknown.
    """
    check_exists(source)
    _check_encoding(encoding)
    with ByteFile(str(source), None if str(source) == "-" else Path(source)) as file:
        for number, raw in enumerate(_byte_lines(file), 1):
            if number == 1:
                raw = check_utf8(source, raw)
            yield number, raw.rstrip(b"\r").decode(encoding or "utf-8", errors="surrogateescape")


def _check_encoding(name: str | None) -> None:
    """Raises UserError for an encoding that Python lacks, or that does not extend ASCII."""
    try:
        is_fine = name is None or ASCII.decode(name) == ASCII.decode("ascii")
    except (LookupError, UnicodeError):
        is_fine = False
    if not is_fine:
        raise UserError(
            f"encoding: expected one that extends ASCII, such as utf-8, cp1252 or latin-1, got {name!r}"
        )


def at_hand(items: Iterable[Item], most: int, source: Path | str) -> Iterator[Item]:
    """The next item, and those after it that are available without waiting for input; at most `most`.

    A file has them all. Standard input may be a conversation, in which no line comes before the last is answered.
    """
    for item in itertools.islice(items, most):
        yield item
        if str(source) == "-" and _stdin.is_waited_for():
            return


@dataclass
class _StandardInput:
    """The process's standard input, once it is read: the file, and the lines received but not yet taken."""

    file: ByteFile | None = None
    lines: deque[bytes] = field(default_factory=deque)

    def is_waited_for(self) -> bool:
        """Whether the next non-blank line has not arrived yet."""
        return self.file is not None and not any(map(bytes.strip, self.lines)) and self.file.is_waited_for()


_stdin = _StandardInput()


def _byte_lines(file: ByteFile) -> Iterator[bytes]:
    parts: list[bytes] = []  # of a line that is longer than a block
    number, held = 1, 0  # the line that they begin, and their bytes
    lines: deque[bytes] = deque()
    most = max(MAX_ROW_BYTES, file.plain_size)
    if file.is_stdin:
        _stdin.file, _stdin.lines = file, lines
    while block := file.read_some(BLOCK_BYTES):
        first, *others = block.split(b"\n")
        parts.append(first)
        if (held := held + len(first)) > most:  # a few MB of .gz can hold a line of gigabytes
            raise UserError(f"{file.name}:{number}: {LONG_LINE}")
        if others:
            lines.extend((b"".join(parts), *others[:-1]))
            parts, number, held = [others[-1]], number + len(others), len(others[-1])
            while lines:
                yield lines.popleft()
    if any(parts):
        yield b"".join(parts)


def text_problem(text: str, encoding: str | None = None) -> str:
    """Why `text`, read as `encoding`, is not valid Unicode, naming the first bad byte; "" if it is valid."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        bad = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate U+{code:04X}"
        return f"not valid {encoding or 'UTF-8'} ({bad} at character {error.start + 1})"
    return ""
