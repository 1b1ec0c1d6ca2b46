"""Finds a tokenizer's file and makes the library's tokenizer of it, for `tokenizer.py`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from electra_core.errors import UserError
from electra_core.files.text_lines import text_problem
from electra_core.hub.folder_files import inside, read_bytes
from electra_core.hub.model_places import find_model, is_name
from electra_core.hub.tokenizer_parts import read_pieces

log = logging.getLogger("electra_core")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "spiece.model")
XLM_R_FILE = "sentencepiece.bpe.model"


def tokenizer_file(path: Path) -> Path:
    """The file that `load_tokenizer` opens for a path or name. Only one that was itself named may be a link.

    Raises:
        UserError: there is none, or its folder has it as a link to elsewhere (`folder_files.inside`).
    """
    if is_name(path) and path.suffix not in {Path(name).suffix for name in TOKENIZER_FILES}:
        path = find_model(path)
    if path.is_dir():
        found = next((name for name in TOKENIZER_FILES if (path / name).is_file()), None)
        if found is not None:
            return inside(path, found)
        if (of_run := find_model(path)) != path:
            return tokenizer_file(of_run)
        hint = f"; {path / 'tokenizer'} may be meant" if (path / "tokenizer").is_dir() else ""
        if (path / XLM_R_FILE).is_file():
            hint = f"; {XLM_R_FILE} is a vocabulary as XLM-R's, without ELECTRA's [CLS], [SEP] and [MASK]"
        raise UserError(f"{path}: none of {', '.join(TOKENIZER_FILES)} in this folder{hint}")
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer")
    return path


def spiece_model_beside(path: Path) -> bytes | None:
    """The contents of the `spiece.model` beside a `tokenizer.json`; None without one, or, with a warning, if it is
    something else."""
    spiece = path.with_name("spiece.model")
    if not spiece.is_file():
        return None
    content = read_bytes(inside(spiece.parent, spiece.name))
    try:
        read_pieces(content)
    except ValueError as error:
        log.warning(f"{spiece}: not a SentencePiece model, so it is not used ({error})")
        return None
    return content


def engine_of(content: str) -> tokenizers.Tokenizer:
    """The library's tokenizer for the contents of a `tokenizer.json`, without padding and truncation.

    Raises:
        UserError: not such a file.
    """
    with library_errors("not a tokenizer.json"):
        engine = tokenizers.Tokenizer.from_str(content)
    engine.no_padding()  # files from the Hub may ask for either; here the caller decides
    engine.no_truncation()
    return engine


@contextmanager
def valid_unicode(texts: Sequence[str]) -> Iterator[None]:
    """Raises a UserError that says where the first surrogate is (a non-UTF-8 byte on a command line, half of a
    character in JSON), which old versions of the library drop; turns the library's errors into one, too."""
    for text in texts:
        if isinstance(text, str) and not text.isascii() and (problem := text_problem(text)):
            raise UserError(f"the text is {problem}")
    with library_errors("this tokenizer cannot encode the text"):
        yield


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns the library's errors into a UserError: plain Exceptions, and panics, which are not even Exceptions."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({error!s:.200})") from None
