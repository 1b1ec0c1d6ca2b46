"""The state of runs: what `electra status` shows, read from their files and nothing else.

A run is a folder with a metrics.jsonl (pre-training's RUN, fine-tuning's OUT; with several seeds, its seed-N
folders). Its lock and state.json (`state.py`) tell whether it is running, never a file's age. Whether a run is
healthy is judged by the warnings in its log and by a reference curve: the rows of a run that went well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from electra_core.config import GENERATOR_SIZES, PRESETS, SIZES
from electra_core.errors import UserError
from electra_core.files.json_files import read_json
from electra_core.files.toml_files import read_table
from electra_core.runs.checkpoint_files import best_checkpoint, checkpoint_folders
from electra_core.runs.metrics_log import Row, clean_row, is_figure, last_evaluation, read_metrics, without_nan
from electra_core.runs.state import FINISHED, RUNNING, read_state

SHIPPED_CURVE = Path(__file__).parents[1] / "tiny" / "curve.jsonl"
REFERENCE_CURVES = Path(__file__).parents[2] / "docs" / "reference_curves"  # of a checkout
# Figures compared with the reference, which way is better, and how much worse is "behind".
JUDGED = {"eval_mlm_loss": (-1, 0.35), "eval_rtd_auc": (1, 0.05)}


@dataclass(frozen=True)
class Status:
    """The status of one run, from its files."""

    name: str
    path: Path
    state: str
    """running | stopped | finished | failed | killed | unknown (no state.json)."""
    reason: str = ""
    """What stopped the run, or the first line of its error."""
    step: int = 0
    steps: int | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    """Remaining time of a running run, at the speed of its last row."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """Figures of the newest evaluation."""
    evaluated_at: int | None = None
    warnings: list[str] = field(default_factory=list)
    """Warnings in the newest evaluation and the rows since."""
    last_checkpoint: int | None = None
    best_checkpoint: int | None = None
    metric: str = ""
    """The figure that chooses the best model of a fine-tuning; empty before its first evaluation."""
    rows: list[Row] = field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the rows, as JSON values."""
        facts = asdict(self)
        del facts["rows"]
        return without_nan(facts) | {"path": str(self.path), "evaluation": without_nan(self.evaluation)}

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a figure of the log."""
        pairs = [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), int | float)]
        return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def find_runs(paths: Sequence[str | Path]) -> list[Status]:
    """The runs at `paths`, each once.

    Raises:
        UserError: one of them is not a run.
    """
    runs = []
    for path in map(Path, paths):
        seeds = _seeds(path)
        if (path / "metrics.jsonl").is_file():
            runs.append(read_run(path))
        elif seeds:
            runs += [read_run(path / f"seed-{seed}") for seed in seeds]
        elif path.is_dir() and read_state(path).get("state") == RUNNING:
            runs.append(Status(path.name, path, RUNNING))
        else:
            raise UserError(f"{path}: not a run's folder (no metrics.jsonl)")
    return _told_apart(runs)


def _seeds(path: Path) -> list[int]:
    """The seeds of a fine-tuning that have their own logs."""
    names = [file.parent.name.removeprefix("seed-") for file in path.glob("seed-*/metrics.jsonl")]
    return sorted(int(name) for name in names if name.isdecimal())


def _state(path: Path) -> dict[str, Any]:
    """A run's state; for one of several seeds, derived from the parent folder, which has one state for all."""
    path = path.resolve()
    name, state = path.name.removeprefix("seed-"), read_state(path)
    if state or name == path.name or not name.isdecimal():
        return state
    around = read_state(path.parent)
    if around and int(name) < _seeds(path.parent)[-1]:
        return {"state": FINISHED}
    return {key: around[key] for key in ("state", "reason") if key in around}  # its step counts those of all seeds


def _told_apart(runs: Sequence[Status]) -> list[Status]:
    """Each run once, named by as many trailing parts of its path as make all names different."""
    found: dict[Path, Status] = {}
    for run in runs:
        found.setdefault(run.path.resolve(), run)
    for depth in itertools.count(1):
        names = ["/".join(path.parts[-depth:]) for path in found]
        if len({*names}) == len(names):
            break
    return [replace(run, name=name) for run, name in zip(found.values(), names)]


def read_run(path: Path) -> Status:
    """One run's status; `path` holds a metrics.jsonl."""
    rows, state = read_metrics(path / "metrics.jsonl"), _state(path)
    trained = [row for row in rows if "tokens_per_second" in row]
    evaluated = [row["step"] for row in rows if last_evaluation([row])]
    step = max([int(row["step"]) for row in rows] + [_whole(state.get("step")) or 0])
    checkpoints = _checkpoints(path)
    best = best_checkpoint(checkpoints)
    running, steps = state.get("state") == RUNNING, _whole(state.get("steps"))
    return Status(
        name=path.resolve().name,
        path=path,
        state=str(state.get("state", "unknown")),
        reason=str(state.get("reason", "")),
        step=step,
        steps=steps,
        tokens=_whole(max((row["tokens"] for row in rows if _whole(row.get("tokens"))), default=None)),
        tokens_per_second=float(trained[-1]["tokens_per_second"]) if trained else None,
        seconds_left=_seconds_left(rows, step, steps) if running and steps else None,
        evaluation=last_evaluation(rows),
        evaluated_at=evaluated[-1] if evaluated else None,
        warnings=_warnings(rows),
        last_checkpoint=_step_of(checkpoints[-1]) if checkpoints else None,
        best_checkpoint=_step_of(best[0]) if best else None,
        metric=_metric(path),
        rows=rows,
    )


