"""One-line notes for the user on what labelled data hold and what is odd about them: dev data that repeat training
data, a header read as an example, labels that are not classes, tags in none of the usual notations. Problems of a
single row are reported by `BadRows`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from electra_core.downstream.choices import ChoiceExample
from electra_core.downstream.classify import Classify
from electra_core.downstream.interface import Task
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.tagging import Tag, marks_spans, spans, tag_counts
from electra_core.errors import listed, option
from electra_core.labelled_data.columns import LABEL_NAMES, TEXT_NAMES, Columns, Found, may_be_header
from electra_core.labelled_data.label_cells import look_of
from electra_core.labelled_data.labelled import MultiLabelExample, TextExample, label_counts, labels_in
from electra_core.labelled_data.squad_files import QuestionExample
from electra_core.labelled_data.tagged_files import TaggedExample, from_text
from electra_core.runs.notices import Lost

MANY_COPIES = 0.1
"""Copies are reported above this share of the dev data. CoNLL-2003 has 6%, without a mistake."""
MANY_CUT = 0.1
"""Truncated examples are a warning above this share of all."""
MANY_WITHIN = 0.1
"""Spans that are parts of words are reported above this share of all."""
MANY_LABELS = 10
"""From this many on, labels may be something other than classes; a tiny data set may well have fewer."""
SHOWN_LABELS = 5
"""Number of labels whose counts are shown."""
FEW = 5
"""A label with fewer examples is rare."""
LONGEST_LABEL = 40
"""Number of characters shown of a label."""
WORDS_FOR_NONE = frozenset({"n/a", "na", "#n/a", "<na>", "none", "null", "nil", "missing"})
"""What programs write for a missing value, in lower case. ("nan" is read as missing.)"""
SEPARATORS = (",", ";", "|", "/", "\t")
"""What may separate the labels in a cell. (Not spaces, which also occur inside labels.)"""
MUCH_HEAVIER = 50
"""Ratio of class weights above which the user is warned."""


def warnings_about(
    task: Task,
    path: str | Path,
    read: Sequence[Any],
    train: Sequence[Any],
    dev: Sequence[Any],
    *,
    held_out: bool,
    weighted: bool,
) -> list[str]:
    """All that is odd about the data of a training.

    Args:
        task: fitted to them.
        path: the training file.
        read: its examples: those trained on and, if they are `held_out`, the dev examples.
        weighted: whether classes have weights for their frequency.
    """
    has_classes = isinstance(task, Classify | MultiLabel)
    # Labels that are no classes also explain why the dev data lack some.
    explanations = list(filter(None, _no_classes(task, path, read)))
    found: list[str | None] = [*explanations, *_odd_labels(task, path, read)]
    if not held_out:
        found.append(copies(train, dev))
    if isinstance(task, Classify) and weighted:
        found.append(uneven_weights(task.labels, task.class_weights, label_counts(train)))
    if has_classes and not explanations:
        found += unseen_labels(task.labels, train, dev, held_out=held_out)
    return [warning for warning in found if warning]


def _no_classes(task: Task, path: str | Path, examples: Sequence[Any]) -> Iterator[str | None]:
    """Warnings that labels may not be classes."""
    if not isinstance(task, Classify | MultiLabel) or task.columns.labels:
        return
    if isinstance(task, MultiLabel):
        yield labels_uncut(path, examples)
    yield header_as_example(path, examples, task.columns)
    yield labels_of_one(path, examples)


def _odd_labels(task: Task, path: str | Path, examples: Sequence[Any]) -> Iterator[str | None]:
    """Warnings about anything else that is odd in the training data."""
    if isinstance(task, Classify | MultiLabel):
        yield different_labels(path, examples)
        if not task.columns.labels:
            if isinstance(task, Classify):
                yield labels_of_several(path, task.labels)
            yield labels_alike(path, label_counts(examples))
            yield labels_of_none(path, examples)
    elif isinstance(task, Tag):
        yield unmarked_spans(path, examples, task.labels)
        yield spans_within_words(path, examples)
        yield labels_alike(path, tag_counts(examples))


def rows_and_columns(
    path: str | Path, examples: Sequence[TextExample], asked: Columns, found: Found | None, *, classes: bool
) -> str:
    """What was read: how many rows, which columns, which labels; and if the columns were not named, which others
    might have been meant.

    Args:
        asked: the columns as the user has them.
        found: the columns that were read; None for a folder.
        classes: whether the labels are classes; otherwise numbers.
    """
    labels = _classes(examples) if classes else _range(examples)
    rows = f"{path}: {len(examples):,} row{'s' if len(examples) > 1 else ''}"
    if found is None:
        return f"{rows}, labels by folder ({labels})"
    texts = f"text {found.text!r}" if found.pair is None else f"texts {found.text!r} and {found.pair!r}"
    what = "labels by column" if found.labels else f"label {found.label!r}"
    line = f"{rows}, {texts}, {what} ({labels})"
    named = found.labels or asked.label
    for role, given, usual in (("label", named, LABEL_NAMES), ("text", asked.text, TEXT_NAMES)):
        if given is None and (others := found.passed_over(usual)):
            called = f"column{'s' if len(others) > 1 else ''} {', '.join(map(repr, others))}"
            line += f"; not used as the {role}: {called} (name it with --{role}-column)"
    return line


def _classes(examples: Sequence[TextExample]) -> str:
    """Counts of the commonest labels and, if not all are shown, of the rarest, which may be misspelt."""
    commonest = label_counts(examples).most_common()
    shown, others = commonest[:SHOWN_LABELS], commonest[SHOWN_LABELS:]
    line = _counted(shown)
    if others:
        line += f", and {len(others):,} others"
        rare = [(label, count) for label, count in reversed(others) if count < FEW <= shown[-1][1]]
        if rare:
            more = ", ..." if len(rare) > SHOWN_LABELS else ""
            line += f", {len(rare):,} with fewer than {FEW}: {_counted(rare[:SHOWN_LABELS])}{more}"
    without = sum(not labels_in(example) for example in examples)
    return f"{line}{'; ' * bool(line)}{without:,} without a label" if without else line


def _counted(counts: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{' '.join(label.split())[:LONGEST_LABEL]} {count:,}" for label, count in counts)


def _range(examples: Sequence[TextExample]) -> str:
    numbers = [float(example.label) for example in examples if example.label is not None]
    return f"{min(numbers):g} to {max(numbers):g}"


def input_of(example: Any) -> bytes:
    """A digest of an example's input, equal for examples that must not be in both training and dev data: of the
    text, the pair, the words, the text with its endings, or a question's context. Case and white space are
    ignored, since most vocabularies ignore them.

    Returns:
        16 bytes; keeping whole texts would double the memory.
    """
    if isinstance(example, QuestionExample):
        texts: Sequence[str | None] = (example.context,)
    elif isinstance(example, TaggedExample):
        texts = example.words
    elif isinstance(example, ChoiceExample):
        texts = (example.text, *example.choices)
    else:
        texts = (example.text, example.pair)
    alike = "\0".join(" ".join(text.casefold().split()) for text in texts if text is not None)
    return hashlib.blake2b(alike.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def copies(train: Sequence[Any], dev: Sequence[Any]) -> str | None:
    """Says how many of the dev data's inputs are also in the training data, if there are many."""
    known = {input_of(example) for example in train}
    count = sum(input_of(example) in known for example in dev)
    if count <= MANY_COPIES * len(dev):
        return None
    return f"{count:,} of the {len(dev):,} dev {_name_of_inputs(dev[0])} are also in the training data"


