"""Fine-tuning: a pre-trained model and labelled data in, a model directory out.

    read    train and dev files become examples; the labels are those of the training data
    encode  every text is tokenised once, whatever the number of epochs and seeds
    train   batches of sequences of similar length; order and dropout are a pure function of (seed, epoch, step);
            layer-wise learning-rate decay, warm-up, then linear decay to zero (`finetuning/seed.py`)
    keep    whenever the dev figures are the best so far, OUT/ becomes that model: a model directory in the
            Hub's layout with task.json beside it
    resume  a checkpoint at every evaluation, from which `--resume` continues bit for bit (`finetuning/folder.py`)
    report  metrics.json in OUT/; metrics.jsonl (and TensorBoard) while it runs

Small data sets vary a lot with the seed (Dodge et al. 2020), so `seeds` trains several times and reports
median, mean and spread. The best seed is chosen on the dev data, so its dev figure is optimistic: quote
the median.

Several processes (`execution/distributed.py`) read the same data and train the seeds together, one after the
other: each takes its share of every batch and of the dev data; rank 0 computes the figures and writes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from electra_core import model_dir
from electra_core.checkpoint import Checkpoint, agreed_on
from electra_core.config import EncoderConfig
from electra_core.downstream.classify import Classify
from electra_core.downstream.in_memory import Rows, as_files
from electra_core.downstream.interface import Task, baseline, check_segments
from electra_core.downstream.task_files import check_registered
from electra_core.errors import UserError, is_on_command_line, option, writing
from electra_core.execution.distributed import Ranks, join_ranks
from electra_core.execution.placement import keep_memory_between_batches, resolve_device, resolve_precision
from electra_core.execution.torch_state import for_training
from electra_core.finetuning.card import about_training, shown
from electra_core.finetuning.data import adapted, encode_data, read_data
from electra_core.finetuning.folder import (
    Keeper,
    Run,
    check_finished,
    check_identity,
    finished_report,
    identity,
    make_out,
    write_json,
)
from electra_core.finetuning.kept_head import old_head, told
from electra_core.finetuning.model import check_freeze
from electra_core.finetuning.seed import train_seed
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.finetuning.steps import Job
from electra_core.finetuning.token_cache import fingerprint
from electra_core.labelled_data.labelled import BadRows, label_counts
from electra_core.metrics import positive_class, spread
from electra_core.runs.folder import find_checkpoint
from electra_core.runs.notices import Say, to_log
from electra_core.runs.stop_request import StopRequest, tell_python
from electra_core.tokenizer import Tokenizer, matching_tokenizer

NEARLY_ALL = 0.8
"""Share of the commonest class above which a model that knows only that class is told of class weights."""


@for_training()
def finetune(
    model: str | Path,
    task: Task,
    train: str | Path | Rows,
    dev: str | Path | Rows | None,
    out: str | Path,
    settings: FinetuneSettings | None = None,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    say: Say = to_log,
    cache: str | Path | None = None,
    on_evaluation: Callable[[dict[str, float]], object] | None = None,
) -> dict[str, Any]:
    """Fine-tunes a model; `out` ends as a model directory with the best checkpoint.

    SIGINT and SIGTERM end it after the current step; `out` then holds the best model so far, and `resume` goes on.
    For a caller in Python, SIGINT is a KeyboardInterrupt once that is saved; after SIGTERM, "stopped_by" says so.

    Args:
        model: directory of a pre-trained (or fine-tuned) model, a run, or a name on the Hub.
        task: what to learn; its labels may be empty.
        train, dev: files that the task can read, or rows in memory: dicts, or a table (pandas). Without `dev`, a
            tenth of the training data is held out.
        out: a new or empty folder, or one to continue (`resume`) or overwrite (`overwrite`).
        device: auto | cpu | cuda | cuda:N.
        quiet: show no progress bars.
        say: receives lines for the user, for instance `print`; by default they go to the logger "electra_core", of
            which Python shows only warnings unless logging is set up.
        cache: folder in which tokenised data are kept for the next run (`finetuning/token_cache.py`); None:
            nowhere.
        on_evaluation: called with the figures of every evaluation, and "seed" and "step", after its checkpoint is
            saved (the last one has none); of several ranks, on the first. If it returns True, the training stops
            as at a signal; an exception is the caller's, and ends all ranks. Both can be resumed.

    Returns:
        What metrics.json holds: the best seed's dev figures, every seed's, their spread, counts, times.

    Raises:
        UserError: data or model cannot be used (nothing is written then), the checkpoint or finished model is of
            another fine-tuning, or the loss diverges.
        ValueError: model, task or settings have the wrong type, the task's class is not registered
            (`register_task`), or rows are not dicts.
        KeyboardInterrupt: SIGINT came, not on the command line; all is saved.
    """
    _check_arguments(model, task, settings)
    out, place = Path(out), resolve_device(device)
    keep_memory_between_batches(place)
    ranks = join_ranks(place)
    if not ranks.first:
        say, quiet, on_evaluation = _silent, True, None
    directory, config, settings = ranks.together(
        lambda: _resolved(model, out, settings or FinetuneSettings(), ranks, say)
    )
    done, checkpoint = _earlier(out, resume, overwrite, ranks)
    if resume and done is None and checkpoint is None:
        say(f"{out}: nothing to resume; starting at step 0")
    with as_files(say, task, train=train, dev=dev) as (files, say_of_them):
        read = ranks.together(lambda: _read(task, directory, config, files, settings, say_of_them))
    task, train_examples, dev_examples, skipped, tokenizer = read
    both = train_examples, dev_examples
    prints = [fingerprint(task, examples, tokenizer) for examples in both]
    same = identity(settings, task, directory, prints)
    ranks.check_alike(same, "model, data or settings")
    if done is not None:
        check_finished(out, done, same)
        say(f"{out}: already finished")
        ranks.leave()
        return done
    if checkpoint is not None:
        check_identity(checkpoint, same)
        say(f"continuing at step {checkpoint.step}")
    elif not settings.random_start and (old := old_head(task, directory)) is not None:
        say(f"{model}: {told(task, old)}")
    may_be_longer = task.max_length < config.max_position_embeddings
    data = ranks.together(
        lambda: encode_data(task, *both, tokenizer, quiet, say, cache, may_be_longer=may_be_longer)
    )
    dtype = resolve_precision(settings.precision, place)
    job = Job(task, directory, settings, data, place, dtype, on_evaluation, ranks)
    with writing(str(out), only_in=out):  # a full disk, most likely; earlier saves are intact
        state = ranks.only_first(
            lambda: make_out(out, settings, resumed=checkpoint is not None, overwrite=overwrite)
        )
        state.begin(saved=checkpoint.step if checkpoint is not None else 0)
        about = about_training(model, task, settings, same, len(train_examples), len(dev_examples))
        keeper = Keeper(out, checkpoint, same, about, ranks, state.saved)
        with state, keeper.writer, StopRequest(ranks=ranks) as stop:
            stopped = _train_seeds(job, keeper, stop, quiet, say)
            counts = {"train_examples": len(train_examples), "dev_examples": len(dev_examples)}
            report = _report(job, keeper, counts, skipped, stopped)
            if len(report["seeds"]) > 1:
                say(f"{task.metric} over {len(report['seeds'])} seeds: {shown(report['over_seeds'])}")
                say(f"at the last step instead of the best: {shown(report['last_over_seeds'])}")
            ranks.only_first(lambda: write_json(out / "metrics.json", report))
            ranks.together(keeper.writer.wait)
            state.end(sum(run.steps for run in keeper.runs), stopped)
        saved = f"{out} holds the best model{' so far' if stopped else ''}"
        if stopped and is_on_command_line():
            say(f"stopped by {stopped}; {saved}; --resume continues")
        elif not stopped:
            keeper.remove_checkpoints()
            if warning := _at_the_baseline(job, report["best"]):
                say(f"warning: {warning}")
    ranks.leave()
    tell_python(stopped, stop.reason, saved, say)
    return report


def _check_arguments(model: Any, task: Any, settings: Any) -> None:
    """Raises ValueError for a model, task or settings of the wrong type."""
    if not isinstance(model, str | os.PathLike):
        raise ValueError(
            f"model: expected a folder or a name, got {type(model).__name__}; save the model (save_pretrained) "
            "and give its folder, or train it as it is with training.training_steps"
        )
    if not isinstance(task, Task):
        raise ValueError(
            f"task: expected a task, such as Classify() or choose_task(name)[0], got {type(task).__name__} "
            f"{task!r:.50}"
        )
    check_registered(task)
    if not isinstance(settings, FinetuneSettings | None):
        raise ValueError(f"settings: expected FinetuneSettings(...), got {type(settings).__name__}")


def _silent(line: str) -> None:
    """`say` of all ranks but the first: what all would say, rank 0 says."""


def _resolved(
    model: str | Path, out: Path, settings: FinetuneSettings, ranks: Ranks, say: Say
) -> tuple[Path, EncoderConfig, FinetuneSettings]:
    """The model's directory, its configuration, and the settings resolved for it; for the arguments see
    `finetune`."""
    directory = model_dir.find_model(model)
    if out.resolve() in (directory.resolve(), *directory.resolve().parents):
        raise UserError(f"{out}: holds the model to fine-tune; write the new one to another folder")
    config, _ = model_dir.load_config(directory)
    settings, asked = settings.resolved(config), settings.max_length
    if settings.max_length < asked:
        say(f"warning: {option('max_length')}: {asked} exceeds the model's positions; using {settings.max_length}")
    check_freeze(settings.freeze, config.num_hidden_layers)
    if settings.batch_size < ranks.size and not settings.tokens_per_batch:
        raise UserError(
            f"{option('batch_size')}: expected at least 1 per process, {ranks.size} in all, got "
            f"{settings.batch_size}"
        )
    return directory, config, settings


def _earlier(
    out: Path, resume: bool, overwrite: bool, ranks: Ranks
) -> tuple[dict[str, Any] | None, Checkpoint | None]:
    """What OUT holds of the same fine-tuning: its report if it is finished, otherwise the checkpoint to resume."""
    done = ranks.decided_by_first(lambda: finished_report(out) if resume else None)
    return done, None if done else agreed_on(ranks, lambda: find_checkpoint(out, resume, overwrite))


def _read(
    task: Task,
    directory: Path,
    config: EncoderConfig,
    files: dict[str, Any],
    settings: FinetuneSettings,
    say: Say,
) -> tuple[Task, list[Any], list[Any], list[BadRows], Tokenizer]:
    """What `read_data` returns for the task adapted to the model, and the model's tokenizer."""
    tokenizer = matching_tokenizer(directory, config.vocab_size)
    check_segments(task, config, directory)
    read = read_data(adapted(task, settings, config), files["train"], files["dev"], settings, say)
    check_segments(task, config, directory, itertools.chain(read[1], read[2]))
    return *read, tokenizer


