"""Which tokens of a text were replaced? The discriminator's prediction for each, and ways to show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import torch

from electra_core.electra import Discriminator
from electra_core.errors import printable
from electra_core.marks import with_marks
from electra_core.packing import pack
from electra_core.reports.pages import page
from electra_core.tokenizer import Tokenizer

SUSPICIOUS = 0.5
MOST_NAMED = 3  # of the tokens with the highest probabilities
WINDOWS_AT_A_TIME = 16  # of a long text, so that memory does not grow with it


@dataclass(frozen=True)
class TokenScore:
    """One token of a text, and the discriminator's probability that it was replaced."""

    token: str
    """The token as in the vocabulary."""
    start: int
    """Offset of its first character in the text."""
    end: int
    """Offset behind its last character."""
    probability: float
    """Probability that the token was replaced, in [0, 1]."""


def detect(discriminator: Discriminator, tokenizer: Tokenizer, text: str) -> list[TokenScore]:
    """The replaced-token probability of every token of `text`, in order; [CLS] and [SEP] are not reported.

    A text longer than the model has positions for is read in windows that overlap by half, and each token's
    probability comes from the window in which it is nearest to the middle.

    Args:
        text: any length; empty text has no tokens. Names of special tokens in it count as ordinary characters.
    """
    tokenizer = tokenizer.as_plain_text()
    ids, offsets = tokenizer.encode_with_offsets(text)
    probabilities = replaced_probabilities(discriminator, ids, tokenizer.cls_id, tokenizer.sep_id)
    return [
        TokenScore(tokenizer.token(token_id), start, end, probability)
        for token_id, (start, end), probability in zip(ids, with_marks(text, offsets), probabilities)
    ]


