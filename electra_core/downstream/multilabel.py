"""Multi-label classification: a text or a pair of texts may have any number of labels, including none.

Each label is a separate decision: the logits are those of a classifier (`tasks.SequenceClassifier`), but each goes
through a sigmoid, and a text gets the labels whose probability is at least `threshold`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from electra_core.downstream.classify import TextTask, as_shown, label_order, without_fractions
from electra_core.errors import UserError, listed, option
from electra_core.labelled_data.features import Features, TaskBatch
from electra_core.labelled_data.label_cells import labels_as_texts
from electra_core.labelled_data.labelled import (
    BadRows,
    MultiLabelExample,
    TextExample,
    label_counts,
    labels_in,
    relabelled,
)
from electra_core.metrics import OF_LABEL_SETS, multilabel_metrics
from electra_core.tasks import SequenceClassifier, TaskModel, multilabel_loss

if TYPE_CHECKING:
    from typing_extensions import Self  # in `typing` from Python 3.11

SHOWN = 10  # labels that a message names


@dataclass(frozen=True)
class MultiLabel(TextTask):
    """Any number of labels for a text or a pair."""

    kind: ClassVar[str] = "multilabel"
    several: ClassVar[bool] = True

    labels: tuple[str, ...] = ()
    """Names in the order of the model's outputs; learned from the training data if empty."""
    threshold: float = 0.5
    """A text gets the labels with at least this probability."""
    metric: str = "mean_average_precision"
    """The metric that chooses the best checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "labels", labels_as_texts(self.labels))
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"{option('threshold')}: expected a probability from 0 to 1, got {self.threshold!r}")

    figures = OF_LABEL_SETS

    def read(self, path: Path | str, bad: BadRows, *, labelled: bool = True) -> Iterator[TextExample]:
        """Examples of a file or folder; a label that training did not see makes a bad row.

        Raises:
            UserError: as `labelled_data.labelled.read_texts`; or the labels' own columns are not those of the
                model's labels.
        """
        examples = (_with_several(example) for example in self._read(path, bad, labelled))
        if not labelled:
            yield from examples
        elif not self.labels:
            yield from without_fractions(list(examples))
        else:
            if self.columns.labels and {*self.columns.labels} != {*self.labels}:
                raise UserError(
                    f"{path}: expected one column per label of the model ({listed(self.labels, SHOWN)}), got "
                    f"{listed(self.columns.labels, SHOWN)}"
                )
            yield from self._known(examples, path, bad)

    def _known(self, examples: Iterator[TextExample], path: Path | str, bad: BadRows) -> Iterator[TextExample]:
        """The examples, with the task's spelling of their labels; one with an unknown label is a bad row."""
        shown, known = as_shown(self.labels), {*self.labels}
        for example in examples:
            example = relabelled(example, shown)
            if unknown := next((label for label in labels_in(example) if label not in known), None):
                hint = f"known: {listed(self.labels, SHOWN)}{self.header_hint(path, example)}"
                bad.add(example.place, f"a label is not in the training data ({unknown!r}; {hint})")
            else:
                yield example

    def fitted(self, examples: Sequence[MultiLabelExample]) -> MultiLabel:
        """The task with its training examples' labels in a fixed order: that of the label columns, if any."""
        task = replace(self, pairs=any(example.pair is not None for example in examples))
        if self.labels:
            return task
        counts = label_counts(examples)
        if not counts:
            raise UserError("no training example has a label; there is nothing to learn")
        if set(counts.values()) == {len(examples)}:
            raise UserError(
                f"every training example has the same labels ({listed([*counts], SHOWN)}); "
                "there is nothing to learn"
            )
        return replace(task, labels=self.columns.labels or tuple(sorted(counts, key=label_order)))

    def _target(self, example: TextExample) -> np.ndarray | None:
        """uint8 [C]: 1 for the labels that the example has, else 0."""
        if not isinstance(example, MultiLabelExample) or example.labels is None:
            return None
        return self._marks([example.labels])[0]

    def _marks(self, labels: Sequence[Sequence[str]]) -> np.ndarray:
        """uint8 [N, C]: 1 where an example has the label, else 0."""
        marks = np.zeros((len(labels), len(self.labels)), dtype=np.uint8)
        for row, names in zip(marks, labels):
            row[[self._places[name] for name in names]] = 1
        return marks

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {label: place for place, label in enumerate(self.labels)}

    def loss(self, logits_NC: Tensor, batch: TaskBatch) -> Tensor:
        """Binary cross-entropy of every label."""
        return multilabel_loss(logits_NC, batch.targets)

    def decode(
        self, examples: Sequence[TextExample], features: Features, outputs: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """For each example: labels (the most probable first), scores (probabilities of every label)."""
        return [self._prediction(sigmoid(logits_1C[0])) for logits_1C in outputs]

    def _prediction(self, probabilities_C: np.ndarray) -> dict[str, Any]:
        scores = dict(zip(self.labels, probabilities_C.tolist()))
        order = np.argsort(-probabilities_C, kind="stable").tolist()
        labels = [self.labels[place] for place in order if probabilities_C[place] >= self.threshold]
        return {"labels": labels, "scores": scores}

    def score(
        self, examples: Sequence[MultiLabelExample], predictions: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        """mean_average_precision, micro_f1, macro_f1, subset_accuracy."""
        return multilabel_metrics(*self.matrices(examples, predictions))

    def matrices(
        self, examples: Sequence[MultiLabelExample], predictions: Sequence[dict[str, Any]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each [N, C]: which labels the examples have and which were predicted (0 or 1), and the probabilities."""
        truth = self._marks([labels_in(example) for example in examples])
        predicted = self._marks([prediction["labels"] for prediction in predictions])
        scores = [[prediction["scores"][label] for label in self.labels] for prediction in predictions]
        return truth, predicted, np.array(scores, dtype=float).reshape(truth.shape)

    def constant_guess(self, examples: Sequence[MultiLabelExample]) -> tuple[str, list[dict[str, Any]]]:
        """The most frequent set of labels, with each label's frequency as its score."""
        sets = Counter(frozenset(labels_in(example)) for example in examples)
        counts = label_counts(examples)
        guess = {
            "labels": [label for label in self.labels if label in sets.most_common(1)[0][0]],
            "scores": {label: counts[label] / len(examples) for label in self.labels},
        }
        return "the most frequent set of labels", [guess] * len(examples)

    @contextmanager
    def as_saved(self, model: TaskModel) -> Iterator[Self]:
        """Makes config.json say that a text may have any number of labels."""
        assert isinstance(model, SequenceClassifier)
        before, model.multi_label = model.multi_label, True
        try:
            yield self
        finally:
            model.multi_label = before


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities, in float64."""
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))


def _with_several(example: TextExample) -> MultiLabelExample:
    """The example as a `MultiLabelExample`; one from a folder per label has a single label."""
    if isinstance(example, MultiLabelExample):
        return example
    labels = None if example.label is None else (example.label,)
    return MultiLabelExample(example.id, example.line, example.text, example.pair, None, labels)
