"""Accents and vowel signs that are characters of their own, and belong to the letter before them.

A lower-case vocabulary drops them, and its tokens end before them: the answer "Café" would lose its accent, if
that is a character of its own, and a Thai word the sign of its tone. `transformers` gives such places, and
`Tokenizer.encode_with_offsets` the same; those who show a piece of the text extend them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def with_marks(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The tokens' ranges of characters in `text`, each extended over the marks behind it that no token covers.

    >>> with_marks("cafe\\u0301 a", [(0, 4), (6, 7)])
    [(0, 5), (6, 7)]
    """
    if text.isascii():
        return list(offsets)
    nexts = [*(begin for begin, _ in offsets[1:]), len(text)]
    return [(begin, _behind_marks(text, end, stop)) for (begin, end), stop in zip(offsets, nexts)]


def _behind_marks(text: str, end: int, stop: int) -> int:
    while end < stop and unicodedata.category(text[end])[0] == "M":
        end += 1
    return end
