"""Word vectors from counting: against a plain count, on words that mean the same, and what goes wrong."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import RUN, SIZES, data  # noqa: F401

from electra_core.corpus import Corpus
from electra_core.electra import Electra
from electra_core.errors import UserError
from electra_core.pretraining import cooccurrence
from electra_core.pretraining.cooccurrence import (
    WINDOW_WEIGHTS,
    _positive_mutual_information,
    _truncated_svd,
    cooccurrence_embeddings,
    count_neighbours,
    log_frequencies,
)
from electra_core.pretraining.mixing import Mixture
from electra_core.pretraining.setup import _start_from_counts, resolve_config

VOCAB = 60


def corpus_of(*shards: list[int], vocab_size: int = VOCAB) -> Any:
    """A corpus as far as counting needs to know one."""
    tokenizer = SimpleNamespace(vocab_size=vocab_size, special_ids=(0, 1, 2, 3, 4))
    made = tuple(SimpleNamespace(tokens=np.array(ids, dtype="<u2")) for ids in shards)
    return SimpleNamespace(shards=made, tokenizer=tokenizer, num_tokens=sum(map(len, shards)))


def language(tokens: int = 30_000, seed: int = 0) -> list[int]:
    """Words 10-19, 20-29 and 30-39 follow one another in turn: within a class any word may stand for another."""
    draw = np.random.default_rng(seed)
    classes = np.arange(tokens) % 3
    return (10 + 10 * classes + draw.integers(0, 10, tokens)).tolist()


def test_counts_are_those_of_a_plain_loop() -> None:
    draw = np.random.default_rng(1)
    shards = [draw.integers(5, 12, n).tolist() for n in (40, 25, 3)]
    expected = torch.zeros(12, 12)
    for ids in shards:
        for i, word in enumerate(ids):
            for distance, weight in enumerate(WINDOW_WEIGHTS, start=1):
                if i + distance < len(ids):
                    expected[word, ids[i + distance]] += weight
                    expected[ids[i + distance], word] += weight
    torch.testing.assert_close(count_neighbours(corpus_of(*shards), 12), expected)


def test_a_long_corpus_is_counted_in_part_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cooccurrence, "MOST_TOKENS", 3_000)
    ids = np.repeat(np.arange(10, 50), 300).tolist()  # 12,000 tokens
    counts = np.exp(log_frequencies(corpus_of(ids)).numpy())
    counts *= 1.0 / counts[0]  # of a word that does not occur: one
    assert 2_500 < counts.sum() - VOCAB <= 3_000 and (counts[10:50] > 40).all()
    assert (
        2 * 3_000 * sum(WINDOW_WEIGHTS) * 0.8
        < count_neighbours(corpus_of(ids), VOCAB).sum()
        <= 2 * 3_000 * sum(WINDOW_WEIGHTS)
    )


def test_a_mixtures_parts_count_by_their_weights() -> None:
    mixture = object.__new__(Mixture)
    mixture.corpora = (corpus_of([10, 11] * 300), corpus_of([20, 21] * 50))
    mixture.counts, mixture.num_tokens = [256, 768], 700
    counts_VV = count_neighbours(mixture, VOCAB)
    first, second = counts_VV[10:12].sum(), counts_VV[20:22].sum()
    assert second / first == pytest.approx(3, rel=0.05), "though its text is a sixth of the other's"


def test_what_is_factored_is_the_formula() -> None:
    """log C[i, j] / (C[i] p(j)^0.75), p^0.75 summing to 1; 0 where that is negative or nothing was counted."""
    counts_VV = torch.randint(0, 9, (6, 6), generator=torch.Generator().manual_seed(0)).float().triu()
    counts_VV = counts_VV + counts_VV.T
    totals = counts_VV.sum(1).tolist()
    smooth = [total**0.75 / sum(t**0.75 for t in totals) for total in totals]
    expected = [
        [max(0.0, math.log(count / (total * p))) if count else 0.0 for count, p in zip(row, smooth, strict=True)]
        for row, total in zip(counts_VV.tolist(), totals, strict=True)
    ]
    ppmi_VV = _positive_mutual_information(counts_VV)
    torch.testing.assert_close(ppmi_VV, torch.tensor(expected))
    assert 5 < (ppmi_VV > 0).sum() < 30


def test_words_of_equal_contexts_get_similar_vectors() -> None:
    vectors_VE = cooccurrence_embeddings(corpus_of(language(60_000)), width=4, rms=0.08, seed=0)
    unit = F.normalize(vectors_VE[10:40], dim=1)
    similarity = unit @ unit.T
    same = torch.block_diag(*[torch.ones(10, 10)] * 3).bool()
    alike = similarity[same & ~torch.eye(30, dtype=torch.bool)]
    assert alike.min() > similarity[~same].max(), "any word of the class is nearer than any of another"
    assert alike.mean() > 0.8 and similarity[~same].mean() < 0.4


def test_every_row_has_the_wanted_size() -> None:
    """Also special words, and those that never occur (5 to 9, 40 to 59)."""
    for width, rms in ((8, 0.02), (32, 0.08)):
        vectors_VE = cooccurrence_embeddings(corpus_of(language(3000)), width, rms, seed=0)
        assert vectors_VE.shape == (VOCAB, width) and vectors_VE.dtype == torch.float32
        torch.testing.assert_close(vectors_VE.pow(2).mean(1).sqrt(), torch.full((VOCAB,), rms))


def test_unseen_words_are_random_and_differ() -> None:
    vectors_VE = cooccurrence_embeddings(corpus_of(language(3000)), 16, 1.0, seed=0)
    unit = F.normalize(vectors_VE, dim=1)[[0, 1, 2, 3, 4, 5, 50, 59]]
    similarity = (unit @ unit.T).fill_diagonal_(0)
    assert similarity.abs().max() < 0.95


def test_an_unknown_word_in_the_text_is_random_too() -> None:
    """[UNK] is special. As the others' equal it would be as near to them as they are to one another."""
    ids = [1 if word == 15 else word for word in language(60_000)]
    unit = F.normalize(cooccurrence_embeddings(corpus_of(ids), 4, 1.0, seed=0), dim=1)
    assert unit[14] @ unit[16] > 0.8 > 0.5 > unit[1] @ unit[16]


