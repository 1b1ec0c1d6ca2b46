"""Configuration: frozen dataclasses with one line of documentation under each field.

`EncoderConfig` uses the Hub's field names. `PRESETS` holds the paper's sizes (Clark et al. 2020, table 6
and appendix A; google-research/electra, configure_pretraining.py) and our own `tiny`.
"""

from __future__ import annotations

import dataclasses
import difflib
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from electra_core.errors import UserError

OBJECTIVES = ("electra", "mlm", "replace-mlm", "all-tokens-mlm", "electra-15")
OWN_OBJECTIVES: list[str] = []
"""Names of the objectives that this program has added (`objectives.register`)."""


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of one transformer encoder (a generator or a discriminator).

    Raises:
        ValueError: a size, probability or epsilon of another type or out of its range.
    """

    vocab_size: int = 30522
    """Tokens in the vocabulary (V)."""
    embedding_size: int = 768
    """Width of the embeddings (E); projected to hidden_size where they differ."""
    hidden_size: int = 768
    """Width of the encoder (D)."""
    num_hidden_layers: int = 12
    """Number of transformer layers."""
    num_attention_heads: int = 12
    """Attention heads (H); each is hidden_size / num_attention_heads wide (K)."""
    intermediate_size: int = 3072
    """Width inside the feed-forward block (F)."""
    max_position_embeddings: int = 512
    """Number of positions, so the longest sequence in tokens."""
    type_vocab_size: int = 2
    """Number of segment types."""
    hidden_dropout_prob: float = 0.1
    """Dropout on embeddings and on both residual branches of a layer."""
    attention_probs_dropout_prob: float = 0.1
    """Dropout on attention probabilities."""
    initializer_range: float = 0.02
    """Standard deviation of the truncated normal that weights start from."""
    layer_norm_eps: float = 1e-12
    """Epsilon, added to the variance in LayerNorm."""
    pad_token_id: int = 0
    """Id of [PAD]; kept for the Hub's config.json, never used inside the model."""

    def __post_init__(self) -> None:
        make_plain(self, ValueError)
        for name in SIZES:
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
            if expected := beyond(self, name):
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number from 0 to below 1, got {getattr(self, name)!r:.80}")
        for name in ("initializer_range", "layer_norm_eps"):
            if not 0 <= getattr(self, name) <= LARGEST:
                raise ValueError(
                    f"{name}: expected a finite number from 0 to {LARGEST:.2g}, got {getattr(self, name)!r:.80}"
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} does not divide hidden_size {self.hidden_size}"
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head (K)."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides a pre-training run besides its data; saved with the run as config.toml."""

    model: str = "small"
    """Name of the preset that the other defaults came from."""
    objective: str = "electra"
    """Training objective: electra | mlm | replace-mlm | all-tokens-mlm | electra-15 (the paper's section 3.5)."""
    steps: int = 1_000_000
    """Optimizer steps."""
    batch_size: int = 128
    """Sequences per step, over all ranks and accumulation steps together."""
    max_length: int = 128
    """Maximum number of tokens per example, including [CLS] and [SEP]."""
    one_segment_probability: float = 0.1
    """Probability that an example is one segment, though there is text for two: [CLS] a [SEP] b [SEP]."""
    accumulate: int = 1
    """Parts in which each rank computes its share of the batch, to save memory; 0: as few as fit."""
    mask_fraction: float = 0.15
    """Fraction of an example's tokens that are masked."""
    learning_rate: float = 5e-4
    """Peak learning rate of Adam; lr(t) = peak (1 - t/steps) min(1, t/warmup)."""
    warmup_steps: int = 10_000
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay, not applied to biases and LayerNorm."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment."""
    adam_epsilon: float = 1e-6
    """Epsilon, added to the root of the second moment."""
    optimizer: str = "electra-adam"
    """Optimizer: electra-adam (the original's, no bias correction) | adamw | muon (for hidden matrices)."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of Muon's matrices, with --optimizer muon."""
    clip_norm: float = 1.0
    """Maximum global gradient norm, to which gradients are clipped."""
    generator_weight: float = 1.0
    """Weight of the generator's MLM loss."""
    discriminator_weight: float = 50.0
    """Weight of the RTD loss (lambda in the paper)."""
    temperature: float = 1.0
    """Softmax temperature of the generator's draws."""
    disallow_correct: bool = False
    """Draw only tokens that differ from the original."""
    uniform_generator: bool = False
    """Replace with uniformly random tokens; the generator is not used."""
    tying: str = "embeddings"
    """What generator and discriminator share: none | embeddings | all | disentangled (DeBERTaV3)."""
    generator_hidden_size: int = 64
    """Width of the generator's encoder; with another --hidden-size, the preset's fraction of it."""
    generator_attention_heads: int = 1
    """Attention heads of the generator."""
    generator_intermediate_size: int = 256
    """Feed-forward width of the generator."""
    generator_layers: int = 12
    """Layers of the generator (the paper keeps the discriminator's depth, and so do its presets)."""
    embedding_init: str = "normal"
    """Initial embeddings: normal (as in the original) | cooccurrence (word vectors counted from the corpus)."""
    position_init: str = "normal"
    """Initial positions: normal (as in the original) | sinusoidal | local (heads start on neighbouring tokens)."""
    seed: int = 0
    """Seed; every random choice of the run is a function of it and the step."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints of the training state."""
    keep_checkpoints: int = 2
    """Number of the newest checkpoints that stay on disk; 0: the newest until the run has finished, then none."""
    eval_every: int = 2_500
    """Steps between evaluations on held-out text."""
    eval_examples: int = 512
    """Held-out examples per evaluation."""
    log_every: int = 100
    """Steps between rows of metrics.jsonl."""
    precision: str = "auto"
    """Precision of products: auto (bf16 where the machine computes in it) | bf16 | fp32."""
    engine: str = "auto"
    """How steps run: auto (the fastest that works) | eager | static | compile | graph (a CUDA graph per step)."""
    recompute: bool = False
    """Recompute layers in the backward pass instead of keeping their values: less memory, a third more work."""
    sharding: str = "none"
    """On several processes: none (each holds the whole model) | fsdp (each stores a part of it; FSDP2)."""

    def __post_init__(self) -> None:
        make_plain(self, UserError)
        if self.objective not in OWN_OBJECTIVES:
            own = "; an objective of one's own exists only in the program that registers it: resume its run there"
            _one_of("objective", self.objective, OBJECTIVES, own)
        _one_of("sharding", self.sharding, ("none", "fsdp"))
        if self.sharding == "fsdp" and self.optimizer == "muon":
            raise UserError("sharding: fsdp splits matrices, and muon needs them whole; use electra-adam or adamw")
        _one_of("tying", self.tying, ("embeddings", "disentangled", "none", "all"))
        _one_of("optimizer", self.optimizer, ("electra-adam", "adamw", "muon"))
        _one_of("position_init", self.position_init, ("normal", "sinusoidal", "local"))
        _one_of("embedding_init", self.embedding_init, ("normal", "cooccurrence"))
        _one_of("engine", self.engine, ("auto", "eager", "static", "compile", "graph"))
        _one_of("precision", self.precision, ("auto", "bf16", "fp32"))
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if expected := beyond(self, name):
                raise UserError(f"{name}: expected {expected}, got {value!r:.80}")
        for name, least in LEAST.items():
            if not getattr(self, name) >= least:
                raise UserError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ABOVE_ZERO:
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}: expected a number from 0 to below 1, got {getattr(self, name)}")
        if not 0 <= self.one_segment_probability <= 1:
            raise UserError(
                f"one_segment_probability: expected a number from 0 to 1, got {self.one_segment_probability}"
            )
        if not 0 < self.mask_fraction < 0.5:  # above, short examples have too few tokens to mask
            raise UserError(f"mask_fraction: expected a number between 0 and 0.5, got {self.mask_fraction}")
        if self.generator_hidden_size % self.generator_attention_heads:
            raise UserError(
                f"generator_attention_heads: expected a divisor of generator_hidden_size "
                f"{self.generator_hidden_size}, got {self.generator_attention_heads}"
            )

    @property
    def max_predictions(self) -> int:
        """Maximum number of masked positions per example, as in the original (19 for 128 tokens at 15%)."""
        return max(1, int((self.mask_fraction + 0.005) * self.max_length))


