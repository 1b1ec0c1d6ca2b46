"""The settings of a fine-tuning: one dataclass, with a line of documentation under each field."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from electra_core.config import EncoderConfig, beyond, make_plain
from electra_core.errors import UserError, option

MOST_EPOCHS = 1_000_000
"""Far beyond any use; the order of the examples is planned for all of them."""


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of a fine-tuning; 0 means the recipe's value (a negative number, where 0 is itself a setting)."""

    epochs: float = 3.0
    """Passes over the training data."""
    batch_size: int = 32
    """Examples per step."""
    tokens_per_batch: int = 0
    """Tokens per batch, instead of batch_size examples; 0: off."""
    accumulate: int = 1
    """Batches per step, whose gradients are added up."""
    learning_rate: float = 0.0
    """Peak learning rate; 0: 3e-4 up to hidden size 256, 1e-4 up to 768, 5e-5 beyond (paper, and Small)."""
    layerwise_decay: float = 0.0
    """Each layer's rate is this times that of the layer above; 0: 0.8, or 0.9 from hidden size 1024."""
    original_depths: bool = False
    """Decay by layer as in the original's code: the top layer at the square of the factor."""
    warmup: float = 0.1
    """Fraction of the steps in which the rate rises from 0 to its peak, then falling linearly to 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay, not applied to biases and LayerNorm."""
    optimizer: str = "electra-adam"
    """Optimizer: electra-adam (the original's, no bias correction) | adamw."""
    clip_norm: float = 1.0
    """Maximum global gradient norm, to which gradients are clipped."""
    dropout: float = -1.0
    """Dropout in encoder and head; negative: as in pre-training."""
    max_length: int = 0
    """Maximum number of tokens per sequence; 0: the task's (128; tagging 256; questions and IMDb 512)."""
    truncate: str = ""
    """Part of longer texts to keep: head | tail | both; empty: the task's (head)."""
    class_weights: bool = False
    """Weight classes by the inverse of their frequency."""
    freeze: str = "none"
    """What is not trained: none | embeddings | encoder | a number N (embeddings and the N lowest layers)."""
    evaluations: int = 1
    """Evaluations on the dev data per epoch."""
    metric: str = ""
    """Metric that chooses the best model, as in metrics.json (accuracy, macro_f1, ...); empty: the task's."""
    patience: int = 0
    """Stop after this many evaluations without improvement; 0: never."""
    seeds: int = 1
    """Number of training runs, with seeds `seed`, `seed` + 1 and so on."""
    seed: int = 0
    """Seed of the head's initial weights, data order and dropout, but not of which examples are held out."""
    random_start: bool = False
    """Start from random weights, drawn as in the original: the baseline for pre-training."""
    skip_bad_rows: bool = False
    """Count unusable rows instead of stopping at them."""
    precision: str = "auto"
    """Precision of products: auto (bf16 where the machine computes in it) | bf16 | fp32."""
    engine: str = "auto"
    """How steps run: auto (the fastest that works) | eager | static | graph (a CUDA graph per step)."""
    log_every: int = 20
    """Steps between rows of metrics.jsonl."""
    checkpoint_every: int = 0
    """Steps between checkpoints for --resume, besides those at evaluations; 0: only those."""

    def __post_init__(self) -> None:
        from electra_core.labelled_data.features import TRUNCATIONS  # imports torch: too slow for --help

        object.__setattr__(self, "freeze", str(self.freeze))  # may be an int in Python
        make_plain(self, UserError)
        positive, not_negative = "a number above 0", "a number from 0"
        checks = {
            "epochs": (0 < self.epochs < math.inf, positive),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "tokens_per_batch": (self.tokens_per_batch >= 0, not_negative),
            "accumulate": (self.accumulate >= 1, "at least 1"),
            "learning_rate": (0 <= self.learning_rate < math.inf, not_negative),
            "layerwise_decay": (0 <= self.layerwise_decay <= 1, "a number from 0 to 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, not_negative),
            "clip_norm": (self.clip_norm > 0, positive),
            "patience": (self.patience >= 0, not_negative),
            "evaluations": (self.evaluations >= 1, "at least 1"),
            "seeds": (self.seeds >= 1, "at least 1"),
            "max_length": (self.max_length == 0 or self.max_length >= 8, "at least 8, or 0 for the task's"),
            "warmup": (0 <= self.warmup < 1, "a number from 0 to below 1"),
            "dropout": (self.dropout < 1, "a number below 1"),
            "log_every": (self.log_every >= 1, "at least 1"),
            "checkpoint_every": (self.checkpoint_every >= 0, not_negative),
            "truncate": _one_of(self.truncate, *TRUNCATIONS, ""),
            "optimizer": _one_of(self.optimizer, "electra-adam", "adamw"),
            "precision": _one_of(self.precision, "auto", "bf16", "fp32"),
            "engine": _one_of(self.engine, "auto", "eager", "static", "graph"),
            "freeze": (
                self.freeze in ("none", "embeddings", "encoder") or self.freeze.isdecimal(),
                "none, embeddings, encoder or a number of layers",
            ),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise UserError(f"{option(name)}: expected {expected}, got {getattr(self, name)!r}")
        for name, value in asdict(self).items():
            if what := beyond(self, name):
                raise UserError(f"{option(name)}: expected {what}, got {value!r:.80}")
        if self.epochs > MOST_EPOCHS:
            raise UserError(f"{option('epochs')}: expected at most {MOST_EPOCHS:,}, got {self.epochs!r}")

    def resolved(self, config: EncoderConfig) -> FinetuneSettings:
        """The settings with the recipe's values for a model of this size; `max_length` within its positions."""
        width = config.hidden_size
        rate = 3e-4 if width <= 256 else 1e-4 if width < 1024 else 5e-5
        decay = 0.9 if width >= 1024 else 0.8
        return replace(
            self,
            learning_rate=self.learning_rate or rate,
            layerwise_decay=self.layerwise_decay or decay,
            max_length=min(self.max_length, config.max_position_embeddings),
        )


def _one_of(value: str, *allowed: str) -> tuple[bool, str]:
    """Whether `value` is allowed, and the message if it is not."""
    return value in allowed, f"one of {', '.join(filter(None, allowed))}"
