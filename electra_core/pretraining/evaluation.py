"""Evaluates a pre-training run: losses and metrics of both networks on held-out text, and warnings."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from electra_core.config import OBJECTIVES, PretrainConfig
from electra_core.corpus import Corpus
from electra_core.electra import PretrainOutput
from electra_core.execution.distributed import Ranks
from electra_core.masking import MaskFunction, mask
from electra_core.metrics import roc_auc
from electra_core.packing import PretrainBatch
from electra_core.pretraining.mixing import examples_of

HELDOUT_SEED = 20_200_323  # the same held-out examples and masks for every run and every evaluation
BATCH_SIZE = 64
TAKEN = {
    "step", "warnings", "loss", "mlm_loss", "rtd_loss", "word_loss", "replaced_fraction", "tokens", "skipped",
    "tokens_per_second", "data_wait", "memory_mb", "skipped_steps", "mfu", "gradient_norm", "learning_rate",
    "mlm_accuracy", "rtd_accuracy", "rtd_precision", "rtd_recall", "rtd_auc", "base_rate_loss",
}  # fmt: skip
"""Columns of the log, and of held-out figures after `eval_`, that an objective's own figures cannot have."""


class Outcome(NamedTuple):
    """Results of both networks on a batch of held-out text; on the host."""

    sums: list[float]
    """Numbers of masked positions, of tokens, of sequences; the losses of the generator, of the discriminator
    and of predicted tokens (NaN if the objective predicts none); the whole loss, and what the objective adds."""
    hits_M: Tensor
    """bool: where the generator's top prediction is the original token; empty if it was never trained."""
    logits: Tensor
    """fp32: logits of the tokens on which the discriminator is evaluated, those that the objective judges."""
    replaced: Tensor
    """bool: whether the same tokens were replaced."""
    more: list[str]
    """Names of what the objective adds (`PretrainOutput.more`)."""