@dataclass(frozen=True)
class Preset:
    """A named size: the discriminator's encoder and how it is pre-trained."""

    discriminator: EncoderConfig
    pretrain: PretrainConfig

    def generator(self) -> EncoderConfig:
        """The generator that goes with it: the same embeddings, a narrower encoder."""
        return generator_config(self.discriminator, self.pretrain)


def generator_config(discriminator: EncoderConfig, pretrain: PretrainConfig) -> EncoderConfig:
    """The discriminator's config, with the generator's own widths and depth.

    Raises:
        ValueError: arguments that are not the two configurations.
    """
    check_config("config", discriminator, EncoderConfig)
    check_config("pretrain", pretrain, PretrainConfig)
    return replace(discriminator, **{name: getattr(pretrain, ours) for name, ours in GENERATOR_SIZES.items()})


GENERATOR_SIZES = {
    "hidden_size": "generator_hidden_size", "num_attention_heads": "generator_attention_heads",
    "intermediate_size": "generator_intermediate_size", "num_hidden_layers": "generator_layers",
}  # fmt: skip
"""Sizes that a generator has for itself -> their names in `PretrainConfig`."""


# What settings may be ---------------------------------------------------------------------------------------

LEAST = {
    "seed": 0, "steps": 1, "batch_size": 1, "max_length": 8, "accumulate": 0, "warmup_steps": 0,
    "checkpoint_every": 1, "keep_checkpoints": 0, "eval_every": 1, "eval_examples": 1, "log_every": 1,
    "weight_decay": 0, "generator_weight": 0, "discriminator_weight": 0,
    **dict.fromkeys(GENERATOR_SIZES.values(), 1),
}  # fmt: skip
"""Lower bounds of a run's settings."""
ABOVE_ZERO = ("learning_rate", "muon_learning_rate", "adam_epsilon", "temperature", "clip_norm")
"""Settings that have to be greater than 0."""
LARGEST = 3.4028234663852886e38
"""The largest number of fp32, in which settings are computed with."""
SIZES = (
    "vocab_size", "embedding_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size", "max_position_embeddings", "type_vocab_size",
)  # fmt: skip
"""Sizes of an encoder, each at least 1."""
OF_ARRAYS = (*SIZES, *GENERATOR_SIZES.values(), "batch_size")
"""Settings whose products have to be sizes of arrays."""


