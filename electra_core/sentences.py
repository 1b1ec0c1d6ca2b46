"""Lines of a document to sentences: a small deterministic rule, no model, no language data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from electra_core.errors import UserError

LINE_MODES = ("auto", "sentence", "paragraph", "wrapped")
WRAPPED_WIDTH = 90  # characters; text broken by hand or by a formatter stays below

# A sentence ends at . ! ? (with closing quotes or brackets) before white space and something that can begin one,
# except after one letter ("J. Smith", "U.S. Navy") and the commonest abbreviations.
_END = re.compile(
    r"(?<=[.!?…])(?<!\b[^\W\d_]\.)(?<!\b(?:Mr|Dr|St|vs|cf|No)\.)(?<!\b(?:Mrs|Jr\.|Gen|Col|Rev|etc)\.)"
    r"""["'”’)\]»]*\s+(?=["'“‘(\[«]*[^\W_a-z])"""
)


def split_document(lines: Sequence[str], mode: str = "auto") -> list[str]:
    """The sentences of a document given as lines.

    mode   "sentence": a line is a sentence; "paragraph": lines are paragraphs, to be split; "wrapped": lines are
           broken anywhere, so they are joined first; "auto": "wrapped" if it looks so, else "paragraph".
    """
    if mode not in LINE_MODES:
        raise UserError(f"lines must be one of {', '.join(LINE_MODES)}, got {mode!r}")
    if mode == "sentence":
        return [line.strip() for line in lines]
    if mode == "wrapped" or (mode == "auto" and looks_wrapped(lines)):
        lines = [" ".join(line.strip() for line in lines)]
    return [sentence for line in lines for sentence in split_sentences(line)]


def split_sentences(text: str) -> Iterator[str]:
    """The sentences of a paragraph, without the white space between them."""
    start = 0
    for match in _END.finditer(text):
        end = match.start() + len(match.group().rstrip())
        yield text[start:end].strip()
        start = match.end()
    last = text[start:].strip()
    if last:
        yield last


def looks_wrapped(lines: Sequence[str]) -> bool:
    """Whether the lines of a document are broken by width: all short, and few end where a sentence ends."""
    if len(lines) < 4 or max(map(len, lines)) > WRAPPED_WIDTH:
        return False
    return _share(line.rstrip().endswith((".", "!", "?", '"', "”", ":")) for line in lines) < 0.4


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)
