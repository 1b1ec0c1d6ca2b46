"""The learning study on the page: learning rates tried, runs, scores of every objective, scores against compute.

Figures are means over the seeds of pre-training (and of fine-tuning), with the minimum and maximum: with two or
three seeds a standard deviation would suggest more precision than there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any

from benchmarks import svg
from benchmarks.learning_plan import START, chosen_rate, trial_scores
from electra_core.config import OBJECTIVES

Row = dict[str, Any]
Values = Sequence[float]
AVERAGE = "mean of the tasks"


def tables(rows: Sequence[Row]) -> list[str]:
    """Markdown lines of a study's rows."""
    return [*_rates(rows), *_runs(rows), *_scores(rows)]


def figures(stem: str, rows: Sequence[Row]) -> dict[str, str]:
    """File name -> SVG: each task's score and their mean against FLOPs, the mean against time, and losses."""
    made = {}
    for number, task in enumerate([*_tasks(rows), AVERAGE]):
        made[f"{stem}_{number}.svg"] = _chart(rows, task, "flops", "FLOPs")
    made[f"{stem}_seconds.svg"] = _chart(rows, AVERAGE, "seconds", "seconds of pre-training")
    losses = [
        svg.Curve(f"{run['objective']}, seed {run['seed']}", [
            (point["tokens"] / 1e6, [point["eval_mlm_loss"]]) for point in run["curve"]])
        for run in _pretraining(rows)
        if run["equal"] == "flops" and run["objective"] in ("electra", "mlm") and run["point"] == _last_point(rows)
    ]  # fmt: skip
    title = "Held-out MLM loss of the longest runs (ELECTRA's: its small generator's)"
    made[f"{stem}_curves.svg"] = svg.curves(title, "million tokens", "nats", losses)
    return made


# ---- what there is -----------------------------------------------------------------------------------------


def _pretraining(rows: Sequence[Row]) -> list[Row]:
    """Runs of the study itself, without the trials of learning rates."""
    return [row for row in rows if row["kind"] == "pretraining" and row.get("trial") is None]


def _seconds(row: Row) -> float | None:
    """A run's seconds, if it was on the study's own machine."""
    return None if "machine" in row else float(row["seconds"])


def _judged(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "finetuning" and row.get("trial") is None]


def _tasks(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in _judged(rows)))


def _last_point(rows: Sequence[Row]) -> int:
    return max((row["point"] for row in _pretraining(rows)), default=0)


def _groups(rows: Iterable[Row]) -> dict[tuple[str, str, int], list[Row]]:
    """Rows by (objective, equal, point), with all seeds of a point together; equal FLOPs first, by compute."""
    order = [START, *OBJECTIVES]

    def key(row: Row) -> tuple[str, int, int]:
        return row["equal"], row["point"], order.index(row["objective"])

    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in sorted(rows, key=key):
        groups.setdefault((row["objective"], row["equal"], row["point"]), []).append(row)
    return groups


def _percent(rows: Sequence[Row], task: str) -> dict[tuple[str, str, int], list[float]]:
    """Scores of one task, or the mean over tasks, for every pre-training seed that all tasks have judged."""
    if task != AVERAGE:
        judged = [row for row in _judged(rows) if row["task"] == task]
        return {key: [100 * row["value"] for row in group] for key, group in _groups(judged).items()}
    wanted, found = set(_tasks(rows)), {}
    for key, group in _groups(_judged(rows)).items():
        by_seed = [
            [row for row in group if row["seed"] == seed] for seed in sorted({row["seed"] for row in group})
        ]
        complete = [part for part in by_seed if {row["task"] for row in part} == wanted]
        if complete:
            found[key] = [
                mean(mean(100 * row["value"] for row in part if row["task"] == name) for name in wanted)
                for part in complete
            ]
    return found


# ---- tables ------------------------------------------------------------------------------------------------


