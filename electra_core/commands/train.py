"""The commands that make something: `electra demo`, `prepare`, `pretrain` and `finetune`.

Each command's flags come first, then what it does with them. Importing torch takes seconds, and `--help` should
not wait for it, so the commands import what needs torch themselves.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from typing import Any

from electra_core.commands.flags import (
    MODEL_HELP,
    add_command,
    column_flags,
    config_flags,
    given,
    given_columns,
    output_flags,
    positive_class_flag,
    refuse_idle,
    training_flags,
    with_positive_class,
)
from electra_core.config import GENERATOR_SIZES, PRESETS, EncoderConfig, PretrainConfig, updated
from electra_core.errors import UserError
from electra_core.execution import torchrun
from electra_core.finetuning.settings import FinetuneSettings

STOPPED = 75
"""Exit status of a run that was stopped and saved: EX_TEMPFAIL, "try again"."""

OF_A_VOCABULARY = ("vocab_size", "model_type", "cased", "sample_characters")
"""Flags of `prepare` that say how a vocabulary is learned."""
OF_TOKENS = ("lines", "workers", "heldout_fraction", "drop_duplicates")
"""Flags of `prepare` that say how text becomes tokens."""
OF_A_GENERATOR = (
    "generator_weight", "temperature", "disallow_correct", "uniform_generator", "tying",
    *GENERATOR_SIZES.values(),
)  # fmt: skip
"""Flags of `pretrain` for the objectives that have a generator."""
PRETRAIN_GROUPS = {
    "objective": (
        "objective", "mask_fraction", "generator_weight", "discriminator_weight", "temperature",
        "disallow_correct", "uniform_generator", "tying",
    ),
    "length of training and batches": (
        "steps", "batch_size", "max_length", "one_segment_probability", "accumulate", "seed",
    ),
    "optimizer": (
        "optimizer", "learning_rate", "muon_learning_rate", "warmup_steps", "weight_decay", "adam_beta1",
        "adam_beta2", "adam_epsilon", "clip_norm",
    ),
    "evaluation, checkpoints and logs": (
        "eval_every", "eval_examples", "checkpoint_every", "keep_checkpoints", "log_every",
    ),
    "speed and memory": ("precision", "engine", "recompute", "sharding"),
    "initial weights": ("embedding_init", "position_init"),
    "generator": tuple(GENERATOR_SIZES.values()),
}  # fmt: skip
"""Heading in --help -> fields of PretrainConfig."""
ENCODER_FLAGS = (
    "embedding_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "initializer_range", "layer_norm_eps",
)  # fmt: skip
"""Fields of EncoderConfig that `pretrain` has flags for."""
FINETUNE_GROUPS = {
    "training (a named task has its own defaults for some of these)": (
        "epochs", "batch_size", "tokens_per_batch", "accumulate", "learning_rate", "warmup", "layerwise_decay",
        "original_depths", "optimizer", "weight_decay", "clip_norm", "seed", "seeds",
    ),
    "model and input": ("max_length", "truncate", "dropout", "class_weights", "freeze", "random_start"),
    "evaluation, checkpoints and logs": ("evaluations", "metric", "patience", "checkpoint_every", "log_every"),
    "speed": ("engine", "precision"),
}  # fmt: skip
"""Heading in --help -> fields of FinetuneSettings."""


def _demo_flags(commands: Any) -> None:
    command = add_command(
        commands, demo, "pre-train, fine-tune and compare tiny models on text that is already on this machine",
        "electra demo --minutes 4",
    )  # fmt: skip
    command.add_argument("--out", default="demo", metavar="DIR", help="folder for all output")
    command.add_argument("--minutes", type=float, help="time budget (default: 8 on a CPU, 2 on a GPU)")
    command.add_argument("--texts-only", action="store_true",
                         help="write corpus.txt and task/*.jsonl to --out, then stop")  # fmt: skip
    command.add_argument("--seed", type=int, default=0, help="seed of all random choices")
    training_flags(command)


def demo(options: Namespace) -> None:
    """The whole pipeline, on the embedded corpus."""
    from electra_core.demo import run_demo, texts_only

    if options.texts_only:
        refuse_idle(options, ("minutes", "seed", "device"), "with --texts-only")
        documents, task = texts_only(options.out, quiet=options.quiet, overwrite=options.overwrite)
        print(f"{options.out}/corpus.txt: {documents:,} docstrings, for electra prepare")
        print(f"{options.out}/task/train.jsonl, dev.jsonl: {len(task.train):,} + {len(task.dev):,} examples of "
              f"{len(task.labels)} areas, for electra finetune")  # fmt: skip
        return
    run_demo(
        options.out, minutes=options.minutes, quiet=options.quiet, device=options.device,
        overwrite=options.overwrite, seed=options.seed,
    )  # fmt: skip


def _prepare_flags(commands: Any) -> None:
    command = add_command(
        commands, prepare, "turn text files into a tokenizer and token shards",
        "electra prepare --text books/ wiki.txt.xz --out DATA",
    )  # fmt: skip
    files = ".txt, .jsonl, .json, .csv, .tsv, .parquet (also .gz, .xz, .zst), folders, or - for standard input"
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="PATH", help=files)
    source.add_argument("--merge", nargs="+", metavar="DIR", help="merge all --shard parts into one corpus")
    command.add_argument("--out", required=True, metavar="DATA", help="folder of the corpus")
    command.add_argument("--shard", metavar="I/N", help="prepare part I of N of the files, for instance one per "
                         "machine (needs --tokenizer PATH)")  # fmt: skip
    command.add_argument("--workers", type=int, default=1, metavar="N",
                         help="number of processes; does not change the result")  # fmt: skip
    output_flags(command)
    group = command.add_argument_group("text and documents")
    group.add_argument("--lines", default="auto", choices=("auto", "sentence", "paragraph", "wrapped"),
                       help="what one line of the text holds")  # fmt: skip
    group.add_argument("--text-field", default="text", metavar="NAME",
                       help="field of JSON rows, or column of a CSV, TSV or Parquet file")  # fmt: skip
    group.add_argument("--documents", default="blank-line", choices=("blank-line", "line", "file"),
                       help="what ends a document in a .txt file; line: each line is one document; file: each "
                            "file, as in the original's OpenWebText")  # fmt: skip
    group.add_argument("--heldout-fraction", type=float, default=0.005, metavar="FRACTION",
                       help="fraction of documents held out for evaluation; of several at least one")  # fmt: skip
    group.add_argument("--drop-duplicates", action="store_true", help="skip documents that occurred before")
    group.add_argument("--seed", type=int, default=0, help="seed of the tokenizer's sample and the held-out split")
    group = command.add_argument_group("tokenizer")
    group.add_argument("--tokenizer", default="sentencepiece", metavar="KIND-OR-PATH",
                       help="train one (sentencepiece or wordpiece), or use the one at a path")  # fmt: skip
    group.add_argument("--tokenizer-only", action="store_true",
                       help="train the tokenizer, write it to --out, then stop")  # fmt: skip
    group.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="tokens in a trained vocabulary")
    group.add_argument("--model-type", default="unigram", choices=("unigram", "bpe"),
                       help="SentencePiece's algorithm")  # fmt: skip
    group.add_argument("--cased", action="store_true", help="keep upper case and accents in a trained vocabulary")
    group.add_argument("--sample-characters", type=int, default=50_000_000, metavar="N",
                       help="characters of text that a vocabulary is trained on")  # fmt: skip


def prepare(options: Namespace) -> None:
    """Text -> corpus, a part of one, or a tokenizer; parts -> corpus."""
    from electra_core.corpora.merge import merge
    from electra_core.hub.model_places import find_pair
    from electra_core.prepare import prepare, train_tokenizer

    _check_prepare(options)
    shared = {"overwrite": options.overwrite, "quiet": options.quiet}
    of_text = {
        "tokenizer": options.tokenizer, "vocab_size": options.vocab_size, "model_type": options.model_type,
        "lowercase": not options.cased, "text_field": options.text_field, "documents": options.documents,
        "seed": options.seed, "sample_characters": options.sample_characters,
    }  # fmt: skip
    if options.merge:
        manifest = merge(options.merge, options.out, **shared)
    elif options.tokenizer_only:
        tokenizer = train_tokenizer(options.text, options.out, **of_text, **shared)
        print(f"vocabulary of {tokenizer.vocab_size:,} tokens; use it with --tokenizer {options.out}")
        return
    else:
        manifest = prepare(
            options.text, options.out, **of_text, **shared, lines=options.lines, workers=options.workers,
            heldout_fraction=options.heldout_fraction, drop_duplicates=options.drop_duplicates,
            shard=_shard(options.shard),
        )  # fmt: skip
    for note in manifest.notes:
        print(note)
    for split, counts in manifest.splits.items():
        print(f"{split}: {counts.tokens:,} tokens, {counts.sentences:,} sentences, {counts.documents:,} documents")
    if options.shard:
        print("next: electra prepare --merge PART... --out DATA   (once all parts are prepared)")
    elif manifest.splits["heldout"].documents:
        command = ["electra", "pretrain", "--data", str(options.out), "--out", "RUN"]
        if pair := find_pair(options.tokenizer):
            command += ["--init-discriminator", pair[0], "--init-generator", pair[1]]
        print(f"next: {shlex.join(command)}")
    elif manifest.splits["train"].documents > 1:
        raise UserError(f"{options.out}: no document is held out, but pre-training needs one; prepare again with "
                        "--overwrite and a larger --heldout-fraction")  # fmt: skip
    else:
        borders = {
            "blank-line": "in a .txt file, a blank line ends a document; with --documents line, each line does",
            "line": "each line of a .txt file is one document",
            "file": "each .txt file is one document",
        }  # fmt: skip
        raise UserError(f"{options.out}: the text is a single document, but pre-training needs a second one to "
                        f"hold out; add text ({borders[options.documents]})")  # fmt: skip


def _check_prepare(options: Namespace) -> None:
    """Raises UserError for values that make no sense."""
    numbers = (
        ("heldout_fraction", 0 < options.heldout_fraction < 1, "a number between 0 and 1"),
        ("workers", options.workers >= 1, "at least 1"),
        ("vocab_size", options.vocab_size >= 1, "at least 1"),
        ("sample_characters", options.sample_characters >= 1, "at least 1"),
        ("seed", 0 <= options.seed < 1 << 64, "a number from 0 to below 2^64"),
    )
    for name, good, expected in numbers:
        if not good:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: expected {expected}, got {getattr(options, name)}")
    if options.merge:
        of_text = (
            "tokenizer", *OF_A_VOCABULARY, *OF_TOKENS, "text_field", "documents", "seed", "shard",
            "tokenizer_only",
        )  # fmt: skip
        refuse_idle(options, of_text, "with --merge, whose parts are already prepared")
    if options.tokenizer not in ("sentencepiece", "wordpiece"):
        refuse_idle(
            options, OF_A_VOCABULARY, f"with --tokenizer {options.tokenizer}, which already has a vocabulary"
        )
    elif options.tokenizer == "wordpiece":
        refuse_idle(options, ("model_type",), "with --tokenizer wordpiece")
    if options.tokenizer_only:
        refuse_idle(options, (*OF_TOKENS, "shard"), "with --tokenizer-only")


def _shard(text: str | None) -> tuple[int, int] | None:
    """--shard I/N."""
    if text is None:
        return None
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal()):
        raise UserError(f"--shard: expected I/N, such as 3/8, got {text!r}")
    return int(part), int(parts)


def _pretrain_flags(commands: Any) -> None:
    command = add_command(
        commands, pretrain, "pre-train a generator and a discriminator on a prepared corpus",
        "electra pretrain --data DATA --out RUN --model small --steps 100000",
    )  # fmt: skip
    command.add_argument("--data", required=True, nargs="+", action="extend", metavar="DATA",
                         help="folder written by `electra prepare`; several must share one tokenizer")  # fmt: skip
    command.add_argument("--mix", nargs="+", type=float, metavar="WEIGHT",
                         help="sampling weight of each --data folder (default: its number of tokens)")  # fmt: skip
    command.add_argument("--out", required=True, metavar="RUN", help="folder of the run")
    command.add_argument(
        "--model",
        choices=tuple(PRESETS),
        help="size, which sets the defaults below (default: small, or that of --init-discriminator)",
    )
    command.add_argument("--config", metavar="FILE.toml", help="file of settings; flags take precedence over it")
    command.add_argument(
        "--init-discriminator",
        metavar="MODEL",
        help="start from this discriminator: model directory, RUN or tiny (needs --init-generator)",
    )
    command.add_argument(
        "--init-generator",
        metavar="MODEL",
        help="start from this generator: model directory, RUN or tiny (needs --init-discriminator)",
    )
    command.add_argument(
        "--resume", action="store_true", help="continue from the newest intact checkpoint in --out"
    )
    command.add_argument(
        "--max-minutes", type=float, metavar="MINUTES", help="save and stop after so many minutes"
    )
    command.add_argument(
        "--stop-at", metavar="TIME",
        help="save and stop at this time: seconds since 1970, or such as 2030-12-31T18:00 (local time)",
    )  # fmt: skip
    command.add_argument(
        "--wandb", metavar="PROJECT", help="also log to Weights & Biases (needs the package wandb)"
    )
    training_flags(command)
    presets = [preset.pretrain for preset in PRESETS.values()]
    for heading, names in PRETRAIN_GROUPS.items():
        config_flags(command.add_argument_group(heading), PretrainConfig, names, presets)
    encoders = [preset.discriminator for preset in PRESETS.values()]
    config_flags(command.add_argument_group("discriminator"), EncoderConfig, ENCODER_FLAGS, encoders)


def _unix_time(text: str | None) -> float | None:
    """--stop-at; without a zone it is local time."""
    from electra_core.runs.stop_request import check_time

    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    try:
        seconds = datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()  # "Z" is new in Python 3.11
    except (ValueError, OverflowError, OSError):
        raise UserError(
            f"--stop-at: expected seconds since 1970, or a time such as 2030-12-31T18:00, got {text!r}"
        ) from None
    check_time(seconds, text)
    return seconds


def pretrain(options: Namespace) -> int:
    """Corpus -> RUN."""
    from electra_core.pretrain import pretrain
    from electra_core.pretraining.run_folder import read_config

    changes, encoder_changes = read_config(options.config) if options.config else ({}, {})
    named = changes.pop("model", None)
    model = options.model or named
    changes |= given(options, PretrainConfig)
    encoder_changes |= given(options, EncoderConfig)
    _check_pretrain(options, model, changes, encoder_changes)
    stop_at = _unix_time(options.stop_at)
    result = pretrain(
        options.data, options.out, mix=options.mix, model=model, changes=changes, encoder_changes=encoder_changes,
        init_discriminator=options.init_discriminator, init_generator=options.init_generator,
        resume=options.resume, overwrite=options.overwrite, device=options.device,
        max_minutes=options.max_minutes, stop_at=stop_at, wandb=options.wandb, quiet=options.quiet,
    )  # fmt: skip
    if torchrun.rank() != 0:
        return 0
    for name, value in result.evaluation.items():
        print(f"{name.removeprefix('eval_'):>20}  {value:.4f}")
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    steps = f"{result.steps:,} step{'s' if result.steps > 1 else ''}"
    if result.stopped_by:
        print(f"stopped by {result.stopped_by} after {steps}; to continue, repeat the command with --resume")
        return _stopped()
    print(f"{steps}, {result.tokens:,} tokens; the model to fine-tune is {result.out}/discriminator")
    return 0


def _check_pretrain(
    options: Namespace, model: str | None, changes: dict[str, Any], encoder_changes: dict[str, Any]
) -> None:
    """Raises UserError for flags without effect, given the others. (A `--config` file may hold any setting.)"""
    from electra_core.objectives import objective_class
    from electra_core.pretraining.start_pair import read_pair
    from electra_core.sizes import with_followers

    pair = read_pair(options.init_discriminator, options.init_generator)
    model = model or (pair.preset if pair else "small")
    if model not in PRESETS:  # the error is raised where the preset is looked up
        return
    preset = PRESETS[model]
    changes, _ = with_followers(preset, changes, encoder_changes)
    config = updated(preset.pretrain, changes, "configuration")
    objective = f"with --objective {config.objective}"
    kind = objective_class(config.objective)
    if not kind.has_generator:
        refuse_idle(options, OF_A_GENERATOR, f"{objective}, which has no generator")
    if not kind.judges:
        refuse_idle(options, ("discriminator_weight",), f"{objective}, which predicts tokens")
    if config.uniform_generator:
        refuse_idle(options, ("temperature", "generator_weight"), "with --uniform-generator")
    if config.optimizer != "muon":
        refuse_idle(options, ("muon_learning_rate",), f"with --optimizer {config.optimizer}")
    if options.init_discriminator:
        start = ("embedding_init", "position_init", "initializer_range")
        refuse_idle(options, start, "with --init-discriminator, whose weights are the start")


def _finetune_flags(commands: Any) -> None:
    command = add_command(
        commands, finetune, "fine-tune a pre-trained model on labelled data",
        "electra finetune --model RUN --task classify --train train.tsv --dev dev.tsv --out MODEL",
    )  # fmt: skip
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument("--task", required=True,
                         help="classify, multilabel, regress, tag, qa, choose; or a named task: cola, sst-2, "
                              "mrpc, sts-b, qqp, mnli, qnli, rte, wnli, imdb, conll-2003, squad, "
                              "squad-2")  # fmt: skip
    command.add_argument("--train", required=True, metavar="DATA",
                         help="CSV, TSV, JSONL, Parquet, CoNLL, SQuAD JSON or pos/neg folders; for a named task "
                              "also the data set's folder")  # fmt: skip
    command.add_argument("--dev", metavar="DATA",
                         help="like --train (default: hold out a tenth of the training data)")  # fmt: skip
    positive_class_flag(command, "the larger of two numbers, the later in the alphabet")
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the fine-tuned model")
    command.add_argument(
        "--resume", action="store_true", help="continue from the newest intact checkpoint in --out"
    )
    command.add_argument(
        "--cache", metavar="DIR",
        help="folder that keeps tokenised data for later runs; none: no cache (default: "
             "~/.cache/electra-core/tokens)",
    )  # fmt: skip
    training_flags(command)
    columns = column_flags(command, "a usual name, such as text")
    columns.add_argument("--group-column", metavar="COLUMN",
                         help="without --dev: column whose equal values (of a patient, a document) stay together, "
                              "all held out or none")  # fmt: skip
    config_flags(columns, FinetuneSettings, ("skip_bad_rows",))
    for heading, names in FINETUNE_GROUPS.items():
        group = command.add_argument_group(heading)
        config_flags(group, FinetuneSettings, names)
    group.add_argument("--fp32", action="store_const", const="fp32", dest="precision", default=argparse.SUPPRESS,
                       help="same as --precision fp32")  # fmt: skip


def finetune(options: Namespace) -> int:
    """Pre-trained model and labelled data -> fine-tuned model."""
    from electra_core.downstream.named_tasks import choose_task, find_task
    from electra_core.finetune import finetune
    from electra_core.finetuning.token_cache import default_folder

    task, recommended = choose_task(options.task, given_columns(options, options.train))
    if options.positive_class is not None:
        task = with_positive_class(task, options.positive_class)
    named, train, dev = find_task(options.task), Path(options.train), options.dev
    if named is not None and train.is_dir() and (task.kind != "classify" or _is_data_set(train)):
        train, dev = named.find(train, "train"), dev or named.find(train, "dev")
    settings = FinetuneSettings(**{**recommended, **given(options, FinetuneSettings)})
    if settings.tokens_per_batch:
        refuse_idle(options, ("batch_size",), "with --tokens-per-batch")
    if settings.layerwise_decay == 1:
        refuse_idle(options, ("original_depths",), "with --layerwise-decay 1")
    report = finetune(
        options.model, task, train, dev, options.out, settings, device=options.device,
        resume=options.resume, overwrite=options.overwrite, quiet=options.quiet,
        cache=None if options.cache == "none" else options.cache or default_folder(),
    )  # fmt: skip
    if torchrun.rank() == 0:
        print(f"fine-tuned model: {options.out}; metrics: {options.out}/metrics.json")
    return _stopped() if report.get("stopped_by") else 0


def _stopped() -> int:
    """The exit status of a run that was stopped."""
    # torchrun turns every other status into 1, and with --max-restarts would start all ranks again.
    return 0 if torchrun.hands_on_signals() else STOPPED


def _is_data_set(folder: Path) -> bool:
    """Whether it is a data set's own folder (train.tsv, dev.tsv, ...), not one of pos/ and neg/ texts."""
    return not (folder / "pos").is_dir()


COMMANDS = (_demo_flags, _prepare_flags, _pretrain_flags, _finetune_flags)
"""Each adds a command to the parser."""
