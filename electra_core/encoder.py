"""The transformer encoder: embeddings and post-LayerNorm layers.

    x = dropout(LayerNorm(word + position + segment)), projected to the hidden size
    for each layer (Vaswani et al. 2017, post-LayerNorm as in BERT):
        x = LayerNorm(x + dropout(attention(x)))
        x = LayerNorm(x + dropout(W2 gelu(W1 x)))

The last product of each branch (`product_of`) leaves its bias (`bias_after`) to the LayerNorm that follows, and x
is passed from layer to layer twice, as `hidden_TD` and as `residual_TD`: both make the gradients cheaper
(`electra_kernels/layer_norm.py`).

Everything works on packed tokens (`packing.TokenBatch`): there is no padding and no mask. Modules have the Hub's
names wherever shapes allow; query, key and value are one matrix here (`qkv`), because one product of three times
the width is faster than three products.

Dropout is on when the module is in training mode and a seed is given. Each use has its own stream,
`STREAMS_PER_LAYER` per layer starting at the encoder's `first_stream`, so one seed per step serves
generator and discriminator alike.
"""

from __future__ import annotations

import inspect
import warnings
from typing import ClassVar

import torch
from electra_kernels import attention, dropout_add_layer_norm_twice, embedding_layer_norm
from electra_kernels.rng import Seed, seed_tensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from electra_core.config import EncoderConfig, check_config
from electra_core.linear import Linear, autocast_dtype, bias_after, cast_together, gelu_of, product_of
from electra_core.packing import TokenBatch, check_packed

STREAMS_PER_LAYER = 4
EMBEDDING_STREAM, ATTENTION_STREAM, ATTENTION_OUTPUT_STREAM, OUTPUT_STREAM = range(4)


