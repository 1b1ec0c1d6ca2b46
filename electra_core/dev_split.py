"""Which labelled examples are held out where there is no dev file: the same for every run and every seed.

What has the same input stays on one side. Of classes, each gets about its share of what is held out:

    quota    the held-out part of its examples, one at least if there is room; none of a class whose examples all
             have one input, since it could not be learned then
    range    within a fifth of the quota. So the random order alone decides wherever it comes out about even, as it
             does of large classes; of the small ones, below five, the quota is exact, but for copies that are more
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from electra_kernels.rng import fold

from electra_core.data_warnings import input_of
from electra_core.errors import UserError
from electra_core.tagged_files import TaggedExample

HELD_OUT = 0.1  # of the training data
SPLIT_SEED = 0  # not the run's: figures of two seeds are of the same held-out examples
SPLIT_STREAM = 2  # of the random numbers of a fine-tuning run
UNEVEN = 5  # the part of a quota that chance may add or take


def split(examples: Sequence[Any], where: object, *, by_label: bool = False) -> tuple[list[Any], list[Any]]:
    """Training and held-out examples, each in the file's order; what has the same input stays together.

    Groups of one input are held out in a random order, the same for every run, as long as they fit into a tenth;
    if none does, the smallest one is.

    Args:
        where: what complaints call the examples.
        by_label: whether their labels are classes, of which each is to have its share on both sides.

    Raises:
        UserError: all have the same input.
    """
    inputs = [input_of(example) for example in examples]
    groups: dict[bytes, list[int]] = {}
    for index, key in enumerate(inputs):
        groups.setdefault(key, []).append(index)
    if len(groups) < 2:
        what = "a single example" if len(examples) < 2 else f"{len(examples)} examples that have one input"
        if isinstance(examples[0], TaggedExample):
            what += " (an empty line ends a sentence)"
        raise UserError(f"{where}: {what} cannot be split; give a dev file")
    order = np.random.Generator(np.random.Philox(key=fold(SPLIT_SEED, SPLIT_STREAM))).permutation(len(examples))
    in_order = [groups[key] for key in dict.fromkeys(inputs[index] for index in order)]
    count = max(1, round(len(examples) * HELD_OUT))
    labels = [example.label if by_label else None for example in examples]
    held_out = set(_chosen(in_order, labels, count))
    held_out = held_out or {*min(in_order, key=len)}
    parts: tuple[list[Any], list[Any]] = [], []
    for index, example in enumerate(examples):
        parts[index in held_out].append(example)
    return parts


def _chosen(groups: Sequence[Sequence[int]], labels: Sequence[Hashable], count: int) -> list[int]:
    """At most `count` indices, whole groups in their order: first those that keep every label within its range,
    then those that leave every label some examples, then any."""
    members = [Counter(labels[index] for index in group) for group in groups]
    quotas = label_quotas(members, count)
    most = {label: quota + quota // UNEVEN for label, quota in quotas.items()}
    missing = {label: quota - quota // UNEVEN for label, quota in quotas.items()}
    left = Counter(labels)
    held, chosen, taken = Counter[Hashable](), list[int](), set[int]()
    lacking = sum(missing.values())

    def take(place: int) -> None:
        taken.add(place)
        chosen.extend(groups[place])
        held.update(members[place])
        left.subtract(members[place])

    for place, (group, inside) in enumerate(zip(groups, members)):
        helps = sum(max(0, min(number, missing[label] - held[label])) for label, number in inside.items())
        is_even = all(held[label] + number <= most[label] for label, number in inside.items())
        if is_even and len(chosen) + len(group) + lacking - helps <= count:
            lacking -= helps
            take(place)
    for leaves_some in (True, False):
        for place, (group, inside) in enumerate(zip(groups, members)):
            if len(chosen) == count:
                return chosen
            fits = place not in taken and len(chosen) + len(group) <= count
            if fits and not (leaves_some and any(left[label] <= number for label, number in inside.items())):
                take(place)
    return chosen


def label_quotas(members: Sequence[Counter[Hashable]], count: int) -> dict[Hashable, int]:
    """How many of `count` held-out examples each label gets.

    Args:
        members: the labels of every group of examples that stays together.
    """
    total, groups, least = Counter[Hashable](), Counter[Hashable](), dict[Hashable, int]()
    for inside in members:
        total.update(inside)
        groups.update(inside.keys())
        least.update({label: min(number, least.get(label, number)) for label, number in inside.items()})
    shares = {label: count * number / total.total() for label, number in total.items()}
    quotas = dict.fromkeys(total, 0)
    room = count
    # The largest first, of equals those that come first: everyone gets one, then what its share is, then the rest.
    for label in (several := [label for label, _ in total.most_common() if groups[label] > 1]):
        quotas[label] = min(1, room)
        room -= quotas[label]
    for label in several:
        more = min(room, max(0, int(shares[label]) - quotas[label]))
        quotas[label] += more
        room -= more
    for label in sorted(several, key=lambda label: quotas[label] - shares[label])[:room]:
        quotas[label] += 1
    for label in several:  # copies that are more than the quota are better than none, if not too many
        more, largest = least[label] - quotas[label], max(quotas, key=quotas.__getitem__)
        if quotas[label] and 0 < more < quotas[largest] and 3 * least[label] <= total[label]:
            quotas[label] += more
            quotas[largest] -= more
    return quotas
