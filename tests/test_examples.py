"""Examples against a faithful sequential re-implementation of the original's builder, and what ours add:
a pure function of (seed, index), other borders every epoch.

The original (google-research/electra, build_pretraining_dataset.py) goes through each document once. Ours start
wherever an epoch's slots fall. On a corpus of long documents both must give the same distributions.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from original_examples import CLS, MAX_LENGTH, SEP, make_corpus, original_examples, total, words_of
from scipy.stats import ks_2samp

from electra_core.examples import Examples
from electra_core.pretraining.example_rules import Span, cut, split_segments
from electra_core.pretraining.permutation import permute


def random_documents(count: int, sentences: int, seed: int = 0) -> list[list[int]]:
    """Sentences of 1 to 12 tokens, and a rare long one of up to 40."""
    draw = random.Random(seed)
    return [
        [draw.randint(20, 40) if draw.random() < 0.03 else draw.randint(1, 12) for _ in range(sentences)]
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def both() -> tuple[list[Any], list[Any]]:
    """(original's, ours) over documents of 600 sentences, where document ends are rare."""
    documents = random_documents(60, 600)
    examples = Examples(make_corpus(documents), MAX_LENGTH, seed=0)
    planned = examples.plan(range(len(examples.slots)))
    return original_examples(documents), [words_of(example) for example in planned]


# The original's distributions ---------------------------------------------------------------------------------
# Some 8,000 examples on each side. Differences of shares are held to four standard deviations of the difference
# of two binomials (an independence that overlapping examples do not spoil); ks_2samp to a p-value of 1e-4.


def assert_same_share(name: str, ours: list[bool], theirs: list[bool]) -> None:
    a, b = np.mean(ours), np.mean(theirs)
    pooled = (sum(ours) + sum(theirs)) / (len(ours) + len(theirs))
    deviation = np.sqrt(pooled * (1 - pooled) * (1 / len(ours) + 1 / len(theirs)))
    assert abs(a - b) < 4 * deviation, f"{name}: ours {a:.4f}, the original's {b:.4f}, deviation {deviation:.4f}"


def test_same_number_of_examples(both: tuple[list[Any], list[Any]]) -> None:
    """An example uses about max_length words up, overflow included, so that counts agree within a few percent:
    the original's use up to half a sentence more, and its short ones less."""
    original, ours = both
    assert len(ours) > 5_000
    assert len(ours) == pytest.approx(len(original), rel=0.15)


def test_same_lengths(both: tuple[list[Any], list[Any]]) -> None:
    theirs, ours = ([total(pair) for pair in pairs] for pairs in both)
    assert ks_2samp(ours, theirs).pvalue > 1e-4
    for length in (MAX_LENGTH, MAX_LENGTH - 1):
        assert_same_share(f"length {length}", [n == length for n in ours], [n == length for n in theirs])
    short = 24
    assert_same_share("short ones", [n < short for n in ours], [n < short for n in theirs])
    assert 0.01 < np.mean([n < short for n in ours]) < 0.06, "0.05 are, some of which are hardly shorter"


def test_same_share_of_one_segment(both: tuple[list[Any], list[Any]]) -> None:
    theirs, ours = ([not second for _, second in pairs] for pairs in both)
    assert_same_share("one segment", ours, theirs)
    assert 0.1 < np.mean(ours) < 0.3, "0.1, and those whose one sentence is the whole"


def test_same_first_segments(both: tuple[list[Any], list[Any]]) -> None:
    """Length of the first segment, where there are two."""
    theirs, ours = ([len(first) for first, second in pairs if second] for pairs in both)
    assert ks_2samp(ours, theirs).pvalue > 1e-4
    aim = (MAX_LENGTH - 3) // 2
    assert_same_share("under its target", [n < aim for n in ours], [n < aim for n in theirs])


def test_no_example_goes_over_the_end_of_its_document() -> None:
    """Documents shorter than an example: none holds words of two."""
    documents = [[3, 4, 5], [6], [2, 2], [9, 1]] * 50
    examples = Examples(make_corpus(documents), MAX_LENGTH, seed=0)
    borders = np.cumsum([0] + [sum(lengths) for lengths in documents])
    for epoch in range(3):
        n = len(examples.slots)
        for first, second in map(words_of, examples.plan(range(epoch * n, (epoch + 1) * n))):
            documents_hit = np.searchsorted(borders, np.array(first + second) - 10, side="right")
            assert len(first) > 0 and len(set(documents_hit.tolist())) == 1


# Every single example -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [8, 17, 32, 64])
def test_never_longer_than_max_length_and_the_second_continues_the_first(max_length: int) -> None:
    """The two segments are one run of text from where the first begins; what is cut off is at a segment's end."""
    examples = Examples(make_corpus(random_documents(6, 80, seed=3)), max_length, seed=4)
    sentences = set(examples.shards[0].sentences.tolist())
    for example in examples.plan(range(400)):
        assert 3 <= example.num_tokens <= max_length
        first, second = words_of(example)
        assert example.first[0].begin in sentences, "examples begin with a sentence"
        spans = sorted(example.first + example.second)
        whole = [span.end for span in spans if span.end in sentences]
        assert len(spans) - len(whole) <= 2, "only a segment's last sentence is cut"
        if second:
            # A later short sentence may still fit into the first segment (the original's rule); what follows
            # the first segment's first gap is the second segment.
            contiguous = next((i for i in range(1, len(first)) if first[i] != first[0] + i), len(first))
            gap_begins = first[0] + contiguous
            cut_off = len(first) == max_length - 2
            assert second[0] >= gap_begins if cut_off else second[0] == gap_begins


def test_batch_is_cls_first_sep_second_sep() -> None:
    examples = Examples(make_corpus(random_documents(3, 40), shards=2), MAX_LENGTH, seed=0)
    planned = examples.plan(range(50))
    batch = examples.batch(planned)
    segments = batch.segment_ids_T.split(batch.lengths.tolist())
    offsets = shard_starts(examples) + 10
    for example, ids, segment_ids in zip(planned, batch.split(), segments, strict=True):
        first, second = ([t + offsets[s.shard] for s in part for t in range(s.begin, s.end)] for part in example)
        assert ids.tolist() == [CLS, *first, SEP, *([*second, SEP] if second else [])]
        assert segment_ids.tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1 if second else 0)
    assert {span.shard for example in planned for span in example.first} == {0, 1}


