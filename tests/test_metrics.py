"""Figures of merit against direct computations; SQuAD's and conlleval's rules against slow, separate ones."""

from __future__ import annotations

import random
import re

import numpy as np
import official_squad
import pytest

from electra_core.downstream.classify import Classify
from electra_core.downstream.squad_metrics import (
    best_threshold,
    exact_score,
    f1_score,
    normalise,
    span_scores,
    squad_metrics,
)
from electra_core.downstream.tagging import Tag, spans, to_iob2
from electra_core.labelled_data.squad_files import read_questions
from electra_core.labelled_data.tagged_files import read_tagged
from electra_core.metrics import (
    OF_SPANS,
    answered,
    calibration,
    classification_metrics,
    confusion_matrix,
    of_classes,
    per_class_metrics,
    positive_class,
    ranking_metrics,
    regression_metrics,
    shown_name,
    span_metrics,
    spread,
)


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


def test_two_classes_ranked_by_score_as_defined():
    for seed in range(20):
        draws = np.random.default_rng(seed)
        truth = draws.permutation([0, 1, *draws.integers(0, 2, 38)])
        scores = draws.integers(0, 8, 40) / 8  # many ties
        pairs = np.subtract.outer(scores[truth == 1], scores[truth == 0])
        places = sorted({*scores.tolist()}, reverse=True)
        recalled = np.array([0, *(truth[scores >= at].sum() / truth.sum() for at in places)])
        precise = np.array([truth[scores >= at].mean() for at in places])
        wanted = {"auc": (0.5 * (1 + np.sign(pairs))).mean(), "average_precision": np.diff(recalled) @ precise}
        assert ranking_metrics(truth.tolist(), scores.tolist()) == pytest.approx(wanted, abs=1e-12)
    assert ranking_metrics([1, 1], [0.1, 0.9]) == ranking_metrics([0, 0], [0.1, 0.9]) == {}
    for lost in (float("nan"), float("inf")):  # a model that has diverged
        assert not np.isfinite([*ranking_metrics([0, 1, 1, 0], [0.1, 0.9, 0.8, lost]).values()]).any()


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
    assert figures["mae"] == pytest.approx(abs(truth - predicted).mean())


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


def test_spans_of_marks_alone_have_a_row_too():
    figures, table = span_metrics([["B", "I", "O"], ["O", "B", "O"]], [["B", "I", "O"], ["O", "O", "O"]])
    assert figures["recall"] == 0.5
    assert table == [{"label": "_", "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}]


def test_spans_where_there_are_none():
    assert span_metrics([["O", "O"]], [["O", "O"]])[0]["f1"] == 0


def test_calibration_error_of_known_cases():
    error, table = calibration([0.9] * 10, [True] * 9 + [False])
    assert error == pytest.approx(0, abs=1e-12) and len(table) == 1
    error, table = calibration([1.0, 1.0, 0.55, 0.55], [True, False, True, True])
    assert error == pytest.approx((2 * 0.5 + 2 * 0.45) / 4)
    assert table == [
        {"from": 0.5, "to": 0.6, "count": 2, "confidence": pytest.approx(0.55), "accuracy": 1.0},
        {"from": 0.9, "to": 1.0, "count": 2, "confidence": 1.0, "accuracy": 0.5},
    ]
    _, table = calibration([0.0, 0.9], [True, True])  # a border belongs to the range below, 0 to the first
    assert [(row["from"], row["to"]) for row in table] == [(0.0, 0.1), (0.8, 0.9)]


def test_of_sure_answers_more_are_right():
    rows = answered([0.4, 0.6, 0.9, 0.9], [False, True, True, False], least=(0.0, 0.3, 0.5, 0.9, 0.95))
    assert [tuple(row.values()) for row in rows] == [
        (0.0, 4, 1.0, 0.5),
        (0.5, 3, 0.75, pytest.approx(2 / 3)),  # 0.3 leaves as many as 0
        (0.9, 2, 0.5, 0.5),  # a score that reaches it counts; 0.95 leaves none
    ]


def test_spread_over_seeds():
    assert spread([1.0, 2.0, 6.0]) == pytest.approx({"median": 2, "mean": 3, "std": 7**0.5, "min": 1, "max": 6})
    assert spread([1.0])["std"] == 0 and spread([1.0, 3.0])["std"] == pytest.approx(2**0.5)


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

        rows = list(zip(scores, unanswerable, differences, strict=True))
        totals = {
            threshold: sum(float(none) if d > threshold else score for score, none, d in rows)
            for threshold in (-9.0, *differences)
        }
        best, threshold = best_threshold(scores, unanswerable, differences)
        assert best == pytest.approx(max(totals.values()))
        assert best == pytest.approx(totals.get(threshold, totals[-9.0]))


# ---- the reference implementations, on the same predictions --------------------------------------------------

WORDS = (
    "The a cat, Dog. dog's an! fish 1.5 -- «naïve» Ünïcödé the\u00a0end İstanbul ß 北京 “quoted” a\u0301 U.S. "
    "\u2014 \u200bzero x\u0085y"
).split(" ")


def disturbed(text: str, draw: random.Random) -> str:
    """A prediction that is right, nearly right, wrong or empty."""
    words = text.split(" ")
    way = draw.randrange(6)
    if way == 0:
        return ""
    if way == 1:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))
    if way == 2:
        return " ".join(words[draw.randrange(len(words)) :])
    if way == 3:
        return f"{draw.choice(WORDS)} {text.upper()}!"
    return text


