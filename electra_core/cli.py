"""The command line: `electra COMMAND …`. Parsing is here, the doing in `commands.py`.

Flags of `pretrain` and `finetune` are made from the configuration dataclasses, with the line under each field
as the help. Exit status: 0 success; 1 a program error; 2 a user's mistake, with one clear line; 3 a run that
diverged; 75 (EX_TEMPFAIL) stopped by a signal or time limit after saving: `--resume` goes on.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from electra_core import __version__
from electra_core.errors import AnotherRankFailed, UserError, disk_trouble, threads_quiet_about_disks

MODEL_HELP = "model directory, RUN folder, or a name on the Hub (extra `hub`)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    from electra_core import commands  # torch takes seconds to import, --help should not

    try:
        if options.command != "pretrain" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("runs in one process; torchrun is for pretrain")
        with threads_quiet_about_disks():
            return getattr(commands, options.command)(options) or 0
    except AnotherRankFailed:  # which says why
        return 2
    except UserError as error:
        print(f"electra {options.command}: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # training.Diverged
        print(f"electra {options.command}: {error}", file=sys.stderr)
        return commands.DIVERGED
    except KeyboardInterrupt:
        print(f"electra {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `electra predict … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if (trouble := disk_trouble(error)) is None:
            raise
        print(
            f"electra {options.command}: {f'{error.filename}: ' * bool(error.filename)}{trouble}", file=sys.stderr
        )
        return 2


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = argparse.ArgumentParser(
        prog="electra", description="ELECTRA: pre-train, fine-tune, inspect.", formatter_class=_Help
    )
    parser.add_argument("--version", action="version", version=f"electra-core {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for add in (
        _demo,
        _prepare,
        _pretrain,
        _finetune,
        _evaluate,
        _predict,
        _detect,
        _trace,
        _info,
        _flops,
        _export,
        _convert,
        _status,
    ):
        add(commands)
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, but not those that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


def _command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=summary, description=f"{summary}\n\nexample:\n  {example}", formatter_class=_Help
    )


def _demo(commands: Any) -> None:
    command = _command(
        commands, "demo", "the whole story on text that is already on this machine", "electra demo --minutes 4"
    )
    command.add_argument("--out", default="demo", help="folder for everything that comes out")
    command.add_argument("--minutes", type=float, help="how long it may take (default: 8 on a CPU, 2 on a GPU)")
    command.add_argument("--texts-only", action="store_true",
                         help="write corpus.txt and task/*.jsonl to --out, and stop")  # fmt: skip
    _common(command, seed=True)


def _prepare(commands: Any) -> None:
    command = _command(
        commands, "prepare", "text files -> tokenizer and token shards",
        "electra prepare --text books/ wiki.txt.xz --out DATA",
    )  # fmt: skip
    files = ".txt, .jsonl, .parquet (also .gz .xz .zst), folders, or - for standard input"
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="PATH", help=files)
    source.add_argument("--merge", nargs="+", metavar="DIR", help="make one corpus of all parts made with --shard")
    command.add_argument("--out", required=True, help="folder of the corpus")
    command.add_argument("--shard", metavar="I/N", help="prepare the I-th of N parts of the files, on a machine "
                         "each; needs --tokenizer PATH")  # fmt: skip
    command.add_argument("--tokenizer-only", action="store_true",
                         help="train the tokenizer and write that alone to --out")  # fmt: skip
    command.add_argument("--tokenizer", default="sentencepiece",
                         help="sentencepiece or wordpiece trains one; a path takes an existing one")  # fmt: skip
    command.add_argument("--vocab-size", type=int, default=8192, help="words of a trained vocabulary")
    command.add_argument("--model-type", default="unigram", choices=("unigram", "bpe"), help="of SentencePiece")
    command.add_argument("--cased", action="store_true", help="keep upper case and accents")
    command.add_argument("--lines", default="auto", choices=("auto", "sentence", "paragraph", "wrapped"),
                         help="what a line of the text is")  # fmt: skip
    command.add_argument("--text-field", default="text", help="field of JSON lines, column of Parquet")
    command.add_argument("--workers", type=int, default=1, help="processes; the result is the same for any number")
    command.add_argument("--heldout-fraction", type=float, default=0.005, help="of the documents, for evaluation")
    command.add_argument("--sample-characters", type=int, default=50_000_000,
                         help="of text that a vocabulary is trained on")  # fmt: skip
    command.add_argument("--drop-duplicates", action="store_true", help="leave out documents seen before")
    command.add_argument("--seed", type=int, default=0, help="of the sample and the held-out split")
    _output(command)


def _pretrain(commands: Any) -> None:
    from electra_core.config import PRESETS, EncoderConfig, PretrainConfig

    command = _command(
        commands, "pretrain", "pre-train generator and discriminator on a prepared corpus",
        "electra pretrain --data DATA --out RUN --model small --steps 100000",
    )  # fmt: skip
    command.add_argument("--data", required=True, nargs="+", action="extend", metavar="DATA",
                         help="folder written by `electra prepare`, or several with one tokenizer")  # fmt: skip
    command.add_argument("--mix", nargs="+", type=float, metavar="WEIGHT",
                         help="how often each of several is visited (default: by their tokens)")  # fmt: skip
    command.add_argument("--out", required=True, help="folder of the run")
    command.add_argument("--model", choices=tuple(PRESETS), help="size; brings its defaults (default: small)")
    command.add_argument("--config", metavar="FILE.toml", help="configuration; flags go before it")
    command.add_argument(
        "--init-discriminator", metavar="DIR", help="go on from this model (with --init-generator)"
    )
    command.add_argument(
        "--init-generator", metavar="DIR", help="go on from this model (with --init-discriminator)"
    )
    command.add_argument("--resume", action="store_true", help="go on from the newest intact checkpoint in --out")
    command.add_argument("--max-minutes", type=float, help="save and stop after this long")
    command.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases too (package wandb)")
    _common(command)
    group = command.add_argument_group("configuration (default: the preset's)")
    _fields(group, PretrainConfig, skip=("model",))
    group = command.add_argument_group("discriminator (default: the preset's)")
    _fields(group, EncoderConfig, skip=("vocab_size", "pad_token_id"))


def _finetune(commands: Any) -> None:
    from electra_core.finetune_settings import FinetuneSettings

    command = _command(
        commands, "finetune", "fine-tune a pre-trained model on labelled data",
        "electra finetune --model RUN --task classify --train train.tsv --dev dev.tsv --out MODEL",
    )  # fmt: skip
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument("--task", required=True,
                         help="classify, regress, tag, qa, choose; or a named one: cola, sst-2, mrpc, sts-b, qqp, "
                              "mnli, qnli, rte, wnli, imdb, conll-2003, squad, squad-2")  # fmt: skip
    command.add_argument("--train", required=True,
                         help="CSV, TSV, JSONL, Parquet, CoNLL, SQuAD JSON, pos/neg folders; "
                              "for a named task also the data set's folder")  # fmt: skip
    command.add_argument("--dev", help="as --train; default: a tenth of the training data is held out")
    command.add_argument("--out", required=True, help="folder of the fine-tuned model")
    command.add_argument("--resume", action="store_true", help="go on from the newest intact checkpoint in --out")
    command.add_argument(
        "--cache", metavar="DIR",
        help="folder that keeps tokenised data for later runs (default: ~/.cache/electra-core/tokens; none: off)",
    )  # fmt: skip
    _columns(command)
    _common(command)
    group = command.add_argument_group("settings")
    _fields(group, FinetuneSettings)
    group.add_argument("--fp32", action="store_const", const="fp32", dest="precision", default=argparse.SUPPRESS,
                       help="short for --precision fp32")  # fmt: skip


def _evaluate(commands: Any) -> None:
    command = _command(
        commands, "evaluate", "metrics of a fine-tuned model on labelled data",
        "electra evaluate --model MODEL --data dev.tsv",
    )  # fmt: skip
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument("--data", required=True, help="labelled file, in the format the model was trained on")
    command.add_argument("--json", action="store_true", help="print the metrics as JSON")
    command.add_argument("--report", metavar="FILE", help="write the full report: .html, .json or .txt")
    command.add_argument("--skip-bad-rows", action="store_true", help="count rows that cannot be used, and go on")
    _machine(command)


def _predict(commands: Any) -> None:
    command = _command(
        commands, "predict", "predictions of a fine-tuned model, one line per input",
        "electra predict --model MODEL --input texts.txt > predictions.jsonl",
    )  # fmt: skip
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument("--input", required=True, help="JSONL, CSV, TSV or plain lines; - for standard input")
    command.add_argument("--format", default="jsonl", choices=("jsonl", "csv"), help="of the output")
    command.add_argument("--output", help="file to write (default: standard output); with --submission a folder")
    command.add_argument(
        "--submission", metavar="TASK",
        help="write the file that gluebenchmark.com takes for this GLUE task instead (--input: its test file)",
    )  # fmt: skip
    command.add_argument("--skip-bad-rows", action="store_true", help="count rows that cannot be used, and go on")
    _machine(command)


def _detect(commands: Any) -> None:
    command = _command(
        commands, "detect", "how likely each token was replaced",
        'electra detect "the cat sat on the mayor"',
    )  # fmt: skip
    command.add_argument("text", help="a sentence, or - for standard input")
    command.add_argument("--model", help=f"{MODEL_HELP}; default: the tiny model in the package")
    command.add_argument("--html", metavar="FILE", help="write the shaded text as a page")
    command.add_argument("--json", action="store_true", help="print tokens, offsets and probabilities")


def _trace(commands: Any) -> None:
    command = _command(
        commands, "trace", "one pre-training step in slow motion, on your own sentence",
        'electra trace "the chef cooked the meal" --html trace.html',
    )  # fmt: skip
    command.add_argument("text", help="a sentence, or - for standard input")
    command.add_argument(
        "--model", help="RUN folder with generator and discriminator; default: the package's tiny"
    )
    command.add_argument("--seed", type=int, default=0, help="decides the masked positions and the draws")
    command.add_argument("--html", metavar="FILE", help="write a page to step through")


def _info(commands: Any) -> None:
    command = _command(commands, "info", "what a model is", "electra info --model RUN")
    command.add_argument("--model", required=True, help=f"{MODEL_HELP}; with --memory a preset")
    command.add_argument("--memory", action="store_true", help="what a pre-training step of a preset needs")
    command.add_argument("--batch", type=int, default=128, help="sequences of that step")
    command.add_argument("--length", type=int, default=128, help="tokens of each")
    command.add_argument("--recompute", action="store_true", help="with layers computed again (see pretrain)")
    command.add_argument("--measure", action="store_true", help="also take the step on this CPU and measure it")
    command.add_argument("--json", action="store_true", help="print as JSON")


def _flops(commands: Any) -> None:
    command = _command(
        commands, "flops", "parameters and training FLOPs, by the original's counting and by today's",
        "electra flops --model small",
    )  # fmt: skip
    command.add_argument("--model", required=True, help="a preset, or a model directory")
    command.add_argument("--json", action="store_true", help="print as JSON")


def _export(commands: Any) -> None:
    command = _command(
        commands, "export", "a fine-tuned model as ONNX, checked against torch (extra `onnx`)",
        "electra export --model MODEL --onnx model.onnx",
    )  # fmt: skip
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument(
        "--onnx", required=True, metavar="FILE", help="gets the graph; the tokenizer lies beside it"
    )


def _convert(commands: Any) -> None:
    command = _command(
        commands, "convert", "TensorFlow 1 checkpoints of the original -> model directories",
        "electra convert --tf electra_small/ --out MODEL",
    )  # fmt: skip
    command.add_argument(
        "--tf", required=True, metavar="CHECKPOINT", help="PREFIX of the checkpoint, or its folder"
    )
    command.add_argument("--out", required=True, help="gets discriminator/ and generator/")
    command.add_argument("--num-heads", type=int, help="attention heads, if not one per 64 of the width")
    command.add_argument("--cased", action="store_true", help="the vocabulary is a cased one")


def _status(commands: Any) -> None:
    command = _command(
        commands, "status", "how runs stand: state, speed, curves, warnings; beside each other and a healthy run",
        "electra status RUN",
    )  # fmt: skip
    command.add_argument("runs", nargs="+", metavar="RUN", help="folder of a pre-training or fine-tuning run")
    command.add_argument("--reference", metavar="FILE",
                         help="curve of a run that went well: a metrics.jsonl, a run, or JSON with rows; "
                              "none for none (default: the one that is shipped for the run's preset)")  # fmt: skip
    command.add_argument("--html", metavar="FILE", help="write a page with all curves")
    command.add_argument("--png", metavar="FILE", help="write a picture of the curves (needs matplotlib)")
    command.add_argument("--json", action="store_true", help="print as JSON")


def _columns(command: argparse.ArgumentParser) -> None:
    command.add_argument("--text-column", help="name, or number from 1 (default: the usual names)")
    command.add_argument("--text-pair-column", help="second text, for pairs")
    command.add_argument("--label-column", help="the label")


def _common(command: argparse.ArgumentParser, seed: bool = False) -> None:
    if seed:
        command.add_argument("--seed", type=int, default=0, help="decides everything random")
    _output(command)
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def _machine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    command.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="of the products")
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def _fields(group: Any, config: type, skip: tuple[str, ...] = ()) -> None:
    """A flag for each field of a dataclass; absent flags leave no trace in the options."""
    documentation = field_docs(config)
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        flag, text = "--" + field.name.replace("_", "-"), documentation.get(field.name, "").replace("%", "%%")
        if type(field.default) is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(flag, type=type(field.default), default=argparse.SUPPRESS, help=text,
                               metavar=type(field.default).__name__.upper())  # fmt: skip


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


if __name__ == "__main__":
    sys.exit(main())
