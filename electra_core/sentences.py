"""Lines of a document to sentences: a small deterministic rule, no model, no language data.

It need not be perfect: pre-training only wants segments that begin and end where a thought does. So it errs on
the side of too long a sentence, and leaves scripts without such marks (Thai) in one piece per line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

LINE_MODES = ("auto", "sentence", "paragraph", "wrapped")
WRAPPED_WIDTH = 120  # characters; nearly all lines broken by hand or by a program stay below,
WRAPPED_MEAN = 40  # but are this long on average, unlike those of a list or of verse,
WRAPPED_ENDS = 0.5  # and fewer than this share end like a sentence (100 novels: wrapped < 0.4, others > 0.7)
WRAPPED_LINES = 4  # fewer tell too little
WRAPPED_SPACES = 0.05  # of the characters; scripts that need fewer cannot be joined by one, nor have words to wrap

# A sentence ends behind . ! ? (and closing quotes and brackets) before white space and something that begins
# one: no lower-case letter, and no digit, as in "No. 5". Not after a single letter ("J. Smith", "the U.S. Navy")
# nor after a title. Other scripts' marks are as . is; behind full-width ones no white space is needed, only that a
# quotation that they end is not gone on with ("...?"と, said).
_OTHERS = "।॥؟۔։።፧။។៕"  # Devanagari and its likes, Arabic, Urdu, Armenian, Ethiopic, Burmese, Khmer
_WIDE, _WIDE_CLOSE = "。！？｡", "”’」』）】〉》〕］"
_END = re.compile(
    rf"(?<=[.!?…{_OTHERS}])(?<!\b[^\W\d_]\.)(?<!\b(?:Mr|Dr|St|Lt|vs|cf)\.)(?<!\b(?:Mrs|Rev|Gen|Col|Sgt|Gov|Sen)\.)"
    r"(?<!\b(?:Prof|Capt)\.)"
    r"""["'”’)\]»]*\s+(?=["'“‘(\[«]*[^\W\d_a-z])"""
    rf"|[{_WIDE}]+(?:(?![{_WIDE}{_WIDE_CLOSE}])|[{_WIDE_CLOSE}]+(?![{_WIDE_CLOSE}]|と|って))"
)
_SENTENCE_ENDS = (
    *(f"{mark}{close}" for mark in f".!?:…{_OTHERS}" for close in ("", '"', "'", "”", "’", ")")),
    *(f"{mark}{close}" for mark in f"{_WIDE}：" for close in ("", *_WIDE_CLOSE)),
)


def split_document(lines: Sequence[str], mode: str = "auto") -> list[str]:
    """The sentences of a document, in order, none blank.

    mode   "sentence": a line is a sentence. "paragraph": lines are paragraphs, to be split. "wrapped": lines are
           broken anywhere, so they are joined first. "auto": "wrapped" if they look so, else "paragraph".
    """
    if mode not in LINE_MODES:
        raise ValueError(f"mode: expected one of {LINE_MODES}, got {mode!r}")
    if mode == "sentence":
        return [stripped for line in lines if (stripped := line.strip())]
    if mode == "wrapped" or (mode == "auto" and looks_wrapped(lines)):
        lines = [" ".join(line.strip() for line in lines)]
    return [sentence for line in lines for sentence in split_sentences(line)]


def split_sentences(text: str) -> Iterator[str]:
    """The sentences of a paragraph, without the white space around them."""
    start = 0
    for end in _END.finditer(text):
        yield text[start : end.end()].strip()
        start = end.end()
    if last := text[start:].strip():
        yield last


def looks_wrapped(lines: Sequence[str]) -> bool:
    """Whether the lines of a document are broken by width rather than where a sentence or a paragraph ends."""
    count = len(lines)
    if count < WRAPPED_LINES or sum(map(len, lines)) < WRAPPED_MEAN * count:
        return False
    if sum(len(line) > WRAPPED_WIDTH for line in lines) > 0.02 * count:
        return False
    if sum(line.count(" ") for line in lines) < WRAPPED_SPACES * sum(map(len, lines)):
        return False
    return sum(line.rstrip().endswith(_SENTENCE_ENDS) for line in lines) < WRAPPED_ENDS * count
