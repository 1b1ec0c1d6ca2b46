"""Reads TOML files, where every failure is a `UserError`, and writes settings as TOML."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from electra_core.errors import UserError, reading

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path | str) -> dict[str, Any]:
    """The contents of the file.

    Raises:
        UserError: the file is missing, unreadable, or not TOML.
    """
    try:
        with reading(path):
            return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from None


def read_table(path: Path | str, name: str) -> dict[str, Any]:
    """One table of the file; empty if it has none of that name.

    Raises:
        UserError: as `read_toml`, or the name is that of something else.
    """
    table = read_toml(path).get(name, {})
    if not isinstance(table, dict):
        raise UserError(f"{path}: [{name}] is a table")
    return table


def to_toml(values: Mapping[str, Any]) -> str:
    """A line for each value, a text, number or bool, which TOML writes as JSON does."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