def _train_seeds(job: Job, keeper: Keeper, stop: StopRequest, quiet: bool, say: Say) -> str | None:
    """Trains all unfinished seeds; returns what stopped training before the end of the last, if anything."""
    first, seeds, runs = job.settings.seed, job.settings.seeds, keeper.runs
    reason: str | None = None
    for seed in range(first, first + seeds):
        if seed not in [run.seed for run in runs]:
            runs.append(Run(seed))
        if not runs[-1].over and runs[-1].seed == seed:
            reason = train_seed(job, keeper, stop, quiet, say)
            if job.device.type == "cuda":
                torch.cuda.empty_cache()  # memory of graphs that no other seed uses
            say(f"seed {seed}: {_result(job, runs[-1])}")
        if reason := reason or stop.agreed():
            break
    return None if len(runs) == seeds and all(run.over for run in runs) else reason


def _result(job: Job, run: Run) -> str:
    """One line on a seed's best evaluation, and its metric at the last one if that differs."""
    if not run.metrics:
        return "not evaluated yet"
    metric = job.task.metric
    last = run.last[metric]
    at_the_last = "" if last == run.best else f"; {metric} {last:.4g} at the last"
    return f"{shown(run.metrics, job.task.positive)} (best at step {run.best_step}{at_the_last})"


