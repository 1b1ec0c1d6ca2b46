"""Streaming readers of text: `.txt`, `.jsonl`, `.parquet`, each also `.gz`, `.xz`, `.zst`; folders; `-` (stdin).

Everything comes out as documents, a document being a list of lines (str, without their line ends). Lines end at
"\\n" only: U+0085 and its kin occur inside real text. Memory stays bounded whatever the files hold, so a line or a
document beyond the limits below goes on as the next one, and `ReadReport` counts how often.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from electra_core.errors import UserError

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")
BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 20
MAX_DOCUMENT_CHARACTERS = 1 << 22


@dataclass
class ReadReport:
    """What the readers had to do to the text; read it after they are done."""

    files: int = 0
    bytes: int = 0  # of text, uncompressed
    cut_lines: int = 0  # lines longer than MAX_LINE_BYTES, cut at white space
    cut_documents: int = 0  # documents longer than MAX_DOCUMENT_CHARACTERS, gone on as new ones


def find_files(paths: Sequence[str | Path]) -> list[str]:
    """The files that `paths` mean: folders are searched recursively, in sorted order; `-` stays."""
    files: list[str] = []
    for path in paths:
        if str(path) == "-" or Path(path).is_file():
            files.append(str(path))
        elif Path(path).is_dir():
            inside = sorted(str(file) for file in Path(path).rglob("*") if file.is_file() and _format(file))
            if not inside:
                raise UserError(f"{path}: no {', '.join(TEXT_SUFFIXES)} file in this folder")
            files += inside
        else:
            raise UserError(f"{path}: no such file or folder")
    return files


def read_documents(
    paths: Sequence[str | Path], *, text_field: str = "text", report: ReadReport | None = None
) -> Iterator[list[str]]:
    """All documents of all files, one after the other, in the order given."""
    report = report if report is not None else ReadReport()
    for path in find_files(paths):
        report.files += 1
        found = False
        for document in _bounded(_documents_of(path, text_field, report), report):
            found = True
            yield document
        if not found:
            raise UserError(f"{path}: the file is empty")


def _documents_of(path: str, text_field: str, report: ReadReport) -> Iterator[Iterable[str]]:
    kind = _format(path)
    with _open(path) as stream:
        if kind == ".jsonl":
            yield from _json_documents(path, stream, text_field, report)
        else:
            yield from _text_documents(path, stream, report)


def _text_documents(path: str, stream: BinaryIO, report: ReadReport) -> Iterator[Iterable[str]]:
    lines = _lines(path, stream, report, cut=True)
    while True:
        first = next((line for line in lines if line.strip()), None)
        if first is None:
            return
        yield _until_blank(first, lines)


def _until_blank(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    for line in lines:
        if not line.strip():
            return
        yield line


def _json_documents(path: str, stream: BinaryIO, text_field: str, report: ReadReport) -> Iterator[Iterable[str]]:
    for number, line in enumerate(_lines(path, stream, report, cut=False), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number}: not JSON ({error})") from None
        yield text_lines(_field(path, number, row, text_field))


def text_lines(text: str) -> list[str]:
    """The lines of a text that have something in them."""
    return [line for line in text.split("\n") if line.strip()]


def _field(path: str, number: int, row: object, text_field: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{path}: line {number}: expected a JSON object, got {type(row).__name__}")
    if text_field not in row:
        present = ", ".join(map(repr, row)) or "none"
        raise UserError(f"{path}: line {number}: no field {text_field!r}; the fields are: {present}")
    if not isinstance(row[text_field], str):
        raise UserError(f"{path}: line {number}: field {text_field!r} is not a text")
    return row[text_field]


def _bounded(documents: Iterable[Iterable[str]], report: ReadReport) -> Iterator[list[str]]:
    """Documents as lists of lines, those beyond the limit cut between lines."""
    for lines in documents:
        document: list[str] = []
        size = 0
        for line in lines:
            if size + len(line) > MAX_DOCUMENT_CHARACTERS and document:
                report.cut_documents += 1
                yield document
                document, size = [], 0
            document.append(line)
            size += len(line)
        if document:
            yield document


def _lines(path: str, stream: BinaryIO, report: ReadReport, *, cut: bool) -> Iterator[str]:
    """The stream's lines, decoded. With `cut`, one beyond MAX_LINE_BYTES comes in pieces cut at white space."""
    rest, offset = b"", 0  # `offset` is the place of `rest` in the stream
    while block := _read(path, stream):
        report.bytes += len(block)
        if offset == 0 and not rest:
            block = _checked_start(path, block)
        pieces = (rest + block).split(b"\n")
        rest = pieces.pop()
        for piece in pieces:
            yield _decode(path, piece, offset)
            offset += len(piece) + 1
        while cut and len(rest) > MAX_LINE_BYTES:
            place = _cut_place(rest)
            report.cut_lines += 1
            yield _decode(path, rest[:place], offset)
            rest, offset = rest[place:], offset + place
    if rest:
        yield _decode(path, rest, offset)


def _cut_place(line: bytes) -> int:
    """Where to cut a long line: behind the last space within the limit, else between two characters."""
    place = line.rfind(b" ", 0, MAX_LINE_BYTES)
    if place > 0:
        return place + 1
    place = MAX_LINE_BYTES
    while place > MAX_LINE_BYTES - 4 and line[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _checked_start(path: str, block: bytes) -> bytes:
    if b"\0" in block[:8192]:
        raise UserError(f"{path}: this is a binary file, not text")
    return block.removeprefix(b"\xef\xbb\xbf")


def _decode(path: str, line: bytes, offset: int) -> str:
    try:
        return line.decode("utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
        bad = line[error.start]
        raise UserError(f"{path}: invalid UTF-8 at byte {offset + error.start} (0x{bad:02x})") from None


def _open(path: str) -> BinaryIO:
    if path == "-":
        return sys.stdin.buffer
    suffix = Path(path).suffix
    try:
        if suffix == ".gz":
            import gzip

            return io.BufferedReader(gzip.open(path, "rb"))  # type: ignore[arg-type]
        if suffix == ".xz":
            import lzma

            return io.BufferedReader(lzma.open(path, "rb"))  # type: ignore[arg-type]
        if suffix == ".zst":
            import zstandard

            return io.BufferedReader(zstandard.open(path, "rb"))  # type: ignore[arg-type]
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read(path: str, stream: BinaryIO) -> bytes:
    try:
        return stream.read(BLOCK_BYTES)
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read to its end ({error})") from None


def _format(path: str | Path) -> str | None:
    """Which of TEXT_SUFFIXES a file name has, below a suffix of compression; None if none of them."""
    name = Path(path).name
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return next((suffix for suffix in TEXT_SUFFIXES if name.endswith(suffix)), None)
