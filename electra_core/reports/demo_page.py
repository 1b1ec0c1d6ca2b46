"""The demo's report: `report.html`, one self-contained file, and the same figures for the terminal.

Everything here takes plain values and shows them as they are: nothing is smoothed, rounded up or left out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from electra_core.detect import SCALE_HTML, TokenScore, tokens_html
from electra_core.reports.pages import page
from electra_core.reports.plots import Dots, Rule, dot_plot, duration, median


@dataclass(frozen=True)
class Passage:
    """A text that the discriminator read."""

    title: str
    note: str
    text: str
    scores: Sequence[TokenScore]
    originals: Mapping[int, str] = field(default_factory=dict)
    """Index of a score -> the original token, where it was replaced."""


@dataclass(frozen=True)
class Report:
    """The results of a demo run."""

    title: str
    summary: str
    """One or two sentences under the title."""
    machine: Sequence[tuple[str, str]]
    """(name, value): the machine."""
    task: str
    """One sentence on the fine-tuning task: its examples and classes."""
    starts: Sequence[Dots]
    """The fine-tuned models: accuracy (a fraction) for every seed."""
    references: Sequence[Rule]
    """Accuracies to compare with (guessing, counting words)."""
    charts: Sequence[str]
    """Figures of the pre-training (`plots.line_chart`)."""
    charts_note: str
    passages: Sequence[Passage]
    facts: Sequence[tuple[str, str]]
    """(name, value): how everything was made."""
    stages: Sequence[tuple[str, float]]
    """(name, seconds), in the order in which they ran."""
    warnings: Sequence[tuple[str, str]] = ()
    """(headline, explanation): what went wrong or is important to know."""


def write_report(report: Report, file: Path) -> None:
    """Writes the page."""
    file.write_text(to_html(report), encoding="utf-8")


def to_html(report: Report) -> str:
    """The report as one self-contained page."""
    parts = [
        f"<header>\n<h1>{escape(report.title)}</h1>",
        f'<p class="lead">{escape(report.summary)}</p>',
        *(
            f'<p class="warning"><strong>{escape(headline)}</strong>{escape(text)}</p>'
            for headline, text in report.warnings
        ),
        _tiles(report),
        "</header>",
        "<h2>Does pre-training help?</h2>",
        f"<p>{escape(report.task)}</p>",
        dot_plot(
            report.starts,
            title="Accuracy on unseen examples",
            caption="One dot per seed; the bar and the figure on the right are the median.",
            rules=report.references,
        ),
    ]
    if report.charts:
        parts += [
            "<h2>How pre-training went</h2>",
            f"<p>{escape(report.charts_note)}</p>",
            f'<div class="grid2">{"".join(report.charts)}</div>',
        ]
    for passage in report.passages:
        parts += [
            f"<h2>{escape(passage.title)}</h2>",
            f"<p>{escape(passage.note)}</p>",
            SCALE_HTML,
            f'<div class="card">{tokens_html(passage.text, passage.scores, passage.originals)}</div>',
        ]
    parts += [
        "<h2>How it was made</h2>",
        f'<div class="card">{_stage_bar(report.stages)}{_table([*report.machine, *report.facts])}</div>',
        "<footer>Written by <code>electra demo</code>. Every figure here was measured in this run.</footer>",
    ]
    return page(report.title, "\n".join(part for part in parts if part))


def to_terminal(report: Report, width: int = 78) -> str:
    """The comparison as a plain-text table, with the warnings below it; at most about `width` columns."""
    name_width = max(len(row.name) for row in report.starts)
    bar_width = max(10, width - name_width - 22)
    top = max((median(row.values) for row in report.starts if row.values), default=1.0)
    lines = [*textwrap.wrap(report.task, width), "", f"{'start':<{name_width}}  median  lowest-highest"]
    for row in report.starts:
        if not row.values:
            lines.append(f"{row.name:<{name_width}}     n/a  {row.note}")
            continue
        middle = median(row.values)
        spread = f"{100 * min(row.values):.1f}-{100 * max(row.values):.1f}"
        bar = "█" * max(1, round(bar_width * 0.7 * middle / top))
        lines.append(f"{row.name:<{name_width}}  {100 * middle:5.1f}%  {spread:<13} {bar}")
    for rule in report.references:
        lines.append(f"{rule.label:<{name_width}}  {100 * rule.value:5.1f}%")
    for headline, text in report.warnings:
        lines += ["", f"! {headline}", *textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  ")]
    return "\n".join(lines)


def _tiles(report: Report) -> str:
    """The medians, in large type."""
    tiles = [
        f'<div class="card tile tone{row.tone}"><b>{100 * median(row.values):.1f}%</b>'
        f"<span>{escape(row.name)}</span></div>"
        for row in report.starts
        if row.values
    ]
    tiles += [
        f'<div class="card tile"><b>{100 * rule.value:.1f}%</b><span>{escape(rule.label)}</span></div>'
        for rule in report.references
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _stage_bar(stages: Sequence[tuple[str, float]]) -> str:
    """How the time was spent, as a divided bar with a legend."""
    if not stages:
        return ""
    parts = "".join(
        f'<i class="tone{index % 4}" style="flex:{seconds:.3f} 0 0" title="{escape(name)}"></i>'
        for index, (name, seconds) in enumerate(stages)
    )
    keys = "".join(
        f'<span class="key tone{index % 4}"><i></i>{escape(name)} {duration(seconds)}</span>'
        for index, (name, seconds) in enumerate(stages)
    )
    total = duration(sum(seconds for _, seconds in stages))
    return (
        f'<h3>Time: {total}</h3><div class="stages">{parts}</div>'
        f'<div class="legend" style="margin-bottom:14px">{keys}</div>'
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"