def _shown(values: Values, form: str) -> str:
    """Mean (minimum to maximum)."""
    if not values:
        return ""
    middle, low, high = (format(value, form) for value in (mean(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def _rates(rows: Sequence[Row]) -> list[str]:
    """The table of trials; empty if there were none."""
    scores = trial_scores(rows)
    if not scores:
        return []
    factors = sorted({factor for tried in scores.values() for factor in tried})
    lines = ["Learning rates tried for every objective, as multiples of the preset's, with the mean score (%) on"]
    lines += ["rows of the training data that are used for nothing else. Each objective uses its best (bold):\n"]
    lines += [
        "| objective | " + " | ".join(f"x {factor:g}" for factor in factors) + " |",
        "|---" * (len(factors) + 1) + "|",
    ]
    for objective, tried in scores.items():
        chosen = chosen_rate(rows, objective)
        cells = [f"{100 * tried[factor]:.1f}" if factor in tried else "" for factor in factors]
        marked = [f"**{cell}**" if factor == chosen else cell for factor, cell in zip(factors, cells)]
        lines.append(f"| {objective} | " + " | ".join(marked) + " |")
    return [*lines, ""]


def _runs(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| pre-training | equal | seeds | steps | 1e6 tokens | FLOPs | seconds | MLM loss | word loss | AUC |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (objective, equal, _), group in _groups(_pretraining(rows)).items():

        def over(get: Callable[[Row], float | None], group: list[Row] = group) -> list[float]:
            return [value for value in map(get, group) if value is not None]

        def figure(name: str, over: Any = over) -> str:
            return _shown(over(lambda row: row["evaluation"].get(f"eval_{name}")), ".3f")

        lines.append(
            f"| {objective} | {'' if objective == START else equal} | {len(group)} | "
            f"{_shown(over(lambda row: row['steps']), ',.0f')} | "
            f"{mean(over(lambda row: row['tokens'])) / 1e6:.2f} | "
            f"{mean(over(lambda row: row['flops'])):.3g} | {_shown(over(_seconds), ',.0f')} | "
            f"{figure('mlm_loss')} | {figure('word_loss')} | {figure('rtd_auc')} |"
        )
    machines = sorted({row["machine"] for row in _pretraining(rows) if "machine" in row})
    note = [f"\nRuns without seconds come from another machine, {', '.join(machines)}."] if machines else []
    return [*lines, *note, ""]


def _scores(rows: Sequence[Row]) -> list[str]:
    """One table: objectives and points down, tasks across."""
    tasks, metrics = _tasks(rows), {row["task"]: row["metric"] for row in _judged(rows)}
    found = {task: _percent(rows, task) for task in [*tasks, AVERAGE]}
    heads = [*(f"{task} ({metrics[task]})" for task in tasks), AVERAGE]
    lines = ["| dev score, % | equal | FLOPs | " + " | ".join(heads) + " |", "|---" * (len(heads) + 3) + "|"]
    for key, group in _groups(_pretraining(rows)).items():
        cells = [_shown(found[task].get(key, []), ".1f") for task in [*tasks, AVERAGE]]
        if any(cells) and (all(cells) or key[1] != "seconds"):  # runs of equal time may have some tasks only
            equal = "" if key[0] == START else key[1]
            flops = mean(row["flops"] for row in group)
            lines.append(f"| {key[0]} | {equal} | {flops:.3g} | " + " | ".join(cells) + " |")
    return lines


def adapted(rows: Sequence[Row]) -> list[str]:
    """The table of runs that continue from a pair (`adapting`), from each text's own start."""
    heads = "text", "steps", "peak rate", "warm-up", "MLM loss", "RTD loss", "AUC", "RTD loss, same draws", "AUC"
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    runs = sorted((row for row in rows if row["kind"] == "adapting"), key=_adapting_order)
    for row in runs:
        start = f"| {row['data']} | 0 | | | {_judged_twice(row['before'], row['before'])} |"
        if start not in lines:
            lines.append(start)
        lines.append(
            f"| {row['data']} | {row['steps']:,} | x {row['rate']:g} | {row['warmup_steps']:,} | "
            f"{_judged_twice(row['after'], row.get('same_draws'))} |"
        )
    return lines


def _adapting_order(row: Row) -> tuple[str, int, float, int, int]:
    return row["data"], row["steps"], -row["rate"], row["warmup_steps"], row["seed"]


def _judged_twice(own: Row, same: Row | None) -> str:
    """Figures beside the run's own generator, and the discriminator's beside the pair's; empty if not measured."""
    cells = [f"{own[name]:.3f}" for name in ("mlm_loss", "rtd_loss", "rtd_auc")]
    return " | ".join([*cells, *(f"{same[name]:.3f}" if same else "" for name in ("rtd_loss", "rtd_auc"))])


# ---- charts ------------------------------------------------------------------------------------------------


def _chart(rows: Sequence[Row], task: str, axis: str, label: str) -> str:
    """Scores of the runs of equal FLOPs against `axis`; against seconds, also of the runs of equal time."""
    groups, scores = _groups(_pretraining(rows)), _percent(rows, task)
    points: dict[str, list[tuple[float, Values]]] = {}
    for key, values in scores.items():
        group = groups.get(key, [])
        own = [row for row in group if axis != "seconds" or _seconds(row) is not None]
        if own and (key[1] == "flops" or axis == "seconds"):
            points.setdefault(key[0], []).append((mean(row[axis] for row in own), values))
    start = [(0.0, values) for _, values in points.pop(START, [])]
    series = [svg.Curve(name, sorted([*start, *measured])) for name, measured in points.items()]
    return svg.curves(
        f"{task}, dev score, %, against pre-training", label, "%", series or [svg.Curve(START, start)]
    )