def test_examples_of_one_segment_are_one_run_of_text() -> None:
    """With a probability of 1: [CLS] text [SEP], as long as those of two segments; how often else, see above."""
    corpus = make_corpus(random_documents(6, 80, seed=3))
    one, two = (Examples(corpus, MAX_LENGTH, 4, probability) for probability in (1.0, 0.0))
    for example in one.plan(range(400)):
        words, second = words_of(example)
        assert not second and words == list(range(words[0], words[0] + len(words)))
    lengths = [examples.plan(range(400)).lengths for examples in (one, two)]
    assert (lengths[0] >= MAX_LENGTH - 1).mean() > 0.9 * (lengths[1] >= MAX_LENGTH - 1).mean()
    assert np.mean([bool(example.second) for example in two.plan(range(400))]) > 0.9


def test_split_rules_one_by_one() -> None:
    """Worked by hand; 29 tokens aim at a first segment of 13."""
    a, b, c, d = (Span(0, *span) for span in ((0, 9), (9, 19), (19, 22), (22, 29)))
    sentences = [a, b, c, d]
    heads, tails = np.zeros(9), np.ones(9)
    assert split_segments(sentences, 29, True, tails) == (sentences, []), "one segment takes all"
    assert split_segments([b], 29, False, tails) == ([b], []), "the first sentence goes to the first segment"
    assert split_segments(sentences, 29, False, heads) == ([a, b], [c, d]), "heads: it may overflow"
    assert split_segments(sentences, 29, False, tails) == ([a, c], [b, d]), "tails: but a later one that fits may"
    assert cut([a, b], 12) == [a, Span(0, 9, 12)] and cut([a, b], 9) == [a] and cut([a], 0) == []


