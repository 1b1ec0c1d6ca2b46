"""Pre-training throughput over batch and length: ELECTRA and BERT's masked LM, ours and `transformers`.

    python -m benchmarks.sweep --out FILE.jsonl [--model small] [--shapes 16x128 64x128 4x512]
        [--objectives electra mlm] [--programs ...] [--compiled 1] [--precision auto] [--threads 2] [--rounds 3]
        [--minutes M]

For each objective and each shape (sequences x tokens) it measures tokens per second of whole optimizer steps,
model FLOPs utilisation (MFU) and peak memory. Every program has its own process, which holds its model. On a CPU
all programs of a shape take turns, as in `harness.interleave`; on a GPU, whose memory they could not share, they
run one after the other. "ours" is the engine of `electra pretrain`: on a GPU it replays CUDA graphs, and "ours,
eager" does not. "transformers, masked states" is `pretrain_peers.HubElectra` in its fastest form, which projects
only the hidden states of masked positions on the vocabulary: with eager attention, with SDPA, and with SDPA and
compiled. (Results older than 30 November 2026 have "transformers", with logits at all positions, of which the
masked ones were kept.) Sizes, batches, dropout and precision are the same for all.

Before it is timed, every program must give the losses of our eager program, without dropout, for the same weights,
masks and draws; a compiled one does so with two layers. A program that cannot run gets a row that says why.

MFU is the FLOPs that the mathematics needs (`flops.training_step_flops`: matrix products, predictions at masked
positions only) divided by the peak: on a GPU that of the data sheet, on a CPU the rate of a product of 2048 x 2048
matrices in the same precision on the same threads. Memory is the growth of the process since before the model was
built; on a GPU the most that PyTorch has allocated.

The last row splits a step into stages, by `bench_step`. Every row is written as soon as it is measured, and the
same command continues after the last one. Failures are measured again, unless the compiler refuses the program or
it does not fit in memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_step
from benchmarks.harness import TIME_UP, OwnProcess, add_row, environment, read_rows, spread, use_device, write_rows
from benchmarks.kernel_report import refused
from benchmarks.sweep_programs import COMPILED, OURS_EAGER, PROGRAMS, Case, worker
from electra_core.config import PRESETS
from electra_core.execution.placement import resolve_device, resolve_precision
from electra_core.flops import training_step_flops
from electra_core.pretraining.meter import peak_flops

Row = dict[str, Any]


def measure(cases: list[Case], rounds: int, peak: float | None) -> Iterator[Row]:
    """Measures the cases in turns; yields a row for each."""
    started = []
    for case in cases:
        process = OwnProcess(worker, case, rounds)
        started.append((case, process, _answer(process)))  # one at a time, so that each warms up undisturbed
    seconds: dict[str, list[Any]] = {case.name: [] for case in cases}
    for turn in range(rounds):
        for place in range(len(started)):
            case, process, _ = started[(turn + place) % len(started)]
            seconds[case.name].append(_answer(process))
    for case, process, ready in started:
        memory = _answer(process)
        process.close()
        yield _row(case, seconds[case.name], memory, ready, peak)


def _answer(process: OwnProcess) -> Any:
    try:
        return process.ask()
    except EOFError:
        return {"note": "the process ended (out of memory?)"}


def _row(case: Case, seconds: list[Any], memory: Any, ready: Row, peak: float | None) -> Row:
    about = {"piece": case.name, "kind": "throughput", **asdict(case), **ready}
    notes = [answer["note"] for answer in [*seconds, memory] if isinstance(answer, dict)]
    if notes or "note" in ready:
        return {**about, "note": ready.get("note") or notes[0]}
    encoder, pretrain = case.configs
    tokens = case.batch * case.length * case.steps
    walls, processor = ([tokens / row[clock] for row in seconds] for clock in (0, 1))
    rate = training_step_flops(encoder, pretrain) / (case.batch * case.length)
    return {
        **about, "tokens_per_second": asdict(spread(walls)), "by_processor_time": asdict(spread(processor)),
        "rounds": seconds, "mfu": None if peak is None else spread(walls).median * rate / peak,
        "peak_mib": round(memory),
    }  # fmt: skip


def cpu_peak(precision: str, threads: int) -> float:
    """FLOP/s of a product of 2048 x 2048 matrices: the best of five."""
    torch.set_num_threads(threads)
    kind = resolve_precision(precision, torch.device("cpu"))
    a, b = (torch.randn(2048, 2048).to(kind) for _ in range(2))
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(times[1:])


# ---- the command -------------------------------------------------------------------------------------------


def groups(options: argparse.Namespace, device: torch.device) -> Iterator[list[Case]]:
    """Groups of cases that take turns."""
    for index, shape in enumerate(options.shapes):
        batch, length = map(int, shape.split("x"))
        for objective in options.objectives:
            cases = [
                Case(options.model, objective, batch, length, program, options.precision, str(device),
                     options.threads, options.steps)
                for program in options.programs
                if (program not in COMPILED or index < options.compiled)
                and (program != OURS_EAGER or device.type == "cuda")
            ]  # fmt: skip
            if device.type == "cuda":
                yield from ([case] for case in cases)
            else:
                yield cases


def split_row(options: argparse.Namespace, shape: str) -> Row:
    """The row that splits our step into stages."""
    batch, length = map(int, shape.split("x"))
    settings = argparse.Namespace(
        model=options.model, batch=batch, length=length, precision=options.precision, steps=options.steps + 2,
        device=options.device, trace=None, no_timing=False,
    )  # fmt: skip
    return {"kind": "split", "model": options.model, "shape": shape, **bench_step.report(settings)}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="file of JSON lines, one row per program and shape"
    )
    parser.add_argument("--model", default="small", choices=sorted(PRESETS))
    parser.add_argument("--shapes", nargs="+", default=["16x128", "4x512", "64x128"], metavar="BATCHxLENGTH")
    parser.add_argument("--objectives", nargs="+", default=["electra", "mlm"], choices=["electra", "mlm"])
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS, metavar="PROGRAM")
    parser.add_argument("--compiled", type=int, default=1, help="number of shapes at which programs are compiled")
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "bf16", "fp32"], help="precision of all programs"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps per round")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing after this time")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure the cases that have no row yet; exit status `TIME_UP` if some remain."""
    options = arguments().parse_args(argv)
    device, deadline = resolve_device(options.device), time.monotonic() + 60 * options.minutes
    use_device(device)
    rows = read_rows(options.out)
    done = {row.get("piece") for row in rows if is_final(row)}
    splits = [shape for shape in options.shapes[:1] if f"split-{options.model}-{shape}" not in done]
    todo = [
        left for cases in groups(options, device) if (left := [case for case in cases if case.name not in done])
    ]
    if not todo and not splits:
        print("everything is already measured")
        return
    peak = peak_flops(device) if device.type == "cuda" else cpu_peak(options.precision, options.threads)
    about = _about(device, options)
    for row in rows:
        if "environment" in row and row["environment"].get("device") != about["environment"]["device"]:
            raise SystemExit(f"{options.out}: has rows from another machine; use another file")
    again = {case.name for cases in todo for case in cases}
    if any(row.get("piece") in again for row in rows):
        write_rows(options.out, [row for row in rows if row.get("piece") not in again])
    add_row(options.out, {"piece": "environment", "kind": "environment", "peak_flops": peak, **about})
    for cases in todo:
        if time.monotonic() > deadline:
            print("the time is up; to continue, repeat the command", file=sys.stderr)
            sys.exit(TIME_UP)
        for row in measure(cases, options.rounds, peak):
            add_row(options.out, row)
            print(f"{row['piece']}: {row.get('note') or _said(row)}", flush=True)
    for shape in splits:
        add_row(options.out, {"piece": f"split-{options.model}-{shape}", **split_row(options, shape)})


def is_final(row: Row) -> bool:
    """Whether measuring the row again would gain nothing."""
    note = row.get("note", "")
    return not note or refused(note) or note.startswith("OutOfMemoryError")


def _about(device: torch.device, options: argparse.Namespace) -> Row:
    torch.set_num_threads(options.threads)
    return {"environment": environment(device)}


def _said(row: Row) -> str:
    rates = row["tokens_per_second"]
    share = "" if row["mfu"] is None else f", {row['mfu']:.1%} of the peak"
    spread_of = f"{rates['low']:,.0f} to {rates['high']:,.0f}"
    return f"{rates['median']:,.0f} tokens/s ({spread_of}){share}, {row['peak_mib']:,} MiB"


if __name__ == "__main__":
    main()
