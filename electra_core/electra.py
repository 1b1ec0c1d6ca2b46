"""ELECTRA: a generator, a discriminator, and the pre-training step of the paper.

Clark, Luong, Le, Manning: "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators",
ICLR 2020. `Electra.forward` is section 2, line by line:

1. mask     x_masked: some positions m of the text x become [MASK]          (`masking.py`, with the data)
2. generate p_G(x_t | x_masked) = softmax(e(x_t) . h_G(x_masked)_t)         at t in m
3. replace  x_corrupt: x with a draw from p_G at the positions m
4. detect   D(x_corrupt, t) = sigmoid(w . h_D(x_corrupt)_t)                 at every t
5. losses   L_MLM = mean over m of -log p_G(x_t | x_masked)
            L_Disc = mean over all t of BCE(D(x_corrupt, t), x_corrupt_t != x_t)
            minimise  L_MLM + lambda L_Disc,  lambda = 50

In three points this follows the original's code rather than section 2: there D is the probability that the token
is original, both losses are sums, and h_G and h_D go straight into softmax and sigmoid, where the code has a dense
layer first (the first table of `docs/deviations.md`).

No gradient flows from the discriminator into the generator through the draw, which is discrete; the two gradients
do meet in the embeddings, which both share (`config.PretrainConfig.tying`). `objectives.py` has the paper's other
objectives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from electra_kernels import MLMHead, RTDHead, mlm_head, rtd_head, rtd_loss_and_counts, sample_and_replace
from electra_kernels.operators import without_autocast
from electra_kernels.rng import Seed, philox, seed_tensor, uniform
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from electra_core.config import EncoderConfig, PretrainConfig, generator_config
from electra_core.encoder import DisentangledEmbeddings, Embeddings, Encoder
from electra_core.initialisation import initialise, started
from electra_core.linear import Linear, by_its_parts, calls_just
from electra_core.packing import PretrainBatch, TokenBatch, check_pretrain_batch

# Streams of random numbers: the discriminator's encoder starts here (the generator's at 0), and the draws.
DISCRIMINATOR_STREAM, SAMPLING_STREAM = 1 << 16, 1 << 20


@dataclass(frozen=True)
class PretrainOutput:
    """Result of one pre-training forward pass; the losses carry gradients, the rest does not."""

    loss: Tensor
    """Scalar: generator_weight L_MLM + discriminator_weight L_Disc."""
    mlm_loss: Tensor
    """Scalar: mean over the M masked positions, in nats."""
    rtd_loss: Tensor
    """Scalar: mean over all T tokens, in nats."""
    corrupted_ids_T: Tensor
    """int64 [T]: the text the discriminator read."""
    is_replaced_T: Tensor
    """bool [T]: where that differs from the original."""
    rtd_logits_T: Tensor
    """[T]: positive means "replaced"."""
    word_loss: Tensor | None = None
    """Scalar: loss of the model that is kept, if its objective predicts tokens (objectives.py)."""
    more: dict[str, Tensor] = field(default_factory=dict)
    """Further scalars for the log and the evaluation, by name, as an objective of one's own has them. Like losses,
    they are this part's contributions, which add up; what is no part of `loss` is detached."""


# DDP with a static graph attaches its hooks to the tensors in a model's output. Unregistered, this class would
# hide them, and gradients would not be averaged.
register_dataclass(PretrainOutput)


class GeneratorPredictions(nn.Module):
    """hidden -> embedding width, GELU, LayerNorm: the input of the tied output projection."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.embedding_size)
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """[M, D] -> [M, E], in the compute dtype: on a GPU, autocast would leave LayerNorm's result in fp32."""
        activation_ME = F.gelu(self.dense(hidden_MD))
        return self.LayerNorm(activation_ME).to(activation_ME.dtype)


