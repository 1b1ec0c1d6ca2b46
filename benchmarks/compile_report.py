"""Compiles every Triton kernel ahead of time, without a GPU, and reports what the compiler made of it.

    python -m benchmarks.compile_report [--json] [--check] [--only TEXT…] [--capability 80 90 …] [--jobs N]
        [--out FILE.json FILE.md]

Kernels are found through `compile_cases(capability)` of each module in `MODULES`; see
`electra_kernels.compile_case` for what a case holds. To add kernels, add their module to `MODULES`. `--check`
exits with 1 if a kernel breaks a rule of `problems`. `--out` writes every row (.json) or a summary by kernel and
architecture (.md), with the versions and the command.

Columns: registers per thread and bytes of stack (anything above 0 is a spill) · shared memory per program ·
programs that fit on a multiprocessor, and what limits them · tensor-core instructions · narrowest and widest
global access in bits, loads then stores · instructions of the largest inner loop (of the whole kernel if it has
none) and what bounds it. The bound is a prediction from instruction counts: cycles per program that the issue
slots (4 per cycle), the special-function units (16 lanes per cycle) and the tensor cores need. It ignores latency
and memory, so it shows where the instructions go, not how long the kernel takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from electra_kernels.compile_case import CAPABILITIES, CompileCase, tiles_of

from benchmarks.harness import environment, replace_text

MODULES = (
    "electra_kernels.attention_triton",
    "electra_kernels.mlm_head_triton",
    "electra_kernels.sample_replace_triton",
    "electra_kernels.rtd_loss_triton",
    "electra_kernels.layer_norm_triton",
    "electra_kernels.bias_gelu_triton",
    "electra_kernels.embedding_layer_norm_triton",
)


FACTS = ("versions", "commit", "command", "date")  # of the environment; the machine does not matter here


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor (CUDA programming guide, table of technical specifications)."""

    shared_per_program: int
    shared_total: int
    tensor_flops_per_cycle: int | None
    """Dense half-precision FLOPs per cycle; None where instructions do not show their shape, or where cards of one
    architecture differ."""
    warps: int = 64
    programs: int = 32


CHIPS = {
    75: Chip(64 * 1024, 64 * 1024, None, warps=32, programs=16),
    80: Chip(163 * 1024, 164 * 1024, 2048),
    86: Chip(99 * 1024, 100 * 1024, None, warps=48, programs=16),
    89: Chip(99 * 1024, 100 * 1024, None, warps=48, programs=24),
    90: Chip(227 * 1024, 228 * 1024, 4096),
    100: Chip(227 * 1024, 228 * 1024, None),
    120: Chip(99 * 1024, 100 * 1024, None, warps=48, programs=24),
}
REGISTERS, RESERVED_SHARED = 65536, 1024


@dataclass(frozen=True)
class Row:
    """What the compiler made of one case."""

    name: str
    capability: int
    warps: int
    stages: int
    registers: int
    stack_bytes: int
    spill_instructions: int
    shared_bytes: int
    programs_per_multiprocessor: int
    limited_by: str
    tensor_instructions: int
    load_bits: tuple[int, ...]
    store_bits: tuple[int, ...]
    loop_instructions: int | None
    instructions: int
    bound: str
    bound_cycles: dict[str, int]
    needs_dot: bool
    streaming: bool
    wide_stores: bool


def problems(row: Row) -> list[str]:
    """The rules that a kernel breaks, in words."""
    chip = CHIPS[row.capability]
    broken = []
    if row.stack_bytes or row.spill_instructions:
        broken.append(f"spills ({row.stack_bytes} bytes of stack, {row.spill_instructions} instructions)")
    if row.needs_dot and not row.tensor_instructions:
        broken.append("a matrix product without tensor cores")
    if row.streaming and 128 not in row.load_bits:
        broken.append(f"no 128-bit global load (only {row.load_bits})")
    if row.wide_stores and 128 not in row.store_bits:
        broken.append(f"no 128-bit global store (only {row.store_bits})")
    if row.shared_bytes > chip.shared_per_program:
        broken.append(f"{row.shared_bytes} bytes of shared memory, the chip has {chip.shared_per_program}")
    return broken


# ---------------------------------------------------------------- compiling


