"""Everything before the first step of a pre-training run: corpus and configuration, model and optimizer.

    Job      what to train on, how, and where; `open_job`
    Learner  the model and its optimizer, new or restored from a checkpoint; `build_learner`
    Record   what the run writes: state, log, checkpoints; `open_record`

All ranks pass through here together, and an error on one of them ends all of them (`Ranks.together`). Nothing
is written before `open_record`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from electra_core.checkpoint import Checkpoint, CheckpointWriter, agreed_on
from electra_core.config import PRESETS, EncoderConfig, PretrainConfig, generator_config, updated
from electra_core.corpus import Corpus
from electra_core.electra import Electra, Generator
from electra_core.encoder import DisentangledEmbeddings, Encoder, set_recompute
from electra_core.errors import UserError, option
from electra_core.execution.cross_check import check_pretraining
from electra_core.execution.distributed import Ranks
from electra_core.execution.engine import agreed_engine, choose_engine
from electra_core.execution.memory import fitting_parts
from electra_core.execution.placement import autocast_context, resolve_precision
from electra_core.execution.sharding import shard
from electra_core.hub.meta_models import check_parameters
from electra_core.hub.tokenizer_loading import TOKENIZER_FILES
from electra_core.masking import MaskFunction, mask
from electra_core.model_dir import find_model
from electra_core.objectives import build_objective
from electra_core.optim import build_optimizer
from electra_core.pretraining.batches import Batches
from electra_core.pretraining.cooccurrence import check_vocabulary, cooccurrence_embeddings, log_frequencies
from electra_core.pretraining.mixing import open_data
from electra_core.pretraining.run_folder import (
    Pair,
    check_identity,
    check_same_start,
    check_start,
    mask_record,
    run_identity,
    start_record,
    write_config,
)
from electra_core.pretraining.start_pair import StartPair, check_sizes, read_pair, start_from_pair, with_pair_sizes
from electra_core.runs.folder import HALVES, find_checkpoint, make_run
from electra_core.runs.metrics_log import MetricsLog
from electra_core.runs.progress import progress
from electra_core.runs.state import RunState
from electra_core.runs.stop_request import check_time
from electra_core.sizes import with_followers
from electra_core.tokenizer import load_tokenizer

log = logging.getLogger("electra_core")

Data = Path | str | Sequence[Path | str]
"""A prepared corpus, or several."""


# What to train on, how and where -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What to train on, how, and where; the same on all ranks except for their share of the batches."""

    corpus: Corpus
    heldout: Corpus
    encoder: EncoderConfig
    """The discriminator's configuration, with the corpus's vocabulary."""
    config: PretrainConfig
    batches: Batches
    """Step -> this rank's parts of the step's batch, on `device`."""
    device: torch.device
    dtype: torch.dtype
    """The dtype of products."""
    engine: str
    """eager | static | compile | graph: how steps are carried out (`execution/engine.py`)."""
    ranks: Ranks

    @property
    def sharded(self) -> bool:
        """Whether each rank stores only a part of every parameter."""
        return _is_sharded(self.config, self.ranks)

    @property
    def autocast(self) -> AbstractContextManager[Any]:
        """Context of a forward pass."""
        return autocast_context(self.device, self.dtype)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same to resume from a checkpoint; JSON values."""
        return run_identity(self.encoder, self.config, self.corpus, self.batches.mask)


def check_request(
    run: Path, start_from: Pair, max_minutes: float | None, stop_at: float | None, mask: MaskFunction
) -> None:
    """Checks the arguments besides the configuration; nothing is written. For the arguments see `pretrain`.

    Raises:
        UserError: only one of the two models to start from, or one that lies in RUN; an invalid
            `max_minutes` or `stop_at`.
        ValueError: `mask` is no function.
    """
    if not callable(mask):
        raise ValueError(f"mask: expected a function with the signature of masking.mask, got {mask!r:.80}")
    if max_minutes is not None and not max_minutes >= 0:
        raise UserError(f"{option('max_minutes')}: expected a number of at least 0, got {max_minutes:g}")
    if stop_at is not None:
        check_time(stop_at)
    check_start(run, start_from)


def open_job(
    data: Data, mix: Sequence[float] | None, model: str | None, changes: dict[str, Any],
    encoder_changes: dict[str, Any], device: torch.device, ranks: Ranks, start_from: Pair = (None, None),
    mask: MaskFunction = mask,
) -> Job:  # fmt: skip
    """Opens the corpus and resolves the configuration; nothing is written. For the arguments see `pretrain`.

    Raises:
        UserError: not a corpus, a bad configuration, or a batch that cannot be split evenly or does not fit.
    """
    corpus, heldout = open_data(data, mix), open_data(data, mix, "heldout")
    if heldout.num_tokens == 0:
        raise UserError(
            f"{heldout.directory}: no held-out text; prepare more documents, or with a larger "
            f"{option('heldout_fraction')}"
        )
    _ = heldout.tokenizer  # read now, not at the first evaluation: the disk may be gone by then
    pair = read_pair(*start_from)
    model, changes, encoder_changes = with_pair_sizes(model, changes, encoder_changes, pair, tell=ranks.first)
    encoder, config = resolve_config(model, changes, encoder_changes, corpus, pair)
    dtype = resolve_precision(config.precision, device)
    if config.sharding == "fsdp" and ranks.size == 1:
        log.warning(f"{option('sharding', 'fsdp')}: no effect with one process, which holds the whole model")
    if config.warmup_steps >= config.steps and ranks.first:  # then the schedule peaks at half of the steps
        top = f"{config.steps / config.warmup_steps / 4:.1%}"
        log.warning(
            f"{option('warmup_steps', config.warmup_steps)} of {config.steps} steps: the learning rate "
            f"reaches only {top} of its peak"
        )
    heads, sharded = _head_sizes(encoder, config), _is_sharded(config, ranks)
    engine = choose_engine(config.engine, device, dtype, heads, sharded)
    if config.accumulate == 0:
        parts = fitting_parts(encoder, config, device, ranks.size, engine)
        config = replace(config, accumulate=parts)
    batches = Batches(corpus, config, device, ranks.rank, ranks.size, mask)
    return Job(corpus, heldout, encoder, config, batches, device, dtype, engine, ranks)


def _is_sharded(config: PretrainConfig, ranks: Ranks) -> bool:
    return config.sharding == "fsdp" and ranks.size > 1


def _head_sizes(encoder: EncoderConfig, config: PretrainConfig) -> set[int]:
    return {encoder.head_size, generator_config(encoder, config).head_size}


def with_agreed_parts(job: Job) -> Job:
    """The job with the same number of parts on every rank: that of the rank whose memory requires most.

    The ranks of a sharded model wait for one another in every part.
    """
    most = int(job.ranks.joined(torch.tensor([job.config.accumulate])).max())
    if most == job.config.accumulate:
        return job
    batches = job.batches.on(job.device, accumulate=most)
    return replace(job, config=batches.config, batches=batches)


def resolve_config(
    model: str, changes: dict[str, Any], encoder_changes: dict[str, Any], corpus: Corpus,
    pair: StartPair | None = None,
) -> tuple[EncoderConfig, PretrainConfig]:  # fmt: skip
    """The preset with the user's changes and what follows from them (`sizes.py`), for the corpus's vocabulary.

    A model to start from may have a larger vocabulary than its tokenizer: no text uses the additional rows, and
    its generator, which never had them as targets, hardly ever draws them.
    """
    if model not in PRESETS:
        raise UserError(f"{option('model', model)}: expected one of {', '.join(PRESETS)}")
    preset = PRESETS[model]
    changes, encoder_changes = with_followers(preset, changes, encoder_changes)
    encoder = updated(preset.discriminator, encoder_changes, "discriminator")
    words = max(corpus.tokenizer.vocab_size, pair.discriminator.vocab_size if pair else 0)
    encoder = replace(encoder, vocab_size=words, pad_token_id=corpus.tokenizer.pad_id)
    config = updated(preset.pretrain, changes, "configuration")
    _check_fit(encoder, config)
    if pair is not None:
        check_sizes(pair, encoder, config)
    elif config.embedding_init == "cooccurrence":
        check_vocabulary(encoder.vocab_size, encoder.embedding_size)
    return encoder, config


def _check_fit(encoder: EncoderConfig, config: PretrainConfig) -> None:
    """Raises UserError on a discriminator that cannot be pre-trained with this configuration."""
    if encoder.type_vocab_size < 2 and config.one_segment_probability < 1:
        raise UserError(
            f"type_vocab_size: expected at least 2, as examples have two segments, got {encoder.type_vocab_size} "
            f"(with {option('one_segment_probability', 1)} they have one)"
        )
    if encoder.initializer_range == 0:
        raise UserError("initializer_range: expected a number above 0, got 0.0: weights that are all 0 stay equal")
    if config.max_length > encoder.max_position_embeddings:
        raise UserError(
            f"max_length: {config.max_length} exceeds the model's {encoder.max_position_embeddings} positions"
        )
    if config.tying == "all" and (generator := generator_config(encoder, config)) != encoder:
        other = [
            f"{name} {value} for {wanted}"
            for (name, value), wanted in zip(vars(generator).items(), vars(encoder).values())
            if value != wanted
        ]
        raise UserError(f"tying: 'all' needs a generator of the discriminator's sizes, got {', '.join(other)}")


def agreed_checkpoint(job: Job, run: Path, start_from: Pair, resume: bool, overwrite: bool) -> Checkpoint | None:
    """The checkpoint that all ranks resume from, if any; rank 0 looks for it.

    Raises:
        UserError: as `find_checkpoint`, `check_identity` and `check_same_start`; a different corpus, or a disk
            without the checkpoint, on another machine.
    """
    identity = job.identity

    def found() -> Checkpoint | None:
        checkpoint = find_checkpoint(run, resume, overwrite)
        if checkpoint is not None:
            check_identity(checkpoint, identity)
            check_same_start(checkpoint, start_from)
        elif resume:
            log.info("%s: nothing to resume; starting at step 0", run)
        return checkpoint

    checkpoint = agreed_on(job.ranks, found)
    job.ranks.check_alike(identity, "corpus or configuration")
    return checkpoint


# Model and optimizer ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learner:
    """A model and its optimizer, new or restored from a checkpoint."""

    electra: Any
    """The objective's model (`objectives.py`)."""
    optimizer: torch.optim.Optimizer
    first_step: int
    """The first step to take: 0, or the number of steps before the checkpoint."""
    tokens: int
    """Number of tokens seen before it."""
    skipped: int
    """Number of skipped steps in a row right before it (`StepResult.in_a_row`)."""
    start: dict[str, list[str]] | None
    """What the run started from (`start_record`), on rank 0; None if its checkpoint does not say."""


