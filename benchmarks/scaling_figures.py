"""The figures of docs/scaling.md and docs/reliability.md, from the JSON under benchmarks/results/cpu.

    python -m benchmarks.scaling_figures

`figures()` returns them as text; a test compares them with what is committed. Unlike in `svg.curves`, y axes begin
at zero, so that what is flat looks flat, and sizes can be on a logarithmic axis.
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.svg import STYLE

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "scaling"
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
LEFT, TOP, WIDTH, HEIGHT = 60, 45, 440, 220
Line = tuple[str, list[tuple[float, float]]]
"""A name, and its points."""


def main() -> None:
    """Write docs/scaling/*.svg."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in figures().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)


def figures() -> dict[str, str]:
    """File name -> SVG."""
    opened = _rows("corpus_open.json", "rows")
    prepared = [row for row in _rows("corpus_prepare.json", "rows") if row["text"] == "documents"]
    soaks = {name: _settled(_rows(file, "samples")) for name, file in SOAKS.items()}
    size, text = "gigabytes", "megabytes"
    return {
        "open_seconds.svg": plot(
            "Start-up: time to open a corpus", "GB of text", "seconds",
            [_line("files mapped", opened, size, "open_seconds"),
             _line("and table of examples", opened, size, "open_seconds", "slots_seconds")], log_x=True,
        ),
        "open_memory.svg": plot(
            "Start-up: memory after 50 batches", "GB of text", "MB",
            [_line("own", opened, size, "own_memory_mb"),
             _line("mapped files", opened, size, "mapped_file_memory_mb")], log_x=True,
        ),
        "prepare_memory.svg": plot(
            "electra prepare: peak memory", "MB of text", "MB",
            [_line("all processes", prepared, text, "peak_mb"),
             _line("the largest", prepared, text, "peak_mb_of_one_process")],
        ),
        "prepare_seconds.svg": plot(
            "electra prepare: processor time", "MB of text", "seconds",
            [_line("all processes", prepared, text, "cpu_seconds")],
        ),
        "soak_memory.svg": plot(
            "A long run: its own memory", "steps", "MB",
            [_line(name, rows, "step", "own_memory_mb") for name, rows in soaks.items()],
        ),
    }  # fmt: skip


SOAKS = {"oneDNN's cache as usual": "soak.json", "without that cache": "soak_no_cache.json"}


def plot(title: str, x_label: str, y_label: str, lines: list[Line], log_x: bool = False) -> str:
    """Lines with a point at each value; y from zero, x from zero or logarithmic (`log_x`)."""
    xs = sorted({x for _, points in lines for x, _ in points})
    scale = math.log10 if log_x else float
    first, last = (scale(xs[0]), scale(xs[-1])) if log_x else (0.0, xs[-1])
    most = 1.1 * max(y for _, points in lines for _, y in points)

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + WIDTH * (scale(x) - first) / (last - first), TOP + HEIGHT * (1 - y / most)

    parts = [
        f'<text x="10" y="20">{escape(title)}</text>',
        f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 38}" class="soft">{escape(x_label)}</text>',
        f'<text x="10" y="{TOP - 8}" class="soft">{escape(y_label)}</text>',
    ]
    for y in (share * most for share in (0, 0.25, 0.5, 0.75, 1)):
        height = at(xs[-1], y)[1]
        parts.append(f'<path d="M{LEFT} {height:.1f}h{WIDTH}" class="line"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end" class="soft">{y:,.4g}</text>')
    for x in xs if len(xs) < 6 else (share * last for share in (0, 0.25, 0.5, 0.75, 1)):
        where = f'x="{at(x, 0)[0]:.1f}" y="{TOP + HEIGHT + 18}"'
        parts.append(f'<text {where} text-anchor="middle" class="soft">{x:,g}</text>')
    for tone, (name, points) in enumerate(lines):
        places = [at(x, y) for x, y in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="var(--t{tone})" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--t{tone})"/>' for x, y in places]
        parts.append(f'<circle cx="{LEFT + WIDTH + 20}" cy="{TOP + 10 + 20 * tone}" r="5" fill="var(--t{tone})"/>')
        parts.append(f'<text x="{LEFT + WIDTH + 32}" y="{TOP + 14 + 20 * tone}">{escape(name)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {TOP + HEIGHT + 50}" role="img">'
    body = "\n".join(parts)
    return f"{head}<title>{escape(title)}</title>{STYLE}\n{body}\n</svg>\n"


def _line(name: str, rows: list[dict[str, Any]], x: str, *ys: str) -> Line:
    """The sum of the columns `ys` against the column `x`."""
    return name, [(row[x], sum(row[y] for y in ys)) for row in rows]


def _settled(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every fourth sample after the warm-up."""
    return [row for row in samples if row["seconds"] >= 0.1 * samples[-1]["seconds"]][::4]


def _rows(name: str, key: str) -> list[dict[str, Any]]:
    return list(json.loads((RESULTS / name).read_text(encoding="utf-8"))[key])


if __name__ == "__main__":
    main()
