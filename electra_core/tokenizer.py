"""Text to ids and back: SentencePiece (own vocabularies) and WordPiece (Google's) behind one interface.

Both kinds run on the same engine, the `tokenizers` library: fast, and it knows the character offsets. Where a
vocabulary is trained here, `sentencepiece` learns the pieces (unigram or BPE) and the result is written twice:
`spiece.model` for SentencePiece's own readers and `tokenizer.json` for everybody else.

For the two to agree on every id, the text has to be normalised alike. SentencePiece rewrites by a table of
replacements, so the normaliser must be a function of single characters; canonical *composition* (NFC, NFKC) is
not. Ours is, and it is BERT's:

    uncased   compatibility decomposition, accents dropped, lower case, control characters dropped
    cased     control characters dropped, every other character as it is

and in both, every kind of white space (and U+2581, which stands for it inside the pieces) becomes a space.
The table for `spiece.model` is read off the normaliser itself, character by character.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from electra_core.errors import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WHITE_SPACE_MARK = "▁"  # SentencePiece's visible space, U+2581


class Tokenizer:
    """What both kinds share; `load_tokenizer` and `train_sentencepiece` make them.

    Names of special tokens inside a text ("[MASK]") become those tokens, as in `transformers`;
    `as_plain_text()` gives a tokenizer for which they are characters like any other.
    """

    kind = ""

    def __init__(self, engine: tokenizers.Tokenizer) -> None:
        self._engine = engine
        missing = [token for token in SPECIAL_TOKENS if engine.token_to_id(token) is None]
        if missing:
            raise UserError(f"the vocabulary has no {', '.join(missing)}, which ELECTRA needs")
        ids = (engine.token_to_id(token) for token in SPECIAL_TOKENS)
        self.special_ids: tuple[int, ...] = tuple(index for index in ids if index is not None)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids
        self.vocab_size: int = engine.get_vocab_size()

    @property
    def engine(self) -> tokenizers.Tokenizer:
        """The `tokenizers.Tokenizer` behind this one; do not change it."""
        return self._engine

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without [CLS] and [SEP]."""
        return self._engine.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on as many threads as the library likes (TOKENIZERS_PARALLELISM)."""
        encodings = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the half-open range of characters of the original `text` that it covers."""
        encoding = self._engine.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text; lost case, accents and spacing do not come back. Special tokens stay visible."""
        return self._engine.decode(list(ids), skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """The vocabulary's entry for an id."""
        token = self._engine.id_to_token(token_id)
        if token is None:
            raise ValueError(f"token_id must be in [0, {self.vocab_size}), got {token_id}")
        return token

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides which ids a text gets."""
        state = json.loads(self._engine.to_str())
        content = {key: state[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def as_plain_text(self) -> Tokenizer:
        """A copy that reads "[MASK]" and the like in a text as ordinary characters."""
        copy = tokenizers.Tokenizer.from_str(self._engine.to_str())
        copy.encode_special_tokens = True
        return type(self)(copy)

    def save(self, directory: str | Path) -> None:
        """Writes the files from which this project, `tokenizers` and `transformers` read the tokenizer."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / "tokenizer.json", self._engine.to_str(pretty=True))
        _write(directory / "tokenizer_config.json", json.dumps(self._hub_config(), indent=2) + "\n")

    def _hub_config(self) -> dict[str, Any]:
        names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS))
        return {**names, "model_max_length": 512, "model_input_names": _MODEL_INPUTS}


_MODEL_INPUTS = ["input_ids", "token_type_ids", "attention_mask"]


class WordPieceTokenizer(Tokenizer):
    """BERT's WordPiece, as Google's ELECTRA uses it."""

    kind = "wordpiece"

    @classmethod
    def from_vocab(cls, path: str | Path, *, lowercase: bool = True) -> WordPieceTokenizer:
        """From a `vocab.txt`: one token a line, the line number being its id."""
        lines = Path(path).read_bytes().decode("utf-8").split("\n")
        tokens = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
        vocab = {token: index for index, token in enumerate(tokens)}
        engine = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
        engine.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
        )
        engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        engine.decoder = decoders.WordPiece(prefix="##")
        _add_specials(engine)
        return cls(engine)

    @property
    def lowercase(self) -> bool:
        return bool(json.loads(self._engine.to_str())["normalizer"]["lowercase"])

    def save(self, directory: str | Path) -> None:
        super().save(directory)
        tokens = [self.token(index) for index in range(self.vocab_size)]
        _write(Path(directory) / "vocab.txt", "\n".join(tokens) + "\n")

    def _hub_config(self) -> dict[str, Any]:
        return {**super()._hub_config(), "tokenizer_class": "ElectraTokenizer", "do_lower_case": self.lowercase}


class SentencePieceTokenizer(Tokenizer):
    """A vocabulary of our own: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then the pieces."""

    kind = "sentencepiece"

    def __init__(self, engine: tokenizers.Tokenizer, spiece_model: bytes | None = None) -> None:
        super().__init__(engine)
        self._spiece_model = spiece_model

    @classmethod
    def from_model(cls, spiece_model: bytes, *, lowercase: bool) -> SentencePieceTokenizer:
        """From the bytes of a `spiece.model` that `train_sentencepiece` made."""
        engine = tokenizers.Tokenizer(_sentencepiece_model(spiece_model))
        engine.normalizer = _normalizer(lowercase)
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.Metaspace(WHITE_SPACE_MARK, prepend_scheme="always", split=False),
            ]
        )
        engine.decoder = decoders.Metaspace(WHITE_SPACE_MARK, prepend_scheme="always", split=False)
        _add_specials(engine)
        return cls(engine, spiece_model)

    def as_plain_text(self) -> Tokenizer:
        copy = super().as_plain_text()
        assert isinstance(copy, SentencePieceTokenizer)
        copy._spiece_model = self._spiece_model
        return copy

    def save(self, directory: str | Path) -> None:
        super().save(directory)
        if self._spiece_model is not None:
            (Path(directory) / "spiece.model").write_bytes(self._spiece_model)

    def _hub_config(self) -> dict[str, Any]:
        return {**super()._hub_config(), "tokenizer_class": "PreTrainedTokenizerFast"}


