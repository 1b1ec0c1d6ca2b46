"""The objectives that the paper compares ELECTRA with (section 3.5, table 5), with the same interface.

| objective | input text | prediction | where |
|---|---|---|---|
| `mlm` (BERT) | with [MASK] | the original token | masked positions |
| `replace-mlm` | with the generator's draws | the original token | masked positions |
| `all-tokens-mlm` | with the generator's draws | the original token, with a copy mechanism | every token |
| `electra-15` | with the generator's draws | replaced or not | masked positions |
| `electra` | with the generator's draws | replaced or not | every token |

The model that is kept and fine-tuned is called `discriminator` in each, so that the training loop, checkpoints and
directories are the same. Where it predicts tokens, its loss has weight 1: the paper's 50 makes up for the small
size of a binary loss. `PretrainOutput.rtd_loss` and `rtd_logits_T` are then 0, except that the copy mechanism
returns its own decision (copy or not) as these logits. As in `Electra`, the losses of a step's parts add up to the
whole batch's.

`register` adds an objective of one's own (docs/changing.md).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from electra_kernels import mlm_head
from electra_kernels.rng import Seed
from torch import Tensor, nn

from electra_core.config import OBJECTIVES, OWN_OBJECTIVES, EncoderConfig, PretrainConfig, generator_config
from electra_core.electra import (
    FORWARDS,
    Electra,
    Generator,
    PretrainBatch,
    PretrainOutput,
    check_pretrain_batch,
    discriminator_encoder,
    replace_tokens,
)
from electra_core.initialisation import initialise
from electra_core.linear import calls_just, is_unchanged
from electra_core.packing import TokenBatch


def build_objective(config: EncoderConfig, pretrain: PretrainConfig) -> nn.Module:
    """The model that `pretrain.objective` names: (PretrainBatch, seed) -> PretrainOutput.

    What an objective of one's own adds keeps what its constructor gave it, drawn from `pretrain.seed`; torch's own
    generator is left as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(pretrain.seed % 2**63)
        return objective_class(pretrain.objective)(config, pretrain)


def objective_class(name: str) -> Any:
    """The class of the objective of that name. Its `judges`, `predicts` and `has_generator` (see `Electra`) decide
    how it is evaluated and which FLOPs are counted."""
    ours = (Electra, Electra15, MaskedLM, ReplaceMLM, AllTokensMLM)
    return {kind.objective: kind for kind in ours}.get(name) or _own[name]


_own: dict[str, Any] = {}
Kind = TypeVar("Kind", bound=type[nn.Module])


def register(kind: Kind) -> Kind:
    """Makes an objective of one's own known by its class attribute `objective`, as a decorator.

    Then `PretrainConfig(objective=...)` and `pretrain(changes={"objective": ...})` know it, in this program.
    Held-out figures and FLOPs follow from its attributes `judges`, `predicts` and `has_generator`; a subclass of
    `Electra` inherits them. The best checkpoint is the one with the lowest `loss` on held-out text. Registering
    another class of the same name replaces the first.

    Raises:
        ValueError: no name of its own, or not one of these attributes.
    """
    name = vars(kind).get("objective")
    if not isinstance(name, str) or name in OBJECTIVES:
        raise ValueError(
            f"{kind.__name__}: expected a class attribute `objective` with a name of its own, got {name!r}"
        )
    for attribute, allowed in (
        ("judges", ("tokens", "masked", None)), ("predicts", ("tokens", "masked", None)),
        ("has_generator", (True, False)),
    ):  # fmt: skip
        if (value := getattr(kind, attribute, "nothing")) not in allowed:
            raise ValueError(f"{kind.__name__}.{attribute}: expected one of {allowed}, got {value!r}")
    _own[name] = kind
    if name not in OWN_OBJECTIVES:
        OWN_OBJECTIVES.append(name)
    return kind


class Corrupted(NamedTuple):
    """A batch corrupted by the generator: steps 1 to 3 of `Electra.forward`."""

    tokens: TokenBatch
    """The text with the draws in it."""
    is_replaced_T: Tensor
    """bool [T]: where it differs from the original."""
    mlm_loss: Tensor
    """Scalar: the generator's own loss."""
    seed: Tensor
    """Dropout seed of the model that reads the text."""


