"""The summary of a folder of `gpu_run`: what ran, what is wrong, the figures, what is left, what to type next."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.catalogue import LEFT_OUT, is_baseline
from benchmarks.gpu_pieces import Piece
from benchmarks.harness import BEGUN, replace_text, whole_rows

States = dict[str, dict[str, Any]]
ERRORS, LINES = 12, 6
"""The most lines shown of one piece's errors, and of the end of one log."""
FALLBACKS = ("one by one instead", "the eager engine instead", "instead of the Triton kernels")
"""Words of the lines that say that a run goes on without graphs or kernels: its figures are not theirs."""
WORDS = {
    "done": "ran", "faults": "ran and found errors", "stopped": "stopped before its end", "failed": "failed",
    "left out": "left out", "absent": "cannot run", "running": "running", "": "not started",
}  # fmt: skip


def write(folder: Path, states: States, pieces: Sequence[Piece], command: str) -> None:
    """Replaces `summary.json` and `summary.md`."""
    digests = {piece.name: digest(folder, piece) for piece in pieces if piece.name in states}
    facts = {"pieces": states, "digests": digests, "command": command}
    replace_text(folder / "summary.json", json.dumps(facts, indent=1) + "\n")
    replace_text(folder / "summary.md", page(folder, states, pieces, command, digests))


def page(
    folder: Path, states: States, pieces: Sequence[Piece], command: str, digests: dict[str, list[str]]
) -> str:
    """The text of `summary.md`."""
    known = [(piece, states.get(piece.name, {})) for piece in pieces]
    lines = ["# What ran on the GPU", "", *_machine(folder), "", "| piece | result | seconds |", "|---|---|---|"]
    for piece, state in known:
        why = f": {state['why']}" if "why" in state else ""
        took = f"{state['seconds']:.0f}" if "seconds" in state else f"({piece.seconds} predicted)"
        lines.append(f"| {piece.name} | {WORDS[state.get('state', '')]}{why} | {took} |")
    for piece, state in known:
        found = digests.get(piece.name, [])
        found = [*_fallbacks(folder / f"{piece.name}.log"), *found]
        if state.get("state") in ("failed", "stopped"):
            found = [*found, *_end_of_log(folder / f"{piece.name}.log")]
        if found:
            lines += ["", f"## {piece.name}: {piece.about}", "", "```", *found, "```"]
    left = [piece for piece, state in known if state.get("state") not in ("done", "faults", "absent")]
    lines += ["", "## What is left", ""]
    if left:
        seconds = sum(piece.seconds for piece in left)
        lines += [
            f"{len(left)} pieces, predicted to take at least {seconds / 60:.0f} minutes. To continue, repeat the "
            "command:", "", f"    {command}",
        ]  # fmt: skip
    else:
        lines.append("Nothing: every piece that can run has run.")
    return "\n".join(lines) + "\n"


def _machine(folder: Path) -> list[str]:
    facts = _json(folder / "facts.json")
    where = facts.get("environment")
    if not isinstance(where, dict):
        return ["The machine is unknown."]
    versions = ", ".join(f"{name} {version}" for name, version in where.get("versions", {}).items() if version)
    clocks = facts["clocks_under_load"] if isinstance(facts.get("clocks_under_load"), dict) else {}
    kernels = facts.get("kernels")
    best = facts.get("ceilings")
    rates = (
        f" A large copy reaches {best['bytes_per_second'] / 1e12:.2f} TB/s, a large matrix product "
        f"{best['operations_per_second'] / 1e12:.0f} TFLOP/s."
        if isinstance(best, dict)
        else ""
    )
    return [
        f"{where.get('device')}, {clocks.get('clocks.sm')} under load, driver {clocks.get('driver_version')}; "
        f"{versions}; commit {where.get('commit')}.{rates} Triton kernels: "
        f"{kernels.get('triton') if isinstance(kernels, dict) else kernels}."
    ]


def digest(folder: Path, piece: Piece) -> list[str]:
    """A piece's result in lines; none without a result, and one that says why if it cannot be read."""
    path = folder / piece.result
    try:
        if piece.suffix == ".jsonl":
            return _about_rows(whole_rows(path))
        found = _json(path) or _json(path.with_suffix(".part"))
        return next((lines for read in READERS if (lines := read(found))), [])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"{path.name} cannot be read: {type(error).__name__}: {error}"]


def _about_rows(rows: list[dict[str, Any]]) -> list[str]:
    tests = {}
    for row in rows:
        if "test" in row and (row["outcome"] != "begun" or row["test"] not in tests):
            tests[row["test"]] = row
    if tests:
        return _about_tests(tests, max((row.get("collected", 0) for row in rows), default=0))
    checks = {(row["kernel"], row["dtype"]): row for row in rows if "kernel" in row}
    if checks:
        return _about_checks(checks)
    measured = [row for row in rows if "tokens_per_second" in row]
    return [f"{row['piece']}: {row['tokens_per_second']['median']:,.0f} tokens/s" for row in measured]


