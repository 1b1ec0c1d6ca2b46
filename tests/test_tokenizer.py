"""Tokenizers against the libraries they have to agree with: `transformers`, `sentencepiece`, and themselves."""

import json
import random
import shutil
import tempfile
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece
from tokenizer_texts import TORTURE, wordpiece  # noqa: F401
from transformers import AutoTokenizer

from electra_core.corpora import vocabulary
from electra_core.corpora.sources import find_sources
from electra_core.corpora.text_files import read_documents
from electra_core.corpora.vocabulary import draw_sample, train_sentencepiece, train_wordpiece
from electra_core.errors import UserError
from electra_core.hub.tokenizer_parts import SPECIAL_TOKENS
from electra_core.tokenizer import SentencePieceTokenizer, Tokenizer, WordPieceTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """10,000 lines of the language reference, which is wherever Python is."""
    text = "\n".join(topics[key] for key in sorted(topics))
    return [line for line in text.split("\n") if line.strip()][:10_000]


@pytest.fixture(scope="module", params=[("unigram", True), ("unigram", False), ("bpe", True)], ids=str)
def own(request: pytest.FixtureRequest, lines: list[str]) -> Tokenizer:
    model_type, lowercase = request.param
    return train_sentencepiece(lines, 1000, model_type=model_type, lowercase=lowercase)


@pytest.fixture(scope="module")
def unigram(lines: list[str]) -> SentencePieceTokenizer:
    return train_sentencepiece(lines[:1000], 300)


def plain(text: str) -> str:
    """Without the names of special tokens, which SentencePiece does not look for in a text."""
    return text.replace("[", "(")


# ------------------------------------------------------------------------------------------- own vocabularies


def test_ids_are_those_of_sentencepiece(own: Tokenizer, lines: list[str], tmp_path: Path) -> None:
    own.save(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    texts = [plain(line) for line in [*lines, *TORTURE]]
    assert own.encode_batch(texts) == theirs.encode(texts)


def test_auto_tokenizer_opens_the_folder(own: Tokenizer, lines: list[str], tmp_path: Path) -> None:
    own.save(tmp_path)
    for config in (None, {"model_type": "electra"}):  # alone, and beside a model
        if config:
            (tmp_path / "config.json").write_text(json.dumps(config))
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        texts = [*lines[:500], *TORTURE, "a [MASK] b"]
        assert theirs(texts, add_special_tokens=False)["input_ids"] == own.encode_batch(texts)
        assert [theirs.pad_token_id, theirs.unk_token_id, theirs.cls_token_id] == [0, 1, 2]
        assert [theirs.sep_token_id, theirs.mask_token_id, theirs.model_max_length] == [3, 4, 512]
        pair = theirs("if x", "while y")
        first, second = own.encode("if x"), own.encode("while y")
        assert pair["input_ids"] == [2, *first, 3, *second, 3]
        assert pair["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)


def test_saved_and_loaded_is_the_same(own: Tokenizer, lines: list[str], tmp_path: Path) -> None:
    own.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(own) and again.fingerprint() == own.fingerprint()
    assert again.encode_batch(lines) == own.encode_batch(lines)
    again.save(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "spiece.model"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_spiece_model_alone(own: Tokenizer, lines: list[str], tmp_path: Path) -> None:
    own.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).fingerprint() == own.fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bos_id": 1, "unk_id": 0}, "begins with <unk>, <s>, "),
        (
            {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "pad_piece": "[PAD]", "unk_piece": "[UNK]"}
            | {"control_symbols": ["[CLS]", "[SEP]", "[MASK]"]},
            "normalises text differently from",
        ),
    ],
)
def test_a_spiece_model_of_somebody_else(lines: list[str], tmp_path: Path, options: dict, message: str) -> None:
    with open(tmp_path / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines[:200]), model_writer=file, vocab_size=150, minloglevel=2, **options
        )
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "spiece.model")


def test_a_text_is_its_words(own: Tokenizer, lines: list[str]) -> None:
    """What `encoding.WordEncoder` relies on."""
    tokenizer = own.as_plain_text()
    for line in [*lines[:300], *TORTURE]:
        words = tokenizer.encode_batch(line.split(" "))
        assert tokenizer.encode(line) == [token for word in words for token in word]


