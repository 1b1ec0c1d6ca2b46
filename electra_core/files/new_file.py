"""Writes a small file that appears complete or not at all, or that is on the disk when the call returns."""

from __future__ import annotations

import os
from pathlib import Path


def write_new(path: Path, text: str) -> None:
    """Replaces the file at `path`, if any, by one with this text.

    No link is followed: in a folder that somebody else made, one could lead to any of the user's files.

    Raises:
        OSError: the folder cannot be written to, the disk is full, ...
    """
    new = path.with_name(f".{path.name}.new")
    try:
        new.unlink(missing_ok=True)
        with open(new, "x", encoding="utf-8") as file:
            file.write(text)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_durably(path: Path, text: str) -> None:
    """Writes a small file and waits until it is on the disk."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
