"""Metrics of downstream tasks, from scikit-learn, scipy and seqeval.

Each function returns plain floats by name. SQuAD's exact match and F1 are in `downstream/squad_metrics.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from electra_core.errors import UserError

CALIBRATION_BINS = 10
LEAST_SCORES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
OF_LABEL_SETS = ("mean_average_precision", "micro_f1", "macro_f1", "subset_accuracy")
OF_SCORES = ("auc", "average_precision")
OF_NUMBERS = ("pearson", "spearman", "pearson_and_spearman")  # higher is better: not mse and mae
OF_SPANS = ("precision", "recall", "f1", "accuracy")


def shown_name(figure: str, figures: Iterable[str], positive: str) -> str:
    """A figure's name for a reader: with two classes, f1 and average_precision name the class that they are of.

    Args:
        figures: all of the task's, which tell whether it is of classes.
        positive: the task's positive class (`Task.positive`).

    >>> of_two, of_three = of_classes(["legit", "spam"]), of_classes(["a", "b", "c"])
    >>> shown_name("f1", of_two, "spam"), shown_name("macro_f1", of_three, "")
    ('f1 (spam)', 'macro_f1')
    """
    of_one = positive_class(figures, positive) if figure in ("f1", "average_precision") else {}
    return f"{figure} ({positive})" if of_one else figure


def positive_class(figures: Iterable[str], positive: str) -> dict[str, str]:
    """The class that f1 and average_precision are of, as an entry beside the figures; {} if they are not of two
    classes: of spans, f1 is of all of them, even where a model has two tags."""
    return {"positive_class": positive} if positive and "acc_and_f1" in figures else {}


def of_classes(labels: Sequence[str]) -> tuple[str, ...]:
    """The names of `classification_metrics`'s figures."""
    return ("accuracy", "mcc", "macro_f1", *(("f1", "acc_and_f1") if len(labels) == 2 else ()))


def classification_metrics(
    truth: Sequence[int], predicted: Sequence[int], num_labels: int, *, positive: int = 1
) -> dict[str, float]:
    """accuracy, mcc (Matthews' correlation), macro_f1; and f1 of one class if there are two (as GLUE).

    Args:
        truth, predicted: class indices, of equal length, at least one.
        positive: the class that f1 is of.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    metrics = {
        "accuracy": float(accuracy_score(truth, predicted)),
        "mcc": float(matthews_corrcoef(truth, predicted)) if len({*truth, *predicted}) > 1 else 0.0,
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0.0)),
    }
    if num_labels == 2:
        metrics["f1"] = float(f1_score(truth, predicted, pos_label=positive, average="binary", zero_division=0.0))
        metrics["acc_and_f1"] = (metrics["accuracy"] + metrics["f1"]) / 2
    return metrics


def ranking_metrics(truth: Sequence[int] | np.ndarray, scores: Sequence[float]) -> dict[str, float]:
    """auc and average_precision of class 1 of two, which need no threshold; {} if only one class occurs, NaN if a
    score is not finite.

    Args:
        truth: 0 or 1.
        scores: higher means class 1 is likelier; only their order counts.
    """
    right, got = np.asarray(truth), np.asarray(scores, dtype=float)
    if right.all() or not right.any():
        return {}
    precision = average_precisions(right[:, None], got[:, None])[0]
    return {"auc": roc_auc(right, got), "average_precision": float(precision)}


def roc_auc(truth: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive example scores higher than a negative one, equal scores
    counting half; NaN if a score is not finite.

    Args:
        truth: 0 or 1, both at least once.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, scores)) if np.isfinite(scores).all() else float("nan")


def per_class_metrics(
    truth: Sequence[int] | np.ndarray, predicted: Sequence[int] | np.ndarray, labels: Sequence[str]
) -> list[dict[str, Any]]:
    """For each class: label, precision, recall, f1, support (how often it is the truth)."""
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(truth, predicted, labels=range(len(labels)), zero_division=0.0)
    return _by_label(labels, columns)


def _by_label(labels: Sequence[str], columns: Iterable[Any]) -> list[dict[str, Any]]:
    """A row for each label, from the columns of its precision, recall, f1 and support."""
    return [
        {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for label, p, r, f, s in zip(labels, *columns)
    ]


def average_precisions(truth: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """[C]: each label's area under precision over recall; 0 for a label that does not occur, NaN for one with a
    score that is not finite.

    Args:
        truth: [N, C], 0 or 1.
        scores: [N, C], higher means likelier; only their order in a column counts.
    """
    from sklearn.metrics import average_precision_score

    def of_label(own: np.ndarray, its_scores: np.ndarray) -> float:
        if not np.isfinite(its_scores).all():
            return float("nan")
        return float(average_precision_score(own, its_scores)) if own.any() else 0.0

    return np.array([of_label(own, its_scores) for own, its_scores in zip(truth.T, scores.T)])


def multilabel_metrics(truth: np.ndarray, predicted: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """mean_average_precision (of labels that occur; NaN with NaN scores), micro_f1, macro_f1 (of all),
    subset_accuracy.

    Args:
        truth, predicted: [N, C], 0 or 1, at least one row.
        scores: [N, C], higher means likelier; the first figure depends only on their order.
    """
    precisions = average_precisions(truth, scores)[truth.any(axis=0)]
    per_label = per_label_metrics(truth, predicted, list(map(str, range(truth.shape[1]))))
    return {
        "mean_average_precision": float(precisions.mean()) if len(precisions) else 0.0,
        "micro_f1": micro_metrics(truth, predicted)["f1"],
        "macro_f1": float(np.mean([row["f1"] for row in per_label])),
        "subset_accuracy": float((truth == predicted).all(axis=1).mean()),
    }


def micro_metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """precision, recall, f1 over all pairs of example and label (scikit-learn's average "micro").

    Args:
        truth, predicted: [N, C], 0 or 1.
    """
    from sklearn.metrics import precision_recall_fscore_support

    figures = precision_recall_fscore_support(
        truth.ravel(), predicted.ravel(), average="binary", zero_division=0.0
    )
    return {name: float(value) for name, value in zip(("precision", "recall", "f1"), figures)}


def per_label_metrics(truth: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """For each label: label, precision, recall, f1, support (how many examples have it).

    Args:
        truth, predicted: [N, C], 0 or 1.
    """
    # With an extra column, whose figures are not used, a single label is not taken for two classes.
    right, got = (np.pad(marks, ((0, 0), (0, 1))) for marks in (truth, predicted))
    return per_class_metrics(right, got, labels)


def confusion_matrix(truth: Sequence[int], predicted: Sequence[int], num_labels: int) -> list[list[int]]:
    """[C][C] counts: row = truth, column = prediction."""
    from sklearn.metrics import confusion_matrix as count

    return count(truth, predicted, labels=range(num_labels)).tolist()


def calibration(confidence: Sequence[float], correct: Sequence[bool]) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error (Guo et al. 2017) and the table behind it.

    Predictions are put into `CALIBRATION_BINS` equal ranges of confidence; the error is the mean distance between
    a range's confidence and its accuracy, weighted by the number of predictions in it.

    Returns:
        The error, and for each non-empty range: from, to, count, confidence, accuracy.
    """
    sure, right = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    bins = CALIBRATION_BINS
    which = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    table = [
        {
            "from": index / bins,
            "to": (index + 1) / bins,
            "count": int((which == index).sum()),
            "confidence": float(sure[which == index].mean()),
            "accuracy": float(right[which == index].mean()),
        }
        for index in range(bins)
        if (which == index).any()
    ]
    error = sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in table) / max(1, len(sure))
    return float(error), table


