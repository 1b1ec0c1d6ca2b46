"""A text with some words replaced, and the discriminator's opinion of every token of it."""

from __future__ import annotations

from electra_core.detect import TokenScore
from electra_core.electra import Electra
from electra_core.report import Passage
from electra_core.tokenizer import Tokenizer
from electra_core.trace import trace

WORD_START = "▁"  # how SentencePiece marks a piece that begins a word
CONTINUATION = "##"  # how WordPiece marks one that does not


def generated_passage(
    electra: Electra, tokenizer: Tokenizer, text: str, *, title: str, note: str, seed: int
) -> Passage:
    """The model's own generator puts words into `text`, its discriminator judges: one pre-training example.

    The spacing of `text` stays, but a drawn piece that begins a word gets a space before it, and one that
    goes on a word gets none, because that is how the discriminator reads it. The text is cut where the
    model's positions end.
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
    """The space before a drawn piece, where `gap` stood before the original."""
    if piece.startswith(WORD_START):
        return gap or " "
    return "" if kind == "sentencepiece" or piece.startswith(CONTINUATION) else gap
