"""Sentences about a trace that the terminal and the page share."""

from __future__ import annotations

from electra_core.masking import KEEP_PROBABILITY
from electra_core.trace import Trace

LETTERS = (
    "T tokens, M chosen positions, V words of the vocabulary, E embedding width, D hidden width (each model has "
    "its own), F feed-forward width. Of the layers the first stands for all."
)


def why_chosen(result: Trace) -> str:
    """How many positions are masked, which, and why."""
    count = len(result.tokens)
    share = result.mask_fraction * count
    bound = ""
    if round(share) > result.max_predictions:
        bound = f" (at most {result.max_predictions} are taken)"
    elif round(share) < 1:
        bound = " (at least 1 is taken)"
    return (
        f"{100 * result.mask_fraction:g}% of {count} tokens are {share:.2f}{bound}, so "
        f"{result.num_chosen} of the {sum(not t.special for t in result.tokens)} words are chosen: those with the "
        f"smallest random numbers. Where a second number is at least {KEEP_PROBABILITY:g}, [MASK] takes the "
        "word's place; else the word stays, but is predicted all the same."
    )


def labels_note(result: Trace) -> str:
    """How many tokens are replaced, and at how many positions the draw was the original."""
    replaced = sum(token.replaced for token in result.tokens)
    return (
        f"{replaced} of {len(result.tokens)} tokens are replaced. At {result.num_chosen - replaced} of the "
        f"{result.num_chosen} chosen positions the draw was the original, which therefore counts as original."
    )


def pieces_note(result: Trace) -> str:
    """What a sign of the vocabulary in this sentence means; empty if there is none."""
    if any(token.token.startswith("▁") for token in result.tokens):
        return "▁ stands where a word begins; a piece without it goes on with the word before."
    if any(token.token.startswith("##") for token in result.tokens):
        return "## marks a piece that goes on with the word before."
    return ""


def temperature_note(result: Trace) -> str:
    """What the draw's temperature does to the probabilities that are shown; empty at 1."""
    if result.temperature == 1:
        return ""
    effect = "flatter" if result.temperature > 1 else "steeper"
    return (
        f"Words are drawn at temperature {result.temperature:g}: logits are divided by it before the softmax, so "
        f"these probabilities are {effect} than the generator's own, which loss and entropy go by."
    )


def weighted_losses(result: Trace) -> tuple[str, str]:
    """What gradients are of: "MLM", "50 x RTD"."""
    pairs = (result.generator_weight, "MLM"), (result.discriminator_weight, "RTD")
    mlm, rtd = (name if weight == 1 else f"{weight:g} x {name}" for weight, name in pairs)
    return mlm, rtd


def percent(probability: float) -> str:
    """ "93%", "4.2%", "0.08%", "<0.01%" """
    value = 100 * probability
    if value >= 10:
        return f"{value:.0f}%"
    if value >= 1:
        return f"{value:.1f}%"
    return f"{value:.2f}%" if value >= 0.01 else "<0.01%"
