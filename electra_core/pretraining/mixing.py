"""Several corpora as one, visited by weight: `electra pretrain --data A B --mix 3 1`.

Of every BLOCK examples in a row, each corpus provides a fixed number, in proportion to its weight; a permutation
per block decides which. So here, too, example `index` is a pure function of (seed, index); within its own epoch,
a corpus has no example skipped or repeated; and a batch follows the weights roughly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from electra_kernels.rng import fold

from electra_core.config import LARGEST, PretrainConfig
from electra_core.corpus import Corpus
from electra_core.errors import UserError, option
from electra_core.examples import Example, Examples, Plan
from electra_core.files.json_files import digest_of
from electra_core.pretraining.example_rules import ONE_SEGMENT_PROBABILITY
from electra_core.pretraining.permutation import permute_all
from electra_core.tokenizer import Tokenizer

BLOCK = 1024
"""Number of examples over which the weights hold exactly; weights are rounded to multiples of 1/1024."""
_ORDER, _CORPUS = 0x6D69, 0x78  # streams of random numbers used nowhere else


class Mixture(Corpus):
    """The shards of several corpora, one after the other, and how often each corpus is visited.

    Args:
        corpora: opened splits, with the same tokenizer.
        weights: one per corpus, any positive numbers; None: in proportion to their tokens.

    Raises:
        UserError: different tokenizers, an empty corpus, or weights of the wrong number or size.
    """

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float] | None = None) -> None:
        first = corpora[0]
        for corpus in corpora:
            if corpus.manifest.tokenizer_fingerprint != first.manifest.tokenizer_fingerprint:
                raise UserError(
                    f"{corpus.directory} and {first.directory} have different tokenizers; "
                    "prepare them with the same one (`electra prepare --tokenizer DIR`)"
                )
            if not corpus.num_tokens:
                raise UserError(f"{corpus.directory}: has no {corpus.split} documents, so it cannot be mixed in")
        self.corpora = tuple(corpora)
        self.counts = apportion([corpus.num_tokens for corpus in corpora] if weights is None else weights, corpora)
        self.directory, self.split, self.manifest = first.directory, first.split, first.manifest
        self.num_tokens = sum(corpus.num_tokens for corpus in corpora)
        self.num_sentences = sum(corpus.num_sentences for corpus in corpora)
        self.num_documents = sum(corpus.num_documents for corpus in corpora)
        self.shards = tuple(shard for corpus in corpora for shard in corpus.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of all corpora, their order and their weights."""
        return digest_of([[corpus.fingerprint for corpus in self.corpora], self.counts])

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that all corpora share."""
        return self.corpora[0].tokenizer

    def verify(self) -> None:
        """Calls `Corpus.verify` for every corpus."""
        for corpus in self.corpora:
            corpus.verify()


def apportion(weights: Sequence[float], corpora: Sequence[Corpus]) -> list[int]:
    """Number of examples per block of each corpus, at least 1, in proportion to its weight (largest remainders).

    Raises:
        UserError: not one positive weight per corpus, or a weight too small for one example per block.
    """
    if len(weights) != len(corpora):
        raise UserError(f"{option('mix')}: expected one weight per corpus, {len(corpora)}, got {len(weights)}")
    if not all(0 < weight <= LARGEST for weight in weights):
        raise UserError(
            f"{option('mix')}: expected positive numbers, at most {LARGEST:.2g}, got "
            f"{' '.join(f'{weight:g}' for weight in weights)}"
        )
    shares = [BLOCK * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda place: counts[place] - shares[place])
    for place in by_remainder[: BLOCK - sum(counts)]:
        counts[place] += 1
    for count, corpus in zip(counts, corpora):
        if not count:
            raise UserError(
                f"{corpus.directory}: has less than 1/{BLOCK} of the weight; give it more with {option('mix')}"
            )
    return counts


class MixedExamples(Examples):
    """`Examples` of a mixture."""

    def __init__(
        self,
        mixture: Mixture,
        max_length: int,
        seed: int,
        one_segment_probability: float = ONE_SEGMENT_PROBABILITY,
    ) -> None:
        self.corpus, self.max_length, self.seed, self.shards = mixture, max_length, seed, mixture.shards
        self._examples = [
            Examples(corpus, max_length, fold(seed, number, _CORPUS), one_segment_probability)
            for number, corpus in enumerate(mixture.corpora)
        ]
        self._ends = np.cumsum(mixture.counts)
        self._first_shards = np.cumsum([0, *(len(corpus.shards) for corpus in mixture.corpora)])

    def one(self, index: int) -> Example:
        """As `Examples.one`."""
        corpus, inside = self.place(index)
        shards = int(self._first_shards[corpus])
        example = self._examples[corpus].one(inside)
        first, second = ([span._replace(shard=span.shard + shards) for span in part] for part in example)
        return Example(first, second)

    def plan(self, indices: Sequence[int] | np.ndarray) -> Plan:
        """As `Examples.plan`."""
        corpora, insides = self.places(np.asarray(indices, dtype=np.int64))
        plans, order = [], []
        for number in np.unique(corpora).tolist():
            order.append(np.flatnonzero(corpora == number))
            plan = self._examples[number].plan(insides[order[-1]])
            # Shards are numbered over all corpora.
            plans.append(replace(plan, shards_N=plan.shards_N + self._first_shards[number]))
        return Plan.joined(plans).take(np.argsort(np.concatenate(order)))

    def place(self, index: int) -> tuple[int, int]:
        """(number of the corpus, index among its examples) of example `index`."""
        corpora, insides = self.places(np.array([index]))
        return int(corpora[0]), int(insides[0])

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`place` for many examples."""
        blocks, insides = np.divmod(indices, BLOCK)
        insides = permute_all(insides, BLOCK, self._seeds(blocks, _ORDER))
        corpora = np.searchsorted(self._ends, insides, side="right")
        counts = np.diff(self._ends, prepend=0)[corpora]
        return corpora, blocks * counts + insides - (self._ends[corpora] - counts)


def examples_of(corpus: Corpus, config: PretrainConfig, seed: int) -> Examples:
    """The examples of a corpus or of a mixture."""
    corpus.read_at_random()
    rules = config.max_length, seed, config.one_segment_probability
    return MixedExamples(corpus, *rules) if isinstance(corpus, Mixture) else Examples(corpus, *rules)


def open_data(
    data: str | Path | Sequence[str | Path], mix: Sequence[float] | None = None, split: str = "train"
) -> Corpus:
    """Opens a split of one prepared corpus, or of several mixed by weight.

    Raises:
        UserError: as `Corpus.open` and `Mixture`; weights for one corpus; a corpus named twice.
    """
    folders = [data] if isinstance(data, str | Path) else list(data)
    places = [Path(folder).resolve() for folder in folders]
    if twice := [str(folder) for number, folder in enumerate(folders) if places[number] in places[:number]]:
        raise UserError(
            f"{option('data')}: {twice[0]} is given twice; to sample it more often, use {option('mix')}"
        )
    corpora = [Corpus.open(folder, split) for folder in folders]
    if len(corpora) > 1:
        return Mixture(corpora, mix)
    if split == "train" and not corpora[0].num_tokens:
        raise UserError(f"{folders[0]}: nothing to train on (merge parts with `electra prepare --merge`)")
    if mix is not None:
        raise UserError(f"{option('mix')}: no effect with a single corpus")
    return corpora[0]
