"""What the page says about a result's origin: machine, versions, commit and command.

Machines have letters, as in docs/results.md. Since 29 November a result includes its processor's family and model,
which determine the letter. Older results have only the device's name and extensions, which are the same for AMD's
Zen 4 and Zen 5; for these the file's name decides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

Report = dict[str, Any]


class Machine(NamedTuple):
    """A kind of machine that figures of these pages were measured on."""

    short: str
    long: str


MACHINES = {
    "A": Machine("Xeon with AMX", "2 virtual cores of an Intel Xeon with AMX tiles for bf16 at 2.6 GHz"),
    "B": Machine("Xeon", "2 virtual cores of an Intel Xeon at 2.3 GHz (AVX-512, no AMX), shared with other work"),
    "C": Machine("Zen 4", "2 virtual cores of an AMD EPYC (Zen 4, AVX-512 BF16) at 2.6 GHz"),
    "D": Machine("Zen 5", "2 virtual cores of an AMD EPYC (Zen 5, AVX-512 BF16 twice as wide) at 2.6 GHz"),
    "E": Machine("Zen 3", "2 virtual cores of an AMD EPYC (Zen 3: AVX2, neither AVX-512 nor bf16)"),
}
FAMILIES = {
    ("AuthenticAMD family 25", True): "C",
    ("AuthenticAMD family 26", True): "D",
    ("AuthenticAMD family 25", False): "E",
}
"""Machines by their EPYC processor's family and whether it has AVX-512 BF16."""


def legend() -> str:
    """The legend of the letters."""
    return "\n".join(f"- **{letter}: {machine.short}**: {machine.long}" for letter, machine in MACHINES.items())


def letter_of(name: str, environment: Report) -> str | None:
    """The machine's letter, or None if it has none.

    Args:
        name: the result's file name, without its suffix.
    """
    device, processor = environment.get("device") or "", environment.get("processor") or ""
    if processor:
        family = processor.partition(" model")[0]
        return FAMILIES.get((family, "avx512_bf16" in device)) if "EPYC" in device else None
    if "Intel" in device and "Xeon" in device:
        return "A" if "amx_bf16" in device else "B"
    return ("D" if "zen5" in name else "C") if "AMD EPYC" in device else None


def machine(path: Path, environment: Report) -> str:
    """ "C: Zen 4", or the device as the result names it."""
    if letter := letter_of(path.stem, environment):
        return f"{letter}: {MACHINES[letter].short}"
    return ", ".join(part for part in (environment.get("device"), environment.get("processor")) if part)


def short(machine: str) -> str:
    """A machine's letter if it has one, else its name; for figures."""
    return machine.partition(": ")[0]


def read(path: Path) -> Any:
    """A result; a list if it is a file of JSON lines."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line] if path.suffix == ".jsonl" else json.loads(text)


def on_gpu(path: Path) -> bool:
    """Whether a result is from a GPU, where processor time does not measure the work."""
    return path.parent.name == "gpu"


def link(path: Path) -> str:
    """A link from the page to a file of the project."""
    return f"../benchmarks/results/{path.parent.name}/{path.name}"


def environment_of(report: Any) -> Report:
    """What a result says about its machine, in any of the formats."""
    if isinstance(report, list):
        found = (row for row in report if row.get("kind") == "environment" and not row.get("elsewhere"))
        rows = [row["environment"] for row in found]
        return dict(rows[-1]) if rows else {}
    if "environment" in report:
        return dict(report["environment"])
    versions = {name: report.get(name) for name in ("torch", "transformers")}
    return {
        "device": report.get("machine"), "threads": report.get("threads"), "versions": versions,
        "command": (report.get("command") or "").partition(" --out")[0], "date": report.get("date"),
    }  # fmt: skip


def made_on(path: Path) -> str:
    """Machine and day of a result."""
    environment = environment_of(read(path))
    return ", ".join(part for part in (machine(path, environment), day(environment)) if part)


def day(environment: Report) -> str:
    """The day of the measurement; empty if the result does not say."""
    return (environment.get("date") or "")[:10]


def commit(environment: Report) -> str:
    """The commit that ran, and whether its files were changed."""
    name, _, changed = (environment.get("commit") or "").partition("+")
    return f"commit {name[:9]}{' with uncommitted changes' if changed else ''}" if name else ""


def about(path: Path, environment: Report) -> str:
    """Machine, versions, commit and command of a result."""
    versions = ", ".join(f"{name} {value}" for name, value in (environment.get("versions") or {}).items() if value)
    threads = environment.get("threads")
    counted = f"{threads} thread{'s' * (threads > 1)}" if threads else ""
    facts = [machine(path, environment), day(environment), counted, versions, commit(environment)]
    command = environment.get("command")
    lines = ["; ".join(fact for fact in facts if fact) + f" ([JSON]({link(path)}))"]
    return "\n".join([*lines, *([f"\n    {command}"] if command else [])]) + "\n"


def titled(path: Path, report: Any, lines: list[str]) -> str:
    """A section: heading, machine, content."""
    return "\n".join([f"### {path.stem}\n", about(path, environment_of(report)), *lines]) + "\n"


def sources(results: list[tuple[Path, Any]]) -> list[str]:
    """The files that the rows of a common table come from, a line for each."""
    lines = [""]
    for path, report in results:
        environment = environment_of(report)
        facts = [machine(path, environment), day(environment), commit(environment)]
        told = f"`{environment['command']}`" if environment.get("command") else ""
        lines.append(f"- [{path.stem}]({link(path)}): " + "; ".join(fact for fact in (*facts, told) if fact))
    return [*lines, ""]
