"""How a pre-training run is judged: losses and metrics of both networks on held-out text, and warnings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from electra_core.batches import mask
from electra_core.config import PretrainConfig
from electra_core.corpus import Corpus
from electra_core.electra import PretrainBatch
from electra_core.mixing import examples_of

HELDOUT_SEED = 20_200_323  # held-out examples and masks are the same for every run and every evaluation


@torch.no_grad()
def evaluate(
    electra: nn.Module, heldout: Corpus, config: PretrainConfig, device: torch.device, autocast: Any
) -> dict[str, float]:
    """Losses and metrics of both networks on held-out text; the same examples and masks every time."""
    from sklearn.metrics import roc_auc_score

    electra.eval()
    examples = examples_of(heldout, config.max_length, HELDOUT_SEED)
    logits, labels, hits, mlm_losses, rtd_losses, word_losses = [], [], [], [], [], []
    for first in range(0, config.eval_examples, 64):
        indices = range(first, min(first + 64, config.eval_examples))
        tokens = examples.batch(examples.plan(indices))
        batch = mask(tokens, indices, heldout, config, HELDOUT_SEED).to(device)
        with autocast:
            output = electra(batch, HELDOUT_SEED + first)
            mlm_losses.append((float(output.mlm_loss), len(batch.masked_positions_M)))
            rtd_losses.append((float(output.rtd_loss), batch.tokens.num_tokens))
            if output.word_loss is not None:
                word_losses.append((float(output.word_loss), batch.tokens.num_tokens))
            hits.append(_mlm_hits(electra, batch))
        logits.append(output.rtd_logits_T.float().cpu())
        labels.append(output.is_replaced_T.cpu())
    figures = {"eval_mlm_loss": _weighted(mlm_losses), "eval_mlm_accuracy": float(torch.cat(hits).float().mean())}
    if word_losses:
        figures["eval_word_loss"] = _weighted(word_losses)
    replaced, score = torch.cat(labels), torch.cat(logits)
    fraction = float(replaced.float().mean())
    if 0 < fraction < 1 and config.objective in ("electra", "electra-15"):
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


def heldout_loss(evaluation: dict[str, float], config: PretrainConfig) -> float:
    """The sum that training minimises, on held-out text: what the best checkpoint is chosen by."""
    return (
        config.generator_weight * evaluation["eval_mlm_loss"]
        + config.discriminator_weight * evaluation.get("eval_rtd_loss", 0.0)
        + evaluation.get("eval_word_loss", 0.0)
    )


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


def _mlm_hits(electra: Any, batch: PretrainBatch) -> Tensor:
    """bool [M]: where the generator's first choice is the original word."""
    masked = batch.tokens.with_ids(batch.masked_ids_T)
    return electra.generator(masked, batch.masked_positions_M).argmax(-1) == batch.target_ids_M


def _weighted(pairs: list[tuple[float, int]]) -> float:
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
