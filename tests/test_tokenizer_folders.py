"""Tokenizers as folders of the Hub and of others hold them: what is read, followed, refused, and written again."""

import base64
import json
import os
import re
import shutil
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from tokenizer_texts import TORTURE, wordpiece  # noqa: F401
from transformers import AutoTokenizer

from electra_core.corpora.encoding import WordEncoder
from electra_core.corpora.vocabulary import train_sentencepiece, train_wordpiece
from electra_core.errors import UserError
from electra_core.files.protobuf import as_varint, fields
from electra_core.hub.tokenizer_loading import TOKENIZER_FILES
from electra_core.hub.tokenizer_parts import SPECIAL_TOKENS
from electra_core.tokenizer import Tokenizer, WordPieceTokenizer, load_tokenizer


@pytest.mark.parametrize("lowercase", [True, False])
def test_case_survives_in_a_folder_with_only_vocab_txt(
    wordpiece: WordPieceTokenizer, tmp_path: Path, lowercase: bool
) -> None:
    WordPieceTokenizer.from_vocab(tmp_path / "vocab.txt", lowercase=lowercase).save(tmp_path / "out")
    from_json = load_tokenizer(tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").unlink()
    from_vocab = load_tokenizer(tmp_path / "out")
    assert from_json.fingerprint() == from_vocab.fingerprint()
    assert (from_vocab.encode("CATS") == from_vocab.encode("cats")) is lowercase


ADDED = {"content": "[PHI]", "special": True, "normalized": False}
HUB_FOLDERS = {
    "nothing": ({}, {}),
    "accents": ({"do_lower_case": True, "strip_accents": False}, {}),
    "cased without accents": ({"do_lower_case": False, "strip_accents": True}, {}),
    "chinese": ({"do_lower_case": False, "tokenize_chinese_chars": False, "tokenizer_class": "BertTokenizer"}, {}),
    "added": ({}, {"[PHI]": 20, "troponin": 21}),
    "added in the config": (
        {"added_tokens_decoder": {"0": {"content": "[PAD]"}, "20": ADDED, "21": {"content": "Sat"}}},
        {},
    ),
}


@pytest.mark.parametrize("config, added", HUB_FOLDERS.values(), ids=HUB_FOLDERS)
def test_a_vocab_txt_is_read_with_what_lies_beside_it(
    wordpiece: WordPieceTokenizer, tmp_path: Path, config: dict, added: dict
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "electra"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if added:
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    texts = [*TORTURE, "The Cats sat, Café café 東京", "[PHI] [phi] x[PHI]troponin TROPONIN troponins sat"]
    assert ours.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
    assert ours.vocab_size == len(theirs)
    ours.save(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").encode_batch(texts) == ours.encode_batch(texts)


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("name", ["ElectraTokenizer", None, "PreTrainedTokenizerFast"])
def test_where_two_files_disagree_about_case_the_hub_is_followed(
    wordpiece: WordPieceTokenizer, tmp_path: Path, said: bool, name: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "electra"}))
    config = {"do_lower_case": said, **({"tokenizer_class": name} if name else {})}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text(wordpiece.to_json())
    text = "The Cats, CAFÉ café"
    assert (
        load_tokenizer(tmp_path).encode(text) == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"][1:-1]
    )
    told = [record.getMessage() for record in caplog.records if record.name == "electra_core"]
    assert len(told) == (not said and name != "PreTrainedTokenizerFast")
    assert all(said.endswith("beside it, as on the Hub: lowercase True -> False") for said in told)


@pytest.mark.parametrize(
    "beside, message",
    [
        ({"tokenizer_config": {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}},
         "vocab.txt: its tokenizer is a BertJapaneseTokenizer that splits words with mecab, which is not"),
        ({"config": {"tokenizer_class": "BertJapaneseTokenizer"}},
         "BertJapaneseTokenizer that splits words, which is not"),
        ({"tokenizer_config": {"word_tokenizer_type": "sudachi"}}, "splits words with sudachi"),
        ({"added_tokens": {"[PHI]": 25}},
         r"the added token '\[PHI\]' has id 25 in the files beside it, expected 20"),
        ({"added_tokens": {"a": "b"}}, "unknown format|has id b"),
        ({"tokenizer_config": {"added_tokens_decoder": {"20": "x"}}}, "unknown format"),
        ({"tokenizer_config": []}, "tokenizer_config.json: expected a JSON object, got list"),
    ],
)  # fmt: skip
def test_what_lies_beside_a_vocab_txt_and_cannot_be_followed(
    wordpiece: WordPieceTokenizer, tmp_path: Path, beside: dict, message: str
) -> None:
    for name, content in beside.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_added_special_tokens_are_named_in_what_is_saved(wordpiece: WordPieceTokenizer, tmp_path: Path) -> None:
    engine = tokenizers.Tokenizer.from_str(wordpiece.to_json())
    engine.add_special_tokens(["[PHI]"])
    WordPieceTokenizer(engine).save(tmp_path / "out")
    assert "[PHI]" in AutoTokenizer.from_pretrained(tmp_path / "out").all_special_tokens
    wordpiece.save(tmp_path / "plain")
    assert "additional_special_tokens" not in (tmp_path / "plain" / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("prefix", [True, False])
def test_a_byte_level_vocabulary_is_taken_where_words_are_encoded_alone(tmp_path: Path, prefix: bool) -> None:
    engine = tokenizers.ByteLevelBPETokenizer(add_prefix_space=prefix)
    engine.train_from_iterator(["the cat sat"] * 9, vocab_size=300, special_tokens=list(SPECIAL_TOKENS))
    engine.save(str(tmp_path / "tokenizer.json"))
    if not prefix:
        with pytest.raises(UserError, match=r"tokenizer.json: a text's ids differ from the ids of its words"):
            load_tokenizer(tmp_path)
        return
    tokenizer = load_tokenizer(tmp_path)
    plain_text = tokenizer.as_plain_text()
    assert plain_text.encode("the cat") == plain_text.encode("the") + plain_text.encode("cat")
    assert tokenizer.mask_id in tokenizer.encode("a [MASK]") and tokenizer.mask_id not in plain_text.encode(
        "a [MASK]"
    )
    WordEncoder(tokenizer.to_json()).encode(["the cat"])


def test_a_vocabulary_of_xlm_r_is_named(tmp_path: Path) -> None:
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"none of .*; sentencepiece.bpe.model is a vocabulary as XLM-R's"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b"[" * 200_000, r"tokenizer_config.json: not valid JSON .*nested too deeply"),
        ("spiece.model", b"", r"spiece.model: cannot be read as a SentencePiece model \(it is empty\)"),
        ("vocab.txt", b"[PAD]\n[UNK]\nthe\n", r"vocab.txt: .*no \[CLS\], \[SEP\], \[MASK\]"),
        ("vocab.txt", b"[PAD]\nthe\nthe\n", "line 3: 'the' is already on line 2"),
        ("vocab.txt", b"[PAD]\n\xff\n", "invalid UTF-8 at byte 6"),
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer.json"),
        ("tokenizer.json", b"\xff", "tokenizer.json: "),
        ("spiece.model", b"x", "spiece.model: cannot be read as a SentencePiece model"),
        ("other.txt", b"", "none of tokenizer.json, vocab.txt, spiece.model"),
    ],
)
def test_folders_that_hold_no_tokenizer(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name == "tokenizer_config.json":
        WordPieceTokenizer.from_tokens(SPECIAL_TOKENS).save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize("text, said", [("caf\udce9", "byte 0xe9 at character 4"), ("\ud83d", "surrogate U+D83D")])
def test_what_is_no_unicode_is_refused_wherever_it_is_encoded(wordpiece: Tokenizer, text: str, said: str) -> None:
    for encode in (
        wordpiece.encode,
        wordpiece.encode_with_offsets,
        wordpiece.as_plain_text().encode,
        lambda text: wordpiece.encode_batch(["the cat", text]),
    ):
        with pytest.raises(UserError, match=f"the text is not valid UTF-8 .*{re.escape(said)}"):
            encode(text)
    with pytest.raises(TypeError):  # the programmer's mistake
        wordpiece.encode(None)  # type: ignore[arg-type]


def test_what_is_no_unicode_is_refused_whatever_the_library_makes_of_it(wordpiece: Tokenizer) -> None:
    """Version 0.20 drops a lone surrogate without a word; 0.23 raises a TypeError."""
    encoding = SimpleNamespace(ids=[7], offsets=[(0, 1)])
    drops = SimpleNamespace(encode=lambda *_, **__: encoding, encode_batch_fast=lambda *_, **__: [encoding] * 2)
    old = copy(wordpiece)
    old._engine = drops  # type: ignore[assignment]
    assert old.encode("café") == [7]
    for encode in (old.encode, old.encode_with_offsets, lambda text: old.encode_batch(["the cat", text])):
        with pytest.raises(UserError, match=r"the text is not valid UTF-8 \(byte 0xe9 at character 4\)"):
            encode("caf\udce9")


# Of a stranger ---------------------------------------------------------------------------------------------------


def saved_in(folder: Path, name: str) -> Path:
    """A tokenizer's folder that is read by way of the named file."""
    (train_sentencepiece(LINES, 20) if name == "spiece.model" else train_wordpiece(LINES, 60)).save(folder)
    for beside in ("added_tokens.json", "special_tokens_map.json"):
        (folder / beside).write_text("{}")
    (folder / "config.json").write_text("{}")
    if name in ("vocab.txt", "added_tokens.json"):
        (folder / "tokenizer.json").unlink()
    if name == "config.json":
        (folder / "tokenizer_config.json").unlink()
    return folder


LINES = ["the cat sat on the mat and the dog ran"] * 20
FILES = (
    "tokenizer.json", "vocab.txt", "spiece.model", "tokenizer_config.json", "added_tokens.json", "config.json",
    "special_tokens_map.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_a_link_to_somewhere_else(tmp_path: Path, name: str) -> None:
    folder = saved_in(tmp_path / "model", name)
    load_tokenizer(folder)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"^[^:]*model/{name}: a link out of its directory"):
        load_tokenizer(folder)
    if name in TOKENIZER_FILES:
        assert load_tokenizer(folder / name).vocab_size, "the user named this file himself"


def test_a_folder_of_links_is_copied_as_its_refusal_says(tmp_path: Path) -> None:
    folder = saved_in(tmp_path / "model", "tokenizer.json")
    shutil.copytree(folder, tmp_path / "links", copy_function=os.symlink)
    with pytest.raises(UserError, match=r"copy the folder: cp -rL .*links NEW$"):
        load_tokenizer(tmp_path / "links")
    shutil.copytree(tmp_path / "links", tmp_path / "copy")  # cp -rL
    assert load_tokenizer(tmp_path / "copy").fingerprint() == load_tokenizer(folder).fingerprint()


@pytest.mark.parametrize("name", FILES)
def test_the_hub_s_cache_holds_links_to_its_blobs(tmp_path: Path, name: str) -> None:
    cache = tmp_path / "models--some--model"
    snapshot = saved_in(cache / "snapshots" / "0123abc", name)
    before = load_tokenizer(snapshot).fingerprint()
    (cache / "blobs").mkdir()
    for file in [*snapshot.iterdir()]:
        file.rename(cache / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    assert load_tokenizer(snapshot).fingerprint() == before
    (tmp_path / "named").symlink_to(snapshot)
    assert load_tokenizer(tmp_path / "named").fingerprint() == before


def test_a_spiece_model_that_is_none_is_not_passed_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved_in(tmp_path / "model", "spiece.model")
    load_tokenizer(folder).save(tmp_path / "before")
    assert (tmp_path / "before" / "spiece.model").read_bytes() == (folder / "spiece.model").read_bytes()
    (folder / "spiece.model").write_text("something private\n")
    assert not caplog.records
    load_tokenizer(folder).save(tmp_path / "after")
    assert "spiece.model: not a SentencePiece model, so it is not used" in caplog.text
    assert not (tmp_path / "after" / "spiece.model").exists()


def spiece_with(folder: Path, few: bool = False, more: bytes = b"") -> Path:
    """A spiece.model of three pieces, or with one more."""

    def field(number: int, value: bytes) -> bytes:
        return as_varint(number << 3 | 2) + as_varint(len(value)) + value

    folder = saved_in(folder, "spiece.model")
    content = [*fields((folder / "spiece.model").read_bytes())]
    own = [field(1, part.value) for part in content if part.number == 1]
    kept = [field(part.number, part.value) for part in content if part.number != 1]
    if few:
        own = [own[0], own[1], own[-1]]
    if more:
        own.append(field(1, field(1, more) + b"\x15\0\0\0\0"))
    (folder / "spiece.model").write_bytes(b"".join([*own, *kept]))
    return folder / "spiece.model"


def test_a_spiece_model_with_few_pieces_or_strange_ones(tmp_path: Path) -> None:
    few = spiece_with(tmp_path / "few", few=True)
    with pytest.raises(UserError, match=r"begins with \[PAD\], \[UNK\], . instead of"):
        load_tokenizer(few)
    strange = spiece_with(tmp_path / "strange", more=b"\xff\xfe")
    with pytest.raises(UserError, match=r"cannot be read as a SentencePiece model .*utf-8"):
        load_tokenizer(strange)


DAMAGES = {
    "unknown of WordPiece": ("model", {"unk_token": "[FOO]"}, "cannot encode the text .*Missing .UNK. token"),
    "a panic": (
        "normalizer",
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\4\0\0\0" + b"\xff" * 4).decode()},
        "index out of bounds",
    ),
}


@pytest.mark.parametrize("part, change, message", DAMAGES.values(), ids=DAMAGES)
def test_what_only_encoding_shows(tmp_path: Path, part: str, change: dict, message: str) -> None:
    folder = saved_in(tmp_path, "tokenizer.json")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = {token: number for token, number in content["model"]["vocab"].items() if token not in ("a", "b")}
    content["model"]["vocab"] = {token: number for number, token in enumerate(vocab)}
    content[part] = content[part] | change if part == "model" else change
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"tokenizer.json: .*{message}"):
        load_tokenizer(folder)


def test_ids_may_have_gaps(wordpiece: WordPieceTokenizer, tmp_path: Path) -> None:
    """As in a tokenizer.json made from a vocab.txt that had an entry twice."""
    content = json.loads(wordpiece.to_json())
    content["model"]["vocab"]["sat"] = 40
    (tmp_path / "gap").mkdir()
    (tmp_path / "gap" / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "gap")
    assert tokenizer.encode("the sat") == [5, 40] and tokenizer.vocab_size == 41
    with pytest.raises(UserError, match=r"^M: vocabulary sizes differ: 41 in the tokenizer, 40 in the model$"):
        tokenizer.check_fits(40, "M")
    with pytest.raises(ValueError, match="got 39, which no token has"):
        tokenizer.token(39)
    tokenizer.check_fits(41, "M")
    tokenizer.save(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").fingerprint() == tokenizer.fingerprint()
    assert not (tmp_path / "out" / "vocab.txt").exists()
