"""Token shards -> pre-training examples, as a pure function of (seed, index).

The original (google-research/electra, build_pretraining_dataset.py) walks through each document once,
collecting sentences until they reach a target length, and stores the examples. Here nothing is stored:
example `index` is built on demand, so every epoch has different segment borders and masks,
the number of workers or ranks changes nothing, and resuming needs no saved iterator.

An epoch visits every slot of every document once (`pretraining/slots.py`), in random order
(`pretraining/permutation.py`). The original's rules (`pretraining/example_rules.py`) turn a slot into an example,
for a whole batch at once (`pretraining/planning.py`).

`docs/deviations.md` lists the differences; a test compares the distributions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from electra_kernels.rng import fold

from electra_core.corpus import Corpus
from electra_core.host_random import philox_words
from electra_core.packing import TokenBatch, from_lengths
from electra_core.pretraining.example_rules import MOST_SENTENCES, ONE_SEGMENT_PROBABILITY, Example, collect
from electra_core.pretraining.permutation import mix, mix_all, permute, permute_all
from electra_core.pretraining.planning import Plan, collect_all, ragged
from electra_core.pretraining.slots import Slots, gather

RULES = 2
"""Version of the rules that turn a corpus into examples; a run begun with another version cannot be resumed. In
version 1, a slot near a document's end could begin where too little text for a full example was left.
Whoever raises this adapts the date in `check_identity`: all versions call themselves 0.1.0."""
COINS = MOST_SENTENCES + 4  # a multiple of four, the numbers in a call of Philox
_ORDER, _BORDERS, _COINS = 0, 1, 2  # streams of random numbers; masking.py uses 3


class Examples:
    """The endless sequence of pre-training examples of a corpus.

    Args:
        corpus: an opened split.
        max_length: maximum number of tokens per example, [CLS] and [SEP] included.
        seed: the run's seed.
        one_segment_probability: of an example to be one segment, though there is text for two.
    """

    def __init__(
        self, corpus: Corpus, max_length: int, seed: int, one_segment_probability: float = ONE_SEGMENT_PROBABILITY
    ):
        self.corpus, self.max_length, self.seed = corpus, max_length, seed
        self.one_segment_probability = one_segment_probability
        self.shards = corpus.shards
        self.slots = Slots(self.shards, max_length)

    def one(self, index: int) -> Example:
        """Where the tokens of example `index` lie, by the readable form of the rules; `plan` gives the same."""
        epoch, place = divmod(index, len(self.slots))
        number = permute(place, len(self.slots), fold(self.seed, epoch, _ORDER))
        slot = self.slots[number]
        document = number - slot.place  # identified by the number of its first slot
        sentence, end = self.slots.sentences(slot, mix(document, fold(self.seed, epoch, _BORDERS)))
        stop = min(end, sentence + MOST_SENTENCES)
        borders = self.shards[slot.shard].sentences[sentence : stop + 1].astype(np.int64)
        coins = _coins(self.seed, np.array([index]))[0]
        return collect(slot.shard, borders, self.max_length, coins, self.one_segment_probability)

    def plan(self, indices: Sequence[int] | np.ndarray) -> Plan:
        """Where the tokens of the examples `indices` lie; reads sentence borders, but no text."""
        indices = np.asarray(indices, dtype=np.int64)
        epochs, places = np.divmod(indices, len(self.slots))
        numbers = permute_all(places, len(self.slots), self._seeds(epochs, _ORDER))
        slots = self.slots.find(numbers)
        documents = (numbers - slots.place).astype(np.uint64)
        sentences, ends = self.slots.ranges(slots, mix_all(documents, self._seeds(epochs, _BORDERS)))
        counts = np.minimum(ends - sentences, MOST_SENTENCES)
        borders = gather(self.shards, "sentences", slots.shard, sentences, MOST_SENTENCES + 1)
        coins = _coins(self.seed, indices)
        return collect_all(slots.shard, borders, counts, self.max_length, coins, self.one_segment_probability)

    def batch(self, plan: Plan) -> TokenBatch:
        """The tokens of planned examples, packed."""
        tokenizer, lengths_N = self.corpus.tokenizer, plan.lengths
        ids_T = np.full(int(lengths_N.sum()), tokenizer.sep_id, dtype=np.int64)
        ids_T[np.cumsum(lengths_N) - lengths_N] = tokenizer.cls_id
        # A span's tokens follow those of the spans before it, and the [CLS] and [SEP] of earlier segments.
        segments_N = 1 + (plan.seconds_N > 0)
        specials_N = np.cumsum(1 + segments_N) - segments_N  # before an example's first word
        specials_P = np.repeat(specials_N, np.diff(plan.ends_N)) + plan.is_second_P
        places_P = np.cumsum(plan.lengths_P) - plan.lengths_P + specials_P
        ids_T[ragged(places_P, plan.lengths_P)] = self._words(plan)
        halves_N2 = np.stack((plan.firsts_N + 2, lengths_N - plan.firsts_N - 2), axis=1)
        segment_ids_T = np.repeat(np.tile([0, 1], len(plan)), halves_N2.ravel())
        return from_lengths(torch.from_numpy(ids_T), torch.from_numpy(segment_ids_T), lengths_N)

    def _words(self, plan: Plan) -> np.ndarray:
        """The spans' tokens end to end. Each example is read from its shard as one contiguous range."""
        first_N = np.minimum.reduceat(plan.begins_P, plan.ends_N[:-1])
        last_N = np.maximum.reduceat(plan.begins_P + plan.lengths_P, plan.ends_N[:-1])
        rows = zip(plan.shards_N.tolist(), first_N.tolist(), last_N.tolist())
        text = np.concatenate([self.shards[shard].tokens[begin:end] for shard, begin, end in rows])
        moved_N = np.cumsum(last_N - first_N) - last_N  # from an offset in the shard to one in `text`
        return text[ragged(plan.begins_P + np.repeat(moved_N, np.diff(plan.ends_N)), plan.lengths_P)]

    def _seeds(self, numbers: np.ndarray, stream: int) -> np.ndarray:
        """uint64: a seed for each number, of an epoch or of a mixture's block."""
        different, which = np.unique(numbers, return_inverse=True)
        return np.array([fold(self.seed, number, stream) for number in different.tolist()], dtype=np.uint64)[which]


def _coins(seed: int, indices: np.ndarray) -> np.ndarray:
    """[len(indices), COINS]: uniform numbers, a function of seed and index."""
    words = philox_words(fold(seed, _COINS), COINS // 4, indices)
    return (words.transpose(1, 2, 0).reshape(len(indices), COINS) + 0.5) * 2.0**-32  # as `rng.uniform`
