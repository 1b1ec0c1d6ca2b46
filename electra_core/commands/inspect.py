"""The commands that show something: `electra detect`, `trace`, `info`, `flops` and `status`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from electra_core.commands.flags import MODEL_HELP, add_command, refuse_idle
from electra_core.config import PRESETS
from electra_core.errors import UserError, printable, writing

SHIPPED_NAME = "tiny, from the package"


def _detect_flags(commands: Any) -> None:
    command = add_command(
        commands, detect, "show how likely each token is to have been replaced",
        'electra detect "the cat sat on the mayor."',
    )  # fmt: skip
    command.add_argument("text", help="a sentence, or - for standard input")
    command.add_argument("--model", help=f"{MODEL_HELP} (default: tiny)")
    command.add_argument("--html", metavar="FILE", help="write the shaded text as an HTML page")
    command.add_argument("--json", action="store_true", help="print tokens, offsets and probabilities as JSON")


def detect(options: Namespace) -> None:
    """Replaced-token probability of every token."""
    from electra_core import detect as detection
    from electra_core.model_dir import find_model, load_discriminator, shipped_model
    from electra_core.tokenizer import matching_tokenizer, unknown_words

    source = options.model or shipped_model() / "discriminator"
    text, discriminator = _text(options.text), load_discriminator(source)
    tokenizer = matching_tokenizer(find_model(source), discriminator.config.vocab_size)
    scores = detection.detect(discriminator, tokenizer, text)
    if warning := unknown_words(sum(score.token == "[UNK]" for score in scores), len(scores)):
        print(f"warning: {warning}", file=sys.stderr)
    if options.html:
        _write_page(options.html, detection.to_html(text, scores, options.model or SHIPPED_NAME))
    if options.json:
        print(json.dumps(detection.to_json(text, scores), ensure_ascii=False))
    else:
        print(detection.to_terminal(text, scores, colour=sys.stdout.isatty()))
        print(f"most likely replaced: {detection.most_suspicious(scores)}")
        if detection.ends_openly(text, scores):
            print("(the model learned from sentences with a full stop; without one, the last word stands out)")


def _trace_flags(commands: Any) -> None:
    command = add_command(
        commands, trace, "show one pre-training step, stage by stage, on your own sentence",
        'electra trace "the chef cooked the meal." --html trace.html',
    )  # fmt: skip
    command.add_argument("text", help="a sentence, or - for standard input")
    command.add_argument(
        "--model", help="RUN folder with generator and discriminator (default: tiny, the bundled model)"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the masked positions and the draws")
    command.add_argument("--html", metavar="FILE", help="write an HTML page to step through")


def trace(options: Namespace) -> None:
    """One pre-training step in slow motion."""
    from electra_core.model_dir import shipped_model
    from electra_core.trace import load_electra, trace
    from electra_core.tracing import page, terminal

    source = options.model or shipped_model()
    electra, tokenizer = load_electra(source)
    name = SHIPPED_NAME if source == shipped_model() else str(source)
    result = trace(electra, tokenizer, _text(options.text), options.seed, name)
    print(terminal.to_terminal(result, colour=sys.stdout.isatty()))
    if options.html:
        _write_page(options.html, page.to_html(result))


def _info_flags(commands: Any) -> None:
    command = add_command(
        commands, info, "describe a model or, without --model, what this machine computes with",
        "electra info --model RUN",
    )  # fmt: skip
    command.add_argument("--model", help=f"{MODEL_HELP}; with --memory, a preset")
    command.add_argument(
        "--memory", action="store_true", help="predict the memory of a preset's pre-training step"
    )
    command.add_argument("--batch", type=int, default=128, metavar="N", help="with --memory: sequences per step")
    command.add_argument("--length", type=int, default=128, metavar="N", help="with --memory: tokens per sequence")
    command.add_argument("--recompute", action="store_true", help="with --memory: as with pretrain --recompute")
    command.add_argument("--measure", action="store_true",
                         help="with --memory: also run the step on this CPU and measure it")  # fmt: skip
    command.add_argument("--json", action="store_true", help="print as JSON")


def info(options: Namespace) -> None:
    """What a model directory holds, what a step of a preset needs, or what this machine computes with."""
    if options.memory:
        return _memory(options)
    refuse_idle(options, ("batch", "length", "recompute", "measure"), "without --memory")
    facts = _machine() if options.model is None else _model(options.model)
    if options.json:
        print(json.dumps(facts))
    else:
        print("\n".join(f"{name:>30}  {_readable(value)}" for name, value in facts.items()))


def _machine() -> dict[str, Any]:
    from electra_core.execution.machine import facts

    return facts()


def _model(source: str) -> dict[str, Any]:
    from electra_core.flops import parameters
    from electra_core.hub.layout import classes_named
    from electra_core.model_dir import find_model, load_config

    directory = find_model(source)
    config, raw = load_config(directory)
    architecture = (raw.get("architectures") or ["?"])[0]
    facts: dict[str, Any] = {"directory": str(directory), "architecture": architecture}
    changed = classes_named(raw, str(directory / "config.json"))
    counted = {"changed_classes": ", ".join(changed)} if changed else parameters(config, architecture)
    return facts | counted | dataclasses.asdict(config)


def _memory(options: Namespace) -> None:
    """Bytes of a pre-training step: on a GPU (this machine's, or else one that runs the kernels), and on a CPU."""
    import torch

    from electra_core.execution.memory import measure_on_cpu, predict, summary, way_of

    if options.model not in PRESETS:
        got = f", got {options.model}" if options.model else ""
        raise UserError(f"--memory: --model: expected one of {', '.join(PRESETS)}{got}")
    preset = PRESETS[options.model]
    encoder, most = preset.discriminator, preset.discriminator.max_position_embeddings
    if options.batch < 1 or not 1 < options.length <= most:
        raise UserError(f"--batch, --length: expected at least one sequence of 2 to {most} tokens")
    config = dataclasses.replace(preset.pretrain, recompute=options.recompute, max_length=options.length)
    sizes = (options.batch, options.length)
    ways = {device: way_of(torch.device(device), config.precision) for device in ("cuda", "cpu")}
    facts: dict[str, dict[str, Any]] = {
        device: summary(predict(encoder, config, *sizes, torch.device(device)), graphs=way.kernels == "triton")
        for device, way in ways.items()
    }
    if options.measure:
        facts["cpu"]["measured_peak"] = measure_on_cpu(encoder, config, *sizes)
    if options.json:
        print(json.dumps(facts))
        return
    for device, figures in facts.items():
        products = "bf16" if ways[device].precision == torch.bfloat16 else "fp32"
        without = ", without Triton kernels" if ways[device].kernels == "reference" else ""
        print({"cuda": f"GPU, {products} products{without}, predicted", "cpu": "CPU, fp32, predicted"}[device])
        stages = {f"kept: {stage}": size for stage, size in figures.pop("kept_for_backward").items()}
        for name, value in {**figures, **stages}.items():
            counted = name in ("tokens", "kept_bytes_per_token")
            print(f"{name.replace('_', ' '):>32}  {_readable(value) if counted else f'{value / 2**20:,.1f} MiB'}")


def _flops_flags(commands: Any) -> None:
    command = add_command(
        commands, flops, "count parameters and training FLOPs, by the original's convention and by today's",
        "electra flops --model small",
    )  # fmt: skip
    command.add_argument("--model", required=True, help="preset or model directory")
    command.add_argument("--json", action="store_true", help="print as JSON")


def flops(options: Namespace) -> None:
    """Parameters and FLOPs."""
    from electra_core.flops import summary

    if options.model in PRESETS:
        preset = PRESETS[options.model]
        figures = summary(preset.discriminator, preset.pretrain)
    else:
        from electra_core.hub.layout import classes_named
        from electra_core.model_dir import load_config

        config, raw = load_config(options.model)
        if changed := classes_named(raw, options.model):
            names = ", ".join(changed)
            raise UserError(f"{options.model}: only ELECTRA's own layers can be counted; its encoder has {names}")
        figures = summary(config, architecture=(raw.get("architectures") or ["?"])[0])
    if options.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name.replace('_', ' '):>36}  {_readable(value)}" for name, value in figures.items()))


