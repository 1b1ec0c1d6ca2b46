"""Ids are those of `transformers`: in folders that hold more than a vocabulary, and in those that we write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizer_texts import TORTURE, wordpiece  # noqa: F401
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from electra_core.errors import UserError
from electra_core.hub.tokenizer_parts import SPECIAL_TOKENS
from electra_core.tokenizer import Tokenizer, WordPieceTokenizer, load_tokenizer, tokenizer_from_json

TEXTS = [
    *TORTURE,
    "The Cats sat, Café café 東京 12 x12",
    "[PHI] [phi] x[PHI] [the] troponin [MASK] sat",
    "a" * 150,
]
ELECTRA, ANY = {"tokenizer_class": "ElectraTokenizer"}, {"tokenizer_class": "PreTrainedTokenizerFast"}
USUAL = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS))


def write(folder: Path, **files: Any) -> None:
    """JSON files of these names, and a `config.json` as ELECTRA's."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config": {"model_type": "electra"}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")


def peer(folder: Path) -> Any:
    """The tokenizer of `transformers` in a folder, beside an ELECTRA model."""
    write(folder)
    return AutoTokenizer.from_pretrained(folder)


def assert_same_ids(ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
    assert ours.vocab_size == len(theirs)


# ---- what we write


def vary(engine: tokenizers.Tokenizer, **parts: Any) -> None:
    for name, part in parts.items():
        setattr(engine, name, part)


OTHERS: dict[str, Callable[[tokenizers.Tokenizer], None]] = {
    "NFC": lambda engine: vary(engine, normalizer=normalizers.NFC()),
    "no normaliser": lambda engine: vary(engine, normalizer=None),
    "several normalisers": lambda engine: vary(
        engine, normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
    ),
    "control characters kept": lambda engine: vary(
        engine, normalizer=normalizers.BertNormalizer(clean_text=False)
    ),
    "white space only": lambda engine: vary(engine, pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "digits": lambda engine: vary(
        engine,
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
        ),
    ),
    "longer words": lambda engine: setattr(engine.model, "max_input_chars_per_word", 200),
    "another prefix": lambda engine: setattr(engine.model, "continuing_subword_prefix", "@@"),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_a_wordpiece_that_is_not_berts_is_not_written_as_berts(change: Callable, tmp_path: Path) -> None:
    words = [
        "the",
        "cat",
        "##s",
        "Cat",
        "12",
        "1",
        "2",
        "##2",
        "a",
        "##a",
        "@@s",
        "@@a",
        "caf",
        "é",
        "##é",
        "東京",
    ]
    engine = WordPieceTokenizer.from_tokens([*SPECIAL_TOKENS, *words, "e\u0301", "The", "sat,"]).engine
    before = engine.encode_batch(TEXTS)
    change(engine)
    assert [e.ids for e in engine.encode_batch(TEXTS)] != [e.ids for e in before], "the change has an effect"
    write(tmp_path, tokenizer=json.loads(engine.to_str()), tokenizer_config=ANY | USUAL)
    ours = load_tokenizer(tmp_path)
    assert_same_ids(ours, peer(tmp_path))
    ours.save(tmp_path / "out")
    assert_same_ids(ours, peer(tmp_path / "out"))


@pytest.mark.parametrize(
    "options", [{}, {"strip_accents": False}, {"lowercase": False}, {"handle_chinese_chars": False}]
)
def test_berts_own_is_written_as_berts(wordpiece: Tokenizer, options: dict, tmp_path: Path) -> None:
    engine = tokenizers.Tokenizer.from_str(wordpiece.to_json())
    engine.normalizer = normalizers.BertNormalizer(**options)
    ours = WordPieceTokenizer(engine)
    ours.save(tmp_path / "out")
    assert (
        json.loads((tmp_path / "out/tokenizer_config.json").read_text())["tokenizer_class"] == "ElectraTokenizer"
    )
    assert_same_ids(ours, peer(tmp_path / "out"))


def trained(kind: str) -> tokenizers.Tokenizer:
    """A small tokenizer of a kind, as its library leaves it: without [CLS] and [SEP] around a text."""
    options: dict[str, Any] = {"vocab_size": 300, "special_tokens": list(SPECIAL_TOKENS), "show_progress": False}
    lines = ["the cat sat on the mat", "a film of the plot"] * 9
    if kind == "unigram":
        engine = tokenizers.Tokenizer(models.Unigram())
        engine.pre_tokenizer = pre_tokenizers.Metaspace()
        engine.train_from_iterator(lines, trainers.UnigramTrainer(unk_token="[UNK]", **options))
    elif kind == "wordpiece":
        engine = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        engine.pre_tokenizer = pre_tokenizers.Whitespace()
        engine.train_from_iterator(lines, trainers.WordPieceTrainer(**options))
    else:
        engine = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        engine.train_from_iterator(lines, trainers.BpeTrainer(**options))
    return engine


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "byte-level"])
@pytest.mark.parametrize("other", [False, True], ids=["none", "another"])
def test_a_saved_tokenizer_puts_cls_and_sep_where_we_train_with_them(
    kind: str, other: bool, tmp_path: Path
) -> None:
    engine = trained(kind)
    if other:
        engine.post_processor = processors.TemplateProcessing(
            "$A [SEP] [CLS]", "$A $B", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    ours = tokenizer_from_json(engine.to_str())
    ours.save(tmp_path)
    first, second = ours.encode("the cat"), ours.encode("sat")
    for theirs in (peer(tmp_path), peer(tmp_path)):
        pair = theirs("the cat", "sat")
        assert pair["input_ids"] == [ours.cls_id, *first, ours.sep_id, *second, ours.sep_id]
        assert pair["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        assert theirs("sat")["input_ids"] == [ours.cls_id, *second, ours.sep_id]


@pytest.mark.parametrize(
    "post",
    [processors.ByteLevel(trim_offsets=True), processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))],
    ids=["byte-level", "as RoBERTa"],
)
def test_a_word_still_does_not_cover_the_space_before_it(post: Any) -> None:
    engine = trained("byte-level")
    engine.post_processor = post
    text = "the cat sat"
    offsets = tokenizer_from_json(engine.to_str()).encode_with_offsets(text)[1]
    assert offsets == engine.encode(text, add_special_tokens=False).offsets
    assert [text[a:b] for a, b in offsets] == ["the", "cat", "sat"]


