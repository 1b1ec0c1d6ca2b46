"""Tagging: a tag for every word (named entities, chunks, parts of speech).

Tags that mark spans come in several notations; everything here works in IOB2:

    words   U.N.   official  Ekeus   heads for  Baghdad
    IOB1    I-ORG  O         I-PER   O     O    I-LOC     B- only between neighbours of one type (CoNLL-2003)
    IOB2    B-ORG  O         B-PER   O     O    B-LOC     every span begins with B-
    IOBES   S-ORG  O         S-PER   O     O    S-LOC     E- ends a span, S- is a span of one word (also L-, U-)

In all of them the marks may be in lower case, and M- may replace I-; B_PER, PER-B and PER_B are read as B-PER.
If all spans have the same type, the marks may stand alone (B, I, O); since a single letter may also be a part of
speech, only all tags of a file together decide.

A word's tag is predicted at its first sub-token. Sentences longer than the model's input are read in overlapping
windows, and each word is judged where it has the most context.

If the places of spans in a text are given, its words end at them for training. For evaluation the text is split as
it will be in prediction, and spans are compared by their characters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from electra_core.downstream.classify import softmax
from electra_core.downstream.interface import Task
from electra_core.errors import UserError
from electra_core.labelled_data.columns import Columns, first_cell
from electra_core.labelled_data.features import Features, TaskBatch, windows
from electra_core.labelled_data.label_cells import labels_as_texts
from electra_core.labelled_data.labelled import BadRows
from electra_core.labelled_data.tagged_files import WORD_LISTS, TaggedExample, from_text, read_tagged
from electra_core.labelled_data.tagged_rows import cut_at, tags_at
from electra_core.metrics import OF_SPANS, classification_metrics, of_classes, span_metrics
from electra_core.tasks import UNLABELLED, TokenClassifier, tagging_loss
from electra_core.tokenizer import Tokenizer

SPAN_TAG = re.compile(r"O|[BIMELSU]-.+", re.IGNORECASE)
MARKS = frozenset("OBIMELSU")
BEGINS = re.compile(r"B[-_].+")
SPELLINGS = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (r"(?P<mark>[BIMELSU])[-_](?P<kind>.+)", r"(?P<kind>.+)[-_](?P<mark>[BIMELSU])")
)


def marks_spans(tags: Collection[str]) -> bool:
    """Whether a file's tags mark spans (O, B-X, I-X, ...), and are not, say, parts of speech."""
    typed = any(tag.upper() != "O" for tag in tags) and all(SPAN_TAG.fullmatch(tag) for tag in tags)
    return typed or are_marks_alone(tags)


def with_marks_first(tags: Collection[str]) -> dict[str, str]:
    """Tag -> B-X, if all tags except O have the form B-X or B_X, or all have the form X-B or X_B; otherwise {}."""
    for form in SPELLINGS:
        found = {tag: form.fullmatch(tag) for tag in tags if tag.upper() != "O"}
        if all(found.values()):
            return {tag: f"{match['mark']}-{match['kind']}" for tag, match in found.items() if match}
    return {}


def _spelled(tags: Collection[str]) -> dict[str, str]:
    """`with_marks_first` of a file's tags, if they surely mark spans: there is an O, and a B or an I."""
    spelled = with_marks_first(tags)
    sure = any(tag.upper() == "O" for tag in tags) and any(tag[0] in "BbIi" for tag in spelled.values())
    return spelled if sure else {}


def are_marks_alone(tags: Collection[str]) -> bool:
    """Whether a file's tags mark spans without types: O, and B or I, and perhaps E, S, ..."""
    marks = {tag.upper() for tag in tags}
    return marks <= MARKS and "O" in marks and not marks.isdisjoint("BI")


