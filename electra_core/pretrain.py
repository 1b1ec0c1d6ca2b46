"""Pre-training: from a prepared corpus to RUN, a folder that can be watched, stopped and resumed.

RUN/config.toml       the resolved configuration
RUN/metrics.jsonl     a row every log_every steps, and one per evaluation
RUN/checkpoints/      training state, for --resume
RUN/discriminator/    model directory: what is fine-tuned afterwards
RUN/generator/        model directory: the masked language model
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from electra_core import __version__
from electra_core.checkpoint import Checkpoint, newest_intact, save_checkpoint
from electra_core.config import PRESETS, EncoderConfig, PretrainConfig, updated
from electra_core.cooccurrence import cooccurrence_embeddings, log_frequencies
from electra_core.corpus import Corpus
from electra_core.electra import PretrainBatch, PretrainOutput
from electra_core.errors import UserError
from electra_core.examples import Examples
from electra_core.masking import mask_tokens
from electra_core.model_dir import save_pretrained
from electra_core.objectives import build_objective
from electra_core.optim import build_optimizer, learning_rate
from electra_core.progress import Progress, progress
from electra_core.training import (
    MetricsLog,
    StepResult,
    StopRequest,
    autocast_context,
    resolve_device,
    resolve_precision,
    training_steps,
)

HELDOUT_SEED = 20_200_323  # held-out examples and masks are the same for every run and every evaluation


@dataclass(frozen=True)
class PretrainResult:
    """How a pre-training run ended."""

    out: Path
    steps: int
    tokens: int
    seconds: float
    evaluation: dict[str, float]
    stopped_by: str | None
    """None if all steps were done, else the signal or limit that ended it; --resume goes on."""
    warnings: list[str]


class Batches:
    """step -> this process's parts of the step's batch, a pure function of the configuration.

    All parts together are the same examples, masks and random rows whatever `world_size` and
    `config.accumulate` are.
    """

    def __init__(
        self, corpus: Corpus, config: PretrainConfig, device: torch.device, rank: int = 0, world_size: int = 1
    ):
        self.examples = Examples(corpus, config.max_length, config.seed)
        self.config, self.device = config, device
        self.rank, self.world_size = rank, world_size
        if config.batch_size % (config.accumulate * world_size):
            raise UserError(
                f"batch_size: {config.batch_size} sequences cannot be split evenly over {world_size} process(es) "
                f"x accumulate {config.accumulate}"
            )

    def __call__(self, step: int) -> list[PretrainBatch]:
        size, parts = self.config.batch_size, self.config.accumulate * self.world_size
        first = step * size
        planned = self.examples.plan(range(first, first + size))
        lengths = np.array([example.num_tokens for example in planned])
        masked = _counts(lengths, self.config)
        each = size // parts
        mine = range(self.rank * self.config.accumulate, (self.rank + 1) * self.config.accumulate)
        return [self._part(planned, lengths, masked, first, part * each, (part + 1) * each) for part in mine]

    def _part(
        self, planned: list[Any], lengths: np.ndarray, masked: np.ndarray, first: int, begin: int, end: int
    ) -> PretrainBatch:
        tokens = self.examples.batch(planned[begin:end])
        batch = mask(
            tokens, range(first + begin, first + end), self.examples.corpus, self.config, self.config.seed
        )
        batch = replace(
            batch,
            first_token=int(lengths[:begin].sum()),
            first_masked=int(masked[:begin].sum()),
            token_share=float(lengths[begin:end].sum() / lengths.sum()),
            masked_share=float(masked[begin:end].sum() / masked.sum()),
        )
        return batch.to(self.device)


def mask(tokens: Any, indices: range, corpus: Corpus, config: PretrainConfig, seed: int) -> PretrainBatch:
    """Mask packed examples as `config` and the corpus's tokenizer say."""
    tokenizer = corpus.tokenizer
    return mask_tokens(
        tokens,
        indices,
        seed=seed,
        mask_id=tokenizer.mask_id,
        special_ids=[tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id],
        fraction=config.mask_fraction,
        max_predictions=config.max_predictions,
    )


