"""A checkpoint of a pre-training run -> model directories: the models as they were after that step.

A run writes its models when it ends or is stopped. While it goes on, and of earlier steps, there are only its
checkpoints, from which these two are read here: to fine-tune the model of a run that takes days, the best one
instead of the last, or one of every thousand steps.
"""

from __future__ import annotations

from pathlib import Path

from electra_core.checkpoint import Checkpoint, intact, newest_intact
from electra_core.config import EncoderConfig, PretrainConfig, updated
from electra_core.corpus import Corpus
from electra_core.errors import UserError, option
from electra_core.objectives import build_objective
from electra_core.pretraining.run_folder import model_card, save_models
from electra_core.runs.folder import HALVES
from electra_core.runs.metrics_log import evaluation_at, read_metrics
from electra_core.tokenizer import Tokenizer, load_tokenizer


def convert_run(checkpoint: str | Path, out: str | Path, *, data: str | Path | None = None) -> list[Path]:
    """Writes OUT/discriminator and OUT/generator, as the run itself does at its end.

    Args:
        checkpoint: a folder in RUN/checkpoints; or RUN, for its newest one.
        data: a corpus that the run was given, for its tokenizer; None: the tokenizer of the models in RUN, which
            are there once it has ended or was stopped.

    Returns:
        The directories written.

    Raises:
        UserError: no such checkpoint, a damaged one, one of fine-tuning or of a model with parts of one's own that
            are not set here; no tokenizer, or another one's corpus; OUT is RUN, whose models are the run's own.
    """
    found = _open(Path(checkpoint))
    identity = found.meta.get("identity", {})
    if "pretrain" not in identity:
        raise UserError(f"{found.path}: not a checkpoint of a pre-training run")
    config = updated(PretrainConfig(), identity["pretrain"], str(found.path))
    encoder = updated(EncoderConfig(), identity["discriminator"], str(found.path))
    run = found.path.parent.parent
    if Path(out).resolve() == run.resolve():
        raise UserError(f"{option('out', str(out))}: is the run's own folder; give another")
    tokenizer = _tokenizer(run, data)
    tokenizer.check_fits(encoder.vocab_size, data or run)
    model = build_objective(encoder, config)
    try:
        found.restore_model(model)
    except OSError as error:  # a run under way keeps only its newest checkpoints
        raise UserError(f"{found.path}: removed by its run meanwhile ({error}); try again") from None
    corpus = f"the corpus with fingerprint `{identity['data'][:16]}`"
    evaluation = evaluation_at(read_metrics(run / "metrics.jsonl"), found.step)
    card = model_card(
        encoder, config, corpus, found.step, int(found.meta["tokens"]), evaluation, found.meta.get("start"),
        found.meta["versions"],
    )  # fmt: skip
    return save_models(Path(out), model, tokenizer, card)


def _open(place: Path) -> Checkpoint:
    """The checkpoint in a folder, or the newest of a run."""
    if not (place / "checkpoints").is_dir():
        if not (place / "state.safetensors").is_file():
            raise UserError(
                f"{place}: not a checkpoint; expected a folder in RUN/checkpoints, or RUN for the newest"
            )
        return intact(place.resolve())
    newest, damaged = newest_intact(place / "checkpoints")
    if newest is None:
        raise UserError(damaged[0] if damaged else f"{place}: holds no checkpoint")
    return newest


def _tokenizer(run: Path, data: str | Path | None) -> Tokenizer:
    if data is not None:
        return Corpus.open(data).tokenizer
    models = [run / kind for kind in HALVES if (run / kind / "config.json").is_file()]
    if not models:
        raise UserError(
            f"{run}: has written no model yet, whose tokenizer could be taken; give {option('data')} DATA"
        )
    return load_tokenizer(models[0])