def build_learner(job: Job, checkpoint: Checkpoint | None, start_from: Pair, quiet: bool) -> Learner:
    """The model on its device, the same on all ranks (or split over them), new or restored from the checkpoint.

    Raises:
        UserError: a checkpoint or model directory that does not fit.
        ValueError: as `check_savable`.
    """
    electra = job.ranks.together(lambda: _model(job))
    if checkpoint is None:
        start = job.ranks.together(lambda: _start(electra, job, start_from, quiet) if job.ranks.first else None)
        job.ranks.share(electra)
    if job.sharded:
        encoders = [module for module in electra.modules() if isinstance(module, Encoder)]
        shard(electra, [layer for encoder in encoders for layer in encoder.layers], job.device)
    set_recompute(electra, job.config.recompute)
    optimizer = build_optimizer(electra, job.config)
    if checkpoint is None:
        return Learner(electra, optimizer, first_step=0, tokens=0, skipped=0, start=start)
    job.ranks.together(lambda: checkpoint.restore(electra, optimizer))
    tokens, skipped = int(checkpoint.meta["tokens"]), int(checkpoint.meta.get("skipped_in_a_row", 0))
    return Learner(electra, optimizer, checkpoint.step, tokens, skipped, checkpoint.meta.get("start"))


def _model(job: Job) -> Any:
    """The objective's model, new, on its device unless it is still to be split."""
    electra = build_objective(job.encoder, job.config)
    check_savable(electra)
    return electra if job.sharded else electra.to(job.device)