def test_the_crossing_sentence_goes_either_way_half_the_time() -> None:
    """Sentences of 10: the target of the first is 14, so the second crosses it."""
    examples = Examples(make_corpus([[10] * 4000]), MAX_LENGTH, seed=0)
    planned = [e for e in examples.plan(range(1200)) if e.num_tokens == MAX_LENGTH and e.second]
    lengths = Counter(len(words_of(e)[0]) for e in planned)
    assert set(lengths) <= {10, 20}
    share, n = lengths[20] / len(planned), len(planned)
    assert n > 900 and abs(share - 0.5) < 4 * 0.5 / np.sqrt(n)


# A pure function of (seed, index) -----------------------------------------------------------------------------


def test_whatever_the_batch_an_example_is_the_same() -> None:
    corpus = make_corpus(random_documents(5, 60), shards=2)
    whole = Examples(corpus, MAX_LENGTH, seed=5).plan(range(90))
    for size in (1, 7, 64):
        again = Examples(corpus, MAX_LENGTH, seed=5)
        parts = [again.plan(range(first, min(first + size, 90))) for first in range(0, 90, size)]
        assert [example for part in parts for example in part] == whole
    backwards = Examples(corpus, MAX_LENGTH, seed=5).plan(range(89, -1, -1))
    assert backwards[::-1] == whole


def test_seeds_and_epochs_differ() -> None:
    corpus = make_corpus(random_documents(5, 60))
    examples = Examples(corpus, MAX_LENGTH, seed=5)
    n = len(examples.slots)
    first, second = examples.plan(range(n)), examples.plan(range(n, 2 * n))
    other = Examples(corpus, MAX_LENGTH, seed=6).plan(range(n))
    for one, two in ((first, second), (first, other)):
        assert one != two
        same = set(map(repr, one)) & set(map(repr, two))
        assert len(same) < 0.4 * n, "another phase and other coins, not just another order"


def test_an_index_beyond_32_bits_works() -> None:
    examples = Examples(make_corpus(random_documents(5, 60)), MAX_LENGTH, seed=0)
    low, high = examples.plan([7]), examples.plan([7 + (1 << 33)])
    assert low != high and high == examples.plan([7 + (1 << 33)])


def shard_starts(examples: Examples) -> np.ndarray:
    """First token of each shard in the corpus."""
    return np.cumsum([0] + [len(shard.tokens) for shard in examples.shards[:-1]])


def visits_per_epoch(examples: Examples, epochs: int) -> np.ndarray:
    """How often each token of the corpus is in an example, per epoch."""
    starts = shard_starts(examples)
    visits = np.zeros(sum(len(shard.tokens) for shard in examples.shards))
    for example in examples.plan(range(epochs * len(examples.slots))):
        for span in example.first + example.second:
            begin = starts[span.shard]
            visits[begin + span.begin : begin + span.end] += 1
    return visits / epochs


def test_an_epoch_visits_each_token_about_once() -> None:
    """Inside of documents, over 120 epochs: of each slot of 32 tokens an example holds 29 or 30 at most."""
    draw = random.Random(8)
    documents = [[draw.randint(1, 12) for _ in range(500)] for _ in range(2)]
    examples = Examples(make_corpus(documents, shards=2), MAX_LENGTH, seed=0)
    visits = visits_per_epoch(examples, epochs=120)
    inside = np.ones(len(visits), dtype=bool)
    for border in (0, sum(documents[0]), len(visits)):  # first and last examples of documents do not move
        inside[max(0, border - 2 * MAX_LENGTH) : border + 2 * MAX_LENGTH] = False
    assert 0.8 < visits[inside].mean() < 1.0, "less than 1 by [CLS], [SEP] and the short ones"
    assert visits[inside].max() < 1.6, "no token is favoured"
    assert visits[inside].min() > 0.4, "nor left out"