def _one_of(name: str, value: str, allowed: tuple[str, ...], hint: str = "") -> None:
    if value not in allowed:
        near = _nearest(value, allowed) or hint
        raise UserError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}{near}")


def _nearest(word: str, known: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def plain(value: Any) -> Any:
    """A number of NumPy's or torch's as Python's, which every format can hold; anything else as it is."""
    if type(value).__module__ == "builtins" or not callable(getattr(value, "item", None)):
        return value
    try:
        return value.item()
    except (ValueError, RuntimeError):  # several numbers
        return value


def make_plain(config: Any, error: type[Exception]) -> None:
    """Puts the values of a dataclass of settings into Python's own types, in its `__post_init__`.

    An int given for a float becomes one where no file of settings could hold it (TOML's have 64 bits).

    Raises:
        error: a value of another type than the default's; for a float, an int will do.
    """
    for field in dataclasses.fields(config):
        value, kind = plain(getattr(config, field.name)), type(field.default)
        is_bool = isinstance(value, bool)
        if is_bool != (kind is bool) or not isinstance(value, (float, int) if kind is float else kind):
            raise error(f"{field.name}: {_another_type(kind, value)}")
        if kind is float and isinstance(value, int) and _is_wider(value, 64):
            with suppress(OverflowError):  # too large for that, too: `beyond` says so
                value = float(value)
        object.__setattr__(config, field.name, value)


def beyond(config: Any, name: str) -> str | None:
    """What a setting, a field of a dataclass, should be instead of a number that is not finite, or too large to
    compute with; None: all is well."""
    value, kind = getattr(config, name), type(getattr(type(config), name))
    bits = 32 if name in OF_ARRAYS else 64
    if kind is float and isinstance(value, float | int) and not abs(value) <= LARGEST:
        return f"a finite number, at most {LARGEST:.2g}"
    if kind is int and isinstance(value, int) and _is_wider(value, bits):
        return f"a whole number of {bits} bits"
    return None


def _is_wider(value: int, bits: int) -> bool:
    return not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)


