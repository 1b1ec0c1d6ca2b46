"""How many columns a text takes in a terminal, where Chinese letters take two and accents none."""

from __future__ import annotations

import unicodedata

_NO_WIDTH = frozenset(("Mn", "Me", "Cf"))  # marks on a letter, and what is not seen
_ZERO = (range(0x1160, 0x1200), range(0xD7B0, 0xD800))  # vowels and final consonants of a Korean syllable


def width_of(text: str) -> int:
    """The columns that `text` takes, by Unicode's classes; of emoji joined into one, terminals differ.

    >>> width_of("cat"), width_of("北京"), width_of("e\\u0301")
    (3, 4, 1)
    """
    return len(text) if text.isascii() else sum(map(_width, text))


def _width(letter: str) -> int:
    if unicodedata.category(letter) in _NO_WIDTH or any(ord(letter) in part for part in _ZERO):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def fitted(text: str, width: int, *, left: bool = True) -> str:
    """`text` with spaces behind it, or before it, so that it takes at least `width` columns."""
    spaces = " " * (width - width_of(text))
    return text + spaces if left else spaces + text
