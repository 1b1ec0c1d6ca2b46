"""RUN/metrics.jsonl, the log of a run: one JSON object a line, each with its "step"; null means not finite.

Training writes a row every `log_every` steps, and one per evaluation ("eval_..." or "dev_..."). The same figures
go to TensorBoard if it is installed, and to Weights & Biases on request.
"""

from __future__ import annotations

import json
import math
import secrets
from collections import deque
from pathlib import Path
from typing import Any

from electra_core.errors import UserError, option
from electra_core.files.new_file import write_new

Row = dict[str, Any]
ROWS_KEPT = 20  # newest losses, for `guards.spike`
LARGEST = 1e100
"""A larger number is no figure: with those below, a sum, a difference and a product of three fit a float."""


class MetricsLog:
    """The log of a run that is being trained.

    Args:
        folder: the run's folder.
        first_step: rows after this step belong to a part that will be repeated, and are dropped.
        wandb: a Weights & Biases project to log to as well; None: none.

    Raises:
        UserError: `wandb` is given, but the package is not installed.
    """

    def __init__(self, folder: Path, first_step: int = 0, wandb: str | None = None):
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= first_step] if first_step else []
        self.last_evaluation = last_evaluation(kept)
        self.recent_losses: deque[float] = deque((row["loss"] for row in kept if "loss" in row), maxlen=ROWS_KEPT)
        write_new(self.path, "".join(json.dumps(without_nan(row)) + "\n" for row in kept))
        self.tensorboard = _tensorboard_writer(folder / "tensorboard", first_step)
        self.wandb = _wandb_run(folder, wandb, first_step) if wandb else None

    def write(self, step: int, **figures: Any) -> None:
        """Appends a row; when this returns, the operating system has it, whatever happens to the process next."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **without_nan(figures)}, allow_nan=False) + "\n")
        if "loss" in figures:
            self.recent_losses.append(figures["loss"])
        numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        if self.tensorboard is not None:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def close(self, failed: bool = False) -> None:
        """Closes TensorBoard's and Weights & Biases' logs.

        Args:
            failed: whether the run ended with an error, for Weights & Biases.
        """
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=1 if failed else 0)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


def read_metrics(path: Path) -> list[Row]:
    """Rows of a metrics.jsonl (`clean_row`); lines cut off by a crash, or otherwise not rows, are skipped."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                rows.append(clean_row(json.loads(line)))
            except (ValueError, RecursionError):
                continue
    return rows


def clean_row(row: Any) -> Row:
    """A row as training writes it, from a file that may be damaged or foreign: figures and warnings.

    A figure is NaN for null and for a number that is not finite or too large. Other values are left out.

    Raises:
        ValueError: it is not a row: not an object, or without a whole number of steps.
    """
    if not isinstance(row, dict) or not isinstance(row.get("step"), int) or not is_figure(row["step"]):
        raise ValueError('expected an object with a "step"')
    clean: Row = {}
    for name, value in row.items():
        if name == "warnings":
            if isinstance(value, list) and all(isinstance(text, str) for text in value):
                clean[name] = value
        elif value is None or isinstance(value, int | float):
            clean[name] = value if is_figure(value) else math.nan
    return clean


def is_figure(value: object) -> bool:
    """Whether a value from a file is a number with which one can calculate."""
    return isinstance(value, int | float) and abs(value) <= LARGEST


def without_nan(figures: Row) -> Row:
    """The figures with None for numbers that are not finite, which JSON cannot hold."""
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in figures.items()}


def last_evaluation(rows: list[Row]) -> dict[str, float]:
    """The figures of the newest evaluation; empty if there is none."""
    for row in reversed(rows):
        if figures := {name: value for name, value in row.items() if name.startswith(("eval_", "dev_"))}:
            return figures
    return {}


def evaluation_at(rows: list[Row], step: int) -> dict[str, float]:
    """The figures of the evaluation after `step` steps; empty if there was none."""
    return last_evaluation([row for row in rows if row.get("step") == step])


def _tensorboard_writer(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # Purging begins at the given step; the row of `first_step` itself is not written again.
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)


def _wandb_run(folder: Path, project: str, first_step: int) -> Any:
    """The Weights & Biases run; a resumed training continues the same one, identified by its id."""
    try:
        import wandb
    except ImportError:
        raise UserError(f"{option('wandb')}: the package wandb is not installed (pip install wandb)") from None
    file = folder / ".wandb-id"
    if not (first_step and file.is_file()):
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    name, known = folder.resolve().name, file.read_text(encoding="utf-8")
    return wandb.init(project=project, name=name, id=known, dir=str(folder), resume="allow")