def _about_tests(tests: dict[str, dict[str, Any]], collected: int) -> list[str]:
    counts = [
        f"{sum(row['outcome'] == name for row in tests.values())} {name}"
        for name in ("passed", "failed", "skipped")
    ]
    failed = [f"{name}: {row['line']}" for name, row in tests.items() if row["outcome"] == "failed"]
    return [f"{', '.join(counts)}, of {collected} tests", *_some(failed)]


def _about_checks(checks: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    wrong = [
        f"{'NO ANSWER' if row['problem'] == BEGUN else 'WRONG'} {kernel}, {dtype}: {row['problem']}"
        for (kernel, dtype), row in checks.items()
        if row["problem"]
    ]
    slowest = max(checks.values(), key=lambda row: row["seconds"] or 0.0)
    return [
        f"{len(checks) - len(wrong)} of the {len(checks)} begun are right; slowest first call: "
        f"{slowest['kernel']}, {slowest['seconds']} s",
        *_some(wrong),
    ]


def _about_comparisons(found: dict[str, Any]) -> list[str]:
    """Results of `harness.write_report`."""
    return [
        f"{row['figure']}: {row['ours']['median']:,.0f} {row['unit']}, "
        f"{row['ratio']['median']:.2f} times as fast as {row['peer']}"
        for row in found.get("comparisons", [])
    ]


def _about_kernels(found: dict[str, Any]) -> list[str]:
    """Results of `kernel_report`: for each case ours, and the fastest of the others."""
    rows = [row for row in found.get("results", []) if isinstance(row, dict) and "contender" in row]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        timed = {
            row["contender"]: row["timing"]["milliseconds"]
            for row in rows
            if row["case"] == case and row["timing"]
        }
        ours = {name: time for name, time in timed.items() if is_baseline(name)}
        others = {name: time for name, time in timed.items() if not name.startswith("ours")}
        if ours:
            name, time = next(iter(ours.items()))
            share = next(row["of_ceiling"] for row in rows if row["case"] == case and row["contender"] == name)
            best = min(others, key=lambda other: others[other], default=None)
            than = f", {others[best] / time:.2f} times as fast as {best}" if best else ""
            lines.append(f"{case}: {time:.3f} ms{than}" + (f", {share:.0%} of the ceiling" if share else ""))
    failed = [row for row in rows if row["timing"] is None and not row["note"].startswith(LEFT_OUT)]
    faults = [f"{row['case']}, {row['contender']}: {row['note']}" for row in failed]
    return [*lines, *_some(faults)]


def _about_finetuning(found: dict[str, Any]) -> list[str]:
    """Results of `bench_finetune`."""
    results = found.get("results", {})
    return [
        f"{what}: {row['ways']['ours']['tokens_per_second']:,.0f} tokens/s, "
        + ", ".join(f"{ratio:.2f} times as fast as {way}" for way, ratio in row["speedups"].items())
        for what, row in (results.items() if isinstance(results, dict) else ())
    ]


def _about_tiles(found: dict[str, Any]) -> list[str]:
    """Results of `tune`: the best tile, and the first one, which is the present tile unless that failed."""
    rows = [row for row in found.get("results", []) if isinstance(row, dict) and "sweep" in row]
    lines = []
    for sweep in dict.fromkeys(row["sweep"] for row in rows):
        timed = [row for row in rows if row["sweep"] == sweep and row["ms"] is not None]
        if timed:
            best = min(timed, key=lambda row: row["ms"])
            lines.append(
                f"{sweep}: best tile {best['tile']}, {best['ms']:.4f} ms; "
                f"first tile {timed[0]['tile']}, {timed[0]['ms']:.4f} ms"
            )
    return lines


def _about_stages(found: dict[str, Any]) -> list[str]:
    """Results of `bench_step`."""
    return [f"{name}: {row['milliseconds']} ms" for name, row in found.get("stages", {}).items()]


READERS: tuple[Callable[[dict[str, Any]], list[str]], ...] = (
    _about_comparisons, _about_tiles, _about_kernels, _about_finetuning, _about_stages,
)  # fmt: skip


def _some(lines: list[str]) -> list[str]:
    return lines if len(lines) <= ERRORS else [*lines[:ERRORS], f"and {len(lines) - ERRORS} more"]


def _fallbacks(log: Path) -> list[str]:
    """A log's lines that tell of a run without kernels or graphs, each once."""
    told = [line[:300] for line in _text(log).split("\n") if any(words in line for words in FALLBACKS)]
    return _some([f"NOTE {line}" for line in dict.fromkeys(told)])


def _end_of_log(path: Path) -> list[str]:
    return [line[:300] for line in _text(path).rstrip().split("\n")[-LINES:]]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # truncated
        return {}
    return found if isinstance(found, dict) else {}
