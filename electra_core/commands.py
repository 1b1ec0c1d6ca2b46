"""What each command of the command line does; `cli.py` has the flags."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from electra_core.cli import given
from electra_core.config import PRESETS, EncoderConfig, PretrainConfig
from electra_core.errors import UserError

SHIPPED_NAME = "tiny, from the package"
STOPPED = 75
"""Exit status of a run that was stopped and saved: EX_TEMPFAIL, "try again"."""
DIVERGED = 3
"""Exit status of a run that diverged: to start it again as it is would give the same."""


def demo(options: Namespace) -> None:
    """The whole story on the embedded corpus."""
    from electra_core.demo import run_demo, texts_only

    if options.texts_only:
        documents, task = texts_only(options.out, quiet=options.quiet, overwrite=options.overwrite)
        print(f"{options.out}/corpus.txt: {documents:,} docstrings, for electra prepare")
        print(f"{options.out}/task/train.jsonl, dev.jsonl: {len(task.train):,} + {len(task.dev):,} examples of "
              f"{len(task.labels)} areas, for electra finetune")  # fmt: skip
        return
    run_demo(
        options.out, minutes=options.minutes, quiet=options.quiet, device=options.device,
        overwrite=options.overwrite, seed=options.seed,
    )  # fmt: skip


def prepare(options: Namespace) -> None:
    """Text -> corpus, a part of one, or a tokenizer; parts -> corpus."""
    from functools import partial

    from electra_core.merge import merge
    from electra_core.prepare import prepare, train_tokenizer
    from electra_core.progress import progress

    if not 0 < options.heldout_fraction < 1:
        raise UserError(f"--heldout-fraction: expected a number between 0 and 1, got {options.heldout_fraction:g}")
    shared = {"overwrite": options.overwrite, "progress": partial(progress, quiet=options.quiet)}
    of_text = {
        "tokenizer": options.tokenizer, "vocab_size": options.vocab_size, "model_type": options.model_type,
        "lowercase": not options.cased, "text_field": options.text_field, "seed": options.seed,
        "sample_characters": options.sample_characters,
    }  # fmt: skip
    if options.merge:
        manifest = merge(options.merge, options.out, **shared)
    elif options.tokenizer_only:
        tokenizer = train_tokenizer(options.text, options.out, **of_text, **shared)
        print(f"{tokenizer.vocab_size:,} words; --tokenizer {options.out} uses it")
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
        print("electra prepare --merge PART... --out DATA   makes one corpus of all parts")
    else:
        print(f"electra pretrain --data {options.out} --out RUN   goes on from here")


def _shard(text: str | None) -> tuple[int, int] | None:
    """--shard I/N."""
    if text is None:
        return None
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal()):
        raise UserError(f"--shard: expected I/N, as in 3/8, got {text!r}")
    return int(part), int(parts)


def pretrain(options: Namespace) -> int:
    """Corpus -> RUN."""
    from electra_core.pretrain import pretrain

    changes, encoder_changes = read_toml(options.config) if options.config else ({}, {})
    model = options.model or changes.get("model", "small")
    changes.pop("model", None)
    result = pretrain(
        options.data, options.out, mix=options.mix, model=model, changes=changes | given(options, PretrainConfig),
        encoder_changes=encoder_changes | given(options, EncoderConfig),
        init_discriminator=options.init_discriminator, init_generator=options.init_generator,
        resume=options.resume,
        overwrite=options.overwrite, device=options.device, max_minutes=options.max_minutes, wandb=options.wandb,
        quiet=options.quiet,
    )  # fmt: skip
    if int(os.environ.get("RANK", "0")) > 0:  # one of several processes: rank 0 tells how it went
        return 0
    for name, value in result.evaluation.items():
        print(f"{name.removeprefix('eval_'):>20}  {value:.4f}")
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if result.stopped_by:
        print(
            f"stopped by {result.stopped_by} after {result.steps:,} steps; the same command with --resume goes on"
        )
        # torchrun makes 1 of every other status, and with --max-restarts it would start all ranks again.
        return 0 if "LOCAL_RANK" in os.environ else STOPPED
    print(
        f"{result.steps:,} steps, {result.tokens:,} tokens; the model to fine-tune is {result.out}/discriminator"
    )
    return 0


def read_toml(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """([pretrain], [discriminator]) of a TOML file; keys outside a table count as [pretrain]."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from None
    encoder = tables.pop("discriminator", {})
    changes = tables.pop("pretrain", {})
    for values in (encoder, changes):
        if not isinstance(values, dict):
            raise UserError(f"{path}: [pretrain] and [discriminator] are tables")
    changes = {**tables, **changes}
    encoder = {key: value for key, value in encoder.items() if key not in ("vocab_size", "pad_token_id")}
    return changes, encoder


