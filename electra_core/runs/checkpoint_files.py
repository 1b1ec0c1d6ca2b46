"""The files in RUN/checkpoints: which checkpoints there are, and what their records say.

`checkpoint.py` writes and restores them. Nothing here needs torch, which takes seconds to import, because `electra
status` reads them, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def folder_name(step: int) -> str:
    """Name of the folder of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Folders of the checkpoints under RUN/checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


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
    """The contents of state.json, checked against their own checksum."""
    record = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if record.pop("sha256_of_this") != record_digest(record):
        raise ValueError("the checksum of state.json does not match")
    return record


def record_digest(record: Mapping[str, Any]) -> str:
    """The checksum that state.json holds of itself as `sha256_of_this`."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
