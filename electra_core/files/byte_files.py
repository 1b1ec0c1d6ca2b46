"""Reads the bytes of a file, compressed or not; every failure is a `UserError`.

The library's own stream reader takes the end of a truncated `.zst` for the end of the file, so the frames are
followed here.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import lzma
import os
import select
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from electra_core.errors import UserError, reading

WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",  # the first begins with UTF-16's mark
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
"""Byte-order marks of encodings with NUL bytes; Excel's "Unicode text" has one."""
OTHER_ENCODING = (
    "if Excel or Windows wrote it: --encoding cp1252 (western Europe), cp1251 (Cyrillic), gb18030 (Chinese), "
    "cp932 (Japanese) or cp949 (Korean), or iconv -f CP1252 -t UTF-8 OLD > NEW"
)
TO_UTF8 = (
    "if Excel or Windows wrote it: iconv -f CP1252 -t UTF-8 OLD > NEW, with CP1252 for western Europe, CP1251 for "
    "Cyrillic, GB18030 for Chinese, CP932 for Japanese, CP949 for Korean"
)
"""What to do about a file that is not UTF-8, where `--encoding` is read and where it is not. A wrong encoding may
read every byte without an error, so none is guessed."""
LFS_POINTER = b"version https://git-lfs"
"""How the pointer begins that Git stores instead of a large file."""
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")


def check_utf8(name: str | Path, beginning: bytes) -> bytes:
    """The first bytes of a text file, without a byte-order mark.

    Raises:
        UserError: they are those of UTF-16, of UTF-32 or of a binary file.
    """
    for mark, wide in WIDE_MARKS.items():
        if beginning.startswith(mark):
            raise UserError(
                f'{name}: is {wide}, expected UTF-8; save it as UTF-8 (in Excel: "CSV UTF-8"), or: iconv '
                f"-f {wide} -t UTF-8 OLD > NEW"
            )
    if b"\0" in beginning[:8192]:
        raise UserError(
            f"{name}: is a binary file (contains NUL bytes), expected text in UTF-8; if it is UTF-16 without its "
            "mark: iconv -f UTF-16LE -t UTF-8 OLD > NEW"
        )
    return beginning.removeprefix(codecs.BOM_UTF8)


def sha256_of(*paths: Path) -> str:
    """SHA-256 of the files' bytes, one file after the other, read in blocks."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def refuse_pointer(path: Path) -> None:
    """Raises UserError for the few lines that `git clone` leaves instead of a large file without git-lfs."""
    try:
        with open(path, "rb") as file:
            begins = file.read(len(LFS_POINTER))
    except OSError:  # whoever reads the file says why
        return
    if begins == LFS_POINTER:
        raise UserError(f"{path}: a Git LFS pointer, not the file; run git lfs pull in its folder")


class ByteFile:
    """A file opened for reading, decompressed by its suffix; a context manager.

    Args:
        name: what error messages call it.
        path: the file; None is standard input.

    Raises:
        UserError: missing, a folder, not readable, damaged or truncated, or a library is missing.
    """

    def __init__(self, name: str, path: Path | None) -> None:
        self.name = name
        self.is_stdin = path is None
        with reading(name):
            self._raw: BinaryIO = sys.stdin.buffer if path is None else open(path, "rb")
        self._counts = path is None or not self._raw.seekable()  # a pipe does not tell its position
        self._taken: int | None = 0 if self._counts else None
        self._stream = _decompressed(name, path.suffix.lower() if path else "", self._raw)

    def __enter__(self) -> ByteFile:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_stdin:
            self._raw.close()

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes (all that is left for -1), empty only at the end."""
        return self._read(self._stream.read, size)

    def read_some(self, size: int) -> bytes:
        """As `read`, but returns what standard input holds as soon as it holds anything."""
        return self._read(self._stream.read1 if self.is_stdin else self._stream.read, size)

    def is_waited_for(self) -> bool:
        """Whether this is standard input, has not ended, and has nothing to read at the moment."""
        try:
            return self.is_stdin and not select.select([self._raw], [], [], 0)[0]
        except (OSError, TypeError, ValueError):  # a program's stand-in for stdin, without a file descriptor
            return False

    @property
    def plain_size(self) -> int:
        """Bytes of an uncompressed file; 0 if they cannot be known before: compressed, standard input, a pipe."""
        return 0 if self.is_stdin or self._stream is not self._raw else os.fstat(self._raw.fileno()).st_size

    def _read(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            data = read(size)
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{self.name}: the compressed file is damaged or truncated ({error})") from None
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read ({error.strerror or error})") from None
        if self._counts:
            self.position += len(data)
        return data

    @property
    def position(self) -> int:
        """Bytes of the file on disk used so far, for a progress bar; a caller that reads otherwise may set it."""
        return self._raw.tell() if self._taken is None else self._taken

    @position.setter
    def position(self, taken: int) -> None:
        self._taken = taken


def _decompressed(name: str, suffix: str, raw: BinaryIO) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".zst":
        return io.BufferedReader(_ZstFrames(name, raw), 1 << 20)
    return raw


class _ZstFrames(io.RawIOBase):
    """The contents of a file of Zstandard frames; `EOFError` if the last one is incomplete."""

    def __init__(self, name: str, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{name}: reading .zst needs: pip install 'electra-core[zst]'") from None
        self._library, self._raw = zstandard, raw
        self._frame: Any = None
        self._waiting = b""  # compressed, not yet fed
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._waiting or self._raw.read(1 << 13)  # little: it may decompress to a thousand times more
            if not chunk:
                if self._frame is not None:
                    raise EOFError("ends inside a Zstandard frame")
                return 0
            self._feed(chunk)
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _feed(self, chunk: bytes) -> None:
        self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(chunk))
        except self._library.ZstdError as error:
            raise EOFError(str(error)) from None
        self._waiting = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
