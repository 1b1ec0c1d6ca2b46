"""Parameters and training FLOPs, counted in two ways that must never be mixed.

**The original's counting** (google-research/electra, flops_computation.py), used for the paper's figures:
a multiply-add is two operations; the backward pass costs as much as the forward pass, so
training is 2 x forward; an embedding lookup is a product with a one-hot vector, 2 E V; activations, softmax,
dropout and LayerNorm count too; every sequence is full, and 15.625% of its tokens reach the output softmax.

**Modern counting**, as for model FLOPs utilisation (MFU; Chowdhery et al. 2022, PaLM, appendix B): matrix
products alone, at 2 operations per multiply-add; the backward pass has two products for each one, so training is
3 x forward; lookups are free; the true fraction of masked tokens is counted.

Both count the layers of `encoder.py`, from a configuration. Layers of other classes (`Encoder.layer_class`)
differ, and with them a run's `mfu`; `electra flops` refuses their folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from electra_core.config import EncoderConfig, PretrainConfig, generator_config

# Operations per value, as the original counts them.
DROPOUT, LAYER_NORM, GELU, SOFTMAX = 4, 5, 8, 5
# Share of the tokens that are predicted, which the original uses for every run (Large really masks 25%).
ORIGINAL_OUTPUT_SHARE = 0.15625


@dataclass(frozen=True)
class Run:
    """The facts about a pre-training run that decide its FLOPs by the original's counting."""

    model: EncoderConfig
    """The model that is kept: ELECTRA's discriminator, or a masked language model."""
    generator: EncoderConfig | None
    """ELECTRA's generator; None for a masked language model."""
    steps: int
    batch_size: int
    max_length: int


def encoder_parameters(config: EncoderConfig) -> int:
    """Number of weights of an encoder with its embeddings."""
    e, d, f = config.embedding_size, config.hidden_size, config.intermediate_size
    embeddings = e * (config.vocab_size + config.max_position_embeddings + config.type_vocab_size) + 2 * e
    project = 0 if e == d else e * d + d
    layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d
    return embeddings + project + config.num_hidden_layers * layer


def discriminator_parameters(config: EncoderConfig) -> int:
    """Number of weights of a discriminator with its pre-training head."""
    d = config.hidden_size
    return encoder_parameters(config) + d * d + d + d + 1


def generator_parameters(config: EncoderConfig) -> int:
    """Number of weights of a masked language model whose output projection is tied to the word embeddings."""
    d, e = config.hidden_size, config.embedding_size
    return encoder_parameters(config) + d * e + e + 2 * e + config.vocab_size


def parameters(config: EncoderConfig, architecture: str) -> dict[str, int]:
    """Number of weights by name, of a model of the Hub's kind `architecture`; of a task model its encoder's."""
    if architecture == "ElectraForPreTraining":
        return {"discriminator_parameters": discriminator_parameters(config)}
    if architecture == "ElectraForMaskedLM":
        return {"generator_parameters": generator_parameters(config)}
    return {"encoder_parameters": encoder_parameters(config)}


# The original's counting -----------------------------------------------------------------------------------


def original_training_flops(run: Run) -> float:
    """FLOPs of a whole run by the original's counting."""
    sequences, length = run.batch_size * run.steps, run.max_length
    if run.generator is None:
        forward = _original_encoder(run.model, length) + _original_mlm_head(run.model, length)
    else:
        forward = _original_encoder(run.model, length) + _original_rtd_head(run.model, length)
        forward += _original_encoder(run.generator, length) + _original_mlm_head(run.generator, length)
    return 2 * sequences * forward


def _original_encoder(config: EncoderConfig, length: int) -> int:
    """Forward FLOPs of one sequence, embeddings included."""
    return length * (
        _original_embeddings(config, length) + config.num_hidden_layers * _original_layer(config, length)
    )


def _original_embeddings(config: EncoderConfig, length: int) -> int:
    """Per token: dense look-ups of word, position and segment, their sum, LayerNorm, dropout, projection."""
    e, d = config.embedding_size, config.hidden_size
    look_ups = 2 * e * config.vocab_size + 2 * e * (length + 2)
    project = 0 if e == d else 2 * d * e + d
    return look_ups + 2 * e + LAYER_NORM * e + DROPOUT * e + project


def _original_layer(config: EncoderConfig, length: int) -> int:
    """Per token. (The script counts the first LayerNorm as 5 operations for the whole token; kept.)"""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    scores = 2 * d * length + (SOFTMAX + DROPOUT + 1) * length * heads
    attention = 3 * (2 * d * d + d) + scores + 2 * d * length + 2 * d * d + d
    after_attention = DROPOUT * d + d + LAYER_NORM
    feed_forward = 2 * d * f + f + GELU * f + 2 * f * d + d
    after_feed_forward = DROPOUT * d + d + LAYER_NORM * d
    return attention + after_attention + feed_forward + after_feed_forward


