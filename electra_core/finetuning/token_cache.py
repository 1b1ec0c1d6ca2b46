"""Caches tokenised data on disk, so that the next run on the same data does not tokenise it again.

An entry is named by a hash of everything that determines its content: the examples themselves (not the file's name
or time), the task's settings, the tokenizer and the version of this format. So nothing can be stale, and runs may
share a folder: an entry is written under a temporary name and moved into place, whole or not at all. A damaged
entry is ignored. The folder may be deleted at any time.
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

from electra_core.downstream.interface import Task
from electra_core.downstream.task_files import task_to_json
from electra_core.labelled_data.features import Features
from electra_core.runs.notices import Say
from electra_core.tokenizer import Tokenizer

VERSION = 3
"""Version of the encoding and its storage. Version 1 truncated a pair's reversed order like the pair itself; 2
split texts for evaluation where their spans end."""
SMALLEST = 5000
"""Fewer examples are not worth a file: they are tokenised in about a second."""


def default_folder() -> Path | None:
    """`tokens/` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache); None if the user has neither."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "electra-core" / "tokens"
    except RuntimeError:  # a user without a name or home, as in a container
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
    """What `encode` returns: loaded from the folder if it is there, otherwise computed and stored.

    Args:
        folder: None means no cache.
        say: gets where the data came from, or why they could not be stored. A cache that cannot be written does
            not stop the run.
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
    """A hash of everything that determines how the examples are encoded."""
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
    """Writes the entry, unless the features hold more than numbers, as the dev data of questions do."""
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
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(str(error)) from None
    finally:
        Path(unfinished).unlink(missing_ok=True)
