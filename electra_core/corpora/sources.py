"""Finds the files that a corpus is made of, and divides them among machines."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from electra_core.errors import UserError, option, reading
from electra_core.files.byte_files import COMPRESSED_SUFFIXES

TEXT_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")
"""Suffixes of files that are read as text wherever they are."""
TABLE_SUFFIXES = (".json", ".csv", ".tsv")
"""Suffixes of files of rows that, next to text files, may hold metadata: they are skipped in such folders."""
UNREADABLE = {
    "unpack it first": (".zip", ".tar", ".tgz", ".7z", ".rar"),
    "unpack it, or pack it as .gz, .xz or .zst": (".bz2", ".lz4", ".lzma", ".br"),
    "save its rows as .parquet or .jsonl": (".arrow", ".feather", ".avro", ".orc", ".sqlite", ".db", ".pkl"),
    "save its table as .csv": (".xlsx", ".xls", ".ods"),
    "save its text as .txt": (".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub"),
    "save its text, without the tags, as .txt": (".html", ".htm", ".xhtml", ".xml"),
}
"""Advice -> suffixes of the files that cannot be read."""
ENDS_BYTES = 1 << 16

log = logging.getLogger(__name__)


class Source(NamedTuple):
    """A file to read and its name in messages; `path` None is standard input."""

    name: str
    path: Path | None
    may_be_empty: bool = False

    @property
    def is_regular(self) -> bool:
        """Whether it can be read twice: neither standard input nor another pipe."""
        return self.path is not None and self.path.is_file()

    @property
    def size(self) -> int | None:
        """Bytes on disk; None for standard input and other pipes."""
        return self.path.stat().st_size if self.path and self.is_regular else None


def find_sources(paths: str | Path | Sequence[str | Path]) -> list[Source]:
    """The files that `paths` name: "-" is standard input, folders are searched recursively in sorted order.

    In a folder, hidden files and folders are left out, and so are files without one of TEXT_SUFFIXES (or, if none
    has one, of TABLE_SUFFIXES); their number is logged. A file given by name and without a known suffix is read as
    plain text, which is also logged.

    Raises:
        UserError: a path does not exist, a folder cannot be searched or holds no text, a file has a format that
            cannot be read, "-" or a file is given twice.
    """
    sources: list[Source] = []
    plain: list[str] = []
    for path in map(str, [paths] if isinstance(paths, str | Path) else paths):
        if path == "-":
            sources.append(Source("standard input", None))
        elif os.path.isdir(path):
            sources += _inside(path)
        elif os.path.exists(path):
            plain += _named(path)
            sources.append(Source(path, Path(path)))
        else:
            raise UserError(f"{path}: no such file or folder")
    if sum(source.path is None for source in sources) > 1:
        raise UserError(f"{option('text')}: standard input (-) can be read only once")
    if twice := _given_twice(sources):
        raise UserError(f"{twice}: given twice, by itself or in a folder; its text would count twice")
    if not sources:
        raise UserError("no text file given")
    if plain:
        log.info("%s: no known suffix, read as plain text", plain[0] if len(plain) == 1 else _counted(plain))
    return sources


def _given_twice(sources: Iterable[Source]) -> str | None:
    seen: set[str] = set()
    for source in sources:
        if source.is_regular and source.path:
            real = os.path.realpath(source.path)
            if real in seen:
                return source.name
            seen.add(real)
    return None


def _named(path: str) -> list[str]:
    """The path, if it has no known suffix; UserError if its format cannot be read."""
    suffix = _suffix(path)
    for advice, suffixes in UNREADABLE.items():
        if suffix in suffixes:
            raise UserError(f"{path}: {suffix} files cannot be read; {advice}")
    return [] if text_kind(path) else [path]


def _inside(folder: str) -> list[Source]:
    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    found: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in files if not name.startswith(".")]
    for suffixes in (TEXT_SUFFIXES, TABLE_SUFFIXES):
        if taken := sorted(path for path in found if text_kind(path) in suffixes):
            break
    else:
        there = f"; found {_counted(found)}" if found else ""
        raise UserError(f"{folder}: no {', '.join(TEXT_SUFFIXES + TABLE_SUFFIXES)} file in this folder{there}")
    if skipped := set(found).difference(taken):
        log.info("%s: skipped %s (to read such a file, name it)", folder, _counted(skipped))
    return [Source(path, Path(path), may_be_empty=True) for path in taken]


def _counted(paths: Iterable[str]) -> str:
    """Number of files by suffix, as text."""
    counts = sorted(Counter(_suffix(path) or "without suffix" for path in paths).items())
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts)


def _suffix(path: str) -> str:
    """A file's suffix in lower case, compression aside; "" if it has none."""
    return os.path.splitext(_uncompressed(path))[1]


def _uncompressed(path: str) -> str:
    name = os.path.basename(path).lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def text_kind(name: str) -> str | None:
    """Which of TEXT_SUFFIXES and TABLE_SUFFIXES a file has, compression aside; None if none of them."""
    name = _uncompressed(name)
    return next((suffix for suffix in TEXT_SUFFIXES + TABLE_SUFFIXES if name.endswith(suffix)), None)


def share(sources: Sequence[Source], part: int, parts: int) -> list[Source]:
    """The files of one part, in order: parts are disjoint, of about equal size, with at least one file each.

    Raises:
        UserError: no such part, standard input, or fewer files than parts.
    """
    if not 1 <= part <= parts:
        raise UserError(f"{option('shard')} {part}/{parts}: expected a part from 1 to {parts}")
    if not all(source.is_regular for source in sources):
        raise UserError(f"{option('shard')}: standard input and other pipes cannot be divided into parts")
    if len(sources) < parts:
        raise UserError(f"{option('shard')}: expected at most as many parts as files, {len(sources)}, got {parts}")
    ends = np.cumsum([source.size or 0 for source in sources])
    borders = [0]
    for number in range(1, parts):
        border = int(np.searchsorted(ends, ends[-1] * number / parts)) + 1
        borders.append(min(max(border, borders[-1] + 1), len(sources) - (parts - number)))
    return list(sources[borders[part - 1] : (*borders, len(sources))[part]])


def describe(source: Source) -> dict[str, Any]:
    """What identifies a file on any machine: name, size, digest of first and last ENDS_BYTES (None for a pipe)."""
    ends = _ends_digest(source.path) if source.is_regular and source.path else None
    known = {"name": Path(source.name).name, "bytes": source.size, "ends_sha256": ends}
    kind = text_kind(source.path.name) if source.path else None
    if kind in (".ndjson", *TABLE_SUFFIXES):  # earlier versions read these as plain text
        known["read_as"] = kind
    return known


def _ends_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with reading(path), open(path, "rb") as file:
        digest.update(file.read(ENDS_BYTES))
        file.seek(max(0, path.stat().st_size - ENDS_BYTES))
        digest.update(file.read(ENDS_BYTES))
    return digest.hexdigest()
