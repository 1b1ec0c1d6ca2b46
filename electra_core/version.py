"""Which code this is: the version's number, and a digest of the sources."""

from __future__ import annotations

import functools
import hashlib
from importlib.util import find_spec
from pathlib import Path

from electra_core import __version__

PACKAGES = ("electra_core", "electra_kernels")
SOURCES = (".py", ".c", ".h")


@functools.cache
def version() -> str:
    """The version and the first digits of its sources' digest: "0.1.0 (source 1a2b3c4d)".

    The number alone does not tell one commit from the next. A process reads the sources once (about 20 ms).
    """
    folders = [Path(spec.origin).parent for name in PACKAGES if (spec := find_spec(name)) and spec.origin]
    return f"{__version__} (source {source_digest(folders)[:8]})"


def source_digest(folders: list[Path]) -> str:
    """SHA-256 of the Python and C files in `folders`, with their names; an editor's hidden files are no code.

    What is installed from a checkout has the checkout's.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.suffix in SOURCES):
            name = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                content = path.read_bytes()
                digest.update(f"{name.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
