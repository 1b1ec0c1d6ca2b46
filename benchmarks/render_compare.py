"""Ours compared with peers, on the page: whole programs (`harness.write_report`), pre-training on every machine in
one table (`bench_pretrain`), fine-tuning and inference in another (`bench_finetune`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import svg
from benchmarks.render_about import environment_of, machine, on_gpu, short

Report = dict[str, Any]
Results = Sequence[tuple[Path, Report]]
Figures = dict[str, str]


def spread(value: Report, digits: int = 3) -> str:
    """Median (minimum to maximum)."""
    return f"{value['median']:,.{digits}g} ({value['low']:,.{digits}g} to {value['high']:,.{digits}g})"


def clocks_of(path: Path) -> list[str]:
    """The clocks whose ratios are shown, the last one also in the figure; processor time only on a CPU."""
    return ["ratio"] if on_gpu(path) else ["ratio", "ratio_by_processor_time"]


def _bar(name: str, row: Report, clocks: list[str], tone: int) -> svg.Bar:
    ratio = row[clocks[-1]]
    return svg.Bar(name, ratio["median"], ratio["low"], ratio["high"], tone % svg.TONES)


def _title(stem: str, path: Path) -> str:
    return f"{stem}: times as fast{'' if on_gpu(path) else ', by processor time'}"


def comparisons(path: Path, report: Report) -> tuple[list[str], Figures]:
    """Ours compared with peers, for each figure."""
    clocks = clocks_of(path)
    heads = ["measured", "peer", "ours", "peer's", "ratio", "by processor time"][: 4 + len(clocks)]
    lines, bars = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"], []
    for index, row in enumerate(report["comparisons"]):
        cells = [f"{row['figure']}, {row['unit']}", row["peer"], spread(row["ours"], 4), spread(row["theirs"], 4)]
        lines.append("| " + " | ".join([*cells, *(spread(row[clock]) for clock in clocks)]) + " |")
        bars.append(_bar(f"{row['figure']} / {row['peer']}", row, clocks, index))
    return lines, {f"{path.stem}.svg": svg.bars(_title(path.stem, path), "x", bars)}


def _precisions(settings: Report) -> str:
    """ "bf16", or "auto, peer bf16"; and whether the peer also keeps freed memory."""
    theirs = settings.get("their_precision")
    kept = ", peer keeps freed memory" if settings.get("keep_freed_memory") == "all" else ""
    return settings["precision"] + (f", peer {theirs}" if theirs else "") + kept


def pretraining(results: Results) -> tuple[list[str], Figures]:
    """Tokens per second of pre-training, with what was measured where; a figure for each objective."""
    path = results[0][0]
    clocks = clocks_of(path)
    heads = ["model", "sequences x tokens", "precision", "threads", "machine", "objective", "peer"]
    heads += ["ours, tokens/s", "peer's", "ratio", "by processor time"][: 2 + len(clocks)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    bars: dict[str, list[svg.Bar]] = {}
    for path, report in sorted(results, key=_order):
        made, settings = machine(path, environment_of(report)), report["settings"]
        threads = settings["threads"]
        about = [settings["model"], f"{settings['batch']} x {settings['length']}", _precisions(settings)]
        for row in report["comparisons"]:
            own = [*about, str(threads), made, row["figure"], row["peer"]]
            own += [spread(row["ours"], 4), spread(row["theirs"], 4), *(spread(row[clock]) for clock in clocks)]
            lines.append("| " + " | ".join(own) + " |")
            mine = bars.setdefault(row["figure"], [])
            counted = f"{threads} thread{'s' * (threads > 1)}"
            name = f"{short(made)}, {settings['model']}, {about[2]}, {counted} / {row['peer']}"
            mine.append(_bar(name, row, clocks, _tone(report, row["peer"])))
    return lines, {
        f"pretrain_{name}.svg": svg.bars(_title(f"pre-training, {name}", path), "x", own)
        for name, own in bars.items()
    }


def _order(result: tuple[Path, Report]) -> tuple[str, ...]:
    path, report = result
    settings = report["settings"]
    return (
        settings["model"],
        _precisions(settings),
        str(settings["threads"]),
        machine(path, environment_of(report)),
    )


def _tone(report: Report, peer: str) -> int:
    """A colour for each peer, in order."""
    return list(dict.fromkeys(row["peer"] for row in report["comparisons"])).index(peer)


def finetuning(results: Results) -> tuple[list[str], Figures]:
    """Examples per second of fine-tuning and inference on every machine, ours compared with the library's ways."""
    gpu = on_gpu(results[0][0])
    clock = "speedups" if gpu else "speedups_by_processor_time"
    heads = ["workload", "machine", "way", "examples/s", "peak MiB", "ours is faster"]
    heads += [] if gpu else ["by processor time"]
    lines, bars = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"], []
    for workload in dict.fromkeys(name for _, report in results for name in report["results"]):
        for path, report in results:
            if workload not in report["results"]:
                continue
            result, made = report["results"][workload], machine(path, environment_of(report))
            for tone, (way, row) in enumerate(result["ways"].items()):
                cells = [workload, made, way, f"{row['examples_per_second']:,.1f}", f"{row['peak_mib']:,.0f}"]
                cells += [_times(result, name, way) for name in dict.fromkeys(("speedups", clock))]
                lines.append("| " + " | ".join(cells) + " |")
                if (faster := result[clock].get(way)) is not None:
                    name = ", ".join(part for part in (short(made), f"{workload} / {way}") if part)
                    bars.append(svg.Bar(name, faster, faster, faster, tone % svg.TONES))
    stem = "finetune" if len(results) > 1 else results[0][0].stem
    return lines, {f"{stem}.svg": svg.bars(_title("fine-tuning and inference", results[0][0]), "x", bars)}


def _times(result: Report, clock: str, way: str) -> str:
    """ "3.16 x" by this clock, with the range over the rounds if the result has them."""
    faster = result[clock].get(way)
    rounds = result.get("speedups_of_rounds", {}).get(way) if clock == "speedups" else None
    within = f" ({min(rounds):.2f} to {max(rounds):.2f})" if rounds else ""
    return "" if faster is None else f"{faster:.2f} x{within}"
