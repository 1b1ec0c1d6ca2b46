"""The rule that splits text into sentences, and the one that tells wrapped lines from paragraphs."""

import pytest

from electra_core.sentences import looks_wrapped, split_document, split_sentences


def test_sentences_of_a_paragraph() -> None:
    text = (
        'Mr. J. Smith of the U.S. Navy left. "Why?" he asked. (Nobody knew.) See No. 5 of Prof. Moriarty\'s list! '
        "It was 3.5 m long... Then – nothing. éclair is lower case. Ça va? 東京。"
    )
    assert list(split_sentences(text)) == [
        "Mr. J. Smith of the U.S. Navy left.",
        '"Why?" he asked.',
        "(Nobody knew.)",
        "See No. 5 of Prof. Moriarty's list!",
        "It was 3.5 m long...",
        "Then – nothing.",
        "éclair is lower case.",
        "Ça va?",
        "東京。",
    ]
    assert list(split_sentences("  ")) == [] and list(split_sentences("Heading")) == ["Heading"]


def test_lines_are_joined_where_they_are_wrapped() -> None:
    wrapped = [
        "It was a bright cold day in the north, and the clocks were all",
        "striking at once. The people on the bridge looked up, but the tower",
        "stood as it always had. Nobody could say afterwards who had been the",
        "first to run.",
    ]
    paragraphs = [
        "Title",
        "One sentence that is rather long. And one more.",
        "And a third, longer one, too.",
        "End.",
    ]
    poem = ["Short lines", "of a list", "or of verse", "go on", "their own"]
    assert [looks_wrapped(lines) for lines in (wrapped, paragraphs, poem)] == [True, False, False]
    assert split_document(wrapped) == [
        "It was a bright cold day in the north, and the clocks were all striking at once.",
        "The people on the bridge looked up, but the tower stood as it always had.",
        "Nobody could say afterwards who had been the first to run.",
    ]
    assert split_document(poem) == poem and len(split_document(poem, "wrapped")) == 1
    assert split_document(paragraphs)[1:3] == ["One sentence that is rather long.", "And one more."]
    assert split_document([" a. B. ", " "], "sentence") == ["a. B."]
    with pytest.raises(ValueError, match="mode must be one of"):
        split_document([], "lines")
