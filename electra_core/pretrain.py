"""Pre-training: from a prepared corpus to RUN, a folder that can be watched, stopped and resumed.

`pretrain` is the whole of it, read from top to bottom: open the corpus, resolve the configuration, build the
model (or restore it), then take steps, and log, evaluate and save between them. `pretrain_setup.py` has what comes
before the first step; `run_folder.py` says what lies in RUN, `batches.py` where batches come from, `evaluation.py`
how the run is judged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from electra_kernels.rng import fold
from torch import Tensor, nn

from electra_core.batches import Ahead, Batches
from electra_core.checkpoint import CheckpointWriter, snapshot
from electra_core.distributed import join_ranks
from electra_core.electra import PretrainBatch, PretrainOutput
from electra_core.engine import static_steps
from electra_core.evaluation import evaluate, health, heldout_loss
from electra_core.guards import left_out, postmortem_name, said, spike, with_postmortem
from electra_core.meter import Meter, flops_per_token
from electra_core.objectives import build_objective
from electra_core.optim import learning_rate
from electra_core.placement import keep_freed_memory, resolve_device
from electra_core.pretrain_setup import (
    Job,
    Learner,
    agreed_checkpoint,
    build_learner,
    check_request,
    cross_checked,
    open_job,
    open_record,
    with_agreed_engine,
    with_agreed_parts,
)
from electra_core.progress import progress
from electra_core.run_folder import model_card, save_models
from electra_core.sharding import gathered
from electra_core.static_batch import Shapes
from electra_core.stop_request import StopRequest
from electra_core.training import Diverged, Loop, StepResult, training_steps

TRAINING_STREAM = 1 << 31  # of random numbers; the examples have the small ones, and one for every epoch


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
    model: str | None = None,
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
        model: name of a preset; None: small, or for a pair to go on from, the preset and the sizes that it has.
        changes: fields of `PretrainConfig` that differ from the preset's.
        encoder_changes: fields of the discriminator's `EncoderConfig` that differ. Sizes that follow from these
            and are not given (heads from a width, the generator's from the discriminator's): `sizes.py`.
        init_discriminator, init_generator: model directories to go on from, both or neither; not in `out`.
        resume: go on from the newest intact checkpoint in `out`; without one, begin.
        overwrite: begin anew in an `out` that holds something.
        device: auto | cpu | cuda | cuda:N.
        max_minutes: save and stop after this long; 0: after one step.
        quiet: without a progress bar.
        wandb: project of Weights & Biases to log to as well.
        on_evaluation: is given the figures of every evaluation, and "step" and "tokens".

    Raises:
        UserError: bad configuration, not a corpus, an occupied folder, a resume that does not fit, ...
    """
    run, place = Path(out), resolve_device(device)
    ranks = join_ranks(place)
    quiet = quiet or not ranks.first
    start_from = init_discriminator, init_generator
    ranks.together(lambda: check_request(run, start_from, max_minutes))
    job = ranks.together(
        lambda: open_job(data, mix, model, changes or {}, encoder_changes or {}, place, ranks, start_from)
    )
    job = with_agreed_parts(job)
    checkpoint = agreed_checkpoint(job, run, start_from, resume, overwrite)
    learner = build_learner(job, checkpoint, start_from, quiet)
    job = with_agreed_engine(cross_checked(job, learner))
    record = open_record(job, run, checkpoint is not None, learner.first_step, wandb)

    stop, started = StopRequest(max_minutes, ranks), time.monotonic()
    config, log = job.config, record.log
    meter = Meter(learner.tokens, flops_per_token(job.encoder, config), place, ranks.size)
    steps = _steps(job, learner, meter, run)
    step, evaluation = learner.first_step, log.last_evaluation if ranks.first else {}
    warnings: list[str] = []
    reason: str | None = None

    with (
        progress("pre-training", config.steps, "step", before=step, quiet=quiet) as bar,
        stop,
        record.state,
        log,
        record.writer,
    ):
        for result in steps:
            step = result.step
            meter.add(result)
            bar.update(1)
            if ranks.first and step % config.log_every == 0:
                row = meter.row(result)
                log.write(step, **row, **said([spike(log.recent_losses, row["loss"])], bar))
                bar.note(loss=f"{row['loss']:.3f}", tokens_per_s=f"{row['tokens_per_second']:,.0f}")
            reason, last = stop.agreed(), step == config.steps
            reason = None if last else reason  # all is done, and --resume would find nothing to do
            due = last or step % config.eval_every == 0
            if evaluated := due or reason == "time limit":
                begin = time.monotonic()
                evaluation = evaluate(learner.electra, job.heldout, config, place, job.autocast, ranks)
                warnings = [*health(evaluation), *(left_out(result) if last else ())]
                if due:  # the log is that of an uninterrupted run
                    log.write(step, tokens=meter.tokens, **evaluation, **said(warnings, bar))
                meter.leave_out(begin)
                if on_evaluation is not None:
                    on_evaluation({"step": step, "tokens": meter.tokens, **evaluation})
                if last and not math.isfinite(heldout_loss(evaluation, config)):
                    # Thrown into the generator, so that the run ends as by a bad step: with a post-mortem.
                    steps.throw(Diverged(f"step {step}: no finite loss on held-out text", step - 1))
            if reason or last or step % config.checkpoint_every == 0:
                _save(job, learner, record.writer, result, meter.tokens, evaluation if evaluated else None)
            if reason:
                break
        card = model_card(run, job.encoder, config, job.corpus, step, meter.tokens, evaluation)
        whole = _whole(job, learner.electra)
        ranks.only_first(lambda: save_models(run, whole, job.corpus, card=card))
        record.writer.wait()
        record.state.end(step, reason)
    ranks.leave()
    seconds = time.monotonic() - started
    return PretrainResult(run, step, meter.tokens, seconds, evaluation, reason, warnings)


