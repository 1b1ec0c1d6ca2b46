"""Sentences about a trace that the terminal and the page share."""

from __future__ import annotations

from electra_core.masking import KEEP_PROBABILITY
from electra_core.trace import Trace

LETTERS = (
    "T tokens, M chosen positions, V words in the vocabulary, E embedding width, D hidden width (each model has "
    "its own), F feed-forward width. The first layer stands for all layers."
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
        f"smallest random numbers. If a word's second random number is at least {KEEP_PROBABILITY:g}, [MASK] "
        "takes its place; otherwise the word stays, but is predicted all the same."
    )


def labels_note(result: Trace) -> str:
    """How many tokens are replaced, and at how many positions the draw was the original."""
    replaced = sum(token.replaced for token in result.tokens)
    return (
        f"{replaced} of {len(result.tokens)} tokens {'is' if replaced == 1 else 'are'} replaced. At "
        f"{result.num_chosen - replaced} of the {result.num_chosen} chosen positions the generator drew the "
        "original word, which counts as original."
    )


def pieces_note(result: Trace) -> str:
    """What the vocabulary's sign for word pieces means; empty if the sentence has none."""
    if any(token.token.startswith("▁") for token in result.tokens):
        return "▁ stands where a word begins; a piece without it continues the word before."
    if any(token.token.startswith("##") for token in result.tokens):
        return "## marks a piece that goes on with the word before."
    return ""


def temperature_note(result: Trace) -> str:
    """What the temperature of the draw does to the probabilities shown; empty at 1."""
    if result.temperature == 1:
        return ""
    effect = "flatter" if result.temperature > 1 else "steeper"
    return (
        f"Words are drawn at temperature {result.temperature:g}: logits are divided by it before the softmax. So "
        f"these probabilities are {effect} than the generator's own, from which loss and entropy are computed."
    )


def weighted_losses(result: Trace) -> tuple[str, str]:
    """Names of the two losses whose gradients are shown: "MLM", "50 x RTD"."""
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
