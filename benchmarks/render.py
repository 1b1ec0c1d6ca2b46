"""Renders docs/benchmarks.md and its figures from the JSON under benchmarks/results, and from nothing else.

    python -m benchmarks render

`pages()` returns the files as text; a test compares them with what is committed. Prose about what figures mean is
copied from `notes.md` beside the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import catalogue, render_about, render_compare, render_learning, render_probing, render_speed, svg
from benchmarks.catalogue import CATALOGUE, RESULTS, is_baseline
from benchmarks.render_about import (
    Report,
    environment_of,
    link,
    machine,
    made_on,
    on_gpu,
    read,
    short,
    sources,
    titled,
)

DOCS = Path(__file__).parent.parent / "docs"
FIGURES = "benchmarks"  # folder below docs
Section = tuple[str, dict[str, str]]
"""Markdown, and figures by file name."""


def main() -> int:
    """Write the page and its figures, and remove figures whose results are gone."""
    made = pages(RESULTS)
    for path in stale(made):
        path.unlink()
    for name, text in made.items():
        path = DOCS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)
    return 0


def stale(made: dict[str, str]) -> list[Path]:
    """Figures in the page's folder that no result produces."""
    return [path for path in sorted((DOCS / FIGURES).glob("*.svg")) if f"{FIGURES}/{path.name}" not in made]


def pages(results: Path) -> dict[str, str]:
    """Name -> text of the files below docs/: the page and its figures."""
    files: dict[str, str] = {}
    parts = [HEADER.format(machines=render_about.legend())]
    for place, title in (("cpu", "On a CPU"), ("gpu", "On a GPU")):
        paths = sorted(path for path in (results / place).glob("*.json*") if path.suffix in (".json", ".jsonl"))
        here = [path for path in paths if not catalogue.shown_elsewhere(path.stem)]
        found = sections(here)
        parts += [f"## {title}\n", overview(place, found)]
        for name, own in found.items():
            text, figures = common(name, own) if name in COMMON else section(own[0])
            parts.append(text)
            files |= {f"{FIGURES}/{place}_{file}": figure for file, figure in figures.items()}
            parts += [f"![{name}]({FIGURES}/{place}_{file})\n" for file in figures]
        if others := [path for path in paths if path not in here]:
            parts += ["### Shown on other pages\n", *map(elsewhere, others), ""]
    if (counts := results / "step_counts_small.json").exists():
        reports = sorted((results / "compile").glob("*.md"))
        table = render_speed.split_table(read(counts), "What a step launches and keeps")
        parts += ["## Without a device\n", *table, f"\n([JSON](../benchmarks/results/{counts.name}))\n", COMPILED]
        parts += [*(f"- [{file.stem}](../benchmarks/results/compile/{file.name})" for file in reports), ""]
    return {"benchmarks.md": "\n".join(parts), **files}


HEADER = """# Benchmarks

Every result under `benchmarks/results`, as tables and figures. [Results](results.md) says what was compared with
what, what the figures mean, and what they do not show.

- **Figures** are medians (lowest to highest). A ratio above 1 means that this project is faster. A program that
  compares two sides first checks that both compute the same.
- **Two ratios.** On a CPU that other programs share, trust the ratio by processor time. On a GPU the processor's
  time would be the host's, so ratios there are of wall-clock time.
- **Rows do not all compare with each other**: several machines and commits are behind them, named beside every
  table.
- **To repeat one**: `python -m benchmarks NAME`, with the name that the tables give in brackets.
- **Generated** by `python -m benchmarks render`. Only the notes on what is learned are written by hand, beside
  their rows (`*.notes.md`).

The machines:

{machines}
"""

COMPILED = (
    "Registers, spills and shared memory of every kernel, compiled for sm_80, sm_90 and sm_100 and not run:\n"
)


