"""The figures of docs/scaling.md and docs/reliability.md, from the JSON under benchmarks/results/cpu.

    python -m benchmarks.scaling_figures

`figures()` returns them as text; a test compares them with what is committed. Their y axes begin at zero, so that
what is flat looks flat.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.svg import Curve, curves

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "scaling"
RESULTS = ROOT / "benchmarks" / "results" / "cpu"


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
        "open_seconds.svg": curves(
            "Start-up: time to open a corpus", "GB of text", "seconds",
            [_line("files mapped", opened, size, "open_seconds"),
             _line("and table of examples", opened, size, "open_seconds", "slots_seconds")],
            from_zero=True, log_x=True,
        ),
        "open_memory.svg": curves(
            "Start-up: memory after 50 batches", "GB of text", "MB",
            [_line("own", opened, size, "own_memory_mb"),
             _line("mapped files", opened, size, "mapped_file_memory_mb")],
            from_zero=True, log_x=True,
        ),
        "prepare_memory.svg": curves(
            "electra prepare: peak memory", "MB of text", "MB",
            [_line("all processes", prepared, text, "peak_mb"),
             _line("the largest", prepared, text, "peak_mb_of_one_process")], from_zero=True,
        ),
        "prepare_seconds.svg": curves(
            "electra prepare: processor time", "MB of text", "seconds",
            [_line("all processes", prepared, text, "cpu_seconds")], from_zero=True,
        ),
        "soak_memory.svg": curves(
            "A long run: its own memory", "steps", "MB",
            [_line(name, rows, "step", "own_memory_mb") for name, rows in soaks.items()], from_zero=True,
        ),
    }  # fmt: skip


SOAKS = {"oneDNN's cache as usual": "soak.json", "without that cache": "soak_no_cache.json"}


def _line(name: str, rows: list[dict[str, Any]], x: str, *ys: str) -> Curve:
    """The sum of the columns `ys` against the column `x`."""
    return Curve(name, [(row[x], [sum(row[y] for y in ys)]) for row in rows])


def _settled(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every fourth sample after the warm-up."""
    return [row for row in samples if row["seconds"] >= 0.1 * samples[-1]["seconds"]][::4]


def _rows(name: str, key: str) -> list[dict[str, Any]]:
    return list(json.loads((RESULTS / name).read_text(encoding="utf-8"))[key])


if __name__ == "__main__":
    main()