def _steps(job: Job, learner: Learner, meter: Meter, run: Path) -> Generator[StepResult, None, None]:
    """The run's steps, taken by the engine that was asked for or suits the device (`engine.py`).

    Where they diverge, a post-mortem is left in RUN.
    """
    config, device, engine, ranks = job.config, job.device, job.engine, job.ranks
    model: Any = learner.electra
    if engine == "eager":
        model = ranks.data_parallel(model)  # other engines add the ranks' gradients up by themselves
    elif engine == "compile":
        model = torch.compile(model)

    def loss_function(batch: PretrainBatch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        output = model(batch, seed)
        return output.loss, _figures(output, batch)

    source: Callable[[int], list[PretrainBatch]] = job.batches
    take: Callable[..., Iterator[StepResult]] = training_steps
    if engine != "eager":  # in fixed shapes, from batches on the host
        source = Batches(job.corpus, config, torch.device("cpu"), ranks.rank, ranks.size)
        shapes, capture = Shapes.of_run(config, ranks.size), engine == "graph"
        if device.type == "cpu":
            keep_freed_memory()  # every step is of the same shapes, so what one has freed fits the next
        take = partial(static_steps, shapes=shapes, device=device, capture=capture)
    if device.type == "cuda":  # a CPU has nothing else to make them with
        source = Ahead(source)
    loop = Loop(
        learner.electra, learner.optimizer, loss_function,
        schedule=lambda t: learning_rate(t, config.learning_rate, config.steps, config.warmup_steps),
        steps=config.steps, seed=fold(config.seed, TRAINING_STREAM), clip_norm=config.clip_norm,
        first_step=learner.first_step, skipped_before=learner.skipped, autocast=job.autocast, ranks=ranks,
    )  # fmt: skip
    steps = take(loop, meter.timing(source))
    return with_postmortem(steps, run / postmortem_name(ranks.rank), loop, job.batches, config.batch_size)


def _figures(output: PretrainOutput, batch: PretrainBatch) -> dict[str, Tensor]:
    """What the log says of a step."""
    figures = {
        "loss": output.loss.detach(),
        "mlm_loss": output.mlm_loss.detach(),
        "rtd_loss": output.rtd_loss.detach(),
        "replaced_fraction": batch.mean_over_tokens(output.is_replaced_T.float()),
        "tokens": batch.counted_tokens(),
    }
    return figures if output.word_loss is None else figures | {"word_loss": output.word_loss.detach()}


def _save(
    job: Job, learner: Learner, writer: CheckpointWriter, result: StepResult, tokens: int,
    evaluation: dict[str, float] | None,
) -> None:  # fmt: skip
    """Begins to write a checkpoint.

    Args:
        result: of the step before.
        evaluation: of this very step, if there is one: by its loss the best checkpoint is known.
    """
    score = {} if evaluation is None else {"score": heldout_loss(evaluation, job.config)}
    writer.wait()
    tensors = snapshot(learner.electra, learner.optimizer, keep=job.ranks.first)
    meta = {"tokens": tokens, "skipped_in_a_row": int(result.in_a_row), "start": learner.start}
    writer.save(result.step, tensors, {**meta, "identity": job.identity, **score})


def _whole(job: Job, electra: nn.Module) -> nn.Module:
    """The model with all of its parameters; a sharded one's in host memory, and all ranks have to ask for it."""
    if not job.sharded:
        return electra
    model = build_objective(job.encoder, job.config)
    with torch.no_grad():
        for parameter, part in zip(model.parameters(), electra.parameters(), strict=True):
            parameter.copy_(gathered(part))
    return model
