"""The output of `electra status`: on the terminal, as an HTML page and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from electra_core.errors import UserError, printable
from electra_core.reports.pages import page
from electra_core.reports.plots import Series, duration, line_chart, nice_axis, number
from electra_core.reports.widths import fitted, width_of
from electra_core.runs.metrics_log import Row
from electra_core.runs.status import Status, plain_name

MARKS = "*o+x#@%&"
REFERENCE_MARK = "."
CHART_HEIGHT = 10  # lines
TITLES = {
    "loss": "training loss",
    "eval_mlm_loss": "held-out MLM loss",
    "eval_rtd_auc": "held-out RTD AUC",
    "eval_rtd_loss": "held-out RTD loss",
    "tokens_per_second": "tokens per second",
    "gradient_norm": "gradient norm",
    "memory_mb": "memory, MB",
}
Reference = tuple[str, list[Row]]
Curves = list[tuple[str, list[float], list[float]]]


def facts(run: Status) -> list[tuple[str, str]]:
    """(name, value) of everything known about a run, in words."""
    state = run.state + (f" ({run.reason})" if run.reason else "")
    step = f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else "")
    rows = [("state", state), ("step", step)]
    if run.tokens:
        rows.append(("tokens", f"{run.tokens:,}"))
    if run.tokens_per_second:
        rows.append(("tokens/s", f"{run.tokens_per_second:,.0f}"))
    if run.seconds_left is not None:
        rows.append(("time left", duration(run.seconds_left)))
    if run.last_checkpoint is not None:
        best = "" if run.best_checkpoint in (None, run.last_checkpoint) else f" (best: {run.best_checkpoint:,})"
        rows.append(("checkpoint", f"{run.last_checkpoint:,}{best}"))
    if run.evaluated_at is not None:
        rows.append(("evaluated at", f"{run.evaluated_at:,}"))
    rows += [(plain_name(name), f"{value:.4f}") for name, value in run.evaluation.items() if math.isfinite(value)]
    return rows


def to_terminal(runs: Sequence[Status], reference: Reference | None, verdicts: Sequence[str], width: int) -> str:
    """A table with a column for each run, then curves, warnings and verdicts; at most about `width` columns."""
    parts = [_table(runs, width)]
    for name in shown(runs):
        curves = curves_of(name, runs, reference)
        marks = [*MARKS[: len(runs)], REFERENCE_MARK]
        parts.append(f"{title(name)}\n" + text_chart(curves, marks, width))
    if len(runs) > 1 or reference:
        names = [f"{mark} {run.name}" for mark, run in zip(MARKS, runs)]
        parts.append("  ".join(names + ([f"{REFERENCE_MARK} {reference[0]}"] if reference else [])))
    warnings = [f"warning: {run.name}: {text}" for run in runs for text in run.warnings]
    return printable("\n\n".join(part for part in [*parts, "\n".join(warnings), "\n".join(verdicts)] if part))


def to_html(runs: Sequence[Status], reference: Reference | None, verdicts: Sequence[str]) -> str:
    """One self-contained page."""
    heading = ", ".join(run.name for run in runs)
    warnings = "".join(
        f'<p class="warning"><strong>{escape(run.name)}</strong>{escape(text)}</p>'
        for run in runs for text in run.warnings
    )  # fmt: skip
    charts = "".join(
        line_chart(
            [Series(label, x, y, tone % 4) for tone, (label, x, y) in enumerate(curves_of(name, runs, reference))],
            title=title(name),
        )
        for name in shown(runs, all_of_them=True)
    )
    parts = [
        f"<header>\n<h1>{escape(heading)}</h1>\n{warnings}</header>",
        *(f"<p>{escape(verdict)}</p>" for verdict in verdicts),
        f'<div class="card">{_html_table(runs)}</div>',
        f'<div class="grid2">{charts}</div>',
        "<footer>Written by <code>electra status</code> from the runs' files.</footer>",
    ]
    return page(f"Status: {heading}", "\n".join(parts))


def _html_table(runs: Sequence[Status]) -> str:
    names, known = _facts_of_all(runs)
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = [f"<tr><th></th>{head}</tr>"]
    for name in names:
        cells = "".join(f"<td>{escape(row.get(name, ''))}</td>" for row in known)
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def write_png(runs: Sequence[Status], reference: Reference | None, file: Path) -> None:
    """The curves as a picture.

    Raises:
        UserError: matplotlib is not installed.
        OSError: `file` cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "--png: needs matplotlib (pip install matplotlib); --html needs no extra package"
        ) from None
    names = shown(runs, all_of_them=True) or ["loss"]
    rows = math.ceil(len(names) / 2)
    figure = Figure(figsize=(11, 3.2 * rows), layout="constrained")
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, 2, place)
        for index, (label, x, y) in enumerate(curves_of(name, runs, reference)):
            label = label.encode(errors="backslashreplace").decode()  # matplotlib draws UTF-8 only
            axes.plot(x, y, label=label, linestyle="--" if index == len(runs) else "-", linewidth=1.5)
        axes.set(title=title(name), xlabel="step")
        axes.grid(alpha=0.3)
    if len(runs) > 1 or reference:
        figure.axes[0].legend()
    figure.savefig(file, dpi=120, format="png")


