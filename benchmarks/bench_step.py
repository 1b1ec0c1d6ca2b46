"""Where a pre-training step spends its time, what it launches and what it saves, stage by stage.

    python -m benchmarks.bench_step [--model small] [--batch 16] [--length 128] [--precision fp32|bf16]
        [--steps 5] [--device auto] [--json FILE] [--trace FILE] [--no-timing]

**Counts** do not depend on the machine. Launches, bytes saved for the backward pass and bytes moved (every operand
of every operation once) come from a trace on fake tensors with a GPU's kernels
(`electra_core/execution/fake_step.py`), for the same batch in bf16, and can be computed anywhere.
**Times** are those of the steps on this machine, medians over steps. Stages of the forward pass are timed by hooks
on modules. On a GPU these are times of the device: a kernel that only waits keeps it busy while the host launches
the step, so that the host, several times as slow, is not what is measured. "masks" is the host's preparation of
masks (`masking.py`) for a batch that is already read; earlier results call it "draw".
**Floors** are the least times on one H200 (790 TFLOP/s in bf16 and 4.3 TB/s, as others measured them) for the
stage's matrix products (`flops.py`) and for the bytes moved; they say nothing about the machine of the times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_pretrain import batches_like_text
from benchmarks.harness import environment, replace_text, use_device
from electra_core.config import PRESETS, EncoderConfig, PretrainConfig, generator_config
from electra_core.execution.fake_step import BACKWARD, OPTIMIZER, OTHER, StepTrace, stages, trace_step
from electra_core.execution.placement import (
    autocast_context,
    keep_freed_memory,
    resolve_device,
    resolve_precision,
)
from electra_core.flops import forward_flops, mlm_head_flops, rtd_head_flops
from electra_core.objectives import build_objective
from electra_core.optim import build_optimizer
from electra_core.training import Loop, take_step

PEAK, BANDWIDTH = 790e12, 4.3e12
MASKS = "masks"


AHEAD_CYCLES = int(0.25 * 2e9)
"""For so long a GPU waits (0.25 s at 2 GHz) while the host launches a step: several times an estimated 50 us for
each of Small's 764 launches."""


class StageClock:
    """A clock that charges elapsed time to the current stage: a CPU's time, or a GPU's between events."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._stages, self._marks = [OTHER], [self._now()]

    @property
    def stage(self) -> str:
        """The current stage."""
        return self._stages[-1]

    @stage.setter
    def stage(self, stage: str) -> None:
        self._stages.append(stage)
        self._marks.append(self._now())

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """Stage -> seconds, without the current one; waits for a GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for stage, (begin, end) in zip(self._stages, itertools.pairwise(self._marks), strict=False):
            passed = begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
            found[stage] = found.get(stage, 0.0) + passed
        return found


