"""The model that fine-tuning starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from electra_core import model_dir
from electra_core.downstream.interface import Task
from electra_core.errors import UserError, option
from electra_core.finetuning.kept_head import give_head, old_head
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.initialisation import initialise
from electra_core.tasks import TaskModel, initialise_head

RANDOM_START_RANGE = 0.02
"""Standard deviation of a random start: the original's, whatever that of the pre-training was. One as large as
`tiny`'s hardly learns a small data set (docs/tiny_history.md), and a weak baseline flatters its rival."""


def starting_model(task: Task, directory: Path, settings: FinetuneSettings, seed: int) -> TaskModel:
    """The model before training: the pre-trained encoder with a new head, or with the usable part of a fine-tuned
    model's head (`kept_head`); with `random_start`, everything is new.

    Raises:
        UserError: no such model.
    """
    old = None if settings.random_start else old_head(task, directory)
    labels = old.labels if old is not None and old.rows else task.labels
    model = model_dir.load(task.model_class, directory, labels=labels, seed=seed, head_may_be_new=True)
    if old is None:
        initialise_head(model, seed)  # otherwise a head with the same number of labels would be kept
    else:
        give_head(model, old, task, seed)
    if settings.dropout >= 0:
        p = settings.dropout
        config = replace(model.config, hidden_dropout_prob=p, attention_probs_dropout_prob=p)
        other = task.model_class(config, task.labels, encoder=task.model_class.encoder_class(config))
        other.load_state_dict(model.state_dict())
        model = other
    if settings.random_start:
        initialise(model, RANDOM_START_RANGE, seed)
        initialise_head(model, seed)
    _freeze(model, settings.freeze)
    return model


def check_freeze(what: str, layers: int) -> None:
    """Raises UserError if more layers are to be frozen than the model has."""
    if what.isdecimal() and int(what) > layers:
        raise UserError(f"{option('freeze')}: the model has {layers} layers, got {what}")


def _freeze(model: TaskModel, what: str) -> None:
    encoder = model.encoder
    if what == "encoder":
        encoder.requires_grad_(False)
    elif what != "none":
        lowest = int(what) if what.isdecimal() else 0
        for module in (encoder.embeddings, encoder.embeddings_project, *encoder.layers[:lowest]):
            if module is not None:
                module.requires_grad_(False)