def corrupt(generator: Generator, batch: PretrainBatch, config: PretrainConfig, seed: Seed) -> Corrupted:
    """Mask, generate, replace.

    Args:
        generator: fills the M masked positions.
        config: temperature, `disallow_correct`, `uniform_generator` of the draws.
        seed: decides draws and dropout, as in `Electra.forward`.

    Raises:
        ValueError: as `check_pretrain_batch`.
    """
    check_pretrain_batch(batch)
    token_seed, draw_seed = batch.seeds(seed)
    masked_text = batch.tokens.with_ids(batch.masked_ids_T)
    positions_M, originals_M = batch.masked_positions_M, batch.target_ids_M
    mlm = generator.fill(masked_text, positions_M, originals_M, config, token_seed, draw_seed)
    ids_T = replace_tokens(batch.tokens.input_ids_T, positions_M, mlm.sampled_ids_M)
    is_replaced_T = ids_T != batch.tokens.input_ids_T
    mlm_loss = batch.mean_over_masked(mlm.loss_M)
    return Corrupted(batch.tokens.with_ids(ids_T), is_replaced_T, mlm_loss, token_seed)


class Electra15(Electra):
    """ELECTRA with the discriminator's loss at the masked positions alone."""

    objective, judges = "electra-15", "masked"

    def forward(self, batch: PretrainBatch, seed: Seed) -> PretrainOutput:
        """One step's losses; `rtd_loss` is the mean over the M masked positions."""
        text = corrupt(self.generator, batch, self.config, seed)
        positions_M = batch.masked_positions_M
        weights_T = torch.zeros(batch.tokens.num_tokens, device=text.is_replaced_T.device)
        weights_T[positions_M] = 1.0 if batch.masked_weights_M is None else batch.masked_weights_M
        judged = weights_T if len(positions_M) else None  # a mean of nothing is NaN
        head = self.discriminator.judge(text.tokens, text.is_replaced_T, judged, text.seed)
        rtd = head.loss * (batch.masked_share if len(positions_M) else 0.0)
        loss = self.config.generator_weight * text.mlm_loss + self.config.discriminator_weight * rtd
        ids_T = text.tokens.input_ids_T
        return PretrainOutput(loss, text.mlm_loss, rtd, ids_T, text.is_replaced_T, head.logits_T)


class MaskedLM(nn.Module):
    """BERT: one model of the discriminator's size, without a generator."""

    objective, judges, predicts, has_generator = "mlm", None, "masked", False

    def __init__(self, config: EncoderConfig, pretrain: PretrainConfig):
        super().__init__()
        self.config = pretrain
        self.discriminator = Generator(config, Generator.encoder_class(config))
        initialise(self, config.initializer_range, pretrain.seed, pretrain.position_init)

    @property
    def generator(self) -> Generator:
        """The same model: it is the run's masked language model, too."""
        return self.discriminator

    def forward(self, batch: PretrainBatch, seed: Seed) -> PretrainOutput:
        """One step's loss, which is also `word_loss` and `mlm_loss`: the mean over the M masked positions."""
        check_pretrain_batch(batch)
        masked_text = batch.tokens.with_ids(batch.masked_ids_T)
        token_seed, _ = batch.seeds(seed)
        loss = batch.mean_over_masked(word_losses(self.discriminator, masked_text, batch, token_seed))
        nothing_T = torch.zeros(batch.tokens.num_tokens, device=loss.device)
        no_rtd = loss.new_zeros(())
        return PretrainOutput(loss, loss, no_rtd, batch.masked_ids_T, nothing_T > 0, nothing_T, loss)