def test_long_texts_are_not_all_in_memory_at_once(
    own: Tokenizer, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("electra_core.tokenizer.BATCH_CHARACTERS", 100)
    taken: list[str] = []
    each = own.encode_each(taken.append(line) or line for line in lines)  # type: ignore[func-returns-value]
    assert next(each) == own.encode(lines[0])
    assert len("".join(taken[:-1])) < 100
    assert list(each) == [own.encode(line) for line in lines[1:]] == own.encode_batch(lines)[1:]


def test_a_single_text_is_not_taken_letter_by_letter(unigram: SentencePieceTokenizer) -> None:
    with pytest.raises(ValueError, match="texts: expected a list of strings, got a single one"):
        unigram.encode_batch("a text")


def test_a_pair_is_not_joined_without_a_separator(unigram: SentencePieceTokenizer) -> None:
    for pair in (("a film", "a book"), ["a film", "a book"], None):
        with pytest.raises(ValueError, match=rf"texts: expected strings, got {type(pair).__name__}; .*\[SEP\]"):
            unigram.encode_batch([pair])  # type: ignore[list-item]


def test_a_tokenizer_by_its_model_s_name(
    wordpiece: WordPieceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `from_pretrained` takes it."""
    from electra_core.hub import model_places

    shipped = model_places.shipped_model()
    assert load_tokenizer("tiny").to_json() == load_tokenizer(shipped / "discriminator").to_json()
    wordpiece.save(tmp_path / "run" / "discriminator")
    (tmp_path / "run" / "discriminator" / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path / "run").to_json() == wordpiece.to_json()
    monkeypatch.setattr(model_places, "_fetch", lambda name, revision: tmp_path / "run" / "discriminator")
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("google/electra-small-discriminator").to_json() == wordpiece.to_json()
    for path in ("run/vocab.txt", "nothing", str(tmp_path / "nothing")):
        with pytest.raises(UserError, match="no such tokenizer"):
            load_tokenizer(path)
    wordpiece.save(tmp_path / "tiny")
    assert load_tokenizer("tiny").to_json() == wordpiece.to_json(), "a folder comes before a name"


def test_special_tokens_come_first_and_uncased_is_the_default(unigram: SentencePieceTokenizer) -> None:
    assert unigram.tokens(range(5)) == list(SPECIAL_TOKENS)
    assert unigram.special_ids == (0, 1, 2, 3, 4) and unigram.vocab_size == 300
    assert unigram.encode("THE Naïve") == unigram.encode("the naive")
    assert unigram.decode(unigram.encode("The naïve test")) == "the naive test"


def test_names_of_special_tokens_in_a_text(own: Tokenizer) -> None:
    assert own.encode("a [MASK] b")[-2:] == [own.mask_id, own.encode("b")[0]]
    assert not set(own.special_ids) - {own.unk_id} & set(own.as_plain_text().encode("a [MASK] [CLS]x[SEP] [PAD]"))


def test_offsets_are_characters_of_the_original(unigram: SentencePieceTokenizer) -> None:
    text = "The \u200bCafé  in 東京, ﬁne: 😀"
    ids, offsets = unigram.encode_with_offsets(text)
    assert ids == unigram.encode(text)
    assert all(0 <= begin <= end <= len(text) for begin, end in offsets)
    assert all(before[0] <= after[0] for before, after in pairwise(offsets))
    covered = "".join(text[begin:end] for begin, end in offsets)
    assert {*"TheCafin東京,:😀"} <= {*covered}
    emoji = text.index("😀")
    assert (emoji, emoji + 1) in offsets and (emoji, emoji) in offsets  # the letter, and its "▁"


def test_the_vocabulary_depends_on_the_text_alone(lines: list[str]) -> None:
    once = train_sentencepiece(lines[:1000], 300)
    again = train_sentencepiece(reversed(lines[:1000]), 300)
    other = train_sentencepiece(lines[:900], 300)
    cased = train_sentencepiece(lines[:1000], 300, lowercase=False)
    assert once.to_json() == again.to_json()
    assert len({once.fingerprint(), other.fingerprint(), cased.fingerprint()}) == 3


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_every_file_of_a_vocabulary_is_the_same_each_time(
    lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Whatever the folder for temporary files is called."""
    for name in ("a", "b" * 150):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
        train_sentencepiece(lines[:1000], 300, model_type=model_type).save(tmp_path / f"out-{name}")
    one, other = sorted(tmp_path.glob("out-*"))
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    assert "spiece.model" in files
    assert files == {path.name: path.read_bytes() for path in other.iterdir()}
    assert str(tmp_path).encode() not in files["spiece.model"]


def test_wordpiece_vocabulary(lines: list[str]) -> None:
    once, again = (train_wordpiece(lines[:1000], 600) for _ in range(2))
    assert once.to_json() == again.to_json() and once.vocab_size == 600
    assert once.tokens(range(5)) == list(SPECIAL_TOKENS)
    ids = [token for line in lines[:1000] for token in once.encode(line)]
    assert ids.count(once.unk_id) < 0.002 * len(ids)
    assert "the" in once.tokens(range(600)) and len(ids) < sum(map(len, lines[:1000])) / 2.5


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_text_too_small_for_the_vocabulary(model_type: str) -> None:
    text = ["the quick brown fox jumps over the lazy dog"] * 3
    with pytest.raises(UserError, match="for a vocabulary of 8,192; the largest possible one is") as caught:
        train_sentencepiece(text, 8192, model_type=model_type)
    largest = int(str(caught.value).split()[-1])
    assert train_sentencepiece(text, largest, model_type=model_type).vocab_size == largest


@pytest.mark.parametrize("train", [train_sentencepiece, train_wordpiece])
def test_a_vocabulary_too_small_for_the_text(train) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="too small for the letters of this text; expected at least"):
        train(["the quick brown fox jumps over the lazy dog"], 20)
    with pytest.raises(UserError, match="no text"):
        train([" ", ""], 20)


@pytest.mark.parametrize("train", [train_sentencepiece, train_wordpiece])
def test_no_script_is_left_out_for_its_place_in_the_alphabet(train, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """More text than the trainer can take, most of it words that occur once."""
    monkeypatch.setattr(vocabulary, "MAX_WORD_CHARACTERS", 6000)
    draw = random.Random(0)
    english = [" ".join("".join(draw.choices("abcdefgh", k=7)) for _ in range(10)) for _ in range(300)]
    chinese = ["".join(draw.choices("北京上海学生老师中文计算机数据", k=20)) for _ in range(600)]
    tokenizer = train([*english, *chinese], 60)
    learned = "".join(tokenizer.tokens(range(tokenizer.vocab_size)))
    assert set("abcdefgh") <= set(learned) and set("北京上海学生老师中文计算机数据") <= set(learned)
    mixed = draw.sample([*chinese, *english], 900)
    assert train(mixed, 60).to_json() == tokenizer.to_json()


def test_a_character_counts_as_often_as_it_stands_in_a_line_without_spaces() -> None:
    """The rarest letters are left out, so it matters how rare they are."""
    text = ["北" * 4000 + "x", *["y"] * 3]
    learned = train_wordpiece(text, 20).tokens(range(5, 9))
    assert learned[:4] == ["y", "北", "##y", "##北"]


MARKED = {
    "th": "สวัสดีครับ ไม่ ใหม่ ที่นี่",
    "ja": "かぎとかき バスとパス",
    "hi": "हिन्दी भाषा में है",
    "bn": "বাংলা ভাষা সুন্দর",
    "ta": "தமிழ் மொழி",
}
UNMARKED = {"en": "the cat", "fr": "été à Noël", "vi": "tiếng Việt", "ru": "ёлка й", "he": "שָׁלוֹם", "ar": "كِتَابٌ",
            "zh": "北京上海", "ko": "한국어", "emoji": "ok ❤️ 🏳️‍🌈"}  # fmt: skip


@pytest.mark.parametrize("train", [train_sentencepiece, train_wordpiece])
@pytest.mark.parametrize("language", [*MARKED, *UNMARKED])
def test_uncased_tells_of_the_letters_that_it_drops(train, language: str, caplog) -> None:  # type: ignore[no-untyped-def]
    text = [(MARKED | UNMARKED)[language]] * 50
    for lowercase in (False, True):
        assert not caplog.records
        with suppress(UserError):  # a small text's right size differs
            train(text, 20, lowercase=lowercase)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (language in MARKED)
    if language == "hi":
        assert told[0].startswith("lower case drops 27% ") and "(में becomes म); --cased keeps them" in told[0]


def test_sample_is_spread_bounded_and_free_of_order() -> None:
    documents = [[f"document {number}", "x" * 90] for number in range(1000)]
    drawn = list(draw_sample(documents, 0, 20_000))
    assert 18_000 < sum(map(len, drawn)) <= 20_000
    assert sorted(drawn) == sorted(draw_sample(documents[::-1], 0, 20_000))
    assert sorted(drawn) != sorted(draw_sample(documents, 1, 20_000))
    numbers = [int(line.split()[1]) for line in drawn if line.startswith("document")]
    assert 350 < sum(numbers) / len(numbers) < 650
    assert list(draw_sample([["a" * 50]], 0, 10)) == ["a" * 50]


# ------------------------------------------------------------------------------------------------ WordPiece


@pytest.fixture(scope="module")
def real_lines(data_dir: Path) -> list[str]:
    """2,000 paragraphs of Wikipedia and 18,000 lines of novels."""
    lines: list[str] = []
    for name, count in (("wikipedia_heldout_2mb.txt.xz", 2000), ("novels_77mb.txt.xz", 18_000)):
        documents = read_documents(find_sources([data_dir / name]))
        lines += islice((line for document in documents for line in document), count)
    return lines


@pytest.mark.data
@pytest.mark.parametrize("lowercase", [True, False], ids=["uncased", "cased"])
def test_wordpiece_is_that_of_transformers_on_real_lines(
    lowercase: bool, real_lines: list[str], data_dir: Path, tmp_path: Path
) -> None:
    vocab = data_dir / "vocab" / "vocab.txt"
    ours = WordPieceTokenizer.from_vocab(vocab, lowercase=lowercase)
    shutil.copy(vocab, tmp_path)
    config = {"tokenizer_class": "ElectraTokenizer", "do_lower_case": lowercase}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(tmp_path)

    texts = [*real_lines, *TORTURE, "a [MASK] b[SEP]c"]
    assert len(texts) >= 20_000
    expected = theirs(texts, add_special_tokens=False, return_offsets_mapping=True)
    for text, ids, offsets in zip(texts, expected["input_ids"], expected["offset_mapping"], strict=True):
        assert ours.encode_with_offsets(text) == (ids, [tuple(pair) for pair in offsets]), repr(text)

    ours.save(tmp_path / "ours")
    assert (tmp_path / "ours" / "vocab.txt").read_bytes() == vocab.read_bytes()
    again = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert again(TORTURE, add_special_tokens=False)["input_ids"] == ours.encode_batch(TORTURE)


@pytest.mark.data
def test_sentencepiece_agrees_on_real_lines(real_lines: list[str], tmp_path: Path) -> None:
    tokenizer = train_sentencepiece(real_lines[:400], 800)
    tokenizer.save(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert tokenizer.as_plain_text().encode_batch(real_lines) == theirs.encode(real_lines)


def test_wordpiece_basics(wordpiece: WordPieceTokenizer, tmp_path: Path) -> None:
    ids, offsets = wordpiece.encode_with_offsets("The Cats, CAFÉ")
    assert wordpiece.tokens(ids) == ["the", "cat", "##s", ",", "caf", "##e"]
    assert offsets == [(0, 3), (4, 7), (7, 8), (8, 9), (10, 13), (13, 14)]
    assert wordpiece.decode(ids) == "the cats, cafe"
    assert wordpiece.encode("[MASK]") == [wordpiece.mask_id]
    plain_text = wordpiece.as_plain_text()
    assert plain_text.tokens(plain_text.encode("[MASK]")) == ["[", "mask", "]"]
    cased = WordPieceTokenizer.from_vocab(tmp_path / "vocab.txt", lowercase=False)
    assert cased.tokens(cased.encode("Cats café")) == ["Cat", "##s", "caf", "##é"]
    assert cased.fingerprint() != wordpiece.fingerprint()
    with pytest.raises(ValueError, match=r"token_id: expected an id in \[0, 20\), got 20"):
        wordpiece.token(20)