def answered(
    confidence: Sequence[float], correct: Sequence[bool], least: Sequence[float] = LEAST_SCORES
) -> list[dict[str, float]]:
    """Coverage and accuracy if only answers with at least a certain confidence count.

    Args:
        least: the confidences to try, the lowest first.

    Returns:
        For each confidence that leaves fewer answers than the one before, but not none: score, count, share,
        accuracy.
    """
    sure, right = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    rows: list[dict[str, float]] = []
    for score in least:
        kept = sure >= score
        count = int(kept.sum())
        if count and (not rows or count < rows[-1]["count"]):
            figures = {"share": float(kept.mean()), "accuracy": float(right[kept].mean())}
            rows.append({"score": float(score), "count": count, **figures})
    return rows


def regression_metrics(truth: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """pearson, spearman, their mean (GLUE's figure for STS-B), mse, mae; correlation with a constant is 0."""
    from scipy.stats import pearsonr, spearmanr

    difference = np.asarray(truth, dtype=float) - np.asarray(predicted, dtype=float)
    if len(set(truth)) < 2 or len(set(predicted)) < 2:
        pearson = spearman = 0.0
    else:
        pearson, spearman = float(pearsonr(truth, predicted)[0]), float(spearmanr(truth, predicted)[0])
    return {
        "pearson": pearson,
        "spearman": spearman,
        "pearson_and_spearman": (pearson + spearman) / 2,
        "mse": float((difference**2).mean()),
        "mae": float(np.abs(difference).mean()),
    }


def span_metrics(
    truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Entity-level precision, recall, f1 (as conlleval) and accuracy per word, from each sentence's IOB2 tags.

    Returns:
        The figures, and for each entity type: label ("_" where the tags are only B, I and O), precision, recall,
        f1, support.

    Raises:
        UserError: seqeval is not installed.
    """
    try:
        from seqeval.metrics import accuracy_score
        from seqeval.metrics.sequence_labeling import precision_recall_fscore_support
    except ImportError:
        raise UserError("scoring tags needs: pip install 'electra-core[tag]'") from None
    wanted, got = [list(tags) for tags in truth], [list(tags) for tags in predicted]
    micro = precision_recall_fscore_support(wanted, got, average="micro", zero_division=0)
    figures = {name: float(value) for name, value in zip(("precision", "recall", "f1"), micro)}
    figures["accuracy"] = float(accuracy_score(wanted, got))
    columns = precision_recall_fscore_support(wanted, got, average=None, zero_division=0)
    types = sorted({tag[2:] or "_" for tags in (*wanted, *got) for tag in tags if tag != "O"})
    return figures, _by_label(types, columns)


def spread(values: Sequence[float]) -> dict[str, float]:
    """median, mean, std (over the sample, n - 1), min and max of one metric over seeds."""
    array = np.asarray(values, dtype=float)
    return {
        "median": float(np.median(array)),
        "mean": float(array.mean()),
        "std": float(array.std(ddof=1)) if len(array) > 1 else 0.0,
        "min": float(array.min()),
        "max": float(array.max()),
    }
