"""Files that file managers leave in any folder they show: macOS's .DS_Store and ._NAME, Windows' Thumbs.db.

They are nobody's data. A folder that holds nothing else counts as empty, and they go with a folder that is
replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CLUTTER = (".ds_store", "thumbs.db", "desktop.ini")
"""Names, in lower case."""
BESIDE = "._"
"""Begins the name of what macOS puts beside a file on a disk or in an archive that is not its own."""


def is_clutter(name: str) -> bool:
    """Whether a file manager wrote the file of this name.

    >>> [is_clutter(name) for name in (".DS_Store", "._model.safetensors", "model.safetensors")]
    [True, True, False]
    """
    return name.lower() in CLUTTER or name.startswith(BESIDE)


def entries(folder: Path, pattern: str = "") -> Iterator[Path]:
    """What lies in the folder, or only what has a name of this pattern; without clutter."""
    found = folder.glob(pattern) if pattern else folder.iterdir()
    return (path for path in found if not is_clutter(path.name))
