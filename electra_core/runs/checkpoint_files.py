"""The files in RUN/checkpoints: which checkpoints there are, and what their records say.

`checkpoint.py` writes and restores them. Nothing here needs torch, which takes seconds to import, because `electra
status` reads them, too.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from electra_core.errors import UserError
from electra_core.files.json_files import digest_of, read_json


def folder_name(step: int) -> str:
    """Name of the folder of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Folders of the checkpoints under RUN/checkpoints, oldest first.

    Raises:
        UserError: they cannot be seen, which must not be taken for a run without any.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(folder / e.name for e in entries if e.name.startswith("step-") and e.is_dir())
    except FileNotFoundError:
        if folder.is_symlink():
            where = os.readlink(folder)
            raise UserError(
                f"{folder}: links to {where}, which is not there; mount it, or remove the link to start anew"
            ) from None
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None


def remove_checkpoints(folder: Path) -> None:
    """Removes the checkpoints under RUN/checkpoints, and the folder if nothing else is in it."""
    for path in checkpoint_folders(folder):
        if (path / "state.safetensors").is_file():
            shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()


def best_checkpoint(folders: Iterable[Path]) -> tuple[Path, float] | None:
    """The checkpoint with the lowest score, and that score; None if no checkpoint has an evaluation."""
    scores = {}
    for path in folders:
        try:
            score = read_record(path).get("score")
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(score, float) and math.isfinite(score):
            scores[path] = score
    best = min(scores, key=lambda path: scores[path], default=None)
    return None if best is None else (best, scores[best])


def read_record(path: Path) -> dict[str, Any]:
    """The contents of state.json, checked against their own checksum.

    Raises:
        OSError, ValueError, KeyError: it is missing or damaged.
    """
    record: dict[str, Any] = read_json(path / "state.json")
    if not isinstance(record, dict):
        raise ValueError("state.json holds no record")
    if record.pop("sha256_of_this") != record_digest(record):
        raise ValueError("the checksum of state.json does not match")
    return record


def record_digest(record: Mapping[str, Any]) -> str:
    """The checksum that state.json holds of itself as `sha256_of_this`."""
    return digest_of(record, sort_keys=True)
