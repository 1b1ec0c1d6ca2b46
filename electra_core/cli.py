"""The command line, `electra COMMAND …`: finds the command, runs it, and turns its outcome into an exit status.

The commands, each with its flags, are in `commands/train.py`, `commands/use.py` and `commands/inspect.py`.

Exit status: 0 success; 1 a program error; 2 a user's mistake, with one clear line; 3 a run that diverged;
75 (EX_TEMPFAIL) stopped by a signal or time limit after saving, to be continued with `--resume`; 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence

from electra_core.commands import inspect, train, use
from electra_core.commands.flags import CommandParser, Help, Parser, is_to_say
from electra_core.errors import (
    AnotherRankFailed,
    UserError,
    disk_trouble,
    is_of_the_gpu,
    lost_rank,
    memory_trouble,
    on_command_line,
    one_line,
    printable,
    reading_trouble,
    threads_quiet_about_disks,
)
from electra_core.execution import torchrun
from electra_core.version import version

DIVERGED = 3
"""Exit status of a run that diverged: an unchanged restart would diverge again."""
WITHOUT_KERNELS = (
    "the GPU or a kernel on it failed; to run without this project's kernels, put ELECTRA_TRITON=0 in front of "
    "the command. Please report this, with the output of `electra info` and the following:"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    output = logging.StreamHandler()
    output.setFormatter(_Printable())
    logging.basicConfig(level=logging.INFO, handlers=[output])
    _print_any_letter()
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.version:
        print(f"electra-core {version()}")
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    try:
        if torchrun.is_one_of_several():
            if options.command not in ("pretrain", "finetune"):
                raise UserError(
                    "runs in a single process; torchrun is for pretrain and finetune; without torchrun, unset "
                    "WORLD_SIZE and RANK"
                )
            for handler in logging.getLogger().handlers:
                handler.addFilter(_SaidOnce())
        with threads_quiet_about_disks(), on_command_line():
            return options.run(options) or 0
    except AnotherRankFailed:  # the other rank prints the reason
        return 2
    except UserError as error:
        return _failed(options, 2, error)
    except FloatingPointError as error:  # training.Diverged
        return _failed(options, DIVERGED, error)
    except KeyboardInterrupt:
        return _failed(options, 130, "interrupted")
    except BrokenPipeError:  # the reader of our output has closed it, as in `electra predict … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if (trouble := disk_trouble(error) or reading_trouble(error)) is None:
            raise
        return _failed(options, 2, f"{error.filename}: {trouble}" if error.filename else trouble)
    except Exception as error:
        if torchrun.is_one_of_several() and (lost := lost_rank(error)) is not None:
            why = f"rank {torchrun.rank()}: lost another rank, which may say why ({lost})"
            return _failed(options, 1, why)
        if (trouble := memory_trouble(error, options.command)) is not None:
            return _failed(options, 2, trouble)
        if is_of_the_gpu(error):
            _failed(options, 1, WITHOUT_KERNELS)
        raise


def _print_any_letter() -> None:
    """Prints characters that stdout's encoding (the locale's) lacks as escapes like \\u2026, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")


class _Printable(logging.Formatter):
    """Lines that may quote files, names and labels."""

    def format(self, record: logging.LogRecord) -> str:
        """The message alone."""
        return printable(super().format(record))


class _SaidOnce(logging.Filter):
    """Lets a line that several processes log through only once, for each time that a process repeats it."""

    def __init__(self) -> None:
        super().__init__()
        self.times = Counter[str]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this process is the first to log the line."""
        line = record.getMessage()
        self.times[line] += 1
        return is_to_say(f"{line} ({self.times[line]})")


def _failed(options: argparse.Namespace, status: int, why: object) -> int:
    line = one_line(f"electra {options.command}: {why}")
    if is_to_say(line):
        print(line, file=sys.stderr)
    return status


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = Parser(prog="electra", description="ELECTRA: pre-train, fine-tune, inspect.", formatter_class=Help)
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", parser_class=CommandParser
    )
    for add in (*train.COMMANDS, *use.COMMANDS, *inspect.COMMANDS):
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
