"""What pre-training gave the shipped `tiny`: fine-tuned from its weights and from a random start, several seeds.

    python -m benchmarks.tiny_tasks [--tasks cola mrpc sst-2] [--seeds 3] [--train-examples N] --out FILE.json

Needs the GLUE folders under $ELECTRA_DATA/glue (default ../shared/data). Prints the model card's table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from electra_core.finetune import finetune
from electra_core.finetune_settings import FinetuneSettings
from electra_core.named_tasks import choose_task, find_task

ROOT = Path(__file__).parent.parent
FOLDERS = {"cola": "CoLA", "mrpc": "MRPC", "sst-2": "SST-2", "rte": "RTE", "sts-b": "STS-B"}
METRICS = {"cola": "mcc", "mrpc": "accuracy", "sst-2": "accuracy", "rte": "accuracy", "sts-b": "spearman"}


def main() -> None:
    """Fine-tune, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "electra_core" / "tiny" / "discriminator")
    parser.add_argument("--tasks", nargs="+", default=["cola", "mrpc", "sst-2"], choices=tuple(FOLDERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-examples", type=int, default=0, help="take only the first N rows; 0: all")
    parser.add_argument("--epochs", type=float, default=0.0, help="0: the task's own")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    data = Path(os.environ.get("ELECTRA_DATA", ROOT.parent / "shared" / "data")) / "glue"
    if not data.is_dir():
        sys.exit(f"{data}: no GLUE folders here; set ELECTRA_DATA")
    rows = [measure(options, data, task, random) for task in options.tasks for random in (False, True)]
    record = {
        "command": "python -m benchmarks.tiny_tasks " + " ".join(sys.argv[1:]),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(markdown(rows))


def measure(options: argparse.Namespace, data: Path, name: str, random: bool) -> dict[str, Any]:
    """The dev figures of every seed, from the pre-trained weights or from a random start."""
    task, recommended = choose_task(name)
    named = find_task(name)
    assert named is not None
    folder = data / FOLDERS[name]
    settings = {**recommended, "seeds": options.seeds, "random_start": random}
    if options.epochs:
        settings["epochs"] = options.epochs
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        train = _first_rows(named.find(folder, "train"), options.train_examples, Path(scratch))
        report = finetune(
            options.model, task, train, named.find(folder, "dev"), Path(scratch) / "model",
            FinetuneSettings(**settings), quiet=True, say=lambda line: print(line, file=sys.stderr),
        )  # fmt: skip
    figures = [run["metrics"][METRICS[name]] for run in report["seeds"]]
    seconds = time.monotonic() - started
    start = "random" if random else "pre-trained"
    return {"task": name, "metric": METRICS[name], "start": start, "seeds": figures, "seconds": seconds}


def _first_rows(train: Path, count: int, scratch: Path) -> Path:
    if not count:
        return train
    with train.open(encoding="utf-8") as source:
        kept = [line for _, line in zip(range(count + 1), source)]
    (scratch / train.name).write_text("".join(kept), encoding="utf-8")
    return scratch / train.name


def markdown(rows: list[dict[str, Any]]) -> str:
    """Task, start, median and every seed's dev figure."""
    lines = ["| task (dev) | start | median | every seed |", "|---|---|---|---|"]
    for row in rows:
        ordered = sorted(row["seeds"])
        median = ordered[len(ordered) // 2] if len(ordered) % 2 else sum(ordered[len(ordered) // 2 - 1 :][:2]) / 2
        each = ", ".join(f"{100 * value:.1f}" for value in row["seeds"])
        lines.append(f"| {row['task']} ({row['metric']}) | {row['start']} | **{100 * median:.1f}** | {each} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
