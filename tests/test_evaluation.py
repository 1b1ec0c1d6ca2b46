"""Held-out figures against what follows from the outputs of the same forward passes, computed in another way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import RUN, SIZES, data, one_thread  # noqa: F401
from torch import Tensor

from electra_core.config import PRESETS
from electra_core.corpus import Corpus
from electra_core.electra import Electra, PretrainOutput
from electra_core.objectives import build_objective
from electra_core.pretraining.evaluation import evaluate, heldout_loss
from electra_core.pretraining.setup import resolve_config

Pass = tuple[Any, int, PretrainOutput]
"""Batch, seed and output of a forward pass."""


def evaluated(
    data: Path, monkeypatch: pytest.MonkeyPatch, logits: Callable[[int], Tensor]
) -> tuple[dict[str, float], list[Pass], Electra]:
    """(figures, forward passes, model) of 100 examples, of which a discriminator says `logits(T)`."""
    encoder, config = resolve_config("tiny", RUN | {"eval_examples": 100}, SIZES, Corpus.open(data))
    whole, seen = Electra.forward, []

    def spied(self: Electra, batch: Any, seed: Any) -> PretrainOutput:
        assert not self.training and not torch.is_grad_enabled(), "no dropout, and nothing is kept for gradients"
        output = whole(self, batch, seed)
        output = dataclasses.replace(output, rtd_logits_T=logits(len(output.rtd_logits_T)))
        seen.append((batch, seed, output))
        return output

    monkeypatch.setattr(Electra, "forward", spied)
    model, heldout = Electra(encoder, config), Corpus.open(data, "heldout")
    return evaluate(model, heldout, config, torch.device("cpu"), nullcontext()), seen, model


def spread(tokens: int) -> Tensor:
    """Of both signs, many of them near 0."""
    return torch.linspace(-2, 2, tokens) ** 3


def weighted(passes: Sequence[Pass], name: str, weights: Sequence[int]) -> float:
    values = [float(getattr(output, name)) for *_, output in passes]
    return sum(value * n for value, n in zip(values, weights, strict=True)) / sum(weights)


def test_held_out_figures_are_those_of_all_outputs_together(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, passes, model = evaluated(data, monkeypatch, spread)
    assert [batch.tokens.num_sequences for batch, *_ in passes] == [64, 36]
    assert len({seed for _, seed, _ in passes}) == 2, "each batch has draws of its own"
    masked = [len(batch.masked_positions_M) for batch, *_ in passes]
    tokens = [batch.tokens.num_tokens for batch, *_ in passes]
    with torch.no_grad():
        words_M = torch.cat(
            [
                model.generator(batch.tokens.with_ids(batch.masked_ids_T), batch.masked_positions_M).argmax(-1)
                for batch, *_ in passes
            ]
        )
    is_word_M = words_M == torch.cat([batch.target_ids_M for batch, *_ in passes])
    replaced_T = torch.cat([output.is_replaced_T for *_, output in passes])
    logits_T = torch.cat([output.rtd_logits_T for *_, output in passes]).double()
    said_T = logits_T > 0
    ahead = logits_T[replaced_T][:, None] - logits_T[~replaced_T]
    share = replaced_T.double().mean().item()
    assert figures == pytest.approx(
        {
            "eval_mlm_loss": weighted(passes, "mlm_loss", masked),
            "eval_mlm_accuracy": is_word_M.double().mean().item(),
            "eval_rtd_loss": weighted(passes, "rtd_loss", tokens),
            "eval_rtd_accuracy": (said_T == replaced_T).double().mean().item(),
            "eval_rtd_precision": (said_T & replaced_T).sum().item() / said_T.sum().item(),
            "eval_rtd_recall": (said_T & replaced_T).sum().item() / replaced_T.sum().item(),
            "eval_rtd_auc": (0.5 * (1 + ahead.sign())).mean().item(),
            "eval_replaced_fraction": share,
            "eval_base_rate_loss": -share * math.log(share) - (1 - share) * math.log1p(-share),
        },
        rel=1e-5,
    )


def test_nothing_found_is_a_precision_and_a_recall_of_0(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A discriminator at the base rate calls no token replaced; a log has no NaN for that."""
    figures, passes, _ = evaluated(data, monkeypatch, lambda tokens: torch.full((tokens,), -1.0))
    assert figures["eval_rtd_precision"] == figures["eval_rtd_recall"] == 0.0
    assert figures["eval_rtd_accuracy"] == pytest.approx(1 - figures["eval_replaced_fraction"])
    assert figures["eval_rtd_auc"] == 0.5 and len(passes) == 2


@pytest.mark.parametrize("objective", ["mlm", "replace-mlm", "all-tokens-mlm"])
def test_words_count_where_they_are_predicted(data: Path, objective: str) -> None:
    changes = RUN | {"eval_examples": 100, "objective": objective}
    encoder, config = resolve_config("tiny", changes, SIZES, Corpus.open(data))
    model, passes = build_objective(encoder, config), []
    model.register_forward_hook(lambda _, inputs, output: passes.append((*inputs, output)))
    figures = evaluate(model, Corpus.open(data, "heldout"), config, torch.device("cpu"), nullcontext())
    masked = [len(batch.masked_positions_M) for batch, *_ in passes]
    tokens = [batch.tokens.num_tokens for batch, *_ in passes]
    places = tokens if objective == "all-tokens-mlm" else masked
    assert figures["eval_word_loss"] == pytest.approx(weighted(passes, "word_loss", places), rel=1e-9)
    assert figures["eval_mlm_loss"] == pytest.approx(weighted(passes, "mlm_loss", masked), rel=1e-9)


def test_the_held_out_loss_weighs_both_networks_as_training_does() -> None:
    config = dataclasses.replace(PRESETS["tiny"].pretrain, generator_weight=2.0, discriminator_weight=50.0)
    assert heldout_loss({"eval_mlm_loss": 3.0, "eval_rtd_loss": 0.25}, config) == 2 * 3.0 + 50 * 0.25
    assert heldout_loss({"eval_mlm_loss": 3.0, "eval_word_loss": 0.5}, config) == 2 * 3.0 + 0.5
