"""Learns a vocabulary, SentencePiece (unigram or BPE) or WordPiece, deterministically from the text.

Pieces never cross white space, so a trainer needs only words and their counts: less memory and time than whole
sentences, and no dependence on the order of the text. Words are taken in order of frequency, up to
MAX_WORD_CHARACTERS in all. Most occur once; among equally frequent words those with the lowest hash are taken,
because alphabetical order would leave out the scripts at its end.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import io
import logging
import re
import struct
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from electra_core.corpora.text_files import document_hash
from electra_core.errors import UserError
from electra_core.files.protobuf import as_varint, fields
from electra_core.hub.tokenizer_parts import (
    LONGEST_WORD,
    SPECIAL_TOKENS,
    bert_normalizer,
    sentencepiece_normalizer,
)
from electra_core.tokenizer import MUCH_UNKNOWN, SentencePieceTokenizer, WordPieceTokenizer

log = logging.getLogger("electra_core")
MODEL_TYPES = ("unigram", "bpe")
MAX_WORD_CHARACTERS = 2_000_000  # 250,000 English words; unigram takes 270 MB and 20 s per million
CHARACTER_COVERAGE = 0.9995  # of all characters in the text; the rarest become [UNK]
SCORE_STEP = 2.0**-8  # scores are natural logarithms, about -2 to -15
PIECE_FIELD, SCORE_FIELD = 1, 2  # in SentencePiece's model files
NORMALIZER_FIELD, RULE_FILE_FIELD = 3, 6
THREADS = 4  # fixed, because sums of floats depend on how they are split
MANY_LOST_MARKS = 0.01  # of all letters
OPTIONAL = (
    range(0x300, 0x370), range(0x483, 0x488), range(0x1AB0, 0x1B00), range(0x1DC0, 0x1E00), range(0x20D0, 0x2100),
    range(0xFE20, 0xFE30),  # on Latin, Greek, Cyrillic letters,
    range(0x591, 0x5C8), range(0xFB1E, 0xFB1F), range(0x610, 0x61B), range(0x64B, 0x660), range(0x670, 0x671),
    range(0x6D6, 0x6EE), range(0x711, 0x712), range(0x730, 0x74B), range(0x890, 0x900),  # Hebrew, Arabic, Syriac,
    range(0x180B, 0x1810), range(0xFE00, 0xFE10),  # and variation selectors, as for emoji
)  # fmt: skip
"""Unicode ranges of combining marks that writers often leave out, or accents of the kind that BERT drops."""


def draw_sample(documents: Iterable[list[str]], seed: int, characters: int) -> Iterator[str]:
    """Lines of documents drawn at random, at most `characters` in all (but at least one document).

    Each document gets a pseudo-random number from its contents, and those with the lowest numbers are kept. So the
    sample does not depend on the order of the documents, and memory holds little more than the sample.
    """
    kept: list[tuple[int, int, list[str]]] = []  # a heap, highest number first; the second entry breaks ties
    size, limit = 0, 1 << 64
    for index, document in enumerate(documents):
        number = document_hash(document, seed, b"sample")
        if number >= limit:
            continue
        heapq.heappush(kept, (-number, index, document))
        size += sum(map(len, document))
        while size > characters and len(kept) > 1:
            negative, _, dropped = heapq.heappop(kept)
            limit = -negative
            size -= sum(map(len, dropped))
    for _, _, document in kept:
        yield from document


def train_sentencepiece(
    sentences: Iterable[str], vocab_size: int, *, model_type: str = "unigram", lowercase: bool = True
) -> SentencePieceTokenizer:
    """Learns a SentencePiece vocabulary of exactly `vocab_size` entries, including the five special tokens.

    Raises:
        UserError: the text is too small or has too many characters for the size; says which sizes work.
    """
    import sentencepiece

    if model_type not in MODEL_TYPES:
        raise UserError(f"model_type: expected one of {', '.join(MODEL_TYPES)}, got {model_type!r}")
    counts = _count_words(sentences)
    if lowercase:
        _warn_of_lost_marks(counts)
    words = _most_frequent(counts)
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as rules:
        rules.write(_normalisation_rules(lowercase))
        rules.flush()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(f"{word}\t{count}" for word, count in words),
                model_writer=model,
                input_format="tsv",
                model_type=model_type,
                vocab_size=vocab_size,
                character_coverage=CHARACTER_COVERAGE,
                normalization_rule_tsv=rules.name,
                pad_id=0,
                unk_id=1,
                bos_id=-1,
                eos_id=-1,
                pad_piece=SPECIAL_TOKENS[0],
                unk_piece=SPECIAL_TOKENS[1],
                control_symbols=list(SPECIAL_TOKENS[2:]),
                num_threads=THREADS,
                minloglevel=2,
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(_training_problem(str(error), vocab_size)) from None
    learned = _without_rule_file(_with_round_scores(model.getvalue()))
    return SentencePieceTokenizer.from_model(learned, lowercase=lowercase)


def train_wordpiece(sentences: Iterable[str], vocab_size: int, *, lowercase: bool = True) -> WordPieceTokenizer:
    """Learns a WordPiece vocabulary of at most `vocab_size` entries, as for BERT.

    The library numbers the letters in the order of its hash table, and breaks ties by number. So the letters are
    passed as if they were special tokens, sorted, which makes the result deterministic.
    """
    engine = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    engine.normalizer, engine.pre_tokenizer = bert_normalizer(lowercase), pre_tokenizers.BertPreTokenizer()
    counts, all_words = _count_words(sentences), Counter[str]()
    if lowercase:
        _warn_of_lost_marks(counts)
    for word, count in counts.items():
        for piece, _ in engine.pre_tokenizer.pre_tokenize_str(engine.normalizer.normalize_str(word)):
            all_words[piece] += count
    _warn_of_unreadable_words(all_words)
    words = dict(_most_frequent(all_words))
    letters = _covering_letters(words)
    first = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    if vocab_size < len(first):
        raise UserError(_too_few(vocab_size, len(first)))
    covered = set(letters)
    repeated = (" ".join([word] * count) for word, count in sorted(words.items()) if covered.issuperset(word))
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
    engine.train_from_iterator(repeated, trainer)
    vocab = engine.get_vocab()
    return WordPieceTokenizer.from_tokens(sorted(vocab, key=vocab.__getitem__), lowercase=lowercase)


def _count_words(sentences: Iterable[str]) -> Counter[str]:
    """The words of the text (separated by white space) with their counts."""
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(sentence.split())
    counts = Counter({word: count for word, count in counts.items() if "\0" not in word})
    if not counts:
        raise UserError("no text to train a vocabulary on")
    return counts


def _most_frequent(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent words, first ones first, up to MAX_WORD_CHARACTERS."""
    words: list[tuple[str, int]] = []
    room = MAX_WORD_CHARACTERS
    for word, count in sorted(counts.items(), key=lambda item: (-item[1], _hash(item[0]))):
        room -= len(word)
        if room < 0 and words:
            break
        words.append((word, count))
    return sorted(words, key=lambda item: (-item[1], item[0]))


