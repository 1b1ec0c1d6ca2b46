"""Text to ids and back: SentencePiece (our vocabularies) and WordPiece (Google's) behind one interface.

Both kinds use the same engine, the `tokenizers` library: it is fast, knows which characters a token covers, and
its `tokenizer.json` is what the Hub's libraries read. `corpora/vocabulary.py` learns vocabularies. SentencePiece's
own file, `spiece.model`, is kept beside `tokenizer.json` and gives the same ids; `hub/tokenizer_parts.py` explains
how.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from electra_core.errors import UserError
from electra_core.files.json_files import digest_of
from electra_core.hub.folder_files import read_bytes
from electra_core.hub.tokenizer_config import (
    NAMES,
    add_words,
    check_specials,
    check_words,
    follow_config,
    normalizer_of,
    read_config,
)
from electra_core.hub.tokenizer_loading import (
    engine_of,
    spiece_model_beside,
    tokenizer_file,
    valid_unicode,
)
from electra_core.hub.tokenizer_parts import (
    LONGEST_WORD,
    SPACE_MARK,
    SPECIAL_TOKENS,
    add_specials,
    bert_normalizer,
    is_plain_wordpiece,
    pieces_model,
    read_pieces,
    sentencepiece_normalizer,
)

BATCH_CHARACTERS = 1 << 22  # encoded at a time
MUCH_UNKNOWN = 0.1
"""Share of [UNK] among the tokens above which the user is warned."""

# Part of the fingerprint: any difference in normalisation changes the ids of something in this text.
_PROBE = "Électra's ﬁrst 50 µV: naïve CAFÉ, ΟΔΟΣ Straße 東京 tō\u00a0x\u200by\u0085z a\u0301 [MASK]▁e-mail"


class Tokenizer:
    """A vocabulary of whole symbols, and the base class of the two kinds that also know parts of words;
    `load_tokenizer` opens one, `corpora/vocabulary.py` learns one with parts.

    Names of special tokens in a text ("[MASK]") become those tokens, as in `transformers`; for the tokenizer from
    `as_plain_text()` they are ordinary characters.

    Raises:
        UserError: a special token is missing.
    """

    kind = ""
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int

    def __init__(self, engine: tokenizers.Tokenizer) -> None:
        vocab = engine.get_vocab()
        if missing := [token for token in SPECIAL_TOKENS if token not in vocab]:
            raise UserError(f"the vocabulary has no {', '.join(missing)}, which ELECTRA needs")
        self._engine = engine
        self.special_ids: tuple[int, ...] = tuple(vocab[token] for token in SPECIAL_TOKENS)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids
        self.vocab_size = max(vocab.values()) + 1
        """One more than the largest id. Some ids below it may be nobody's: a `vocab.txt` that had an entry twice
        became a `tokenizer.json` without the first of them."""

    @property
    def engine(self) -> tokenizers.Tokenizer:
        """The library's tokenizer behind this one; not to be changed."""
        return self._engine

    def check_fits(self, words: int, where: str | Path) -> None:
        """Raises UserError, which begins with `where`, if a model of `words` tokens cannot look up every id."""
        if self.vocab_size > words:
            raise UserError(
                f"{where}: vocabulary sizes differ: {self.vocab_size:,} in the tokenizer, {words:,} in the model"
            )

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without [CLS] and [SEP].

        Raises:
            UserError: the text has lone surrogates, which are not valid Unicode (as in all encoding methods).
        """
        with valid_unicode([text]):
            return self._engine.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores unless TOKENIZERS_PARALLELISM=false.

        Raises:
            ValueError: not a list of strings.
        """
        if isinstance(texts, str):
            raise ValueError("texts: expected a list of strings, got a single one (`encode` takes that)")
        return list(self.encode_each(texts))

    def encode_each(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """`encode_batch`, text by text, in batches: the library needs some 20 bytes of memory per character."""
        batch: list[str] = []
        characters = 0
        for text in texts:
            if not isinstance(text, str):  # the library would join a pair without a [SEP]
                raise ValueError(
                    f"texts: expected strings, got {type(text).__name__}; for a pair, encode both and put the id "
                    "of [SEP] between them"
                )
            batch.append(text)
            characters += len(text)
            if characters >= BATCH_CHARACTERS:
                yield from self._encode(batch)
                batch, characters = [], 0
        yield from self._encode(batch)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        with valid_unicode(texts):
            encodings = self._engine.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the half-open range of characters of `text` that it covers.

        Ranges never move backwards, but a character that is written out ("½") may be covered by several tokens.
        """
        with valid_unicode([text]):
            encoding = self._engine.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text, with special tokens; case, accents and spacing lost in encoding are not restored."""
        return self._engine.decode(list(ids), skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """The vocabulary's entry for an id: a word begins with "▁", or (WordPiece) without "##".

        Raises:
            ValueError: no token has this id.
        """
        token = self._engine.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise ValueError(
                f"token_id: expected an id in [0, {self.vocab_size}), got {token_id}, which no token has"
            )
        return token

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """`token` for each id."""
        return [self.token(token_id) for token_id in ids]

    def fingerprint(self) -> str:
        """SHA-256 of what determines a text's ids; independent of the layout of the files."""
        model = json.loads(self.to_json())["model"]
        vocab = sorted(self._engine.get_vocab().items(), key=lambda item: item[1])
        scores = [float(np.float32(score)) for _, score in model["vocab"]] if model["type"] == "Unigram" else []
        merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model.get("merges", [])]
        content = [model["type"], vocab, scores, merges, self.as_plain_text().encode(_PROBE)]
        return digest_of(content)

    def as_plain_text(self) -> Tokenizer:
        """A copy that reads "[MASK]" and the like in a text as ordinary characters."""
        copy = tokenizer_from_json(self.to_json())
        engine = copy._engine
        engine.encode_special_tokens = True
        # Where BERT's splitting does not part "[" from "MASK", the model would find "[MASK]" among its pieces; a
        # space in it prevents that.
        normalizer = engine.normalizer  # None: no normalisation
        kept = normalizer is None or any(normalizer.normalize_str(token) == token for token in SPECIAL_TOKENS)
        if kept and not isinstance(engine.pre_tokenizer, pre_tokenizers.BertPreTokenizer):
            breaks = [normalizers.Replace(token, f"{token[:-1]} ]") for token in SPECIAL_TOKENS]
            engine.normalizer = normalizers.Sequence([*breaks, *filter(None, [normalizer])])
        return copy

    def to_json(self) -> str:
        """The contents of `tokenizer.json`."""
        return self._engine.to_str(pretty=True)

    def save(self, directory: str | Path, *, max_length: int = 512) -> None:
        """Writes the files from which this project, `tokenizers` and `transformers` load the tokenizer.

        Args:
            directory: created if necessary.
            max_length: the model's positions, to which `transformers` truncates.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / "tokenizer.json", self.to_json() + "\n")
        _write(directory / "tokenizer_config.json", json.dumps(self._hub_config(max_length), indent=2) + "\n")

    def _hub_config(self, max_length: int) -> dict[str, Any]:
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
        added = self._engine.get_added_tokens_decoder().values()
        more = [token.content for token in added if token.special and token.content not in SPECIAL_TOKENS]
        config = {**NAMES, "model_max_length": max_length, "model_input_names": inputs}
        config |= {"additional_special_tokens": more} if more else {}
        return {**config, "tokenizer_class": "PreTrainedTokenizerFast"}


class WordPieceTokenizer(Tokenizer):
    """BERT's WordPiece, as Google's ELECTRA uses it."""

    kind = "wordpiece"

    @classmethod
    def from_tokens(cls, tokens: Sequence[str], *, lowercase: bool = True) -> WordPieceTokenizer:
        """From the vocabulary's entries in the order of their ids. `lowercase` also drops accents."""
        vocab = {token: index for index, token in enumerate(tokens)}
        model = models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD)
        engine = tokenizers.Tokenizer(model)
        engine.normalizer = bert_normalizer(lowercase)
        engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        engine.decoder = decoders.WordPiece(prefix="##")
        add_specials(engine)
        return cls(engine)

    @classmethod
    def from_vocab(cls, path: str | Path, *, lowercase: bool = True) -> WordPieceTokenizer:
        """From a `vocab.txt` with one entry per line, the first having id 0.

        Raises:
            UserError: the file is unreadable or not UTF-8, has an entry twice, or lacks a special token.
        """
        try:
            lines = read_bytes(Path(path)).decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: invalid UTF-8 at byte {error.start:,}, so not a vocabulary") from None
        while lines and not lines[-1].strip():
            lines.pop()
        tokens = [line.rstrip() or line for line in lines]  # `line`: only white space, so no text has it
        first: dict[str, int] = {}
        for number, token in enumerate(tokens, start=1):
            if first.setdefault(token, number) != number:
                raise UserError(f"{path}: line {number}: {token!r} is already on line {first[token]}")
        missing = [token for token in SPECIAL_TOKENS if token not in first]
        if missing:
            raise UserError(f"{path}: not an ELECTRA WordPiece vocabulary, it has no {', '.join(missing)}")
        return cls.from_tokens(tokens, lowercase=lowercase)

    def save(self, directory: str | Path, *, max_length: int = 512) -> None:
        super().save(directory, max_length=max_length)
        by_id = {number: token for token, number in self._engine.get_vocab().items()}
        if len(by_id) == self.vocab_size:  # otherwise lines have other numbers than ids
            lines = "".join(f"{by_id[number]}\n" for number in range(self.vocab_size))
            _write(Path(directory) / "vocab.txt", lines)

    def _hub_config(self, max_length: int) -> dict[str, Any]:
        config, normalizer = super()._hub_config(max_length), self._engine.normalizer
        if not is_plain_wordpiece(self._engine):  # under BERT's class, transformers 5 would build BERT's
            return config
        options = {
            "tokenizer_class": "ElectraTokenizer",
            "do_lower_case": normalizer.lowercase,
            "strip_accents": normalizer.strip_accents,
            "tokenize_chinese_chars": normalizer.handle_chinese_chars,
        }
        return {**config, **options}


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece with our vocabularies: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then the pieces."""

    kind = "sentencepiece"

    def __init__(self, engine: tokenizers.Tokenizer, spiece_model: bytes | None = None) -> None:
        super().__init__(engine)
        self._spiece_model = spiece_model
        self._space_id = engine.token_to_id(SPACE_MARK)

    @classmethod
    def from_model(cls, spiece_model: bytes, *, lowercase: bool) -> SentencePieceTokenizer:
        """From the bytes of a `spiece.model` with our special tokens and our normalisation."""
        engine = tokenizers.Tokenizer(pieces_model(spiece_model))
        engine.normalizer = sentencepiece_normalizer(lowercase)
        words = pre_tokenizers.WhitespaceSplit()
        marked = pre_tokenizers.Metaspace(SPACE_MARK, prepend_scheme="always", split=False)
        engine.pre_tokenizer = pre_tokenizers.Sequence([words, marked])
        engine.decoder = decoders.Metaspace(SPACE_MARK, prepend_scheme="always", split=False)
        add_specials(engine)
        return cls(engine, spiece_model)

    @classmethod
    def from_file(cls, path: str | Path) -> SentencePieceTokenizer:
        """From a `spiece.model` alone; whether it is cased is inferred from how it normalises a text.

        Raises:
            UserError: not such a file, or one without our special tokens or with another normalisation.
        """
        spiece_model = read_bytes(Path(path))
        try:
            processor, pieces = read_pieces(spiece_model)
        except ValueError as error:
            raise UserError(f"{path}: cannot be read as a SentencePiece model ({error})") from None
        first = tuple(pieces[: len(SPECIAL_TOKENS)])
        if first != SPECIAL_TOKENS:
            raise UserError(f"{path}: begins with {', '.join(first)} instead of {', '.join(SPECIAL_TOKENS)}")
        found = processor.normalize(_PROBE).replace(SPACE_MARK, " ").split()
        for lowercase in (True, False):
            if sentencepiece_normalizer(lowercase).normalize_str(_PROBE).split() == found:
                return cls.from_model(spiece_model, lowercase=lowercase)
        raise UserError(f"{path}: normalises text differently from `electra prepare`")

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As in the base class; a lone "▁", which only marks the beginning of a word, covers nothing."""
        ids, offsets = super().encode_with_offsets(text)
        return ids, [(begin, begin if i == self._space_id else end) for i, (begin, end) in zip(ids, offsets)]

    def save(self, directory: str | Path, *, max_length: int = 512) -> None:
        super().save(directory, max_length=max_length)
        if self._spiece_model is not None:
            (Path(directory) / "spiece.model").write_bytes(self._spiece_model)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a tokenizer: a folder with `tokenizer.json`, `vocab.txt` or `spiece.model`, or one of these files; or
    a model's, by any name that `from_pretrained` accepts: "tiny", a run, a name on the Hub.

    Raises:
        UserError: there is no tokenizer, or it is damaged or not for ELECTRA.
    """
    path = tokenizer_file(Path(path))
    if path.suffix == ".model":
        return SentencePieceTokenizer.from_file(path)
    config = read_config(path.parent)
    check_specials(path, config)
    if path.suffix != ".json":
        check_words(path, config)
        engine = WordPieceTokenizer.from_vocab(path).engine
        engine.normalizer = normalizer_of(config)
        add_words(engine, config, path)
        return WordPieceTokenizer(engine)
    content = read_bytes(path)
    try:
        tokenizer = tokenizer_from_json(content.decode("utf-8"))
    except (UserError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if isinstance(tokenizer, WordPieceTokenizer):
        follow_config(tokenizer.engine, config, path)
    add_words(tokenizer.engine, config, path)
    tokenizer = type(tokenizer)(tokenizer.engine)  # may have more words now
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer._spiece_model = spiece_model_beside(path)
    return tokenizer


def matching_tokenizer(directory: Path, words: int) -> Tokenizer:
    """The tokenizer in the folder of a model of `words` tokens.

    Raises:
        UserError: as `load_tokenizer`, or it has more tokens than the model.
    """
    tokenizer = load_tokenizer(directory)
    tokenizer.check_fits(words, directory)
    return tokenizer


def tokenizer_from_json(content: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    Raises:
        UserError: not such a file, or of a kind that ELECTRA does not use.
    """
    engine = engine_of(content)
    kinds: dict[type, type[Tokenizer]] = {models.WordPiece: WordPieceTokenizer, models.WordLevel: Tokenizer}
    tokenizer = kinds.get(type(engine.model), SentencePieceTokenizer)(engine)
    add_specials(engine)
    one, other, both = tokenizer.encode_batch(["a", "b", "a b"])
    if one + other != both:
        raise UserError("a text's ids differ from the ids of its words (byte-level without add_prefix_space?)")
    return tokenizer


def unknown_words(unknown: int, tokens: int, much: float = MUCH_UNKNOWN) -> str | None:
    """Says what share of the tokens is [UNK], if it is `much`."""
    if unknown <= much * tokens:
        return None
    return f"{unknown / tokens:.1%} of the tokens are [UNK]; the vocabulary does not suit this text"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
