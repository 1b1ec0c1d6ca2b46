"""The commands that use a model or change its form: `electra evaluate`, `predict`, `export` and `convert`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from electra_core.commands.flags import (
    MODEL_TO_USE_HELP,
    add_command,
    changed,
    column_flags,
    given_columns,
    inference_flags,
    refuse_idle,
    with_positive_class,
)
from electra_core.errors import UserError, printable, writing
from electra_core.files.row_files import FORMS

AS_TRAINED = "the name in the training file, else a usual one, such as text"


def _evaluate_flags(commands: Any) -> None:
    command = add_command(
        commands, evaluate, "compute the metrics of a fine-tuned model on labelled data",
        "electra evaluate --model MODEL --data dev.tsv",
    )  # fmt: skip
    command.add_argument("--model", required=True, help=f"{MODEL_TO_USE_HELP}, or an exported .onnx file")
    command.add_argument("--data", required=True, help="labelled file, in the format of the training data")
    command.add_argument("--json", action="store_true", help="print the metrics as JSON")
    command.add_argument("--report", metavar="FILE", help="write the full report: .html, .json or .txt")
    column_flags(command, AS_TRAINED)
    inference_flags(command)


def evaluate(options: Namespace) -> None:
    """Metrics of a fine-tuned model."""
    from electra_core.metrics import positive_class
    from electra_core.predict import evaluate
    from electra_core.reports import task_report

    if options.report:
        task_report.check_name(options.report)
    predictor = _predictor(options, options.data)
    result = evaluate(predictor, options.data, skip_bad_rows=options.skip_bad_rows, quiet=options.quiet)
    _say_what_was_lost(result.skipped, predictor)
    report = task_report.make_report(result, str(options.model), str(options.data))
    if options.report:
        task_report.write_report(report, options.report)
    figures = result.metrics | positive_class(result.metrics, result.task.positive)
    print(json.dumps(figures, ensure_ascii=False) if options.json else task_report.to_text(report))


def _predict_flags(commands: Any) -> None:
    command = add_command(
        commands, predict, "write a fine-tuned model's predictions, one line per input",
        "electra predict --model MODEL --input texts.txt > predictions.jsonl",
    )  # fmt: skip
    command.add_argument("--model", required=True, help=f"{MODEL_TO_USE_HELP}, or an exported .onnx file")
    command.add_argument("--input", required=True,
                         help="JSONL, CSV, TSV, plain lines, or a folder of .txt files; - reads standard input: "
                              "plain lines, a JSON array, or JSON lines (fields: text, and pair for pairs; "
                              "question and context; text and choices)")  # fmt: skip
    command.add_argument(
        "--input-format", choices=("auto", *FORMS), default="auto",
        help="format of --input; auto: by the file's name, or by how standard input begins",
    )  # fmt: skip
    command.add_argument("--format", choices=("jsonl", "csv"),
                         help="output format (default: csv if --output ends in .csv, else jsonl)")  # fmt: skip
    command.add_argument("--output", metavar="FILE",
                         help="file to write (default: standard output); with --submission, a folder")  # fmt: skip
    command.add_argument(
        "--submission", metavar="TASK",
        help="write the file that gluebenchmark.com accepts for this GLUE task (--input: its test file)",
    )  # fmt: skip
    command.add_argument("--resume", action="store_true",
                         help="keep the answers that a stopped command has written to --output, and go on behind "
                              "them")  # fmt: skip
    column_flags(command, AS_TRAINED, labelled=False)
    inference_flags(command)


def predict(options: Namespace) -> None:
    """One line per input."""
    from electra_core.predict import predict_file

    if options.threshold is None:
        refuse_idle(options, ("positive_class",), "without --threshold")
    if options.submission:
        refuse_idle(options, ("format", "resume"), "with --submission, which writes its own file at once")
        return _submission(_predictor(options, options.input), options)
    if options.output and _is_same_file(options.input, options.output):
        raise UserError(f"--output {options.output}: is also the input and would overwrite it; name another file")
    if not options.output:
        refuse_idle(options, ("resume",), "without --output")
    form = options.format or _form_of(options.output or "")
    predictor = _predictor(options, options.input)
    begun = Path(options.output) if options.resume and os.path.isfile(options.output) else None
    with ExitStack() as stack:

        def opened() -> TextIO:
            if not options.output:
                stack.callback(sys.stdout.flush)
                return sys.stdout
            with writing(f"--output {options.output}"):
                file = stack.enter_context(open(options.output, "a" if begun else "w", encoding="utf-8"))
            stack.enter_context(_saying_what_is_kept(options.output))
            return file

        bad = predict_file(
            predictor, options.input, opened, form=form, skip_bad_rows=options.skip_bad_rows,
            quiet=options.quiet or not options.output, begun=begun,
        )  # fmt: skip
    _say_what_was_lost(bad, predictor)


@contextmanager
def _saying_what_is_kept(output: str) -> Iterator[None]:
    """Says at Ctrl-C that the file holds the answers so far."""
    try:
        yield
    except KeyboardInterrupt:
        _say(f"{output}: holds the answers so far; --resume goes on behind them")
        raise


def _form_of(output: str) -> str:
    """The output format that a file name implies; UserError for a format that cannot be written."""
    ending = Path(output).suffix.lower()
    if ending in (".tsv", ".parquet", ".xlsx", ".xls", ".ods", ".gz", ".xz", ".zst"):
        raise UserError(
            f"--output {output}: expected a name that ends in .jsonl or .csv, or --format; got {ending}"
        )
    return "csv" if ending == ".csv" else "jsonl"


def _is_same_file(one: str, other: str) -> bool:
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _submission(predictor: Any, options: Namespace) -> None:
    """Writes a GLUE submission. No row may be left out: that would shift the answers of all rows after it."""
    from electra_core.downstream.named_tasks import submitted_task, write_submission
    from electra_core.labelled_data.labelled import BadRows

    source, named = Path(options.input), submitted_task(options.submission)
    if predictor.task.kind != named.task.kind:
        raise UserError(
            f"--submission {options.submission}: expected a model fine-tuned for {named.task.kind}, "
            f"got one for {predictor.task.kind}"
        )
    known = {*named.task.labels, *(raw for raw, _ in getattr(named.task, "label_names", ()))}
    if foreign := [label for label in predictor.task.labels if label not in known]:
        _say(f"warning: {named.name} has no label {', '.join(foreign)}; written unchanged")
    if source.is_dir():
        source = named.find(source, "test")
    if options.skip_bad_rows:
        raise UserError("--skip-bad-rows: cannot be used with --submission, where every row needs an answer")
    bad = BadRows(source)
    examples = predictor.task.read(source, bad, labelled=False)
    predictions = (prediction for _, prediction in predictor.stream(examples))
    print(f"wrote {write_submission(options.submission, predictions, options.output or '.')}")
    _say_what_was_lost(bad, predictor)


def _say_what_was_lost(bad: Any, predictor: Any) -> None:
    """Reports rows that were skipped, texts that were truncated, and words that the vocabulary lacks."""
    from electra_core.tokenizer import unknown_words

    if bad.count:
        _say(bad.summary())
    if predictor.truncated:
        limit = f"longer than {predictor.task.max_length} tokens"
        _say(f"{bad.path}: {predictor.truncated} of the inputs are {limit} and were truncated")
    if warning := unknown_words(predictor.unknown, predictor.words):
        source = "standard input" if str(bad.path) == "-" else bad.path
        _say(f"warning: {source}: {warning}")


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr)


def _predictor(options: Namespace, source: str) -> Any:
    """The model, set up to read the file `source`."""
    from electra_core.downstream.named_tasks import for_reading
    from electra_core.predict import load

    if options.model.endswith(".onnx"):
        why = f"with {options.model}, which onnxruntime runs on the CPU as it was exported"
        refuse_idle(options, ("device", "precision"), why)
    form = getattr(options, "input_format", "auto").replace("auto", "")
    if form and os.path.isdir(source):
        raise UserError(f"--input-format {form}: no effect with {source}, which is a folder")
    columns = given_columns(options, source, form)
    predictor = load(options.model, device=options.device, precision=options.precision)
    predictor.task = for_reading(predictor.task, columns, form)
    if options.positive_class is not None:
        predictor.task = with_positive_class(predictor.task, options.positive_class)
    if options.threshold is not None:
        predictor.task = _with_threshold(predictor.task, options.threshold)
        _say_if_guessed(predictor.task)
    return predictor


def _say_if_guessed(task: Any) -> None:
    """Says which of two classes a threshold is of, if nobody has chosen it."""
    if task.positive and not getattr(task, "positive_class", task.positive):
        (other,) = {*task.labels} - {task.positive}
        flag = f"--positive-class {shlex.quote(other)}"
        _say(f"--threshold {task.threshold:g} is for the class {task.positive!r}; for {other!r}, add {flag}")


def _with_threshold(task: Any, threshold: float) -> Any:
    if task.kind == "qa":
        if not math.isfinite(threshold):
            raise UserError(f"--threshold: expected a finite number, got {threshold:g}")
        return dataclasses.replace(task, unanswerable=True, null_threshold=threshold)
    if not hasattr(task, "threshold"):
        raise UserError(
            f"--threshold: no effect with a model for {task.kind}, only with one for two classes, multilabel or qa"
        )
    return changed(task, threshold=threshold)


def _export_flags(commands: Any) -> None:
    command = add_command(
        commands, export, "export a fine-tuned model to ONNX and check it against torch (needs the extra `onnx`)",
        "electra export --model MODEL --onnx model.onnx",
    )  # fmt: skip
    command.add_argument("--model", required=True, help=MODEL_TO_USE_HELP)
    command.add_argument(
        "--onnx", required=True, metavar="FILE", help="file for the graph; the tokenizer is written beside it"
    )


def export(options: Namespace) -> None:
    """Fine-tuned model -> ONNX."""
    from electra_core.conversion.onnx_export import export

    difference = export(options.model, options.onnx)
    print(f"wrote {options.onnx}; its logits differ from torch's by a relative {difference:.1e}")


def _convert_flags(commands: Any) -> None:
    command = add_command(
        commands, convert, "convert a run's checkpoints, or the original's of TensorFlow 1, to model directories",
        "electra convert --checkpoint RUN/checkpoints/step-00010000 --out MODELS",
    )  # fmt: skip
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", metavar="FOLDER",
        help="one of RUN/checkpoints, of `electra pretrain`; or RUN, for its newest. The run may be going on",
    )  # fmt: skip
    source.add_argument(
        "--tf", metavar="CHECKPOINT",
        help="prefix of the files of google-research/electra's, or their folder (checksums are not verified)",
    )  # fmt: skip
    command.add_argument(
        "--data", metavar="DATA", help="with --checkpoint, until RUN holds models: its corpus, for the tokenizer"
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder for discriminator/ and generator/")
    command.add_argument("--num-heads", type=int, metavar="N",
                         help="attention heads (default: one per 64 of the hidden size)")  # fmt: skip
    command.add_argument("--cased", action="store_true", help="the vocabulary is cased")


def convert(options: Namespace) -> None:
    """Checkpoint -> model directories."""
    from electra_core.conversion.convert_tf import convert_checkpoint
    from electra_core.pretraining.from_checkpoint import convert_run

    if options.tf is None:
        refuse_idle(options, ("num_heads", "cased"), "with --checkpoint")
        written = convert_run(options.checkpoint, options.out, data=options.data)
    else:
        refuse_idle(options, ("data",), "with --tf")
        lowercase = not options.cased
        written = convert_checkpoint(options.tf, options.out, num_heads=options.num_heads, lowercase=lowercase)
    for path in written:
        print(f"wrote {path}")


COMMANDS = (_evaluate_flags, _predict_flags, _export_flags, _convert_flags)
"""Each adds a command to the parser."""
