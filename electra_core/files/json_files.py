"""Reads JSON files that somebody else may have written, and identifies JSON values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The value in the file.

    Raises:
        OSError: it is missing, unreadable, or not a file (a FIFO would be waited for).
        ValueError: it is not JSON, or nested too deeply.
    """
    if path.exists() and not path.is_file():
        raise OSError("not a regular file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def digest_of(value: Any, *, sort_keys: bool = False) -> str:
    """SHA-256 of a JSON value, as `json.dumps` writes it."""
    return hashlib.sha256(json.dumps(value, sort_keys=sort_keys).encode()).hexdigest()
