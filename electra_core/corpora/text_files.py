"""Streaming readers of text: `.txt`, JSON, tables and Parquet, each also `.gz`, `.xz`, `.zst`; `-` (stdin).

All of them yield documents; a document is a list of lines (str, none blank, without line ends). In a `.txt` file a
blank line ends a document, or each line or the whole file is one (`DOCUMENTS`); in the others each row is one.
`sources.py` finds the files and their formats; rows are read in `text_tables.py`. Lines end at "\\n" only, since
U+0085 and the like occur inside real text. Memory stays bounded whatever the files hold: a line or document beyond
the limits below is cut, and `ReadReport` counts the cuts.
"""

from __future__ import annotations

import codecs
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from electra_core.corpora.sources import Source, text_kind
from electra_core.corpora.text_tables import column_of, csv_texts, json_line_texts, json_texts
from electra_core.errors import UserError
from electra_core.files.byte_files import TO_UTF8, ByteFile, check_utf8
from electra_core.files.text_lines import BLOCK_BYTES, MAX_ROW_BYTES

MAX_LINE = 1 << 20  # bytes in a .txt file, characters elsewhere
MAX_DOCUMENT_CHARACTERS = 1 << 22
DOCUMENTS = ("blank-line", "line", "file")
"""What ends a document in a `.txt` file. With "file" (the original's OpenWebText) blank lines are skipped."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class ReadReport:
    """How far the reader has come, and what it had to change in the text."""

    position: int = 0  # bytes read of the files as they are on disk
    source: int = 0  # index of the file being read
    documents: int = 0  # of that file
    empty_files: int = 0
    cut_lines: int = 0  # cuts in lines longer than MAX_LINE, at white space where there is some
    cut_documents: int = 0  # cuts in documents longer than MAX_DOCUMENT_CHARACTERS, between lines

    def notes(self) -> list[str]:
        """Sentences for the user about anything unusual."""
        counted = (
            (self.empty_files, "{} of the files are empty"),
            (self.cut_lines, f"{{}} cuts were made in lines longer than {MAX_LINE >> 20} MiB"),
            (
                self.cut_documents,
                f"{{}} cuts were made in documents beyond {MAX_DOCUMENT_CHARACTERS:,} letters",
            ),
        )
        return [sentence.format(f"{count:,}") for count, sentence in counted if count]


def read_documents(
    sources: Sequence[Source],
    *,
    text_field: str = "text",
    documents: str = "blank-line",
    report: ReadReport | None = None,
) -> Iterator[list[str]]:
    """All documents of all files, one after the other. A file with an unknown suffix is read as `.txt`.

    Args:
        documents: one of DOCUMENTS.
        report: updated while reading. To continue after a document, pass a copy of the report made when that
            document was the latest; files that had been read completely are not opened again.

    Raises:
        UserError: a file is unreadable, damaged, binary, not UTF-8, not JSON or CSV, lacks the field or column, or
            holds no text; the message names file and place.
    """
    report = report if report is not None else ReadReport()
    before = sum(source.size or 0 for source in sources[: report.source])
    for source in sources[report.source :]:
        skip, counted = report.documents, (report.cut_lines, report.cut_documents)
        found = _documents_of(source, text_field, documents, report, before)
        for number, document in enumerate(found, start=1):
            if number < skip:
                continue
            if number == skip:  # skipping has counted the cuts a second time
                report.cut_lines, report.cut_documents = counted
                continue
            report.documents = number
            yield document
        if not report.documents:
            if not source.may_be_empty:
                raise UserError(f"{source.name}: contains no text")
            report.empty_files += 1
        report.source, report.documents = report.source + 1, 0
        before += source.size or 0


def _documents_of(
    source: Source, text_field: str, documents: str, report: ReadReport, before: int
) -> Iterator[list[str]]:
    """A file's documents; updates `report.position`, which starts at `before`."""
    with ByteFile(source.name, source.path) as file:
        texts = _row_texts(file, source.path, text_field)
        rows: Iterator[Iterator[str]]
        if texts is not None:
            rows = (_pieces(text, report) for text in texts)
        elif documents == "blank-line":
            rows = _paragraphs(_lines(file, MAX_LINE, report))
        else:
            lines = filter(str.strip, _lines(file, MAX_LINE, report))
            rows = iter([lines]) if documents == "file" else (iter([line]) for line in lines)
        for document in _bounded(rows, report):
            report.position = before + file.position
            yield document
        report.position = before + file.position


def _row_texts(file: ByteFile, path: Path | None, text_field: str) -> Iterator[str] | None:
    """The texts of a file of rows; None for plain text."""
    kind = text_kind(path.name) if path else None
    if kind == ".parquet" and path:
        return _parquet_texts(file, path, text_field)
    if kind in (".jsonl", ".ndjson"):
        return json_line_texts(file.name, _lines(file, MAX_ROW_BYTES), text_field)
    if kind == ".json":
        return json_texts(file.name, _characters(file), text_field)
    if kind in (".csv", ".tsv"):
        return csv_texts(file.name, _lines(file, MAX_ROW_BYTES), kind == ".tsv", text_field)
    return None


# ------------------------------------------------------------------------------------------------ plain lines


def _paragraphs(lines: Iterator[str]) -> Iterator[Iterator[str]]:
    """Runs of lines between blank ones."""
    while (first := next(filter(str.strip, lines), None)) is not None:
        yield _until_blank(first, lines)


