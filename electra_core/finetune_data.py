"""Data for fine-tuning: the task adapted to settings and model, examples read and split, tokenised, batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from electra_kernels.rng import fold

from electra_core.classify import Classify
from electra_core.config import EncoderConfig
from electra_core.downstream import Task, encode_all, read_all
from electra_core.errors import UserError
from electra_core.features import Features, batch_order
from electra_core.finetune_settings import FinetuneSettings
from electra_core.labelled import BadRows
from electra_core.token_cache import cached
from electra_core.tokenizer import Tokenizer, load_tokenizer

HELD_OUT = 0.1  # of the training data, where no dev file is given
ORDER_STREAM, SPLIT_STREAM = 1, 2  # of the random numbers of a fine-tuning run; finetune has the first


@dataclass(frozen=True)
class Data:
    """What every seed trains and is evaluated on, encoded once."""

    train: Features
    dev: Features
    dev_examples: Sequence[Any]
    tokenizer: Tokenizer


def adapted(task: Task, settings: FinetuneSettings, config: EncoderConfig) -> Task:
    """The task with what the settings change in it, its sequences no longer than the model's positions."""
    length = min(settings.max_length or task.max_length, config.max_position_embeddings)
    changes: dict[str, Any] = {"max_length": length}
    if settings.truncate and hasattr(task, "truncate"):
        changes["truncate"] = settings.truncate
    return replace(task, **changes)  # type: ignore[type-var]


def read_data(
    task: Task, train: str | Path, dev: str | Path | None, settings: FinetuneSettings
) -> tuple[Task, list[Any], list[Any], list[BadRows]]:
    """Training and development examples.

    Returns:
        The task fitted to its training data, training examples, dev examples, the rows that were skipped.

    Raises:
        UserError: unreadable or empty data, bad rows that are not to be skipped, labels unseen in training.
    """
    examples, bad = read_all(task, train, skip_bad_rows=settings.skip_bad_rows)
    skipped = [bad]
    if dev is None:
        order = np.random.Generator(np.random.Philox(key=fold(settings.seed, SPLIT_STREAM))).permutation(
            len(examples)
        )
        count = max(1, round(len(examples) * HELD_OUT))
        if len(examples) < 2:
            raise UserError(f"{train}: a single example cannot be split; give a dev file")
        dev_examples = [examples[index] for index in sorted(order[:count])]
        examples = [examples[index] for index in sorted(order[count:])]
        task = _fitted(task, examples + dev_examples, train)
    else:
        task = _fitted(task, examples, train)
        dev_examples, bad = read_all(task, dev, skip_bad_rows=settings.skip_bad_rows)
        skipped.append(bad)
    if settings.class_weights:
        if not isinstance(task, Classify):
            raise UserError(f"class_weights: only for classification, the task is {task.kind}")
        task = task.balanced(examples)
    return task, examples, dev_examples, skipped


def _fitted(task: Task, examples: Sequence[Any], train: str | Path) -> Task:
    """`task.fitted`, whose complaints name the file."""
    try:
        return task.fitted(examples)
    except UserError as error:
        raise UserError(f"{train}: {error}") from None


def matching_tokenizer(directory: Path, config: EncoderConfig) -> Tokenizer:
    """The directory's tokenizer.

    Raises:
        UserError: it has more words than the model.
    """
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} words, the model only {config.vocab_size}"
        )
    return tokenizer


def encode_data(
    task: Task,
    train: Sequence[Any],
    dev: Sequence[Any],
    tokenizer: Tokenizer,
    quiet: bool,
    say: Callable[[str], None],
    cache: str | Path | None = None,
) -> Data:
    """Both sets tokenised, or taken from the cache folder; `say` is told how many examples were cut."""

    def encoded(examples: Sequence[Any], training: bool) -> Features:
        def encode() -> Features:
            return encode_all(task, examples, tokenizer, training=training, quiet=quiet)

        return cached(cache, task, examples, tokenizer, training, encode, say)

    train_features, dev_features = encoded(train, True), encoded(dev, False)
    if cut := train_features.truncated + dev_features.truncated:
        say(f"{cut} of {len(train) + len(dev)} examples are longer than {task.max_length} tokens and were cut")
    return Data(train_features, dev_features, dev, tokenizer)


def plan_batches(train: Features, settings: FinetuneSettings, seed: int) -> list[list[np.ndarray]]:
    """For every step, the batches (arrays of units) whose gradients it adds up."""
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
