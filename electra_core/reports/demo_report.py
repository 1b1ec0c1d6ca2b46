"""Turns what the demo found into its report: charts, reference values, warnings, passages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from electra_core.corpora.docstrings import Example, LabelledTask
from electra_core.corpus import Corpus
from electra_core.model_dir import load_config
from electra_core.pretrain import PretrainResult
from electra_core.reports.demo_page import Passage, Report
from electra_core.reports.passages import generated_passage
from electra_core.reports.plots import Dots, Rule, Series, duration, line_chart, median
from electra_core.runs.metrics_log import read_metrics
from electra_core.trace import load_electra

PLATEAU_AUC = 0.55
PASSAGE_SEED = 1
PROSE = (
    "The river rises in the mountains in the north of the country and flows south for three hundred kilometres "
    "before it reaches the sea. Two large cities lie on its banks. In the nineteenth century a railway was built "
    "along the valley, and most of the small towns became centres of industry."
)


@dataclass(frozen=True)
class Findings:
    """Everything that was measured or counted."""

    out: Path
    machine: str
    documents: int
    """Number in the corpus."""
    tokens: Mapping[str, int]
    """Number in each split of the corpus."""
    task: LabelledTask
    pretrained: PretrainResult
    shipped: Path
    """The folder of the package's model."""
    accuracies: Mapping[str, Sequence[float]]
    """shipped | pretrained | random -> accuracies at the end of fine-tuning, one for each seed."""
    epochs: int
    """Number of fine-tuning epochs."""
    stages: Sequence[tuple[str, float]]
    """(name, seconds)"""


def build_report(found: Findings) -> Report:
    """The report; the models are loaded once more to judge a passage."""
    unigram = unigram_loss(found.out / "data")
    task, pretrained = found.task, found.pretrained
    seeds = max(map(len, found.accuracies.values()))
    starts = [
        Dots("Shipped tiny model", "pre-trained beforehand; its own vocabulary", found.accuracies["shipped"], 0),
        Dots(
            "Pre-trained just now",
            f"{duration(pretrained.seconds)}, {pretrained.steps:,} steps",
            found.accuracies["pretrained"],
            1,
        ),
        Dots("Random start", "same size, not pre-trained", found.accuracies["random"], 3),
    ]
    return Report(
        title="ELECTRA, from scratch to a classifier",
        summary=_summary(starts),
        machine=[("Machine", found.machine)],
        task=(
            f"Which of {len(task.labels)} areas of the library does a docstring belong to? {len(task.train):,} "
            f"labelled examples for training, {len(task.dev):,} from other modules for evaluation; "
            f"{found.epochs} epochs, {seeds} seed{'s' * (seeds != 1)} per start."
        ),
        starts=starts,
        references=[Rule(guessing_accuracy(task), "guessing"), Rule(counting_accuracy(task), "counting words")],
        charts=pretraining_charts(read_metrics(found.out / "pretrained" / "metrics.jsonl"), unigram),
        charts_note=f"{pretrained.tokens / 1e6:.2f} million tokens; evaluated on held-out documents.",
        passages=_passages(found),
        facts=_facts(found, unigram),
        stages=found.stages,
        warnings=[*judge_pretraining(pretrained.evaluation, unigram), *judge_comparison(starts)],
    )


def to_json(report: Report, found: Findings) -> dict[str, Any]:
    """The figures of the report, for machines."""
    return {
        "machine": found.machine,
        "accuracies": {key: list(values) for key, values in found.accuracies.items()},
        "references": {rule.label: rule.value for rule in report.references},
        "pretraining": {
            "steps": found.pretrained.steps,
            "tokens": found.pretrained.tokens,
            "seconds": found.pretrained.seconds,
            **found.pretrained.evaluation,
        },
        "seconds": dict(found.stages),
        "warnings": [headline for headline, _ in report.warnings],
    }


def _summary(starts: Sequence[Dots]) -> str:
    """A sentence that states the medians."""
    parts = [f"{row.name.lower()} {100 * median(row.values):.1f}%" for row in starts if row.values]
    return "Fine-tuned on a few hundred labelled docstrings, median accuracy: " + ", ".join(parts) + "."


# ------------------------------------------------------------------------------------------- reference values


def unigram_loss(data: Path) -> float:
    """Nats per held-out token of a unigram model, which knows only the tokens' frequencies in the training text.

    A generator that stays at this loss has not learnt to use the context.
    """
    train, heldout = Corpus.open(data), Corpus.open(data, "heldout")
    train_V, heldout_V = (
        np.sum(
            [np.bincount(shard.tokens, minlength=train.tokenizer.vocab_size) for shard in corpus.shards], axis=0
        )
        for corpus in (train, heldout)
    )
    probability_V = (train_V + 1) / (train_V + 1).sum()  # a token never seen is not impossible
    return float(-(heldout_V * np.log(probability_V)).sum() / heldout_V.sum())


def guessing_accuracy(task: LabelledTask) -> float:
    """Accuracy of always giving the area that is most frequent in the dev examples."""
    return max(Counter(example.label for example in task.dev).values()) / len(task.dev)


