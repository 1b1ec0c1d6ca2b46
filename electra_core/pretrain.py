"""Pre-training: from a prepared corpus to RUN, a folder that can be watched, stopped and resumed.

`pretrain` is the whole of it, read from top to bottom: open the corpus, resolve the configuration, build the
model (or restore it), then take steps, and log, evaluate and save between them. `run_folder.py` says what
lies in RUN, `batches.py` where batches come from, `evaluation.py` how the run is judged.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from electra_core.batches import Ahead, Batches
from electra_core.checkpoint import Checkpoint, CheckpointWriter, snapshot
from electra_core.config import PRESETS, EncoderConfig, PretrainConfig, updated
from electra_core.cooccurrence import check_vocabulary, cooccurrence_embeddings, log_frequencies
from electra_core.corpus import Corpus
from electra_core.distributed import Ranks, gathered, join_ranks, shard
from electra_core.electra import Generator, PretrainBatch, PretrainOutput
from electra_core.encoder import Layer, set_recompute
from electra_core.engine import choose_engine, static_steps
from electra_core.errors import UserError
from electra_core.evaluation import evaluate, health, heldout_loss
from electra_core.guards import postmortem_name, said, spike, with_postmortem
from electra_core.memory import fitting_parts
from electra_core.meter import Meter, flops_per_token
from electra_core.metrics_log import MetricsLog
from electra_core.mixing import open_data
from electra_core.model_dir import load_pair
from electra_core.objectives import build_objective
from electra_core.optim import build_optimizer, learning_rate
from electra_core.placement import autocast_context, resolve_device, resolve_precision
from electra_core.progress import progress
from electra_core.run_folder import (
    check_identity,
    find_checkpoint,
    make_run,
    model_card,
    run_identity,
    save_models,
    write_config,
)
from electra_core.static_batch import Shapes
from electra_core.stop_request import StopRequest
from electra_core.training import training_steps


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


def pretrain(
    data: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    mix: Sequence[float] | None = None,
    model: str = "small",
    changes: dict[str, Any] | None = None,
    encoder_changes: dict[str, Any] | None = None,
    init_discriminator: Path | str | None = None,
    init_generator: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    max_minutes: float | None = None,
    quiet: bool = False,
    wandb: str | None = None,
    on_evaluation: Callable[[dict[str, float]], None] | None = None,
) -> PretrainResult:
    """Pre-train a preset on a prepared corpus.

    Args:
        data: folder written by `electra prepare`, or several with one tokenizer.
        mix: how often each of several is visited, as weights; by their tokens if None.
        out: RUN; must be empty or new unless `resume` or `overwrite`.
        model: name of a preset.
        changes: fields of `PretrainConfig` that differ from the preset's.
        encoder_changes: fields of the discriminator's `EncoderConfig` that differ.
        init_discriminator, init_generator: model directories to go on from, both or neither.
        device: auto | cpu | cuda.
        max_minutes: save and stop after this long.
        wandb: project of Weights & Biases to log to as well.

    Raises:
        UserError: bad configuration, not a corpus, an occupied folder, a resume that does not fit, ...
    """
    run, place = Path(out), resolve_device(device)
    ranks = join_ranks(place)
    quiet = quiet or not ranks.first

    def opened() -> tuple[Corpus, Corpus, EncoderConfig, PretrainConfig, Batches]:
        corpus, heldout = open_data(data, mix), _heldout(data, mix)
        encoder, config = resolve_config(model, changes or {}, encoder_changes or {}, corpus)
        if config.accumulate == 0:
            config = replace(config, accumulate=fitting_parts(encoder, config, place, ranks.size))
        return corpus, heldout, encoder, config, Batches(corpus, config, place, ranks.rank, ranks.size)

    corpus, heldout, encoder, config, batches = ranks.together(opened)
    identity = run_identity(encoder, config, corpus)
    checkpoint = _agreed_checkpoint(ranks, run, resume, overwrite, identity)

    electra = build_objective(encoder, config)
    if not (sharded := config.sharding == "fsdp" and ranks.size > 1):
        electra.to(place)
    if checkpoint is None:
        given = (init_discriminator, init_generator)
        ranks.together(lambda: _start(electra, corpus, encoder, config, *given, quiet) if ranks.first else None)
        ranks.share(electra)
    if sharded:
        shard(electra, [module for module in electra.modules() if isinstance(module, Layer)], place)
    set_recompute(electra, config.recompute)
    optimizer = build_optimizer(electra, config)
    first_step = 0
    if checkpoint is not None:
        checkpoint.restore(electra, optimizer)
        first_step = checkpoint.step
    replica = ranks.data_parallel(electra)
    state = ranks.only_first(lambda: make_run(run, resumed=checkpoint is not None))
    state.begin(step=first_step, steps=config.steps)
    ranks.only_first(lambda: write_config(run / "config.toml", encoder, config))
    dtype = resolve_precision(config.precision, place)
    autocast = autocast_context(place, dtype)
    log = ranks.only_first(lambda: MetricsLog(run, first_step, wandb))
    seen = int(checkpoint.meta["tokens"]) if checkpoint else 0
    meter = Meter(seen, flops_per_token(encoder, config), place, ranks.size)
    warnings: list[str] = []
    last_evaluation = log.last_evaluation if ranks.first else {}
    reason: str | None = None
    started = time.monotonic()
    stop, step, evaluated = StopRequest(max_minutes, ranks), first_step, -1
    writer = ranks.only_first(lambda: CheckpointWriter(run / "checkpoints", config.keep_checkpoints, first_step))

    def save() -> None:
        writer.wait()
        score = {"score": heldout_loss(last_evaluation, config)} if evaluated == step else {}
        tensors = snapshot(electra, optimizer, keep=ranks.first)
        writer.save(step, tensors, {"tokens": meter.tokens, "identity": identity, **score})

    def loss_function(batch: PretrainBatch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        output = compiled(batch, seed)
        return output.loss, _figures(output, batch)

    engine = choose_engine(config.engine, place, ranks.size, dtype)
    compiled = torch.compile(replica) if engine == "compile" else replica
    take_steps: Any = partial(training_steps, ranks=ranks)
    source: Any = batches
    if engine != "eager":  # in fixed shapes, from batches on the host
        source = Batches(corpus, config, torch.device("cpu"))
        take_steps = partial(
            static_steps, shapes=Shapes.of_run(config), device=place, capture=engine == "graph"
        )  # fmt: skip
    if place.type == "cuda":  # a CPU has nothing else to make them with
        source = Ahead(source)
    steps = take_steps(
        electra, optimizer, loss_function, meter.timing(source), first_step=first_step, steps=config.steps,
        seed=config.seed,
        schedule=lambda t: learning_rate(t, config.learning_rate, config.steps, config.warmup_steps),
        clip_norm=config.clip_norm, autocast=autocast,
    )  # fmt: skip
    steps = with_postmortem(
        steps,
        run / postmortem_name(ranks.rank),
        electra,
        loss_function,
        batches,
        config.seed,
        autocast,
        config.batch_size,
    )
    with progress("pre-training", config.steps, "step", quiet=quiet) as bar, stop, state, writer:
        bar.update(first_step)
        for result in steps:
            step = result.step
            meter.add(result)
            bar.update(1)
            if ranks.first and step % config.log_every == 0:
                row = meter.row(result)
                log.write(step, **row, **said([spike(log.recent_losses, row["loss"])], bar))
                bar.note(loss=f"{row['loss']:.3f}", tokens_per_s=f"{row['tokens_per_second']:,.0f}")
            reason = stop.agreed()
            due = step % config.eval_every == 0 or step == config.steps
            if due or reason == "time limit":
                begin = time.monotonic()
                last_evaluation, evaluated = evaluate(electra, heldout, config, place, autocast, ranks), step
                warnings = health(last_evaluation)
                if due:  # the log is that of an uninterrupted run
                    log.write(step, tokens=meter.tokens, **last_evaluation, **said(warnings, bar))
                meter.leave_out(begin)
                if on_evaluation is not None:
                    on_evaluation({"step": step, "tokens": meter.tokens, **last_evaluation})
            if reason or step == config.steps or step % config.checkpoint_every == 0:
                save()
            if reason:
                break
        log.close()
        card = model_card(run, encoder, config, corpus, step, meter.tokens, last_evaluation)
        whole = _whole(electra, encoder, config) if sharded else electra
        ranks.only_first(lambda: save_models(run, whole, corpus, card=card))
        writer.wait()
        state.end(step, reason)
    ranks.leave()
    seconds = time.monotonic() - started
    return PretrainResult(run, step, meter.tokens, seconds, last_evaluation, reason, warnings)


def _whole(sharded: nn.Module, encoder: EncoderConfig, config: PretrainConfig) -> nn.Module:
    """The model with all of its parameters, in host memory; all ranks have to ask for it."""
    model = build_objective(encoder, config)
    with torch.no_grad():
        for parameter, part in zip(model.parameters(), sharded.parameters(), strict=True):
            parameter.copy_(gathered(part))
    return model


def _agreed_checkpoint(
    ranks: Ranks, run: Path, resume: bool, overwrite: bool, identity: dict[str, Any]
) -> Checkpoint | None:
    """The checkpoint that all ranks go on from, if any; rank 0 looks for it.

    Raises:
        UserError: as `find_checkpoint` and `check_identity`; another machine has another corpus, or another disk.
    """

    def found() -> list[Any]:
        checkpoint = find_checkpoint(run, resume, overwrite)
        if checkpoint is None:
            return [identity, None]
        check_identity(checkpoint, identity)
        return [identity, [str(checkpoint.path), checkpoint.step, checkpoint.meta]]

    their_identity, place = ranks.decided_by_first(found)

    def check() -> None:
        if json.loads(json.dumps(identity)) != json.loads(json.dumps(their_identity)):
            raise UserError(f"{socket.gethostname()}: corpus or configuration are not those of rank 0")
        if place is not None and not Path(place[0]).is_dir():
            raise UserError(
                f"{place[0]} is not there on {socket.gethostname()}: --out is to be seen by all machines"
            )

    ranks.together(check)
    return None if place is None else Checkpoint(Path(place[0]), place[1], place[2])


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
    if config.embedding_init == "cooccurrence":
        check_vocabulary(encoder.vocab_size, encoder.embedding_size)
    return encoder, config


def _start(
    electra: Any, corpus: Corpus, encoder: EncoderConfig, config: PretrainConfig,
    init_discriminator: Path | str | None, init_generator: Path | str | None, quiet: bool,
) -> None:  # fmt: skip
    """What a new run starts from, besides random numbers: given weights, or counted words."""
    if (init_discriminator is None) != (init_generator is None):
        raise UserError("--init-discriminator and --init-generator go together")
    if init_discriminator is not None and init_generator is not None:
        if config.objective != "electra":
            raise UserError(f"--init-discriminator: objective {config.objective!r} does not start from a pair")
        load_pair(electra, init_discriminator, init_generator)
    elif config.embedding_init == "cooccurrence":
        with progress("counting words", corpus.num_tokens, "token", quiet=quiet) as bar:
            vectors = cooccurrence_embeddings(
                corpus, encoder.embedding_size, encoder.initializer_range, config.seed
            )
            bar.update(corpus.num_tokens)
        with torch.no_grad():
            electra.generator.encoder.embeddings.word_embeddings.weight.copy_(vectors)
            for part in (electra.generator, electra.discriminator):
                if isinstance(part, Generator):  # also what replace-mlm and all-tokens-mlm predict words with
                    part.output_bias.copy_(log_frequencies(corpus))
            if config.tying == "none":
                electra.discriminator.encoder.embeddings.word_embeddings.weight.copy_(vectors)


def _figures(output: PretrainOutput, batch: PretrainBatch) -> dict[str, Tensor]:
    figures = {
        "loss": output.loss.detach(),
        "mlm_loss": output.mlm_loss.detach(),
        "rtd_loss": output.rtd_loss.detach(),
        "replaced_fraction": batch.mean_over_tokens(output.is_replaced_T.float()),
        "tokens": batch.counted_tokens(),
    }
    return figures if output.word_loss is None else figures | {"word_loss": output.word_loss.detach()}


def _heldout(data: Path | str | Sequence[Path | str], mix: Sequence[float] | None) -> Corpus:
    heldout = open_data(data, mix, "heldout")
    if heldout.num_tokens == 0:
        raise UserError(f"{heldout.directory}: no held-out text; prepare it with a larger --heldout-fraction")
    return heldout
