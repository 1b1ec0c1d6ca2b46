"""Multiple choice: a text, and endings of which one is right."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from electra_core.classify import softmax
from electra_core.downstream import Task
from electra_core.features import Features, TaskBatch, truncate_pair
from electra_core.labelled import (
    TEXT_NAMES,
    BadRows,
    Columns,
    Ids,
    alternatives,
    checked,
    label_text,
    table,
    text_cell,
)
from electra_core.row_files import Row, text_problem
from electra_core.tasks import MultipleChoice, choice_loss
from electra_core.tokenizer import Tokenizer

CHOICE_TEXT_NAMES = ("question", "startphrase", "context", "premise", *TEXT_NAMES)
ANSWER_NAMES = ("label", "answerKey", "answer")
ENDING = re.compile(r"(?:ending|choice|option)_?(\d+)")


@dataclass(frozen=True, slots=True)
class ChoiceExample:
    """A text and the endings to choose from; `label` is the index of the right one."""

    id: str
    line: int
    text: str
    choices: tuple[str, ...]
    label: int | None = None


def read_choices(
    path: Path | str, columns: Columns | None = None, bad: BadRows | None = None, *, labelled: bool = True
) -> Iterator[ChoiceExample]:
    """Rows with a text and a list `choices` (or the Hub's {"text": [...]}), or columns `ending0`, `ending1`, ...

    The label is the right one's index from 0, or its letter A, B, ...

    Raises:
        UserError: as `labelled.read_texts`.
    """
    path, columns = Path(path), columns or Columns()
    bad = bad or BadRows(path)
    yield from checked(path, _examples(path, columns, bad, labelled), bad)


def _examples(path: Path, columns: Columns, bad: BadRows, labelled: bool) -> Iterator[ChoiceExample]:
    ids = Ids(labelled)
    for row in table(path, columns):
        example, problem = (None, row.problem) if row.problem else _choice(row, columns, labelled)
        if example is not None and "id" in row.cells:
            problem = ids.problem(example.id)
        if problem or example is None:
            bad.add(row.line, problem)
        else:
            yield example


def _choice(row: Row, columns: Columns, labelled: bool) -> tuple[ChoiceExample | None, str]:
    names = alternatives(columns.text) or CHOICE_TEXT_NAMES
    text_column = next((name for name in names if name in row.cells), names[0])
    text, problem = text_cell(row, text_column)
    if problem:
        return None, problem
    choices = _endings(row.cells)
    if len(choices) < 2:
        return None, "fewer than two choices (expected a list 'choices', or columns ending0, ending1, ...)"
    for number, choice in enumerate(choices):
        if problem := text_problem(choice) or ("" if choice.strip() else "a choice is empty"):
            return None, f"{problem} (choice {number})"
    names = alternatives(columns.label) or ANSWER_NAMES
    label = label_text(next((row.cells[name] for name in names if name in row.cells), None))
    if label is None and labelled:
        return None, "the label is missing"
    index = None if label is None else _index(label)
    if index is not None and not 0 <= index < len(choices):
        return None, f"the label names no choice ({label!r} of {len(choices)})"
    return ChoiceExample(str(row.cells.get("id", row.line)), row.line, text, choices, index), ""


def _index(label: str) -> int:
    """ "2" -> 2, "C" -> 2; -1 if it is neither."""
    if label.isdigit():
        return int(label)
    return ord(label.upper()) - ord("A") if len(label) == 1 else -1


def _endings(cells: dict[str, Any]) -> tuple[str, ...]:
    choices = cells.get("choices")
    if isinstance(choices, dict):
        choices = choices.get("text")
    if isinstance(choices, list):
        return tuple("" if choice is None else str(choice) for choice in choices)
    numbered = {name: match for name in cells if (match := ENDING.fullmatch(name))}
    names = sorted(numbered, key=lambda name: int(numbered[name].group(1)))
    return tuple("" if cells[name] is None else str(cells[name]) for name in names)


@dataclass(frozen=True)
class Choose(Task):
    """Which of several endings fits a text; examples may have different numbers of endings."""

    kind: ClassVar[str] = "choose"
    model_class: ClassVar = MultipleChoice

    labels: tuple[str, ...] = ()
    """There are none: the endings compete with each other."""
    columns: Columns = field(default_factory=Columns)
    """Where the text and the label stand."""
    max_length: int = 128
    """Tokens of text and ending together at most, special tokens included."""
    metric: str = "accuracy"
    """Which figure chooses the best checkpoint."""

    def read(self, path: Path | str, bad: BadRows, *, labelled: bool = True) -> Iterator[ChoiceExample]:
        """Examples of a file."""
        return read_choices(path, self.columns, bad, labelled=labelled)

    def from_value(self, value: Any, name: str) -> ChoiceExample:
        """(text, [ending, ...]), or {"text": ..., "choices": [...]}."""
        if isinstance(value, dict):
            value = (value.get("text"), value.get("choices"))
        if isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], str) and value[1]:
            return ChoiceExample(name, 0, value[0], tuple(value[1]))
        raise ValueError(f"inputs: expected a text and its endings, got {value!r:.80}")

    def fitted(self, examples: Sequence[ChoiceExample]) -> Choose:
        """The task itself: there is nothing to learn from the labels."""
        return self

    def encode(
        self, examples: Sequence[ChoiceExample], tokenizer: Tokenizer, *, training: bool = False
    ) -> Features:
        """`[CLS] text [SEP] ending [SEP]` for every ending; a question's sequences stay together."""
        features = Features(tokenizer.cls_id, tokenizer.sep_id)
        texts = tokenizer.encode_batch([example.text for example in examples])
        endings = iter(tokenizer.encode_batch([c for example in examples for c in example.choices]))
        for index, example in enumerate(examples):
            cut = False
            for _ in example.choices:
                pair = texts[index], next(endings)
                first, second = truncate_pair(*pair, self.max_length - 3, "tail")  # what the ending goes on from
                cut |= len(first) + len(second) < len(pair[0]) + len(pair[1])
                features.add_sequence(first, second)
            features.truncated += cut
            features.end_unit(index, example.label)
        return features

    def loss(self, logits_N: Tensor, batch: TaskBatch) -> Tensor:
        """Cross-entropy among each question's endings."""
        return choice_loss(logits_N, batch.targets, batch.unit_starts)

    def decode(
        self, examples: Sequence[ChoiceExample], features: Features, outputs: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """For each question: choice (index from 0), text of it, score, scores of all."""
        predictions = []
        for example, logits_N in zip(examples, outputs):
            scores = softmax(logits_N)
            best = int(scores.argmax())
            predictions.append(
                {
                    "choice": best,
                    "text": example.choices[best],
                    "score": float(scores[best]),
                    "scores": scores.tolist(),
                }
            )
        return predictions

    def score(self, examples: Sequence[ChoiceExample], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """accuracy"""
        right = [example.label == prediction["choice"] for example, prediction in zip(examples, predictions)]
        return {"accuracy": float(np.mean(right))}