def finetune(options: Namespace) -> int:
    """Pre-trained model and labelled data -> fine-tuned model."""
    from electra_core.finetune import finetune
    from electra_core.finetune_settings import FinetuneSettings
    from electra_core.named_tasks import choose_task, find_task
    from electra_core.token_cache import default_folder

    task, recommended = choose_task(options.task, _columns(options))
    named, train, dev = find_task(options.task), Path(options.train), options.dev
    if (named is not None and train.is_dir() and task.kind != "classify") or (
        named is not None and _is_data_set(train)
    ):
        train, dev = named.find(train, "train"), dev or named.find(train, "dev")
    settings = FinetuneSettings(**{**recommended, **given(options, FinetuneSettings)})
    report = finetune(
        options.model, task, train, dev, options.out, settings, device=options.device,
        resume=options.resume, overwrite=options.overwrite, quiet=options.quiet,
        cache=None if options.cache == "none" else options.cache or default_folder(),
    )  # fmt: skip
    print(f"the fine-tuned model is {options.out}; its figures are in {options.out}/metrics.json")
    return STOPPED if report.get("stopped_by") else 0


def _is_data_set(folder: Path) -> bool:
    """A data set's own folder (train.tsv, dev.tsv, ...), not one of pos/ and neg/ texts."""
    return folder.is_dir() and not (folder / "pos").is_dir()


def _columns(options: Namespace) -> Any:
    from electra_core.labelled import Columns

    names = {"text": options.text_column, "pair": options.text_pair_column, "label": options.label_column}
    return Columns(**{role: name for role, name in names.items() if name is not None})


def evaluate(options: Namespace) -> None:
    """Metrics of a fine-tuned model."""
    from electra_core import task_report
    from electra_core.predict import evaluate

    predictor = _predictor(options)
    result = evaluate(predictor, options.data, skip_bad_rows=options.skip_bad_rows, quiet=options.quiet)
    if result.skipped.count:
        print(result.skipped.summary(), file=sys.stderr)
    report = task_report.make_report(result, str(options.model), str(options.data))
    if options.report:
        task_report.write_report(report, options.report)
    print(json.dumps(result.metrics) if options.json else task_report.to_text(report))


def predict(options: Namespace) -> None:
    """One line per input."""
    from electra_core.predict import predict_file

    predictor = _predictor(options)
    if options.submission:
        return _submission(predictor, options)
    sink = open(options.output, "w", encoding="utf-8") if options.output else sys.stdout
    try:
        bad = predict_file(
            predictor, options.input, sink, form=options.format, skip_bad_rows=options.skip_bad_rows,
            quiet=options.quiet or not options.output,
        )  # fmt: skip
    finally:
        sink.flush()
        if options.output:
            sink.close()
    if bad.count:
        print(bad.summary(), file=sys.stderr)


def _submission(predictor: Any, options: Namespace) -> None:
    """A row that was left out would move the answers of all rows behind it, so none may be."""
    from electra_core.labelled import BadRows
    from electra_core.named_tasks import submitted_task, write_submission

    source, named = Path(options.input), submitted_task(options.submission)
    if source.is_dir():
        source = named.find(source, "test")
    if options.skip_bad_rows:
        raise UserError("--submission: every row needs an answer, so --skip-bad-rows cannot be used with it")
    examples = predictor.task.read(source, BadRows(source), labelled=False)
    predictions = (prediction for _, prediction in predictor.stream(examples))
    print(f"wrote {write_submission(options.submission, predictions, options.output or '.')}")


def _predictor(options: Namespace) -> Any:
    from electra_core.predict import load

    return load(options.model, device=options.device, precision=options.precision)


def detect(options: Namespace) -> None:
    """Replaced-token probability of every token."""
    from electra_core import detect as detection
    from electra_core.model_dir import find_model, load_discriminator
    from electra_core.tokenizer import load_tokenizer

    source = options.model or shipped("detect") / "discriminator"
    text, discriminator = _text(options.text), load_discriminator(source)
    tokenizer = load_tokenizer(find_model(source))
    if tokenizer.vocab_size != discriminator.config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has a vocabulary of {tokenizer.vocab_size:,} words, "
            f"the model one of {discriminator.config.vocab_size:,}"
        )
    scores = detection.detect(discriminator, tokenizer, text)
    if options.html:
        _write_page(options.html, detection.to_html(text, scores, options.model or SHIPPED_NAME))
    if options.json:
        print(json.dumps(detection.to_json(text, scores), ensure_ascii=False))
    else:
        print(detection.to_terminal(text, scores, colour=sys.stdout.isatty()))
        print(f"most likely replaced: {detection.most_suspicious(scores)}")


def trace(options: Namespace) -> None:
    """One pre-training step in slow motion."""
    from electra_core import trace_page, trace_terminal
    from electra_core.demo import model_to_study, shipped_model
    from electra_core.trace import load_electra, trace

    source = options.model or model_to_study("demo")
    electra, tokenizer = load_electra(source)
    name = SHIPPED_NAME if source == shipped_model() else str(source)
    result = trace(electra, tokenizer, _text(options.text), options.seed, name)
    print(trace_terminal.to_terminal(result, colour=sys.stdout.isatty()))
    if options.html:
        _write_page(options.html, trace_page.to_html(result))


