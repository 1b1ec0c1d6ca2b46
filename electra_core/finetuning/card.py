"""README.md of a fine-tuned model: where it comes from, its figures, and the header that the Hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from electra_core.downstream.interface import Task
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.hub.layout import changed_classes
from electra_core.hub.model_places import SHIPPED, is_name, name_in_card
from electra_core.metrics import shown_name
from electra_core.tasks import MultipleChoice, QuestionAnswerer, SequenceClassifier, TaskModel, TokenClassifier
from electra_core.version import version

PIPELINES = {
    SequenceClassifier: "text-classification", TokenClassifier: "token-classification",
    QuestionAnswerer: "question-answering", MultipleChoice: "multiple-choice",
}  # fmt: skip
"""The Hub's names for what the models do."""
HUB_METRICS = {
    **{name: name for name in ("accuracy", "precision", "recall", "f1", "exact_match", "mse", "mae")},
    "mcc": "matthews_correlation", "auc": "roc_auc", "pearson": "pearsonr", "spearman": "spearmanr",
}  # fmt: skip
"""The Hub's names for our figures; it has none for the others."""


@dataclass(frozen=True)
class About:
    """What a card says of the training."""

    text: str
    """Where the model comes from."""
    base_model: str = ""
    """The model on the Hub that training started from; "": none."""


def model_card(model: TaskModel, task: Task, about: About, place: str, metrics: dict[str, float]) -> str:
    """The card of a model.

    Args:
        place: at which step and seed it was evaluated.
        metrics: the evaluation's figures.
    """
    figures = shown(metrics, as_markdown(task.positive))
    return (
        f"{header(model, about.base_model, metrics)}# {task.kind}\n\n{about.text}\n\nOn the development data, "
        f"after {place}: {figures}.\n"
    )


def header(model: TaskModel, base_model: str, metrics: Iterable[str]) -> str:
    """The card's YAML: what is known of the model, and so no license. A model with classes of the user's own does
    not open in transformers."""
    opens_there = not changed_classes(model)
    facts: dict[str, str | list[str]] = {"library_name": "transformers" if opens_there else "electra-core"}
    if opens_there:
        facts["pipeline_tag"] = PIPELINES[type(model)]
    facts["tags"] = ["electra"]
    if known := [HUB_METRICS[name] for name in metrics if name in HUB_METRICS]:
        facts["metrics"] = known
    if base_model:
        facts["base_model"] = base_model
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in facts.items()]  # JSON is YAML
    return f"---\n{''.join(lines)}---\n"


def about_training(
    model: str | Path,
    task: Task,
    settings: FinetuneSettings,
    same: dict[str, dict[str, Any]],
    examples: int,
    dev: int,
) -> About:
    """What the card says of a training.

    Args:
        model: what training starts from, as given.
        same: the training's `identity`.
        examples, dev: numbers of training and development examples.
    """
    start = f"{name_in_card(model)} (weights `{same['start']['weights'][:16]}`)"
    began = f"random weights, in the sizes of {name_in_card(model)}" if settings.random_start else start
    chosen_by = shown_name(task.metric, task.figures, as_markdown(task.positive))
    text = (
        f"Fine-tuned with electra-core {version()} from {began} on {examples:,} examples of up to "
        f"{task.max_length} tokens. Another {dev:,}, the development data, chose the best evaluation by "
        f"{chosen_by}."
    )
    of_hub = is_name(model) and str(model) != SHIPPED and not settings.random_start
    return About(text, str(model) if of_hub else "")


def shown(metrics: dict[str, float], positive: str = "") -> str:
    """The figures in one line; `positive` is the class that a figure such as f1 is of."""
    return ", ".join(f"{shown_name(name, metrics, positive)} {value:.4g}" for name, value in metrics.items())


def as_markdown(label: str) -> str:
    r"""A label within a line of Markdown: what is markup shows as it is, and no line ends.

    >>> as_markdown("a\n\n# <b>")
    'a # \\<b\\>'
    """
    return re.sub(r"([\\`*\[\]<>&])", r"\\\1", " ".join(label.split()))
