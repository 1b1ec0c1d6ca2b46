"""Whole batches against one example at a time: plans, packed words, masks and random bits are the same.

`pretraining/example_rules.py`, `Slots.sentences`, `permute` and the loops below are the specification; what runs
is arrays.
"""

from __future__ import annotations

import hashlib
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from electra_kernels.rng import fold, philox, seed_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from original_examples import CLS, SEP, make_corpus

from electra_core.examples import RULES, Examples
from electra_core.host_random import BLOCK, philox_words
from electra_core.masking import KEEP_PROBABILITY, mask_tokens
from electra_core.packing import TokenBatch, pack
from electra_core.pretraining.batches import Ahead
from electra_core.pretraining.example_rules import MOST_SENTENCES
from electra_core.pretraining.mixing import MixedExamples
from electra_core.pretraining.permutation import mix, mix_all, permute, permute_all
from electra_core.pretraining.planning import Plan
from electra_core.pretraining.slots import Slots

MASK = 4
SENTENCES = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 90)), min_size=1, max_size=80)
DOCUMENTS = st.lists(SENTENCES, min_size=1, max_size=12)
SEEDS = st.integers(0, 2**63 - 1)


@settings(max_examples=60)
@given(
    DOCUMENTS,
    st.integers(1, 3),
    st.integers(8, 70),
    SEEDS,
    st.integers(0, 2**40),
    st.sampled_from([0.1, 0.6, 1.0]),
)
def test_a_plan_is_what_the_rules_say_one_by_one(
    documents: list[list[int]], shards: int, max_length: int, seed: int, first: int, one_segment: float
) -> None:
    shards = min(shards, len(documents))
    examples = Examples(make_corpus(documents, shards), max_length, seed, one_segment)
    indices = range(first, first + 40)
    plan = examples.plan(indices)
    assert list(plan) == [examples.one(index) for index in indices]
    assert plan.lengths.tolist() == [example.num_tokens for example in plan]


def test_more_documents_than_an_entry_of_the_table_and_more_sentences_than_are_looked_at() -> None:
    draw = random.Random(0)
    documents = [[1] * 300, *([draw.randint(1, 9)] * draw.randint(1, 5) for _ in range(500)), [1] * 200]
    examples = Examples(make_corpus(documents, shards=3), 128, seed=1)
    plan = examples.plan(range(2 * len(examples.slots)))
    assert list(plan) == [examples.one(index) for index in range(len(plan))]
    assert np.diff(plan.ends_N).max() == MOST_SENTENCES


def test_more_documents_than_are_counted_in_one_go() -> None:
    """A table of slots is made of 65,536 documents at a time; the last ones are counted once, too."""
    count = 70_000
    borders = np.arange(count + 1, dtype="<u8")
    shard: Any = SimpleNamespace(sentences=5 * borders, documents=borders, starts=5 * borders)
    slots = Slots([shard, shard], 32)
    assert len(slots) == 2 * count
    for number in (0, 65_535, 65_536, count - 1, count, 2 * count - 1):
        assert slots[number] == (number // count, number % count, 0, 1)


def test_parts_of_a_plan() -> None:
    examples = Examples(make_corpus([[3, 4, 5] * 20] * 6, shards=2), 32, seed=0)
    plan = examples.plan(range(30))
    whole = list(plan)
    assert plan[7] == whole[7] and plan[-1] == whole[-1] and len(plan[3:3]) == 0
    assert plan[4:20:3] == whole[4:20:3] and plan[::-1] == whole[::-1]
    assert Plan.joined([plan[:11], plan[11:12], plan[12:]]) == whole
    assert plan != whole[1:] and plan != 3
    for part in (plan[4:20:3], plan[::-1]):
        together = examples.batch(part)
        alone = [examples.batch(part[n : n + 1]).input_ids_T for n in range(len(part))]
        assert torch.equal(together.input_ids_T, torch.cat(alone))
    with pytest.raises(IndexError):
        plan[30]


@settings(max_examples=20)
@given(DOCUMENTS, DOCUMENTS, SEEDS, st.integers(1, 1023))
def test_a_mixture_too(one: list[list[int]], other: list[list[int]], seed: int, weight: int) -> None:
    corpora = [make_corpus(one), make_corpus(other, min(2, len(other)))]
    shards = tuple(shard for corpus in corpora for shard in corpus.shards)
    mixture: Any = SimpleNamespace(corpora=corpora, counts=[weight, 1024 - weight], shards=shards)
    examples = MixedExamples(mixture, 32, seed)
    indices = [5, 0, 1024, 2**33, *range(100, 120)]
    assert list(examples.plan(indices)) == [examples.one(index) for index in indices]
    assert not any(example.second for example in MixedExamples(mixture, 32, seed, 1.0).plan(indices))


@settings(max_examples=40)
@given(DOCUMENTS, SEEDS)
def test_the_words_of_a_batch(documents: list[list[int]], seed: int) -> None:
    """[CLS] first [SEP] second [SEP], put together one by one."""
    examples = Examples(make_corpus(documents, min(2, len(documents))), 24, seed)
    plan = examples.plan(range(20))
    sequences, segments = [], []
    for example in plan:
        first, second = (
            [int(word) for span in part for word in examples.shards[span.shard].tokens[span.begin : span.end]]
            for part in example
        )
        sequences.append([CLS, *first, SEP, *([*second, SEP] if second else [])])
        segments.append([0] * (len(first) + 2) + [1] * (len(second) + 1 if second else 0))
    assert_same_batch(examples.batch(plan), pack(sequences, segments))


def assert_same_batch(got: TokenBatch, wanted: TokenBatch) -> None:
    for name in ("input_ids_T", "segment_ids_T", "position_ids_T", "cu_seqlens"):
        a, b = getattr(got, name), getattr(wanted, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert got.max_seqlen == wanted.max_seqlen


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=50), min_size=1, max_size=70),
    st.floats(0.05, 0.6), st.integers(1, 40), SEEDS, st.integers(0, 2**40),
)  # fmt: skip
def test_masks_of_a_batch(sequences: list[list[int]], fraction: float, most: int, seed: int, first: int) -> None:
    """Position by position: each draws, specials aside; the smallest are chosen, ties to whoever comes first."""
    indices = range(first, first + len(sequences))
    batch = mask_tokens(
        pack(sequences), indices, seed=seed, mask_id=MASK, special_ids=[CLS, SEP, MASK], fraction=fraction,
        max_predictions=most,
    )  # fmt: skip
    key, start, positions, ids_T = seed_tensor(fold(seed, 3)), 0, [], []
    for index, ids in zip(indices, sequences, strict=True):
        low, high = torch.tensor(index & 0xFFFFFFFF), torch.tensor(index >> 32)
        order, keep, _, _ = philox(key, torch.arange(len(ids)), low, 0, high)
        candidates = sorted((int(order[p]), p) for p in range(len(ids)) if ids[p] not in (CLS, SEP, MASK))
        count = max(1, min(most, round(float(torch.tensor(len(ids)) * fraction))))
        chosen = sorted(p for _, p in candidates[:count])
        positions += [start + p for p in chosen]
        masked = [p for p in chosen if keep[p] >= int(KEEP_PROBABILITY * 2**32)]
        ids_T += [MASK if p in masked else word for p, word in enumerate(ids)]
        start += len(ids)
    assert batch.masked_positions_M.tolist() == positions and batch.masked_positions_M.dtype == torch.int64
    assert batch.masked_ids_T.tolist() == ids_T