def compile_case(case: CompileCase, capability: int) -> Row:
    """Compiles one case as a launch on that architecture would, and reads the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    missing = set(names) ^ (set(case.signature) | set(case.constexprs))
    if missing:
        raise ValueError(f"{case.name}: signature and constexprs do not fit the kernel's arguments: {missing}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in case.multiples_of_16]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constexprs), attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "enable_fp_fusion": case.enable_fp_fusion,
        },
    )
    return _read(case, capability, compiled.asm["cubin"], compiled.metadata.shared)


def _read(case: CompileCase, capability: int, cubin: bytes, shared: int) -> Row:
    usage, sass = _disassemble(cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{case.name}: cuobjdump printed no resource usage: {usage!r}")
    registers, stack = int(found[1]), int(found[2])
    instructions, targets = parse_sass(sass)
    loop = largest_inner_loop(instructions, targets)
    cycles = bound_cycles(loop or instructions, case.num_warps, capability)
    programs, limit = occupancy(registers, shared, case.num_warps, capability)
    return Row(
        name=case.name,
        capability=capability,
        warps=case.num_warps,
        stages=case.num_stages,
        registers=registers,
        stack_bytes=stack,
        spill_instructions=sum(op.startswith(("LDL", "STL")) for op in instructions),
        shared_bytes=shared,
        programs_per_multiprocessor=programs,
        limited_by=limit,
        tensor_instructions=sum(is_tensor(op) for op in instructions),
        load_bits=access_bits(instructions, ("LDG", "LDGSTS")),
        store_bits=access_bits(instructions, ("STG",)),
        loop_instructions=len(loop) if loop else None,
        instructions=len(instructions),
        bound=max(cycles, key=lambda unit: cycles[unit]),
        bound_cycles=cycles,
        needs_dot=case.needs_dot,
        streaming=case.streaming,
        wide_stores=case.wide_stores,
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS) from the tools that Triton's wheel brings."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        commands = (
            [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)],
            [knobs.nvidia.nvdisasm.path, "-c", str(path)],
        )
        usage, sass = (
            subprocess.run(command, check=True, capture_output=True, text=True).stdout for command in commands
        )
    return usage, sass


# ---------------------------------------------------------------- reading SASS


def parse_sass(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """(opcodes with their suffixes, in order; backward branches as (first, last) instruction of the loop)."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in sass.split("\n"):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            opcodes.append(found[1])
            if found[1].startswith("BRA") and (target := re.search(r"\(?(\.L_\w+)\)?", found[2])):
                branches.append((len(opcodes) - 1, target[1]))
    loops = [(labels[label], place) for place, label in branches if labels.get(label, place + 1) < place]
    return opcodes, loops


def largest_inner_loop(opcodes: list[str], loops: list[tuple[int, int]]) -> list[str] | None:
    """Instructions of the longest loop that holds no other loop, or None."""
    inner = [
        (first, last)
        for first, last in loops
        if not any(first <= other[0] and other[1] <= last and other != (first, last) for other in loops)
    ]
    if not inner:
        return None
    first, last = max(inner, key=lambda loop: loop[1] - loop[0])
    return opcodes[first : last + 1]


def is_tensor(opcode: str) -> bool:
    return bool(re.match(r"(HMMA|HGMMA|IMMA|DMMA|QGMMA|UTC\w*MMA)", opcode))


def access_bits(opcodes: list[str], kinds: tuple[str, ...]) -> tuple[int, ...]:
    """The distinct widths in bits of the global accesses of these kinds, in ascending order."""
    widths = set()
    for opcode in opcodes:
        head, *suffixes = opcode.split(".")
        if head in kinds:
            named = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
            widths.add(next((named[s] for s in suffixes if s in named), 32))
    return tuple(sorted(widths))