def _name_of_inputs(example: Any) -> str:
    """The plural that names such inputs in a message."""
    if isinstance(example, QuestionExample):
        return "questions' contexts"
    if isinstance(example, TaggedExample):
        return "sentences"
    return "pairs" if isinstance(example, TextExample) and example.pair is not None else "texts"


def header_as_example(path: str | Path, examples: Sequence[Any], columns: Columns) -> str | None:
    """Says that a CSV's or TSV's first line looks like a header read as an example: the user did not say whether
    there is one, its class has no other example, and some class has several.

    Args:
        examples: examples with classes, as read from `path`.
    """
    first = examples[0]
    if not may_be_header(Path(path), first.line, columns):
        return None
    counts = label_counts(examples)
    own = labels_in(first)
    if not own or any(counts[label] > 1 for label in own) or max(counts.values()) == 1:
        return None
    return (
        f"{path}:1: read as an example, but looks like a header: no other example has the label {own[0]!r} "
        "(--header skips it, --no-header keeps it)"
    )


def labels_of_one(path: str | Path, examples: Sequence[TextExample]) -> str | None:
    """Says that most of many labels occur only once: they may be numbers, or the wrong column."""
    counts = label_counts(examples)
    alone = sum(count == 1 for count in counts.values())
    if len(counts) < MANY_LABELS or alone <= len(counts) / 2:
        return None
    return (
        f"{path}: {alone:,} of the {len(counts):,} labels have only one example each; is this the right column? "
        f"(--label-column names another, {_instead(examples[0])})"
    )


