"""Predicts with fine-tuned models: a pipeline in Python, streaming over files, evaluation.

    pipeline = load("DIR")
    pipeline(["a fine film", "a dull one"])     # [{"label": "positive", "score": 0.98, "scores": ...}, ...]

Inputs are read in chunks, sorted by length within a chunk and packed up to a token budget; predictions come out
in the order of the inputs, and memory does not grow with the file.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeGuard

import numpy as np
import torch

from electra_core import model_dir
from electra_core.conversion.onnx_model import OnnxModel
from electra_core.downstream.answer_files import AnswerFile
from electra_core.downstream.guessed import no_answer_note, read_guessed
from electra_core.downstream.in_memory import Rows, as_files, row_of, rows_of
from electra_core.downstream.interface import Task, check_segments, encode_all, read_all
from electra_core.downstream.named_tasks import for_reading
from electra_core.downstream.run_model import check_finite, run_model
from electra_core.downstream.task_files import TASK_FILE, load_model, load_task
from electra_core.errors import UserError, writing
from electra_core.execution.cross_check import check_task_model
from electra_core.execution.placement import keep_memory_between_batches, resolve_device, resolve_precision
from electra_core.execution.torch_state import usual_tensors
from electra_core.files.clutter import entries
from electra_core.files.text_lines import at_hand, text_problem
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.features import Features
from electra_core.labelled_data.labelled import BadRows
from electra_core.linear import round_weights
from electra_core.runs.progress import Progress, progress
from electra_core.tasks import TaskModel
from electra_core.tokenizer import Tokenizer, load_tokenizer, matching_tokenizer

log = logging.getLogger("electra_core")
CHUNK = 2048  # examples in memory at a time
CHUNK_CHARACTERS = 1 << 24  # and about so many characters: each text may be a book
OWN_KEYS = {"text", "pair", "tokens", "words", "question", "context"}
"""Keys of the dicts that a task's `from_value` accepts."""


