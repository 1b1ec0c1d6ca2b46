"""Reads the settings beside a vocabulary in a folder from the Hub: case and accents, added words, word splitting.

`vocab.txt` is a list and says nothing about these; `tokenizer.json` says everything, but where
`tokenizer_config.json` also names case, accents, Chinese characters or special tokens, `transformers` follows it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, normalizers

from electra_core.errors import UserError
from electra_core.hub.folder_files import read_json_object
from electra_core.hub.tokenizer_parts import SPECIAL_TOKENS, bert_normalizer, register

log = logging.getLogger("electra_core")
BERT_CLASSES = ("ElectraTokenizer", "ElectraTokenizerFast", "BertTokenizer", "BertTokenizerFast")
ANY_CLASS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names of the tokenizer classes that follow tokenizer.json."""
BASIC = "basic"
"""BERT's own word splitting: at white space and punctuation."""
NAMES = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS}
"""`cls_token` -> [CLS], and so on."""
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
MORE = ("extra_special_tokens", "additional_special_tokens")
"""Lists of further special tokens, as versions 5 and 4 of `transformers` call them."""


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`, if any; `tokenizer_class` may also come from `config.json`.

    Special tokens may also come from `special_tokens_map.json`; like `transformers`, we do not read it beside an
    `added_tokens_decoder`, which is newer.

    Raises:
        UserError: a file is unreadable.
    """
    config = _read(folder / "tokenizer_config.json")
    if config.get("tokenizer_class") is None:
        config["tokenizer_class"] = _read(folder / "config.json").get("tokenizer_class")
    if "added_tokens_decoder" not in config:
        named = _read(folder / "special_tokens_map.json")
        config |= {name: named[name] for name in NAMES if name in named}
        config |= {name: [*_items(config.get(name)), *_items(named.get(name))] for name in MORE}
    return config


def _items(given: Any) -> list[Any]:
    """The tokens of a list, or of an object that names each of them; anything else is left to `add_words`."""
    if isinstance(given, dict):
        return list(given.values())
    return given if isinstance(given, list) else [given] if given is not None else []


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path.parent, path.name) if path.is_file() else {}


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


def check_specials(where: Path, config: dict[str, Any]) -> None:
    """Raises UserError for a special token that the config calls otherwise than ELECTRA's is called."""
    for name, ours in NAMES.items():
        given = config.get(name)
        theirs = given.get("content") if isinstance(given, dict) else given
        if theirs not in (None, ours):
            raise UserError(
                f"{where}: {name} in the files beside it: expected {ours!r}, got {theirs!r}; "
                "other names are not supported"
            )


def normalizer_of(config: dict[str, Any]) -> normalizers.Normalizer:
    """BERT's normaliser with the config's settings and the Hub's defaults."""
    lowercase, chinese = config.get("do_lower_case", True), config.get("tokenize_chinese_chars", True)
    accents = config.get("strip_accents")
    return bert_normalizer(bool(lowercase), accents if accents is None else bool(accents), bool(chinese))


def follow_config(engine: tokenizers.Tokenizer, config: dict[str, Any], where: Path) -> None:
    """Makes the engine normalise as the config says, where that names case, accents or Chinese: so does the Hub.

    If the case is named, what is not named has the Hub's defaults; if not, it stays as the engine has it.
    """
    ours = engine.normalizer
    if config.get("tokenizer_class") in ANY_CLASS or not isinstance(ours, normalizers.BertNormalizer):
        return
    names = ("lowercase", "strip_accents", "handle_chinese_chars")
    keys = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    kept = {} if keys[0] in config else {key: getattr(ours, name) for key, name in zip(keys, names)}
    theirs = normalizer_of({**kept, **config})
    if differing := [name for name in names if getattr(ours, name) != getattr(theirs, name)]:
        engine.normalizer = theirs
        said = ", ".join(f"{name} {getattr(ours, name)} -> {getattr(theirs, name)}" for name in differing)
        log.warning(f"{where}: overridden by the tokenizer_config.json beside it, as on the Hub: {said}")


def add_words(engine: tokenizers.Tokenizer, config: dict[str, Any], vocab: Path) -> None:
    """Adds the words of `added_tokens.json` or of `added_tokens_decoder` in the config, and its special tokens.

    Raises:
        UserError: a file is unreadable, or the words' ids do not follow the vocabulary's.
    """
    listed = _read(vocab.with_name("added_tokens.json"))
    try:
        special = [_special(given) for name in MORE for given in _items(config.get(name))]
        names = {token.content for token in special}
        added = {number: AddedToken(word, special=word in names) for word, number in listed.items()}
        for number, given in (config.get("added_tokens_decoder") or {}).items():
            added[int(number)] = AddedToken(given["content"], **_flags(given))
        in_order = [added[number] for number in sorted(added) if added[number].content not in SPECIAL_TOKENS]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{vocab}: the files beside it list added tokens in an unknown format") from None
    engine.add_tokens(in_order)
    register(engine, special)
    for number, token in added.items():
        if (found := engine.token_to_id(token.content)) != number:
            raise UserError(
                f"{vocab}: the added token {token.content!r} has id {number} in the files beside it, "
                f"expected {found}"
            )


def _special(given: Any) -> AddedToken:
    """A special token given by its name, or by an object with its name and what white space it takes in.

    Raises:
        KeyError, TypeError: another form.
    """
    content, flags = (given["content"], _flags(given)) if isinstance(given, dict) else (given, {})
    return AddedToken(content, **{"normalized": False, **flags, "special": True})


def _flags(given: dict[str, Any]) -> dict[str, bool]:
    return {name: bool(given[name]) for name in _FLAGS if name in given}