def test_beginnings_of_documents_are_visited_as_often_as_the_rest() -> None:
    """As in the original, where every document's first sentence is in an example."""
    documents = random_documents(100, 60, seed=2)
    visits = visits_per_epoch(Examples(make_corpus(documents), MAX_LENGTH, seed=0), epochs=2)
    starts = np.cumsum([0] + [sum(lengths) for lengths in documents[:-1]])
    assert visits[starts].mean() > 0.8 * visits.mean()


def test_same_lengths_in_short_documents() -> None:
    """A document that fits is one example, from its beginning."""
    documents = random_documents(500, 3, seed=5)
    examples = Examples(make_corpus(documents), MAX_LENGTH, seed=0)
    ours = [total(words_of(example)) for example in examples.plan(range(2 * len(examples.slots)))]
    theirs = [total(pair) for pair in original_examples(documents)]
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.1)


@pytest.mark.parametrize("sentences", [8, 20, 45], ids=lambda n: f"{n} sentences")
def test_documents_of_a_few_slots_have_as_many_full_examples(sentences: int) -> None:
    """Of 2 to 10 slots: no slot but the short one begins where no text for a full example is left."""
    documents = random_documents(60_000 // sentences, sentences, seed=sentences)
    examples = Examples(make_corpus(documents), MAX_LENGTH, seed=0)
    count = len(examples.slots)
    assert 1.9 < count / len(documents) < 11
    ours = [total(words_of(example)) for example in examples.plan(range(count))]
    theirs = [total(pair) for pair in original_examples(documents)]
    full = [np.mean(np.array(lengths) >= MAX_LENGTH - 1) for lengths in (ours, theirs)]
    assert full[0] == pytest.approx(full[1], abs=0.035)
    ends = np.cumsum([sum(lengths) for lengths in documents])
    for number in range(0, count, 7):
        slot = examples.slots[number]
        draw = 12_345_678_901_234_567_890 + number
        begin, end = examples.slots.sentences(slot, draw)
        borders = examples.shards[0].sentences
        if slot.total > 1 and slot.place != draw % slot.total:
            assert borders[end] == ends[slot.document] and borders[end] - borders[begin] >= MAX_LENGTH


def test_slots_of_one_epoch_start_at_different_places() -> None:
    """All slots once: as many starts as slots, but for the neighbours that share a long sentence."""
    examples = Examples(make_corpus([[1] * 4000]), MAX_LENGTH, seed=0)
    starts = [example.first[0].begin for example in examples.plan(range(len(examples.slots)))]
    assert len(set(starts)) == len(starts) == 125
    gaps = Counter(np.diff(sorted(starts)).tolist())
    assert gaps[MAX_LENGTH] >= 119, "moved are a run of slots, and all between first and last; one is short"
    assert set(gaps) <= set(range(1, 2 * MAX_LENGTH))
    assert starts != sorted(starts)


# permute ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 17, 100, 1000])
def test_permute_is_a_bijection(size: int) -> None:
    for seed in range(3):
        assert sorted(permute(i, size, seed) for i in range(size)) == list(range(size))


def test_permute_mixes() -> None:
    """Where a place goes is about uniform over seeds, and neighbours are not kept together."""
    size, seeds = 20, range(2000)
    counts = np.bincount([permute(3, size, seed * 7919) for seed in seeds], minlength=size)
    assert ((counts - 100) ** 2 / 100).sum() < 60, "chi-square, 19 degrees of freedom, beyond 99.999%"
    big = [permute(i, 1000, 1) for i in range(1000)]
    assert np.mean(np.abs(np.diff(big)) == 1) < 0.02
    assert abs(np.corrcoef(np.arange(1000), big)[0, 1]) < 0.13, "four standard deviations of 1 / sqrt(1000)"
