"""Exact match and F1 by the rules of SQuAD's official evaluation (Rajpurkar et al. 2016 and 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np


def normalise(text: str) -> str:
    """SQuAD's normalisation of answers: lower case; no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_score(gold: Sequence[str], answer: str) -> float:
    """1 if the answer equals one of the gold answers after normalisation ("" if there are none), else 0."""
    return float(any(normalise(text) == normalise(answer) for text in gold or [""]))


def f1_score(gold: Sequence[str], answer: str) -> float:
    """The best F1 of word overlap with any gold answer; 1 for "no answer" where there are none."""
    return max(_word_f1(normalise(text).split(), normalise(answer).split()) for text in gold or [""])


def _word_f1(wanted: list[str], got: list[str]) -> float:
    if not wanted or not got:
        return float(wanted == got)
    common = (Counter(wanted) & Counter(got)).total()
    if not common:
        return 0.0
    precision, recall = common / len(got), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def squad_metrics(gold: Sequence[Sequence[str]], answers: Sequence[str]) -> dict[str, float]:
    """exact_match and f1 in percent, as the official scripts compute them.

    If some questions have no gold answer, SQuAD 2.0's rules apply: there are also figures for each kind of
    question, and gold answers that normalisation leaves empty ("the") are dropped. Version 1.1 keeps them,
    with an F1 of 0.

    Args:
        gold: the answers of each question; empty if it has none.
        answers: the answers to score; "" means "no answer".
    """
    answerable = np.array([bool(texts) for texts in gold])
    if answerable.all():
        exact = [exact_score(texts, answer) for texts, answer in zip(gold, answers)]
        f1 = [f1_score(texts, answer) if normalise(answer) else 0.0 for texts, answer in zip(gold, answers)]
        return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(f1))}
    gold = [[text for text in texts if normalise(text)] for texts in gold]
    figures: dict[str, float] = {}
    for name, function in (("exact_match", exact_score), ("f1", f1_score)):
        scores = 100 * np.array([function(texts, answer) for texts, answer in zip(gold, answers)])
        figures[name] = float(scores.mean())
        for kind, which in (("answerable", answerable), ("unanswerable", ~answerable)):
            if which.any():
                figures[f"{kind}_{name}"] = float(scores[which].mean())
    return figures


def span_scores(
    gold: Sequence[Sequence[str]], answers: Sequence[str], score: Callable[[Sequence[str], str], float] = f1_score
) -> list[float]:
    """What each question's best span would score as the answer: F1 or another `score`, by SQuAD 2.0's rules."""
    return [
        score([text for text in texts if normalise(text)], answer) if texts else float(not answer)
        for texts, answer in zip(gold, answers)
    ]


def best_threshold(
    scores: Sequence[float], unanswerable: Sequence[bool], differences: Sequence[float]
) -> tuple[float, float]:
    """The threshold on null_difference with the highest total score.

    Args:
        scores: `span_scores`.
        unanswerable: whether "no answer" is right, and scores 1.
        differences: null_difference of each question; the span is the answer where this is at most the threshold.

    Returns:
        The total score and the threshold (the lowest of equally good ones).
    """
    order = np.argsort(differences, kind="stable")
    sorted_differences = np.asarray(differences, dtype=float)[order]
    gain = np.asarray(scores, dtype=float)[order] - np.asarray(unanswerable, dtype=float)[order]
    totals = np.concatenate([[0.0], gain.cumsum()]) + float(np.sum(unanswerable))
    # A span for k questions is possible only where the k-th and the next difference are not equal.
    possible = np.concatenate([[True], sorted_differences[1:] > sorted_differences[:-1], [True]])
    best = int(np.where(possible, totals, -np.inf).argmax())
    threshold = sorted_differences[best - 1] if best else sorted_differences[0] - 1.0
    return float(totals[best]), float(threshold)