def _status_flags(commands: Any) -> None:
    command = add_command(
        commands, status, "show state, speed, curves and warnings of runs, compared with a healthy run",
        "electra status RUN",
    )  # fmt: skip
    command.add_argument("runs", nargs="+", metavar="RUN", help="folder of a pre-training or fine-tuning run")
    command.add_argument("--reference", metavar="FILE",
                         help="healthy run to compare with: a metrics.jsonl, a run, or JSON with rows; none: no "
                              "comparison (default: the curve shipped for the run's preset)")  # fmt: skip
    command.add_argument("--html", metavar="FILE", help="write an HTML page with all curves")
    command.add_argument("--png", metavar="FILE", help="write a picture of the curves (needs matplotlib)")
    command.add_argument("--json", action="store_true", help="print as JSON")


def status(options: Namespace) -> None:
    """The state of runs."""
    from electra_core.reports import status_views
    from electra_core.runs.status import find_runs, judged, reference_curve

    runs = find_runs(options.runs)
    if len(runs) > len(status_views.MARKS):
        raise UserError(f"RUN: expected at most {len(status_views.MARKS)} runs, got {len(runs)}")
    reference = reference_curve(options.reference, runs[0])
    verdicts = [f"{run.name}: {text}" for run in runs if reference for text in judged(run, reference[1])]
    if options.html:
        _write_page(options.html, status_views.to_html(runs, reference, verdicts))
    if options.png:
        with writing(f"--png {options.png}"):
            status_views.write_png(runs, reference, Path(options.png))
    if options.json:
        print(json.dumps({"runs": [run.to_json() for run in runs], "reference": verdicts}))
    else:
        width = min(100, shutil.get_terminal_size().columns)
        print(status_views.to_terminal(runs, reference, verdicts, width))


def _write_page(file: str, html: str) -> None:
    """Writes a page, and says where on stderr."""
    with writing(f"--html {file}"):
        Path(file).write_text(html, encoding="utf-8", errors="backslashreplace")
    print(f"open {file} in a browser", file=sys.stderr)


def _text(text: str) -> str:
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", errors="surrogateescape")  # the tokenizer names them
    if not text.strip():
        raise UserError("the text is empty")
    return text.strip()


def _readable(value: Any) -> str:
    if isinstance(value, float) and value >= 1e6:
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else printable(str(value))


COMMANDS = (_detect_flags, _trace_flags, _info_flags, _flops_flags, _status_flags)
"""Each adds a command to the parser."""