def test_the_specials_of_a_tokenizer_that_does_not_register_them() -> None:
    content = json.loads(trained("unigram").to_str())
    ours = tokenizer_from_json(json.dumps(content | {"added_tokens": []}))
    assert ours.encode("[MASK]") == [ours.mask_id]


# ---- what lies beside a tokenizer.json or a vocab.txt


@pytest.mark.parametrize("cased", [False, True])
@pytest.mark.parametrize(
    "said",
    [
        {"strip_accents": False},
        {"strip_accents": True},
        {"tokenize_chinese_chars": False},
        {"tokenize_chinese_chars": False, "strip_accents": False, "do_lower_case": False},
        {"do_lower_case": True},
        {"do_lower_case": False},
    ],
    ids=str,
)
def test_each_setting_that_the_config_names_is_followed(
    wordpiece: Tokenizer,
    said: dict,
    cased: bool,
    tmp_path: Path,
) -> None:
    engine = tokenizers.Tokenizer.from_str(wordpiece.to_json())
    engine.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    case = {} if not cased or "do_lower_case" in said else {"do_lower_case": False}
    write(tmp_path, tokenizer=json.loads(engine.to_str()), tokenizer_config=ELECTRA | said | case)
    assert_same_ids(load_tokenizer(tmp_path), peer(tmp_path))


def test_a_case_that_the_config_does_not_name_stays(wordpiece: Tokenizer, tmp_path: Path) -> None:
    engine = tokenizers.Tokenizer.from_str(wordpiece.to_json())
    engine.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=True)
    write(tmp_path, tokenizer=json.loads(engine.to_str()), tokenizer_config={"tokenize_chinese_chars": False})
    ours = load_tokenizer(tmp_path)
    assert ours.tokens(ours.encode("Cats CAFÉ Café 東京")) == ["Cat", "##s", "[UNK]", "[UNK]", "[UNK]"]
    normalizer = ours.engine.normalizer
    assert (normalizer.lowercase, normalizer.strip_accents, normalizer.handle_chinese_chars) == (
        False,
        True,
        False,
    )


