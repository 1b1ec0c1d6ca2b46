"""Small plots for self-contained pages: HTML with inline SVG, no library, no network.

Only lines are SVG, stretched over their box (`preserveAspectRatio="none"`, strokes that do not scale);
labels, dots and ticks are HTML placed by percentages. So a plot fills any width, and its text has the size
of the page's text. Colours are the classes `tone0` ... `tone3` of `assets/page.css`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Series:
    """One curve. `x` ascending, as long as `y`; a y that is not finite interrupts the line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tone: int = 0


@dataclass(frozen=True)
class Rule:
    """A reference value drawn as a dashed line through the whole plot."""

    value: float
    label: str


@dataclass(frozen=True)
class Dots:
    """One row of a dot plot: a value per repetition, with the row's name and meaning."""

    name: str
    note: str
    values: Sequence[float]
    tone: int = 0


@dataclass(frozen=True)
class Axis:
    """A range and its ticks, in data units."""

    low: float
    high: float
    ticks: list[float]

    def percent(self, value: float) -> float:
        """Position of `value`: 0 at `low`, 100 at `high`."""
        return 100 * (value - self.low) / (self.high - self.low)


def nice_axis(low: float, high: float, count: int = 5) -> Axis:
    """The range from `low` to `high`, widened to whole ticks of 1, 2 or 5 times a power of ten.

    Args:
        count: approximate number of intervals.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"low, high: expected finite numbers, got {low} and {high}")
    if high - low < 1e-9 * max(1.0, abs(high)):
        pad = abs(high) / 2 or 0.5
        low, high = low - pad, high + pad
    exponent = math.floor(math.log10((high - low) / count))
    power = 10**exponent
    step = power * next(m for m in (1, 2, 5, 10) if power * m * count >= (high - low) * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(i * step, max(12, 1 - exponent)) for i in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks)


def number(value: float) -> str:
    """A tick's label: 12500 -> "12.5k", 0.30000 -> "0.3"."""
    for least, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.6g}{unit}"
    return f"{value:.6g}"


