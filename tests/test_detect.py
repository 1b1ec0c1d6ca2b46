"""`detect`: every token gets the discriminator's probability, however long the text, and is shown faithfully."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch

from electra_core.config import EncoderConfig
from electra_core.detect import (
    WINDOWS_AT_A_TIME,
    TokenScore,
    detect,
    ends_openly,
    most_suspicious,
    replaced_probabilities,
    shade,
    to_html,
    to_json,
    to_terminal,
    tokens_html,
)
from electra_core.electra import Discriminator
from electra_core.initialisation import initialise
from electra_core.packing import pack
from electra_core.tokenizer import Tokenizer, WordPieceTokenizer

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the quick brown fox jump ##ed over . , [ ] mask".split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return WordPieceTokenizer.from_vocab(path)


@pytest.fixture(scope="module")
def discriminator() -> Discriminator:
    config = EncoderConfig(
        vocab_size=len(WORDS),
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    model = Discriminator(config)
    initialise(model, initializer_range=0.5, seed=0)
    return model.eval()


def test_every_token_gets_the_models_probability(discriminator: Discriminator, tokenizer: Tokenizer) -> None:
    text = "The quick  fox jumped."
    scores = detect(discriminator, tokenizer, text)
    assert [s.token for s in scores] == ["the", "quick", "fox", "jump", "##ed", "."]
    assert [text[s.start : s.end] for s in scores] == ["The", "quick", "fox", "jump", "ed", "."]
    ids = [tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id]
    expected = discriminator(pack([ids])).sigmoid()[1:-1]
    torch.testing.assert_close(torch.tensor([s.probability for s in scores]), expected.detach())


def test_special_names_in_a_text_are_plain_characters(discriminator: Discriminator, tokenizer: Tokenizer) -> None:
    assert [s.token for s in detect(discriminator, tokenizer, "[MASK]")] == ["[", "mask", "]"]
    assert detect(discriminator, tokenizer, "") == []


@pytest.mark.parametrize(
    ("room", "length"), [*((10, length) for length in (1, 9, 10, 11, 14, 15, 16, 40, 43, 200)), (8, 9), (8, 40)]
)
def test_long_texts_are_read_in_windows_and_the_middle_counts(
    discriminator: Discriminator, room: int, length: int
) -> None:
    """So many ids fit; each id's value must come from the window in which it is farthest from a cut."""
    discriminator = Discriminator(replace(discriminator.config, max_position_embeddings=room + 2)).eval()
    initialise(discriminator, 0.5, seed=0)
    ids = torch.randint(5, len(WORDS), (length,), generator=torch.Generator().manual_seed(length)).tolist()
    found = replaced_probabilities(discriminator, ids, 2, 3)
    assert len(found) == length
    candidates: list[list[tuple[int, float]]] = [[] for _ in ids]
    for start in range(0, length, room // 2):
        window = ids[start : start + room]
        values = discriminator(pack([[2, *window, 3]])).sigmoid()[1:-1].tolist()
        for i, value in enumerate(values):
            before = i if start else 1000
            after = len(values) - 1 - i if start + room < length else 1000
            candidates[start + i].append((min(before, after), value))
        if start + room >= length:
            break
    for value, options in zip(found, candidates, strict=True):
        best = max(margin for margin, _ in options)
        assert any(value == pytest.approx(v, abs=1e-5) for margin, v in options if margin == best)


def test_a_batch_does_not_grow_with_the_text(discriminator: Discriminator) -> None:
    tokens: list[int] = []
    hook = discriminator.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].num_tokens))
    with hook:
        replaced_probabilities(discriminator, [5] * 1000, 2, 3)
    assert len(tokens) > 10 and max(tokens) == WINDOWS_AT_A_TIME * 12


def test_dropout_never_touches_the_answer(tokenizer: Tokenizer, discriminator: Discriminator) -> None:
    discriminator.train()
    try:
        again = detect(discriminator, tokenizer, "the fox")
    finally:
        discriminator.eval()
    assert again == detect(discriminator, tokenizer, "the fox")


