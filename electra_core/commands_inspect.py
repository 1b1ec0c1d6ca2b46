"""The commands that show something: `electra detect`, `trace`, `info`, `flops` and `status`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from electra_core.command_flags import MODEL_HELP, add_command, refuse_idle
from electra_core.config import PRESETS
from electra_core.errors import UserError, writing

SHIPPED_NAME = "tiny, from the package"


def add_commands(commands: Any) -> None:
    """Adds them to the parser's."""
    for add in (_detect_flags, _trace_flags, _info_flags, _flops_flags, _status_flags):
        add(commands)


def _detect_flags(commands: Any) -> None:
    command = add_command(
        commands, detect, "how likely each token was replaced",
        'electra detect "the cat sat on the mayor."',
    )  # fmt: skip
    command.add_argument("text", help="a sentence, or - for standard input")
    command.add_argument("--model", help=f"{MODEL_HELP} (default: tiny)")
    command.add_argument("--html", metavar="FILE", help="write the shaded text as a page")
    command.add_argument("--json", action="store_true", help="print tokens, offsets and probabilities")


def detect(options: Namespace) -> None:
    """Replaced-token probability of every token."""
    from electra_core import detect as detection
    from electra_core.data_warnings import unknown_words
    from electra_core.model_dir import find_model, load_discriminator, shipped_model
    from electra_core.tokenizer import load_tokenizer

    source = options.model or shipped_model() / "discriminator"
    text, discriminator = _text(options.text), load_discriminator(source)
    tokenizer = load_tokenizer(find_model(source))
    if tokenizer.vocab_size != discriminator.config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has a vocabulary of {tokenizer.vocab_size:,} words, "
            f"the model one of {discriminator.config.vocab_size:,}"
        )
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
            print("(sentences end in a full stop where the model learned; without one its last word stands out)")


def _trace_flags(commands: Any) -> None:
    command = add_command(
        commands, trace, "one pre-training step in slow motion, on your own sentence",
        'electra trace "the chef cooked the meal." --html trace.html',
    )  # fmt: skip
    command.add_argument("text", help="a sentence, or - for standard input")
    command.add_argument(
        "--model", help="RUN folder with generator and discriminator; default: tiny, the one in the package"
    )
    command.add_argument("--seed", type=int, default=0, help="decides the masked positions and the draws")
    command.add_argument("--html", metavar="FILE", help="write a page to step through")


def trace(options: Namespace) -> None:
    """One pre-training step in slow motion."""
    from electra_core import trace_page, trace_terminal
    from electra_core.model_dir import shipped_model
    from electra_core.trace import load_electra, trace

    source = options.model or shipped_model()
    electra, tokenizer = load_electra(source)
    name = SHIPPED_NAME if source == shipped_model() else str(source)
    result = trace(electra, tokenizer, _text(options.text), options.seed, name)
    print(trace_terminal.to_terminal(result, colour=sys.stdout.isatty()))
    if options.html:
        _write_page(options.html, trace_page.to_html(result))


def _info_flags(commands: Any) -> None:
    command = add_command(
        commands, info, "what a model is; without one, what this machine computes with", "electra info --model RUN"
    )
    command.add_argument("--model", help=f"{MODEL_HELP}; with --memory a preset")
    command.add_argument("--memory", action="store_true", help="what a pre-training step of a preset needs")
    command.add_argument("--batch", type=int, default=128, help="sequences of that step")
    command.add_argument("--length", type=int, default=128, help="tokens of each")
    command.add_argument("--recompute", action="store_true", help="with layers computed again (see pretrain)")
    command.add_argument("--measure", action="store_true", help="also take the step on this CPU and measure it")
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
    from electra_core.machine import facts

    return facts()


def _model(source: str) -> dict[str, Any]:
    from electra_core.flops import discriminator_parameters
    from electra_core.model_dir import find_model, load_config

    directory = find_model(source)
    config, raw = load_config(directory)
    facts: dict[str, Any] = {"directory": str(directory), "architecture": (raw.get("architectures") or ["?"])[0]}
    return facts | {"discriminator_parameters": discriminator_parameters(config), **dataclasses.asdict(config)}


def _memory(options: Namespace) -> None:
    """Bytes of a pre-training step: on a GPU (this machine's, or else one that runs the kernels), and on a CPU."""
    import torch

    from electra_core.memory import measure_on_cpu, predict, summary, way_of

    if options.model not in PRESETS:
        got = f", got {options.model}" if options.model else ""
        raise UserError(f"--memory: --model expects one of {', '.join(PRESETS)}{got}")
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
        commands, flops, "parameters and training FLOPs, by the original's counting and by today's",
        "electra flops --model small",
    )  # fmt: skip
    command.add_argument("--model", required=True, help="a preset, or a model directory")
    command.add_argument("--json", action="store_true", help="print as JSON")


def flops(options: Namespace) -> None:
    """Parameters and FLOPs."""
    from electra_core.flops import summary

    if options.model in PRESETS:
        preset = PRESETS[options.model]
        figures = summary(preset.discriminator, preset.pretrain)
    else:
        from electra_core.model_dir import load_config

        figures = summary(load_config(options.model)[0])
    if options.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name.replace('_', ' '):>36}  {_readable(value)}" for name, value in figures.items()))


def _status_flags(commands: Any) -> None:
    command = add_command(
        commands, status, "how runs stand: state, speed, curves, warnings; beside each other and a healthy run",
        "electra status RUN",
    )  # fmt: skip
    command.add_argument("runs", nargs="+", metavar="RUN", help="folder of a pre-training or fine-tuning run")
    command.add_argument("--reference", metavar="FILE",
                         help="curve of a run that went well: a metrics.jsonl, a run, or JSON with rows; "
                              "none for none (default: the one that is shipped for the run's preset)")  # fmt: skip
    command.add_argument("--html", metavar="FILE", help="write a page with all curves")
    command.add_argument("--png", metavar="FILE", help="write a picture of the curves (needs matplotlib)")
    command.add_argument("--json", action="store_true", help="print as JSON")


def status(options: Namespace) -> None:
    """How runs stand."""
    from electra_core import status_views
    from electra_core.status import find_runs, judged, reference_curve

    runs = find_runs(options.runs)
    if len(runs) > len(status_views.MARKS):
        raise UserError(f"{len(runs)} runs: at most {len(status_views.MARKS)} can be told apart in one picture")
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
        Path(file).write_text(html, encoding="utf-8")
    print(f"open {file} in a browser", file=sys.stderr)


def _text(text: str) -> str:
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", errors="surrogateescape")  # whose bytes the tokenizer names
    if not text.strip():
        raise UserError("the text is empty")
    return text.strip()


def _readable(value: Any) -> str:
    if isinstance(value, float) and value >= 1e6:
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
