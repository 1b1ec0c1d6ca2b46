"""Reads the settings beside a vocabulary in a folder from the Hub: case and accents, added words, word splitting.

`vocab.txt` is a list and says nothing about these; `tokenizer.json` says everything, but if
`tokenizer_config.json` also names the case, `transformers` follows the latter.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, normalizers

from electra_core.errors import UserError
from electra_core.hub.tokenizer_parts import SPECIAL_TOKENS, bert_normalizer

log = logging.getLogger("electra_core")
BERT_CLASSES = ("ElectraTokenizer", "ElectraTokenizerFast", "BertTokenizer", "BertTokenizerFast")
ANY_CLASS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names of the tokenizer classes that follow tokenizer.json."""
BASIC = "basic"
"""BERT's own word splitting: at white space and punctuation."""


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`, if any; `tokenizer_class` may also come from `config.json`.

    Raises:
        UserError: a file is unreadable.
    """
    config = _read(folder / "tokenizer_config.json")
    if config.get("tokenizer_class") is None:
        config["tokenizer_class"] = _read(folder / "config.json").get("tokenizer_class")
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: cannot be read (expected an object, got {type(content).__name__})")
    return content


def check_words(where: Path, config: dict[str, Any]) -> None:
    """Raises UserError for a `vocab.txt` whose tokenizer splits words differently from BERT's."""
    name, cutter = config.get("tokenizer_class"), config.get("word_tokenizer_type")
    if name in (None, *BERT_CLASSES, *ANY_CLASS) and cutter in (None, BASIC):
        return
    by = f" with {cutter}" if cutter else ""
    raise UserError(
        f"{where}: its tokenizer is a {name or 'tokenizer'} that splits words{by}, which is not supported; "
        f"expected {', '.join(BERT_CLASSES[::2])} ({BASIC}), or a folder with tokenizer.json"
    )


def normalizer_of(config: dict[str, Any]) -> normalizers.Normalizer:
    """BERT's normaliser with the config's settings and the Hub's defaults."""
    lowercase, chinese = config.get("do_lower_case", True), config.get("tokenize_chinese_chars", True)
    accents = config.get("strip_accents")
    return bert_normalizer(bool(lowercase), accents if accents is None else bool(accents), bool(chinese))


def follow_config(engine: tokenizers.Tokenizer, config: dict[str, Any], where: Path) -> None:
    """Makes the engine normalise as the config says, if that names the case: so does the Hub."""
    ours = engine.normalizer
    if config.get("tokenizer_class") in ANY_CLASS or "do_lower_case" not in config:
        return
    if not isinstance(ours, normalizers.BertNormalizer):
        return
    theirs = normalizer_of(config)
    names = ("lowercase", "strip_accents", "handle_chinese_chars")
    if differing := [name for name in names if getattr(ours, name) != getattr(theirs, name)]:
        engine.normalizer = theirs
        said = ", ".join(f"{name} {getattr(ours, name)} -> {getattr(theirs, name)}" for name in differing)
        log.warning(f"{where}: overridden by the tokenizer_config.json beside it, as on the Hub: {said}")


def add_words(engine: tokenizers.Tokenizer, config: dict[str, Any], vocab: Path) -> None:
    """Adds the words of `added_tokens.json` or of `added_tokens_decoder` in the config.

    Raises:
        UserError: a file is unreadable, or the words' ids do not follow the vocabulary's.
    """
    added = {number: AddedToken(word) for word, number in _read(vocab.with_name("added_tokens.json")).items()}
    try:
        for number, given in (config.get("added_tokens_decoder") or {}).items():
            flags = {name: bool(given[name]) for name in _FLAGS if name in given}
            added[int(number)] = AddedToken(given["content"], **flags)
        in_order = [added[number] for number in sorted(added) if added[number].content not in SPECIAL_TOKENS]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{vocab}: the files beside it list added tokens in an unknown format") from None
    engine.add_tokens(in_order)
    for number, token in added.items():
        if (found := engine.token_to_id(token.content)) != number:
            raise UserError(
                f"{vocab}: the added token {token.content!r} has id {number} in the files beside it, "
                f"expected {found}"
            )


_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