TEXT = 'A <b>"cat"</b> sat.'
SCORES = [TokenScore("a", 0, 1, 0.02), TokenScore("cat", 6, 9, 0.75), TokenScore("sat", 15, 18, 0.5)]


def test_terminal_keeps_the_text() -> None:
    assert to_terminal(TEXT, SCORES, colour=False) == 'A <b>"[cat 75%]"</b> [sat 50%].'
    coloured = to_terminal(TEXT, SCORES, colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == TEXT
    assert coloured.count("\x1b[0m") == 2, "the unlikely one is left alone"
    assert shade("x", 0.9) != shade("x", 0.5)


@pytest.mark.parametrize("colour", [False, True])
def test_a_text_cannot_steer_the_terminal(colour: bool) -> None:
    text = "\x1b]0;a\x07 \x9bc b\x1b[2J"
    scores = [TokenScore("\x1b[2Ja", 4, 5, 0.75), TokenScore("c", 7, 9, 0.75)]
    shown = to_terminal(text, scores, colour=colour) + most_suspicious(scores)
    assert not re.search(r"[\x07\x9b]|\x1b(?!\[[0-9;]*m)", shown)
    assert r"\x1b]0;" in shown and r"\x07" in shown and r"\x9bc" in shown and shown.count(r"\x1b[2J") == 2


def test_html_keeps_the_text_and_escapes_it() -> None:
    html = tokens_html(TEXT, SCORES)
    assert "<b>" not in html
    assert unescape(re.sub(r"<[^>]*>", "", html)) == TEXT
    assert re.findall(r'data-p="([\d.]+)"', html) == ["0.0200", "0.7500", "0.5000"]
    assert "data-was" not in html


def test_words_from_right_to_left_do_not_mix_with_their_figures() -> None:
    """An Arabic word takes the figure behind it to its other side, unless it is set apart."""
    scores = [TokenScore("▁الملف", 0, 5, 0.75), TokenScore("فتح", 6, 9, 0.5)]
    assert "<bdi>الملف</bdi> 75%, <bdi>فتح</bdi> 50%." in to_html("الملف فتح", scores, "m")
    assert most_suspicious(scores) == "الملف 75%, فتح 50%"


def test_a_page_shows_a_text_from_right_to_left_as_such() -> None:
    assert re.search(r"\n\.tokens {[^}]*unicode-bidi: plaintext;", to_html("", [], "m"))


def test_html_shows_what_stood_there_before() -> None:
    html = tokens_html(TEXT, SCORES, {1: "<dog>"})
    assert "<del>&lt;dog&gt;</del>" in html and 'data-was="&lt;dog&gt;"' in html
    assert html.count("<ins") == 1


def test_tokens_that_share_characters_show_them_once() -> None:
    """Byte pieces of one character all cover that character."""
    scores = [TokenScore("é1", 0, 1, 0.1), TokenScore("é2", 0, 1, 0.9), TokenScore("t", 1, 2, 0.1)]
    assert to_terminal("ét", scores, colour=False).count("é") == 1
    assert unescape(re.sub(r"<[^>]*>", "", tokens_html("ét", scores))) == "ét"


def test_json_round_trips() -> None:
    assert json.loads(json.dumps(to_json(TEXT, SCORES)))["tokens"][1] == {
        "token": "cat",
        "start": 6,
        "end": 9,
        "probability": 0.75,
    }


def test_page_is_whole_and_counts() -> None:
    html = to_html(TEXT, SCORES, "a <model>")
    assert html.startswith("<!doctype html>") and html.rstrip().endswith("</html>")
    assert "read 3 tokens" in html and "2 of them more likely replaced" in html
    assert "a &lt;model&gt;" in html


@pytest.mark.parametrize(
    ("text", "probability", "openly"),
    [
        ("the quick fox", 0.8, True),
        ("the quick fox ", 0.8, True),
        ("the quick fox", 0.2, False),
        ("fox.", 0.8, False),
    ],
)
def test_a_sentence_without_its_end_is_noticed(text: str, probability: float, openly: bool) -> None:
    scores = [TokenScore("the", 0, 3, 0.9), TokenScore("last", len(text) - 1, len(text), probability)]
    assert ends_openly(text, scores) is openly
    assert not ends_openly("", [])
