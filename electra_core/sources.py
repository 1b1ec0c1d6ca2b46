"""Which files a corpus is made of: found, told apart from others, and shared out among machines."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from electra_core.byte_files import COMPRESSED_SUFFIXES
from electra_core.errors import UserError

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
ENDS_BYTES = 1 << 16


class Source(NamedTuple):
    """A file to read and what messages call it; `path` None is standard input."""

    name: str
    path: Path | None
    may_be_empty: bool = False

    @property
    def is_regular(self) -> bool:
        """Whether it can be read twice: neither standard input nor another pipe."""
        return self.path is not None and self.path.is_file()

    @property
    def size(self) -> int | None:
        """Bytes on disk."""
        return None if self.path is None else self.path.stat().st_size


def find_sources(paths: Sequence[str | Path]) -> list[Source]:
    """The files that `paths` mean: "-" is standard input, folders are searched recursively in sorted order.

    Hidden files and folders inside a folder are left out.

    Raises:
        UserError: a path does not exist, a folder cannot be searched or has no text in it, "-" comes twice.
    """
    sources: list[Source] = []
    for path in map(str, paths):
        if path == "-":
            sources.append(Source("standard input", None))
        elif os.path.isdir(path):
            sources += _inside(path)
        elif os.path.exists(path):
            sources.append(Source(path, Path(path)))
        else:
            raise UserError(f"{path}: there is no such file or folder")
    if sum(source.path is None for source in sources) > 1:
        raise UserError("standard input (-) can be read only once")
    if not sources:
        raise UserError("no text file was given")
    return sources


def _inside(folder: str) -> list[Source]:
    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    found: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in files if not name.startswith(".") and text_kind(name)]
    if not found:
        raise UserError(f"{folder}: no {', '.join(TEXT_SUFFIXES)} file in this folder")
    return [Source(path, Path(path), may_be_empty=True) for path in sorted(found)]


def text_kind(name: str) -> str | None:
    """Which of TEXT_SUFFIXES a file name has, below a suffix of compression; None if none of them."""
    stem = name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        stem = stem.removesuffix(suffix)
    return next((suffix for suffix in TEXT_SUFFIXES if stem.endswith(suffix)), None)


def share(sources: Sequence[Source], part: int, parts: int) -> list[Source]:
    """The files of one part, in order: about as many bytes in each, none in two, at least one file in each.

    Raises:
        UserError: no such part, standard input, or fewer files than parts.
    """
    if not 1 <= part <= parts:
        raise UserError(f"part {part} of {parts}: expected 1 to {parts}")
    if not all(source.is_regular for source in sources):
        raise UserError("standard input and other pipes cannot be cut into parts")
    if len(sources) < parts:
        raise UserError(
            f"{parts} parts of {len(sources)} files: a file is not cut, so there are at most as many parts"
        )
    ends = np.cumsum([source.size or 0 for source in sources])
    borders = [0]
    for number in range(1, parts):
        border = int(np.searchsorted(ends, ends[-1] * number / parts)) + 1
        borders.append(min(max(border, borders[-1] + 1), len(sources) - (parts - number)))
    return list(sources[borders[part - 1] : (*borders, len(sources))[part]])


def describe(source: Source) -> dict[str, Any]:
    """What a file is known by on every machine: its name, size, and first and last ENDS_BYTES (None of a pipe)."""
    ends = _ends_digest(source.path) if source.is_regular and source.path else None
    return {"name": Path(source.name).name, "bytes": source.size, "ends_sha256": ends}


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _ends_digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            digest.update(file.read(ENDS_BYTES))
            file.seek(max(0, path.stat().st_size - ENDS_BYTES))
            digest.update(file.read(ENDS_BYTES))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()