NEEDED = {
    "discriminator": "the model that is kept",
    "generator": "another model than the one that is kept, as has_generator is True",
}


def check_savable(electra: Any) -> None:
    """Raises ValueError if a half of the model is missing, or could not be saved at the run's end: better now than
    then."""
    for kind in HALVES:
        part = getattr(electra, kind, None)
        if part is None:
            if kind == "discriminator" or electra.has_generator:
                raise ValueError(
                    f"{type(electra).__name__}.{kind}: expected {NEEDED[kind]}, got none; set it in __init__"
                )
            continue
        try:
            check_parameters(part)
        except ValueError as error:
            raise ValueError(f"{kind}: cannot be saved in the Hub's layout: {error}") from None


def cross_checked(job: Job, learner: Learner) -> Job:
    """The job, with another engine if the kernels compute wrong results (`execution/cross_check.py`).

    A sharded model is not checked, because every rank has only parts of it.
    """
    length, static = job.config.max_length, job.engine != "eager"
    if job.sharded or check_pretraining(learner.electra, job.device, job.dtype, length, static=static):
        return job
    heads = _head_sizes(job.encoder, job.config)
    return replace(job, engine=choose_engine(job.config.engine, job.device, job.dtype, heads))


def with_agreed_engine(job: Job) -> Job:
    """The job with an engine that works on all ranks (`execution.engine.agreed_engine`)."""
    return replace(job, engine=agreed_engine(job.engine, job.ranks))


