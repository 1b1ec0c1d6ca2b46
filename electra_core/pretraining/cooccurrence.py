"""Initial word embeddings from co-occurrence counts.

A small transformer has to learn which tokens resemble each other before it can do better than token
frequencies. Counting which tokens occur near each other gives much of that before the first step, because
counting uses every token where masked LM uses one in seven. docs/tiny_history.md has the measurements.

    C[i, j]   how often j occurs near i, by distance (`WINDOW_WEIGHTS`)
    PPMI      max(0, log C[i, j] / (C[i] p(j)^0.75))          (Levy, Goldberg and Dagan 2015: smoothed contexts)
    E         U sqrt(S) of its truncated singular value decomposition, rotated at random, rows of equal norm

The output bias starts as the tokens' log frequencies, for the same reason.

The random rotation spreads the leading directions over all E dimensions, as LayerNorm and weight decay expect.
Used by `PretrainConfig.embedding_init = "cooccurrence"`; the original starts from random numbers
(`docs/deviations.md`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from electra_core.corpus import Corpus
from electra_core.errors import UserError, option
from electra_core.pretraining.mixing import Mixture

WINDOW_WEIGHTS = (1.0, 1.0, 0.67, 0.5)
"""Weights of neighbours at distance 1, 2, 3, 4."""
MOST_TOKENS = 20_000_000
"""Maximum number of tokens counted, which bounds the time; other limits were not compared."""
STRETCHES = 64
"""A shard too long to count is divided into this many equal stretches, and the start of each is counted."""
CONTEXT_SMOOTHING = 0.75
LARGEST_VOCABULARY = 16_384
"""The table of counts is dense: 1 GB at this size."""


def check_vocabulary(vocab_size: int, width: int) -> None:
    """Raises UserError if the vocabulary is too large for a dense table, or not larger than the vectors' width."""
    if not width < vocab_size <= LARGEST_VOCABULARY:
        raise UserError(
            f"embedding_init: 'cooccurrence' needs a vocabulary of {width + 1:,} to {LARGEST_VOCABULARY:,} "
            f"words, the corpus has {vocab_size:,}; {option('embedding_init', 'normal')} works with any"
        )


def cooccurrence_embeddings(corpus: Corpus, width: int, rms: float, seed: int) -> Tensor:
    """Word embeddings from the corpus's co-occurrence counts.

    Args:
        corpus: the training split.
        width: E.
        rms: root mean square of every row; special and unseen tokens are random at that scale.
        seed: seed of the rotation and of the decomposition.

    Returns:
        fp32 [V, E]

    Raises:
        UserError: as `check_vocabulary`.
    """
    vocab_size = corpus.tokenizer.vocab_size
    check_vocabulary(vocab_size, width)
    generator = torch.Generator().manual_seed(seed % 2**63)
    counts_VV = count_neighbours(corpus, vocab_size)
    ppmi_VV = _positive_mutual_information(counts_VV)
    vectors_VE = _truncated_svd(ppmi_VV, width, generator)
    rotation, factor = torch.linalg.qr(torch.randn(width, width, generator=generator))
    vectors_VE = vectors_VE @ (rotation * _signs(factor.diagonal()))

    unseen = counts_VV.sum(1) == 0
    unseen[list(corpus.tokenizer.special_ids)] = True
    vectors_VE[unseen] = torch.randn(int(unseen.sum()), width, generator=generator)
    return vectors_VE * (rms * width**0.5 / vectors_VE.norm(dim=1, keepdim=True).clamp(min=1e-6))


def log_frequencies(corpus: Corpus) -> Tensor:
    """fp32 [V]: log p(token) minus its mean, which an output bias learns first."""
    counts = np.ones(corpus.tokenizer.vocab_size)
    for ids, factor in _sample(corpus):
        counts += factor * np.bincount(ids, minlength=len(counts))
    logs = np.log(counts)
    return torch.from_numpy(logs - logs.mean()).float()


def count_neighbours(corpus: Corpus, vocab_size: int) -> Tensor:
    """fp32 [V, V]: symmetric weighted counts over at most about `MOST_TOKENS` tokens."""
    counts = np.zeros(vocab_size * vocab_size, dtype=np.float32)
    for tokens, factor in _sample(corpus):
        ids = tokens.astype(np.int64)
        for distance, weight in enumerate(WINDOW_WEIGHTS, start=1):
            pairs = ids[:-distance] * vocab_size + ids[distance:]
            counts += np.float32(factor * weight) * np.bincount(pairs, minlength=len(counts)).astype(np.float32)
    table = torch.from_numpy(counts).view(vocab_size, vocab_size)
    return table + table.T


def _sample(corpus: Corpus) -> Iterator[tuple[np.ndarray, float]]:
    """Yields (tokens, weight of each) from all over the corpus; a mixture's corpora follow their weights."""
    parts = corpus.corpora if isinstance(corpus, Mixture) else (corpus,)
    weights = corpus.counts if isinstance(corpus, Mixture) else [1]
    most = min(MOST_TOKENS, corpus.num_tokens)
    for part, weight in zip(parts, weights):
        wanted = most * weight / sum(weights)
        share = min(1.0, wanted / max(1, part.num_tokens))
        for shard in part.shards:
            if len(ids := _spread(shard.tokens, share)):
                yield ids, wanted * len(shard.tokens) / part.num_tokens / len(ids)


def _spread(tokens: np.ndarray, share: float) -> np.ndarray:
    """That share of the tokens. Where stretches meet, distant tokens count as neighbours, once in thousands."""
    if share == 1.0:
        return tokens
    starts = np.linspace(0, len(tokens), STRETCHES + 1).astype(np.int64)
    ends = starts[:-1] + (np.diff(starts) * share).astype(np.int64)
    return np.concatenate([tokens[start:end] for start, end in zip(starts, ends)])


def _positive_mutual_information(counts_VV: Tensor) -> Tensor:
    words = counts_VV.sum(1)
    contexts = words**CONTEXT_SMOOTHING
    expected = words.clamp(min=1)[:, None] * (contexts / contexts.sum()).clamp(min=1e-12)
    return (counts_VV / expected).clamp(min=1e-9).log_().clamp_(min=0)


def _truncated_svd(matrix_VV: Tensor, width: int, generator: torch.Generator, passes: int = 3) -> Tensor:
    """[V, width]: U sqrt(S), by subspace iteration from a random start (Halko, Martinsson and Tropp 2011).

    The largest number of each column is positive.
    """
    oversampled = min(width + 32, len(matrix_VV))
    basis = torch.randn(len(matrix_VV), oversampled, generator=generator)
    for _ in range(passes):
        basis, _ = torch.linalg.qr(matrix_VV @ (matrix_VV.T @ basis))
    u, s, _ = torch.linalg.svd(basis.T @ matrix_VV, full_matrices=False)
    vectors = ((basis @ u) * s.sqrt())[:, :width]
    return vectors * _signs(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)))


def _signs(numbers: Tensor) -> Tensor:
    """1 or -1 each. Multiplied by them, columns do not depend on LAPACK, which is free to choose their signs."""
    return torch.where(numbers < 0, -1.0, 1.0)
