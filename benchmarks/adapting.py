"""Continuing from a pair on other text: what the peak rate and the warm-up do to runs as short as users make them.

    python -m benchmarks.adapting --data DATA --steps 300 1000 --rates 1 0.25 --warmup 0.1 --out FILE.jsonl

DATA is a corpus prepared with the pair's tokenizer. Every combination is a run by the function behind
`electra pretrain`; FILE grows by a row for each, with held-out figures of the pair (`before`) and of the run
(`after`). Combinations that FILE has are left out, so the same command resumes.

A run with a higher rate has the better generator, whose draws are harder to tell. So every discriminator is judged
by the draws of the pair's generator, too (`same_draws`).
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import add_row, environment, read_rows
from electra_core.config import PRESETS
from electra_core.pretrain import pretrain
from electra_core.pretraining.start_pair import read_pair
from electra_core.runs.metrics_log import read_metrics

SETTINGS = ("data", "steps", "rate", "warmup_steps", "seed")
"""What tells one row from another."""
SAVE_LITTLE = {"eval_every": 1_000_000, "checkpoint_every": 1_000_000, "keep_checkpoints": 0}


def main(arguments: list[str] | None = None) -> None:
    """Run what FILE lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pair", nargs=2, default=["tiny", "tiny"], metavar=("DISCRIMINATOR", "GENERATOR"))
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 1000, 3000])
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.1],
                        help="peak rates as multiples of the preset's (also Muon's)")  # fmt: skip
    parser.add_argument("--warmup", type=float, nargs="+", default=[0.1],
                        help="steps of warm-up, or below 1 a fraction of the run's; 0: the preset's")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--keep", type=Path, help="folder that keeps the runs, for fine-tuning")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    found = read_rows(options.out)
    if not found:
        add_row(options.out, {"kind": "environment", "environment": environment(torch.device("cpu"))})
    done = {tuple(row[name] for name in SETTINGS) for row in found if row["kind"] == "adapting"}
    tried = itertools.product(options.steps, options.rates, options.warmup, options.seeds)
    for steps, rate, warmup, seed in tried:
        row = {"kind": "adapting", "data": options.data.name, "steps": steps, "rate": rate,
               "warmup_steps": _warmup_steps(warmup, steps, _preset(options.pair)), "seed": seed}  # fmt: skip
        if tuple(row[name] for name in SETTINGS) not in done:
            row |= adapted(options.data, options.pair, row, options.keep)
            add_row(options.out, row)
            print(*(f"{name} {row[name]}" for name in SETTINGS), row["before"], row["after"])


def adapted(data: Path, pair: list[str], row: dict[str, Any], keep: Path | None) -> dict[str, Any]:
    """Runs one combination: its changes of the preset, its seconds, and both evaluations."""
    preset = PRESETS[_preset(pair)].pretrain
    changes: dict[str, Any] = {
        "steps": row["steps"], "warmup_steps": row["warmup_steps"], "seed": row["seed"],
        "learning_rate": preset.learning_rate * row["rate"],
        "muon_learning_rate": preset.muon_learning_rate * row["rate"],
    }  # fmt: skip
    wall, processor = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        name, *numbers = (row[setting] for setting in SETTINGS)
        run = (keep or Path(scratch)) / "-".join([name, *(f"{number:g}" for number in numbers)])
        result = pretrain(data, run, changes=changes | SAVE_LITTLE, quiet=True,
                          init_discriminator=pair[0], init_generator=pair[1])  # fmt: skip
        if result.stopped_by:
            raise SystemExit(f"{run}: stopped by {result.stopped_by}")
        seconds = {
            "seconds": round(time.process_time() - processor, 1), "wall_seconds": round(time.monotonic() - wall, 1)
        }  # fmt: skip
        before, *_, after = _evaluations(run)
        judged, halves = Path(scratch) / "judged", (run / "discriminator", pair[1])
        pretrain(data, judged, changes={"steps": 1, "tying": "none"} | SAVE_LITTLE, quiet=True,
                 init_discriminator=halves[0], init_generator=halves[1])  # fmt: skip
        same_draws = _evaluations(judged)[0]
    return {"changes": changes, "tokens": after["tokens"], **seconds, "before": _figures(before),
            "after": _figures(after), "same_draws": _figures(same_draws)}  # fmt: skip


def _evaluations(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if "eval_mlm_loss" in row]


def _preset(pair: list[str]) -> str:
    sizes = read_pair(*pair)
    if sizes is None:
        raise SystemExit(f"--pair: no models at {' and '.join(pair)}")
    return sizes.preset


def _warmup_steps(warmup: float, steps: int, preset: str) -> int:
    if warmup == 0:
        return PRESETS[preset].pretrain.warmup_steps
    return int(warmup) if warmup >= 1 else max(1, round(warmup * steps))


def _figures(logged: dict[str, Any]) -> dict[str, float]:
    names = ("mlm_loss", "rtd_loss", "base_rate_loss", "rtd_auc")
    return {name: round(logged[f"eval_{name}"], 4) for name in names}


if __name__ == "__main__":
    main()