def stage_seconds(
    encoder: EncoderConfig, config: PretrainConfig, batch: int, length: int, device: torch.device,
    precision: str, steps: int,
) -> dict[str, float]:  # fmt: skip
    """Stage -> median seconds per step, without the first step."""
    model = build_objective(encoder, config).to(device).train()
    optimizer = build_optimizer(model, config)
    autocast = autocast_context(device, resolve_precision(precision, device))
    rows = []
    for step in range(steps + 1):
        began = time.perf_counter()
        part = batches_like_text(encoder.vocab_size, batch, length, config, 1)[0]
        masks = time.perf_counter() - began
        part = part.to(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(AHEAD_CYCLES)
        clock = StageClock(device)

        def loss_function(part: Any, seed: Any, clock: StageClock = clock) -> Any:
            with stages(model, clock):
                loss = model(part, seed).loss
            clock.stage = BACKWARD
            return loss, {}

        def enter_optimizer(*_: Any, clock: StageClock = clock) -> None:
            clock.stage = OPTIMIZER

        handle = optimizer.register_step_pre_hook(enter_optimizer)
        loop = Loop(
            model, optimizer, loss_function, schedule=lambda _: 1e-4, steps=steps + 1, seed=0,
            clip_norm=config.clip_norm, autocast=autocast,
        )  # fmt: skip
        take_step(loop, [part], seed=step, rate=1e-4)
        clock.stage = "end"
        handle.remove()
        rows.append({MASKS: masks} | clock.seconds())
    return {stage: statistics.median(row[stage] for row in rows[1:]) for stage in rows[1]}


def floors(encoder: EncoderConfig, config: PretrainConfig, trace: StepTrace, length: int) -> dict[str, float]:
    """Stage -> least seconds on an H200: by matrix products; for the optimizer by bytes, 7 numbers per weight."""
    tokens = trace.tokens
    masked = tokens // length * config.max_predictions
    generator = generator_config(encoder, config)
    forward = {
        "generator layers": forward_flops(generator, tokens, tokens * length),
        "word head": mlm_head_flops(generator, masked),
        "discriminator layers": forward_flops(encoder, tokens, tokens * length),
        "detection head": rtd_head_flops(encoder, tokens),
    }
    seconds = {stage: flops / PEAK for stage, flops in forward.items()}
    return seconds | {BACKWARD: 2 * sum(seconds.values()), OPTIMIZER: 7 * trace.weights / BANDWIDTH}


def report(options: argparse.Namespace) -> dict[str, Any]:
    """The whole report as JSON values."""
    preset, device = PRESETS[options.model], resolve_device(options.device)
    use_device(device)
    if device.type == "cpu":
        keep_freed_memory()  # as `electra pretrain` does
    encoder, config = preset.discriminator, preset.pretrain
    trace = trace_step(encoder, config, options.batch, options.length)
    least = floors(encoder, config, trace, options.length)
    seconds: dict[str, float] = {}
    if not options.no_timing:
        profiler = torch.profiler.profile() if options.trace else nullcontext()
        with profiler:
            seconds = stage_seconds(
                encoder, config, options.batch, options.length, device, options.precision, options.steps
            )
        if options.trace:
            profiler.export_chrome_trace(options.trace)  # type: ignore[union-attr]
    names = list(dict.fromkeys([*seconds, *trace.launches, *trace.kept]))
    rows = {
        name: {
            "milliseconds": round(1e3 * seconds[name], 2) if name in seconds else None,
            "launches": sum(trace.launches.get(name, {}).values()),
            "kept_bytes_per_token": round(trace.kept.get(name, 0) / trace.tokens),
            "moved_megabytes": round(sum(trace.traffic.get(name, {}).values()) / 1e6, 1),
            "moved_milliseconds_h200": round(1e3 * sum(trace.traffic.get(name, {}).values()) / BANDWIDTH, 3),
            "floor_milliseconds_h200": round(1e3 * least[name], 4) if name in least else None,
        }
        for name in names
    }
    return {
        "environment": environment(device),
        "stages": rows,
        "launches": trace.total_launches,
        "kept_bytes_per_token": round(trace.activations / trace.tokens),
        "moved_bytes": trace.total_traffic,
        "predicted_peak_bytes": trace.peak,
    }


def show(result: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [
        "{device}, {threads} thread(s)".format(**result["environment"]),
        f"{'':24} {'':9} {'':9} {'':13} {'':9} {'least ms on an H200, of':>24}",
        "{:24} {:>9} {:>9} {:>13} {:>9} {:>11} {:>12}".format(
            "stage", "ms", "launches", "kept B/token", "MB moved", "these", "products"
        ),
    ]
    for name, row in result["stages"].items():
        values = ["-" if value is None else f"{value:,}" for value in row.values()]
        lines.append("{:24} {:>9} {:>9} {:>13} {:>9} {:>11} {:>12}".format(name, *values))
    total = sum(row["milliseconds"] or 0 for row in result["stages"].values())
    moved, kept = result["moved_bytes"], result["kept_bytes_per_token"]
    lines.append(
        f"{'all':24} {total:>9,.0f} {result['launches']:>9,} {kept:>13,} {moved / 1e6:>9,.0f} "
        f"{1e3 * moved / BANDWIDTH:>11,.2f}"
    )
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="small", choices=sorted(PRESETS))
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--trace", metavar="FILE", help="write a profiler's trace for chrome://tracing")
    parser.add_argument("--no-timing", action="store_true", help="only count, do not time")
    options = parser.parse_args()
    result = report(options)
    print(show(result))
    if options.json:
        replace_text(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