def _another_type(kind: type, value: object) -> str:
    return f"expected a value of type {kind.__name__}, got {value!r:.80} ({type(value).__name__})"


def check_config(name: str, value: object, kind: type) -> None:
    """Raises ValueError unless the argument `name` is a configuration of this kind."""
    if not isinstance(value, kind):
        half = "discriminator" if kind is EncoderConfig else "pretrain"
        raise ValueError(
            f"{name}: expected an object of class {kind.__name__}, as PRESETS['small'].{half} is one, "
            f"got {type(value).__name__}"
        )


def _encoder(layers: int, hidden: int, embedding: int | None = None, **more: Any) -> EncoderConfig:
    """An encoder of the paper's proportions: heads 64 wide, feed-forward four times the hidden size."""
    sizes: dict[str, Any] = {"num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden} | more
    return EncoderConfig(num_hidden_layers=layers, hidden_size=hidden, embedding_size=embedding or hidden, **sizes)


def _generator(hidden: int, layers: int = 12) -> dict[str, Any]:
    return {
        "generator_hidden_size": hidden,
        "generator_attention_heads": hidden // 64,
        "generator_intermediate_size": 4 * hidden,
        "generator_layers": layers,
    }


_LONG: dict[str, Any] = {"max_length": 512, "learning_rate": 2e-4}
_SMALL = _encoder(12, 256, 128)

PRESETS: dict[str, Preset] = {
    # Ours, for a CPU; docs/tiny_history.md tells how it was found. No dropout, because it sees no text often.
    # A discriminator this small learns more from coarser errors than the paper's temperature of 1 produces.
    "tiny": Preset(
        _encoder(
            4, 128, vocab_size=8192, num_attention_heads=4, initializer_range=0.04,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        PretrainConfig(
            model="tiny", steps=20_000, batch_size=16, learning_rate=1e-3, warmup_steps=50, adam_beta2=0.98,
            weight_decay=0.05, temperature=1.5, optimizer="muon", muon_learning_rate=0.01,
            embedding_init="cooccurrence", position_init="local",
            generator_hidden_size=32, generator_attention_heads=2, generator_intermediate_size=128,
            generator_layers=1, checkpoint_every=1_000, eval_every=500,
        ),
    ),
    "small": Preset(_SMALL, PretrainConfig(model="small", **_generator(64))),
    # What was released as "Small": a generator as wide as the discriminator, sequences four times as long, four
    # times the steps (docs/deviations.md has the source of each).
    "small++": Preset(
        _SMALL, PretrainConfig(model="small++", steps=4_000_000, max_length=512, **_generator(256))
    ),
    "base": Preset(
        _encoder(12, 768),
        PretrainConfig(model="base", steps=766_000, batch_size=256, **_LONG, **_generator(256)),
    ),
    "large": Preset(
        _encoder(24, 1024),
        PretrainConfig(
            model="large", steps=1_750_000, batch_size=2048, mask_fraction=0.25, **_LONG, **_generator(256, 24)
        ),
    ),
}  # fmt: skip


Config = TypeVar("Config")


def updated(config: Config, changes: dict[str, Any], where: str) -> Config:
    """`config` with `changes`, each key known and of the right type.

    Args:
        where: where the changes came from, for the message ("run.toml").

    Raises:
        UserError: an unknown key (the nearest known one is suggested) or a value of another type.
    """
    kinds = {field.name: type(field.default) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    checked = {}
    for key, value in changes.items():
        name = key.replace("-", "_")
        if name not in kinds:
            raise UserError(f"{where}: unknown key {key!r}{_nearest(name, list(kinds))}")
        value = plain(value)
        if kinds[name] is float and type(value) is int:
            with suppress(OverflowError):  # too large, which the class itself says
                value = float(value)
        if type(value) is not kinds[name] and not (kinds[name] is float and type(value) is int):
            raise UserError(f"{where}: {key}: {_another_type(kinds[name], value)}")
        checked[name] = value
    try:
        return replace(config, **checked)  # type: ignore[type-var]
    except (ValueError, UserError) as error:
        raise UserError(f"{where}: {error}") from None
