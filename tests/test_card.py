"""The card of a fine-tuned model: its header is YAML that the Hub reads, and says only what is known."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_model
from torch import nn

from electra_core.config import EncoderConfig
from electra_core.downstream.classify import Classify
from electra_core.finetuning.card import About, about_training, model_card
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.tasks import MultipleChoice, QuestionAnswerer, SequenceClassifier, TaskModel, TokenClassifier

TINY = EncoderConfig(vocab_size=20, embedding_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                     intermediate_size=8, max_position_embeddings=8)  # fmt: skip
TWO = Classify(labels=("---\nlicense: mit", "\x85a: [\u2028 \U0001f600"))


def header_of(model: TaskModel, base: str = "", metrics: dict[str, float] | None = None) -> Any:
    """The card's YAML, as a parser reads it."""
    yaml = pytest.importorskip("yaml")
    card = model_card(model, TWO, About("From `x`.", base), "step 1", metrics or {"accuracy": 1.0})
    before, header, text = card.split("---\n", 2)
    assert before == "" and text.startswith("# classify\n\nFrom `x`.")
    return yaml.safe_load(header)


def test_the_header_says_what_is_known_and_nothing_else() -> None:
    metrics = {"accuracy": 0.9, "mcc": 0.5, "macro_f1": 0.8, "f1": 0.7, "auc": 0.9}
    model = SequenceClassifier(TINY, TWO.labels)
    assert header_of(model, "google/electra-small-discriminator", metrics) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["electra"],
        "metrics": ["accuracy", "matthews_correlation", "f1", "roc_auc"],
        "base_model": "google/electra-small-discriminator",
    }
    assert header_of(model, metrics={"micro_f1": 0.5}).keys() == {"library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize(
    ("kind", "pipeline"),
    [
        (TokenClassifier, "token-classification"), (QuestionAnswerer, "question-answering"),
        (MultipleChoice, "multiple-choice"),
    ],
)  # fmt: skip
def test_every_kind_of_model_has_its_pipeline(kind: type[TaskModel], pipeline: str) -> None:
    labels = TWO.labels if kind is TokenClassifier else ()
    assert header_of(kind(TINY, labels))["pipeline_tag"] == pipeline


def test_a_model_of_ones_own_is_not_said_to_open_in_transformers() -> None:
    class Own(SequenceClassifier):
        pass

    changed = SequenceClassifier(TINY, TWO.labels)
    changed.encoder.layers[0].attention = type("Rotary", (nn.Module,), {})()
    for model in (Own(TINY, TWO.labels), changed):
        assert header_of(model) == {"library_name": "electra-core", "tags": ["electra"], "metrics": ["accuracy"]}


def test_the_base_model_is_one_of_the_hub(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model.make_model(tmp_path / "runs" / "mine")

    def base(model: str, **settings: Any) -> str:
        same = {"start": {"weights": 64 * "a"}}
        return about_training(model, TWO, FinetuneSettings(**settings), same, 9, 1).base_model

    assert base("google/electra-base-discriminator") == "google/electra-base-discriminator"
    assert base("google/electra-base-discriminator", random_start=True) == ""
    assert base("tiny") == base("runs/mine") == base(str(tmp_path / "runs" / "mine")) == ""
