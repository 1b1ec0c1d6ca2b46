"""Two classes: the positive one, which f1, average_precision and a threshold are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from electra_core.errors import option


def check_two_classes(
    labels: Sequence[str], positive: str, threshold: float | None, shown: Callable[[str], str]
) -> str:
    """The name that a positive class has among the labels; "" if none is chosen.

    Args:
        labels: the classes; empty until they are known.
        positive: as the user gives it; "": none is chosen.
        threshold: least score of the positive class; None: there is none.
        shown: a label as written in a file -> its name among `labels`.

    Raises:
        ValueError: another name, a threshold that is no probability, or either with more than two classes.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"{option('threshold')}: expected a probability from 0 to 1, got {threshold!r}")
    if not labels:
        return positive
    for name, value in (("positive_class", positive or None), ("threshold", threshold)):
        if value is not None and len(labels) != 2:
            raise ValueError(f"{option(name)}: no effect with {len(labels)} classes, only with two")
    name = positive if not positive or positive in labels else shown(positive)
    if name and name not in labels:
        either = " or ".join(map(repr, labels))
        raise ValueError(f"{option('positive_class')}: expected {either}, got {positive!r}")
    return name
