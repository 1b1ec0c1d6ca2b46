"""The input pipeline, the throughput sweep and the split of a step on the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks import svg

Row = dict[str, Any]
OURS = "ours"


def _spread(value: Row) -> str:
    """Median (least to greatest)."""
    return f"{value['median']:,.4g} ({value['low']:,.4g} to {value['high']:,.4g})"


def _millions(value: Row) -> str:
    return _spread({name: number / 1e6 for name, number in value.items()})


# ---- input (`bench_input`) ---------------------------------------------------------------------------------


def input_table(report: Row) -> list[str]:
    """Tokens a second of every way, and where a worker's time goes."""
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
        f"{settings['corpus']}. Planning takes {_spread(plan['together'])} ns a token, "
        f"by the rules, one example at a time, {_spread(plan['one_at_a_time'])}.\n",
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
    ]
    for row in report["ways"]:
        cells = [_millions(row["tokens_per_second"]), _millions(row["tokens_per_second_by_processor_time"])]
        cells += [_spread(row["nanoseconds_per_token"][stage]) for stage in stages]
        lines.append(f"| {row['processes']} x {row['threads']} | " + " | ".join(cells) + " |")
    return lines


def input_figure(report: Row) -> str:
    """Bars of all ways."""
    rows = []
    for tone, row in enumerate(report["ways"]):
        rate = row["tokens_per_second"]
        low, middle, high = (rate[name] / 1e6 for name in ("low", "median", "high"))
        rows.append(svg.Bar(f"{row['processes']} x {row['threads']}", middle, low, high, tone % svg.TONES))
    return svg.bars("Examples and masks, processes x threads", "million tokens/s", rows)


# ---- sweep (`sweep`) ---------------------------------------------------------------------------------------


def sweep_tables(rows: Sequence[Row], on_gpu: bool) -> list[str]:
    """Every program at every shape, and the split of our step; of processor time on a CPU only."""
    measured = [row for row in rows if row["kind"] == "throughput"]
    ours = {_place(row): row for row in measured if row["program"] == OURS and "note" not in row}
    clocks = ["tokens_per_second"] if on_gpu else ["tokens_per_second", "by_processor_time"]
    heads = ["ours, times as fast", "by processor time"][: len(clocks)]
    heads = ["sequences x tokens", "program", "tokens/s", *heads, "MFU", "peak MiB"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for row in measured:
        about = f"| {row['model']} {row['objective']} | {row['batch']} x {row['length']} | {row['program']} | "
        if "note" in row:
            lines.append(f"{about}{row['note'].replace('|', '/')} |" + " |" * (2 + len(clocks)))
            continue
        ratios = [""] * len(clocks)
        if row["program"] != OURS and (best := ours.get(_place(row))):
            ratios = [f"{best[name]['median'] / row[name]['median']:.2f}" for name in clocks]
        share = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        cells = [_spread(row["tokens_per_second"]), *ratios, share, f"{row['peak_mib']:,}"]
        lines.append(about + " | ".join(cells) + " |")
    for row in rows:
        if row["kind"] == "split":
            lines += ["", *split_table(row, f"A step of {row['model']}, {row['shape']}, by stages")]
    return lines


def _place(row: Row) -> tuple[Any, ...]:
    return row["model"], row["objective"], row["batch"], row["length"]


def sweep_figures(stem: str, rows: Sequence[Row]) -> dict[str, str]:
    """Tokens a second over the batch, at the length with most shapes, for each objective."""
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


def split_table(report: Row, title: str) -> list[str]:
    """Stages of a step (`bench_step`): its own report, counts without a device, or a row of a sweep."""
    command = report.get("command") or report["environment"]["command"]
    lines = [
        f"{title} (`{command}`):\n",
        "| stage | ms | share | launches | kept bytes a token | moved MB | products' floor on an H200, ms |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    total = sum(row["milliseconds"] or 0.0 for row in report["stages"].values())
    for name, row in report["stages"].items():
        time = row["milliseconds"]
        share = f"{time / total:.0%}" if time is not None and total else ""
        floor, moved = row["floor_milliseconds_h200"], row.get("moved_megabytes")  # of reports since 29 November
        lines.append(
            f"| {name} | {'' if time is None else f'{time:,.2f}'} | {share} | {row['launches']:,} | "
            f"{row['kept_bytes_per_token']:,} | {'' if moved is None else f'{moved:,.0f}'} | "
            f"{'' if floor is None else f'{floor:.4f}'} |"
        )
    spent = f"{total:,.1f}" if total else ""
    moved = f"{report['moved_bytes'] / 1e6:,.0f}" if "moved_bytes" in report else ""
    lines.append(f"| all | {spent} | | {report['launches']:,} | {report['kept_bytes_per_token']:,} | {moved} | |")
    return lines
