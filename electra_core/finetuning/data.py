"""Data for fine-tuning: adapts the task to settings and model; reads, splits, tokenises and batches examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from electra_kernels.rng import fold

from electra_core.config import EncoderConfig
from electra_core.downstream.classify import Classify, TextTask
from electra_core.downstream.interface import Task, encode_all, knows_its_figures, read_all
from electra_core.downstream.multilabel import MultiLabel
from electra_core.errors import UserError, option
from electra_core.finetuning.data_warnings import many_cut, rows_and_columns, warnings_about
from electra_core.finetuning.dev_split import split
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.finetuning.token_cache import cached
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.features import Features, batch_order
from electra_core.labelled_data.groups import groups_of
from electra_core.labelled_data.labelled import BadRows, label_counts
from electra_core.metrics import OF_SCORES
from electra_core.runs.notices import Say
from electra_core.tokenizer import Tokenizer, unknown_words

ALL_CLASSES_ALIKE = "macro_f1"
"""Chooses the best evaluation of a training in which all classes count the same; accuracy counts the examples."""
ANY_TWO = ("a", "b")
"""Labels of a task that stands for any of two classes."""
ORDER_STREAM = 1  # of a fine-tuning run's random numbers; stream 2 is dev_split's


@dataclass(frozen=True)
class Data:
    """The data that every seed trains and is evaluated on, encoded once."""

    train: Features
    dev: Features
    dev_examples: Sequence[Any]
    tokenizer: Tokenizer


def adapted(task: Task, settings: FinetuneSettings, config: EncoderConfig) -> Task:
    """The task with the changes that the settings ask for, its sequences limited to the model's positions.

    Raises:
        UserError: `truncate` is set for a task that treats long texts in its own way.
    """
    length = min(settings.max_length or task.max_length, config.max_position_embeddings)
    changes: dict[str, Any] = {"max_length": length}
    if settings.truncate:
        if not hasattr(task, "truncate"):
            raise UserError(
                f"{option('truncate')}: no effect on {task.kind}, only on classification and regression"
            )
        changes["truncate"] = settings.truncate
    return replace(task, **changes)  # type: ignore[type-var]


def read_data(
    task: Task, train: str | Path, dev: str | Path | None, settings: FinetuneSettings, say: Say
) -> tuple[Task, list[Any], list[Any], list[BadRows]]:
    """Reads training and dev examples; `say` gets what was skipped and what is odd about them.

    Returns:
        The task fitted to its training data, training examples, dev examples, the rows that were skipped.

    Raises:
        UserError: data unreadable or empty, bad rows (unless skipped), labels unseen in training; a group column
            where none is needed or found.
    """
    columns = getattr(task, "columns", None)
    columns = columns if isinstance(columns, Columns) else Columns()
    if dev is not None and columns.group is not None:
        raise UserError(f"--group-column: no effect with {option('dev')}, which is held out already")
    read, bad = read_all(task, train, skip_bad_rows=settings.skip_bad_rows)
    examples, skipped = read, [bad]
    has_labels = isinstance(task, Classify | MultiLabel)
    if isinstance(task, TextTask):
        say(rows_and_columns(train, read, task.columns, bad.found, classes=has_labels))
        if bad.found is not None:  # other files are read by the same names, whatever other columns they have
            task = replace(task, columns=bad.found.named(task.columns))
    if dev is None:
        examples, dev_examples = _held_out(read, train, columns, say, by_label=has_labels)
        task = _fitted(task, examples + dev_examples, train)
    else:
        task = _fitted(task, examples, train)
        dev_examples, bad = read_all(task, dev, skip_bad_rows=settings.skip_bad_rows)
        skipped.append(bad)
    if settings.metric or (task.metric not in task.figures and knows_its_figures(task)):
        task = _chosen_by(task, settings.metric or task.metric)
    if isinstance(task, Classify) and task.metric in OF_SCORES and len(only := label_counts(dev_examples)) == 1:
        raise UserError(
            f"{option('metric')}: {task.metric} needs dev examples of both classes, and all have the label "
            f"{next(iter(only))!r}; choose another figure, or give a dev file with both"
        )
    if settings.class_weights:
        task = _with_class_weights(task, examples, settings, say)
    for bad in skipped:
        if bad.count:
            say(bad.summary())
    held_out, weighted = dev is None, settings.class_weights
    for warning in warnings_about(task, train, read, examples, dev_examples, held_out=held_out, weighted=weighted):
        say(f"warning: {warning}")
    return task, examples, dev_examples, skipped


def _held_out(
    read: Sequence[Any], train: str | Path, columns: Columns, say: Say, *, by_label: bool
) -> tuple[list[Any], list[Any]]:
    """Training and dev examples of the training data; `say` gets what became of its groups, if it has a column for
    them."""
    if columns.group is None:
        return split(read, train, by_label=by_label)
    groups = groups_of(train, columns, read)
    parts = split(read, train, by_label=by_label, named=groups)
    of_line = dict(zip((example.line for example in read), groups))
    held_out, named = {of_line[example.line] for example in parts[1]} - {None}, {*groups} - {None}
    alone = groups.count(None)
    without = f"; {alone:,} belong{'s' * (alone == 1)} to no group" if alone else ""
    say(
        f"{train}: held out {len(held_out):,} of {len(named):,} groups, with {len(parts[1]):,} of {len(read):,} "
        f"examples{without}"
    )
    return parts


def _with_class_weights(task: Task, examples: Sequence[Any], settings: FinetuneSettings, say: Say) -> Classify:
    """The task with class weights, its best evaluation chosen by a figure in which classes count alike, too."""
    if not isinstance(task, Classify):
        rare = f"; a lower {option('threshold')} finds more of rare labels" if isinstance(task, MultiLabel) else ""
        raise UserError(f"{option('class_weights')}: no effect on {task.kind}, only on classification{rare}")
    task = task.balanced(examples)
    if settings.metric or task.metric != Classify.metric or ALL_CLASSES_ALIKE not in task.figures:
        return task
    say(
        f"with {option('class_weights')} the best evaluation is that of the highest {ALL_CLASSES_ALIKE}, unless "
        f"{option('metric')} is set"
    )
    return replace(task, metric=ALL_CLASSES_ALIKE)


def _chosen_by(task: Task, metric: str) -> Task:
    """The fitted task with another metric to choose the best evaluation by."""
    if metric not in task.figures:
        has_more = isinstance(task, Classify) and len(task.labels) > 2
        is_of_two = has_more and metric in replace(task, labels=ANY_TWO).figures  # type: ignore[type-var]
        hint = f"; {metric} is a figure of two classes, not of {len(task.labels)}" if is_of_two else ""
        raise UserError(f"{option('metric')}: expected one of {', '.join(task.figures)}, got {metric!r}{hint}")
    return replace(task, metric=metric)  # type: ignore[type-var]


def _fitted(task: Task, examples: Sequence[Any], train: str | Path) -> Task:
    """`task.fitted`, with the file's name in its error messages."""
    try:
        return task.fitted(examples)
    except UserError as error:
        raise UserError(f"{train}: {error}") from None