def sections(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Section -> the results that it shows: one of `COMMON`, or a section for a single result."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        report = read(path)
        name = next((name for name, kind in COMMON.items() if kind.fits(report)), path.stem)
        found.setdefault(name, []).append(path)
    return found


def section(path: Path) -> Section:
    """One result file as Markdown, and its figures."""
    report = read(path)
    for fits, render in FORMATS:
        if fits(report):
            return render(path, report)
    return facts(path, report)


def common(name: str, paths: Sequence[Path]) -> Section:
    """Results of one kind, from all machines, in one table."""
    results = [(path, read(path)) for path in paths]
    lines, figures = COMMON[name].render(results)
    return "\n".join([f"### {name}\n", COMMON[name].more, "", *lines, *sources(results)]), figures


def elsewhere(path: Path) -> str:
    """A line for a result that another page shows."""
    words, page = catalogue.shown_elsewhere(path.stem) or ("", "")
    environment = environment_of(read(path))
    command = f", `{environment['command']}`" if environment.get("command") else ""
    return f"- [{words}]({page}): {made_on(path)}{command} ([JSON]({link(path)}))"


def overview(place: str, found: dict[str, list[Path]]) -> str:
    """A table of every section and of every benchmark that has not been run: where and when it was measured, and
    in brackets the names to start it by."""
    device = "cuda" if place == "gpu" else "cpu"
    startable = {each.name for each in CATALOGUE if each.arguments(device, quick=False) is not None}
    lines = ["| result | what | machine, day |", "|---|---|---|"]
    left = dict(found)
    for benchmark in CATALOGUE:
        name = next((name for name, paths in left.items() if benchmark.name in [p.stem for p in paths]), None)
        if name:
            lines.append(_overview_row(name, left.pop(name), startable))
        elif benchmark.name in startable and not any(benchmark.name in map(_stem, own) for own in found.values()):
            lines.append(f"| `{benchmark.name}` | {benchmark.about} | not yet measured |")
    return "\n".join([*lines, *(_overview_row(name, own, startable) for name, own in left.items())]) + "\n"


def _stem(path: Path) -> str:
    return path.stem


def _overview_row(name: str, paths: list[Path], startable: set[str]) -> str:
    words = COMMON[name].about if name in COMMON else catalogue.about(name)
    names = ", ".join(f"`{path.stem}`" for path in paths if path.stem in startable)
    return f"| [{name}](#{name}) | {words}{names and f' ({names})'} | {_made_on(paths)} |"


def _made_on(paths: list[Path]) -> str:
    """Machine and day of a result; for several results all machines, and the first and last day."""
    if len(paths) == 1:
        return made_on(paths[0])
    environments = [(path, environment_of(read(path))) for path in paths]
    days = sorted({day for _, environment in environments if (day := render_about.day(environment))})
    machines = dict.fromkeys(sorted(short(machine(*each)) for each in environments))
    return ", ".join([*machines, *([f"{days[0]} to {days[-1]}"] if days else [])])


def facts(path: Path, report: Any) -> Section:
    """Any other result: its plain values, and a table of its rows if it has any."""
    told = ("environment", "machine", "command", "threads", "torch", "rows")
    plain = {
        name: value for name, value in report.items() if name not in told and not isinstance(value, list | dict)
    }
    for name, value in report.items():
        if name not in told and isinstance(value, dict):
            plain |= {f"{name}: {key}": part for key, part in value.items() if not isinstance(part, list | dict)}
    lines = [
        "| figure | value |",
        "|---|---|",
        *(f"| {_words(name)} | {_cell(value)} |" for name, value in plain.items()),
        "",
    ]
    rows = report.get("rows") or []
    if rows and all(isinstance(row, dict) for row in rows):
        heads = list(dict.fromkeys(name for row in rows for name in row))
        lines += ["| " + " | ".join(map(_words, heads)) + " |", "|---" * len(heads) + "|"]
        lines += ["| " + " | ".join(_cell(row.get(name)) for name in heads) + " |" for row in rows]
    return titled(path, report, lines if plain else lines[3:]), {}


def _words(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def inputs(path: Path, report: Report) -> Section:
    """Examples and masks (`bench_input`)."""
    return titled(path, report, render_speed.input_table(report)), {
        f"{path.stem}.svg": render_speed.input_figure(report)
    }


def sweep(path: Path, rows: list[Report]) -> Section:
    """Throughput over batch and length (`sweep`)."""
    return titled(path, rows, render_speed.sweep_tables(rows, on_gpu(path))), render_speed.sweep_figures(
        path.stem, rows
    )


def comparisons(path: Path, report: Report) -> Section:
    """Ours compared with peers (`harness.write_report`)."""
    lines, figures = render_compare.comparisons(path, report)
    return titled(path, report, lines), figures


def kernels(path: Path, report: Report) -> Section:
    """A kernel compared with its peers (`kernel_report.report`)."""
    lines = [
        "| case | contender | ms | times ours | MB | GB/s | TFLOP/s | of ceiling |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours = {
        row["case"]: row["timing"]["milliseconds"]
        for row in report["results"]
        if row["timing"] and is_baseline(row["contender"])
    }
    rows = []
    for row in report["results"]:
        timing = row["timing"]
        if timing is None:
            lines.append(f"| {row['case']} | {row['contender']} | {row['note']} | | | | | |")
            continue
        times = f"{timing['milliseconds'] / ours[row['case']]:.2f}" if row["case"] in ours else ""
        peak = "" if timing["peak_megabytes"] is None else f"{timing['peak_megabytes']:.0f}"
        share = "" if row["of_ceiling"] is None else f"{row['of_ceiling']:.0%}"
        how = f" ({row['note']})" if row["note"] else ""
        lines.append(
            f"| {row['case']} | {row['contender']}{how} | {timing['milliseconds']:.3f} ({timing['low']:.3f} to "
            f"{timing['high']:.3f}) | {times} | {peak} | {row['gigabytes_per_second']:.0f} | "
            f"{row['teraflops']:.1f} | {share} |"
        )
        if row["of_ceiling"] is not None:
            percent = 100 * row["of_ceiling"]
            rows.append(svg.Bar(f"{row['case']}, {row['contender']}"[:52], percent, percent, percent))
    figures = (
        {f"{path.stem}.svg": svg.bars(f"{path.stem}: share of the measured ceiling", "%", rows)} if rows else {}
    )
    return titled(path, report, lines), figures


def finetuning(path: Path, report: Report) -> Section:
    """Fine-tuning and inference compared with the library (`bench_finetune`)."""
    lines, figures = render_compare.finetuning([(path, report)])
    return titled(path, report, lines), figures


def tasks(path: Path, report: Report) -> Section:
    """The shipped model's tasks (`tiny_tasks`), with their notes."""
    lines = ["| task | start | median | every seed |", "|---|---|---|---|"]
    rows = []
    for row in report["rows"]:
        values = [100 * value for value in row["seeds"]]
        each = ", ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {row['task']} ({row['metric']}, %) | {row['start']} | {median(values):.1f} | {each} |")
        tone = int(row["start"] == "random")
        rows.append(svg.Bar(f"{row['task']}, {row['start']}", median(values), min(values), max(values), tone))
    lines += _notes(path)
    return titled(path, report, lines), {f"{path.stem}.svg": svg.bars(f"{path.stem}: dev figures", "%", rows)}


def learning(path: Path, rows: list[Report]) -> Section:
    """The learning study (`render_learning.py`), with its notes."""
    lines = [*render_learning.tables(rows), *_notes(path)]
    return titled(path, rows, lines), render_learning.figures(path.stem, rows)


def adapting(path: Path, rows: list[Report]) -> Section:
    """Runs that continue from a pair on other text (`adapting`), with their notes."""
    return titled(path, rows, [*render_learning.adapted(rows), *_notes(path)]), {}


def probes(path: Path, report: Report) -> Section:
    """What frozen states tell (`probing`), with their notes."""
    rows = report["rows"]
    lines = [*render_probing.tables(rows), *_notes(path)]
    return titled(path, report, lines), render_probing.figures(path.stem, rows)


def _notes(path: Path) -> list[str]:
    """What is written by hand about a result, if anything."""
    notes = path.with_suffix(".notes.md")
    return ["", notes.read_text(encoding="utf-8").rstrip("\n")] if notes.exists() else []


def _has_kind(*kinds: str) -> Callable[[Any], bool]:
    return lambda report: isinstance(report, list) and any(row.get("kind") in kinds for row in report)


def _has(*keys: str) -> Callable[[Any], bool]:
    return lambda report: isinstance(report, dict) and all(key in report for key in keys)


def _has_rows(*keys: str) -> Callable[[Any], bool]:
    def fits(report: Any) -> bool:
        rows = report.get("rows") if isinstance(report, dict) else None
        return isinstance(rows, list) and all(isinstance(row, dict) and {*keys} <= row.keys() for row in rows)

    return fits


FORMATS: Iterable[tuple[Callable[[Any], bool], Callable[[Path, Any], Section]]] = (
    (_has("comparisons", "environment"), comparisons),
    (_has("ceilings", "results"), kernels),
    (_has("workloads", "results"), finetuning),
    (_has_rows("task", "seeds"), tasks),
    (_has_rows("layer", "repeated"), probes),
    (_has("ways", "plan"), inputs),
    (_has_kind("throughput", "split"), sweep),
    (_has_kind("adapting"), adapting),
    (lambda report: isinstance(report, list), learning),
)


class Kind(NamedTuple):
    """Results that share a section."""

    about: str
    """What the results are, for the overview."""
    more: str
    """The text above the table."""
    fits: Callable[[Any], bool]
    render: Callable[[Sequence[tuple[Path, Report]]], tuple[list[str], dict[str, str]]]


COMMON = {
    "pretrain": Kind(
        "Pre-training beside `transformers`",
        "Whole optimizer steps. [Results](results.md#pre-training-throughput-on-a-cpu) describes the peers; "
        "\"masked logits picked\" is an older name of \"masked logits\".",
        _has("comparisons", "settings", "relative_differences"), render_compare.pretraining,
    ),
    "finetune": Kind(
        "Fine-tuning and inference beside `transformers`",
        "ELECTRA-Small. \"hub\" is `transformers`, its batches padded to the maximum, to their own longest text "
        "(dynamic), or sorted by length first ([results](results.md#fine-tuning-and-inference-on-a-cpu)).",
        _has("workloads", "results"), render_compare.finetuning,
    ),
    "step": Kind(
        "A step of ELECTRA-Small by its stages", render_speed.STAGES_MEASURED,
        _has("stages", "environment"), lambda results: (render_speed.stage_table(results), {}),
    ),
}  # fmt: skip
"""Section's name -> kind."""