class ReplaceMLM(nn.Module):
    """Masked language modelling on text in which a generator's draws replace [MASK]."""

    objective: ClassVar[str] = "replace-mlm"
    judges: ClassVar[str | None] = None
    predicts: ClassVar[str | None] = "masked"
    has_generator: ClassVar[bool] = True

    def __init__(self, config: EncoderConfig, pretrain: PretrainConfig):
        super().__init__()
        self.config = pretrain
        for_generator = generator_config(config, pretrain)
        kind = Generator.encoder_class
        self.generator = Generator(for_generator, kind(for_generator))
        encoder = discriminator_encoder(config, pretrain, self.generator.encoder, kind)
        self.discriminator = Generator(config, encoder)
        initialise(self, config.initializer_range, pretrain.seed, pretrain.position_init)

    def forward(self, batch: PretrainBatch, seed: Seed) -> PretrainOutput:
        """One step's losses; `word_loss` is the mean over the M masked positions."""
        text = corrupt(self.generator, batch, self.config, seed)
        word_loss = batch.mean_over_masked(word_losses(self.discriminator, text.tokens, batch, text.seed))
        return self._output(text, word_loss, torch.zeros_like(text.is_replaced_T, dtype=torch.float32))

    def _output(self, text: Corrupted, word_loss: Tensor, rtd_logits_T: Tensor) -> PretrainOutput:
        loss = self.config.generator_weight * text.mlm_loss + word_loss
        no_rtd, ids_T = loss.new_zeros(()), text.tokens.input_ids_T
        return PretrainOutput(loss, text.mlm_loss, no_rtd, ids_T, text.is_replaced_T, rtd_logits_T, word_loss)


class AllTokensMLM(ReplaceMLM):
    """Predicts the original of every token in the generator's text, with a copy mechanism:

    p(w at t) = c_t [w = input token t] + (1 - c_t) softmax_t(w),   c_t = sigmoid(copy . h_t)
    """

    objective, predicts = "all-tokens-mlm", "tokens"

    def __init__(self, config: EncoderConfig, pretrain: PretrainConfig):
        super().__init__(config, pretrain)
        self.copy_head = nn.Linear(config.hidden_size, 1)
        initialise(self, config.initializer_range, pretrain.seed, pretrain.position_init)  # again, with this head

    def forward(self, batch: PretrainBatch, seed: Seed) -> PretrainOutput:
        """One step's losses; `word_loss` is the mean over all T tokens."""
        text = corrupt(self.generator, batch, self.config, seed)
        model = self.discriminator
        hidden_TD = model.encoder(text.tokens, text.seed)
        originals_T = batch.tokens.input_ids_T
        if is_unchanged(model, FORWARDS[Generator]):  # a FLOP counter's hooks shall not find a second reading
            losses_T = _losses(model, model.generator_predictions(hidden_TD), originals_T, text.seed)
        else:  # somebody's own, which reads the text once more
            losses_T = _losses_of_logits(model(text.tokens, seed=text.seed), originals_T)
        copy_T = self.copy_head(hidden_TD).squeeze(-1).float()
        # Logarithms throughout: log(1 - c) + log softmax, and where the token may be copied also log c.
        by_softmax_T = F.logsigmoid(-copy_T) - losses_T
        by_copy_T = torch.logaddexp(F.logsigmoid(copy_T), by_softmax_T)
        loss_T = -torch.where(text.is_replaced_T, by_softmax_T, by_copy_T)
        return self._output(text, batch.mean_over_tokens(loss_T), -copy_T.detach())


def word_losses(model: Generator, text: TokenBatch, batch: PretrainBatch, seed: Tensor) -> Tensor:
    """[M]: cross-entropy of what `model` predicts from `text` at the masked positions with the original tokens."""
    positions_M, originals_M = batch.masked_positions_M, batch.target_ids_M
    if calls_just(model, FORWARDS[Generator]):
        return _losses(model, model.features(text, positions_M, seed), originals_M, seed)
    return _losses_of_logits(model(text, positions_M, seed), originals_M)  # somebody's own


def _losses(model: Generator, features_ME: Tensor, originals_M: Tensor, seed: Tensor) -> Tensor:
    words_VE = model.encoder.embeddings.word_weight()
    head = mlm_head(features_ME, words_VE, model.output_bias, originals_M, seed=seed)
    return head.loss_M  # its draws are not used


def _losses_of_logits(logits_MV: Tensor, originals_M: Tensor) -> Tensor:
    return F.cross_entropy(logits_MV.float(), originals_M, reduction="none")
