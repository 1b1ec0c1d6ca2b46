"""What lies beside a vocabulary in a folder of the Hub: case and accents, added words, how words are cut.

`vocab.txt` is a list and says nothing of these; `tokenizer.json` says everything, but where the case is named in
`tokenizer_config.json`, too, `transformers` goes by that.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, normalizers

from electra_core.errors import UserError
from electra_core.tokenizer_parts import SPECIAL_TOKENS, bert_normalizer

log = logging.getLogger("electra_core")
BERT_CLASSES = ("ElectraTokenizer", "ElectraTokenizerFast", "BertTokenizer", "BertTokenizerFast")
ANY_CLASS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names of those that do as tokenizer.json says."""
BASIC = "basic"
"""BERT's own way to cut words: at white space and punctuation."""


def read_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, {} without one; its `tokenizer_class` may stand in `config.json`.

    Raises:
        UserError: unreadable.
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
    """Raises UserError for a `vocab.txt` whose texts are cut into words in another way than BERT's."""
    name, cutter = config.get("tokenizer_class"), config.get("word_tokenizer_type")
    if name in (None, *BERT_CLASSES, *ANY_CLASS) and cutter in (None, BASIC):
        return
    by = f" with {cutter}" if cutter else ""
    raise UserError(
        f"{where}: its tokenizer is a {name or 'tokenizer'} that splits words{by}, which is not supported; "
        f"expected {', '.join(BERT_CLASSES[::2])} ({BASIC}), or a folder with tokenizer.json"
    )


def normalizer_of(config: dict[str, Any]) -> normalizers.Normalizer:
    """BERT's, as the config says, with the Hub's defaults."""
    lowercase, chinese = config.get("do_lower_case", True), config.get("tokenize_chinese_chars", True)
    accents = config.get("strip_accents")
    return bert_normalizer(bool(lowercase), accents if accents is None else bool(accents), bool(chinese))


def follow_config(engine: tokenizers.Tokenizer, config: dict[str, Any], where: Path) -> None:
    """Normalises as the config says, if that names the case: so does the Hub, whatever tokenizer.json has."""
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
        UserError: unreadable, or their ids do not follow the vocabulary's.
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
