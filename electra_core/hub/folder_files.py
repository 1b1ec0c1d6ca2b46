"""Reads the small files of a model directory, which may come from a stranger: no link leads out of it.

What a link to somebody's private file brings in may be written into the next model, and published with it. So
whatever is read from such a directory is read through `inside`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from electra_core.errors import UserError, reading
from electra_core.files.byte_files import refuse_pointer
from electra_core.files.json_files import read_json

_LARGEST_JSON = 64 << 20  # bytes; the index of a very large model has a few hundred kilobytes


def inside(directory: Path, name: str) -> Path:
    """`directory / name`, checked to be an existing file inside the directory.

    Raises:
        UserError: it is missing, not a file, a Git LFS pointer, or a link out of the directory. The Hub's cache,
            where `models--NAME/snapshots/REVISION/` holds links into `models--NAME/blobs/`, is allowed.
    """
    path = directory / name
    if Path(name).name != name or name in ("", ".."):
        raise UserError(f"{directory}: {name!r} is not the name of a file in this directory")
    if not os.path.isfile(path):  # unlike path.is_file, also for names that no file can have
        raise UserError(f"{path}: no such file")
    home, real = directory.resolve(), path.resolve()
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise UserError(
            f"{path}: a link out of its directory; if you trust it, copy the folder: cp -rL {directory} NEW"
        )
    refuse_pointer(path)
    return path


def read_bytes(path: Path) -> bytes:
    """The contents of a file, which may be a link: for one that the user named, or that `inside` has checked.

    Raises:
        UserError: it is missing, unreadable, or a Git LFS pointer.
    """
    refuse_pointer(path)
    with reading(path):
        return path.read_bytes()


def read_json_object(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of the directory.

    Raises:
        UserError: the file is missing, unreadable, too large, or not a JSON object.
    """
    path = inside(directory, name)
    if path.stat().st_size > _LARGEST_JSON:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes is too large for a {name}")
    try:
        with reading(path):
            value = read_json(path)
    except ValueError as error:  # also invalid UTF-8
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