def compare_with_the_official_scripts(gold: list[list[str]], draw: random.Random) -> None:
    answers = [disturbed(draw.choice(texts) if texts else "cat", draw) for texts in gold]
    gold_of, answer_of = dict(enumerate(gold)), dict(enumerate(answers))
    if all(gold):
        assert squad_metrics(gold, answers) == pytest.approx(official_squad.evaluate_1(gold_of, answer_of))
        return
    exact, f1 = official_squad.get_raw_scores(gold_of, answer_of)
    figures = squad_metrics(gold, answers)
    for name, scores in (("exact_match", exact), ("f1", f1)):
        assert figures[name] == pytest.approx(100 * np.mean(list(scores.values())))
        for kind, wanted in (("answerable", True), ("unanswerable", False)):
            chosen = [score for index, score in scores.items() if bool(gold[index]) is wanted]
            assert figures[f"{kind}_{name}"] == pytest.approx(100 * np.mean(chosen))
    # The threshold: what is answered where a span is given, against the difference of the scores.
    spans_given = [answer or "cat" for answer in answers]
    span_exact, span_f1 = official_squad.get_raw_scores(gold_of, dict(enumerate(spans_given)))
    differences = [draw.uniform(-5, 5) for _ in gold]
    has_answer = {index: bool(texts) for index, texts in enumerate(gold)}
    for scores, function in ((span_exact, exact_score), (span_f1, f1_score)):
        best, threshold = official_squad.find_best_thresh(
            dict(enumerate(spans_given)), scores, dict(enumerate(differences)), has_answer
        )
        ours = span_scores(gold, spans_given, function)
        got, got_threshold = best_threshold(ours, [not texts for texts in gold], differences)
        assert 100 * got / len(gold) == pytest.approx(best)
        assert got_threshold == threshold or threshold == 0.0  # theirs starts at 0.0, which may be no question's
    assert span_scores(gold, spans_given) == span_scores(gold, spans_given, f1_score)


def test_squad_scores_equal_those_of_the_official_scripts():
    draw = random.Random(0)
    for share in (0.0, 0.4):
        for _ in range(20):
            gold = [
                [" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
                if draw.random() >= share
                else []
                for _ in range(50)
            ]
            compare_with_the_official_scripts(gold, draw)


@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_squad_scores_equal_the_official_ones_on_the_real_questions(version, data_dir):
    file = data_dir / f"squad/dev-v{version}.rebuilt.json"
    if not file.exists():
        pytest.skip("no SQuAD (set ELECTRA_DATA)")
    gold = [[text for text, _ in example.answers or ()] for example in read_questions(file)]
    compare_with_the_official_scripts(gold, random.Random(0))


def compare_with_seqeval(truth: list[list[str]], draw: random.Random) -> None:
    pytest.importorskip("seqeval")
    from seqeval.metrics import accuracy_score, classification_report, precision_score, recall_score
    from seqeval.metrics import f1_score as seqeval_f1

    tags = sorted({tag for sentence in truth for tag in sentence})
    predicted = [[tag if draw.random() < 0.9 else draw.choice(tags) for tag in sentence] for sentence in truth]
    figures, table = span_metrics([to_iob2(s) for s in truth], [to_iob2(s) for s in predicted])
    expected = {  # its default reads IOB1, as conlleval does
        "precision": precision_score(truth, predicted),
        "recall": recall_score(truth, predicted),
        "f1": seqeval_f1(truth, predicted),
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    iob2 = [[to_iob2(sentence) for sentence in side] for side in (truth, predicted)]
    assert figures["accuracy"] == pytest.approx(accuracy_score(*iob2))
    report = classification_report(truth, predicted, output_dict=True)
    for row in table:
        for name, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert row[name] == pytest.approx(report[row["label"]][theirs])
        assert row["support"] == report[row["label"]]["support"]


def test_f1_of_two_classes_says_of_which_one_it_is():
    def shown(figure: str, *labels: str) -> str:
        return shown_name(figure, of_classes(labels), Classify(labels=labels).positive)

    assert shown("f1", "spam", "legit") == "f1 (legit)"
    assert shown("f1", "a", "b", "c") == shown("f1") == "f1"
    assert shown("average_precision", "spam", "legit") == "average_precision (legit)"
    assert shown("accuracy", "spam", "legit") == shown("accuracy") == "accuracy"


def test_f1_of_spans_is_of_no_class_even_of_two_tags() -> None:
    assert Tag(labels=("B-X", "O")).positive == "" and shown_name("f1", OF_SPANS, "O") == "f1"
    assert positive_class(OF_SPANS, "O") == {}
    tags = Tag(labels=("DT", "NN"))
    assert positive_class(tags.figures, tags.positive) == {"positive_class": "NN"}


def test_span_scores_equal_seqevals():
    draw = random.Random(0)
    tags = ["O", "B-A", "I-A", "B-B", "I-B"]
    truth = [draw.choices(tags, weights=[4, 1, 2, 1, 2], k=draw.randint(1, 12)) for _ in range(300)]
    compare_with_seqeval(truth, draw)


def test_span_scores_equal_seqevals_on_the_real_iob1_tags(data_dir):
    file = data_dir / "conll2003/eng.testa"
    if not file.exists():
        pytest.skip("no CoNLL-2003 (set ELECTRA_DATA)")
    compare_with_seqeval([list(example.tags or ()) for example in read_tagged(file)], random.Random(0))
