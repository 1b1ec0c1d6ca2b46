"""Which folders may be written, or with `--overwrite` replaced, by `prepare`."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from electra_core.corpora.shards import SPLITS
from electra_core.errors import UserError, listed, option
from electra_core.files.clutter import entries
from electra_core.hub.tokenizer_loading import TOKENIZER_FILES

SHOWN_FILES = 3


class Kind(NamedTuple):
    """A kind of folder that `prepare` writes."""

    name: str
    mark: str
    """The file by which it is known."""
    files: tuple[str, ...]
    """Patterns of everything that may be in it."""


CORPUS = Kind(
    "prepared corpus", "manifest.json", ("manifest.json", "tokenizer", *(f"{split}-*.*" for split in SPLITS))
)
TOKENIZER = Kind("tokenizer", "tokenizer.json", (*TOKENIZER_FILES, "tokenizer_config.json"))


def check_target(out: Path, inputs: Iterable[Path], overwrite: bool, kind: Kind) -> None:
    """Raises UserError unless `out` is new, empty, or one of its `kind` that may be replaced: it holds no input,
    and nothing but what such a folder is made of."""
    if not out.exists() or (out.is_dir() and not any(entries(out))):
        return
    if not (out / kind.mark).is_file():
        raise UserError(f"{out}: exists and is not a {kind.name}; choose another {option('out')}")
    names = sorted(path.name for path in entries(out))
    others = [name for name in names if not any(fnmatch(name, pattern) for pattern in kind.files)]
    if not overwrite and not others:
        raise UserError(f"{out}: already holds a {kind.name}; {option('overwrite')} replaces it")
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{path}: is inside {out}, which would be overwritten")
    if others:
        raise UserError(
            f"{out}: holds more than a {kind.name} ({listed(others, SHOWN_FILES)}), which would be lost; choose "
            f"another {option('out')}"
        )