def _start(electra: Any, job: Job, start_from: Pair, quiet: bool) -> dict[str, list[str]]:
    """Gives a new run its start beyond random values: the given weights, or counted co-occurrences. Returns the
    record of the given weights."""
    discriminator, generator = start_from
    if discriminator is not None and generator is not None:
        if not isinstance(electra, Electra):
            raise UserError(
                f"{option('init_discriminator')}: objective {job.config.objective!r} cannot start from a pair"
            )
        _check_words(job.corpus, discriminator)
        start_from_pair(electra, job.encoder, job.config, discriminator, generator)
    elif job.config.embedding_init == "cooccurrence":
        _start_from_counts(electra, job, quiet)
    return start_record(start_from)


def _check_words(corpus: Corpus, source: Path | str) -> None:
    """Refuses a model whose tokenizer is not the corpus's: the same id may mean another token."""
    directory = find_model(source)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return
    if load_tokenizer(directory).fingerprint() != corpus.manifest.tokenizer_fingerprint:
        raise UserError(
            f"{source}: its tokenizer differs from the corpus's; `electra prepare --tokenizer {directory}` makes "
            "a corpus with the model's; words are added to a model's with transformers (add_tokens, "
            "resize_token_embeddings)"
        )


@torch.no_grad()
def _start_from_counts(electra: Any, job: Job, quiet: bool) -> None:
    """Sets word embeddings from the corpus's co-occurrence counts, and output biases from its frequencies; frozen
    ones stay, as they come from elsewhere."""
    corpus, encoder, config = job.corpus, job.encoder, job.config
    with progress("counting words", corpus.num_tokens, "token", quiet=quiet) as bar:
        vectors = cooccurrence_embeddings(corpus, encoder.embedding_size, encoder.initializer_range, config.seed)
        bar.update(corpus.num_tokens)
    parts = [part for part in (getattr(electra, "generator", None), electra.discriminator) if part is not None]
    # A Generator has words to predict; so has replace-mlm's and all-tokens-mlm's discriminator.
    starts = [(part.output_bias, log_frequencies(corpus)) for part in parts if isinstance(part, Generator)]
    for part in parts:
        if not isinstance(part.encoder.embeddings, DisentangledEmbeddings):  # a difference, which starts as 0
            starts.append((part.encoder.embeddings.word_embeddings.weight, vectors))
    for parameter, values in starts:
        if parameter.requires_grad:
            parameter.copy_(values)


# What is written ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What rank 0 writes of a run; the other ranks have stand-ins that do nothing (`Ranks.only_first`)."""

    state: RunState
    """Whether the run is running, and how it ended; a context around the training."""
    log: MetricsLog
    """The log of losses and figures; also a context."""
    writer: CheckpointWriter
    """The writer of checkpoints; also a context."""


def open_record(job: Job, run: Path, resumed: bool, first_step: int, wandb: str | None) -> Record:
    """Creates and locks RUN, and writes its state and configuration.

    Raises:
        UserError: RUN cannot be created, another process trains in it, or `wandb` is not installed.
    """
    only_first = job.ranks.only_first
    state = only_first(lambda: make_run(run, resumed))
    state.begin(step=first_step, steps=job.config.steps, saved=first_step, **mask_record(job.batches.mask))
    only_first(lambda: write_config(run / "config.toml", job.encoder, job.config, job.batches.mask))
    log = only_first(lambda: MetricsLog(run, first_step, wandb))
    keep = job.config.keep_checkpoints
    writer = only_first(lambda: CheckpointWriter(run / "checkpoints", keep, first_step, state.saved))
    return Record(state, log, writer)