def _hash(word: str) -> bytes:
    """A hash that is the same on every machine, in every process."""
    return hashlib.blake2b(word.encode(), digest_size=8).digest()


def _warn_of_lost_marks(counts: Counter[str]) -> None:
    """Warns if lower-casing, which drops accents as BERT's does, also drops vowels and consonants."""
    marks, letters = Counter[str](), 0
    for word, count in counts.items():
        letters += count * len(word)
        if not word.isascii() and (found := _needed_marks().findall(unicodedata.normalize("NFD", word))):
            marks[word] = count * len(found)
    if letters and (share := marks.total() / letters) > MANY_LOST_MARKS:
        word = min(marks, key=lambda word: (-marks[word], word))[:20]
        bare = sentencepiece_normalizer(True).normalize_str(word)
        log.warning(
            f"lower case drops {share:.0%} of the letters of this text, marks that distinguish words ({word} "
            f"becomes {bare}); --cased keeps them"
        )


def _warn_of_unreadable_words(counts: Counter[str]) -> None:
    """Warns if much of the text is in words that are too long for WordPiece, as sequences without spaces are. They
    may be few of the tokens, because each becomes a single [UNK]."""
    letters = sum(count * len(word) for word, count in counts.items())
    lost = sum(count * len(word) for word, count in counts.items() if len(word) > LONGEST_WORD)
    if lost > MUCH_UNKNOWN * letters:
        log.warning(
            f"{lost / letters:.0%} of the letters are in words of more than {LONGEST_WORD}, which WordPiece reads "
            "as [UNK]; sentencepiece has no such limit"
        )