def _instead(example: TextExample) -> str:
    """What to try if labels occur once each."""
    if isinstance(example, MultiLabelExample):
        return "--label-separator sets what separates the labels in a cell"
    return "--task regress learns numbers, --task multilabel reads several labels per cell"


def labels_uncut(path: str | Path, examples: Sequence[MultiLabelExample]) -> str | None:
    """Says that no text has more than one label, though labels contain what may be a separator."""
    if any(len(labels_in(example)) > 1 for example in examples):
        return None
    labels = {label for example in examples for label in labels_in(example)}
    held = {mark: sum(mark in label for label in labels) for mark in SEPARATORS}
    mark = max(held, key=held.__getitem__)
    if not held[mark]:
        return None
    holds = f"{held[mark]:,} of the {len(labels):,} labels contain {mark!r}"
    return f"{path}: no text has more than one label, but {holds}; is it a separator? (--label-separator {mark!r})"


def labels_of_several(path: str | Path, labels: Sequence[str]) -> str | None:
    """Says that a class's name is made of other classes' names, like a cell with several labels."""
    known = {*labels}
    for label in labels:
        for mark in SEPARATORS:
            parts = [part.strip() for part in label.split(mark)]
            if len(parts) > 1 and {*parts} <= known:
                return (
                    f"{path}: the label {label!r} combines other labels, but is learned as a class of its own "
                    "(for several labels per text: --task multilabel)"
                )
    return None


def labels_of_none(path: str | Path, examples: Sequence[TextExample]) -> str | None:
    """Says that a label is a word for a missing value."""
    every = (label for example in examples for label in labels_in(example))
    counts = Counter(label for label in every if label.casefold() in WORDS_FOR_NONE)
    if not counts:
        return None
    labels = " or ".join(repr(label) for label, _ in counts.most_common())
    have = "examples have" if counts.total() > 1 else "example has"
    if isinstance(examples[0], MultiLabelExample):
        told = "learned as a label; if it means no label, leave the cell empty"
    else:
        told = "learned as a class; if it means a missing label, leave the cell empty and use --skip-bad-rows"
    return f"{path}: {counts.total():,} {have} the label {labels}, {told}"


def labels_alike(path: str | Path, counts: Mapping[str, int]) -> str | None:
    """Says which labels differ only in case, white space or a number's form, and so may be slips.

    Args:
        counts: how often every label occurs.
    """
    groups: dict[str, list[str]] = {}
    for label in counts:
        groups.setdefault(look_of(label), []).append(label)
    alike = [group for group in groups.values() if len(group) > 1]
    if not alike:
        return None
    shown = [" / ".join(f"{label!r} ({counts[label]:,})" for label in group) for group in alike[:SHOWN_LABELS]]
    if len(alike) > SHOWN_LABELS:
        shown.append(f"and {len(alike) - SHOWN_LABELS:,} others")
    question = "should they be one" if len(alike) == 1 else "should each group be one"
    return (
        f"{path}: labels that differ only in case, white space or a number's form are separate classes: "
        f"{', '.join(shown)}; {question}?"
    )


def different_labels(path: str | Path, examples: Sequence[TextExample]) -> str | None:
    """Says how many texts occur with different labels, and where the first of them does."""
    first: dict[bytes, TextExample] = {}
    differing: dict[bytes, TextExample] = {}
    for example in examples:
        key = input_of(example)
        if {*labels_in(first.setdefault(key, example))} != {*labels_in(example)}:
            differing.setdefault(key, example)
    if not differing:
        return None
    key, other = next(iter(differing.items()))
    places = " and ".join(f"{one.place} ({_labels_of(one)})" for one in (first[key], other))
    lines = "" if isinstance(other.place, str) else "lines "
    what = _name_of_inputs(other)
    what, verb = (what[:-1], "occurs") if len(differing) == 1 else (what, "occur")
    return f"{path}: {len(differing):,} {what} {verb} with different labels; first: {lines}{places}"


