"""What tests of readers share: files to read, and what a refusal says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from electra_core.errors import UserError
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.tagged_files import read_tagged


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def write_lines(path: Path, *lines: str) -> Path:
    return write(path, "\n".join(lines) + "\n")


def json_lines(path: Path, *rows: object) -> Path:
    return write_lines(path, *(row if isinstance(row, str) else json.dumps(row) for row in rows))


def refused(read: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """What `read`, or the iterator that it returns, complains of: a UserError in one line."""
    with pytest.raises(UserError) as caught:
        list(read(*arguments, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def words_to_predict(path: Path, columns: Columns | None = None) -> list[list[str]]:
    return [list(example.words) for example in read_tagged(path, columns, labelled=False)]
