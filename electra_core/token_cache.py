"""Tokenised training data on disk, so that the next run on the same data does not tokenise again.

An entry is named by a hash of all that decides its content: the examples themselves (not the file's name or time),
the task's settings, the tokenizer and the version of this format. So nothing can be stale, and runs may share a
folder: an entry is written under a name of its own and moved into place, whole or not at all. A damaged entry
counts as none. Whoever needs room may delete the folder at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from electra_core.downstream import Task
from electra_core.features import Features
from electra_core.notices import Say
from electra_core.task_files import task_to_json
from electra_core.tokenizer import Tokenizer

VERSION = 3
"""Of how examples are encoded and stored; 1 cut the other order of a pair as the pair itself, 2 cut texts
to judge by where their spans end."""
SMALLEST = 5000
"""Fewer examples are tokenised in about a second: not worth a file."""


def default_folder() -> Path | None:
    """`tokens/` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache); None for who has none."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "electra-core" / "tokens"
    except RuntimeError:  # in a container, a user without a name
        return None


def cached(
    folder: Path | str | None,
    task: Task,
    examples: Sequence[Any],
    tokenizer: Tokenizer,
    training: bool,
    encode: Callable[[], Features],
    say: Say,
) -> Features:
    """What `encode` returns, from the folder if it is there; else computed and kept.

    Args:
        folder: None means no cache.
        say: is told where the data came from, or why they could not be kept. A cache that cannot be written is
            no reason to stop.
    """
    if folder is None or len(examples) < SMALLEST:
        return encode()
    path = Path(folder) / f"{fingerprint(task, examples, tokenizer, training)}.safetensors"
    if (found := _load(path)) is not None:
        say(f"{len(examples):,} tokenised examples from {path}")
        return found
    features = encode()
    try:
        _save(features, path)
    except OSError as error:
        say(f"{folder}: tokenised data cannot be cached ({error.strerror or error})")
    return features


def fingerprint(task: Task, examples: Sequence[Any], tokenizer: Tokenizer, training: bool = False) -> str:
    """A hash of all that decides what the examples are encoded to."""
    digest = hashlib.blake2b(digest_size=16)
    facts = [VERSION, type(tokenizer).__name__, tokenizer.to_json(), task_to_json(task), training]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for example in examples:  # dataclasses of plain values: their repr is their content
        digest.update(repr(example).encode("utf-8", errors="surrogatepass") + b"\n")
    return digest.hexdigest()


def _load(path: Path) -> Features | None:
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            return Features.from_arrays(arrays, json.loads((file.metadata() or {})["features"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def _save(features: Features, path: Path) -> None:
    """Writes the entry; features that keep more than numbers (the dev data of questions) are left out."""
    stored = features.to_arrays()
    if stored is None:
        return
    arrays, facts = stored
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(prefix=path.stem, suffix=".unfinished", dir=path.parent)
    os.close(handle)
    try:
        save_file(arrays, unfinished, metadata={"features": json.dumps(facts)})
        os.replace(unfinished, path)
    except SafetensorError as error:  # how the library tells of a full disk
        raise OSError(str(error)) from None
    finally:
        Path(unfinished).unlink(missing_ok=True)
