"""What the commands share: how a command is added to the parser, and the flags that several have.

Flags of `pretrain` and `finetune` are made from the configuration dataclasses; the line under each field is the
help (`config_flags`). Help texts start in lower case and have no full stop.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from electra_core.errors import UserError
from electra_core.execution import torchrun
from electra_core.files.row_files import DELIMITERS, format_of
from electra_core.labelled_data.columns import Columns

MODEL_HELP = "model directory, RUN folder, tiny (the bundled model), or Hub name (needs the extra `hub`)"
MODEL_TO_USE_HELP = "fine-tuned model: its directory or Hub name (needs the extra `hub`)"
DEVICE_HELP = "auto, cpu or cuda"


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, except those that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS)):
            return action.help
        return super()._get_help_string(action)


def is_to_say(text: str) -> bool:
    """Whether this process should print `text`: it is the only one, or the first of several to want to."""
    if not torchrun.keeps_the_store() or torchrun.size() == 1:
        return True
    from electra_core.execution.distributed import is_first_to_say

    return is_first_to_say(text)


class Parser(argparse.ArgumentParser):
    """Prints an error in only one of several processes."""

    def error(self, message: str) -> NoReturn:
        """As argparse's."""
        if is_to_say(message):
            super().error(message)
        self.exit(2)


class CommandParser(Parser):
    """The parser of one command; `given_flags` in its options are those on the command line."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses twice, the second time with a mark as every default: a value other than the mark was given."""
        options, rest = super().parse_known_args(args, namespace)
        mark: list[Any] = []  # a list, because action="extend" adds to one
        names = {action.dest for action in self._actions}
        again, _ = super().parse_known_args(args, argparse.Namespace(**dict.fromkeys(names, mark)))
        options.given_flags = {name for name in names if getattr(again, name) is not mark}
        return options, rest


def refuse_idle(options: argparse.Namespace, names: Iterable[str], because: str) -> None:
    """Raises UserError naming the flags among `names` (of options) that were given but have no effect.

    Args:
        because: why they have no effect ("with --this").
    """
    if idle := [f"--{name.replace('_', '-')}" for name in names if name in options.given_flags]:
        raise UserError(f"{', '.join(idle)}: no effect {because}")


def add_command(
    commands: Any, run: Callable[[argparse.Namespace], int | None], summary: str, example: str
) -> argparse.ArgumentParser:
    """Adds a command named after `run`, which carries it out: options -> exit status, None for 0."""
    parser: argparse.ArgumentParser = commands.add_parser(
        run.__name__, help=summary, description=f"{summary}\n\nexample:\n  {example}", formatter_class=Help
    )
    parser.set_defaults(run=run)
    return parser


def output_flags(command: argparse.ArgumentParser) -> None:
    """Adds the flags of commands that fill a folder and take a while."""
    command.add_argument("--overwrite", action="store_true", help="replace the contents of --out")
    command.add_argument("--quiet", action="store_true", help="hide progress bars")


def training_flags(command: argparse.ArgumentParser) -> None:
    """Adds the flags of commands that train."""
    output_flags(command)
    command.add_argument("--device", default="auto", help=DEVICE_HELP)


def positive_class_flag(command: Any, default: str) -> None:
    """Adds the flag that names the positive of two classes."""
    command.add_argument("--positive-class", metavar="LABEL",
                         help="of two classes the one that f1, average_precision and --threshold are of (default: "
                              f"{default})")  # fmt: skip


def with_positive_class(task: Any, label: str) -> Any:
    """The task with a positive class; UserError if it cannot have one, or has no such class."""
    if not hasattr(task, "positive_class"):
        raise UserError(f"--positive-class: no effect with {task.kind}, only with classify")
    return changed(task, positive_class=label)


def changed(task: Any, **values: Any) -> Any:
    """The task with other values, which are the user's: what is wrong with them is a UserError."""
    try:
        return dataclasses.replace(task, **values)
    except ValueError as error:
        raise UserError(str(error)) from None


def inference_flags(command: argparse.ArgumentParser) -> None:
    """Adds the flags of commands that run a fine-tuned model over a file."""
    command.add_argument("--threshold", type=float, metavar="NUMBER",
                         help="two classes: lowest score at which the answer is --positive-class; multilabel: "
                              "lowest probability at which a label is assigned, normally 0.5; qa: allows 'no "
                              "answer', chosen if its score exceeds the best answer's by more than this, such as "
                              "0 (default: the model's)")  # fmt: skip
    positive_class_flag(command, "the model's")
    command.add_argument("--skip-bad-rows", action="store_true", help="count unusable rows instead of stopping")
    command.add_argument("--device", default="auto", help=DEVICE_HELP)
    command.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"),
                         help="precision of matrix products")  # fmt: skip
    command.add_argument("--quiet", action="store_true", help="hide progress bars")