def _until_blank(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    for line in lines:
        if not line.strip():
            return
        yield line


def _lines(file: ByteFile, limit: int, report: ReadReport | None = None) -> Iterator[str]:
    """The lines of a UTF-8 file. A line of more than `limit` bytes is cut if there is a report to count it in."""
    number = 1
    held: list[bytes] = []  # the beginning of a line whose end has not come yet
    held_size = offset = 0  # `offset` is the place of `held` in the file
    while block := file.read(BLOCK_BYTES):
        if offset == held_size == 0:
            start = check_utf8(file.name, block)
            block, offset = start, len(block) - len(start)
        held.append(block)
        held_size += len(block)
        if b"\n" in block:
            *complete, rest = b"".join(held).split(b"\n")
            for line in complete:
                yield _decoded(file.name, line, offset)
                offset += len(line) + 1
            number += len(complete)
            held, held_size = [rest], len(rest)
        while held_size > limit:
            if report is None:
                raise UserError(f"{file.name}: line {number} is longer than {limit >> 20} MiB")
            line = b"".join(held)
            place = _cut_place(line, limit)
            report.cut_lines += 1
            yield _decoded(file.name, line[:place], offset)
            held, held_size, offset = [line[place:]], held_size - place, offset + place
    if held_size:
        yield _decoded(file.name, b"".join(held), offset)


def _characters(file: ByteFile) -> Iterator[str]:
    """The characters of a UTF-8 file, in blocks."""
    held, offset, ended = b"", 0, False  # `offset` is the place of `held` in the file
    while not ended:
        block = file.read(BLOCK_BYTES)
        ended = not block
        if offset == len(held) == 0:
            start = check_utf8(file.name, block)
            block, offset = start, len(block) - len(start)
        held += block
        try:
            text, used = codecs.utf_8_decode(held, "strict", ended)
        except UnicodeDecodeError as error:
            raise _invalid_utf8(file.name, held, offset, error) from None
        if text:
            yield text
        held, offset = held[used:], offset + used


def _cut_place(line: bytes, limit: int) -> int:
    """Where to cut a long line: after the last space within the limit, otherwise between two characters."""
    if (space := line.rfind(b" ", 0, limit)) > 0:
        return space + 1
    place = limit
    while place > limit - 4 and line[place] & 0xC0 == 0x80:  # a byte inside a character
        place -= 1
    return place


def _decoded(name: str, line: bytes, offset: int) -> str:
    try:
        return line.decode("utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise _invalid_utf8(name, line, offset, error) from None


def _invalid_utf8(name: str, data: bytes, offset: int, error: UnicodeDecodeError) -> UserError:
    place, bad = offset + error.start, data[error.start]
    return UserError(f"{name}: invalid UTF-8 at byte {place:,} (0x{bad:02x}, counted from 0); {TO_UTF8}")


# ------------------------------------------------------------------------------------------------------- rows


def _parquet_texts(file: ByteFile, path: Path, text_field: str) -> Iterator[str]:
    """The texts of a column; rows without one are skipped."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file.name}: reading Parquet needs: pip install 'electra-core[parquet]'") from None
    compressed = path.suffix != ".parquet"
    with tempfile.TemporaryFile() if compressed else open(path, "rb") as stream:
        if compressed:  # compressed as a whole, but Parquet is read from its end
            _copy(file, stream)
            stream.seek(0)
        try:
            table = pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=BLOCK_BYTES)
            names = table.schema_arrow.names
            column_of(file.name, names, text_field)
            kind = table.schema_arrow.field(text_field).type
            if kind not in (pyarrow.string(), pyarrow.large_string()):
                raise UserError(f"{file.name}: column {text_field!r} holds {kind}, not text")
            rows = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                rows += batch.num_rows
                file.position = path.stat().st_size * rows // max(rows, table.metadata.num_rows)
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
        except (pyarrow.ArrowException, OSError) as error:  # the library raises either for damaged contents
            reason = " ".join(str(error).split())
            raise UserError(f"{file.name}: not a readable Parquet file ({reason})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{file.name}: invalid UTF-8 in column {text_field!r} ({error})") from None


def _pieces(text: str, report: ReadReport) -> Iterator[str]:
    """The lines of a row's text, long ones cut. Lone surrogates, which JSON can contain, become U+FFFD."""
    if _LONE_SURROGATE.search(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for line in text.split("\n"):
        start = 0
        while len(line) - start > MAX_LINE:
            end = line.rfind(" ", start, start + MAX_LINE) + 1 or start + MAX_LINE
            report.cut_lines += 1
            yield line[start:end]
            start = end
        if line := line[start:].strip():
            yield line


def _bounded(documents: Iterable[Iterable[str]], report: ReadReport) -> Iterator[list[str]]:
    """Documents as lists of lines; those beyond the limit are cut between lines."""
    for lines in documents:
        document: list[str] = []
        size = 0
        for line in lines:
            if document and size + len(line) > MAX_DOCUMENT_CHARACTERS:
                report.cut_documents += 1
                yield document
                document, size = [], 0
            document.append(line)
            size += len(line)
        if document:
            yield document


def spool(source: Source, folder: Path) -> Source:
    """Standard input or another pipe as a file under `folder`, to be read more than once."""
    kind = text_kind(source.path.name) if source.path else None
    with (
        ByteFile(source.name, source.path) as file,
        tempfile.NamedTemporaryFile(dir=folder, suffix=kind or ".txt", delete=False) as target,
    ):
        _copy(file, target)
    return Source(source.name, Path(target.name))


def _copy(file: ByteFile, target: Any) -> None:
    shutil.copyfileobj(file, target, BLOCK_BYTES)


def document_hash(document: Sequence[str], seed: int, purpose: bytes) -> int:
    """64 pseudo-random bits that depend only on the text, `seed` and `purpose`."""
    digest = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little"), person=purpose)
    digest.update("\n".join(document).encode())
    return int.from_bytes(digest.digest(), "little")