def occupancy(registers: int, shared: int, warps: int, capability: int) -> tuple[int, str]:
    """(programs that fit on a multiprocessor, the resource that limits them)."""
    per_warp = -(-registers * 32 // 256) * 256  # allocated in units of 256
    fits = {
        "registers": REGISTERS // (per_warp * warps),
        "shared memory": CHIPS[capability].shared_total // (shared + RESERVED_SHARED),
        "warps": CHIPS[capability].warps // warps,
        "programs": CHIPS[capability].programs,
    }
    limit = min(fits, key=lambda resource: fits[resource])
    return fits[limit], limit


def bound_cycles(opcodes: list[str], warps: int, capability: int) -> dict[str, int]:
    """Cycles of each unit that one program needs for these instructions (tensor cores: where shapes are known)."""
    cycles = {
        "issue": len(opcodes) * warps // 4,
        "special functions": sum(op.startswith("MUFU") for op in opcodes) * warps * 2,
    }
    rate = CHIPS[capability].tensor_flops_per_cycle
    if rate is not None:
        cycles["tensor cores"] = sum(tensor_flops(op, warps) for op in opcodes) // rate
    return cycles


def tensor_flops(opcode: str, warps: int) -> int:
    """FLOPs of one instruction for all warps of a program: HMMA per warp, HGMMA per group of four."""
    if found := re.match(r"HMMA\.(\d+)(8|16)(8|16)\.", opcode + "."):
        m, n, k = int(found[1][:2]), 8, 16 if found[1] + found[2] + found[3] == "16816" else 8
        return 2 * m * n * k * warps
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        return 2 * int(found[1]) * int(found[2]) * int(found[3]) * (warps // 4)
    return 0


# ---------------------------------------------------------------- command line


def _row(module: str, capability: int, index: int) -> Row:
    cases = list(importlib.import_module(module).compile_cases(tiles_of(capability)))
    return compile_case(cases[index], capability)


def report(only: list[str], capabilities: tuple[int, ...] = CAPABILITIES, jobs: int = 1) -> list[Row]:
    """Rows of all cases whose names contain one of the texts `only`."""
    work = [
        (module, capability, index)
        for module in MODULES
        for capability in capabilities
        for index, case in enumerate(importlib.import_module(module).compile_cases(tiles_of(capability)))
        if any(text in case.name for text in only)
    ]
    if jobs == 1:
        return [_row(*item) for item in work]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(_row, *zip(*work), chunksize=4)) if work else []


def _widths(bits: tuple[int, ...]) -> str:
    return f"{bits[0]}-{bits[-1]}" if bits else "-"


def _line(row: Row) -> str:
    loop = f"{row.loop_instructions} in loop" if row.loop_instructions else f"{row.instructions} straight"
    return (
        f"{row.name:<78} sm_{row.capability:<3} {row.warps:>2}w {row.stages}s  {row.registers:>3} registers "
        f"{row.stack_bytes:>4} stack  {row.shared_bytes:>6} B shared  "
        f"{row.programs_per_multiprocessor:>2} programs ({row.limited_by})  {row.tensor_instructions:>3} tensor  "
        f"{_widths(row.load_bits):>7} / {_widths(row.store_bits):<7} bits  {loop:>14}, {row.bound}"
    )


def summary(rows: list[Row], facts: dict[str, Any]) -> str:
    """A Markdown table: for each kernel and architecture the range over its tiles, and every problem."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"`{facts['command']}` with {versions}; commit {facts['commit']}. Compiled, not run: no GPU.",
        "",
        "| kernel | sm | tiles | registers | shared memory, KB | programs per multiprocessor | tensor-core "
        "instructions | widest load / store, bits | spills |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.name.partition("[")[0], row.capability), []).append(row)
    for (name, capability), group in sorted(groups.items()):
        cells = [
            f"`{name}`", str(capability), str(len(group)), _range(row.registers for row in group),
            _range(row.shared_bytes // 1024 for row in group),
            _range(row.programs_per_multiprocessor for row in group),
            _range(row.tensor_instructions for row in group),
            f"{_range(max(row.load_bits, default=0) for row in group)} / "
            f"{_range(max(row.store_bits, default=0) for row in group)}",
            _range(row.spill_instructions for row in group),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    broken = [f"- {row.name} sm_{row.capability}: {problem}" for row in rows for problem in problems(row)]
    return "\n".join([*lines, "", f"{len(rows)} cases compiled, {len(broken)} problems.", *broken]) + "\n"


def _range(values: Iterable[int]) -> str:
    low, *_, high = sorted([*values] * 2)
    return str(low) if low == high else f"{low}–{high}"


def write(rows: list[Row], path: Path) -> None:
    """All rows as JSON, one line each, or the summary, by the suffix of `path`."""
    facts = {key: value for key, value in environment(torch.device("cpu")).items() if key in FACTS}
    if path.suffix == ".md":
        text = summary(rows, facts)
    else:
        each = ",\n".join(json.dumps(dataclasses.asdict(row) | {"problems": problems(row)}) for row in rows)
        text = f'{{"environment": {json.dumps(facts)},\n"rows": [\n{each}\n]}}\n'
    replace_text(path, text)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a kernel breaks a rule")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="only cases whose name contains one of these texts"
    )
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES, choices=CHIPS)
    parser.add_argument(
        "--out", type=Path, nargs="+", default=[], metavar="FILE", help="write .json and .md files"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    rows = report(options.only, tuple(options.capability), options.jobs)
    if not rows:
        parser.error(f"no case holds {options.only!r}")
    for path in options.out:
        write(rows, path)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) | {"problems": problems(row)} for row in rows], indent=1))
    else:
        print("\n".join(_line(row) for row in rows))
    broken = [f"{row.name} sm_{row.capability}: {problem}" for row in rows for problem in problems(row)]
    print("\n".join([*broken, f"{len(rows)} cases compiled, {len(broken)} problems"]), file=sys.stderr)
    return 1 if options.check and broken else 0


if __name__ == "__main__":
    sys.exit(main())
