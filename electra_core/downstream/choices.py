"""Multiple choice: a text and several endings, one of which is right."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from electra_core.downstream.classify import softmax
from electra_core.downstream.interface import Task
from electra_core.files.row_files import Row
from electra_core.files.text_lines import text_problem
from electra_core.labelled_data.columns import TEXT_NAMES, Columns, first_cell, names_of, table
from electra_core.labelled_data.features import Features, TaskBatch, truncate_pair
from electra_core.labelled_data.label_cells import label_text
from electra_core.labelled_data.labelled import BadRows, checked, examples_of_rows, text_cell
from electra_core.tasks import MultipleChoice, choice_loss
from electra_core.tokenizer import Tokenizer

CHOICE_TEXT_NAMES = ("question", "startphrase", "ctx", "context", "premise", *TEXT_NAMES)
CHOICE_LISTS = ("choices", "endings", "options")
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
    """Examples from rows with a text and a list of `choices` (or {"text": [...], "label": [...]}), or columns
    `ending0`, ...

    Where choices have names, the label is the right one's name; otherwise its index from 0, its letter A, B, ...,
    or the choice itself. Without `labelled`, labels are not read.

    Raises:
        UserError: as `labelled_data.labelled.read_texts`.
    """
    path, columns = Path(path), columns or Columns()
    bad = bad or BadRows(path)
    read = partial(_choice, columns=columns, labelled=labelled)
    yield from checked(path, examples_of_rows(path, table(path, columns), columns, bad, labelled, read), bad)


def _choice(row: Row, name: str, columns: Columns, labelled: bool) -> tuple[ChoiceExample | None, str]:
    names = names_of(columns, "text", CHOICE_TEXT_NAMES)
    text, problem = text_cell(row, next((name for name in names if name in row.cells), names[0]))
    if problem:
        return None, problem
    choices, choice_names = _choices(row.cells)
    if problem := _choices_problem(choices):
        return None, problem
    index = None
    if labelled:
        names = names_of(columns, "label", ANSWER_NAMES)
        label = label_text(first_cell(row.cells, names))
        if label is None:
            return None, "the label is missing"
        index = _named(label, choice_names) if choice_names else _index(label, choices)
        if not 0 <= index < len(choices):
            return None, _no_such_choice(label, choices, choice_names)
    return ChoiceExample(name, row.line, text, tuple(choices), index), ""


def _choices_problem(choices: Sequence[Any]) -> str:
    if len(choices) < 2:
        return "fewer than two choices (expected a list 'choices', or columns ending0, ending1, ...)"
    for number, choice in enumerate(choices):
        if choice is None or (isinstance(choice, str) and not choice.strip()):
            return f"a choice is empty (choice {number})"
        if not isinstance(choice, str):
            return f"a choice is a {type(choice).__name__}, expected text (choice {number})"
        if problem := text_problem(choice):
            return f"{problem} (choice {number})"
    return ""


def _index(label: str, choices: Sequence[str]) -> int:
    """ "2" -> 2, "C" -> 2, otherwise the index of the only choice equal to the label; -1 if there is none."""
    if label.isdecimal():
        return int(label)
    letter = ord(label.upper()) - ord("A") if len(label) == 1 and label.isascii() else -1
    return letter if 0 <= letter < len(choices) else _named(label, [choice.strip() for choice in choices])


def _named(label: str, names: Sequence[str | None]) -> int:
    return names.index(label) if names.count(label) == 1 else -1


def _no_such_choice(label: str, choices: Sequence[str], names: Sequence[str | None]) -> str:
    known = f"; their names are {', '.join(map(str, names))}" if names else ""
    hint = "; numbers start at 0" if label.isdecimal() and not names else ""
    return f"the label matches no choice ({label!r} of {len(choices)}{known}{hint})"


def _choices(cells: dict[str, Any]) -> tuple[list[Any], list[str | None]]:
    """The choices, and their names if they have any."""
    choices: Any = first_cell(cells, CHOICE_LISTS)
    if isinstance(choices, list) and choices and all(isinstance(choice, dict) for choice in choices):
        choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    names: Any = None
    if isinstance(choices, dict):
        choices, names = choices.get("text"), choices.get("label")
    if not isinstance(choices, list):
        numbered = {name: match for name in cells if (match := ENDING.fullmatch(name))}
        choices = [cells[name] for name in sorted(numbered, key=lambda name: int(numbered[name].group(1)))]
    has_names = isinstance(names, list) and any(name is not None for name in names)
    texts = [str(choice) if isinstance(choice, (int, float)) else choice for choice in choices]
    return texts, [label_text(name) for name in names] if has_names else []


@dataclass(frozen=True)
class Choose(Task):
    """Which of several endings fits a text; examples may have different numbers of endings."""

    kind: ClassVar[str] = "choose"
    model_class: ClassVar = MultipleChoice

    labels: tuple[str, ...] = ()
    """Always empty: the endings compete with each other."""
    columns: Columns = field(default_factory=Columns)
    """Which columns hold the text and the label."""
    max_length: int = 128
    """Maximum number of tokens of text and ending together, special tokens included."""
    metric: str = "accuracy"
    """The metric that chooses the best checkpoint."""

    def read(self, path: Path | str, bad: BadRows, *, labelled: bool = True) -> Iterator[ChoiceExample]:
        """Examples of a file."""
        return read_choices(path, self.columns, bad, labelled=labelled)

    def from_value(self, value: Any, name: str) -> ChoiceExample:
        """(text, [ending, ...]), or {"text": ..., "choices": [...]}."""
        if isinstance(value, dict):
            value = (value.get("text"), value.get("choices"))
        if isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], str):
            text, choices = value
            if isinstance(choices, (tuple, list)) and choices and all(isinstance(c, str) for c in choices):
                if not all(t.strip() for t in (text, *choices)):
                    raise ValueError(f"inputs: expected a text and endings, none empty, got {value!r:.80}")
                return ChoiceExample(name, 0, text, tuple(choices))
        raise ValueError(f"inputs: expected a text and its endings, got {value!r:.80}")

    def is_one(self, value: tuple[Any, ...]) -> bool:
        """Whether it is a text and its endings."""
        return len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], (list, tuple))

    def fitted(self, examples: Sequence[ChoiceExample]) -> Choose:
        """The task itself: there is nothing to learn from the labels."""
        return self

    def encode(
        self, examples: Sequence[ChoiceExample], tokenizer: Tokenizer, *, training: bool = False
    ) -> Features:
        """`[CLS] text [SEP] ending [SEP]` for every ending; a question's sequences stay together."""
        features = Features(tokenizer.cls_id, tokenizer.sep_id)
        texts = tokenizer.encode_each(example.text for example in examples)
        endings = tokenizer.encode_each(choice for example in examples for choice in example.choices)
        for index, (example, text) in enumerate(zip(examples, texts)):
            cut = False
            for ending in itertools.islice(endings, len(example.choices)):
                first, second = truncate_pair(text, ending, self.max_length - 3, "tail")  # the ending continues it
                cut |= len(first) + len(second) < len(text) + len(ending)
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
        """For each question: choice (index from 0), its text, its score, the scores of all."""
        return [_prediction(example, softmax(logits_N)) for example, logits_N in zip(examples, outputs)]

    def score(self, examples: Sequence[ChoiceExample], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """accuracy"""
        right = [example.label == prediction["choice"] for example, prediction in zip(examples, predictions)]
        return {"accuracy": float(np.mean(right))}

    def constant_guess(self, examples: Sequence[ChoiceExample]) -> tuple[str, list[dict[str, Any]]]:
        """The most frequent choice that a question has, with each choice's frequency as its score."""
        counts = Counter(example.label for example in examples)
        most = max(len(example.choices) for example in examples)
        shares = np.array([counts[choice] / len(examples) for choice in range(most)])
        return "the most frequent choice", [_prediction(e, shares[: len(e.choices)]) for e in examples]


def _prediction(example: ChoiceExample, scores_N: np.ndarray) -> dict[str, Any]:
    best = int(scores_N.argmax())
    score = float(scores_N[best])
    return {"choice": best, "text": example.choices[best], "score": score, "scores": scores_N.tolist()}
