"""Examples as token ids, stored flat; truncation, sliding windows, and which sequences form a batch.

Sequences lie end to end in one array, as in `packing.TokenBatch`: a batch is a few slices, and half a million
sentence pairs take 100 MB. Nothing is padded.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from electra_kernels.rng import fold
from torch import Tensor

from electra_core.packing import TokenBatch, from_lengths

POOL_BATCHES = 50
"""Number of batches whose sequences are sorted by length together: more is faster, fewer is more random."""
TRUNCATIONS = ("head", "tail", "both")


@dataclass(frozen=True)
class TaskBatch:
    """A batch of packed sequences with their targets."""

    tokens: TokenBatch
    """N sequences, T tokens."""
    targets: Tensor
    """Targets of the task's loss: per unit ([U] or [U, 2]) or per token ([T]); empty if there are none."""
    unit_starts: Tensor
    """int64 [U + 1]: unit u is sequences unit_starts[u] to unit_starts[u + 1] (more than one for choices)."""

    def to(self, device: torch.device | str) -> TaskBatch:
        """The batch on `device`."""
        return TaskBatch(self.tokens.to(device), self.targets.to(device), self.unit_starts.to(device))


class Features:
    """Encoded examples. A unit stays together in a batch: one sequence, or all endings of a multiple choice.

    Attributes:
        owners: for each unit, the index of the example it belongs to (long documents have several units).
        targets: of each unit; empty if they have none.
        places: for each unit, what its task needs to interpret the logits, if anything.
        truncated: how many examples lost tokens.
    """

    def __init__(self, cls_id: int, sep_id: int, *, per_token: bool = False):
        self.cls_id, self.sep_id, self.per_token = cls_id, sep_id, per_token
        self.truncated = 0
        self.owners: list[int] = []
        self.places: list[Any] = []
        self._ids, self._starts, self._first = array("i"), array("q", [0]), array("i")
        self._unit_starts = array("q", [0])
        self.targets: list = []

    def __len__(self) -> int:
        return len(self._unit_starts) - 1

    def add_sequence(self, first: Sequence[int], second: Sequence[int] | None = None) -> None:
        """Appends `[CLS] first [SEP]` or `[CLS] first [SEP] second [SEP]`; `end_unit` closes the unit."""
        self._ids.append(self.cls_id)
        self._ids.extend(first)
        self._ids.append(self.sep_id)
        self._first.append(len(first) + 2)
        if second is not None:
            self._ids.extend(second)
            self._ids.append(self.sep_id)
        self._starts.append(len(self._ids))

    def end_unit(self, owner: int, target: object = None, place: Any = None) -> None:
        """Closes a unit, which holds the sequences added since the last one; `target` None: it has none."""
        self._unit_starts.append(len(self._first))
        self.owners.append(owner)
        self.places.append(place)
        if target is not None:
            self.targets.append(target)

    def add(
        self,
        owner: int,
        first: Sequence[int],
        second: Sequence[int] | None = None,
        target: object = None,
        place: Any = None,
    ) -> None:
        """Appends a unit of one sequence."""
        self.add_sequence(first, second)
        self.end_unit(owner, target, place)

    def extend(self, other: Features, first_owner: int) -> None:
        """Appends the units of `other`, whose examples are numbered from `first_owner` on."""
        tokens, sequences = len(self._ids), len(self._first)
        self._ids.extend(other._ids)
        self._first.extend(other._first)
        self._starts.extend(array("q", (start + tokens for start in other._starts[1:])))
        self._unit_starts.extend(array("q", (start + sequences for start in other._unit_starts[1:])))
        self.targets += other.targets
        self.places += other.places
        self.owners += [owner + first_owner for owner in other.owners]
        self.truncated += other.truncated

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Everything as arrays and plain values for `from_arrays`; None if `places` holds anything."""
        if any(place is not None for place in self.places):
            return None
        flat = self.per_token and self.targets
        arrays: dict[str, np.ndarray] = {
            "ids": np.asarray(self._ids, dtype=np.int32),
            "starts": np.asarray(self._starts, dtype=np.int64),
            "first": np.asarray(self._first, dtype=np.int32),
            "unit_starts": np.asarray(self._unit_starts, dtype=np.int64),
            "owners": np.asarray(self.owners, dtype=np.int64),
            "targets": np.concatenate(self.targets) if flat else np.asarray(self.targets),
        }
        facts = {name: getattr(self, name) for name in ("cls_id", "sep_id", "per_token", "truncated")}
        return arrays, {**facts, "has_targets": self.has_targets}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> Features:
        """The inverse of `to_arrays`.

        Raises:
            KeyError, ValueError: something is missing or has the wrong size.
        """
        features = cls(facts["cls_id"], facts["sep_id"], per_token=facts["per_token"])
        features.truncated = facts["truncated"]
        for kind, name in (("i", "ids"), ("q", "starts"), ("i", "first"), ("q", "unit_starts")):
            setattr(features, f"_{name}", array(kind, arrays[name].tobytes()))
        features.owners = arrays["owners"].tolist()
        features.places = [None] * len(features.owners)
        if facts["has_targets"]:
            targets = arrays["targets"]
            cuts = np.cumsum(features.lengths)[:-1]
            features.targets = np.split(targets, cuts) if features.per_token else list(targets)
        if len(features) != len(features.owners) or features._starts[-1] != len(features._ids):
            raise ValueError("arrays: expected sizes that fit each other")
        return features

    @property
    def lengths(self) -> np.ndarray:
        """int64 [U]: tokens of each unit."""
        return np.diff(np.asarray(self._starts)[np.asarray(self._unit_starts)])

    @property
    def num_tokens(self) -> int:
        """Total number of tokens."""
        return len(self._ids)

    def unknown(self, unk_id: int) -> tuple[int, int]:
        """How many tokens are `unk_id`, and how many tokens there are, [CLS] and [SEP] not counted."""
        ids = np.asarray(self._ids, dtype=np.int32)
        borders = int(np.count_nonzero((ids == self.cls_id) | (ids == self.sep_id)))
        return int(np.count_nonzero(ids == unk_id)), len(ids) - borders

    @property
    def has_targets(self) -> bool:
        """Whether every unit has a target."""
        return len(self) > 0 and len(self.targets) == len(self)

    def batch(self, units: Sequence[int] | np.ndarray) -> TaskBatch:
        """The given units, packed in this order."""
        ids, starts = np.frombuffer(self._ids, dtype=np.int32), self._starts
        sequences = [s for u in units for s in range(self._unit_starts[u], self._unit_starts[u + 1])]
        flat = np.concatenate([ids[starts[s] : starts[s + 1]] for s in sequences]).astype(np.int64)
        lengths = [starts[s + 1] - starts[s] for s in sequences]
        first = torch.tensor([self._first[s] for s in sequences])
        tokens = from_lengths(torch.from_numpy(flat), torch.zeros(len(flat), dtype=torch.int64), lengths)
        in_second = tokens.position_ids_T >= first.repeat_interleave(torch.tensor(lengths))
        tokens.segment_ids_T.copy_(in_second)
        counts = [self._unit_starts[u + 1] - self._unit_starts[u] for u in units]
        unit_starts = torch.tensor([0, *counts]).cumsum(0)
        return TaskBatch(tokens, self._batch_targets(units), unit_starts)

    def _batch_targets(self, units: Sequence[int] | np.ndarray) -> Tensor:
        if not self.has_targets:
            return torch.empty(0)
        chosen = [self.targets[u] for u in units]
        return torch.as_tensor(np.concatenate(chosen) if self.per_token else np.asarray(chosen))


def batch_order(
    lengths: np.ndarray, *, batch_size: int, tokens_per_batch: int = 0, seed: int, epoch: int
) -> list[np.ndarray]:
    """One epoch's batches as arrays of unit indices: every unit once, a pure function of the arguments.

    Units are shuffled, sorted by length within pools of up to `POOL_BATCHES` batches (similar lengths together
    save work wherever lengths matter, at little cost in randomness), cut, and the batches shuffled again.

    The remainder is a smaller batch at a random place in its pool, so that its lengths are random, too; a mean
    over batches must weight it (`finetuning/steps.py`). Token budgets are filled evenly, and units stay whole.

    Args:
        batch_size: units per batch; not used if `tokens_per_batch` > 0 limits the tokens instead.
    """
    random = np.random.Generator(np.random.Philox(key=fold(seed, epoch)))
    order = random.permutation(len(lengths))
    if tokens_per_batch:
        batch_size = max(1, round(tokens_per_batch * len(lengths) / max(1, int(lengths.sum()))))
    count = -(-len(order) // batch_size)
    in_pool = [len(part) for part in np.array_split(range(count), max(1, -(-count // POOL_BATCHES)))]
    batches: list[np.ndarray] = []
    for pool in np.split(order, batch_size * np.cumsum(in_pool)[:-1]):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        if tokens_per_batch:
            borders = _cut_evenly(lengths[pool], tokens_per_batch)
        else:
            full, rest = divmod(len(pool), batch_size)
            sizes = [batch_size] * full
            sizes.insert(int(random.integers(full + 1)), rest)
            borders = np.cumsum(sizes)[:-1].tolist()
        batches += [batch for batch in np.split(pool, borders) if len(batch)]
    return [batches[index] for index in random.permutation(len(batches))]


def sorted_batches(lengths: np.ndarray, tokens_per_batch: int) -> Iterator[np.ndarray]:
    """All units, longest first (memory runs out at once or never), in batches within a token budget."""
    order = np.argsort(-lengths, kind="stable")
    yield from (part for part in np.split(order, _cut_by_tokens(lengths[order], tokens_per_batch)) if len(part))


def _cut_by_tokens(lengths: np.ndarray, budget: int) -> list[int]:
    """Where to cut a list of units so that no part exceeds the budget (a longer unit is a part of its own)."""
    cuts, total = [], 0
    for index, length in enumerate(lengths.tolist()):
        if total and total + length > budget:
            cuts.append(index)
            total = 0
        total += length
    return cuts


def _cut_evenly(lengths: np.ndarray, budget: int) -> list[int]:
    """As `_cut_by_tokens`, with the smallest budget that needs no more parts."""
    cuts = _cut_by_tokens(lengths, budget)
    least, enough = int(lengths.sum()) // (len(cuts) + 1), budget
    while least < enough:
        middle = (least + enough) // 2
        if len(tried := _cut_by_tokens(lengths, middle)) <= len(cuts):
            cuts, enough = tried, middle
        else:
            least = middle + 1
    return cuts


def truncate(ids: list[int], size: int, how: str = "head") -> list[int]:
    """At most `size` ids: the beginning ("head"), the end ("tail"), or both in a ratio of one to three ("both").

    "both" follows Sun et al. 2019 (How to Fine-Tune BERT for Text Classification): the first 128
    and the last 382 tokens did best on IMDb.
    """
    if how not in TRUNCATIONS:
        raise ValueError(f"how: expected one of {', '.join(TRUNCATIONS)}, got {how!r}")
    if len(ids) <= size:
        return ids
    head = {"head": size, "tail": 0, "both": size // 4}[how]
    tail = size - head
    return ids[:head] + (ids[-tail:] if tail else [])


def truncate_pair(first: list[int], second: list[int], size: int, how: str) -> tuple[list[int], list[int]]:
    """Two texts truncated to `size` ids together: the longer one is cut until they fit, the second one if they are
    equally long (as in the original)."""
    if len(first) + len(second) <= size:
        return first, second
    kept = min(len(first), max(size - len(second), (size + 1) // 2))
    return truncate(first, kept, how), truncate(second, size - kept, how)


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` of a long text, of which the window owns `own_start` to `own_stop`."""

    start: int
    stop: int
    own_start: int
    own_stop: int


def windows(length: int, size: int, stride: int) -> list[Window]:
    """Overlapping windows over `length` tokens, a new one every `stride`, at most `size` long.

    A token in several windows is owned by the one whose nearer edge is farthest from it, the earlier one on a tie;
    so each token is owned exactly once.

    Raises:
        ValueError: size or stride below 1, or stride > size (tokens would be lost).
    """
    if not 1 <= stride <= size:
        raise ValueError(f"stride: expected 1 to size ({size}), got {stride}")
    starts = [0]
    while starts[-1] + size < length:
        starts.append(starts[-1] + stride)
    stops = [min(start + size, length) for start in starts]
    # Between neighbours the nearer edges are `stop - 1` of the one and `start` of the next.
    edges = [0] + [(stop - 1 + start) // 2 + 1 for stop, start in zip(stops[:-1], starts[1:])] + [length]
    return [Window(*place) for place in zip(starts, stops, edges[:-1], edges[1:])]