@torch.no_grad()
def evaluate(
    electra: nn.Module,
    heldout: Corpus,
    config: PretrainConfig,
    device: torch.device,
    autocast: Any,
    ranks: Ranks | None = None,
    mask: MaskFunction = mask,
) -> dict[str, float]:
    """Losses and metrics of both networks on held-out text; the same examples and masks every time.

    `mask` chooses the masked positions, as in `Batches`; the held-out examples have numbers of their own, from 0.

    An objective of one's own (registered, or with `PretrainOutput.more`) also has the whole `eval_loss` and an
    `eval_NAME` for each of `more`: means over the batches, weighted by their numbers of sequences.

    Each of `ranks` takes a contiguous part of the batches. All get the same figures, those of a single process.
    """
    electra.eval()
    ranks, examples = ranks or Ranks(), examples_of(heldout, config, HELDOUT_SEED)
    starts = range(0, config.eval_examples, BATCH_SIZE)
    each = -(-len(starts) // ranks.size)

    def computed(turn: int) -> Outcome:
        # A sharded model needs all ranks in every forward pass: a rank without a batch repeats the last one.
        first = starts[min(turn, len(starts) - 1)]
        indices = range(first, min(first + BATCH_SIZE, config.eval_examples))
        tokens = examples.batch(examples.plan(indices))
        batch = mask(tokens, indices, heldout.tokenizer, config, HELDOUT_SEED).to(device)
        return _outcome(electra, batch, config, HELDOUT_SEED + first, autocast)

    def all_computed() -> list[Outcome]:
        found = [computed(turn) for turn in turns]
        for outcome in found:
            if outcome.more != found[0].more:
                got = f"{found[0].more} and {outcome.more}"
                raise ValueError(f"PretrainOutput.more: expected the same names in every batch, got {got}")
        return found

    turns = range(ranks.rank * each, (ranks.rank + 1) * each)
    if hasattr(electra, "reshard"):
        found = all_computed()
        electra.reshard()  # type: ignore[operator]  # FSDP keeps embeddings and heads whole for a backward pass
    else:
        found = ranks.together(all_computed)
    mine = [outcome for turn, outcome in zip(turns, found) if turn < len(starts)]
    return _figures(mine, electra, config, ranks, found[-1].more)


def _outcome(electra: Any, batch: PretrainBatch, config: PretrainConfig, seed: int, autocast: Any) -> Outcome:
    """One batch through both networks."""
    with autocast:
        output = electra(batch, seed)
        hits_M = _mlm_hits(electra, batch) if _generates(electra, config) else torch.empty(0, dtype=torch.bool)
    word_loss = math.nan if output.word_loss is None else float(output.word_loss)
    counts = len(batch.masked_positions_M), batch.tokens.num_tokens, batch.tokens.num_sequences
    judged = batch.masked_positions_M if electra.judges == "masked" else slice(None)
    more = more_figures(output)
    whole = (output.loss, *more.values())
    return Outcome(
        [*counts, float(output.mlm_loss), float(output.rtd_loss), word_loss, *map(float, whole)],
        hits_M.cpu(),
        output.rtd_logits_T[judged].float().cpu(),
        output.is_replaced_T[judged].cpu(),
        list(more),
    )


def more_figures(output: PretrainOutput) -> dict[str, Tensor]:
    """What an objective of one's own adds to the figures (`PretrainOutput.more`), detached; sorted by name, as
    steps and ranks are summed by position.

    Raises:
        ValueError: a name that the log or the evaluation has itself, or a value that is no scalar tensor.
    """
    for name, value in output.more.items():
        if not isinstance(name, str) or not name or name in TAKEN or name.startswith(("eval_", "dev_")):
            raise ValueError(
                f"PretrainOutput.more: expected other names than the log's and the evaluation's own, got {name!r}"
            )
        if not isinstance(value, Tensor) or value.ndim:
            got = f"one of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"PretrainOutput.more[{name!r}]: expected a scalar tensor, got {got}")
    return {name: value.detach() for name, value in sorted(output.more.items())}


def _generates(electra: Any, config: PretrainConfig) -> bool:
    """Whether there is a generator and it is trained; with uniform draws it is not."""
    uniform = electra.has_generator and config.uniform_generator
    return getattr(electra, "generator", None) is not None and not uniform


def _figures(
    outcomes: list[Outcome], electra: Any, config: PretrainConfig, ranks: Ranks, more: list[str]
) -> dict[str, float]:
    """Figures over the batches of all ranks, each of which has its own, or none."""

    def joined(name: str, dtype: torch.dtype) -> Tensor:
        return ranks.joined(torch.cat([torch.empty(0, dtype=dtype), *(getattr(o, name) for o in outcomes)]))

    sums = torch.tensor([outcome.sums for outcome in outcomes], dtype=torch.float64)
    columns = ranks.joined(sums.flatten()).view(-1, 7 + len(more)).T.tolist()
    masked, words, sequences, mlm_losses, rtd_losses, word_losses, *whole = columns
    figures = {"eval_mlm_loss": _weighted(mlm_losses, masked)}
    if _generates(electra, config):
        figures["eval_mlm_accuracy"] = float(joined("hits_M", torch.bool).float().mean())
    if not math.isnan(word_losses[0]):
        predicted = words if electra.predicts == "tokens" else masked
        figures["eval_word_loss"] = _weighted(word_losses, predicted)
    replaced, score = joined("replaced", torch.bool), joined("logits", torch.float32)
    if electra.judges and 0 < replaced.float().mean() < 1:
        loss = _weighted(rtd_losses, masked if electra.judges == "masked" else words)
        figures |= {"eval_rtd_loss": loss, **_detection(replaced, score)}
    if more or config.objective not in OBJECTIVES:
        names = (f"eval_{name}" for name in ("loss", *more))
        figures |= {name: _weighted(values, sequences) for name, values in zip(names, whole, strict=True)}
    return figures


def _detection(replaced: Tensor, score: Tensor) -> dict[str, float]:
    """How well the discriminator finds the `replaced` tokens, which must be some but not all of its tokens."""
    fraction, said = float(replaced.float().mean()), score > 0
    return {
        "eval_rtd_accuracy": float((said == replaced).float().mean()),
        "eval_rtd_precision": float(replaced[said].float().mean()) if said.any() else 0.0,
        "eval_rtd_recall": float(said[replaced].float().mean()),
        "eval_rtd_auc": roc_auc(replaced.numpy(), score.numpy()),  # NaN if the model has diverged
        "eval_replaced_fraction": fraction,
        "eval_base_rate_loss": -fraction * math.log(fraction) - (1 - fraction) * math.log(1 - fraction),
    }


def heldout_loss(evaluation: dict[str, float], config: PretrainConfig) -> float:
    """The sum that training minimises, on held-out text; it decides which checkpoint is the best. An objective of
    one's own has an `eval_loss`, which is it."""
    if "eval_loss" in evaluation:
        return evaluation["eval_loss"]
    return (
        config.generator_weight * evaluation["eval_mlm_loss"]
        + config.discriminator_weight * evaluation.get("eval_rtd_loss", 0.0)
        + evaluation.get("eval_word_loss", 0.0)
    )


def health(evaluation: dict[str, float]) -> list[str]:
    """Warnings about a run that does not learn; empty if all is well.

    They are logged, so they name settings neither as flags nor as in Python: a run's log is the same from both.
    """
    warnings = []
    if evaluation.get("eval_rtd_loss", 0.0) > 0.99 * evaluation.get("eval_base_rate_loss", math.inf):
        warnings.append(
            "The discriminator is at the base rate: its loss is the entropy of the replaced fraction, so it has "
            "learned nothing about the text yet. Normal early on; if it stays there while the MLM loss falls, the "
            "generator is too strong: a narrower one (generator hidden size) or flatter draws (temperature above "
            "1) leave it mistakes to find."
        )
    if evaluation.get("eval_replaced_fraction", 1.0) < 0.02:
        warnings.append("The generator is too good: under 2% of the tokens are replaced. Use a smaller one.")
    return warnings


def _mlm_hits(electra: Any, batch: PretrainBatch) -> Tensor:
    """bool [M]: where the generator's top prediction is the original token."""
    masked = batch.tokens.with_ids(batch.masked_ids_T)
    return electra.generator(masked, batch.masked_positions_M).argmax(-1) == batch.target_ids_M


def _weighted(values: list[float], weights: list[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights)) / sum(weights)