def _original_mlm_head(config: EncoderConfig, length: int) -> float:
    """Per sequence: dense, GELU, LayerNorm, output projection, softmax, loss at the predicted tokens."""
    e, v = config.embedding_size, config.vocab_size
    dense = 2 * config.hidden_size * e + e + GELU * e + LAYER_NORM * e
    return ORIGINAL_OUTPUT_SHARE * length * (dense + 2 * e * v + SOFTMAX * v + 2 * v)


def _original_rtd_head(config: EncoderConfig, length: int) -> int:
    """Per sequence: dense, GELU and one output per token."""
    d = config.hidden_size
    return length * (2 * d * d + d + GELU * d + 2 * d)


# Modern counting --------------------------------------------------------------------------------------------


def forward_flops(config: EncoderConfig, tokens: float, pairs: float) -> float:
    """Matrix products of an encoder's forward pass.

    Args:
        tokens: T, padding not counted.
        pairs: sum of the sequences' squared lengths, the pairs of tokens that attention compares.
    """
    e, d, f = config.embedding_size, config.hidden_size, config.intermediate_size
    project = 0 if e == d else e * d
    per_token = project + config.num_hidden_layers * (4 * d * d + 2 * d * f)
    return 2 * (tokens * per_token + config.num_hidden_layers * 2 * pairs * d)


def mlm_head_flops(config: EncoderConfig, masked: float) -> float:
    """Matrix products of the masked-language-model head at `masked` positions, forward."""
    return 2 * masked * config.embedding_size * (config.hidden_size + config.vocab_size)


def rtd_head_flops(config: EncoderConfig, tokens: float) -> float:
    """Matrix products of the discriminator's head, forward."""
    return 2 * tokens * (config.hidden_size**2 + config.hidden_size)


def training_step_flops(model: EncoderConfig, pretrain: PretrainConfig) -> float:
    """FLOPs of one training step of full sequences by modern counting, with the heads of its objective.

    ELECTRA's discriminator judges all tokens; BERT and `replace-mlm` predict tokens at the masked positions,
    `all-tokens-mlm` at every position, which is most of its cost with a small model and a large vocabulary. With
    `uniform_generator`, the generator exists but does not run. What an objective of one's own computes besides is
    not counted. The MFU is this number divided by the step's seconds and the chip's peak FLOP/s.
    """
    objective = _objective(pretrain)
    tokens = float(pretrain.batch_size * pretrain.max_length)
    pairs, masked = tokens * pretrain.max_length, tokens * pretrain.mask_fraction
    forward = forward_flops(model, tokens, pairs)
    if objective.judges:
        forward += rtd_head_flops(model, tokens)
    if objective.predicts == "tokens":
        forward += mlm_head_flops(model, tokens) + 2 * tokens * model.hidden_size
    elif objective.predicts:
        forward += mlm_head_flops(model, masked)
    if objective.has_generator and not pretrain.uniform_generator:
        generator = generator_config(model, pretrain)
        forward += forward_flops(generator, tokens, pairs) + mlm_head_flops(generator, masked)
    return 3 * forward


# Runs -------------------------------------------------------------------------------------------------------


def run_of(model: EncoderConfig, pretrain: PretrainConfig) -> Run:
    """The run that a configuration describes, as ELECTRA's, or BERT's for `mlm`."""
    generator = generator_config(model, pretrain) if _objective(pretrain).has_generator else None
    return Run(model, generator, pretrain.steps, pretrain.batch_size, pretrain.max_length)


def _objective(pretrain: PretrainConfig) -> Any:
    from electra_core.objectives import objective_class  # torch takes seconds to import

    return objective_class(pretrain.objective)


def summary(
    model: EncoderConfig, pretrain: PretrainConfig | None = None, architecture: str = "ElectraForPreTraining"
) -> dict[str, float]:
    """What `electra flops` prints: parameters, and FLOPs if a pre-training run is given.

    The original's counting is given only for what its script covers: ELECTRA with its generator, and BERT.
    """
    figures: dict[str, float] = {
        **parameters(model, architecture),
        "forward_flops_per_token": forward_flops(model, 1, model.max_position_embeddings),
    }
    if pretrain is not None:
        run = run_of(model, pretrain)
        if run.generator is not None:
            figures["generator_parameters"] = generator_parameters(run.generator)
        if pretrain.objective in ("electra", "electra-15", "mlm") and not pretrain.uniform_generator:
            figures["training_flops_original_counting"] = original_training_flops(run)
        step = training_step_flops(model, pretrain)
        figures["training_flops_modern_counting"] = run.steps * step
        figures["modern_flops_per_step"] = step
    return figures