def as_iob(labels: Sequence[str]) -> tuple[str, ...]:
    """A model's labels as the tags of a file are read (PER-B and b-PER as B-PER, o as O); unchanged if they mark
    no spans, or would no longer differ."""
    spelled = _spelled({*labels})
    tags = [spelled.get(label, label) for label in labels]
    tags = [tag[0].upper() + tag[1:] for tag in tags] if marks_spans(tags) else []
    return tuple(tags) if len({*tags}) == len(labels) else tuple(labels)


def kind_of(tag: str) -> str | None:
    """The span type of a tag, "" for a mark alone; None for O, and for tags that mark no span."""
    marks = tag in MARKS or SPAN_TAG.fullmatch(tag)
    return tag[2:] if marks and tag != "O" else None


def with_kind(tag: str, kind: str | None) -> str:
    """A span's tag with another type; O stays as it is."""
    return tag if tag == "O" else _tag(tag[0], kind or "")


def to_iob2(tags: Sequence[str]) -> list[str]:
    """IOB1, IOB2 or IOBES tags of one sentence -> IOB2."""
    result: list[str] = []
    open_kind: str | None = None
    for tag in tags:
        mark, kind = tag[0].upper(), tag[2:]
        goes_on = mark in "IMEL" and kind == open_kind
        result.append("O" if mark == "O" else _tag("I" if goes_on else "B", kind))
        open_kind = kind if mark in "BIM" else None
    return result