def duration(seconds: float) -> str:
    """ "8 s", "2 min 05 s", "1 h 02 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole // 60 % 60:02d} min"


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    caption: str = "",
    rules: Sequence[Rule] = (),
    y_range: tuple[float, float] | None = None,
) -> str:
    """A figure with curves over a run's steps, dashed reference lines and a legend.

    Args:
        series: the curves; those without a finite point are named in the legend as not measured.
        title: the quantity on the y axis, in words.
        caption: one sentence below the title.
        y_range: values that the y axis must include, besides all data and rules.
    """
    points = [(x, y) for s in series for x, y in zip(s.x, s.y) if math.isfinite(y)]
    values = [y for _, y in points] + [rule.value for rule in rules] + list(y_range or ())
    if not points:
        return _figure(title, caption, '<p class="empty">Nothing was measured.</p>', [], "")
    last = max(x for x, _ in points)
    y = nice_axis(min(values), max(values))
    x = nice_axis(min(0.0, *(x for x, _ in points)), last, 4)
    x = Axis(x.low, last, [tick for tick in x.ticks if tick <= last]) if last > x.low else x  # no empty end
    lines = [_level("grid", y, tick) for tick in y.ticks] + [_level("rule", y, rule.value) for rule in rules]
    lines += [_curve(s, x, y) for s in series]
    labels = [_label("ytick", f"top:{_down(y, tick)}%", number(tick)) for tick in y.ticks]
    labels += [_label("xtick", f"left:{x.percent(tick):.3f}%", number(tick)) for tick in x.ticks]
    labels += [_rule_label(y, rule) for rule in rules]
    data = [{"name": s.name, "tone": s.tone, "x": list(s.x), "y": _plain(s.y)} for s in series]
    axes = {"x": [x.low, x.high], "y": [y.low, y.high], "xLabel": "step", "series": data}
    plot = (
        f'<div class="plot" data-chart="{escape(json.dumps(axes))}">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f"{''.join(lines)}</svg>{''.join(labels)}</div>"
        '<div class="xlabel">step</div>'
    )
    return _figure(title, caption, plot, series, "line")


def dot_plot(
    rows: Sequence[Dots],
    *,
    title: str,
    caption: str = "",
    rules: Sequence[Rule] = (),
) -> str:
    """A figure with a row per model: a dot for every seed and a bar at the median. Values are fractions.

    The axis covers the dots; a reference value far from them is stated in the caption instead of drawn.
    """
    values = [v for row in rows for v in row.values]
    low, high = min(values, default=0.0), max(values, default=1.0)
    reach = max(high - low, 0.2)
    far = [rule for rule in rules if not low - reach <= rule.value <= high + reach]
    rules = [rule for rule in rules if rule not in far]
    if far:
        caption += f" Off the scale: {', '.join(f'{rule.label} {100 * rule.value:.1f}%' for rule in far)}."
    values = [low, high, *(rule.value for rule in rules)]
    margin = 0.05 * (max(values) - min(values)) + 0.005
    axis = nice_axis(max(0.0, min(values) - margin), min(1.0, max(values) + margin))
    ticks = [_label("xtick", f"left:{axis.percent(t):.3f}%", f"{100 * t:.4g}%") for t in axis.ticks]
    marks = [_label("dotrule", f"left:{axis.percent(r.value):.3f}%", r.label) for r in rules]
    body = "".join(_dot_row(row, axis, rules) for row in rows)
    plot = f'<div class="dots">{_dot_scale("dotlegend", marks)}{body}{_dot_scale("dotaxis", ticks)}</div>'
    return _figure(title, caption, plot, [], "")


def median(values: Sequence[float]) -> float:
    """`statistics.median`, or NaN for no values."""
    return statistics.median(values) if values else math.nan


def _dot_row(row: Dots, axis: Axis, rules: Sequence[Rule]) -> str:
    name = f'<div class="dotname">{escape(row.name)}<small>{escape(row.note)}</small></div>'
    guides = "".join(f'<i class="guide" style="left:{axis.percent(r.value):.3f}%"></i>' for r in rules)
    if not row.values:
        return f'<div class="dotrow">{name}<div class="strip">{guides}</div><div class="dotvalue">n/a</div></div>'
    low, high, middle = min(row.values), max(row.values), median(row.values)
    left, width = axis.percent(low), axis.percent(high) - axis.percent(low)
    dots = "".join(
        f'<b class="dot" style="left:{axis.percent(v):.3f}%" title="{100 * v:.1f}%"></b>' for v in row.values
    )
    spread = f'<i class="spread" style="left:{left:.3f}%;width:{width:.3f}%"></i>'
    bar = f'<i class="median" style="left:{axis.percent(middle):.3f}%"></i>'
    return (
        f'<div class="dotrow tone{row.tone}">{name}<div class="strip">{guides}{spread}{dots}{bar}</div>'
        f'<div class="dotvalue">{100 * middle:.1f}%</div></div>'
    )


def _curve(series: Series, x: Axis, y: Axis) -> str:
    """Polylines between gaps; a single point becomes a dot (a line of zero length with round caps)."""
    runs: list[list[str]] = [[]]
    for value_x, value_y in zip(series.x, series.y):
        if math.isfinite(value_y):
            runs[-1].append(f"{x.percent(value_x):.3f},{_down(y, value_y)}")
        elif runs[-1]:
            runs.append([])
    return "".join(
        f'<polyline class="curve tone{series.tone}{" lone" * (len(run) == 1)}" '
        f'points="{" ".join(run * 2 if len(run) == 1 else run)}"/>'
        for run in runs
        if run
    )


def _down(axis: Axis, value: float) -> str:
    """Percent from the top, because y grows downwards on a page."""
    return f"{100 - axis.percent(value):.3f}"


def _level(kind: str, axis: Axis, value: float) -> str:
    """A horizontal line through the plot."""
    return f'<line class="{kind}" x1="0" x2="100" y1="{_down(axis, value)}" y2="{_down(axis, value)}"/>'


def _rule_label(axis: Axis, rule: Rule) -> str:
    """Below its line at the left, where falling curves leave room; above it at the right if there is none."""
    kind = "rulelabel" if axis.percent(rule.value) < 12 else "rulelabel below"
    return _label(kind, f"top:{_down(axis, rule.value)}%", rule.label)


def _label(kind: str, place: str, text: str) -> str:
    return f'<span class="{kind}" style="{place}">{escape(text)}</span>'


def _dot_scale(kind: str, labels: Sequence[str]) -> str:
    """A row with labels above or below the dots."""
    return f'<div class="{kind}"><span></span><div class="strip">{"".join(labels)}</div><span></span></div>'


def _plain(values: Sequence[float]) -> list[float | None]:
    return [round(float(v), 6) if math.isfinite(v) else None for v in values]


def _figure(title: str, caption: str, plot: str, series: Sequence[Series], kind: str) -> str:
    keys = "".join(
        f'<span class="key tone{s.tone}"><i></i>{escape(s.name)}'
        f"{'' if any(map(math.isfinite, s.y)) else ' (not measured)'}</span>"
        for s in series
        if len(series) > 1
    )
    legend = f'<div class="legend">{keys}</div>' if keys else ""
    text = f"<p>{escape(caption)}</p>" if caption else ""
    return f'<figure class="{kind}"><figcaption><h3>{escape(title)}</h3>{text}{legend}</figcaption>{plot}</figure>'
