"""The input pipeline, the throughput sweep and the split of a step on the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import svg
from benchmarks.render_about import day, environment_of, machine
from benchmarks.render_compare import spread

Row = dict[str, Any]
OURS = "ours"


def _millions(value: Row) -> str:
    return spread({name: number / 1e6 for name, number in value.items()}, 4)


# ---- input (`bench_input`) ---------------------------------------------------------------------------------


def input_table(report: Row) -> list[str]:
    """Tokens per second of every way, and where a worker's time goes."""
    settings, plan = report["settings"], report["plan"]
    stages = list(report["ways"][0]["nanoseconds_per_token"])
    heads = [
        "processes x threads",
        "10^6 tokens/s",
        "by processor time",
        *(f"{stage}, ns/token" for stage in stages),
    ]
    lines = [
        f"Batches of {settings['batch']} x {settings['length']}, {settings['planned']} examples planned at once; "
        f"{settings['corpus']}. Planning takes {spread(plan['together'], 4)} ns a token; the plain rules, applied "
        f"to one example at a time, take {spread(plan['one_at_a_time'], 4)}.\n",
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
    ]
    for row in report["ways"]:
        cells = [_millions(row["tokens_per_second"]), _millions(row["tokens_per_second_by_processor_time"])]
        cells += [spread(row["nanoseconds_per_token"][stage], 4) for stage in stages]
        lines.append(f"| {row['processes']} x {row['threads']} | " + " | ".join(cells) + " |")
    return lines


def input_figure(report: Row) -> str:
    """A bar for each way."""
    rows = []
    for tone, row in enumerate(report["ways"]):
        rate = row["tokens_per_second"]
        low, middle, high = (rate[name] / 1e6 for name in ("low", "median", "high"))
        rows.append(svg.Bar(f"{row['processes']} x {row['threads']}", middle, low, high, tone % svg.TONES))
    return svg.bars("Examples and masks, processes x threads", "million tokens/s", rows)


# ---- sweep (`sweep`) ---------------------------------------------------------------------------------------