def pretrain(
    data: Path | str,
    out: Path | str,
    *,
    model: str = "small",
    changes: dict[str, Any] | None = None,
    encoder_changes: dict[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    max_minutes: float | None = None,
    quiet: bool = False,
    on_evaluation: Callable[[dict[str, float]], None] | None = None,
) -> PretrainResult:
    """Pre-train a preset on a prepared corpus.

    Args:
        data: folder written by `electra prepare`.
        out: RUN; must be empty or new unless `resume` or `overwrite`.
        model: name of a preset.
        changes: fields of `PretrainConfig` that differ from the preset's.
        encoder_changes: fields of the discriminator's `EncoderConfig` that differ.
        device: auto | cpu | cuda.
        max_minutes: save and stop after this long.

    Raises:
        UserError: bad configuration, not a corpus, an occupied folder, a resume that does not fit, ...
    """
    run, place = Path(out), resolve_device(device)
    corpus, heldout = Corpus.open(data), _heldout(data)
    encoder, config = resolve_config(model, changes or {}, encoder_changes or {}, corpus)
    checkpoint = _prepare_folder(run, resume, overwrite, quiet)
    identity = _identity(encoder, config, corpus)
    if checkpoint is not None:
        _check_identity(checkpoint, identity)

    electra = build_objective(encoder, config).to(place)
    if checkpoint is None and config.embedding_init == "cooccurrence":
        _words_from_counts(electra, corpus, encoder, config, quiet)
    optimizer = build_optimizer(electra, config)
    first_step = 0
    if checkpoint is not None:
        checkpoint.restore(electra, optimizer)
        first_step = checkpoint.step
    write_config(run / "config.toml", encoder, config)
    autocast = autocast_context(place, resolve_precision(config.precision, place))
    log = MetricsLog(run, first_step)
    batches = Batches(corpus, config, place)
    meter, warnings, last_evaluation = _Meter(), [], {}  # type: ignore[var-annotated]
    started, tokens = time.monotonic(), int(checkpoint.meta["tokens"]) if checkpoint else 0
    stop, step = StopRequest(max_minutes), first_step

    def save() -> None:
        meta = {"tokens": tokens, "identity": identity}
        save_checkpoint(run / "checkpoints", step, electra, optimizer, meta, config.keep_checkpoints)

    def loss_function(batch: PretrainBatch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        output = electra(batch, seed)
        return output.loss, _figures(output, batch)

    steps = training_steps(
        electra, optimizer, loss_function, batches, first_step=first_step, steps=config.steps, seed=config.seed,
        schedule=lambda t: learning_rate(t, config.learning_rate, config.steps, config.warmup_steps),
        clip_norm=config.clip_norm, autocast=autocast,
    )  # fmt: skip
    with progress("pre-training", config.steps, "step", quiet=quiet) as bar, stop:
        bar.update(first_step)
        for result in steps:
            step = result.step
            tokens += meter.add(result)
            bar.update(1)
            if step % config.log_every == 0:
                _log_training(log, meter, result, tokens, bar)
            if step % config.eval_every == 0 or step == config.steps:
                last_evaluation = evaluate(electra, heldout, config, place, autocast)
                log.write(step, tokens=tokens, **last_evaluation)
                warnings = health(last_evaluation)
                if on_evaluation is not None:
                    on_evaluation({"step": step, "tokens": tokens, **last_evaluation})
            if stop or step == config.steps or step % config.checkpoint_every == 0:
                save()
            if stop:
                break
    log.close()
    save_models(run, electra, corpus, card=_card(run, encoder, config, corpus, step, tokens, last_evaluation))
    seconds = time.monotonic() - started
    return PretrainResult(run, step, tokens, seconds, last_evaluation, stop.reason, warnings)


def resolve_config(
    model: str, changes: dict[str, Any], encoder_changes: dict[str, Any], corpus: Corpus
) -> tuple[EncoderConfig, PretrainConfig]:
    """The preset with the user's changes, sized for the corpus's vocabulary."""
    if model not in PRESETS:
        raise UserError(f"--model {model}: expected one of {', '.join(PRESETS)}")
    preset = PRESETS[model]
    encoder = updated(preset.discriminator, encoder_changes, "discriminator")
    encoder = replace(encoder, vocab_size=corpus.tokenizer.vocab_size, pad_token_id=corpus.tokenizer.pad_id)
    config = updated(preset.pretrain, changes, "configuration")
    if config.max_length > encoder.max_position_embeddings:
        raise UserError(
            f"max_length: {config.max_length} is more than the model's {encoder.max_position_embeddings} positions"
        )
    return encoder, config


@torch.no_grad()
def _words_from_counts(
    electra: Any, corpus: Corpus, encoder: EncoderConfig, config: PretrainConfig, quiet: bool
) -> None:
    """Word embeddings and output bias start from the corpus's counts (`cooccurrence.py`)."""
    with progress("counting words", 1, "corpus", quiet=quiet) as bar:
        vectors = cooccurrence_embeddings(corpus, encoder.embedding_size, encoder.initializer_range, config.seed)
        bar.update(1)
    electra.generator.encoder.embeddings.word_embeddings.weight.copy_(vectors)
    electra.generator.output_bias.copy_(log_frequencies(corpus))
    if config.tying == "none":
        electra.discriminator.encoder.embeddings.word_embeddings.weight.copy_(vectors)


@torch.no_grad()
def evaluate(
    electra: nn.Module, heldout: Corpus, config: PretrainConfig, device: torch.device, autocast: Any
) -> dict[str, float]:
    """Losses and metrics of both networks on held-out text; the same examples and masks every time."""
    from sklearn.metrics import roc_auc_score

    electra.eval()
    examples = Examples(heldout, config.max_length, HELDOUT_SEED)
    logits, labels, hits, mlm_losses, rtd_losses = [], [], [], [], []
    for first in range(0, config.eval_examples, 64):
        indices = range(first, min(first + 64, config.eval_examples))
        tokens = examples.batch(examples.plan(indices))
        batch = mask(tokens, indices, heldout, config, HELDOUT_SEED).to(device)
        with autocast:
            output = electra(batch, HELDOUT_SEED + first)
            mlm_losses.append((float(output.mlm_loss), len(batch.masked_positions_M)))
            rtd_losses.append((float(output.rtd_loss), batch.tokens.num_tokens))
            hits.append(_mlm_hits(electra, batch))
        logits.append(output.rtd_logits_T.float().cpu())
        labels.append(output.is_replaced_T.cpu())
    figures = {"eval_mlm_loss": _weighted(mlm_losses), "eval_mlm_accuracy": float(torch.cat(hits).float().mean())}
    replaced, score = torch.cat(labels), torch.cat(logits)
    fraction = float(replaced.float().mean())
    if 0 < fraction < 1:
        said = score > 0
        figures |= {
            "eval_rtd_loss": _weighted(rtd_losses),
            "eval_rtd_accuracy": float((said == replaced).float().mean()),
            "eval_rtd_precision": float(replaced[said].float().mean()) if said.any() else 0.0,
            "eval_rtd_recall": float(said[replaced].float().mean()),
            "eval_rtd_auc": float(roc_auc_score(replaced.numpy(), score.numpy())),
            "eval_replaced_fraction": fraction,
            "eval_base_rate_loss": -fraction * math.log(fraction) - (1 - fraction) * math.log(1 - fraction),
        }
    return figures


def health(evaluation: dict[str, float]) -> list[str]:
    """Warnings about a run that does not learn, in words; empty if all is well."""
    warnings = []
    if evaluation.get("eval_rtd_loss", 0.0) > 0.99 * evaluation.get("eval_base_rate_loss", math.inf):
        warnings.append(
            "The discriminator is at the base rate: its loss is the entropy of the replaced fraction, so it has "
            "learned nothing about the text yet. Normal early on; if it stays, lower the learning rate or "
            "the weight of its loss, or train for longer."
        )
    if evaluation.get("eval_replaced_fraction", 1.0) < 0.02:
        warnings.append("The generator is too good: under 2% of the tokens are replaced. Use a smaller one.")
    return warnings


def save_models(run: Path, electra: Any, corpus: Corpus, card: str) -> None:
    """Write RUN/discriminator and RUN/generator as model directories."""
    for kind in ("discriminator", "generator"):
        part = getattr(electra, kind, None)
        if part is not None:
            save_pretrained(part, run / kind, tokenizer=corpus.tokenizer, card=card)


def write_config(path: Path, encoder: EncoderConfig, config: PretrainConfig) -> None:
    """The resolved configuration as TOML: [pretrain] and [discriminator]."""
    lines = []
    for table, values in (("pretrain", config), ("discriminator", encoder)):
        lines.append(f"[{table}]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in dataclasses.asdict(values).items()]
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


class _Meter:
    """Sums of a run's figures since the last row of the log."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps = self.skipped = 0
        self.since = time.monotonic()

    def add(self, result: StepResult) -> int:
        """Note a step; returns its number of tokens."""
        self.steps += 1
        self.skipped += result.skipped
        for name, value in result.figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        return int(result.figures["tokens"])


def _log_training(log: MetricsLog, meter: _Meter, result: StepResult, tokens: int, bar: Progress) -> None:
    seconds = time.monotonic() - meter.since
    row = {name: value / meter.steps for name, value in meter.sums.items() if name != "tokens"}
    rate = meter.sums["tokens"] / seconds
    row |= {"gradient_norm": float(result.gradient_norm), "learning_rate": result.learning_rate}
    log.write(result.step, tokens=tokens, tokens_per_second=rate, skipped_steps=meter.skipped, **row)
    bar.note(loss=f"{row['loss']:.3f}", tokens_per_s=f"{rate:,.0f}")
    meter.reset()


def _figures(output: PretrainOutput, batch: PretrainBatch) -> dict[str, Tensor]:
    return {
        "loss": output.loss.detach(),
        "mlm_loss": output.mlm_loss.detach(),
        "rtd_loss": output.rtd_loss.detach(),
        "replaced_fraction": output.is_replaced_T.float().mean() * batch.token_share,
        "tokens": torch.tensor(float(batch.tokens.num_tokens)),
    }


def _mlm_hits(electra: Any, batch: PretrainBatch) -> Tensor:
    """bool [M]: where the generator's first choice is the original word."""
    masked = batch.tokens.with_ids(batch.masked_ids_T)
    return electra.generator(masked, batch.masked_positions_M).argmax(-1) == batch.target_ids_M


def _counts(lengths: np.ndarray, config: PretrainConfig) -> np.ndarray:
    from electra_core.masking import masked_counts

    return masked_counts(torch.from_numpy(lengths), config.mask_fraction, config.max_predictions).numpy()


def _weighted(pairs: list[tuple[float, int]]) -> float:
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def _heldout(data: Path | str) -> Corpus:
    heldout = Corpus.open(data, "heldout")
    if heldout.num_tokens == 0:
        raise UserError(f"{data}: no held-out text; prepare it with a larger --heldout-fraction")
    return heldout


def _prepare_folder(run: Path, resume: bool, overwrite: bool, quiet: bool) -> Checkpoint | None:
    """Make RUN, or find the checkpoint to go on from."""
    if resume:
        checkpoint, damaged = newest_intact(run / "checkpoints")
        if not quiet:
            for line in damaged:
                print(line)
        if damaged and checkpoint is None:
            raise UserError(f"{run}: no intact checkpoint is left to resume from")
        if checkpoint is not None:
            return checkpoint
    elif run.exists() and any(run.iterdir()):
        if not overwrite:
            raise UserError(f"{run} is not empty; --resume goes on with the run in it, --overwrite starts anew")
        _remove_run(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{run}: cannot be made ({error.strerror})") from None
    return None


def _remove_run(run: Path) -> None:
    """Remove what a run wrote, and nothing else that may lie in the folder."""
    import shutil

    for name in ("checkpoints", "discriminator", "generator", "tensorboard"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in ("config.toml", "metrics.jsonl"):
        (run / name).unlink(missing_ok=True)


# What may differ between a run and its resumption: how long it goes on, and how it is watched and saved.
_FREE = {"checkpoint_every", "keep_checkpoints", "eval_every", "eval_examples", "log_every", "accumulate"}


def _identity(encoder: EncoderConfig, config: PretrainConfig, corpus: Corpus) -> dict[str, Any]:
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    return {"pretrain": settings, "discriminator": dataclasses.asdict(encoder), "data": corpus.fingerprint}


def _check_identity(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Raise UserError with the differences if a checkpoint is of another run than `identity`."""
    saved = checkpoint.meta["identity"]
    differences = []
    for table in ("pretrain", "discriminator"):
        for name, value in identity[table].items():
            if saved[table].get(name) != value:
                differences.append(f"{name} was {saved[table].get(name)!r}, is now {value!r}")
    if saved["data"] != identity["data"]:
        differences.append("the corpus (or its tokenizer) is another one")
    if differences:
        raise UserError(f"cannot resume {checkpoint.path}: " + "; ".join(differences))


def _card(
    run: Path, encoder: EncoderConfig, config: PretrainConfig, corpus: Corpus, step: int, tokens: int,
    evaluation: dict[str, float],
) -> str:  # fmt: skip
    """README.md of a model directory: where the weights come from."""
    figures = "\n".join(f"| {name.removeprefix('eval_')} | {value:.4f} |" for name, value in evaluation.items())
    return f"""---
library_name: electra-core
tags: [electra, replaced-token-detection]
---
# ELECTRA `{config.model}`, pre-trained with electra-core {__version__}

Objective `{config.objective}`, {step:,} of {config.steps:,} steps of {config.batch_size} x {config.max_length}
tokens ({tokens:,} tokens in all), seed {config.seed}, on a corpus of {corpus.num_tokens:,} tokens
(fingerprint `{corpus.fingerprint[:16]}`), vocabulary of {encoder.vocab_size:,}.
torch {torch.__version__}, {platform.machine()}, Python {platform.python_version()}.

| held-out | value |
|---|---|
{figures}
"""