class Predictor:
    """A model with its task and tokenizer, ready for use.

    Args:
        model: on the device that it should run on; or an exported model.
        precision: dtype of the computation; the logits are fp32.
        tokens_per_batch: see `run_model`; an exported model uses its own.
        guessed: whether the task was inferred from config.json, so that `evaluate` matches the labels by name.
    """

    def __init__(
        self,
        model: TaskModel | OnnxModel,
        task: Task,
        tokenizer: Tokenizer,
        *,
        precision: torch.dtype = torch.float32,
        tokens_per_batch: int | None = None,
        guessed: bool = False,
    ):
        self.model = model if isinstance(model, OnnxModel) else model.eval()
        self.task, self.tokenizer = task, tokenizer
        self.precision, self.tokens_per_batch, self.guessed = precision, tokens_per_batch, guessed
        self.truncated = 0
        """Number of inputs so far that were truncated."""
        self._said = False
        self.unknown = self.words = 0
        """Number of [UNK] among the inputs' tokens so far, and number of all."""

    def __repr__(self) -> str:
        labels = [f"{len(self.task.labels)} labels"] if self.task.labels else []
        place = "as ONNX"
        if not isinstance(self.model, OnnxModel):
            precision = "bf16" if self.precision == torch.bfloat16 else "fp32"
            place = f"{precision} on {next(self.model.parameters()).device}"
        return f"Predictor({', '.join([self.task.kind, *labels, f'{self.task.max_length} tokens', place])})"

    def __call__(self, inputs: Any) -> Any:
        """Predictions for a list of inputs, or one for a single input: a text, a dict, or a tuple (`Task.is_one`).

        An input is a text (classify, regress, tag), a pair of texts, a list of words (tag), a question and its
        context (qa), or a text and a list of endings (choose). All tasks also accept dicts with "text" and "pair",
        "text" or "tokens" (tag), "question" and "context", "text" and "choices", or the columns that the model was
        trained on. A table (pandas, Polars, Arrow) is read by its columns, like a file, and gives a prediction for
        each row; one row of a table of pandas with named columns gives one.

        Raises:
            ValueError: an input has another form, or an empty text (which only a tagger accepts). The message
                names its place in a list.
            UserError: a text is not valid Unicode (lone surrogates; the message names its place in a list), or a
                table lacks the columns.
        """
        if (rows := rows_of(inputs)) is not None:
            return self.predict(self._of_table(rows))
        if isinstance(inputs, str | dict) or (isinstance(inputs, tuple) and self.task.is_one(inputs)):
            one = self._of_table([inputs])[0] if _is_row(inputs) else self.task.from_value(inputs, "1")
            return self.predict([one])[0]
        if (row := row_of(inputs, getattr(self.task, "columns", None))) is not None:
            return self.predict(self._of_table([row]))[0]
        if hasattr(inputs, "to_pylist"):  # a column of Arrow
            inputs = inputs.to_pylist()
        if isinstance(inputs, bytes) or not isinstance(inputs, Iterable):
            raise ValueError(f"inputs: expected a list of inputs or a single text, got {type(inputs).__name__}")
        values = list(inputs)
        if values and all(map(_is_row, values)):
            return self.predict(self._of_table(values))
        examples = [self._from_value(value, position) for position, value in enumerate(values)]
        try:
            return self.predict(examples)
        except UserError:
            for position, value in enumerate(values):
                if problem := _text_problem_in(value):
                    raise UserError(f"inputs[{position}]: the text is {problem}") from None
            raise

    def _from_value(self, value: Any, position: int) -> Any:
        """The example for a value; a ValueError names its place in the list."""
        try:
            return self.task.from_value(value, str(position + 1))
        except ValueError as error:
            raise ValueError(f"inputs[{position}]{str(error).removeprefix('inputs')}") from None

    def _of_table(self, rows: list[dict[str, Any]]) -> list[Any]:
        """The examples in a table's rows, by the columns that the task reads."""
        if not rows:
            return []
        try:
            with as_files(lambda _: None, self.task, inputs=rows) as (files, _):
                bad = BadRows(files["inputs"])
                return list(for_reading(self.task, Columns()).read(files["inputs"], bad, labelled=False))
        except UserError as error:
            raise UserError(_of_rows(str(error))) from None

    def predict(
        self, examples: Sequence[Any], bar: Progress | None = None, *, task: Task | None = None
    ) -> list[dict[str, Any]]:
        """Predictions for examples that the task has read; `task`: another than the predictor's."""
        if task is None:
            task = self.task
            self._say_what_is_guessed()
        if not isinstance(self.model, OnnxModel):
            check_segments(task, self.model.config, "inputs", examples)
        features = encode_all(task, examples, self.tokenizer)
        self.truncated += features.truncated
        unknown, words = features.unknown(self.tokenizer.unk_id)
        self.unknown, self.words = self.unknown + unknown, self.words + words
        return task.decode(examples, features, self.logits(features, bar))

    def _say_what_is_guessed(self) -> None:
        """Once: that every question gets an answer. (`evaluate` sees from the data whether each has one.)"""
        if self.guessed and not self._said and (note := no_answer_note(self.task)):
            self._said = True
            log.warning(note)

    def logits(self, features: Features, bar: Progress | None = None) -> list[np.ndarray]:
        """Logits of every unit (`run_model`); UserError if they are not finite."""
        if isinstance(self.model, OnnxModel):
            outputs = self.model.logits(features, bar)
        else:
            outputs = run_model(
                self.model, features, tokens_per_batch=self.tokens_per_batch, precision=self.precision, bar=bar
            )
        check_finite(outputs, "its weights are damaged, or it diverged in training")
        return outputs

    def stream(self, examples: Iterable[Any], source: str | Path = "") -> Iterator[tuple[Any, dict[str, Any]]]:
        """(example, prediction) for each, in order, `CHUNK` in memory at a time, fewer if they are long.

        Args:
            source: where the examples come from; "-": standard input, whose lines are answered as they arrive.
        """
        iterator = iter(examples)
        while chunk := list(_up_to(CHUNK_CHARACTERS, at_hand(iterator, CHUNK, source))):
            yield from zip(chunk, self.predict(chunk))


