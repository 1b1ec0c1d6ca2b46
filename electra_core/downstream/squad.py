"""Extractive question answering in the format and by the rules of SQuAD 1.1 and 2.0.

A context longer than the input is read in overlapping windows; a window that does not hold the whole answer
learns to point at its [CLS]. The score of a span is the log-probability of its first token plus that of its last,
among the window's context and [CLS], so that scores of several windows can be compared, as in the original; the
score of "no answer" is the same sum for [CLS]. "No answer" is chosen where it beats the best span by more than
`null_threshold`, which is tuned on the dev data. (The original adds a separate answerability classifier, for which
the Hub's layout has no place: docs/deviations.md.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from electra_core.downstream.classify import softmax
from electra_core.downstream.interface import Task
from electra_core.downstream.squad_metrics import best_threshold, exact_score, f1_score, span_scores, squad_metrics
from electra_core.labelled_data.features import Features, TaskBatch, Window, windows
from electra_core.labelled_data.labelled import BadRows
from electra_core.labelled_data.squad_files import QuestionExample, read_questions
from electra_core.marks import with_marks
from electra_core.tasks import QuestionAnswerer, span_loss
from electra_core.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer(Task):
    """Find the span of a context that answers a question, or say that there is none."""

    kind: ClassVar[str] = "qa"
    model_class: ClassVar = QuestionAnswerer

    labels: tuple[str, ...] = ()
    """Always empty: the two outputs are the first and the last token."""
    max_length: int = 512
    """Maximum number of tokens per window, question and special tokens included."""
    max_question: int = 64
    """Maximum number of tokens of the question."""
    stride: int = 128
    """Tokens from one window's start to the next's."""
    max_answer: int = 30
    """Maximum number of tokens in an answer."""
    n_best: int = 20
    """Number of candidate answers in a prediction."""
    unanswerable: bool = False
    """Whether "no answer" is possible; set if the training data hold such questions."""
    null_threshold: float = 0.0
    """"No answer" is chosen if its score exceeds the best span's by more than this."""
    metric: str = "f1"
    """The metric that chooses the best checkpoint."""

    figures = ("exact_match", "f1")

    def read(self, path: Path | str, bad: BadRows, *, labelled: bool = True) -> Iterator[QuestionExample]:
        """Questions of a file."""
        return read_questions(path, bad, labelled=labelled)

    def from_value(self, value: Any, name: str) -> QuestionExample:
        """(question, context), or {"question": ..., "context": ...}."""
        if isinstance(value, dict):
            value = (value.get("question"), value.get("context"))
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(t, str) for t in value):
            if not all(t.strip() for t in value):
                raise ValueError(f"inputs: expected a question and context, none empty, got {value!r:.80}")
            return QuestionExample(name, name, value[0], value[1])
        raise ValueError(f"inputs: expected a question and its context, got {value!r:.80}")

    def is_one(self, value: tuple[Any, ...]) -> bool:
        """Whether it is a question and its context."""
        return len(value) == 2 and all(isinstance(text, str) for text in value)

    def fitted(self, examples: Sequence[QuestionExample]) -> Answer:
        """The task, with "no answer" possible if the training data hold unanswerable questions."""
        return replace(self, unanswerable=self.unanswerable or any(e.answers == () for e in examples))

    def encode(
        self, examples: Sequence[QuestionExample], tokenizer: Tokenizer, *, training: bool = False
    ) -> Features:
        """`[CLS] question [SEP] window of the context [SEP]` for every window."""
        features = Features(tokenizer.cls_id, tokenizer.sep_id)
        questions = tokenizer.encode_batch([example.question for example in examples])
        context: str | None = None
        ids: list[int] = []
        offsets = np.zeros((0, 2), dtype=np.int32)
        for index, example in enumerate(examples):
            if example.context != context:  # questions on the same context are consecutive
                context = example.context
                ids, pairs = tokenizer.encode_with_offsets(context)
                offsets = np.array(with_marks(context, pairs), dtype=np.int32).reshape(-1, 2)
            question = questions[index][: min(self.max_question, self.max_length // 2)]
            features.truncated += len(question) < len(questions[index])
            base, size = len(question) + 2, self.max_length - len(question) - 3
            answer = _token_span(example, offsets)
            for window in windows(len(ids), size, min(self.stride, size)):
                target = None
                if answer is not None:
                    inside = window.start <= answer[0] and answer[1] < window.stop
                    shift = base - window.start
                    target = (answer[0] + shift, answer[1] + shift) if inside else (0, 0)
                place = None if training else _Place(base, window, offsets)
                features.add(index, question, ids[window.start : window.stop], target, place)
        return features

    def loss(self, logits_T2: Tensor, batch: TaskBatch) -> Tensor:
        """Cross-entropy of first and last token."""
        return span_loss(logits_T2, batch.targets, batch.tokens)

    def decode(
        self, examples: Sequence[QuestionExample], features: Features, outputs: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """For each question: answer ("" for none), start and end (characters), score, nbest; and with
        unanswerable questions null_difference (score of "no answer" minus the best span's)."""
        spans: list[list[tuple[float, int, int]]] = [[] for _ in examples]
        nulls = [np.inf] * len(examples)
        for owner, place, logits_T2 in zip(features.owners, features.places, outputs):
            logits_T2 = _log_probabilities(logits_T2.astype(np.float64), place.base)
            spans[owner] += self._best_spans(logits_T2, place)
            nulls[owner] = min(nulls[owner], float(logits_T2[0].sum()))
        return [self._prediction(*row) for row in zip(examples, spans, nulls)]

    def _best_spans(self, logits_T2: np.ndarray, place: _Place) -> list[tuple[float, int, int]]:
        """The window's `n_best` spans that start at a token it owns, as (score, first character, end)."""
        first_T, last_T = logits_T2[place.base : -1].T  # without the closing [SEP]
        if not len(first_T):  # a context of control characters has no tokens
            return []
        padded = np.concatenate([last_T, np.full(self.max_answer - 1, -np.inf)])
        scores = first_T[:, None] + np.lib.stride_tricks.sliding_window_view(padded, self.max_answer)
        window = place.window
        scores = scores[window.own_start - window.start : window.own_stop - window.start].ravel()
        count = min(self.n_best, len(scores))
        best = np.argpartition(-scores, count - 1)[:count] if count else np.zeros(0, dtype=int)
        found = []
        for flat in best[np.isfinite(scores[best])].tolist():
            start = window.own_start + flat // self.max_answer
            end = start + flat % self.max_answer
            first, behind = int(place.offsets[start, 0]), int(place.offsets[end, 1])
            if first < behind:  # a token may cover no character: SentencePiece's lone space mark
                found.append((float(scores[flat]), first, behind))
        return found

    def _prediction(
        self, example: QuestionExample, spans: list[tuple[float, int, int]], null: float
    ) -> dict[str, Any]:
        nbest: dict[str, dict[str, Any]] = {}  # the best span of each wording
        for score, start, end in sorted(spans, reverse=True):
            text = example.context[start:end]
            nbest.setdefault(text, {"text": text, "start": start, "end": end, "log_probability": score})
        best = list(nbest.values())[: self.n_best]
        logits = [candidate["log_probability"] for candidate in best] + ([null] if self.unanswerable else [])
        for candidate, probability in zip(best, softmax(np.array(logits)).tolist() if logits else []):
            candidate["score"] = probability
        top = best[0] if best else {"text": "", "start": 0, "end": 0, "score": 0.0}
        prediction: dict[str, Any] = {"id": example.id, "answer": top["text"]}
        prediction |= {"start": top["start"], "end": top["end"], "score": top["score"], "nbest": best}
        if not self.unanswerable:
            return prediction
        difference = null - best[0]["log_probability"] if best else 0.0
        prediction["null_difference"] = difference
        if not best or difference > self.null_threshold:
            prediction |= {"answer": "", "start": 0, "end": 0, "score": 1.0 - sum(c["score"] for c in best)}
        return prediction

    def score(
        self, examples: Sequence[QuestionExample], predictions: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        """exact_match and f1 in percent, by the official normalisation; with unanswerable questions also of
        both kinds of question, and best_exact and best_f1 with the thresholds that would have given them."""
        gold = [[text for text, _ in example.answers or ()] for example in examples]
        answers = [prediction["answer"] for prediction in predictions]
        figures = squad_metrics(gold, answers)
        if self.unanswerable:
            for name, function in (("best_exact", exact_score), ("best_f1", f1_score)):
                best, threshold = self._best_threshold(gold, predictions, function)
                figures |= {name: 100 * best / max(1, len(gold)), f"{name}_threshold": threshold}
        return figures

    def constant_guess(self, examples: Sequence[QuestionExample]) -> tuple[str, list[dict[str, Any]]]:
        """No answer."""
        return "no answer", [self._prediction(example, [], 0.0) for example in examples]

    def tuned(self, examples: Sequence[QuestionExample], predictions: Sequence[dict[str, Any]]) -> Answer:
        """The task with the null threshold that gives the best F1 on these (development) examples."""
        if not self.unanswerable:
            return self
        gold = [[text for text, _ in example.answers or ()] for example in examples]
        return replace(self, null_threshold=self._best_threshold(gold, predictions, f1_score)[1])

    def _best_threshold(
        self,
        gold: Sequence[Sequence[str]],
        predictions: Sequence[dict[str, Any]],
        score: Callable[[Sequence[str], str], float],
    ) -> tuple[float, float]:
        answers = [p["nbest"][0]["text"] if p["nbest"] else "" for p in predictions]
        differences = [p["null_difference"] for p in predictions]
        return best_threshold(span_scores(gold, answers, score), [not texts for texts in gold], differences)


@dataclass(frozen=True, slots=True)
class _Place:
    """Maps a sequence's logits to characters: where the context begins in it (`base`), which part of the context
    it holds, and the character range of each of the context's tokens."""

    base: int
    window: Window
    offsets: np.ndarray


def _log_probabilities(logits_T2: np.ndarray, base: int) -> np.ndarray:
    """[T, 2]: normalised over the allowed positions, [CLS] and the context (from `base` to the closing [SEP])."""
    candidates = np.concatenate([logits_T2[:1], logits_T2[base:-1]])
    return logits_T2 - np.logaddexp.reduce(candidates, axis=0)


def _token_span(example: QuestionExample, offsets: np.ndarray) -> tuple[int, int] | None:
    """First and last token of the first answer; (-1, -1), which is in no window, if there is none."""
    if example.answers is None:
        return None
    if not example.answers or not len(offsets):
        return -1, -1
    text, start = example.answers[0]
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], start + len(text), side="left")) - 1
    return (first, last) if first <= last else (-1, -1)