class Embeddings(nn.Module):
    """Word + position + segment embeddings and their LayerNorm; all of width E."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.embedding_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.embedding_size)
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)

    def word_weight(self) -> Tensor:
        """[V, E]: the matrix of word embeddings."""
        return self.word_embeddings.weight

    def forward(
        self, batch: TokenBatch, dropout_p: float = 0.0, seed: Seed | None = None, stream: int = 0
    ) -> Tensor:
        """[T, E], in the compute dtype: dropout(LayerNorm(word + position + segment))."""
        words_VE, norm = self.word_weight(), self.LayerNorm
        return embedding_layer_norm(
            batch.input_ids_T,
            batch.position_ids_T,
            batch.segment_ids_T,
            words_VE,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            dropout_p=dropout_p,
            seed=seed,
            stream=stream,
            dtype=autocast_dtype(words_VE),
        )


class SelfAttention(nn.Module):
    """Multi-head self-attention within each sequence, and its output projection without the bias."""

    def __init__(self, config: EncoderConfig, stream: int):
        super().__init__()
        self.num_heads, self.head_size = config.num_attention_heads, config.head_size
        self.dropout_p, self.stream = config.attention_probs_dropout_prob, stream
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_TD: Tensor, batch: TokenBatch, seed: Seed | None, rows_R: Tensor | None = None
    ) -> Tensor:
        """[T, D] -> [T, D]; with `rows_R` [R, D], what these rows make of all T."""
        qkv_T3HK = self.qkv(hidden_TD).view(-1, 3, self.num_heads, self.head_size)
        dropout_p = self.dropout_p if seed is not None else 0.0
        context_THK = attention(
            qkv_T3HK, batch.cu_seqlens, batch.max_seqlen, dropout_p=dropout_p, seed=seed, stream=self.stream
        )
        return product_of(self.dense, rows_of(context_THK.flatten(1), rows_R))


class Layer(nn.Module):
    """One transformer layer: attention, then feed-forward, each with a residual and a LayerNorm.

    A class of your own takes the attention's place as `Layer.attention_class`, the layer's as
    `Encoder.layer_class`, the encoder's as a model's `encoder_class`; set it before models are built
    (docs/changing_models.md).
    """

    attention_class: ClassVar[type[SelfAttention]] = SelfAttention

    def __init__(self, config: EncoderConfig, first_stream: int):
        super().__init__()
        width = config.hidden_size
        self.dropout_p, self.eps = config.hidden_dropout_prob, config.layer_norm_eps
        self.attention = self.attention_class(config, first_stream + ATTENTION_STREAM)
        self.attention_norm = nn.LayerNorm(width, eps=self.eps)
        self.intermediate = Linear(width, config.intermediate_size)
        self.output = Linear(config.intermediate_size, width)
        self.output_norm = nn.LayerNorm(width, eps=self.eps)
        self.streams = (first_stream + ATTENTION_OUTPUT_STREAM, first_stream + OUTPUT_STREAM)

    def forward(
        self,
        hidden_TD: Tensor,
        residual_TD: Tensor,
        batch: TokenBatch,
        seed: Seed | None,
        rows_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states and residual of every token, or of `rows_R` alone: these attend to all tokens, and
        everything after attention treats each token by itself."""
        # x = LayerNorm(x + dropout(attention(x)))
        branch_TD = self.attention(hidden_TD, batch, seed, rows_R)
        residual_TD = rows_of(residual_TD, rows_R)
        hidden_TD, residual_TD = self.add_norm(
            branch_TD, bias_after(self.attention.dense), residual_TD, self.attention_norm, seed, self.streams[0]
        )
        # x = LayerNorm(x + dropout(W2 gelu(W1 x)))
        branch_TD = product_of(self.output, gelu_of(self.intermediate, hidden_TD))
        return self.add_norm(
            branch_TD, bias_after(self.output), residual_TD, self.output_norm, seed, self.streams[1]
        )

    def add_norm(
        self, branch_TD: Tensor, bias_D: Tensor | None, residual_TD: Tensor, norm: nn.LayerNorm, seed: Seed | None,
        stream: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """LayerNorm(residual + dropout(branch + bias)), as the next branch's input and as its residual."""
        return dropout_add_layer_norm_twice(
            branch_TD,
            residual_TD,
            norm.weight,
            norm.bias,
            eps=self.eps,
            x_bias_D=bias_D,
            dropout_p=self.dropout_p if seed is not None else 0.0,
            seed=seed,
            stream=stream,
        )


class Encoder(nn.Module):
    """Embeddings and layers: token ids in, hidden states out.

    Args:
        config: the sizes.
        embeddings: embeddings shared with another model; None: its own.
        first_stream: the first of this encoder's streams of random numbers.
    """

    layer_class: ClassVar[type[Layer]] = Layer

    def __init__(self, config: EncoderConfig, embeddings: Embeddings | None = None, first_stream: int = 0):
        super().__init__()
        check_config("config", config, EncoderConfig)
        self.config, self.first_stream = config, first_stream
        self.recompute = False
        self.embeddings = embeddings if embeddings is not None else Embeddings(config)
        same = config.embedding_size == config.hidden_size
        self.embeddings_project = None if same else Linear(config.embedding_size, config.hidden_size)
        self.layers = nn.ModuleList(
            self.layer_class(config, first_stream + (index + 1) * STREAMS_PER_LAYER)
            for index in range(config.num_hidden_layers)
        )

    def forward(self, batch: TokenBatch, seed: Seed | None = None, rows_R: Tensor | None = None) -> Tensor:
        """Hidden states of every token, or of selected ones.

        Args:
            batch: N packed sequences, none longer than `max_position_embeddings`.
            seed: for dropout, a new one in every step; None, or evaluation mode, means no dropout.
            rows_R: int64 [R], the selected tokens; None: all. The last layer then computes what follows its
                attention, three quarters of its products, for these alone.

        Returns:
            [T, D] or [R, D], in the compute dtype (bf16 under autocast).

        Raises:
            ValueError: not a TokenBatch; a sequence longer than the model has positions for.
        """
        check_packed(batch)
        if batch.max_seqlen > self.config.max_position_embeddings:
            raise ValueError(
                f"batch: expected sequences of at most {self.config.max_position_embeddings} tokens, "
                f"got one of {batch.max_seqlen}"
            )
        if self.training and seed is None:
            _warn_of_no_dropout(self.config)
        seed = seed_tensor(seed, batch.input_ids_T.device) if self.training and seed is not None else None
        with cast_together(self):  # on a GPU, under autocast: all weights rounded in one operation
            return self._hidden_states(batch, seed, rows_R)

    def _hidden_states(self, batch: TokenBatch, seed: Tensor | None, rows_R: Tensor | None) -> Tensor:
        dropout_p = self.config.hidden_dropout_prob if seed is not None else 0.0
        hidden_TD = self.embeddings(batch, dropout_p, seed, self.first_stream + EMBEDDING_STREAM)
        if self.embeddings_project is not None:
            hidden_TD = self.embeddings_project(hidden_TD)
        residual_TD = hidden_TD
        for number, layer in enumerate(self.layers, 1):
            inputs = hidden_TD, residual_TD, batch, seed, rows_R if number == len(self.layers) else None
            if self.recompute and torch.is_grad_enabled():
                hidden_TD, residual_TD = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_TD, residual_TD = layer(*inputs)
        return hidden_TD


class DisentangledEmbeddings(Embeddings):
    """Shares another model's word embeddings without sending it gradient (He et al. 2021, DeBERTaV3).

    The matrix is `sg(shared) + own`, where `sg` stops the gradient: the discriminator builds on what the
    generator learns about words, but its loss, of 50 times the weight, does not pull at the generator's matrix.
    """

    def __init__(self, config: EncoderConfig, shared: Embeddings):
        super().__init__(config)
        self._shared = (shared,)  # a tuple, so that the generator's parameters are not registered twice

    def word_weight(self) -> Tensor:
        return self._shared[0].word_weight().detach() + self.word_embeddings.weight


def rows_of(values_TD: Tensor, rows_R: Tensor | None) -> Tensor:
    """[R, D]: the rows `rows_R`, or all if None."""
    # index_select, because the gradient of indexing first sorts the rows, in case some are equal.
    return values_TD if rows_R is None else values_TD.index_select(0, rows_R)


def set_recompute(model: nn.Module, recompute: bool) -> None:
    """Sets whether the backward pass recomputes each layer's inner values instead of keeping them.

    This takes a third more work and stores only each layer's input. Dropout is a function of its counter, so the
    recomputed values are the same.
    """
    for module in model.modules():
        if isinstance(module, Encoder):
            module.recompute = recompute


def _warn_of_no_dropout(config: EncoderConfig) -> None:
    """Warns of training without a seed, if there would be dropout; names the nearest calling line outside this
    package and torch."""
    probabilities = config.hidden_dropout_prob, config.attention_probs_dropout_prob
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not any(probabilities):
        return
    frame, level = inspect.currentframe(), 1
    while frame and str(frame.f_globals.get("__name__")).partition(".")[0] in (__package__, "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        "seed: a model in training mode got none, so it trains without dropout; model(batch, seed), with "
        "another number in every step, has it",
        stacklevel=level,
    )