@settings(max_examples=30)
@given(st.integers(0, 2**63 - 1), st.integers(1, 300), st.lists(st.integers(0, 2**62), min_size=1, max_size=9))
def test_host_bits_are_the_kernels(key: int, columns: int, rows: list[int]) -> None:
    row = torch.tensor(rows)[:, None]
    wanted = torch.stack(philox(seed_tensor(key), torch.arange(columns), row & 0xFFFFFFFF, 0, row >> 32))
    assert torch.equal(torch.from_numpy(philox_words(key, columns, np.array(rows)).view(np.int64)), wanted)


def test_host_bits_of_several_blocks() -> None:
    columns, rows = BLOCK // 3, np.arange(10)
    whole = philox_words(9, columns, rows)
    assert all((philox_words(9, columns, rows[n : n + 1])[:, 0] == whole[:, n]).all() for n in rows)


@settings(max_examples=60)
@given(st.integers(1, 5000), st.lists(SEEDS, min_size=1, max_size=20), st.data())
def test_permutations(size: int, seeds: list[int], data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, size - 1), min_size=len(seeds), max_size=len(seeds)))
    arrays = np.array(places, dtype=np.uint64), np.array(seeds, dtype=np.uint64)
    assert permute_all(np.array(places), size, arrays[1]).tolist() == [
        permute(place, size, seed) for place, seed in zip(places, seeds, strict=True)
    ]
    assert mix_all(*arrays).tolist() == [mix(place, seed) for place, seed in zip(places, seeds, strict=True)]


PINNED = {2: "d8e6cb943cc815fe83bb5324ce485bdc87571c2ae8a272c67e04fdb41bf22f44"}
"""By version of the rules: SHA-256 of what they make of one small corpus."""


def test_the_rules_are_those_of_their_version() -> None:
    """Runs are resumed where the version is the same, so examples and masks are the same then, to the last bit."""
    documents = [[1 + (7 * d + 5 * s * s) % 13 for s in range(3 + 11 * d % 60)] for d in range(80)]
    examples = Examples(make_corpus(documents, shards=2), 48, seed=5)
    indices = range(2 * len(examples.slots) - 64, 2 * len(examples.slots) + 64)
    plan = examples.plan(indices)
    batch = mask_tokens(
        examples.batch(plan), indices, seed=5, mask_id=MASK, special_ids=[CLS, SEP, MASK], fraction=0.15,
        max_predictions=6,
    )  # fmt: skip
    parts = (
        plan.shards_N, plan.lengths, plan.ends_N, plan.begins_P, plan.lengths_P, plan.is_second_P,
        batch.tokens.input_ids_T, batch.masked_positions_M, batch.masked_ids_T,
    )  # fmt: skip
    found = hashlib.sha256(b"".join(np.asarray(part).astype("<i8").tobytes() for part in parts)).hexdigest()
    assert found == PINNED.get(RULES), "examples or masks are not as before: raise RULES in examples.py, pin anew"


def test_batches_made_ahead_are_the_same_and_come_in_any_order() -> None:
    made: list[int] = []

    def batch(step: int) -> int:
        made.append(step)
        if step == 30:
            raise ValueError("no such batch")
        return 10 * step

    ahead = Ahead(batch)
    assert [ahead(step) for step in (0, 1, 2, 3, 7, 8, 2)] == [0, 10, 20, 30, 70, 80, 20]
    assert made[:4] == [0, 1, 2, 3], "each once while steps follow one another"
    assert ahead(29) == 290
    with pytest.raises(ValueError, match="no such batch"):
        ahead(30)