def _metric(run: Path) -> str:
    """What task.json of a fine-tuning, or of one of its seeds, says."""
    folder = run.resolve()
    with suppress(OSError, ValueError):
        task = read_json((folder.parent if folder.name.startswith("seed-") else folder) / "task.json")
        return str(task.get("metric", "")) if isinstance(task, dict) else ""
    return ""


def _checkpoints(run: Path) -> list[Path]:
    try:
        return checkpoint_folders(run / "checkpoints")
    except UserError:  # the rest can be shown without them
        return []


def reference_curve(source: str | None, run: Status) -> tuple[str, list[Row]] | None:
    """(name, rows) of the curve to compare a run with; None if there is none for it.

    Args:
        source: a metrics.jsonl, a JSON file with "rows", or a run's folder; None: the curve that comes with the
            program for the run's preset, if there is one and the run has the preset's objective, vocabulary and
            sizes; "none": no curve.

    Raises:
        UserError: `source` is none of these.
    """
    if source == "none":
        return None
    if source is not None:
        path = Path(source)
        return path.name, _rows_of(path / "metrics.jsonl" if path.is_dir() else path)
    preset = _preset(run.path)
    for path in (REFERENCE_CURVES / f"{preset}.json", *([SHIPPED_CURVE] if preset == "tiny" else [])):
        if path.is_file():
            return f"reference ({preset})", _rows_of(path)
    return None


def judged(run: Status, reference: list[Row]) -> list[str]:
    """A sentence for each figure that both have: how the run's newest evaluation compares with the reference.

    They are compared at the same number of tokens (or steps, if the log has no tokens). Losses on another text or
    vocabulary differ by nature, so the comparison is only as good as the reference fits.
    """
    axis = "tokens" if all("tokens" in row for row in reference) and run.tokens else "step"
    newest = next((row for row in reversed(run.rows) if any(name in row for name in JUDGED)), {})
    sentences = []
    for name, (direction, tolerance) in JUDGED.items():
        points = [(float(row[axis]), float(row[name])) for row in reference if _has(row, axis, name)]
        if not points or not _has(newest, axis, name):
            continue
        at, value = float(newest[axis]), float(newest[name])
        if at < points[0][0]:
            sentences.append(
                f"{plain_name(name)}: too early to say (the reference starts at {points[0][0]:,.0f} {axis})"
            )
            continue
        expected = interpolated(points, at)
        ahead = direction * (value - expected)
        word = "behind" if ahead < -tolerance else "ahead of" if ahead > tolerance else "level with"
        past = ", its last value" if at > points[-1][0] else ""
        sentences.append(
            f"{plain_name(name)} {value:.3f} after {at:,.0f} {axis}: {word} the reference ({expected:.3f}{past})"
        )
    return sentences


def _has(row: Row, *names: str) -> bool:
    """Whether the row has these figures, none of them NaN."""
    return all(is_figure(row.get(name)) for name in names)


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """y at `x` by linear interpolation of `points` (ascending x); beyond them, the y of the nearest end."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return points[-1][1]


def _seconds_left(rows: Sequence[Row], step: int, steps: int) -> float | None:
    """Remaining time at the newest row's tokens per second and the run's tokens per step."""
    for row in reversed(rows):
        if row.get("tokens") and row.get("tokens_per_second") and row["step"]:
            seconds = float((steps - step) * row["tokens"] / row["step"] / row["tokens_per_second"])
            return seconds if math.isfinite(seconds) else None
    return None


def _warnings(rows: Sequence[Row]) -> list[str]:
    found: list[str] = []
    for row in rows:
        if last_evaluation([row]):
            found = []
        found += [str(warning) for warning in row.get("warnings", [])]
    return list(dict.fromkeys(found))


def _rows_of(path: Path) -> list[Row]:
    try:
        path.stat()  # a missing log would be an empty one
        content = read_json(path) if path.suffix == ".json" else read_metrics(path)
        rows = content.get("rows") if isinstance(content, dict) else content
        rows = [clean_row(row) for row in rows] if isinstance(rows, list) else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a reference curve ({error})") from None
    if not rows:
        raise UserError(f'{path}: not a reference curve (expected rows with a "step", as in metrics.jsonl)')
    return rows


def _preset(run: Path) -> str | None:
    """The preset that a run's config.toml names, if the run has its objective and sizes: others' losses differ by
    nature, as that of a masked LM from that of ELECTRA's narrow generator."""
    try:
        settings, encoder = (read_table(run / "config.toml", name) for name in ("pretrain", "discriminator"))
    except UserError:
        return None
    name = settings.get("model")
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        return None
    alike = ("objective", *GENERATOR_SIZES.values())
    same = all(settings.get(key) == getattr(preset.pretrain, key) for key in alike) and all(
        encoder.get(key) == getattr(preset.discriminator, key) for key in SIZES
    )
    return name if same else None


def plain_name(name: str) -> str:
    """A figure of the log, as people read it: "eval_mlm_loss" -> "mlm loss"."""
    return name.removeprefix("eval_").replace("_", " ")


def _step_of(checkpoint: Path) -> int | None:
    digits = checkpoint.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else None


def _whole(value: Any) -> int | None:
    return int(value) if is_figure(value) else None