def shown(runs: Sequence[Status], all_of_them: bool = False) -> list[str]:
    """The figures to draw: the main ones of `TITLES` and the dev figure that chooses the best model;
    `all_of_them`: all."""
    logged = {name for run in runs for row in run.rows for name, value in row.items() if value is not None}
    names = [name for name in TITLES if name in logged]
    if not all_of_them:
        names = [name for name in names if name in ("loss", "eval_mlm_loss", "eval_rtd_auc")]
    of_dev = sorted(name for name in logged if name.startswith("dev_"))
    of_dev.sort(key=lambda name: name not in {f"dev_{run.metric}" for run in runs})
    return names + of_dev[: None if all_of_them else 1]


def curves_of(name: str, runs: Sequence[Status], reference: Reference | None) -> Curves:
    """(label, steps, values) of every run, the reference last."""
    curves = [(run.name, *run.curve(name)) for run in runs]
    if reference is not None:
        stand_in = Status(reference[0], Path(), "", rows=reference[1])
        last = max((x[-1] for _, x, _ in curves if x), default=math.inf)
        x, y = stand_in.curve(name)
        kept = [i for i, step in enumerate(x) if step <= 1.5 * last]  # a long reference would squeeze a young run
        if kept:
            curves.append((reference[0], [x[i] for i in kept], [y[i] for i in kept]))
    return curves


def text_chart(curves: Curves, marks: Sequence[str], width: int) -> str:
    """Curves as text, each drawn with its own character; axes are labelled at their ends."""
    points = [(x, y, mark) for (_, xs, ys), mark in zip(curves, marks) for x, y in zip(xs, ys) if math.isfinite(y)]
    if not points:
        return "  (nothing logged yet)"
    low, high = min(y for _, y, _ in points), max(y for _, y, _ in points)
    axis = nice_axis(low, high, 4)
    first, last = min(x for x, _, _ in points), max(x for x, _, _ in points)
    labels = [number(axis.high), number(axis.low)]
    margin = max(map(len, labels))
    columns, height = max(20, width - margin - 4), CHART_HEIGHT
    grid = [[" "] * columns for _ in range(height)]
    for x, y, mark in reversed(points):  # the first run is drawn last, on top
        column = round((x - first) / (last - first) * (columns - 1)) if last > first else columns - 1
        grid[height - 1 - round(axis.percent(y) / 100 * (height - 1))][column] = mark
    lines = []
    for index, row in enumerate(grid):
        label = labels[0] if index == 0 else labels[1] if index == height - 1 else ""
        lines.append(f"  {label:>{margin}} |{''.join(row).rstrip()}")
    ends = f"{number(first)}{f'step {number(last)}':>{columns - len(number(first))}}"
    return "\n".join([*lines, f"  {'':>{margin}} +{'-' * columns}", f"  {'':>{margin}}  {ends}"])


def title(name: str) -> str:
    """The heading of a figure's curve."""
    return TITLES.get(name, name.replace("dev_", "dev ").replace("_", " "))


def _table(runs: Sequence[Status], width: int) -> str:
    names, known = _facts_of_all(runs)
    left = max(map(len, names))
    columns = [max(map(width_of, (run.name, *row.values()))) for run, row in zip(runs, known)]
    most = max(12, (width - left) // len(runs) - 2)
    columns = [min(column, most) for column in columns]

    def line(head: str, cells: Sequence[str]) -> str:
        shown = (fitted(_cut(cell, size), size) for cell, size in zip(cells, columns))
        return "  ".join([f"{head:<{left}}", *shown])

    lines = [line("", [run.name for run in runs])] if len(runs) > 1 else [str(runs[0].path)]
    return "\n".join([*lines, *(line(name, [row.get(name, "") for row in known]).rstrip() for name in names)])


def _facts_of_all(runs: Sequence[Status]) -> tuple[list[str], list[dict[str, str]]]:
    """The names of all facts, in order, and each run's facts by name."""
    known = [dict(facts(run)) for run in runs]
    return list(dict.fromkeys(name for row in known for name in row)), known


def _cut(text: str, size: int) -> str:
    if width_of(text) <= size:
        return text
    while width_of(text) >= size:
        text = text[:-1]
    return f"{text}…"