@pytest.mark.parametrize("tying", ["none", "embeddings", "disentangled"])
def test_both_models_start_from_them(data: Path, tying: str) -> None:
    """Of the size of other initial values; with `disentangled` the discriminator's own part is a difference, 0."""
    corpus, sizes = Corpus.open(data), SIZES | {"initializer_range": 0.05}
    encoder, config = resolve_config("tiny", RUN | {"tying": tying}, sizes, corpus)
    model: Any = Electra(encoder, config)
    _start_from_counts(model, SimpleNamespace(corpus=corpus, encoder=encoder, config=config), quiet=True)
    expected_VE = cooccurrence_embeddings(corpus, encoder.embedding_size, 0.05, config.seed)
    for half in (model.generator, model.discriminator):
        assert torch.equal(half.encoder.embeddings.word_weight(), expected_VE)
    assert torch.equal(model.generator.output_bias, log_frequencies(corpus))


def test_the_rotation_spreads_the_leading_direction() -> None:
    """Without it, the first column would hold most of every row."""
    vectors_VE = cooccurrence_embeddings(corpus_of(language()), 16, 1.0, seed=0)
    energy = vectors_VE[10:40].pow(2).sum(0)
    assert energy.max() / energy.sum() < 0.5


def test_same_seed_same_vectors() -> None:
    corpus = corpus_of(language(3000))
    ours, again, other = (cooccurrence_embeddings(corpus, 16, 1.0, seed) for seed in (0, 0, 1))
    assert torch.equal(ours, again) and not torch.allclose(ours, other)


def test_lapack_s_choice_of_signs_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of Q and singular vectors may have either sign, and libraries differ in it."""
    corpus, generator = corpus_of(language(3000)), torch.Generator().manual_seed(7)
    here = cooccurrence_embeddings(corpus, 16, 1.0, seed=0)
    qr, svd, flipped = torch.linalg.qr, torch.linalg.svd, []

    def signs(size: int) -> torch.Tensor:
        flipped.append(torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1)
        return flipped[-1]

    def other_qr(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, r = qr(matrix)
        sign = signs(len(r))
        return q * sign, sign[:, None] * r

    def other_svd(matrix: torch.Tensor, **options: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        u, s, vh = svd(matrix, **options)
        sign = signs(len(s))
        return u * sign, s, sign[:, None] * vh

    monkeypatch.setattr(torch.linalg, "qr", other_qr)
    monkeypatch.setattr(torch.linalg, "svd", other_svd)
    for _ in range(3):
        torch.testing.assert_close(cooccurrence_embeddings(corpus, 16, 1.0, seed=0), here)
    assert (torch.cat(flipped) < 0).any()
    assert cooccurrence._signs(torch.tensor([0.0, -0.0, -2.0, 3.0])).tolist() == [1, 1, -1, 1], "0 wipes no column"


def test_truncated_svd_is_torch_s_own() -> None:
    """U sqrt(S) up to the signs of its columns: so its product with itself is U S U^T."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(50, 6, generator=generator)
    matrix = factors @ factors.T
    ours = _truncated_svd(matrix, 6, generator)
    torch.testing.assert_close(ours @ ours.T, matrix, rtol=1e-3, atol=1e-2)
    u, s, _ = torch.linalg.svd(matrix)
    torch.testing.assert_close(ours.abs(), (u * s.sqrt())[:, :6].abs(), rtol=1e-2, atol=1e-2)


def test_log_frequencies() -> None:
    bias_V = log_frequencies(corpus_of([7, 7, 7], [8, 7], vocab_size=10))
    assert bias_V.shape == (10,) and bias_V.dtype == torch.float32
    assert bias_V.mean().item() == pytest.approx(0, abs=1e-6)
    # One is added to every count, so that words never seen have a logarithm: 5, 2 and 1.
    torch.testing.assert_close((bias_V - bias_V[0]).exp()[[7, 8, 9]], torch.tensor([5.0, 2.0, 1.0]))


@pytest.mark.parametrize(("width", "vocab_size"), [(60, 60), (64, 60), (16, 20_000)])
def test_sizes_that_do_not_fit_are_refused(width: int, vocab_size: int) -> None:
    with pytest.raises(UserError, match=f"embedding_init.* {vocab_size:,};"):
        cooccurrence_embeddings(corpus_of(language(300), vocab_size=vocab_size), width, 1.0, seed=0)
