"""The parts of a tokenizer: special tokens, normalisation, SentencePiece's pieces.

For the engine and SentencePiece to give the same ids, they have to normalise alike. SentencePiece rewrites by a
table, and the engine's version of such tables loses lone accents, so the normaliser must be a function of single
letters; canonical composition (NFC, NFKC) is not. Ours is; it is BERT's, except that Chinese characters are not
separated:

    uncased   compatibility decomposition, accents dropped, lower case, control characters dropped
    cased     control characters dropped, every other letter as it is

and in both, any white space (and U+2581, which represents it inside pieces) becomes a space.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SPACE_MARK = "▁"  # SentencePiece's visible space, U+2581
LONGEST_WORD = 100  # letters; WordPiece maps longer words to [UNK], as the Hub's tokenizers do

_TRIMS = b'"trim_offsets":true'  # in the state of a post-processor, or of a part of it


def bert_normalizer(lowercase: bool, accents: bool | None = None, chinese: bool = True) -> normalizers.Normalizer:
    """BERT's normaliser: drops control characters and, as the arguments say, changes letters.

    Args:
        lowercase: whether to convert to lower case.
        accents: whether to drop accents; None: as `lowercase`.
        chinese: whether to separate Chinese characters.
    """
    return normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=chinese, strip_accents=accents, lowercase=lowercase
    )


def sentencepiece_normalizer(lowercase: bool) -> normalizers.Normalizer:
    """Our normaliser (see the file's header), which acts on each letter separately."""
    clean = bert_normalizer(lowercase, accents=lowercase, chinese=False)
    spaces = normalizers.Replace(SPACE_MARK, " ")
    return normalizers.Sequence([normalizers.NFKD(), clean, spaces] if lowercase else [clean, spaces])


def add_specials(engine: tokenizers.Tokenizer) -> None:
    """Registers the special tokens, and `[CLS] A [SEP] B [SEP]` with segments 0 and 1.

    A byte-level engine's post-processor may also see to it that a piece does not cover the space before its word:
    that stays.
    """
    before = engine.post_processor
    trims = before is not None and _TRIMS in before.__getstate__()
    register(engine, [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    template = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, engine.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    trimmed = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    engine.post_processor = trimmed if trims else template


def register(engine: tokenizers.Tokenizer, special: list[AddedToken]) -> None:
    """Adds special tokens, except those that the engine has with settings of their own."""
    known = {token.content for token in engine.get_added_tokens_decoder().values()}
    engine.add_special_tokens([token for token in special if token.content not in known])


def is_plain_wordpiece(engine: tokenizers.Tokenizer) -> bool:
    """Whether case, accents, Chinese characters and the vocabulary are all that sets it apart from BERT's."""
    normalizer, model = engine.normalizer, engine.model
    return (
        isinstance(normalizer, normalizers.BertNormalizer)
        and normalizer.clean_text
        and isinstance(engine.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        and isinstance(model, models.WordPiece)
        and (model.unk_token, model.continuing_subword_prefix) == ("[UNK]", "##")
        and model.max_input_chars_per_word == LONGEST_WORD
    )


def read_pieces(spiece_model: bytes) -> tuple[Any, list[str]]:
    """SentencePiece's processor for the bytes of a `spiece.model`, and its pieces in the order of their ids.

    Raises:
        ValueError: they are not such a file's.
    """
    import sentencepiece

    if not spiece_model:  # the library would take it for no file
        raise ValueError("it is empty")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=spiece_model)
        pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    except (RuntimeError, IndexError) as error:
        raise ValueError(str(error)) from None
    return processor, pieces


def pieces_model(spiece_model: bytes) -> models.Model:
    """SentencePiece's pieces as the engine's model."""
    processor, pieces = read_pieces(spiece_model)
    scores = [processor.get_score(index) for index in range(len(pieces))]
    # BPE's scores are the negated indices of the merges, 0, -1, ...; unigram's are log probabilities.
    if any(score != -index for index, score in enumerate(scores[len(SPECIAL_TOKENS) :])):
        return models.Unigram(list(zip(pieces, scores)), unk_id=processor.unk_id(), byte_fallback=False)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return models.BPE(vocab, list(_merges(vocab)), unk_token="[UNK]", fuse_unk=True)


def _merges(vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    """All pairs of entries that together form an entry, in the order in which that entry was learnt."""
    for piece in list(vocab)[len(SPECIAL_TOKENS) :]:
        for cut in range(1, len(piece)):
            if piece[:cut] in vocab and piece[cut:] in vocab:
                yield piece[:cut], piece[cut:]