def _tag(mark: str, kind: str) -> str:
    return f"{mark}-{kind}" if kind else mark


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, word after the last) of every span in any notation; the type of a mark alone is ""."""
    found: list[tuple[str, int, int]] = []
    for index, tag in enumerate(to_iob2(tags)):
        if tag[0] == "B":
            found.append((tag[2:], index, index + 1))
        elif tag[0] == "I":
            kind, start, _ = found[-1]
            found[-1] = (kind, start, index + 1)
    return found


def tag_counts(examples: Iterable[TaggedExample]) -> Counter[str]:
    """How many words have each tag."""
    return Counter(tag for example in examples for tag in example.tags or ())


@dataclass(frozen=True)
class Tag(Task):
    """A tag for each word of a sentence."""

    kind: ClassVar[str] = "tag"
    model_class: ClassVar = TokenClassifier

    labels: tuple[str, ...] = ()
    """Tags in the order of the model's outputs, spans in IOB2; learned from the training data if empty."""
    columns: Columns = field(default_factory=Columns)
    """`columns.text` and `columns.label`: the columns or lists that hold the words and the tags."""
    max_length: int = 256
    """Maximum number of tokens per window, [CLS] and [SEP] included."""
    metric: str = "f1"
    """The metric that chooses the best checkpoint."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", labels_as_texts(self.labels))

    @property
    def figures(self) -> tuple[str, ...]:
        """See `Task`."""
        return OF_SPANS if marks_spans(self.labels) else of_classes(self.labels)

    @property
    def positive(self) -> str:
        """See `Task`; of spans, f1 is of all of them, even where there are two tags."""
        return self.labels[1] if len(self.labels) == 2 and not marks_spans(self.labels) else ""

    def read(self, path: Path | str, bad: BadRows, *, labelled: bool = True) -> Iterator[TaggedExample]:
        """Sentences of a file, with span tags converted to IOB2; a tag unseen in training makes a bad row."""
        examples: Iterable[TaggedExample] = read_tagged(path, self.columns, bad, labelled=labelled)
        known: Iterable[str] = self.labels
        if labelled and not known:
            examples = list(examples)
            known = tag_counts(examples)
        in_marks, spelled = are_marks_alone(set(known)), _spelled(set(known))
        for example in examples:
            tags = example.tags or ()
            if spelled:  # by this file, or by the training file
                as_usual = with_marks_first(tags) if self.labels else spelled
                tags = tuple(as_usual.get(tag, tag) for tag in tags)
            marks = all(tag.upper() in MARKS for tag in tags) if in_marks else all(map(SPAN_TAG.fullmatch, tags))
            if tags and marks:
                tags = tuple(to_iob2(tags))
                example = replace(example, tags=tags)
            unknown = [tag for tag in tags if self.labels and tag not in self.labels]
            if unknown:
                bad.add(example.line, f"a tag is not in the training data ({unknown[0]!r})")
            else:
                yield example

    def from_value(self, value: Any, name: str) -> TaggedExample:
        """A text, or a list of its words; or {"text": ...}, {"tokens": [...]} or {"words": [...]}."""
        if isinstance(value, dict):
            value = first_cell(value, ("text", *WORD_LISTS))
        if isinstance(value, str):
            return from_text(value, name)
        if isinstance(value, (list, tuple)) and value and all(isinstance(word, str) for word in value):
            return TaggedExample(name, 0, tuple(value))
        raise ValueError(f"inputs: expected a text or a list of words, got {value!r:.80}")

    def fitted(self, examples: Sequence[TaggedExample]) -> Tag:
        """The task with the tags of its training examples; where they mark no spans, f1 gives way to accuracy."""
        task = self if self.labels else replace(self, labels=_labels_of(examples))
        if marks_spans(task.labels) or task.metric != "f1":
            return task
        return replace(task, metric="accuracy")

    def encode(
        self, examples: Sequence[TaggedExample], tokenizer: Tokenizer, *, training: bool = False
    ) -> Features:
        """Sub-tokens of all words, with targets at first sub-tokens; long sentences in overlapping windows."""
        features = Features(tokenizer.cls_id, tokenizer.sep_id, per_token=True)
        index_of = {tag: index for index, tag in enumerate(self.labels)}
        examples = examples if training else [as_to_predict(example) for example in examples]
        pieces = tokenizer.encode_each(word for example in examples for word in example.words)
        for index, example in enumerate(examples):
            ids: list[int] = []
            targets: list[int] = []
            for place in range(len(example.words)):
                word_ids = next(pieces) or [tokenizer.unk_id]  # a word of control characters has no tokens
                tag = index_of.get(example.tags[place], 0) if example.tags else 0  # unknown only in prediction
                targets += [tag] + [UNLABELLED] * (len(word_ids) - 1)
                ids += word_ids
            size = self.max_length - 2
            for window in windows(len(ids), size, max(1, size * 3 // 4)):
                own = [
                    target if window.own_start <= place < window.own_stop else UNLABELLED
                    for place, target in enumerate(targets[window.start : window.stop], window.start)
                ]
                padded = np.array([UNLABELLED, *own, UNLABELLED], dtype=np.int64)
                features.add(index, ids[window.start : window.stop], None, padded)
        return features

    def loss(self, logits_TC: Tensor, batch: TaskBatch) -> Tensor:
        """Cross-entropy at the words' first sub-tokens."""
        return tagging_loss(logits_TC, batch.targets)

    def weight(self, batch: TaskBatch) -> float:
        """The number of words judged in the batch; it may be 0, if other windows own all of its words."""
        return float((batch.targets != UNLABELLED).sum())

    def decode(
        self, examples: Sequence[TaggedExample], features: Features, outputs: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """For each sentence: tags (one per word, spans in IOB2), spans with character offsets."""
        examples = [as_to_predict(example) for example in examples]
        words: list[list[np.ndarray]] = [[] for _ in examples]
        for owner, marks, logits_TC in zip(features.owners, features.targets, outputs):
            words[owner].append(softmax(logits_TC[marks != UNLABELLED]))
        predictions = []
        for example, parts in zip(examples, words):
            probabilities_WC = np.concatenate(parts)
            tags = [self.labels[index] for index in probabilities_WC.argmax(axis=1)]
            predictions.append(self._prediction(example, tags, probabilities_WC.max(axis=1)))
        return predictions

    def _prediction(self, example: TaggedExample, tags: list[str], sure_W: np.ndarray) -> dict[str, Any]:
        """The prediction from its W words' tags and their probabilities."""
        if not marks_spans(self.labels):
            return {"words": list(example.words), "tags": tags}
        tags = to_iob2(tags)
        text = example.text if example.text is not None else " ".join(example.words)
        places = example.offsets or _joined_offsets(example.words)
        found = [
            {
                "type": kind,
                "start": places[first][0],
                "end": places[last - 1][1],
                "text": text[places[first][0] : places[last - 1][1]],
                "score": float(sure_W[first:last].mean()),
            }
            for kind, first, last in spans(tags)
        ]
        return {"text": text, "spans": found, "words": list(example.words), "tags": tags}

    def score(self, examples: Sequence[TaggedExample], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """precision, recall, f1 of spans and accuracy per word; for other tags accuracy and macro_f1."""
        judged = [side_by_side(example, prediction) for example, prediction in zip(examples, predictions)]
        truth, predicted = [tags for _, tags, _ in judged], [tags for _, _, tags in judged]
        if marks_spans(self.labels):
            return span_metrics(truth, predicted)[0]
        index_of = {tag: index for index, tag in enumerate(self.labels)}
        flat = [index_of[tag] for tags in truth for tag in tags]
        return classification_metrics(flat, [index_of[t] for tags in predicted for t in tags], len(self.labels))

    def constant_guess(self, examples: Sequence[TaggedExample]) -> tuple[str, list[dict[str, Any]]]:
        """The tag O; the most frequent one where tags mark no spans."""
        what, tag = "the tag O", "O"
        if not marks_spans(self.labels):
            what, tag = "the most frequent tag", tag_counts(examples).most_common(1)[0][0]
        examples = [as_to_predict(example) for example in examples]
        return what, [self._prediction(e, [tag] * len(e.words), np.ones(len(e.words))) for e in examples]


def as_to_predict(example: TaggedExample) -> TaggedExample:
    """The example without the spans of its text, which is split as in prediction; others unchanged."""
    if example.text is None or example.tags is None:
        return example
    return from_text(example.text, example.id, example.line)


def side_by_side(
    example: TaggedExample, prediction: dict[str, Any]
) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """Words, their true tags and the predicted ones, aligned.

    In a text with spans the predicted words may differ: the text is split at the spans of both sides, so that
    spans are equal if their characters are.
    """
    if example.text is None or "spans" not in prediction:
        return example.words, example.tags or (), prediction["tags"]
    places = example.offsets
    right = [(places[a][0], places[b - 1][1], kind) for kind, a, b in spans(example.tags or ())]
    found = [(span["start"], span["end"], span["type"]) for span in prediction["spans"]]
    places = tuple(cut_at(example.text, (*right, *found)))
    return [example.text[a:b] for a, b in places], tags_at(places, right), tags_at(places, found)


def _labels_of(examples: Sequence[TaggedExample]) -> tuple[str, ...]:
    """The labels for the examples' tags; every span type gets both B- and I-."""
    tags = {*tag_counts(examples)}
    if len(tags) < 2:
        raise UserError(f"every training word has the tag {min(tags)!r}; there is nothing to learn")
    if marks_spans(tags):
        kinds = sorted({tag[2:] for tag in tags if tag != "O"})
        return ("O", *(_tag(mark, kind) for kind in kinds for mark in "BI"))
    if "O" in tags and any(map(BEGINS.fullmatch, tags)):
        raise UserError(_odd_tag(examples))
    return tuple(sorted(tags))


def _odd_tag(examples: Sequence[TaggedExample]) -> str:
    """Names the first tag that marks no span though others do: most likely a header or a slip."""
    tags = ((example.line, tag) for example in examples for tag in example.tags or ())
    line, odd = next((line, tag) for line, tag in tags if not SPAN_TAG.fullmatch(tag))
    return f"the sentence in line {line} has the tag {odd!r}, expected O, B-X or I-X, as in others"


def _joined_offsets(words: Sequence[str]) -> list[tuple[int, int]]:
    """Places of the words in " ".join(words)."""
    places, start = [], 0
    for word in words:
        places.append((start, start + len(word)))
        start += len(word) + 1
    return places
