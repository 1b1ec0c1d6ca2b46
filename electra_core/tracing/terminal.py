"""A trace as text for a terminal, with colours or without."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from electra_core.detect import shade
from electra_core.errors import printable
from electra_core.masking import KEEP_PROBABILITY
from electra_core.reports.widths import fitted, width_of
from electra_core.trace import Draw, TokenTrace, Trace
from electra_core.tracing.page import STAGES
from electra_core.tracing.words import (
    LETTERS,
    labels_note,
    percent,
    pieces_note,
    temperature_note,
    weighted_losses,
    why_chosen,
)

WIDTH = 88
BLUE, ORANGE, GREEN, BOLD, FAINT = "34", "33", "32", "1", "2"


def to_terminal(trace: Trace, *, colour: bool) -> str:
    """All stages of the page, one below the other, with the same numbers."""
    paint = _painter(colour)
    bodies: list[Callable[[Trace, Paint], list[str]]] = [
        _tokens, _positions, _masked, _draws, _corrupted, _labels, _answers, _losses, _gradients, _shapes,
    ]  # fmt: skip
    lines: list[str] = []
    for number, (stage, body) in enumerate(zip(STAGES, bodies, strict=True), 1):
        lines += ["", paint(f"{number}  {stage.title}", BOLD), *(f"   {line}" for line in body(trace, paint))]
    model = f", model {printable(trace.model)}" if trace.model else ""
    lines += ["", paint(f"seed {trace.seed}{model}", FAINT)]
    return "\n".join(lines[1:])


Paint = Callable[..., str]


def _painter(colour: bool) -> Paint:
    """A function paint(text, code...) that adds ANSI codes, or without `colour` returns the text unchanged."""

    def paint(text: str, *codes: str) -> str:
        return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if colour and codes else text

    return paint


def _flow(words: list[tuple[str, str]]) -> list[str]:
    """(visible, painted) words, broken into lines by their visible width."""
    lines, width = [""], 0
    for visible, painted in words:
        if width and width + width_of(visible) + 1 > WIDTH - 3:
            lines.append("")
            width = 0
        lines[-1] += (" " if width else "") + painted
        width += width_of(visible) + 1
    return lines


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - 3)


def _tokens(trace: Trace, paint: Paint) -> list[str]:
    words = [(t.token, paint(t.token, FAINT) if t.special else t.token) for t in trace.tokens]
    cut = [f"({trace.truncated} tokens did not fit and were left out)"] if trace.truncated else []
    note = pieces_note(trace)
    return [*_flow(words), *cut, *([paint(note, FAINT)] if note else [])]


def _positions(trace: Trace, paint: Paint) -> list[str]:
    rows = [f"{t.order:.4f}  position {t.position:<4} {paint(t.token, BLUE)}" for t in _chosen(trace)]
    candidates = sorted(t.order for t in trace.tokens if not t.special and not t.chosen)
    rest = [paint(f"{candidates[0]:.4f}  the smallest number that is not chosen", FAINT)] if candidates else []
    return _wrap(why_chosen(trace)) + rows + rest


def _chosen(trace: Trace) -> list[TokenTrace]:
    return sorted((t for t in trace.tokens if t.chosen), key=lambda t: t.order)


def _masked(trace: Trace, paint: Paint) -> list[str]:
    words = [(t.seen, paint(t.seen, BLUE, BOLD) if t.chosen else t.seen) for t in trace.tokens]
    rows = [paint(f"the second random number; below {KEEP_PROBABILITY:g} the word stays", FAINT)]
    for t in _chosen(trace):
        outcome = "stays, but is predicted all the same" if t.coin < KEEP_PROBABILITY else f"becomes {t.seen}"
        rows.append(f"{t.coin:.4f}  position {t.position:<4} {t.token} {outcome}")
    return _flow(words) + rows


def _draws(trace: Trace, paint: Paint) -> list[str]:
    lines = _wrap(temperature_note(trace))
    for draw in trace.draws:
        figures = f"loss {draw.mlm_loss:.2f}, entropy {draw.entropy:.2f}"
        lines += [f"position {draw.position}: {paint(draw.original.token, GREEN)}, {figures}"]
        lines += _candidates(draw, paint)
    return lines


def _candidates(draw: Draw, paint: Paint) -> list[str]:
    width = max(width_of(c.token) for c in draw.candidates)
    top = max(c.probability for c in draw.candidates)
    lines = []
    for candidate in draw.candidates:
        notes = ["drawn"] * candidate.is_drawn + ["original"] * candidate.is_original
        code = [GREEN] if candidate.is_original else [ORANGE] if candidate.is_drawn else []
        bar = "▇" * max(round(24 * candidate.probability / top), 0)
        text = f"{fitted(candidate.token, width)} {percent(candidate.probability):>7} {bar}"
        note = f"  ← {', '.join(notes)}, rank {candidate.rank:,}" if notes else ""
        lines.append("  " + paint(text, *code) + note)
    return lines


def _corrupted(trace: Trace, paint: Paint) -> list[str]:
    def painted(t: TokenTrace) -> tuple[str, str]:
        if t.replaced:
            text = f"{t.corrupted}[was {t.token}]"
            return text, paint(text, ORANGE)
        text = f"{t.corrupted}[original drawn]" if t.chosen else t.corrupted
        return text, paint(text, GREEN) if t.chosen else text

    return _flow([painted(t) for t in trace.tokens])


def _labels(trace: Trace, paint: Paint) -> list[str]:
    def painted(t: TokenTrace) -> tuple[str, str]:
        text = f"{t.corrupted} {int(t.replaced)}"
        return text, paint(text, ORANGE if t.replaced else GREEN) if t.chosen else text

    return _wrap(labels_note(trace)) + _flow([painted(t) for t in trace.tokens])


def _answers(trace: Trace, paint: Paint) -> list[str]:
    def painted(t: TokenTrace) -> tuple[str, str]:
        text = f"{t.corrupted} {percent(t.probability)}"
        shown = shade(text, t.probability) if paint("", BOLD) else text
        return f"{text}{'*' * t.replaced}", f"{shown}{'*' * t.replaced}"

    return [*_flow([painted(t) for t in trace.tokens]), paint("* was replaced", FAINT)]


def _losses(trace: Trace, paint: Paint) -> list[str]:
    total = (
        f"{trace.generator_weight:g} x MLM {trace.mlm_loss:.4f} + {trace.discriminator_weight:g} x RTD "
        f"{trace.rtd_loss:.4f} = {trace.loss:.4f}"
    )
    return [
        paint(total, BOLD),
        f"a generator that knows nothing: MLM {trace.uniform_loss:.2f}",
        f"a discriminator that only knows how many tokens are replaced: RTD {trace.base_rate_loss:.4f}",
    ]


def _gradients(trace: Trace, paint: Paint) -> list[str]:
    width = max(len(g.part) for g in trace.gradients)
    mlm, rtd = (f"from {name}" for name in weighted_losses(trace))
    head = f"{'norm of the gradient':<{width}} {'parameters':>11} {mlm:>14} {rtd:>14} {'together':>10}"
    rows = [
        f"{g.part:<{width}} {g.parameters:>11,} {g.mlm:>14.4g} {g.rtd:>14.4g} {g.both:>10.4g}"
        for g in trace.gradients
    ]
    return [paint(head, FAINT), *rows]


def _shapes(trace: Trace, paint: Paint) -> list[str]:
    width = max(len(s.name) for s in trace.shapes)
    legend = [paint(line, FAINT) for line in _wrap(LETTERS)]
    return legend + [
        f"{paint(f'{s.owner:<14}', FAINT)}{s.name:<{width}}  {f'[{s.legend}]':<9}" + " x ".join(map(str, s.shape))
        for s in trace.shapes
    ]