PHI = {"content": "[PHI]", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
THE = PHI | {"content": "the"}
NAMED = {
    "in the map": {"special_tokens_map": {**USUAL, "additional_special_tokens": ["the", "[PHI]"]}},
    "in the map with flags": {"special_tokens_map": {"mask_token": PHI | {"content": "[MASK]", "lstrip": True},
                                                     "extra_special_tokens": [PHI, "the"]}},
    "in a list of words, too": {"tokenizer_config": {"additional_special_tokens": ["[PHI]"]},
                                "added_tokens": {"troponin": 20, "[PHI]": 21}},
    "in the config": {"tokenizer_config": {"additional_special_tokens": ["[PHI]", "the"]}},
    "in the config of version 5": {"tokenizer_config": {"extra_special_tokens": ["the", "[PHI]"]}},
    "by their roles": {"tokenizer_config": {"extra_special_tokens": {"phi_token": "[PHI]", "the_token": "the"}}},
    "with ids": {"tokenizer_config": {"added_tokens_decoder": {"20": PHI | {"special": True}, "5": THE},
                                      "additional_special_tokens": ["[PHI]"]},
                 "special_tokens_map": {"additional_special_tokens": ["[the]"], "cls_token": "older"}},
    "in both": {"tokenizer_config": {"additional_special_tokens": ["[PHI]"]},
                "special_tokens_map": {"additional_special_tokens": ["[PHI]"]}},
    "none": {"tokenizer_config": {"additional_special_tokens": None}},
}  # fmt: skip


@pytest.mark.parametrize("only_vocab", [True, False], ids=["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("beside", NAMED.values(), ids=NAMED)
def test_special_tokens_are_those_that_the_files_name(
    wordpiece: WordPieceTokenizer,
    beside: dict,
    only_vocab: bool,
    tmp_path: Path,
) -> None:
    own = {} if only_vocab else {"tokenizer": json.loads(wordpiece.to_json())}
    write(tmp_path, **own, **beside)
    ours, theirs = load_tokenizer(tmp_path), peer(tmp_path)
    assert_same_ids(ours, theirs)
    ours.save(tmp_path / "out")
    assert_same_ids(ours, peer(tmp_path / "out"))
    assert_same_ids(load_tokenizer(tmp_path / "out"), theirs)


def test_a_special_token_that_is_registered_keeps_its_flags(wordpiece: Tokenizer, tmp_path: Path) -> None:
    engine = tokenizers.Tokenizer.from_str(wordpiece.to_json())
    engine.add_tokens([AddedToken("[PHI]", single_word=True, special=True, normalized=False)])
    write(
        tmp_path,
        tokenizer=json.loads(engine.to_str()),
        tokenizer_config=ELECTRA | {"additional_special_tokens": ["[PHI]"]},
    )
    assert_same_ids(load_tokenizer(tmp_path), peer(tmp_path))


@pytest.mark.parametrize("only_vocab", [True, False], ids=["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize(
    "beside, message",
    [
        ({"tokenizer_config": {"cls_token": "the"}},
         r"cls_token in the files beside it: expected '\[CLS\]', got 'the'; other names are not supported"),
        ({"special_tokens_map": {"mask_token": {"content": "<mask>"}}}, r"expected '\[MASK\]', got '<mask>'"),
        ({"tokenizer_config": {"unk_token": ["x"]}}, r"expected '\[UNK\]', got \['x'\]"),
        ({"tokenizer_config": {"additional_special_tokens": [5]}}, "list added tokens in an unknown format"),
        ({"tokenizer_config": {"extra_special_tokens": 5}}, "list added tokens in an unknown format"),
        ({"special_tokens_map": {"additional_special_tokens": [{"text": "x"}]}}, "in an unknown format"),
        ({"special_tokens_map": []}, "special_tokens_map.json: "),
        ({"tokenizer_config": {"added_tokens_decoder": {"99": PHI}}}, r"'\[PHI\]' has id 99 .*, expected 20"),
    ],
)  # fmt: skip
def test_special_tokens_that_cannot_be_followed(
    wordpiece: WordPieceTokenizer,
    beside: dict,
    message: str,
    only_vocab: bool,
    tmp_path: Path,
) -> None:
    own = {} if only_vocab else {"tokenizer": json.loads(wordpiece.to_json())}
    write(tmp_path, **own, **beside)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines, "", ""],
        lambda lines: [*lines, " "],
        lambda lines: [line + " " for line in lines],
        lambda lines: [line + "\u3000\t\r" for line in lines],
        lambda lines: [*lines, "\u2028", "\u3000", " ", "last"],
    ],
    ids=["blank lines", "a blank line", "trailing spaces", "other white space", "entries of white space"],
)
def test_white_space_at_the_end_of_a_vocabularys_lines(
    wordpiece: Tokenizer, change: Callable, tmp_path: Path
) -> None:
    lines = (tmp_path / "vocab.txt").read_text("utf-8").splitlines()
    write(tmp_path)
    (tmp_path / "vocab.txt").write_bytes("".join(f"{line}\n" for line in change(lines)).encode())
    ours, theirs = load_tokenizer(tmp_path), peer(tmp_path)
    texts = [*TEXTS, "last"]
    assert ours.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
    assert ours.encode("cats") == wordpiece.encode("cats")
    assert ours.vocab_size == len(lines) + 4 * ("last" in change(lines))