def _of_rows(message: str) -> str:
    """Rewrites a message about a file for a caller with rows, without advice on bad rows or columns."""
    message = re.sub(r"\binputs\.jsonl:(\d+)", r"inputs: row \1", message).replace("inputs.jsonl", "inputs")
    of_files = ("skip_bad_rows", "Columns(")
    return "; ".join(part for part in message.split("; ") if not any(advice in part for advice in of_files))


def _is_row(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether `value` is a table's row, with the table's own columns, and not a dict for a task's `from_value`."""
    return isinstance(value, dict) and not OWN_KEYS & value.keys()


def _text_problem_in(value: Any) -> str:
    """Why an input holds a text that is not valid Unicode; "" if it does not."""
    if isinstance(value, str):
        return text_problem(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next(filter(None, map(_text_problem_in, parts)), "")


def _up_to(characters: int, examples: Iterable[Any]) -> Iterator[Any]:
    """Examples, until they hold that many characters."""
    for example in examples:
        yield example
        characters -= len(repr(example))
        if characters <= 0:
            return


@usual_tensors()
def load(
    source: str | Path, *, device: str | torch.device = "auto", precision: str | torch.dtype = "auto"
) -> Predictor:
    """A fine-tuned model from its directory, ours or the Hub's; or an exported `NAME.onnx` (on the CPU).

    Without task.json the task is guessed from config.json. A question answerer then always answers, until its task
    says otherwise: `predictor.task = replace(predictor.task, unanswerable=True, null_threshold=0.0)`.

    On a CPU the process from then on keeps up to a gigabyte of freed memory
    (`execution.placement.keep_freed_memory`). If the CPU computes in bf16, weights of the predictor's `model` are
    rounded (`linear.round_weights`); to work with the model as it was saved, use precision="fp32" or
    `from_pretrained`.

    Args:
        device: auto | cpu | cuda | cuda:N, or a torch.device for one of these.
        precision: auto | bf16 | fp32 (`execution.placement.resolve_precision`), or torch.bfloat16 | torch.float32.

    Raises:
        UserError: no such directory, not a model of a downstream task, or no such device.
    """
    if str(source).endswith(".onnx"):
        return _load_exported(Path(source))
    directory = model_dir.find_model(source)
    exported = [] if (directory / "config.json").exists() else sorted(entries(directory, "*.onnx"))
    if exported:
        raise UserError(f"{directory}: the folder of an exported model; give its file {exported[0]}")
    task = load_task(directory)
    on_device = resolve_device(device)
    keep_memory_between_batches(on_device)
    model = load_model(task, directory)
    tokenizer = matching_tokenizer(directory, model.config.vocab_size)
    check_segments(task, model.config, directory)
    guessed = not (directory / TASK_FILE).exists()
    model = model.to(on_device)
    dtype = resolve_precision(precision, on_device)
    round_weights(model, on_device, dtype)
    check_task_model(model, on_device, dtype, task.max_length, training=False)
    return Predictor(model, task, tokenizer, precision=dtype, guessed=guessed)


def _load_exported(file: Path) -> Predictor:
    """An exported model, with the tokenizer and task.json beside it."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if not (file.parent / TASK_FILE).exists():
        raise UserError(f"{file}: expected {TASK_FILE} and the tokenizer beside it, as electra export writes them")
    task = load_task(file.parent)
    model, tokenizer = OnnxModel(file, task.model_class, len(task.labels)), load_tokenizer(file.parent)
    model.check(tokenizer)
    return Predictor(model, task, tokenizer)


def predict_file(
    predictor: Predictor,
    source: str | Path,
    sink: TextIO | Callable[[], TextIO],
    *,
    form: str = "jsonl",
    skip_bad_rows: bool = False,
    quiet: bool = True,
    begun: Path | None = None,
) -> BadRows:
    """Predicts every row of a file ("-": standard input) and writes one line for each, in the same order.

    Args:
        sink: an open file, or a function that opens it: called once the input's first row has been read, so that
            an unusable input empties no file.
        form: "jsonl", or "csv" with lists in JSON.
        begun: a file with the first answers, by a call that was stopped; `sink`, which opens it, is called once it
            is cut off behind its last whole row.

    Returns:
        The rows that were skipped.

    Raises:
        UserError: the file cannot be read; `begun` is of another file or model; or, once all others are written,
            there were bad rows and they are not to be skipped.
    """
    answers = AnswerFile(form, begun)
    bad = BadRows(source, skip=True)
    examples = for_reading(predictor.task, Columns()).read(source, bad, labelled=False)
    answers.pass_over(examples, source)
    first = list(itertools.islice(examples, 1))
    any_good = bool(first or answers.rows)
    bad.skip = skip_bad_rows or any_good  # without the flag, only until the good rows have been written
    bad.close()
    if begun is not None:
        with writing(str(begun)):
            os.truncate(begun, answers.end)
    file = sink() if callable(sink) else sink
    with progress("predict", None, "examples", quiet=quiet) as bar:
        for example, prediction in predictor.stream(itertools.chain(first, examples), source):
            answers.write(file, {"id": example.id, **prediction})
            if str(source) == "-":
                file.flush()
            bar.update()
    bad.skip = skip_bad_rows
    bad.close()
    return bad


@dataclass(frozen=True, repr=False)
class Evaluation:
    """A model's predictions for labelled examples, and their figures.

    `print(to_text(make_report(evaluation)))` shows more of them (`reports/task_report.py`).
    """

    task: Task
    metrics: dict[str, float]
    examples: list[Any]
    predictions: list[dict[str, Any]]
    skipped: BadRows

    def __repr__(self) -> str:
        figures = [f"{name} {value:.4g}" for name, value in self.metrics.items()]
        return f"Evaluation({', '.join([self.task.kind, f'{len(self.examples):,} examples', *figures])})"


def evaluate(
    predictor: Predictor, source: str | Path | Rows, *, skip_bad_rows: bool = False, quiet: bool = True
) -> Evaluation:
    """Scores the model on labelled data.

    If the model's task was guessed from config.json, the data's labels are matched with the model's by name, and
    "no answer" is possible if the data hold such questions; a line says so.

    Args:
        predictor: what `load` returns.
        source: a file, or rows in memory: dicts, or a table (pandas).
        skip_bad_rows: leave out rows that cannot be used; the result counts them.
        quiet: show no progress bar.

    Raises:
        UserError: the file is unreadable or empty, there are bad rows, or labels that the model does not have.
        ValueError: not a Predictor, or rows are not dicts.
    """
    if not isinstance(predictor, Predictor):
        raise ValueError(
            f"predictor: expected what predict.load(folder) returns, got {type(predictor).__name__} "
            f"{predictor!r:.50}"
        )
    task = for_reading(predictor.task, Columns())
    with as_files(log.warning, task, data=source) as (files, say):
        if predictor.guessed:
            task, examples, bad, note = read_guessed(task, files["data"], skip_bad_rows=skip_bad_rows)
            if note:
                say(note)
        else:
            examples, bad = read_all(task, files["data"], skip_bad_rows=skip_bad_rows)
    with progress("evaluate", None, "tokens", quiet=quiet) as bar:
        predictions = predictor.predict(examples, bar, task=task)
    return Evaluation(task, task.score(examples, predictions), examples, predictions, bad)