def encode_data(
    task: Task,
    train: Sequence[Any],
    dev: Sequence[Any],
    tokenizer: Tokenizer,
    quiet: bool,
    say: Say,
    cache: str | Path | None = None,
    *,
    may_be_longer: bool = False,
) -> Data:
    """Both sets tokenised, or loaded from the cache folder; `say` gets how many examples were truncated.

    Args:
        may_be_longer: whether the model could read longer sequences.
    """

    def encoded(examples: Sequence[Any], training: bool) -> Features:
        encode = partial(encode_all, task, examples, tokenizer, training=training, quiet=quiet)
        return cached(cache, task, examples, tokenizer, training, encode, say)

    train_features, dev_features = encoded(train, True), encoded(dev, False)
    if cut := train_features.truncated + dev_features.truncated:
        say(many_cut(cut, len(train) + len(dev), task.max_length, may_be_longer=may_be_longer))
    counts = [features.unknown(tokenizer.unk_id) for features in (train_features, dev_features)]
    if warning := unknown_words(*map(sum, zip(*counts))):
        say(f"warning: {warning}")
    return Data(train_features, dev_features, dev, tokenizer)


def plan_batches(train: Features, settings: FinetuneSettings, seed: int) -> list[list[np.ndarray]]:
    """For every step, the batches (arrays of units) whose gradients it accumulates."""
    batches: list[np.ndarray] = []
    wanted, epoch = np.inf, 0
    while len(batches) < wanted:
        order = batch_order(
            train.lengths,
            batch_size=settings.batch_size,
            tokens_per_batch=settings.tokens_per_batch,
            seed=fold(seed, ORDER_STREAM),
            epoch=epoch,
        )
        wanted = max(1, round(settings.epochs * len(order))) if epoch == 0 else wanted
        batches += order
        epoch += 1
    batches = batches[: int(wanted)]
    return [batches[start : start + settings.accumulate] for start in range(0, len(batches), settings.accumulate)]


def tokens_of_steps(train: Features, plan: Sequence[Sequence[np.ndarray]]) -> list[int]:
    """Number of tokens of every step."""
    lengths = train.lengths
    return [sum(int(lengths[units].sum()) for units in batches) for batches in plan]