def counting_accuracy(task: LabelledTask) -> float:
    """Accuracy of a logistic regression on word counts (TF-IDF), which sees no context at all."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000))
    model.fit([example.text for example in task.train], [example.label for example in task.train])
    predicted = model.predict([example.text for example in task.dev])
    return float(np.mean([label == example.label for label, example in zip(predicted, task.dev)]))


# ---------------------------------------------------------------------------------------------------- warnings


def judge_pretraining(evaluation: Mapping[str, float], unigram: float) -> list[tuple[str, str]]:
    """Warnings about a pre-training that has not left its plateau; empty if it has.

    Args:
        evaluation: the last figures on held-out text (`pretrain.evaluate`).
        unigram: `unigram_loss`.
    """
    auc = evaluation.get("eval_rtd_auc", math.nan)
    rtd, base = evaluation.get("eval_rtd_loss", math.nan), evaluation.get("eval_base_rate_loss", math.nan)
    mlm = evaluation.get("eval_mlm_loss", math.nan)
    signs = []
    if not auc >= PLATEAU_AUC:
        signs.append(f"it tells replaced from original tokens hardly better than chance (AUC {auc:.2f})")
    if not rtd < 0.99 * base:
        signs.append(f"its loss, {rtd:.3f}, is about that of always predicting the base rate, {base:.3f}")
    if not mlm < unigram - 0.05:
        signs.append(f"the generator's loss, {mlm:.2f}, is about that of word frequencies alone, {unigram:.2f}")
    if not signs:
        return []
    text = (
        "; ".join(signs) + ". The first minutes of every ELECTRA look like this, and on a CPU that phase is long. "
        "More --minutes or a GPU get it further."
    )
    return [("The model pre-trained just now has not left its plateau", text[0].upper() + text[1:])]


def judge_comparison(starts: Sequence[Dots]) -> list[tuple[str, str]]:
    """Warnings about pre-trained starts that did not beat the random one."""
    random = starts[-1]
    warnings = []
    for start in starts[:-1]:
        if start.values and random.values and median(start.values) <= median(random.values):
            text = (
                f"Its median accuracy is {100 * median(start.values):.1f}%, that of the random start "
                f"{100 * median(random.values):.1f}%."
            )
            warnings.append((f"“{start.name}” is no better than a random start", text))
    return warnings


# ----------------------------------------------------------------------------------------- charts and passages


def pretraining_charts(rows: Sequence[Mapping[str, float]], unigram: float) -> list[str]:
    """Losses of both networks and the discriminator's AUC, from the rows of metrics.jsonl."""

    def series(name: str, key: str, tone: int) -> Series:
        own = [row for row in rows if key in row]
        return Series(name, [row["step"] for row in own], [row[key] for row in own], tone)

    base = [row["eval_base_rate_loss"] for row in rows if "eval_base_rate_loss" in row][-1:]
    return [
        line_chart(
            [series("training", "mlm_loss", 0), series("held-out", "eval_mlm_loss", 1)],
            title="Generator: MLM loss (nats)",
            caption="Below the dashed line, it knows more than word frequencies.",
            rules=[Rule(unigram, f"word frequencies alone: {unigram:.2f}")],
        ),
        line_chart(
            [series("training", "rtd_loss", 0), series("held-out", "eval_rtd_loss", 1)],
            title="Discriminator: loss per token (nats)",
            caption="Below the dashed line, it knows more than the fraction of replaced tokens.",
            rules=[Rule(value, f"base rate: {value:.3f}") for value in base],
        ),
        line_chart(
            [series("held-out", "eval_rtd_auc", 2)],
            title="Discriminator: AUC on held-out text",
            caption="How often a replaced token gets a higher probability than an original one.",
            rules=[Rule(0.5, "chance")],
            y_range=(0.5, 0.6),
        ),
    ]


def _passages(found: Findings) -> list[Passage]:
    """The shipped model's scores for English prose, and the new model's for a docstring it has never seen."""
    example = max(found.task.dev, key=_reads_like_prose)
    return [
        generated_passage(
            *load_electra(found.shipped), PROSE, seed=PASSAGE_SEED, title="What the shipped model sees",
            note="Its own generator drew the underlined words; the originals are above them.",
        ),
        generated_passage(
            *load_electra(found.out / "pretrained"), example.text, seed=PASSAGE_SEED,
            title="What the model pre-trained just now sees",
            note=f"A docstring of {example.document.module} that it was not trained on. Its generator drew "
            "the underlined words; the originals are above them. Point at a word for its probability.",
        ),
    ]  # fmt: skip


def _reads_like_prose(example: Example) -> tuple[bool, float]:
    """Sort key: long enough, and made of words rather than code."""
    words = sum(character.isalpha() or character == " " for character in example.text)
    return len(example.text) >= 200, words / len(example.text)


def _facts(found: Findings, unigram: float) -> list[tuple[str, str]]:
    """How everything was made, for the table at the end of the page."""
    run, config = found.pretrained, load_config(found.out / "pretrained")[0]
    python = found.machine.rpartition("Python ")[2]
    counts = {
        label: [sum(example.label == label for example in side) for side in (found.task.train, found.task.dev)]
        for label in found.task.labels
    }
    return [
        (
            "Corpus",
            f"{found.documents:,} documents, {found.tokens['train']:,} tokens for training and "
            f"{found.tokens['heldout']:,} held out: docstrings of Python {python}, torch {version('torch')} and "
            f"numpy {version('numpy')}, and the language reference",
        ),
        ("Vocabulary", f"{config.vocab_size:,} SentencePiece units; their frequencies alone: {unigram:.2f} nats"),
        (
            "Model",
            f"{config.num_hidden_layers} layers, {config.hidden_size} wide, {config.num_attention_heads} heads",
        ),
        (
            "Pre-training",
            f"{run.steps:,} steps, {run.tokens:,} tokens, {run.tokens / run.seconds:,.0f} tokens/s in all",
        ),
        (
            "Held-out figures",
            ", ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in run.evaluation.items()),
        ),
        ("Areas", ", ".join(f"{label} ({train} + {dev})" for label, (train, dev) in counts.items())),
        (
            "Examples",
            "those for evaluation come from modules that have no training example and are not in the corpus; "
            "module names are removed from all. Accuracy is measured at the end of training; no epoch is picked",
        ),
    ]