def column_flags(command: argparse.ArgumentParser, usual: str, *, labelled: bool = True) -> Any:
    """Adds the flags of commands that read labelled files, or files of that form; returns the flags' group.

    Args:
        usual: what is read if no column is named, for the help.
        labelled: whether the label is read.
    """
    group = command.add_argument_group("columns and encoding of the data (a COLUMN is a name, or a number from 1)")
    group.add_argument("--text-column", metavar="COLUMN", help=f"column with the text (default: {usual})")
    group.add_argument("--text-pair-column", metavar="COLUMN", help="column with the second text of a pair")
    if labelled:
        group.add_argument("--label-column", metavar="COLUMN", help="column with the label")
        group.add_argument("--label-columns", metavar="COLUMN", nargs="+",
                           help="multilabel: one column of 0 and 1 per label, named after the label")  # fmt: skip
        group.add_argument("--label-separator", metavar="TEXT",
                           help="multilabel: separator of the labels in a cell that is not a list (default: a "
                                "comma)")  # fmt: skip
    group.add_argument("--encoding", help="encoding of a CSV, a TSV or a folder's texts, such as cp1252 for most "
                       "files from Excel or Windows (default: utf-8)")  # fmt: skip
    group.add_argument("--id-column", metavar="COLUMN",
                       help="column with a row's id; none: use the line where the row begins (default: a usual "
                            "name, such as id; else none)")  # fmt: skip
    group.add_argument("--header", action=argparse.BooleanOptionalAction, default=None,
                       help="whether the first line of a CSV or TSV names the columns (default: yes; where "
                            "columns are given by number, only if it holds a usual name)")  # fmt: skip
    return group


def given_columns(options: argparse.Namespace, file: str, form: str = "") -> Columns:
    """What the flags of `column_flags` say; None for a flag that was not given.

    Args:
        form: the file's format, whatever its name (`files.row_files.FORMS`).

    Raises:
        UserError: a flag that has no effect on a `file` of this kind.
    """
    if not os.path.isdir(file) and format_of(Path(file), form) not in DELIMITERS:
        why = f"no effect with {file}, which is neither CSV nor TSV"
        if options.header is not None:
            raise UserError(f"{'--header' if options.header else '--no-header'}: {why}")
        if options.encoding is not None:
            raise UserError(f"--encoding: {why}; other formats are UTF-8")
    label, labels, separator = (
        getattr(options, name, None) for name in ("label_column", "label_columns", "label_separator")
    )
    if label is not None and labels is not None:
        raise UserError("--label-column, --label-columns: give one of them, not both")
    if labels is not None and separator is not None:
        raise UserError("--label-separator: no effect with --label-columns, which hold one label each")
    if separator == "":
        raise UserError("--label-separator: expected at least one character, got ''")
    return Columns(
        text=options.text_column,
        pair=options.text_pair_column,
        label=label,
        id=options.id_column,
        encoding=options.encoding,
        header=options.header,
        labels=labels,
        separator=separator,
        group=getattr(options, "group_column", None),
    )


def config_flags(group: Any, config: type, names: Iterable[str], presets: Sequence[Any] = ()) -> None:
    """A flag for each of the named fields of a dataclass; absent flags leave no trace in the options.

    Args:
        presets: objects of that class, one of which has the defaults.
    """
    documentation, fields = field_docs(config), {field.name: field for field in dataclasses.fields(config)}
    for field in (fields[name] for name in names):
        flag, text = "--" + field.name.replace("_", "-"), _as_help(documentation.get(field.name, ""))
        text += _default_note([getattr(preset, field.name) for preset in presets] or [field.default])
        if type(field.default) is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(flag, type=type(field.default), default=argparse.SUPPRESS, help=text,
                               metavar=type(field.default).__name__.upper())  # fmt: skip


def _as_help(text: str) -> str:
    """A field's line of documentation in the style of the other flags' help: no capital, no full stop."""
    is_a_word = text[1:2].islower() or text[1:2] == " "
    return (text[:1].lower() + text[1:] if is_a_word else text).removesuffix(".").replace("%", "%%")


def _default_note(values: Sequence[Any]) -> str:
    """How --help shows a default that argparse does not know: the only value, or one for each preset."""
    value = values[0]
    if any(other != value for other in values):
        return " (default: the preset's)"
    if value is False:
        return ""
    if value is True:
        return " (default: yes)"
    if isinstance(value, float):
        return f" (default: {value:g})"
    return f" (default: {'empty' if value == '' else value})"


def field_docs(config: type) -> dict[str, str]:
    """Field name -> the line of documentation under it in the source."""
    body = ast.parse(inspect.getsource(config)).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, text in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            docs[field.target.id] = str(text.value.value)  # type: ignore[union-attr]
    return docs


def given(options: argparse.Namespace, config: type) -> dict[str, Any]:
    """The fields of `config` for which a flag was given."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in vars(options).items() if name in names and name != "model"}
