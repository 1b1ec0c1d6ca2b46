"""Which positions are masked: how many, where, what the generator sees there, and that it is a pure function.

`test_recipe.py` has the recipe's own numbers (85/15, 19 of 128); here are the distributions.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from electra_core.config import PretrainConfig
from electra_core.electra import PretrainBatch
from electra_core.masking import KEEP_PROBABILITY, mask, mask_tokens, masked_counts
from electra_core.packing import TokenBatch, pack

CLS, SEP, MASK = 2, 3, 4
SPECIAL = [CLS, SEP, MASK]


def sentence_pair(length: int) -> list[int]:
    """[CLS] words [SEP] words [SEP], `length` tokens in all (at least 5)."""
    middle = length // 2
    return [CLS, *range(10, 10 + middle - 1), SEP, *range(100, 100 + length - middle - 2), SEP]


def masked(tokens: TokenBatch, first: int = 0, **changes: Any) -> PretrainBatch:
    indices = range(first, first + tokens.num_sequences)
    options = {"seed": 0, "mask_id": MASK, "special_ids": SPECIAL, "fraction": 0.15, "max_predictions": 10**6}
    return mask_tokens(tokens, indices, **(options | changes))  # type: ignore[arg-type]


def positions_by_sequence(batch: PretrainBatch) -> list[list[int]]:
    """Masked positions of each sequence, counted from its own beginning."""
    tokens = batch.tokens
    chosen_T = torch.zeros(tokens.num_tokens, dtype=torch.bool)
    chosen_T[batch.masked_positions_M] = True
    parts = zip(
        chosen_T.split(tokens.lengths.tolist()), tokens.position_ids_T.split(tokens.lengths.tolist()), strict=True
    )
    return [positions[chosen].tolist() for chosen, positions in parts]


@settings(max_examples=40)
@given(
    st.lists(st.integers(5, 60), min_size=1, max_size=6), st.floats(0.05, 0.6), st.integers(1, 40),
    st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_how_many(lengths: list[int], fraction: float, most: int, seed: int) -> None:
    """max(1, min(most, round(fraction n))), distinct, ascending, never more than there are candidates."""
    batch = masked(pack([sentence_pair(n) for n in lengths]), fraction=fraction, max_predictions=most, seed=seed)
    counts = [len(positions) for positions in positions_by_sequence(batch)]
    float32 = torch.tensor(lengths) * fraction  # the product whose half is rounded to even
    wanted = [max(1, min(most, round(product))) for product in float32.tolist()]
    assert counts == [min(count, n - 3) for count, n in zip(wanted, lengths, strict=True)]
    assert (batch.masked_positions_M.diff() > 0).all()
    assert not torch.isin(batch.target_ids_M, torch.tensor(SPECIAL)).any()


def test_counts_of_one_tensor() -> None:
    lengths_N = torch.tensor([2, 5, 10, 17, 64, 128, 512])
    assert masked_counts(lengths_N, 0.15, 19).tolist() == [1, 1, 2, 3, 10, 19, 19]


def test_counts_are_computed_in_fp32_whatever_torch_s_default() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert masked_counts(torch.tensor([190, 350, 390]), 0.15, 100).tolist() == [29, 53, 59]
    finally:
        torch.set_default_dtype(before)


def test_a_mask_that_stands_in_the_text_is_not_chosen() -> None:
    """Text may hold the word [MASK] itself; it is no candidate, whatever the count asks for."""
    tokenizer: Any = SimpleNamespace(cls_id=CLS, sep_id=SEP, mask_id=MASK)
    for seed in range(10):
        batch = masked(pack([[CLS, 10, MASK, 11, MASK, SEP]]), fraction=0.9, seed=seed)
        assert positions_by_sequence(batch) == [[1, 3]]
        in_a_run = mask(pack([[CLS, 10, MASK, MASK, MASK, SEP]]), [0], tokenizer, PretrainConfig(), seed)
        assert positions_by_sequence(in_a_run) == [[1]]
    nothing = masked(pack([[CLS, SEP], [CLS, MASK, SEP]]))
    assert nothing.masked_positions_M.tolist() == [] and torch.equal(
        nothing.masked_ids_T, nothing.tokens.input_ids_T
    )


def test_every_candidate_is_chosen_equally_often() -> None:
    """4000 sequences of 20 tokens, 3 of 17 candidates each.

    Draws within a sequence are without replacement, so counts vary less than multinomially, by the factor
    (17 - 3) / (17 - 1): dividing the statistic by it makes it chi-square with 16 degrees of freedom.
    """
    batch = masked(pack([sentence_pair(20)] * 4000))
    rows = positions_by_sequence(batch)
    counts = torch.tensor([p for row in rows for p in row]).bincount(minlength=20)
    candidates = [p for p in range(20) if sentence_pair(20)[p] not in SPECIAL]
    assert len(candidates) == 17 and counts.sum() == counts[candidates].sum() == 12_000
    observed = counts[candidates].numpy()
    statistic = ((observed - 12_000 / 17) ** 2 / (12_000 / 17)).sum() * 16 / 14
    assert 4 < statistic < 40, "0.1% on either side; a fixed seed, so this never flickers"


def test_pairs_of_positions_are_independent_but_for_the_replacement() -> None:
    """Any two of the 10 candidates are masked together in 2 of 10 x 9 / 2 = 45 ways equally often."""
    batch = masked(pack([[CLS, *range(10, 20), SEP]] * 6000))  # round(0.15 x 12) = 2 of 10
    pairs = [10 * a + b for a, b in positions_by_sequence(batch)]
    counts = torch.tensor(pairs).bincount()
    counts = counts[counts > 0]
    assert len(counts) == 45
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_85_percent_mask_15_percent_kept_wherever_they_stand() -> None:
    """The share that keeps its word does not depend on the position: choice and keeping are separate draws."""
    batch = masked(pack([sentence_pair(40)] * 2000))
    at_M = batch.masked_ids_T[batch.masked_positions_M]
    kept_M = at_M == batch.target_ids_M
    assert ((at_M == MASK) ^ kept_M).all()
    position_M = batch.tokens.position_ids_T[batch.masked_positions_M]
    for half_M in (position_M < 20, position_M >= 20):
        n = int(half_M.sum())
        share = kept_M[half_M].float().mean().item()
        assert abs(share - KEEP_PROBABILITY) < 4 * math.sqrt(0.15 * 0.85 / n)


def test_original_text_is_left_alone() -> None:
    tokens = pack([sentence_pair(30), sentence_pair(12)])
    before = tokens.input_ids_T.clone()
    batch = masked(tokens)
    assert torch.equal(tokens.input_ids_T, before) and batch.tokens is tokens
    changed = (batch.masked_ids_T != before).nonzero().squeeze(-1)
    assert set(changed.tolist()) <= set(batch.masked_positions_M.tolist())


def test_masks_are_a_function_of_seed_and_index_alone() -> None:
    sequences = [sentence_pair(n) for n in (20, 33, 8, 20, 61, 5)]
    whole = positions_by_sequence(masked(pack(sequences), first=7))
    parts = [positions_by_sequence(masked(pack(sequences[i : i + 2]), first=7 + i)) for i in (0, 2, 4)]
    assert [row for part in parts for row in part] == whole, "however the batch is cut"
    backwards = mask_tokens(
        pack(sequences[::-1]), range(12, 6, -1), seed=0, mask_id=MASK, special_ids=SPECIAL, fraction=0.15,
        max_predictions=10**6,
    )  # fmt: skip
    assert positions_by_sequence(backwards)[::-1] == whole, "and in whatever order"


@pytest.mark.parametrize("change", [{"seed": 1}, {"first": 1}, {"first": 1 << 32}, {"seed": 1 << 40}], ids=str)
def test_another_seed_or_index_gives_another_mask(change: dict[str, int]) -> None:
    tokens = pack([sentence_pair(40)] * 8)
    assert positions_by_sequence(masked(tokens, **change)) != positions_by_sequence(masked(tokens))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fraction": 2.0}, r"fraction: expected a number in \[0, 1\], got 2.0"),
        ({"fraction": math.nan}, r"fraction: expected a number in \[0, 1\], got nan"),
        ({"special_ids": []}, "special_ids: expected those of .*, got none"),
    ],
)
def test_a_masking_that_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    options = {"mask_id": 4, "special_ids": [2, 3, 4], "fraction": 0.15, "max_predictions": 3} | change
    with pytest.raises(ValueError, match=said):
        mask_tokens(pack([[2, 7, 8, 3]]), [0], seed=0, **options)


def test_an_index_for_every_sequence() -> None:
    tokens = pack([sentence_pair(9), sentence_pair(7)])
    with pytest.raises(ValueError, match="indices: expected one for each of 2 sequences, got 3"):
        mask_tokens(tokens, [0, 1, 2], seed=0, mask_id=MASK, special_ids=SPECIAL, fraction=0.15, max_predictions=9)