def _report(
    job: Job, keeper: Keeper, counts: dict[str, int], skipped: Sequence[BadRows], stopped: str | None
) -> dict[str, Any]:
    """The contents of metrics.json."""
    # The last run may have been stopped before its first evaluation.
    runs = [run for run in keeper.runs if run.metrics]
    best = keeper.best
    assert best is not None
    return {
        "task": job.task.kind,
        "metric": job.task.metric,
        **positive_class(best.metrics, job.task.positive),
        "best": {"seed": best.seed, "step": best.best_step, **best.metrics},
        "over_seeds": spread([run.best for run in runs]),
        "last_over_seeds": spread([run.last[job.task.metric] for run in runs]),
        "seeds": [
            {
                "seed": run.seed,
                "best_step": run.best_step,
                "steps": run.steps,
                "seconds": round(run.seconds, 2),
                "tokens_per_second": round(run.tokens / max(run.seconds, 1e-9)),
                "metrics": run.metrics,
                "last": run.last,
            }
            for run in runs
        ],
        **counts,
        "skipped_rows": sum(bad.count for bad in skipped),
        "stopped_by": stopped,
        "settings": asdict(job.settings),
        "identity": {table: values for table, values in keeper.identity.items() if table != "settings"},
    }


def _at_the_baseline(job: Job, best: dict[str, float]) -> str | None:
    """A warning if the model is no better than a constant guess, otherwise None."""
    metric, guess = job.task.metric, baseline(job.task, job.data.dev_examples)
    if guess is None or best[metric] > guess[1][metric]:
        return None
    what, constant = guess
    unequal = isinstance(job.task, Classify) and not job.task.class_weights
    rare = f"; {option('class_weights')} makes rare classes count" if unequal and _is_of_one(job) else ""
    return (
        f"a constant guess ({what}) does as well on the dev data ({metric} {constant[metric]:.4g}); "
        f"try more {option('epochs')} or another {option('learning_rate')}{rare}"
    )


def _is_of_one(job: Job) -> bool:
    """Whether nearly all dev examples are of one class."""
    counts = label_counts(job.data.dev_examples)
    return max(counts.values()) >= NEARLY_ALL * counts.total()