def train_sentencepiece(
    sentences: Iterable[str],
    vocab_size: int,
    *,
    model_type: str = "unigram",
    lowercase: bool = True,
) -> SentencePieceTokenizer:
    """Learns a SentencePiece vocabulary of exactly `vocab_size` entries, the special tokens included.

    Pieces never cross white space, so words and their counts are all the trainer needs: much less memory and
    time than whole sentences, and the result depends on the text alone (there is nothing random in it).
    """
    import sentencepiece

    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(sentence.split())
    if not counts:
        raise UserError("there is no text to train a vocabulary on")
    words = (f"{word}\t{count}" for word, count in sorted(counts.items()))
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as rules:
        rules.write(_normalisation_rules(lowercase))
        rules.flush()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=words,
                model_writer=model,
                input_format="tsv",
                model_type=model_type,
                vocab_size=vocab_size,
                normalization_rule_tsv=rules.name,
                pad_id=0,
                unk_id=1,
                bos_id=-1,
                eos_id=-1,
                pad_piece=SPECIAL_TOKENS[0],
                unk_piece=SPECIAL_TOKENS[1],
                control_symbols=list(SPECIAL_TOKENS[2:]),
                num_threads=1,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise UserError(f"could not train a vocabulary of {vocab_size}: {error}") from None
    return SentencePieceTokenizer.from_model(model.getvalue(), lowercase=lowercase)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a tokenizer: a directory with `tokenizer.json` or `vocab.txt`, or one of these files."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: no tokenizer.json and no vocab.txt in this directory")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer")
    if path.suffix != ".json":
        return WordPieceTokenizer.from_vocab(path, lowercase=_lowercase_beside(path))
    try:
        engine = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(f"{path}: not a tokenizer file ({error})") from None
    if isinstance(engine.model, models.WordPiece):
        return WordPieceTokenizer(engine)
    spiece = path.with_name("spiece.model")
    return SentencePieceTokenizer(engine, spiece.read_bytes() if spiece.is_file() else None)


def _lowercase_beside(vocab: Path) -> bool:
    """Whether the directory's `tokenizer_config.json` says uncased; BERT's default without one."""
    config = vocab.with_name("tokenizer_config.json")
    return bool(json.loads(config.read_text("utf-8")).get("do_lower_case", True)) if config.is_file() else True


def _add_specials(engine: tokenizers.Tokenizer) -> None:
    """Registers the special tokens and the `[CLS] A [SEP] B [SEP]` template with segments 0 and 1."""
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, engine.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )


def _normalizer(lowercase: bool) -> normalizers.Normalizer:
    decompose = [normalizers.NFKD()] if lowercase else []
    clean = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=False, strip_accents=lowercase, lowercase=lowercase
    )
    return normalizers.Sequence([*decompose, clean, normalizers.Replace(WHITE_SPACE_MARK, " ")])


@functools.cache
def _normalisation_rules(lowercase: bool) -> str:
    """`_normalizer` as SentencePiece's table: a line "SOURCE<tab>TARGET TARGET..." in hex per changed character."""
    normalizer = _normalizer(lowercase)
    separator = "\U00010000"  # nothing normalises to it, and it keeps neighbours from combining
    lines = []
    for start in range(1, 0x110000, 4096):
        points = (point for point in range(start, min(start + 4096, 0x110000)) if not 0xD800 <= point < 0xE000)
        characters = [chr(point) for point in points if chr(point) != separator]
        normalised = normalizer.normalize_str(separator.join(characters)).split(separator)
        for before, after in zip(characters, normalised) if characters else ():
            if before != after:
                lines.append(f"{ord(before):X}\t{' '.join(f'{ord(character):X}' for character in after)}\n")
    return "".join(lines)


def _sentencepiece_model(spiece_model: bytes) -> models.Model:
    """The pieces as the engine's Unigram or BPE model."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece_model)
    size = processor.get_piece_size()
    pieces = [processor.id_to_piece(index) for index in range(size)]
    scores = [processor.get_score(index) for index in range(size)]
    # SentencePiece's BPE scores are minus the order of the merges; a unigram's are log probabilities.
    is_bpe = all(score == -index for index, score in enumerate(scores[len(SPECIAL_TOKENS) :]))
    if not is_bpe:
        return models.Unigram(list(zip(pieces, scores)), unk_id=processor.unk_id(), byte_fallback=False)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return models.BPE(vocab, list(_merges(vocab)), unk_token="[UNK]", fuse_unk=True)


def _merges(vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Every pair of entries whose concatenation is an entry, in the order in which the entries were learnt."""
    for piece in vocab:
        for cut in range(1, len(piece)):
            if piece[:cut] in vocab and piece[cut:] in vocab:
                yield piece[:cut], piece[cut:]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