class Generator(nn.Module):
    """A masked language model: encoder, head, and an output projection tied to the word embeddings.

    Without a given encoder the model is initialised from torch's random generator (`initialisation.started`).
    """

    encoder_class: ClassVar[type[Encoder]] = Encoder

    def __init__(self, config: EncoderConfig, encoder: Encoder | None = None):
        super().__init__()
        self.config = config
        self.encoder = encoder if encoder is not None else self.encoder_class(config)
        self.generator_predictions = GeneratorPredictions(config)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        if encoder is None:
            started(self)

    def features(self, tokens: TokenBatch, positions_M: Tensor, seed: Seed | None = None) -> Tensor:
        """[M, E]: input of the output projection, at `positions_M` only."""
        # index_select, because the gradient of indexing first sorts the positions, in case some are equal.
        return self.generator_predictions(self.encoder(tokens, seed).index_select(0, positions_M))

    def fill(
        self,
        masked_text: TokenBatch,
        positions_M: Tensor,
        originals_M: Tensor,
        config: PretrainConfig,
        token_seed: Seed,
        draw_seed: Seed,
    ) -> MLMHead:
        """Cross-entropy with the original tokens at the masked positions, and one token drawn for each."""
        if config.uniform_generator:
            return uniform_words(originals_M, self.config.vocab_size, draw_seed, config.disallow_correct)
        if not calls_just(self, FORWARDS[Generator]):  # but another `forward`, or hooks
            logits_MV = self(masked_text, positions_M, token_seed)
            loss_M = F.cross_entropy(logits_MV.float(), originals_M, reduction="none")
            return MLMHead(loss_M, drawn(logits_MV, originals_M, config, draw_seed))
        features_ME = self.features(masked_text, positions_M, token_seed)
        words_VE = self.encoder.embeddings.word_weight()
        mlm = mlm_head(
            features_ME, words_VE, self.output_bias, originals_M,
            seed=draw_seed, stream=SAMPLING_STREAM, temperature=config.temperature,
        )  # fmt: skip
        if not config.disallow_correct:
            return mlm
        with torch.no_grad(), without_autocast(features_ME):
            logits_MV = F.linear(features_ME.to(words_VE.dtype), words_VE, self.output_bias)
        return MLMHead(mlm.loss_M, drawn(logits_MV, originals_M, config, draw_seed))

    def forward(self, tokens: TokenBatch, positions_M: Tensor | None = None, seed: Seed | None = None) -> Tensor:
        """Logits over the vocabulary, [M, V]; at every token if `positions_M` is None. For
        evaluation and study; training uses `mlm_head`, which never stores them."""
        if positions_M is None:
            positions_M = torch.arange(tokens.num_tokens, device=tokens.input_ids_T.device)
        weight_VE = self.encoder.embeddings.word_weight()
        return F.linear(self.features(tokens, positions_M, seed), weight_VE, self.output_bias)


class DiscriminatorPredictions(nn.Module):
    """dense, GELU, and one output per token."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.dense_prediction = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """[T, D] -> [T]"""
        return self.dense_prediction(F.gelu(self.dense(hidden_TD))).squeeze(-1)

    def judge(self, hidden_TD: Tensor, is_replaced_T: Tensor, weights_T: Tensor | None = None) -> RTDHead:
        """`forward` and its loss together: everything after `dense` is a single operation."""
        last = self.dense_prediction
        if not calls_just(self, FORWARDS[DiscriminatorPredictions]) or not by_its_parts(last, nn.Linear):
            return judged(self(hidden_TD), is_replaced_T, weights_T)
        return rtd_head(self.dense(hidden_TD), last.weight.squeeze(0), last.bias, is_replaced_T, weights_T)


class Discriminator(nn.Module):
    """Predicts for every token whether it was replaced; its encoder is the one that is fine-tuned afterwards.

    Without a given encoder the model is initialised from torch's random generator (`initialisation.started`).
    """

    encoder_class: ClassVar[type[Encoder]] = Encoder

    def __init__(self, config: EncoderConfig, encoder: Encoder | None = None):
        super().__init__()
        self.config = config
        self.encoder = encoder if encoder is not None else self.encoder_class(config)
        self.discriminator_predictions = DiscriminatorPredictions(config)
        if encoder is None:
            started(self)

    def forward(self, tokens: TokenBatch, seed: Seed | None = None) -> Tensor:
        """[T]: logit that the token was replaced."""
        return self.discriminator_predictions(self.encoder(tokens, seed))

    def judge(
        self, tokens: TokenBatch, is_replaced_T: Tensor, weights_T: Tensor | None = None, seed: Seed | None = None
    ) -> RTDHead:
        """`forward`'s logits and their binary cross-entropy, as a mean or weighted mean over all tokens."""
        head = self.discriminator_predictions
        if not calls_just(self, FORWARDS[Discriminator]) or not isinstance(head, DiscriminatorPredictions):
            return judged(self(tokens, seed), is_replaced_T, weights_T)
        return head.judge(self.encoder(tokens, seed), is_replaced_T, weights_T)


FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (Generator, DiscriminatorPredictions, Discriminator)
}
"""What `fill` and `judge` compute by shorter ways. A model with hooks or another `forward` (of a subclass, or one
that somebody puts into the class, which is why ours are noted here) is called as it is, for its logits."""


def judged(logits_T: Tensor, is_replaced_T: Tensor, weights_T: Tensor | None = None) -> RTDHead:
    """What `judge` returns, of logits that are there already."""
    loss, counts = rtd_loss_and_counts(logits_T, is_replaced_T, weights_T)
    return RTDHead(loss, logits_T.detach().to(loss.dtype), counts)