def _labels_of(example: TextExample) -> str:
    return ", ".join(map(repr, labels_in(example))) or "no label"


def unseen_labels(
    labels: Sequence[str], train: Sequence[TextExample], dev: Sequence[TextExample], *, held_out: bool
) -> Iterator[str]:
    """Says which labels cannot be learned, and which cannot be evaluated, because no example has them.

    Args:
        held_out: whether the dev examples were split off the training file.
    """
    counts = label_counts(train)
    judged = {label for example in dev for label in labels_in(example)}
    if missing := [label for label in labels if label not in counts]:
        yield f"no training example has {_label_s(missing)} (cannot be learned)"
    if missing := [label for label in labels if label not in judged]:
        alone = sum(counts[label] == 1 for label in missing) if held_out else 0
        who = "each has" if alone == len(missing) else f"{alone:,} of them have"
        why = f"; {who} a single example, which stays in training" if alone else ""
        if alone and len(missing) == 1:
            why = "; its single example stays in training"
        yield f"no dev example has {_label_s(missing)} (cannot be evaluated{why})"


def _label_s(labels: Sequence[str]) -> str:
    return f"the label{'s' if len(labels) > 1 else ''} {listed([*map(repr, labels)], SHOWN_LABELS)}"


def uneven_weights(labels: Sequence[str], weights: Sequence[float], counts: Mapping[str, int]) -> str | None:
    """Says that an example of the rarest class weighs far more than one of the commonest.

    Args:
        weights: class weights.
        counts: training examples per class; a class without any is ignored.
    """
    present = sorted((weight, label) for label, weight in zip(labels, weights) if counts[label])
    (least, common), (most, rare) = present[0], present[-1]
    if most <= MUCH_HEAVIER * least:
        return None
    return (
        f"{option('class_weights')}: an example of {rare!r} ({counts[rare]:,}) weighs {most / least:,.0f} times "
        f"as much as one of {common!r} ({counts[common]:,}); leave out very rare classes, or the weights"
    )


def unmarked_spans(path: str | Path, examples: Sequence[TaggedExample], labels: Sequence[str]) -> str | None:
    """Says that tags are scored word by word although most are O or 0, which suggests that the rest mark spans."""
    counts = tag_counts(examples)
    if marks_spans(labels) or len(counts) < 2:
        return None
    (most, _), (other, _) = counts.most_common(2)
    if most.upper() not in ("O", "0"):
        return None
    return (
        f"{path}: tags like {other!r} mark no spans (expected O, B-X, I-X, ... or B, I, O), so every word is "
        "scored by itself"
    )


def spans_within_words(path: str | Path, examples: Sequence[TaggedExample]) -> str | None:
    """Says that many spans begin or end within a word of the raw text: no prediction can be such a span."""
    count, within = 0, []
    for example in examples:
        if example.text is None or example.tags is None or not marks_spans(example.tags):
            continue
        words = from_text(example.text).offsets
        borders = {place for word in words for place in word}
        for _, first, last in spans(example.tags):
            count += 1
            start, end = example.offsets[first][0], example.offsets[last - 1][1]
            if not borders >= {start, end}:
                whole = " ".join(example.text[a:b] for a, b in words if a < end and start < b)
                within.append((example.text[start:end], whole))
    if len(within) <= MANY_WITHIN * count:
        return None
    span, word = within[0]
    return (
        f"{path}: {len(within):,} of the {count:,} spans begin or end within a word ({span!r} of {word!r}); "
        "prediction cuts a text only between words, so it cannot find them; give lists of words that end there"
    )


def many_cut(cut: int, examples: int, length: int, *, may_be_longer: bool) -> str:
    """Says how many examples were truncated; as a warning with a remedy, if they are many and there is one."""
    line = f"{cut} of {examples} examples are longer than {length} tokens"
    if cut <= MANY_CUT * examples or not may_be_longer:
        return Lost(f"{line} and were truncated")
    return f"warning: {line} and were truncated; {option('max_length')} reads more of each"
