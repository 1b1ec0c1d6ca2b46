"""Labelled data in memory where a file is expected: a list of dicts, a table of pandas, a Hub data set.

They are written to a temporary file of JSON lines and read as every other file is, so the same columns, checks and
complaints hold; these count rows from 1.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from electra_core.columns import ALL_FLAGS
from electra_core.errors import UserError

Rows = Iterable[Mapping[str, Any]]
"""Each with a file's columns by name, "text" and "label" for instance."""

IN_PYTHON = {
    "--id-column none": 'Columns(id="none")',
    "--skip-bad-rows": "skip_bad_rows=True",
    "--encoding cp1252": 'Columns(encoding="cp1252")',
    **{flag: f"Columns({role}=...)" for role, flag in ALL_FLAGS.items()},
}
"""What a message's flags are called where there is no command line."""


@contextmanager
def as_files(
    say: Callable[[str], None], **data: str | Path | Rows | None
) -> Iterator[tuple[dict[str, Any], Callable[[str], None]]]:
    """Paths as they are, and what is in memory as files that are there inside.

    Args:
        say: takes lines for the user.
        data: by name; the files have it, in messages, too.

    Yields:
        The paths by name, and `say` for lines in which they occur.

    Raises:
        ValueError: rows that are no dicts, or hold what JSON has no form for.
    """
    with tempfile.TemporaryDirectory() as folder:

        def short(line: str) -> str:
            return line.replace(f"{folder}{os.sep}", "")

        paths: dict[str, Any] = {}
        for name, source in data.items():
            in_memory = source is not None and not isinstance(source, (str, os.PathLike))
            paths[name] = _written(source, name, Path(folder)) if in_memory else source  # type: ignore[arg-type]
        try:
            yield paths, lambda line: say(short(line))
        except UserError as error:
            said = short(str(error))
            if any(path is not source for path, source in zip(paths.values(), data.values())):
                for flag, name in IN_PYTHON.items():
                    said = said.replace(flag, name)
            raise UserError(said) from None


def _written(rows: Rows, name: str, folder: Path) -> Path:
    path = folder / f"{name}.jsonl"
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a table of pandas iterates over its columns' names
        rows = rows.to_dict("records")
    if not isinstance(rows, Iterable):
        raise ValueError(f"{name}: expected a file or rows, got {type(rows).__name__}")
    with path.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for number, row in enumerate(rows, 1):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"{name}: expected a dict for row {number}, got {type(row).__name__}: {row!r:.60}"
                )
            try:
                line = json.dumps({str(column): _plain(value) for column, value in row.items()}, default=_plain)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: row {number}: {error}") from None
            file.write(line + "\n")
    return path


def _plain(value: Any) -> Any:
    """As JSON has it: NumPy's values as Python's, no number (pandas' missing value) as none."""
    if isinstance(value, (float, str, int, list, dict, type(None))) and type(value).__module__ == "builtins":
        return None if isinstance(value, float) and math.isnan(value) else value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, tuple):
        return list(value)
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    raise TypeError(f"expected texts, numbers and lists of them, got {type(value).__name__}")
