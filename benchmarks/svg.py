"""The benchmark page's figures as SVG files: bars and curves with their spread, readable on light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import mean

STYLE = """<style>svg{--ink:#24292f;--soft:#656d76;--line:#d0d7de;--t0:#0969da;--t1:#bc4c00;--t2:#1a7f37;--t3:#8250df;--t4:#9a6700;--t5:#57606a}
@media(prefers-color-scheme:dark){svg{--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--t0:#58a6ff;--t1:#f0883e;--t2:#56d364;--t3:#bc8cff;--t4:#e3b341;--t5:#8b949e}}
text{font:12px system-ui,sans-serif;fill:var(--ink)}.soft{fill:var(--soft)}.line{stroke:var(--line)}</style>"""  # noqa: E501
TONES = 6


@dataclass(frozen=True)
class Bar:
    """A median, with the minimum and maximum of its values."""

    name: str
    value: float
    low: float
    high: float
    tone: int = 0


@dataclass(frozen=True)
class Curve:
    """Points (x, values at x): the line joins the means, whiskers reach to the extremes."""

    name: str
    points: Sequence[tuple[float, Sequence[float]]]


def bars(title: str, unit: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars from zero, with enough room for the longest name and figure."""
    left, width, step = 20 + max([_width(row.name) for row in rows], default=0), 360, 26
    values = [f"{row.value:,.4g} {unit}" for row in rows]
    right = 20 + max(map(_width, values), default=0)
    most = max([row.high for row in rows], default=1.0) or 1.0
    parts = []
    for index, (row, value) in enumerate(zip(rows, values)):
        y = 40 + step * index
        low, end, high = (left + width * rate / most for rate in (row.low, row.value, row.high))
        parts += [
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(row.name)}</text>',
            f'<rect x="{left}" y="{y}" width="{end - left:.1f}" height="16" rx="2" fill="var(--t{row.tone})"/>',
            f'<path d="M{low:.1f} {y + 8}H{high:.1f}" stroke="var(--ink)" stroke-width="2"/>',
            f'<text x="{max(end, high) + 6:.1f}" y="{y + 12}" class="soft">{escape(value)}</text>',
        ]
    return _svg(title, max(left + width + right, 20 + _width(title)), 50 + step * len(rows), parts)


def curves(
    title: str, x_label: str, y_label: str, series: Sequence[Curve], from_zero: bool = False, log_x: bool = False
) -> str:
    """Curves of scores against compute; `from_zero` for what is flat where it looks flat, `log_x` for sizes."""
    left, top, width, height = 60, 45, 480, 260
    points = [(x, y) for curve in series for x, values in curve.points for y in values]
    if not points:
        return _svg(title, 760, 80, ['<text x="20" y="55" class="soft">not yet measured</text>'])
    xs, scale = sorted({x for x, _ in points}), math.log10 if log_x else float
    x0, x1 = (scale(xs[0]), scale(xs[-1])) if log_x else (min(0.0, xs[0]), xs[-1] or 1.0)
    y0, y1 = 0.0 if from_zero else min(y for _, y in points), max(y for _, y in points)
    pad = 0.08 * (y1 - y0) or 0.05
    y0, y1 = (y0, _rounded_up(y1)) if from_zero else (y0 - pad, y1 + pad)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + width * (scale(x) - x0) / (x1 - x0), top + height * (y1 - y) / (y1 - y0)

    parts = [f'<text x="{left + width / 2}" y="{top + height + 40}" class="soft">{escape(x_label)}</text>']
    parts.append(f'<text x="{left - 50}" y="{top - 8}" class="soft">{escape(y_label)}</text>')
    shares = (0, 0.25, 0.5, 0.75, 1)
    for y_value in (y0 + share * (y1 - y0) for share in shares):
        y = at(xs[0], y_value)[1]
        parts.append(f'<path d="M{left} {y:.1f}h{width}" class="line"/>')
        beside = f'x="{left - 6}" y="{y + 4:.1f}" text-anchor="end"'
        parts.append(f'<text {beside} class="soft">{_short(y_value)}</text>')
    for x_value in xs if log_x else (x0 + share * (x1 - x0) for share in shares):
        below = f'x="{at(x_value, y0)[0]:.1f}" y="{top + height + 18}" text-anchor="middle"'
        parts.append(f'<text {below} class="soft">{_short(x_value)}</text>')
    for index, curve in enumerate(series):
        parts += _curve(curve, index % TONES, at)
        y = top + 10 + 20 * index
        parts.append(f'<circle cx="{left + width + 20}" cy="{y}" r="5" fill="var(--t{index % TONES})"/>')
        parts.append(f'<text x="{left + width + 32}" y="{y + 4}">{escape(curve.name)}</text>')
    right = left + width + 40 + max(_width(curve.name) for curve in series)
    return _svg(title, max(760, right, 20 + _width(title)), top + height + 55, parts)


def _curve(curve: Curve, tone: int, at) -> list[str]:  # type: ignore[no-untyped-def]
    middle = [at(x, mean(values)) for x, values in curve.points]
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in middle)
    parts = [f'<path d="M{line}" fill="none" stroke="var(--t{tone})" stroke-width="2"/>']
    for (x, values), (cx, cy) in zip(curve.points, middle):
        (_, low), (_, high) = at(x, min(values)), at(x, max(values))
        parts.append(f'<path d="M{cx:.1f} {low:.1f}V{high:.1f}" stroke="var(--t{tone})"/>')
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="var(--t{tone})"/>')
    return parts


def _rounded_up(value: float) -> float:
    """The next number whose quarters are short."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(top for factor in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if (top := factor * power) >= value)


def _width(words: str) -> int:
    """Width to reserve for a text in `STYLE`'s 12 px, in any of the usual system fonts."""
    return 7 * len(words)


def _short(value: float) -> str:
    if abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.2g}"


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    body = "\n".join(parts)
    name = escape(title)
    return f'{head}<title>{name}</title>{STYLE}\n<text x="10" y="20">{name}</text>\n{body}\n</svg>\n'
