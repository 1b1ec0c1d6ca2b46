"""Classification and regression of a text or a pair of texts."""

from __future__ import annotations

import functools
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from electra_core.downstream.interface import Task
from electra_core.errors import UserError, option
from electra_core.labelled_data.columns import Columns, may_be_header
from electra_core.labelled_data.features import TRUNCATIONS, Features, TaskBatch, truncate, truncate_pair
from electra_core.labelled_data.label_cells import label_text, labels_as_texts
from electra_core.labelled_data.labelled import (
    BadRows,
    TextExample,
    label_counts,
    labels_in,
    read_texts,
    relabelled,
)
from electra_core.metrics import (
    OF_NUMBERS,
    OF_SCORES,
    classification_metrics,
    of_classes,
    ranking_metrics,
    regression_metrics,
)
from electra_core.tasks import SequenceClassifier, TaskModel, classification_loss, regression_loss
from electra_core.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self  # in `typing` from Python 3.11


@dataclass(frozen=True)
class TextTask(Task):
    """Base of the classification and regression tasks: each example is a text or a pair, one sequence each."""

    columns: Columns = field(default_factory=Columns)
    """Which columns of the files hold texts and labels."""
    max_length: int = 128
    """Maximum number of tokens per sequence, [CLS] and [SEP] included."""
    truncate: str = "head"
    """Which part of longer texts is kept: head | tail | both."""
    both_orders: bool = False
    """Train on (a, b) and (b, a): for pairs whose order has no meaning."""
    pairs: bool | None = None
    """Whether the model was trained on pairs, and so accepts nothing else; None: unknown, both are read."""

    model_class: ClassVar = SequenceClassifier
    several: ClassVar[bool] = False
    """Whether a text may have any number of labels."""

    def __post_init__(self) -> None:
        if self.truncate not in TRUNCATIONS:
            raise ValueError(f"truncate: expected one of {', '.join(TRUNCATIONS)}, got {self.truncate!r}")

    def encode(self, examples: Sequence[TextExample], tokenizer: Tokenizer, *, training: bool = False) -> Features:
        """One sequence per example; with `both_orders`, two in training."""
        features = Features(tokenizer.cls_id, tokenizer.sep_id)
        firsts = tokenizer.encode_each(example.text for example in examples)
        seconds = tokenizer.encode_each(e.pair for e in examples if e.pair is not None)
        for index, (example, first) in enumerate(zip(examples, firsts)):
            target = self._target(example)
            if example.pair is None:
                kept = truncate(first, self.max_length - 2, self.truncate)
                features.truncated += len(kept) < len(first)
                features.add(index, kept, None, target)
                continue
            second = next(seconds)
            a, b = truncate_pair(first, second, self.max_length - 3, self.truncate)
            features.truncated += len(a) + len(b) < len(first) + len(second)
            features.add(index, a, b, target)
            if training and self.both_orders:  # truncated anew: of equally long texts the second is cut first
                features.add(index, *truncate_pair(second, first, self.max_length - 3, self.truncate), target)
        return features

    def _read(self, path: Path | str, bad: BadRows, labelled: bool) -> Iterator[TextExample]:
        """Examples as in the file; a pair where the task takes single texts, or the reverse, is a bad row."""
        pairs = True if self.pairs is None and self.columns.pair is not None else self.pairs
        for example in read_texts(path, self.columns, bad, labelled=labelled, several=self.several):
            if pairs is None or pairs == (example.pair is not None):
                yield example
            elif pairs:
                bad.add(example.place, "a single text instead of a pair (expected two text columns)")
            else:
                bad.add(example.place, "a pair of texts instead of a single text (expected one text column)")

    def header_hint(self, path: Path | str, example: TextExample) -> str:
        """A hint for the message about an unusable label: its line may be the header."""
        is_suspect = may_be_header(Path(path), example.line, self.columns)
        return "; if this line is the header: --header" if is_suspect else ""

    def from_value(self, value: Any, name: str) -> TextExample:
        """A text, a pair of texts, or {"text": ..., "pair": ...}."""
        if isinstance(value, dict):
            text, pair = value.get("text"), value.get("pair")
        elif isinstance(value, (tuple, list)) and len(value) == 2 and value[1] is not None:
            text, pair = value
        else:
            text, pair = value, None
        if isinstance(text, str) and isinstance(pair, str | None):
            if self.pairs is not None and self.pairs != (pair is not None):
                differ = "pairs of texts, got a single text" if self.pairs else "single texts, got a pair of texts"
                raise ValueError(f"inputs: this model was trained on {differ}: {value!r:.80}")
            if not text.strip() or (pair is not None and not pair.strip()):
                raise ValueError(f"inputs: expected a text that is not empty, got {value!r:.80}")
            return TextExample(name, 0, text, pair)
        raise ValueError(f"inputs: expected a text or a pair of texts, got {value!r:.80}")

    def is_one(self, value: tuple[Any, ...]) -> bool:
        """Whether it is a pair of texts; where the model was not trained on pairs, it may be two texts."""
        return bool(self.pairs) and len(value) == 2 and all(isinstance(text, str) for text in value)

    @abstractmethod
    def _target(self, example: TextExample) -> Any:
        """The loss's target for an example's label as read; None if the example has no label."""


DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+")
WHOLE = re.compile(r"-?\d+\.0+")
"""A whole number written as a fraction."""


@functools.cache
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """The numbers as a tensor, copied once: during a CUDA graph's capture nothing can be copied from the host."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Classify(TextTask):
    """One of several classes for a text or a pair."""

    kind: ClassVar[str] = "classify"

    labels: tuple[str, ...] = ()
    """Class names in the order of the model's outputs; learned from the training data if empty."""
    label_names: tuple[tuple[str, str], ...] = ()
    """(as written in the file, as shown) where those differ: ("1", "positive")."""
    metric: str = "accuracy"
    """The metric that chooses the best checkpoint."""
    class_weights: tuple[float, ...] = ()
    """Weight of each class in the loss; all 1 if empty."""
    positive_class: str = ""
    """Of two classes the one that f1, average_precision and `threshold` are of; the second if empty."""
    threshold: float | None = None
    """Of two classes: the least score at which the positive one is the answer; None: the larger score is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "labels", labels_as_texts(self.labels))
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            got = self.threshold
            raise ValueError(f"{option('threshold')}: expected a probability from 0 to 1, got {got!r}")
        object.__setattr__(self, "positive_class", self._positive_name())

    def _positive_name(self) -> str:
        """The name among the labels of the positive class, which may be given as in a file; "": none is chosen.

        Raises:
            ValueError: another name; or it, or a threshold, with more than two classes.
        """
        given = label_text(self.positive_class) or ""  # may be a number
        if not self.labels:  # not known yet
            return given
        for name, value in (("positive_class", given or None), ("threshold", self.threshold)):
            if value is not None and len(self.labels) != 2:
                raise ValueError(f"{option(name)}: no effect with {len(self.labels)} classes, only with two")
        # `_shown` only where it is asked: the names of a damaged task.json are told of later, and better.
        positive = given if not given or given in self.labels else self._shown(given)
        if positive and positive not in self.labels:
            either = " or ".join(map(repr, self.labels))
            raise ValueError(f"{option('positive_class')}: expected {either}, got {given!r}")
        return positive

    @property
    def positive(self) -> str:
        """See `Task`."""
        return (self.positive_class or self.labels[1]) if len(self.labels) == 2 else ""

    @property
    def _shown(self) -> Callable[[str], str]:
        """A label as written in a file -> its name."""
        return as_shown(self.labels, self.label_names)

    @property
    def figures(self) -> tuple[str, ...]:
        """See `Task`."""
        return (*of_classes(self.labels), *(OF_SCORES if len(self.labels) == 2 else ()))

    def read(self, path: Path | str, bad: BadRows, *, labelled: bool = True) -> Iterator[TextExample]:
        """Examples of a file or folder; a label that training did not see makes a bad row."""
        shown = self._shown
        examples: Iterable[TextExample] = self._read(path, bad, labelled)
        if labelled and not self.labels:
            examples = without_fractions(list(examples))
        for example in examples:
            if example.label is not None:
                example = replace(example, label=shown(example.label))
                if labelled and self.labels and example.label not in self.labels:
                    known = f"known: {', '.join(self.labels[:10])}{self.header_hint(path, example)}"
                    bad.add(example.place, f"the label is not in the training data ({example.label!r}; {known})")
                    continue
            yield example

    def fitted(self, examples: Sequence[TextExample]) -> Classify:
        """The task with the labels of its training examples, in a fixed order."""
        task = replace(self, pairs=any(example.pair is not None for example in examples))
        if self.labels:
            return task
        labels = sorted({e.label for e in examples if e.label is not None}, key=label_order)
        if len(labels) < 2:
            raise UserError(f"every training example has the label {labels[0]!r}; there is nothing to learn")
        try:
            return replace(task, labels=tuple(labels))
        except ValueError as error:  # a positive class that is none of them
            raise UserError(str(error)) from None

    def balanced(self, examples: Sequence[TextExample]) -> Classify:
        """The task with class weights inversely proportional to class frequency; their mean over examples is 1."""
        counts = label_counts(examples)
        weights = len(examples) / (len(self.labels) * np.array([max(counts[label], 1) for label in self.labels]))
        return replace(self, class_weights=tuple(weights.tolist()))

    def _target(self, example: TextExample) -> int | None:
        return self.labels.index(example.label) if example.label in self.labels else None

    def loss(self, logits_NC: Tensor, batch: TaskBatch) -> Tensor:
        """Cross-entropy."""
        weights = _on_device(self.class_weights, logits_NC.device) if self.class_weights else None
        return classification_loss(logits_NC, batch.targets, weights)

    def weight(self, batch: TaskBatch) -> float:
        """The number of sequences, or the sum of their classes' weights."""
        if not self.class_weights:
            return super().weight(batch)
        return sum(self.class_weights[target] for target in batch.targets.tolist())

    def decode(
        self, examples: Sequence[TextExample], features: Features, outputs: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """For each example: label, score (its probability), scores (of every label)."""
        return [self._prediction(softmax(logits_1C[0])) for logits_1C in outputs]

    def _prediction(self, probabilities_C: np.ndarray) -> dict[str, Any]:
        best = int(probabilities_C.argmax())
        if self.threshold is not None:
            place = self.labels.index(self.positive)
            best = place if probabilities_C[place] >= self.threshold else 1 - place
        scores = dict(zip(self.labels, probabilities_C.tolist()))
        return {"label": self.labels[best], "score": float(probabilities_C[best]), "scores": scores}

    def score(self, examples: Sequence[TextExample], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """accuracy, mcc, macro_f1; for two classes also f1 of the positive one and, if the examples are of both,
        auc and average_precision from its scores."""
        truth = [self.labels.index(example.label or "") for example in examples]
        predicted = [self.labels.index(prediction["label"]) for prediction in predictions]
        place = self.labels.index(self.positive) if self.positive else 1
        figures = classification_metrics(truth, predicted, len(self.labels), positive=place)
        if self.positive and all("scores" in prediction for prediction in predictions):
            figures |= ranking_metrics(np.equal(truth, place), [p["scores"][self.positive] for p in predictions])
        return figures

    def constant_guess(self, examples: Sequence[TextExample]) -> tuple[str, list[dict[str, Any]]]:
        """The most frequent class, with each class's frequency as its score."""
        counts = label_counts(examples)
        scores = {label: counts[label] / len(examples) for label in self.labels}
        label, _ = counts.most_common(1)[0]
        guess = {"label": label, "score": counts[label] / len(examples), "scores": scores}
        return "the most frequent class", [guess] * len(examples)


@dataclass(frozen=True)
class Regress(TextTask):
    """A number for a text or a pair. The model learns (number - offset) / scale."""

    kind: ClassVar[str] = "regress"

    offset: float = 0.0
    """Subtracted from the labels."""
    scale: float = 0.0
    """Divides the labels. 0: learn mean and standard deviation from the training data."""
    metric: str = "pearson_and_spearman"
    """The metric that chooses the best checkpoint."""

    labels: tuple[str, ...] = ("value",)
    """The one output's name."""

    figures = OF_NUMBERS

    def read(self, path: Path | str, bad: BadRows, *, labelled: bool = True) -> Iterator[TextExample]:
        """Examples of a file; a label that is not a number makes a bad row."""
        for example in self._read(path, bad, labelled):
            if example.label is not None and _number(example.label) is None:
                if labelled:
                    hint = "; a decimal comma?" if DECIMAL_COMMA.fullmatch(example.label) else ""
                    hint += self.header_hint(path, example)
                    bad.add(example.place, f"the label is not a number ({example.label!r}{hint})")
                    continue
                example = replace(example, label=None)
            yield example

    def fitted(self, examples: Sequence[TextExample]) -> Regress:
        """The task with mean and standard deviation of its training labels, unless a scale is given."""
        task = replace(self, pairs=any(example.pair is not None for example in examples))
        if self.scale:
            return task
        values = [float(example.label) for example in examples if example.label is not None]
        if len(set(values)) < 2:  # the standard deviation of equal values may come out not quite 0
            raise UserError(f"every training example has the label {values[0]:g}; there is nothing to learn")
        with np.errstate(over="ignore", invalid="ignore"):
            mean, deviation = float(np.mean(values)), float(np.std(values))
        if not np.isfinite(deviation):
            raise UserError(f"the labels are too large to learn from (up to {max(values, key=abs):g})")
        return replace(task, offset=mean, scale=deviation)

    def _target(self, example: TextExample) -> float | None:
        return None if example.label is None else (float(example.label) - self.offset) / self.scale

    def loss(self, logits_N1: Tensor, batch: TaskBatch) -> Tensor:
        """Mean squared error of the scaled values."""
        return regression_loss(logits_N1, batch.targets)

    def decode(
        self, examples: Sequence[TextExample], features: Features, outputs: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """For each example: value."""
        return [{"value": float(logits_11[0, 0]) * self.scale + self.offset} for logits_11 in outputs]

    @contextmanager
    @torch.no_grad()
    def as_saved(self, model: TaskModel) -> Iterator[Self]:
        """Folds offset and scale into the model's last layer, so that its output is the number itself."""
        assert isinstance(model, SequenceClassifier)
        weight, bias = model.classifier.out_proj.weight, model.classifier.out_proj.bias
        before = weight.clone(), bias.clone()
        weight.mul_(self.scale)
        bias.mul_(self.scale).add_(self.offset)
        try:
            yield replace(self, offset=0.0, scale=1.0)
        finally:
            weight.copy_(before[0])
            bias.copy_(before[1])

    @torch.no_grad()
    def as_trained(self, model: TaskModel) -> None:
        """Undoes `as_saved`: the output, a number as in the data, becomes (number - offset) / scale again."""
        assert isinstance(model, SequenceClassifier)
        last = model.classifier.out_proj
        last.weight.div_(self.scale)
        last.bias.sub_(self.offset).div_(self.scale)

    def score(self, examples: Sequence[TextExample], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """pearson, spearman, their mean, mse and mae (mean squared and mean absolute error)."""
        truth = [float(example.label or "nan") for example in examples]
        return regression_metrics(truth, [prediction["value"] for prediction in predictions])

    def constant_guess(self, examples: Sequence[TextExample]) -> tuple[str, list[dict[str, Any]]]:
        """The mean."""
        mean = float(np.mean([float(example.label or "nan") for example in examples]))
        return "the mean", [{"value": mean}] * len(examples)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis, in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _value(text: str) -> float | None:
    """The text as a number; true and false are 1 and 0, as `labelled_data.label_cells.label_text` makes them of
    JSON's."""
    return {"true": 1.0, "false": 0.0}.get(text.lower(), _number(text))


def as_shown(labels: Iterable[str], names: Iterable[tuple[str, str]] = ()) -> Callable[[str], str]:
    """A function from a label as written in a file to one of `labels`, or to its name in `names` (as written, as
    shown). Numbers match in any form (pandas writes 1 as 1.0 where a row has no label); any other label stays as
    written."""
    shown = {label: label for label in labels} | dict(names)
    same = {_value(written): label for written, label in shown.items() if _value(written) is not None}
    return lambda written: shown.get(written) or same.get(_value(written), written)


def without_fractions(examples: Sequence[TextExample]) -> Sequence[TextExample]:
    """1.0 becomes 1 if all labels have that form, in which pandas writes whole numbers where some are missing."""
    if not all(WHOLE.fullmatch(label) for example in examples for label in labels_in(example)):
        return examples
    return [relabelled(example, lambda label: label.partition(".")[0]) for example in examples]


def label_order(label: str) -> tuple[float, str]:
    """Sort key: numbers by value, then other labels alphabetically."""
    value = _number(label)
    return (float("inf") if value is None else value, label)