@functools.cache
def _needed_marks() -> re.Pattern[str]:
    """Matches combining marks without which a word becomes another."""
    codes = (code for code in range(0x300, 0x20000) if unicodedata.category(chr(code)) == "Mn")
    needed = "".join(chr(code) for code in codes if not any(code in part for part in OPTIONAL))
    return re.compile(f"[{needed}]")


def _covering_letters(words: Mapping[str, int]) -> list[str]:
    """The most frequent letters that make up CHARACTER_COVERAGE of the text, sorted."""
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    room = (1 - CHARACTER_COVERAGE) * sum(letters.values())
    for letter, count in sorted(letters.items(), key=lambda item: (item[1], item[0])):
        room -= count
        if room < 0:
            break
        del letters[letter]
    return sorted(letters)


def _with_round_scores(spiece_model: bytes) -> bytes:
    """The model with every score rounded to a multiple of SCORE_STEP.

    A unigram segmentation is the one with the largest sum of scores. SentencePiece adds them up in float32 over a
    whole text, the engine in float64 word by word, so they could choose differently between two nearly equal
    sums. Sums of such multiples are exact in both (up to 65,536), so they always agree.

    A spiece.model is a protocol buffer: field 1 of the outermost message is a piece, whose field 2 is the score.
    """
    rounded = bytearray(spiece_model)
    for piece in fields(spiece_model):
        if piece.number != PIECE_FIELD:
            continue
        for field in fields(spiece_model, piece.begin, piece.end):
            if field.number == SCORE_FIELD:
                (score,) = struct.unpack("<f", spiece_model[field.begin : field.end])
                rounded[field.begin : field.end] = struct.pack("<f", round(score / SCORE_STEP) * SCORE_STEP)
    return bytes(rounded)


def _without_rule_file(spiece_model: bytes) -> bytes:
    """The model without the path of the normaliser's rules, a temporary file whose name differs in every run.

    Field 3 of the model says how text is normalised; field 6 of that is the path. The rules are in its field 2.
    """
    kept, start = bytearray(), 0
    for number, content, _, end in fields(spiece_model):
        field = spiece_model[start:end]
        if number == NORMALIZER_FIELD:
            assert isinstance(content, bytes)
            content = _without(content, RULE_FILE_FIELD)
            field = as_varint(NORMALIZER_FIELD << 3 | 2) + as_varint(len(content)) + content
        kept, start = kept + field, end
    return bytes(kept)


def _without(message: bytes, number: int) -> bytes:
    """The message without the fields of that number."""
    kept, start = b"", 0
    for field in fields(message):
        kept += b"" if field.number == number else message[start : field.end]
        start = field.end
    return kept


def _training_problem(message: str, vocab_size: int) -> str:
    """SentencePiece's error in the user's terms; both errors name the size that would work."""
    if found := re.search(r"too high.*?<= *(\d+)", message):
        largest = int(found[1])
        return f"the text is too small for a vocabulary of {vocab_size:,}; the largest possible one is {largest:,}"
    if found := re.search(r"required_chars\D*(\d+) vs (\d+)", message):
        return _too_few(vocab_size, int(found[2]))
    if "sentences_.empty()" in message:
        return "the text contains nothing to train a vocabulary on (only lines of one enormous word?)"
    return f"SentencePiece could not train a vocabulary of {vocab_size:,}: {message}"


def _too_few(vocab_size: int, needed: int) -> str:
    return (
        f"a vocabulary of {vocab_size:,} is too small for the letters of this text; expected at least {needed:,}"
    )


@functools.cache
def _normalisation_rules(lowercase: bool) -> str:
    """The normaliser as SentencePiece's table: a line "SOURCE<tab>TARGET TARGET ..." in hex per changed letter."""
    normalizer = sentencepiece_normalizer(lowercase)
    separator = "\U00010000"  # nothing normalises to it, and it keeps neighbours from combining
    lines = []
    for start in range(0, 0x110000, 4096):
        points = (point for point in range(start, start + 4096) if point and not 0xD800 <= point < 0xE000)
        letters = [chr(point) for point in points if chr(point) != separator]
        normalised = normalizer.normalize_str(separator.join(letters)).split(separator)
        for before, after in zip(letters, normalised):
            if before != after:
                lines.append(f"{ord(before):X}\t{' '.join(f'{ord(letter):X}' for letter in after)}\n")
    return "".join(lines)
