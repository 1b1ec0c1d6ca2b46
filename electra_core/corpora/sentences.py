"""Splits the lines of a document into sentences, by a small deterministic rule: no model, no language data.

It need not be perfect: pre-training only needs segments that begin and end where a thought does. So it errs on
the side of long sentences, and leaves lines in scripts without such marks (Thai) whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

LINE_MODES = ("auto", "sentence", "paragraph", "wrapped")
WRAPPED_WIDTH = 120  # characters; nearly all lines wrapped by hand or by a program stay below this,
WRAPPED_MEAN = 40  # but are at least this long on average, unlike lists or verse,
WRAPPED_ENDS = 0.5  # and a smaller share ends like a sentence (100 novels: wrapped < 0.4, others > 0.7)
WRAPPED_LINES = 4  # fewer lines tell too little
WRAPPED_SPACES = 0.05  # of the characters; scripts with fewer have no words to wrap, nor lines to join by spaces

# A sentence ends after . ! ? (and closing quotes and brackets), before white space and something that can begin
# one, perhaps behind a quote or Spanish ¿: not a lower-case letter, nor a digit, as in "No. 5". Quotes open in
# some languages as they close in others („so“, »so«), and stand apart in French (« so »). Not after a single
# letter ("J. Smith", "the U.S. Navy") nor after a title. Other scripts' marks count like the full stop; full-width
# ones need no white space, but the sentence must not continue after a quotation that they end ("...?"と, said).
_OTHERS = "।॥؟۔։።፧။។៕"  # Devanagari and related scripts, Arabic, Urdu, Armenian, Ethiopic, Burmese, Khmer
_WIDE, _WIDE_CLOSE = "。！？｡", "”’」』）】〉》〕］"
_QUOTES = "\"'“”‘’«»‹›"
_LOWER = "".join(c for c in map(chr, range(128, 0x2000)) if c.islower() and c.title() != c)  # not Georgian
_END = re.compile(
    rf"(?<=[.!?…{_OTHERS}])(?<!\b[^\W\d_]\.)(?<!\b(?:Mr|Dr|St|Lt|vs|cf)\.)(?<!\b(?:Mrs|Rev|Gen|Col|Sgt|Gov|Sen)\.)"
    r"(?<!\b(?:Prof|Capt)\.)"
    rf"(?:[{_QUOTES})\]]|\s[»›])*\s+(?=(?:[{_QUOTES}„‚(\[¿¡]|[«‹]\s)*[^\W\d_a-z{_LOWER}])"
    rf"|[{_WIDE}]+(?:(?![{_WIDE}{_WIDE_CLOSE}])|[{_WIDE_CLOSE}]+(?![{_WIDE_CLOSE}]|と|って))"
)
_SENTENCE_ENDS = (
    *(f"{mark}{close}" for mark in f".!?:…{_OTHERS}" for close in ("", '"', "'", "”", "’", ")")),
    *(f"{mark}{close}" for mark in f"{_WIDE}：" for close in ("", *_WIDE_CLOSE)),
)


def split_document(lines: Sequence[str], mode: str = "auto") -> list[str]:
    """The sentences of a document, in order, none blank.

    mode   "sentence": a line is a sentence. "paragraph": lines are paragraphs, to be split. "wrapped": lines are
           broken anywhere, so they are joined first. "auto": "wrapped" if they look it, otherwise "paragraph".
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
