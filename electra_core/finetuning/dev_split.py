"""Chooses the labelled examples to hold out if there is no dev file: the same for every run and every seed.

Examples with the same input stay on one side, and if groups are given, those of a group do, too. Each class gets
about its share of the held-out examples:

    quota    the held-out share of its examples, at least one if there is room; none for a class whose examples all
             have one input, since it could not be learned then
    range    within a fifth of the quota. So for large classes, where a random order comes out about even, that
             order alone decides; for small ones, with a quota below five, the quota is exact, except where a group
             of copies is larger
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from electra_kernels.rng import fold

from electra_core.errors import UserError, option
from electra_core.finetuning.data_warnings import input_of
from electra_core.labelled_data.labelled import labels_in
from electra_core.labelled_data.tagged_files import TaggedExample

HELD_OUT = 0.1  # of the training data
SPLIT_SEED = 0  # not the run's seed: two seeds are evaluated on the same held-out examples
SPLIT_STREAM = 2  # of the random numbers of a fine-tuning run
UNEVEN = 5  # chance may add or take 1/UNEVEN of a quota


def split(
    examples: Sequence[Any],
    where: object,
    *,
    by_label: bool = False,
    named: Sequence[str | None] | None = None,
) -> tuple[list[Any], list[Any]]:
    """Training and held-out examples, each in the file's order; examples with the same input stay together.

    Groups with one input are held out in a random order, the same for every run, as long as they fit into a tenth
    of the examples; if none fits, the smallest is held out.

    Args:
        where: what error messages call the examples.
        by_label: whether to give each class its share on both sides; for texts with several labels, each set of
            labels counts as a class.
        named: for each example the group that stays together, too; None: it belongs to none.

    Raises:
        UserError: all examples have the same input, or are of one group.
    """
    keys: Sequence[Hashable] = [input_of(example) for example in examples]
    if named is not None:
        keys = _joined(keys, named)
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    if len(groups) < 2:
        of_one = "with the same input" if named is None else "that all belong together"
        what = "a single example" if len(examples) < 2 else f"{len(examples)} examples {of_one}"
        if isinstance(examples[0], TaggedExample):
            what += " (an empty line ends a sentence)"
        raise UserError(f"{where}: {what} cannot be split; give a dev file ({option('dev')})")
    order = np.random.Generator(np.random.Philox(key=fold(SPLIT_SEED, SPLIT_STREAM))).permutation(len(examples))
    in_order = [groups[key] for key in dict.fromkeys(keys[index] for index in order)]
    labels = [frozenset(labels_in(example)) if by_label else None for example in examples]
    chosen = _chosen([Counter(labels[index] for index in group) for group in in_order], Counter(labels))
    held_out = {index for place in chosen for index in in_order[place]} or {*min(in_order, key=len)}
    parts: tuple[list[Any], list[Any]] = [], []
    for index, example in enumerate(examples):
        parts[index in held_out].append(example)
    return parts


def _joined(inputs: Sequence[Hashable], named: Sequence[str | None]) -> list[Hashable]:
    """A key for each example, the same for two with one input or of one group, and for those joined by others."""
    above: dict[Hashable, Hashable] = {}

    def top(key: Hashable) -> Hashable:
        above.setdefault(key, key)
        while above[key] != key:
            above[key] = key = above[above[key]]
        return key

    for given, group in zip(inputs, named):
        if group is not None:
            above[top(given)] = top(("group", group))
    return [top(given) for given in inputs]


def _chosen(groups: Sequence[Counter[Hashable]], left: Counter[Hashable]) -> set[int]:
    """The indices of the groups to hold out, up to a tenth of the examples: in the given order, first those that
    keep every label within its range, then those that leave every label some examples, then any.

    Args:
        groups: the labels of each group.
        left: the labels of all examples; afterwards, of those left for training.
    """
    room = max(1, round(left.total() * HELD_OUT))
    quotas = label_quotas(groups, room)
    may_get = Counter({label: quota + quota // UNEVEN for label, quota in quotas.items()})
    must_get = Counter({label: quota - quota // UNEVEN for label, quota in quotas.items()})
    reserved, chosen = must_get.total(), set[int]()

    def keeps_range(group: Counter[Hashable]) -> bool:
        room_for_others = room - group.total() - (reserved - (group & must_get).total())
        return room_for_others >= 0 and all(number <= may_get[label] for label, number in group.items())

    def leaves_some(group: Counter[Hashable]) -> bool:
        return all(number < left[label] for label, number in group.items())

    for is_good in (keeps_range, leaves_some, lambda group: True):
        for place, group in enumerate(groups):
            if place in chosen or group.total() > room or not is_good(group):
                continue
            chosen.add(place)
            room -= group.total()
            reserved -= (paid := group & must_get).total()
            must_get.subtract(paid)
            may_get.subtract(group)
            left.subtract(group)
    return chosen


def label_quotas(groups: Sequence[Counter[Hashable]], count: int) -> Counter[Hashable]:
    """How many of `count` held-out examples each label gets.

    Args:
        groups: the labels of every group of examples that stays together.
    """
    total, spread, least = Counter[Hashable](), Counter[Hashable](), dict[Hashable, int]()
    for group in groups:
        total.update(group)
        spread.update(group.keys())
        least.update({label: min(number, least.get(label, number)) for label, number in group.items()})
    examples = total.total()
    shares = {label: count * number / examples for label, number in total.items()}
    # Largest labels first, ties in order of appearance: each gets one, then its whole share, then the remainder.
    several = [label for label, _ in total.most_common() if spread[label] > 1]
    whole = {label: max(1, int(shares[label])) for label in several}
    turns = (several, (label for label in several for _ in range(1, whole[label])),
             sorted(several, key=lambda label: whole[label] - shares[label]))  # fmt: skip
    quotas = Counter(itertools.islice(itertools.chain(*turns), count))
    for label in several:  # a group of copies larger than the quota is better than none, if not too large
        more = least[label] - quotas[label]
        if quotas[label] and more > 0 and 3 * least[label] <= total[label]:
            largest = max(total, key=quotas.__getitem__)
            if more < quotas[largest]:
                quotas[label] += more
                quotas[largest] -= more
    return quotas
