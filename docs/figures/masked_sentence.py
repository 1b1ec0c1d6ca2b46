"""One sentence on its way through a pre-training step of the shipped `tiny`, from the data of `electra trace`."""

from __future__ import annotations

from html import escape
from pathlib import Path

from style import MONO, save_svg, target

import electra_core
from electra_core.trace import TokenTrace, load_electra, trace
from electra_core.tracing.words import percent

TEXT, SEED = "he was born in london and studied at the university of oxford.", 227  # both outcomes of a draw
CHARACTER, ROW, LEFT, TOP, GAP = 8.1, 50.0, 118.0, 34.0, 8.0

electra, tokenizer = load_electra(Path(electra_core.__file__).parent / "tiny" / "discriminator")
result = trace(electra, tokenizer, TEXT, seed=SEED)


def shown(token: str) -> str:
    return token.replace("▁", "")


def box(x: float, y: float, width: float, style: str) -> str:
    """A cell's frame or shade."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="28" rx="6" style="{style}"/>'


def text(x: float, y: float, words: str, style: str) -> str:
    """Words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" style="{style}">{escape(words)}</text>'


def cell(x: float, row: int, width: float, word: str, colour: str, strong: bool, shade: float = 0.0) -> str:
    """A word in its frame; `strong`: at a chosen position."""
    y = TOP + row * ROW
    frame = f"stroke: var(--{colour if strong else 'line'}); stroke-width: {1.8 if strong else 1}"
    tone = colour if strong and shade <= 0.5 else "ink"  # orange on much orange cannot be read
    ink = f"fill: var(--{tone}); font: 13px {MONO}; text-anchor: middle"
    shaded = box(x, y, width, f"fill: var(--tone1); fill-opacity: {0.75 * shade:.3f}") if shade else ""
    return box(x, y, width, f"fill: var(--card); {frame}") + shaded + text(x + width / 2, y + 18.5, word, ink)


def column(token: TokenTrace, x: float) -> tuple[str, float]:
    word, seen, drawn = shown(token.token), shown(token.seen), shown(token.corrupted)
    answer = percent(token.probability)
    width = CHARACTER * max(map(len, (word, seen, drawn, answer))) + 14
    tone = "tone1" if token.replaced else "tone2"
    return "".join(
        (
            cell(x, 0, width, word, "tone0", token.chosen),
            cell(x, 1, width, seen, "tone0", token.chosen),
            cell(x, 2, width, drawn, tone, token.chosen),
            cell(x, 3, width, answer, tone, token.chosen, token.probability),
        )
    ), x + width + 4


parts, x = [], LEFT
for token in result.tokens:
    drawing, x = column(token, x)
    parts.append(drawing)
for row, label in enumerate(("the text", "generator reads", "generator wrote", "“replaced?”")):
    parts.append(text(0, TOP + row * ROW + 18.5, label, "fill: var(--soft); font-size: 13px"))
legend = (
    "blue: chosen · orange: another word was drawn · green: the original itself was drawn · "
    "shade: the discriminator's answer"
)
parts.append(text(LEFT, TOP + 4 * ROW + 6, legend, "fill: var(--soft); font-size: 12px"))
save_svg(target(__file__), "\n".join(parts), x + GAP, TOP + 4 * ROW + 18, "A sentence in one pre-training step")
