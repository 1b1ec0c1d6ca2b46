"""Models of every kind that the Hub knows, with random weights, for tests of model directories."""

from __future__ import annotations

from typing import Any

import torch

from electra_core import pretrained
from electra_core.config import EncoderConfig
from electra_core.hub import layout as hub_layout
from electra_core.initialisation import initialise

SAME = EncoderConfig(
    vocab_size=60, embedding_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=12,
)  # fmt: skip

PROJECTED = EncoderConfig(
    vocab_size=60, embedding_size=8, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
    intermediate_size=40, max_position_embeddings=12,
)  # fmt: skip

CLASSES: dict[str, Any] = {
    hub_layout.architecture(kind): kind
    for kind in (
        pretrained.Discriminator, pretrained.Generator, pretrained.SequenceClassifier, pretrained.TokenClassifier,
        pretrained.QuestionAnswerer, pretrained.MultipleChoice,
    )
}  # fmt: skip

LABELS = ("no", "perhaps", "yes")


def make(name: str, config: EncoderConfig = PROJECTED, seed: int = 0) -> Any:
    """A model of the Hub's kind `name` with random weights, large enough that all of them matter."""
    labels = {"labels": LABELS} if "SequenceC" in name or "TokenC" in name else {}
    model = CLASSES[name](config, **labels)
    initialise(model, 0.3, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()
