"""The interface of a downstream task: all that differs between classifying, tagging, answering and choosing.

A task knows how to read its examples, encode them, compute the loss, turn logits into predictions and score
those. Training (`finetune.py`) and prediction (`predict.py`) are the same code for all of them. A task is a
frozen dataclass of plain values; `task.json` in a model directory holds them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from electra_core.config import EncoderConfig
from electra_core.errors import UserError
from electra_core.labelled_data.features import Features, TaskBatch
from electra_core.labelled_data.labelled import BadRows
from electra_core.runs.progress import progress
from electra_core.tasks import MultipleChoice, QuestionAnswerer, TaskModel
from electra_core.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self  # in `typing` from Python 3.11

CHUNK = 1000  # examples tokenised between two updates of the progress bar


class Task(ABC):
    """Base of all tasks. Each has its own type of example (`TextExample`, ...); predictions are dicts for JSON."""

    kind: ClassVar[str]
    """The task's name on the command line: classify, multilabel, regress, tag, qa, choose, or that of a class of
    your own (`task_files.register_task`)."""
    model_class: ClassVar[type[TaskModel]]
    """The model that solves it."""
    labels: tuple[str, ...]
    """Names of the outputs; empty where they have none, or until the training data supply them."""
    metric: str
    """The metric that chooses the best checkpoint; higher is better."""
    max_length: int
    """Maximum number of tokens per sequence, [CLS] and [SEP] included."""

    @property
    def figures(self) -> tuple[str, ...]:
        """The figures of `score` that may be the `metric`, higher being better; known once the labels are."""
        return (self.metric,)

    @property
    def positive(self) -> str:
        """Of two classes the one that f1 and average_precision are of; "" for any other task."""
        return ""

    @abstractmethod
    def read(self, path: Path | str, bad: BadRows, *, labelled: bool = True) -> Iterator[Any]:
        """Examples of a file, in its order; rows that cannot be used go to `bad`."""

    @abstractmethod
    def from_value(self, value: Any, name: str) -> Any:
        """One example from a caller's input to a pipeline: a text, a pair, a dict.

        Raises:
            ValueError: the value has another form.
        """

    def is_one(self, value: tuple[Any, ...]) -> bool:
        """Whether a tuple given to a pipeline is one value for `from_value`, not several."""
        return False

    @abstractmethod
    def fitted(self, examples: Sequence[Any]) -> Self:
        """The task with what it takes from its training examples: labels, scale, ...

        Raises:
            UserError: nothing can be learned from them.
        """

    @abstractmethod
    def encode(self, examples: Sequence[Any], tokenizer: Tokenizer, *, training: bool = False) -> Features:
        """Token ids and targets; one or more units per example."""

    @abstractmethod
    def loss(self, logits: Tensor, batch: TaskBatch) -> Tensor:
        """A scalar, from the model's logits: a mean over what `weight` counts."""

    def weight(self, batch: TaskBatch) -> float:
        """What the batch's loss is a mean over: units, words, weights of classes.

        It weighs the batches of an accumulated step, so that loss and gradient are those of one large batch.
        """
        return float(len(batch.unit_starts) - 1)

    @abstractmethod
    def decode(
        self, examples: Sequence[Any], features: Features, outputs: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """One prediction per example, from the logits of every unit of `features`, in its order."""

    @abstractmethod
    def score(self, examples: Sequence[Any], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Figures of merit by name; `metric` is among them."""

    def constant_guess(self, examples: Sequence[Any]) -> tuple[str, list[dict[str, Any]]] | None:
        """The best answer that looks at no input, in words, and its prediction for each of these examples; None:
        there is nothing to compare with.

        The predictions have the form that `decode` gives them. So a class that changes `decode` has its own
        constant guess or none: an inherited one is not used.
        """
        return None

    def tuned(self, examples: Sequence[Any], predictions: Sequence[dict[str, Any]]) -> Self:
        """The task with what is tuned on the dev data after training (a threshold)."""
        return self

    def as_saved(self, model: TaskModel) -> AbstractContextManager[Self]:
        """A context in which the model is in the form to be saved; gives the task to save with it."""
        return nullcontext(self)

    def as_trained(self, model: TaskModel) -> None:  # noqa: B027
        """Puts a saved model back into the form for training, in place: the inverse of `as_saved`."""


def baseline(task: Task, examples: Sequence[Any]) -> tuple[str, dict[str, float]] | None:
    """The task's constant guess, in words, and its figures on these examples; None if the task has none."""
    if _distance(type(task), "decode") < _distance(type(task), "constant_guess"):
        return None
    if (guess := task.constant_guess(examples)) is None:
        return None
    return guess[0], task.score(examples, guess[1])


def knows_its_figures(task: Task) -> bool:
    """Whether `figures` names all that `score` gives: it is not inherited where `score` is the class's own."""
    return _distance(type(task), "figures") <= _distance(type(task), "score")


def _distance(kind: type, name: str) -> int:
    """How far up the classes that `kind` derives from an attribute is defined; 0: in `kind` itself."""
    return next(place for place, base in enumerate(kind.__mro__) if name in vars(base))


def check_segments(task: Task, config: EncoderConfig, where: str | Path, examples: Iterable[Any] = ()) -> None:
    """Raises UserError if the task, or one of the examples, has two texts and the model can read only one."""
    if config.type_vocab_size > 1:
        return
    if issubclass(task.model_class, QuestionAnswerer | MultipleChoice) or any(
        getattr(example, "pair", None) is not None for example in examples
    ):
        raise UserError(
            f"{where}: the model reads single texts only (type_vocab_size is 1 in its config.json), not pairs, "
            "questions or choices"
        )


def read_all(task: Task, path: Path | str, *, skip_bad_rows: bool = False) -> tuple[list[Any], BadRows]:
    """All labelled examples of a file, and the rows that were skipped.

    Raises:
        UserError: a bad row (unless they are skipped), or no example at all.
    """
    bad = BadRows(path, skip_bad_rows)
    examples = list(task.read(path, bad))
    if not examples:
        raise UserError(f"{path}: no usable row ({bad.first[0] if bad.first else 'the file is empty'})")
    return examples, bad


def encode_all(
    task: Task, examples: Sequence[Any], tokenizer: Tokenizer, *, training: bool = False, quiet: bool = True
) -> Features:
    """`task.encode` in steps, with a progress bar."""
    features: Features | None = None
    with progress("tokenise", len(examples), "examples", quiet=quiet) as bar:
        for start in range(0, len(examples), CHUNK):
            part = task.encode(examples[start : start + CHUNK], tokenizer, training=training)
            if features is None:
                features = part
            else:
                features.extend(part, start)
            bar.update(min(CHUNK, len(examples) - start))
    return features if features is not None else task.encode([], tokenizer)
