"""Words of raw texts in any script: where they begin and end, and what is seen of them."""

from __future__ import annotations

import json

import pytest
from reading import json_lines, words_to_predict, write

from electra_core.labelled_data.tagged_files import from_text, read_tagged


@pytest.mark.parametrize(
    "text",
    [
        "cafe\u0301s are fine",  # an accent of its own
        "हिन्दी में लिखा",  # vowel signs
        "می\u200cخواهم بروم",  # a joiner
        "Eve's state-of-the-art 3.14",
    ],
)
def test_words_are_not_cut_at_marks(text):
    example = from_text(text)
    assert list(example.words) == text.split()
    assert [text[a:b] for a, b in example.offsets] == list(example.words)


@pytest.mark.parametrize(
    "text, words",
    [
        ("葛\U000e0100城市", "葛\U000e0100 城 市"),  # a variant of a character
        ("田中さんは東京へ。", "田 中 さ ん は 東 京 へ 。"),
        ("か\u3099ｷﾞター", "か\u3099 ｷ ﾞ タ ー"),
        ("ไปที่กรุงเทพ", "ไ ป ที่ ก รุ ง เ ท พ"),
        ("ປະເທດ", "ປ ະ ເ ທ ດ"),
        ("မြန်မာ", "မြ န် မာ"),
        ("ខ្មែរ", "ខ្ មែ រ"),
        ("2024年5月 ๑๒๓", "2024 年 5 月 ๑๒๓"),
        ("iPhone15を買うa-b", "iPhone15 を 買 う a-b"),
        ("한국어 한국어", "한국어 한국어"),
    ],
)
def test_where_a_script_has_no_spaces_characters_are_words(text, words):
    example = from_text(text)
    assert list(example.words) == words.split()
    assert [text[a:b] for a, b in example.offsets] == list(example.words)


def test_other_characters_are_words_of_their_own():
    words = ("(", "Ann", ")", "met", "“", "Bob", "”", ",", "👍", "🏽", "!")
    assert from_text("(Ann) met\u2028“Bob”, 👍🏽!").words == words


HIDDEN = (
    "\u00ad",
    "\u200b",
    "\u200e",
    "\u200f",
    "\u202a",
    "\u2060",
    "\ufeff",
    "\x00",
    "\x1b",
    "\x7f",
    "\U000e0067",
)


@pytest.mark.parametrize("hidden", [*HIDDEN, "\u200b\u00ad"], ids=ascii)
def test_characters_that_are_not_seen_neither_make_nor_cut_words(hidden):
    """They may lie anywhere; a word does not begin or end with them, so that its place is that of what is seen."""
    text = "$co$operate,$ state$-$of-the-$art$ cafe$\u0301s $ $$ 3$.14 ไ$ป 東$京 $👍🏽$!$".replace("$", hidden)
    example = from_text(text)
    seen = [word.replace(hidden, "") for word in example.words]
    assert seen == ["cooperate", ",", "state-of-the-art", "cafe\u0301s", "3.14", *"ไป東京👍🏽!"]
    assert [text[a:b] for a, b in example.offsets] == list(example.words)
    assert not any(word.startswith(hidden) or word.endswith(hidden) for word in example.words)
    assert from_text(hidden).words == from_text(f"{hidden} \u200d").words == ()


def test_words_that_are_given_stay_as_they_are(tmp_path):
    file = json_lines(tmp_path / "a.jsonl", {"tokens": ["\u00ad", "\ufeffAnn"]})
    assert words_to_predict(file) == [["\u00ad", "\ufeffAnn"]]


def test_a_span_has_the_place_of_what_is_seen(tmp_path):
    text = "\ufeffAnn met B\u00adob\u200b."
    given = [[0, 4, "PER"], [9, 14, "PER"]]  # with the mark before and the space behind
    (example,) = read_tagged(json_lines(tmp_path / "a.jsonl", {"text": text, "entities": given}))
    assert example.words == from_text(text).words == ("Ann", "met", "B\u00adob", ".")
    assert example.tags == ("B-PER", "O", "B-PER", "O") and example.offsets == ((1, 4), (5, 8), (9, 13), (14, 15))


def test_a_sentence_of_nothing_is_predicted_as_nothing(tmp_path):
    file = write(tmp_path / "a.jsonl", json.dumps({"text": ""}) + "\n")
    assert words_to_predict(file) == [[]]
