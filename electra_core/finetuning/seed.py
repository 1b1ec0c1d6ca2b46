"""Training of one seed: the steps and, between them, logging, evaluations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from electra_core.downstream.interface import Task
from electra_core.downstream.run_model import check_finite, run_model
from electra_core.errors import UserError, option
from electra_core.execution.cross_check import check_task_model
from electra_core.finetuning.data import plan_batches, tokens_of_steps
from electra_core.finetuning.folder import Keeper, Run, log_folder
from electra_core.finetuning.model import starting_model
from electra_core.finetuning.steps import Job, evaluation_steps, finetuning_steps, task_optimizer
from electra_core.runs.guards import left_out
from electra_core.runs.metrics_log import MetricsLog
from electra_core.runs.notices import Say
from electra_core.runs.progress import progress
from electra_core.runs.stop_request import ON_EVALUATION, StopRequest, asks_to_stop
from electra_core.tasks import TaskModel
from electra_core.training import Diverged, StepResult

FEWEST_STEPS = 50
"""With fewer steps the user is warned."""


def train_seed(job: Job, keeper: Keeper, stop: StopRequest, quiet: bool, say: Say) -> str | None:
    """Trains the seed of `keeper`'s last run, from its beginning or from the checkpoint.

    Returns:
        What stopped the training, if anything.

    Raises:
        UserError: the training diverges.
    """
    settings, run = job.settings, keeper.runs[-1]
    model, optimizer = job.ranks.together(lambda: _model_and_optimizer(job, keeper))
    plan = plan_batches(job.data.train, settings, run.seed)
    if len(plan) < FEWEST_STEPS and run.seed == settings.seed:
        say(_few_steps(len(plan)))
    evaluate_after = evaluation_steps(len(plan), settings)
    is_last_seed = run.seed == settings.seed + settings.seeds - 1
    tokens = tokens_of_steps(job.data.train, plan)
    steps = _counted(finetuning_steps(job, model, optimizer, plan, run), run, tokens)
    log = job.ranks.only_first(lambda: MetricsLog(log_folder(keeper.out, settings, run.seed), run.steps))
    with log, progress(f"fine-tune, seed {run.seed}", len(plan), "steps", before=run.steps, quiet=quiet) as bar:
        for result in steps:
            is_last_step = result.step == len(plan)
            if is_last_step or result.step % settings.log_every == 0:
                log.write(result.step, **_step_figures(result, run))
                bar.note(loss=f"{float(result.loss):.3f}", best=f"{run.best:.4f}" if run.metrics else "-")
            bar.update()
            if evaluated := result.step in evaluate_after:
                metrics = _evaluate(job, model, run, keeper)
                log.write(result.step, **{f"dev_{name}": value for name, value in metrics.items()})
            reason = stop.agreed()
            run.over = is_last_step or 0 < settings.patience <= run.evaluations - run.best_evaluation
            due = evaluated or (settings.checkpoint_every > 0 and result.step % settings.checkpoint_every == 0)
            if (due or reason) and not (run.over and is_last_seed):
                run.skipped = int(result.in_a_row)
                keeper.save(model, optimizer)
            # Neither checkpointed nor logged: a run that was not stopped has no evaluation here.
            if reason and keeper.best is None:
                _evaluate(job, model, run, keeper)
                evaluated = True
            # After saving, so that a resume goes on from here if the caller's function raises.
            if evaluated and job.ranks.decided_by_first(lambda: asks_to_stop(job.on_evaluation, _figures(run))):
                reason = reason or ON_EVALUATION
            if is_last_step:
                for warning in left_out(result):
                    say(f"warning: {warning}")
            if reason or run.over:
                return reason
    return None


def _model_and_optimizer(job: Job, keeper: Keeper) -> tuple[TaskModel, torch.optim.Optimizer]:
    """Model and optimizer of `keeper`'s last run, new or restored from the checkpoint."""
    settings, run = job.settings, keeper.runs[-1]
    model = starting_model(job.task, job.directory, settings, run.seed).to(job.device)
    static = settings.engine != "eager"
    check_task_model(model, job.device, job.dtype, job.task.max_length, training=True, static=static)
    optimizer = task_optimizer(model, settings)
    if run.steps:
        keeper.restore(model, optimizer)
    return model, optimizer


def _few_steps(steps: int) -> str:
    return (
        f"warning: only {steps} step{'s' if steps > 1 else ''} in total, which may be too few "
        f"to learn from; for more, raise {option('epochs')} or lower {option('batch_size')}"
    )


def _counted(steps: Iterable[StepResult], run: Run, tokens: Sequence[int]) -> Iterator[StepResult]:
    """Passes on `steps`, counting them in `run`, with the time that they take without evaluations and saving.

    Args:
        tokens: number of tokens of every step.

    Raises:
        UserError: the training diverges.
    """
    started = time.perf_counter()
    try:
        for result in steps:
            run.steps, run.seconds = result.step, run.seconds + time.perf_counter() - started
            run.tokens += tokens[result.step - 1]
            yield result
            started = time.perf_counter()
    except Diverged as error:
        raise UserError(f"{error}; try a lower learning rate") from None


def _step_figures(result: StepResult, run: Run) -> dict[str, float]:
    return {
        "loss": float(result.loss),
        "gradient_norm": float(result.gradient_norm),
        "learning_rate": result.learning_rate,
        "tokens_per_second": round(run.tokens / run.seconds),
    }


def _evaluate(job: Job, model: TaskModel, run: Run, keeper: Keeper) -> dict[str, float]:
    """Dev figures of the model as it is; if they are its best, records them in `run` and offers it to `keeper`.

    Of equally good models the last is kept: where the metric cannot rise (all dev examples are right after the
    first epoch), the model keeps learning. `patience` counts the evaluations since the metric last rose.
    """
    ranks, task = job.ranks, job.task
    share = ranks.rank, ranks.size
    mine = ranks.together(lambda: run_model(model, job.data.dev, precision=job.dtype, share=share))
    outputs = ranks.merged(mine)

    def judged() -> dict[str, float]:
        nonlocal task
        task, metrics = _judged(job, outputs)
        return metrics

    metrics = ranks.decided_by_first(judged)
    run.evaluations, run.last = run.evaluations + 1, metrics
    if task.metric not in metrics:
        raise UserError(f"{option('metric')}: expected one of {', '.join(metrics)}, got {task.metric!r}")
    figure = metrics[task.metric]
    if figure > run.best or not run.metrics:
        run.best_evaluation = run.evaluations
    if figure >= run.best or not run.metrics:
        run.best, run.best_step, run.metrics = figure, run.steps, metrics
        keeper.offer(model, task, job.data.tokenizer)
    return metrics


def _figures(run: Run) -> dict[str, float]:
    """Those of the last evaluation, for `on_evaluation`."""
    return {"seed": run.seed, "step": run.steps, **run.last}


def _judged(job: Job, outputs: list[np.ndarray]) -> tuple[Task, dict[str, float]]:
    """The task, with its threshold tuned if it has one, and the dev figures; UserError if the model diverged."""
    task, data = job.task, job.data
    check_finite(outputs, "training has diverged on the dev data; try a lower learning rate")
    predictions = task.decode(data.dev_examples, data.dev, outputs)
    tuned = task.tuned(data.dev_examples, predictions)
    if tuned != task:  # the threshold has moved: predict with the new one
        predictions = tuned.decode(data.dev_examples, data.dev, outputs)
    return tuned, tuned.score(data.dev_examples, predictions)