def info(options: Namespace) -> None:
    """What a model directory holds, or what a step of a preset needs."""
    if options.memory:
        return _memory(options)
    from electra_core.flops import discriminator_parameters
    from electra_core.model_dir import find_model, load_config

    directory = find_model(options.model)
    config, raw = load_config(directory)
    facts: dict[str, Any] = {"directory": str(directory), "architecture": (raw.get("architectures") or ["?"])[0]}
    facts |= {"discriminator_parameters": discriminator_parameters(config), **dataclasses.asdict(config)}
    if options.json:
        print(json.dumps(facts))
    else:
        print("\n".join(f"{name:>30}  {_readable(value)}" for name, value in facts.items()))


def _memory(options: Namespace) -> None:
    """Bytes of a pre-training step: on a GPU in bf16, on a CPU in fp32."""
    import torch

    from electra_core.memory import measure_on_cpu, predict, summary

    if options.model not in PRESETS:
        raise UserError(f"--memory: --model expects one of {', '.join(PRESETS)}, got {options.model}")
    preset = PRESETS[options.model]
    encoder, most = preset.discriminator, preset.discriminator.max_position_embeddings
    if options.batch < 1 or not 1 < options.length <= most:
        raise UserError(f"--batch, --length: expected at least one sequence of 2 to {most} tokens")
    config = dataclasses.replace(preset.pretrain, recompute=options.recompute, max_length=options.length)
    sizes = (options.batch, options.length)
    facts: dict[str, dict[str, Any]] = {
        device: summary(predict(encoder, config, *sizes, torch.device(device))) for device in ("cuda", "cpu")
    }
    if options.measure:
        facts["cpu"]["measured_peak"] = measure_on_cpu(encoder, config, *sizes)
    if options.json:
        print(json.dumps(facts))
        return
    for device, figures in facts.items():
        print({"cuda": "GPU, bf16 products, predicted", "cpu": "CPU, fp32, predicted"}[device])
        stages = {f"kept: {stage}": size for stage, size in figures.pop("kept_for_backward").items()}
        for name, value in {**figures, **stages}.items():
            counted = name in ("tokens", "kept_bytes_per_token")
            print(f"{name.replace('_', ' '):>32}  {_readable(value) if counted else f'{value / 2**20:,.1f} MiB'}")


def flops(options: Namespace) -> None:
    """Parameters and FLOPs."""
    from electra_core.flops import summary
    from electra_core.model_dir import load_config

    if options.model in PRESETS:
        preset = PRESETS[options.model]
        figures = summary(preset.discriminator, preset.pretrain)
    else:
        figures = summary(load_config(options.model)[0])
    if options.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name.replace('_', ' '):>36}  {_readable(value)}" for name, value in figures.items()))


def export(options: Namespace) -> None:
    """Fine-tuned model -> ONNX."""
    from electra_core.onnx_export import export

    difference = export(options.model, options.onnx)
    print(f"wrote {options.onnx}; its logits differ from torch's by {difference:.1e} of their size")


def convert(options: Namespace) -> None:
    """TensorFlow 1 checkpoint -> model directories."""
    from electra_core.convert_tf import convert_checkpoint

    lowercase = not options.cased
    for path in convert_checkpoint(options.tf, options.out, num_heads=options.num_heads, lowercase=lowercase):
        print(f"wrote {path}")


def status(options: Namespace) -> None:
    """How runs stand."""
    import shutil

    from electra_core import status_views
    from electra_core.status import find_runs, judged, reference_curve

    runs = find_runs(options.runs)
    if len(runs) > len(status_views.MARKS):
        raise UserError(f"{len(runs)} runs: at most {len(status_views.MARKS)} can be told apart in one picture")
    reference = reference_curve(options.reference, runs[0])
    verdicts = [f"{run.name}: {text}" for run in runs if reference for text in judged(run, reference[1])]
    if options.html:
        Path(options.html).write_text(status_views.to_html(runs, reference, verdicts), encoding="utf-8")
    if options.png:
        status_views.write_png(runs, reference, Path(options.png))
    if options.json:
        print(json.dumps({"runs": [run.to_json() for run in runs], "reference": verdicts}))
    else:
        width = min(100, shutil.get_terminal_size().columns)
        print(status_views.to_terminal(runs, reference, verdicts, width))


def shipped(command: str) -> Path:
    """The pre-trained tiny model in the package.

    Raises:
        UserError: it is not there.
    """
    folder = Path(__file__).parent / "tiny"
    if not folder.is_dir():
        raise UserError(f"no model comes with this installation; name one: electra {command} --model RUN …")
    return folder


def _write_page(file: str, html: str) -> None:
    """Writes a page, and says where on stderr."""
    try:
        Path(file).write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {file}: cannot be written ({error.strerror})") from None
    print(f"open {file} in a browser", file=sys.stderr)


def _text(text: str) -> str:
    text = sys.stdin.read() if text == "-" else text
    if not text.strip():
        raise UserError("the text is empty")
    return text.strip()


def _readable(value: Any) -> str:
    if isinstance(value, float) and value >= 1e6:
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
