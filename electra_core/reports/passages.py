"""A text with some tokens replaced, and the discriminator's score for every token."""

from __future__ import annotations

from electra_core.detect import TokenScore
from electra_core.electra import Electra
from electra_core.reports.demo_page import Passage
from electra_core.tokenizer import Tokenizer
from electra_core.trace import trace

WORD_START = "▁"  # how SentencePiece marks a piece that begins a word
CONTINUATION = "##"  # how WordPiece marks one that does not


def generated_passage(
    electra: Electra, tokenizer: Tokenizer, text: str, *, title: str, note: str, seed: int
) -> Passage:
    """One pre-training example from `text`: the model's generator replaces tokens, and its discriminator judges.

    The spacing of `text` is kept, except that a drawn piece that begins a word gets a space before it, and one
    that continues a word gets none, because that is how the discriminator reads it. The text is truncated to
    the model's positions.
    """
    tokenizer = tokenizer.as_plain_text()
    _, offsets = tokenizer.encode_with_offsets(text)
    parts: list[str] = []
    scores: list[TokenScore] = []
    originals: dict[int, str] = {}
    length = done = 0
    for index, (token, (start, end)) in enumerate(
        zip(trace(electra, tokenizer, text, seed).tokens[1:-1], offsets)
    ):
        start, end = max(start, done), max(end, done)
        gap, surface = text[done:start], text[start:end]
        if token.replaced:
            originals[index] = surface or token.token
            gap = _gap(token.corrupted, gap, tokenizer.kind) if parts else ""
            surface = token.corrupted.removeprefix(WORD_START).removeprefix(CONTINUATION)
        parts += [gap, surface]
        scores.append(
            TokenScore(token.corrupted, length + len(gap), length + len(gap + surface), token.probability)
        )
        length += len(gap + surface)
        done = end
    return Passage(title, note, "".join(parts), scores, originals)


def _gap(piece: str, gap: str, kind: str) -> str:
    """The space before a drawn piece; `gap` is the one before the original."""
    if piece.startswith(WORD_START):
        return gap or " "
    return "" if kind == "sentencepiece" or piece.startswith(CONTINUATION) else gap