def sweep_tables(rows: Sequence[Row], on_gpu: bool) -> list[str]:
    """Every program at every shape, and the stages of our step; processor time only on a CPU."""
    measured = [row for row in rows if row["kind"] == "throughput"]
    ours = {_place(row): row for row in measured if row["program"] == OURS and "note" not in row}
    clocks = ["tokens_per_second"] if on_gpu else ["tokens_per_second", "by_processor_time"]
    heads = ["ours, times as fast", "by processor time"][: len(clocks)]
    heads = ["sequences x tokens", "program", "tokens/s", *heads, "MFU", "peak MiB"]
    lines = ["| model, objective | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for row in measured:
        about = f"| {row['model']} {row['objective']} | {row['batch']} x {row['length']} | {row['program']} | "
        if "note" in row:
            lines.append(f"{about}{row['note'].replace('|', '/')} |" + " |" * (2 + len(clocks)))
            continue
        ratios = [""] * len(clocks)
        if row["program"] != OURS and (best := ours.get(_place(row))):
            ratios = [f"{best[name]['median'] / row[name]['median']:.2f}" for name in clocks]
        share = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        cells = [spread(row["tokens_per_second"], 4), *ratios, share, f"{row['peak_mib']:,}"]
        lines.append(about + " | ".join(cells) + " |")
    for row in rows:
        if row["kind"] == "split":
            lines += ["", *split_table(row, f"A step of {row['model']}, {row['shape']}, by stages")]
    return lines


def _place(row: Row) -> tuple[Any, ...]:
    return row["model"], row["objective"], row["batch"], row["length"]


def sweep_figures(stem: str, rows: Sequence[Row]) -> dict[str, str]:
    """Tokens per second over the batch size, at the length with the most shapes, for each objective."""
    measured = [row for row in rows if row["kind"] == "throughput" and "note" not in row]
    if not measured:
        return {}
    shapes = {(row["batch"], row["length"]) for row in measured}
    (length, _), *_ = sorted(
        Counter(length for _, length in shapes).most_common(), key=lambda pair: (-pair[1], pair[0])
    )
    figures = {}
    for objective in dict.fromkeys(row["objective"] for row in measured):
        points: dict[str, list[tuple[float, Sequence[float]]]] = {}
        for row in measured:
            if row["objective"] == objective and row["length"] == length:
                rate = row["tokens_per_second"]
                values = [rate["low"], rate["median"], rate["high"]]
                points.setdefault(row["program"], []).append((row["batch"], values))
        series = [svg.Curve(name, sorted(own)) for name, own in points.items()]
        title = f"{measured[0]['model']} {objective}, sequences of {length} tokens"
        figures[f"{stem}_{objective}.svg"] = svg.curves(
            title, "sequences in a batch", "tokens/s", series, from_zero=True
        )
    return figures


CALCULATED = (
    "Launches and bytes are counted for a GPU's kernels, and milliseconds on an H200 are calculated from these "
    "counts and the H200's peak rates: no GPU has run this."
)
STAGES_MEASURED = f"A stage's milliseconds are measured on the machine named. {CALCULATED}"
COUNTED = {
    "launches": "launches",
    "kept_bytes_per_token": "kept for the backward pass, bytes a token",
    "moved_megabytes": "moved, megabytes",
    "moved_milliseconds_h200": "moving them on an H200, milliseconds",
    "floor_milliseconds_h200": "matrix products on an H200, milliseconds",
}


def split_table(report: Row, title: str) -> list[str]:
    """Stages of a step (`bench_step`), from counts without a device or from a row of a sweep."""
    command = report.get("command") or report["environment"]["command"]
    timed = any(row["milliseconds"] is not None for row in report["stages"].values())
    what = STAGES_MEASURED if timed else f"Nothing is measured. {CALCULATED}"
    times = {"milliseconds measured": report} if timed else {}
    return [f"{title} (`{command}`). {what}\n", *_stage_lines(report, times)]


def stage_table(results: Sequence[tuple[Path, Row]]) -> list[str]:
    """Stages of a step from several results (`bench_step`): a column of times for each, and the newest result's
    counts, which do not depend on the machine."""
    _, newest = max(results, key=lambda result: day(environment_of(result[1])))
    return _stage_lines(newest, {_column(path, report): report for path, report in results})


def _column(path: Path, report: Row) -> str:
    return f"milliseconds measured, {path.stem} ({machine(path, environment_of(report))})"


def _stage_lines(counted: Row, times: dict[str, Row]) -> list[str]:
    """The table: `times` by column title, then the available counts of `COUNTED`."""
    rows = {stage: _counts(stage, row) for stage, row in _stages(counted).items()}
    heads = {
        name: title for name, title in COUNTED.items() if any(row.get(name) is not None for row in rows.values())
    }
    rows["**all**"] = {name: counted.get(name) for name in ("launches", "kept_bytes_per_token")}
    if "moved_bytes" in counted:
        rows["**all**"]["moved_megabytes"] = round(counted["moved_bytes"] / 1e6, 1)
    columns = [_milliseconds(report) for report in times.values()]
    lines = ["| " + " | ".join(["stage", *times, *heads.values()]) + " |"]
    lines.append("|---" * (1 + len(times) + len(heads)) + "|")
    for stage, row in rows.items():
        values = [*(column.get(stage) for column in columns), *(row.get(name) for name in heads)]
        lines.append(
            f"| {stage} | " + " | ".join("" if value is None else f"{value:,}" for value in values) + " |"
        )
    return lines


def _stages(report: Row) -> dict[str, Row]:
    """A result's stages. Results of before 30 November call the preparation of masks "draw", as if it were the
    generator's."""
    return {"masks" if stage == "draw" else stage: row for stage, row in report["stages"].items()}


def _milliseconds(report: Row) -> dict[str, float | None]:
    found = {stage: row["milliseconds"] for stage, row in _stages(report).items()}
    return {**found, "**all**": round(sum(value or 0 for value in found.values()), 1)}


def _counts(stage: str, row: Row) -> Row:
    """A stage's counts. The optimizer has no matrix products, so its floor is that of the bytes that it moves."""
    return {**row, "floor_milliseconds_h200": None} if stage == "optimizer" else row
