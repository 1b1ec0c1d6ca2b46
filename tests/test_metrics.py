"""Figures of merit against direct computations; SQuAD's and conlleval's rules against slow, separate ones."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from electra_core.metrics import (
    calibration,
    classification_metrics,
    confusion_matrix,
    per_class_metrics,
    regression_metrics,
    span_metrics,
    spread,
)
from electra_core.squad_metrics import best_threshold, exact_score, f1_score, normalise, squad_metrics
from electra_core.tagging import spans


def test_classification_by_hand():
    truth, predicted = [1, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1]  # 3 true +, 1 false +, 1 false -, 1 true -
    figures = classification_metrics(truth, predicted, 2)
    assert figures["accuracy"] == pytest.approx(4 / 6)
    assert figures["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert figures["mcc"] == pytest.approx((3 * 1 - 1 * 1) / np.sqrt(4 * 4 * 2 * 2))
    assert figures["acc_and_f1"] == pytest.approx((4 / 6 + 6 / 8) / 2)
    assert confusion_matrix(truth, predicted, 2) == [[1, 1], [1, 3]]
    table = per_class_metrics(truth, predicted, ["no", "yes", "never"])
    assert table[0] == {"label": "no", "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert table[2]["support"] == 0 and table[2]["f1"] == 0.0
    assert "f1" not in classification_metrics([0, 1, 2], [0, 1, 1], 3)


def test_a_constant_prediction_scores_no_correlation():
    assert classification_metrics([0, 1, 1], [1, 1, 1], 2)["mcc"] == 0
    assert regression_metrics([1.0, 2.0], [3.0, 3.0])["pearson_and_spearman"] == 0


def test_regression_against_the_definitions():
    random_ = np.random.default_rng(0)
    truth = random_.normal(size=200)
    predicted = truth + random_.normal(size=200)
    figures = regression_metrics(truth.tolist(), predicted.tolist())
    ranks = [np.argsort(np.argsort(values)) for values in (truth, predicted)]
    assert figures["pearson"] == pytest.approx(np.corrcoef(truth, predicted)[0, 1])
    assert figures["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert figures["mse"] == pytest.approx(((truth - predicted) ** 2).mean())


def test_spans_as_conlleval_counts_them():
    draw = random.Random(0)
    tags = ["O", "B-A", "I-A", "B-B", "I-B"]
    truth = [draw.choices(tags, weights=[4, 1, 2, 1, 2], k=draw.randint(1, 12)) for _ in range(300)]
    predicted = [[t if draw.random() < 0.7 else draw.choice(tags) for t in sentence] for sentence in truth]
    figures, table = span_metrics(truth, predicted)
    wanted = [{(n, *span) for n, sentence in enumerate(truth) for span in spans(sentence)}]
    wanted.append({(n, *span) for n, sentence in enumerate(predicted) for span in spans(sentence)})
    right = len(wanted[0] & wanted[1])
    assert figures["precision"] == pytest.approx(right / len(wanted[1]))
    assert figures["recall"] == pytest.approx(right / len(wanted[0]))
    assert figures["f1"] == pytest.approx(2 * right / (len(wanted[0]) + len(wanted[1])))
    assert [row["label"] for row in table] == ["A", "B"]
    assert sum(row["support"] for row in table) == len(wanted[0])


def test_spans_where_there_are_none():
    assert span_metrics([["O", "O"]], [["O", "O"]])[0]["f1"] == 0


def test_calibration_error_of_known_cases():
    error, table = calibration([0.9] * 10, [True] * 9 + [False])
    assert error == pytest.approx(0, abs=1e-12) and len(table) == 1
    error, table = calibration([1.0, 1.0, 0.55, 0.55], [True, False, True, True])
    assert error == pytest.approx((2 * 0.5 + 2 * 0.45) / 4)
    assert [row["count"] for row in table] == [2, 2]


def test_spread_over_seeds():
    assert spread([1.0, 2.0, 6.0]) == pytest.approx({"median": 2, "mean": 3, "std": 7**0.5, "min": 1, "max": 6})
    assert spread([1.0])["std"] == 0


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  Cat's hat!", "cats hat"),
        ("an apple, a day", "apple day"),
        ("theatre", "theatre"),
        ("A", ""),
        ("État—the", "état—the"),  # only ASCII punctuation counts
        ("U.S.", "us"),
    ],
)
def test_normalisation(text, expected):
    # A dash is a word boundary for \b, so the article behind it goes: that is what the official regex does.
    assert normalise(text) == expected.replace("—the", "—")


def slow_words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[!-/:-@\[-`{-~]", "", text.lower())).split()


def slow_f1(gold: str, answer: str) -> float:
    """SQuAD's F1 written another way: words struck off one by one."""
    rest, same = slow_words(gold), 0
    for word in slow_words(answer):
        if word in rest:
            rest.remove(word)
            same += 1
    return 2 * same / (len(slow_words(gold)) + len(slow_words(answer))) if same else 0.0


def test_squad_scores_against_another_implementation():
    draw = random.Random(0)
    words = "The a cat, Dog. dog's an! fish 1.5 fish".split()
    for _ in range(500):
        gold, answer = (" ".join(draw.choices(words, k=draw.randint(1, 5))) for _ in range(2))
        if normalise(gold) and normalise(answer):
            assert f1_score([gold], answer) == pytest.approx(slow_f1(gold, answer))
            assert exact_score([gold], answer) == (slow_words(gold) == slow_words(answer))


def test_the_best_of_several_gold_answers_counts():
    assert f1_score(["black cat", "cat"], "the cat") == 1
    assert exact_score(["black cat", "cat"], "the cat") == 1
    assert exact_score([], "") == 1 and exact_score([], "cat") == 0 and f1_score([], "cat") == 0


def test_versions_differ_where_normalisation_leaves_nothing():
    only = squad_metrics([["the"], ["x"]], ["a", "x"])
    assert only == {"exact_match": 100.0, "f1": 50.0}  # 1.1 keeps "the" as gold, but has no word to share
    second = squad_metrics([["the", "cat"], []], ["a", ""])
    assert second["answerable_exact_match"] == 0 and second["unanswerable_f1"] == 100  # 2.0 drops it


def test_best_threshold_is_the_best_of_all():
    draw = random.Random(0)
    for _ in range(50):
        unanswerable = [draw.random() < 0.5 for _ in range(12)]
        scores = [0.0 if none else draw.random() for none in unanswerable]
        differences = [draw.choice([-2.0, -1.0, 0.0, 0.5, 3.0]) for _ in range(12)]

        rows = list(zip(scores, unanswerable, differences))
        totals = {
            threshold: sum(float(none) if d > threshold else score for score, none, d in rows)
            for threshold in (-9.0, *differences)
        }
        best, threshold = best_threshold(scores, unanswerable, differences)
        assert best == pytest.approx(max(totals.values()))
        assert best == pytest.approx(totals.get(threshold, totals[-9.0]))