@torch.inference_mode()
def replaced_probabilities(discriminator: Discriminator, ids: list[int], cls_id: int, sep_id: int) -> list[float]:
    """`detect` on token ids: a probability for every id."""
    if not ids:
        return []
    room = discriminator.config.max_position_embeddings - 2
    starts = list(range(0, max(1, len(ids) - room // 2), max(1, room // 2))) if len(ids) > room else [0]
    device = next(discriminator.parameters()).device
    best = [(-1, 0.0)] * len(ids)  # (tokens to the nearer end of the window, probability)
    for first in range(0, len(starts), WINDOWS_AT_A_TIME):
        some = starts[first : first + WINDOWS_AT_A_TIME]
        batch = pack([[cls_id, *ids[start : start + room], sep_id] for start in some])
        probabilities_T = discriminator(batch.to(device)).float().sigmoid().cpu()
        for start, window_S in zip(some, probabilities_T.split(batch.lengths.tolist())):
            values = window_S[1:-1].tolist()
            for i, probability in enumerate(values):
                # A window's end costs nothing where it is the end of the text.
                before = i if start else len(ids)
                after = len(values) - 1 - i if start + len(values) < len(ids) else len(ids)
                best[start + i] = max(best[start + i], (min(before, after), probability), key=lambda b: b[0])
    return [probability for _, probability in best]


# ------------------------------------------------------------------------------------------------ showing it


def to_json(text: str, scores: Sequence[TokenScore]) -> dict[str, Any]:
    """What `electra detect --json` prints."""
    return {"text": text, "tokens": [asdict(score) for score in scores]}


def to_terminal(text: str, scores: Sequence[TokenScore], *, colour: bool) -> str:
    """The text with every token shaded by its probability; without `colour`, suspicious tokens are marked.

    >>> to_terminal("a cat", [TokenScore("cat", 2, 5, 0.75)], colour=False)
    'a [cat 75%]'
    """
    parts: list[str] = []
    for gap, surface, score in _surfaces(text, scores):
        parts.append(printable(gap))
        surface = printable(surface)
        if colour:
            parts.append(shade(surface, score.probability))
        else:
            marked = score.probability >= SUSPICIOUS
            parts.append(f"[{surface} {100 * score.probability:.0f}%]" if marked else surface)
    return "".join(parts) + printable(text[_end(scores) :])


def shade(text: str, probability: float) -> str:
    """`text` on a background from pale to strong orange (24-bit ANSI); tokens below 10% are left unshaded.

    Sets both colours, so that it is readable on light and dark terminals.
    """
    if probability < 0.1 or not text:
        return text
    red, green, blue = (round(a + (b - a) * probability) for a, b in zip((255, 244, 230), (238, 96, 16)))
    return f"\x1b[38;2;20;20;20;48;2;{red};{green};{blue}m{text}\x1b[0m"


def tokens_html(text: str, scores: Sequence[TokenScore], originals: Mapping[int, str] | None = None) -> str:
    """The text as HTML, every token shaded by its probability.

    Args:
        originals: index of a score -> the original text of a replaced token.
    """
    originals = originals or {}
    parts: list[str] = []
    for index, (gap, surface, score) in enumerate(_surfaces(text, scores)):
        parts.append(escape(gap))
        if not surface:
            continue
        p = f"{score.probability:.4f}"
        was = originals.get(index)
        if was is None:
            parts.append(f'<span class="tok" style="--p:{p}" data-p="{p}" tabindex="0">{escape(surface)}</span>')
        else:
            parts.append(
                f'<span class="pair"><del>{escape(was)}</del><ins class="tok was" style="--p:{p}" data-p="{p}" '
                f'data-was="{escape(was)}" tabindex="0">{escape(surface)}</ins></span>'
            )
    kind = "tokens annotated" if originals else "tokens"
    return f'<p class="{kind}">{"".join(parts)}{escape(text[_end(scores) :])}</p>'


SCALE_HTML = '<div class="scale"><span>original</span><span class="ramp"></span><span>replaced</span></div>'


def to_html(text: str, scores: Sequence[TokenScore], model: str) -> str:
    """One self-contained page; `model` is the model's name on it."""
    suspicious = sum(score.probability >= SUSPICIOUS for score in scores)
    likely = ", ".join(f"<bdi>{escape(word)}</bdi> {p}" for word, p in _most_suspicious(scores))
    most = f" Most suspicious: {likely}." if scores else ""
    body = (
        "<h1>Which words were replaced?</h1>\n"
        f'<p class="lead">The discriminator <code>{escape(model)}</code> read {len(scores)} tokens and finds '
        f"{suspicious} of them more likely replaced than original.{most} Point at a token for its "
        "probability.</p>\n"
        f'{SCALE_HTML}\n<div class="card">{tokens_html(text, scores)}</div>'
    )
    return page("Replaced tokens", body)


def most_suspicious(scores: Sequence[TokenScore]) -> str:
    """The tokens with the highest probabilities, as text.

    >>> most_suspicious([TokenScore("▁a", 0, 1, 0.02), TokenScore("▁cat", 2, 5, 0.75)])
    'cat 75%, a 2%'
    """
    return printable(", ".join(f"{word} {probability}" for word, probability in _most_suspicious(scores)))


def _most_suspicious(scores: Sequence[TokenScore]) -> list[tuple[str, str]]:
    likely = sorted(scores, key=lambda score: -score.probability)[:MOST_NAMED]
    return [(score.token.strip("▁"), f"{score.probability:.0%}") for score in likely]


def ends_openly(text: str, scores: Sequence[TokenScore]) -> bool:
    """Whether the last token is suspicious and no punctuation ends the text, which may be the reason.

    >>> ends_openly("a cat", [TokenScore("cat", 2, 5, 0.75)]), ends_openly("a cat.", [TokenScore(".", 5, 6, 0.75)])
    (True, False)
    """
    return bool(scores) and scores[-1].probability >= SUSPICIOUS and text.rstrip()[-1:].isalnum()


def _surfaces(text: str, scores: Sequence[TokenScore]) -> list[tuple[str, str, TokenScore]]:
    """(text before the token, the token's own text, score); tokens that share characters share them once."""
    parts = []
    done = 0
    for score in scores:
        start, end = max(score.start, done), max(score.end, done)
        parts.append((text[done:start], text[start:end], score))
        done = end
    return parts


def _end(scores: Sequence[TokenScore]) -> int:
    return max((score.end for score in scores), default=0)
