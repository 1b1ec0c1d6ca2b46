"""Pre-training: from a prepared corpus to RUN, a folder that can be watched, stopped and resumed.

`pretrain` is the whole of it and reads from top to bottom: open the corpus, resolve the configuration, build or
restore the model, then take steps and, between them, log, evaluate and save. `pretraining/setup.py` has what comes
before the first step, `pretraining/batches.py` makes the batches, `pretraining/evaluation.py` evaluates the run,
and `pretraining/run_folder.py` lists the contents of RUN.
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

from electra_core.checkpoint import snapshot, versions
from electra_core.electra import PretrainOutput
from electra_core.execution.distributed import join_ranks
from electra_core.execution.engine import static_steps
from electra_core.execution.placement import keep_freed_memory, resolve_device
from electra_core.execution.sharding import gathered
from electra_core.execution.static_batch import Shapes
from electra_core.execution.torch_state import for_training
from electra_core.masking import MaskFunction, mask
from electra_core.objectives import build_objective
from electra_core.optim import learning_rate
from electra_core.packing import PretrainBatch
from electra_core.pretraining.batches import Ahead
from electra_core.pretraining.evaluation import evaluate, health, heldout_loss, more_figures
from electra_core.pretraining.meter import Meter, flops_per_token
from electra_core.pretraining.run_folder import is_finished, model_card, save_models
from electra_core.pretraining.setup import (
    Job,
    Learner,
    Record,
    agreed_checkpoint,
    build_learner,
    check_request,
    cross_checked,
    open_job,
    open_record,
    with_agreed_engine,
    with_agreed_parts,
)
from electra_core.runs.checkpoint_files import remove_checkpoints
from electra_core.runs.guards import left_out, postmortem_name, said, spike, with_postmortem
from electra_core.runs.metrics_log import is_figure, last_evaluation, read_metrics
from electra_core.runs.notices import to_log
from electra_core.runs.progress import Progress, progress
from electra_core.runs.stop_request import ON_EVALUATION, StopRequest, asks_to_stop, deadline_of, tell_python
from electra_core.training import Diverged, Loop, StepResult, training_steps

TRAINING_STREAM = 1 << 31  # of random numbers; the examples use small ones, and one for every epoch


@dataclass(frozen=True)
class PretrainResult:
    """How a pre-training run ended."""

    out: Path
    steps: int
    tokens: int
    seconds: float
    evaluation: dict[str, float]
    stopped_by: str | None
    """None if all steps were done, else what ended the run (a signal, "time limit", "on_evaluation"); resuming
    continues it."""
    warnings: list[str]


@for_training()
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
    stop_at: float | None = None,
    quiet: bool = False,
    wandb: str | None = None,
    on_evaluation: Callable[[dict[str, float]], object] | None = None,
    mask: MaskFunction = mask,
) -> PretrainResult:
    """Pre-train a preset on a prepared corpus.

    Args:
        data: folder written by `electra prepare`, or several with one tokenizer.
        mix: weights with which several folders are sampled; None: in proportion to their tokens.
        out: RUN; must be empty or new unless `resume` or `overwrite`.
        model: name of a preset; None: small, or when continuing from a pair, the pair's preset and sizes.
        changes: fields of `PretrainConfig` that differ from the preset's.
        encoder_changes: fields of the discriminator's `EncoderConfig` that differ. Sizes not given follow from
            these (heads from a width, the generator's from the discriminator's: `sizes.py`).
        init_discriminator, init_generator: model directories to continue from, both or neither; not in `out`.
        resume: continue from the newest intact checkpoint in `out`. If there never was one, start from the
            beginning; if the run in `out` is finished and only its checkpoints were removed, do nothing.
        overwrite: start anew in an `out` that is not empty, or with `resume` holds no checkpoint.
        device: auto | cpu | cuda | cuda:N.
        max_minutes: save and stop this long after the call; 0: after one step.
        stop_at: save and stop at this Unix time (seconds), such as ten minutes before a scheduler ends the job;
            after one step if it is past.
        quiet: show no progress bar; warnings are shown all the same.
        wandb: Weights & Biases project to log to as well.
        on_evaluation: called with the figures of every evaluation, plus "step" and "tokens"; of several ranks, on
            the first. If it returns True, the run saves and stops as at a time limit. Anything else that it
            returns has no effect; what it raises ends all ranks.
        mask: chooses the masked positions, of held-out text too; `masking.py` says what it has to heed. A run is
            resumed with the function of the same name and module only.

    Raises:
        UserError: bad configuration, not a corpus, an occupied folder, a resume that does not fit, ...
        KeyboardInterrupt: SIGINT came, not on the command line; all is saved.
    """
    started = time.monotonic()
    run, place = Path(out), resolve_device(device)
    ranks = join_ranks(place)
    quiet = quiet or not ranks.first
    start_from = init_discriminator, init_generator
    ranks.together(lambda: check_request(run, start_from, max_minutes, stop_at, mask))
    job = ranks.together(
        lambda: open_job(data, mix, model, changes or {}, encoder_changes or {}, place, ranks, start_from, mask)
    )
    job = with_agreed_parts(job)
    if resume and not overwrite and ranks.decided_by_first(lambda: is_finished(run, job.identity)):
        return _finished(run, job)
    checkpoint = agreed_checkpoint(job, run, start_from, resume, overwrite)
    learner = build_learner(job, checkpoint, start_from, quiet)
    job = with_agreed_engine(ranks.together(partial(cross_checked, job, learner)))
    record = open_record(job, run, checkpoint is not None, learner.first_step, wandb)

    stop = StopRequest(deadline_of(started, max_minutes, stop_at), ranks)
    meter = Meter(learner.tokens, flops_per_token(job.encoder, job.config), place, ranks.size)
    steps = _steps(job, learner, meter, run)
    with (
        progress("pre-training", job.config.steps, "step", before=learner.first_step, quiet=quiet) as bar,
        stop,
        record.state,
        record.log,
        record.writer,
    ):
        course = _Course(job, learner, record, meter, bar, on_evaluation)
        if init_discriminator is not None and course.step == 0:
            course.log_start()
        reason = course.follow(steps, stop)
        course.end(run, reason)
    ranks.leave()
    tell_python(
        reason, stop.reason, f"{run} holds step {course.step}", to_log if ranks.first else lambda line: None
    )
    seconds = time.monotonic() - started
    return PretrainResult(run, course.step, meter.tokens, seconds, course.evaluation, reason, course.warnings)


class _Course:
    """A run under way: what is done before, between and after its steps.

    Attributes:
        step: the number of steps taken.
        evaluation: the newest figures of held-out text, which the log has if it was their turn.
        warnings: those of that evaluation.
    """

    def __init__(
        self, job: Job, learner: Learner, record: Record, meter: Meter, bar: Progress,
        on_evaluation: Callable[[dict[str, float]], object] | None,
    ):  # fmt: skip
        self.job, self.learner, self.record, self.meter, self.bar = job, learner, record, meter, bar
        self.on_evaluation = on_evaluation
        self.step = learner.first_step
        self.evaluation: dict[str, float] = record.log.last_evaluation if job.ranks.first else {}
        self.warnings: list[str] = []

    def follow(self, steps: Generator[StepResult, None, None], stop: StopRequest) -> str | None:
        """Takes the steps; returns what stopped them before the last, if anything."""
        config = self.job.config
        for result in steps:
            self.step, last = result.step, result.step == config.steps
            self.meter.add(result)
            self.bar.update(1)
            self._log_losses(result)
            reason = stop.agreed()
            reason = None if last else reason  # all is done, and --resume would find nothing to do
            due = last or self.step % config.eval_every == 0
            if evaluated := due or reason == "time limit":  # a run on the clock ends with figures, too
                asked = self._evaluate(result, due)
                if asked and not last:
                    reason = reason or ON_EVALUATION
                if last and not math.isfinite(heldout_loss(self.evaluation, config)):
                    # Thrown into the generator, so that the run ends as after bad steps: with a post-mortem.
                    steps.throw(Diverged(f"step {self.step}: no finite loss on held-out text", self.step - 1))
            if reason or last or self.step % config.checkpoint_every == 0:
                self._save(result, self.evaluation if evaluated else None)
            if reason:
                return reason
        return None

    def log_start(self) -> None:
        """Logs what the pair that the run continues from knew of this text, for comparison."""
        begin = time.monotonic()
        self.record.log.write(0, tokens=0, **self._figures_of_heldout())
        self.meter.leave_out(begin)

    def _figures_of_heldout(self) -> dict[str, float]:
        job = self.job
        return evaluate(
            self.learner.electra, job.heldout, job.config, job.device, job.autocast, job.ranks, job.batches.mask
        )

    def _log_losses(self, result: StepResult) -> None:
        """Logs and shows a step's figures, if it is a step's turn."""
        if not self.job.ranks.first or result.step % self.job.config.log_every:
            return
        log, row = self.record.log, self.meter.row(result)
        log.write(result.step, **row, **said([spike(log.recent_losses, row["loss"])], self.bar))
        self.bar.note(loss=f"{row['loss']:.3f}", tokens_per_s=f"{row['tokens_per_second']:,.0f}")

    def _evaluate(self, result: StepResult, due: bool) -> bool:
        """Evaluates the model after a step; returns whether the caller's function asks to stop.

        Args:
            due: whether it is logged; else the log stays that of an uninterrupted run.
        """
        begin, ranks, tokens = time.monotonic(), self.job.ranks, self.meter.tokens
        self.evaluation = self._figures_of_heldout()
        is_last = result.step == self.job.config.steps
        self.warnings = [*health(self.evaluation), *(left_out(result) if is_last else ())]
        if due:
            told = said(self.warnings if ranks.first else (), self.bar)
            self.record.log.write(result.step, tokens=tokens, **self.evaluation, **told)
        self.meter.leave_out(begin)
        figures = {"step": result.step, "tokens": tokens, **self.evaluation}
        return ranks.decided_by_first(lambda: asks_to_stop(self.on_evaluation, figures))

    def _save(self, result: StepResult, evaluation: dict[str, float] | None) -> None:
        """Starts writing a checkpoint.

        Args:
            result: of the last step.
            evaluation: made after that step, or None; its loss decides which checkpoint is the best.
        """
        job, learner, writer = self.job, self.learner, self.record.writer
        score = {} if evaluation is None else {"score": heldout_loss(evaluation, job.config)}
        job.ranks.together(writer.wait)
        tensors = snapshot(learner.electra, learner.optimizer, keep=job.ranks.first)
        meta = {"tokens": self.meter.tokens, "skipped_in_a_row": int(result.in_a_row), "start": learner.start}
        writer.save(result.step, tensors, {**meta, "identity": job.identity, **score})

    def end(self, run: Path, reason: str | None) -> None:
        """Writes both models and how the run ended; all ranks must call it."""
        job, record = self.job, self.record
        corpus = f"a corpus of {job.corpus.num_tokens:,} tokens (fingerprint `{job.corpus.fingerprint[:16]}`)"
        card = model_card(
            job.encoder, job.config, corpus, self.step, self.meter.tokens, self.evaluation, self.learner.start,
            versions(),
        )  # fmt: skip
        whole = _whole(job, self.learner.electra)
        job.ranks.only_first(lambda: save_models(run, whole, job.corpus.tokenizer, card))
        job.ranks.together(record.writer.wait)
        record.state.end(self.step, reason)
        if reason is None and job.config.keep_checkpoints == 0:
            job.ranks.only_first(lambda: remove_checkpoints(run / "checkpoints"))


def _finished(run: Path, job: Job) -> PretrainResult:
    """The result of a run that was finished before, from its log."""
    job.ranks.leave()
    rows = read_metrics(run / "metrics.jsonl")
    tokens = max((int(row["tokens"]) for row in rows if is_figure(row.get("tokens"))), default=0)
    return PretrainResult(run, job.config.steps, tokens, 0.0, last_evaluation(rows), None, [])


def _steps(job: Job, learner: Learner, meter: Meter, run: Path) -> Generator[StepResult, None, None]:
    """The run's steps, taken by the engine that was requested or suits the device (`execution/engine.py`).

    If they diverge, a post-mortem is left in RUN.
    """
    config, device, engine, ranks = job.config, job.device, job.engine, job.ranks
    model: Any = learner.electra
    if engine == "eager":
        model = ranks.data_parallel(model)  # the other engines sum the ranks' gradients themselves
    elif engine == "compile":
        model = torch.compile(model)

    def loss_function(batch: PretrainBatch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        output = model(batch, seed)
        return output.loss, _figures(output, batch)

    source: Callable[[int], list[PretrainBatch]] = job.batches
    take: Callable[..., Iterator[StepResult]] = training_steps
    if engine != "eager":  # in fixed shapes, from batches on the host
        source = job.batches.on(torch.device("cpu"))
        shapes, capture = Shapes.of_run(config, ranks.size), engine == "graph"
        if device.type == "cpu":
            keep_freed_memory()  # steps share a few shapes, so memory that one frees fits the next
        take = partial(static_steps, shapes=shapes, device=device, capture=capture)
    if device.type == "cuda":  # on a CPU, the thread would compete with the model
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
    """A step's figures for the log."""
    figures = {
        "loss": output.loss.detach(),
        "mlm_loss": output.mlm_loss.detach(),
        "rtd_loss": output.rtd_loss.detach(),
        "replaced_fraction": batch.mean_over_tokens(output.is_replaced_T.float()),
        "tokens": batch.counted_tokens(),
    }
    if output.word_loss is not None:
        figures["word_loss"] = output.word_loss.detach()
    return figures | more_figures(output)


def _whole(job: Job, electra: nn.Module) -> nn.Module:
    """The model with all of its parameters, gathered in host memory if sharded; all ranks must call it."""
    if not job.sharded:
        return electra
    model = build_objective(job.encoder, job.config)
    with torch.no_grad():
        for parameter, part in zip(model.parameters(), electra.parameters(), strict=True):
            parameter.copy_(gathered(part))
        for buffer, ours in zip(model.buffers(), electra.buffers(), strict=True):
            buffer.copy_(ours)
    return model
