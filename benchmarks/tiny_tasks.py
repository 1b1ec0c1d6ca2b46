"""What pre-training gained for the shipped `tiny`: fine-tuning from its and from random weights, several seeds.

    python -m benchmarks.tiny_tasks [--tasks cola sts-b squad] [--seeds 3] [--train-examples N] --out FILE.json

Needs the data sets under $ELECTRA_DATA (default ../shared/data); `--tasks docstrings` needs none. Prints the table
of scores; FILE grows with every fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment, replace_text
from electra_core.demo import texts_only
from electra_core.downstream.named_tasks import choose_task, find_task
from electra_core.finetune import finetune
from electra_core.finetuning.settings import FinetuneSettings

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class DataSet:
    """A task's files, settings and metrics."""

    folder: str
    """Folder below $ELECTRA_DATA; empty: the demo's task, made from the docstrings on this machine."""
    metrics: tuple[str, ...]
    train: tuple[str, ...] = ()
    """SQuAD files whose articles make the training file; empty: the folder's own training file."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the recipe's, for a model this small and to save time."""
    whole: float = 1.0
    """The metrics' maximum; SQuAD's are percentages."""


DATA_SETS = {
    "cola": DataSet("glue/CoLA", ("mcc",)),
    "mrpc": DataSet("glue/MRPC", ("accuracy",)),
    "rte": DataSet("glue/RTE", ("accuracy",)),
    "sts-b": DataSet("glue/STS-B", ("pearson", "spearman"), settings={"epochs": 5.0}),
    "sst-2": DataSet("glue/SST-2", ("accuracy",)),
    "conll-2003": DataSet("conll2003", ("f1",), settings={"layerwise_decay": 1.0}),
    "squad": DataSet(
        "squad", ("exact_match", "f1"),
        (
            "squad_train_subset/train-v1.1.subset.json",
            "squadshifts/new_wiki_v1.0.json", "squadshifts/amazon_reviews_v1.0.json",
        ),
        {"max_length": 384, "skip_bad_rows": True}, 100.0,
    ),
    "imdb": DataSet("imdb", ("accuracy",), settings={"epochs": 1.0}),
    "docstrings": DataSet("", ("accuracy",), settings={"epochs": 10.0, "layerwise_decay": 1.0}),
}  # fmt: skip


def main() -> None:
    """Fine-tune, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "electra_core" / "tiny" / "discriminator")
    parser.add_argument("--tasks", nargs="+", default=list(DATA_SETS), choices=tuple(DATA_SETS))
    parser.add_argument(
        "--starts", nargs="+", default=["pre-trained", "random"], choices=("pre-trained", "random")
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--train-examples", type=int, default=0, help="use the first N lines of each GLUE task; 0: all"
    )
    parser.add_argument("--epochs", type=float, default=0.0, help="epochs; 0: the task's default")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    data = Path(os.environ.get("ELECTRA_DATA", ROOT.parent / "shared" / "data"))
    if not data.is_dir() and any(DATA_SETS[task].folder for task in options.tasks):
        sys.exit(f"{data}: no data sets here; set ELECTRA_DATA")
    rows: list[dict[str, Any]] = []
    record = {"environment": environment(torch.device("cpu")), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for task in options.tasks:
        for start in options.starts:
            rows += measure(options, data, task, start)
            replace_text(options.out, json.dumps(record, indent=1) + "\n")
    print(markdown(rows))


def measure(options: argparse.Namespace, data: Path, name: str, start: str) -> list[dict[str, Any]]:
    """The dev scores of every seed, from the pre-trained weights or from random ones: a row per metric."""
    data_set = DATA_SETS[name]
    task, recommended = choose_task(name if data_set.folder else "classify")
    settings = {**recommended, **data_set.settings, "seeds": options.seeds, "random_start": start == "random"}
    if options.epochs:
        settings["epochs"] = options.epochs
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        train, dev = _files(name, data, Path(scratch))
        if data_set.folder.startswith("glue"):
            train = _first_rows(train, options.train_examples, Path(scratch))
        report = finetune(
            options.model, task, train, dev, Path(scratch) / "model",
            FinetuneSettings(**settings), quiet=True, say=lambda line: print(line, file=sys.stderr),
        )  # fmt: skip
    if report["stopped_by"]:
        raise SystemExit(f"stopped by {report['stopped_by']}; what this fine-tuning reached is left out")
    seconds = time.monotonic() - started
    return [
        {
            "task": name, "metric": metric, "start": start, "seconds": seconds,
            "seeds": [run["metrics"][metric] / data_set.whole for run in report["seeds"]],
        }
        for metric in data_set.metrics
    ]  # fmt: skip


def _files(name: str, data: Path, scratch: Path) -> tuple[Path, Path]:
    """The training file and the dev file; those that have to be made are made in `scratch`."""
    data_set = DATA_SETS[name]
    if not data_set.folder:
        texts_only(scratch / "docstrings", quiet=True)
        return scratch / "docstrings" / "task" / "train.jsonl", scratch / "docstrings" / "task" / "dev.jsonl"
    folder, named = data / data_set.folder, find_task(name)
    assert named is not None
    if not data_set.train:
        return named.find(folder, "train"), named.find(folder, "dev")
    articles = [article for part in data_set.train for article in json.loads((data / part).read_bytes())["data"]]
    (scratch / "train.json").write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")
    return scratch / "train.json", named.find(folder, "dev")


def _first_rows(train: Path, count: int, scratch: Path) -> Path:
    if not count:
        return train
    with train.open(encoding="utf-8") as source:
        kept = [line for _, line in zip(range(count + 1), source)]
    (scratch / train.name).write_text("".join(kept), encoding="utf-8")
    return scratch / train.name


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of task, start, median and every seed's dev score."""
    lines = ["| task (dev) | start | median | every seed |", "|---|---|---|---|"]
    for row in rows:
        each = ", ".join(f"{100 * value:.1f}" for value in row["seeds"])
        median = f"{100 * statistics.median(row['seeds']):.1f}"
        lines.append(f"| {row['task']} ({row['metric']}) | {row['start']} | **{median}** | {each} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