class Electra(nn.Module):
    """Generator and discriminator with what they share, and the joint objective.

    A subclass that adds a loss takes its mean with the methods of `PretrainBatch`, which says why.

    Raises:
        ValueError: arguments that are not the two configurations; another objective
            (`objectives.build_objective`).
    """

    objective: ClassVar[str] = "electra"
    judges: ClassVar[str | None] = "tokens"
    """Where `rtd_logits_T` tells which are replaced: at all "tokens", the "masked" ones, or nowhere (None)."""
    predicts: ClassVar[str | None] = None
    """Where the model that is kept predicts words (`word_loss`), likewise."""
    has_generator: ClassVar[bool] = True
    """Whether the generator is another model than the one that is kept."""
    generator_class: ClassVar[type[Generator]] = Generator
    discriminator_class: ClassVar[type[Discriminator]] = Discriminator

    def __init__(self, config: EncoderConfig, pretrain: PretrainConfig):
        super().__init__()
        self.config = pretrain
        for_generator = generator_config(config, pretrain)
        if pretrain.objective != self.objective:
            raise ValueError(
                f"pretrain: expected the objective {self.objective!r}, got {pretrain.objective!r}, whose model "
                "objectives.build_objective(config, pretrain) makes; or give "
                f"dataclasses.replace(pretrain, objective={self.objective!r})"
            )
        of_generator = self.generator_class.encoder_class(for_generator)
        self.generator = self.generator_class(for_generator, of_generator)
        encoder = discriminator_encoder(config, pretrain, of_generator, self.discriminator_class.encoder_class)
        self.discriminator = self.discriminator_class(config, encoder)
        initialise(self, config.initializer_range, pretrain.seed, pretrain.position_init)

    def forward(self, batch: PretrainBatch, seed: Seed) -> PretrainOutput:
        """One pre-training step's losses, numbered as in the file's header; `seed` decides draws and dropout."""
        check_pretrain_batch(batch)
        token_seed, draw_seed = batch.seeds(seed)
        # 1. mask: done with the data.
        masked_text = batch.tokens.with_ids(batch.masked_ids_T)
        positions_M, originals_M = batch.masked_positions_M, batch.target_ids_M
        # 2. generate: at the masked positions, cross-entropy with the originals and one draw from the softmax.
        mlm = self.generator.fill(masked_text, positions_M, originals_M, self.config, token_seed, draw_seed)
        # 3. replace: the draws take the originals' places; one equal to the original counts as original.
        corrupted_ids_T = replace_tokens(batch.tokens.input_ids_T, positions_M, mlm.sampled_ids_M)
        is_replaced_T = corrupted_ids_T != batch.tokens.input_ids_T
        # 4. detect: the discriminator reads the corrupted text and judges every token.
        corrupted_text = batch.tokens.with_ids(corrupted_ids_T)
        rtd = self.discriminator.judge(corrupted_text, is_replaced_T, batch.token_weights_T, token_seed)
        # 5. losses
        mlm_loss = batch.mean_over_masked(mlm.loss_M)
        rtd_loss = rtd.loss * batch.token_share  # already the mean over this part's tokens; L_Disc of the header
        loss = self.config.generator_weight * mlm_loss + self.config.discriminator_weight * rtd_loss
        return PretrainOutput(loss, mlm_loss, rtd_loss, corrupted_ids_T, is_replaced_T, rtd.logits_T)


def drawn(logits_MV: Tensor, originals_M: Tensor, config: PretrainConfig, seed: Seed) -> Tensor:
    """int64 [M]: a token drawn from each row of logits, with `disallow_correct` never the original."""
    logits_MV = logits_MV.detach()
    if config.disallow_correct:
        logits_MV = logits_MV.scatter(1, originals_M[:, None], -torch.inf)
    every_M = torch.arange(len(originals_M), device=originals_M.device)  # the M originals as a text
    return sample_and_replace(
        logits_MV, originals_M, every_M, seed=seed, stream=SAMPLING_STREAM, temperature=config.temperature
    ).sampled_ids_M


def uniform_words(originals_M: Tensor, vocab_size: int, seed: Seed, disallow_correct: bool) -> MLMHead:
    """Uniformly drawn tokens and their cross-entropy: the baseline that a trained generator improves on."""
    rows_M = torch.arange(len(originals_M), device=originals_M.device)
    bits_M = philox(seed_tensor(seed, originals_M.device), torch.zeros_like(rows_M), rows_M, SAMPLING_STREAM)[0]
    drawn_M = (uniform(bits_M) * (vocab_size - disallow_correct)).long()
    if disallow_correct:
        drawn_M = drawn_M + (drawn_M >= originals_M)  # steps over the original
    return MLMHead(torch.full(drawn_M.shape, math.log(vocab_size), device=drawn_M.device), drawn_M)


def replace_tokens(input_ids_T: Tensor, positions_M: Tensor, sampled_ids_M: Tensor) -> Tensor:
    """The text with `sampled_ids_M` at `positions_M`; a draw of -1 (from NaN logits) keeps the original token."""
    sampled = torch.where(sampled_ids_M < 0, input_ids_T[positions_M], sampled_ids_M)
    return input_ids_T.index_copy(0, positions_M, sampled)


def discriminator_encoder(
    config: EncoderConfig, pretrain: PretrainConfig, generator: Encoder, kind: type[Encoder] = Encoder
) -> Encoder:
    """The discriminator's encoder, of this `kind`; it shares with the generator's what `tying` names."""
    if pretrain.tying == "all":
        if generator.config != config:
            raise ValueError("tying: 'all' needs a generator of the discriminator's sizes")
        return generator
    embeddings: Embeddings | None = None
    if pretrain.tying == "embeddings":
        embeddings = generator.embeddings
    elif pretrain.tying == "disentangled":
        embeddings = DisentangledEmbeddings(config, generator.embeddings)
    return kind(config, embeddings, DISCRIMINATOR_STREAM)
