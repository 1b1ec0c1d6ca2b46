"""Where a model drops what, with which probability, against the formulas written out.

The decisions themselves, a function of counters, are `test_rng.py`'s; here is what they are applied to.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from electra_kernels.rng import keep_mask, keep_scale
from torch import Tensor

from electra_core.config import EncoderConfig
from electra_core.encoder import Encoder
from electra_core.initialisation import initialise
from electra_core.packing import TokenBatch, pack
from electra_core.tasks import HEAD_STREAM, MultipleChoice, QuestionAnswerer, SequenceClassifier, TokenClassifier

HIDDEN, ATTENTION, HEAD = 0.3, 0.2, 0.4
CONFIG = EncoderConfig(
    vocab_size=40, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=16, hidden_dropout_prob=HIDDEN,
    attention_probs_dropout_prob=ATTENTION,
)  # fmt: skip
SEED = torch.tensor([5, 0])
BATCH = pack([[2, 10, 11, 12, 3], [2, 20, 3], [2, 30, 31, 3]], [[0, 0, 0, 1, 1], [0, 0, 0], [0, 0, 1, 1]])


def dropped(values: Tensor, dropout_p: float, stream: int) -> Tensor:
    keep = keep_mask(SEED, torch.arange(len(values)), values.shape[1], dropout_p, stream)
    return values * keep * keep_scale(dropout_p)


def by_formula(encoder: Encoder, batch: TokenBatch, rows_R: Tensor | None = None) -> Tensor:
    """Hidden states as the header of `encoder.py` has them; `rows_R`: see `Encoder.forward`."""
    tables, x = encoder.embeddings, torch.zeros(())
    x = x + tables.word_embeddings(batch.input_ids_T) + tables.position_embeddings(batch.position_ids_T)
    x = tables.LayerNorm(x + tables.token_type_embeddings(batch.segment_ids_T))
    x = encoder.embeddings_project(dropped(x, HIDDEN, encoder.first_stream))
    for layer in encoder.layers:
        context = attended(layer.attention, layer.attention.qkv(x).view(len(x), 3, 2, 8), batch)
        if rows_R is not None and layer is encoder.layers[-1]:
            x, context = x[rows_R], context[rows_R]
        x = layer.attention_norm(x + dropped(layer.attention.dense(context), HIDDEN, layer.streams[0]))
        inner = F.gelu(layer.intermediate(x))
        x = layer.output_norm(x + dropped(layer.output(inner), HIDDEN, layer.streams[1]))
    return x


def attended(attention: Any, qkv_T3HK: Tensor, batch: TokenBatch) -> Tensor:
    contexts = []
    for start, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        q, k, v = qkv_T3HK[start:end].permute(1, 2, 0, 3)
        rows = torch.arange(start, end)
        keep = [keep_mask(SEED, rows, end - start, ATTENTION, attention.stream, plane=head) for head in range(2)]
        probabilities = (q @ k.mT / 8**0.5).softmax(-1) * torch.stack(keep) * keep_scale(ATTENTION)
        contexts.append((probabilities @ v).transpose(0, 1).flatten(1))
    return torch.cat(contexts)


def test_the_encoder_drops_embeddings_attention_and_what_is_added_to_the_residual() -> None:
    encoder = Encoder(CONFIG, first_stream=100)
    initialise(encoder, 0.2, seed=1)
    encoder.double().train()
    torch.testing.assert_close(encoder(BATCH, seed=SEED), by_formula(encoder, BATCH))


@pytest.mark.parametrize("kind", [SequenceClassifier, TokenClassifier, QuestionAnswerer, MultipleChoice])
def test_heads_drop_with_a_probability_of_their_own(kind: Any) -> None:
    model = kind(CONFIG, classifier_dropout=HEAD)
    initialise(model, 0.2, seed=1)
    model.double().train()
    hidden_TD = by_formula(model.encoder, BATCH)
    cls_ND = by_formula(model.encoder, BATCH, BATCH.cu_seqlens[:-1])
    if kind is SequenceClassifier:
        inner_ND = F.gelu(model.classifier.dense(dropped(cls_ND, HEAD, HEAD_STREAM)))
        expected = model.classifier.out_proj(dropped(inner_ND, HEAD, HEAD_STREAM + 1))
    elif kind is TokenClassifier:
        expected = model.classifier(dropped(hidden_TD, HEAD, HEAD_STREAM))
    elif kind is QuestionAnswerer:  # has none, as the Hub's
        expected = model.qa_outputs(hidden_TD)
    else:
        summary_ND = F.gelu(model.sequence_summary.summary(cls_ND))
        expected = model.classifier(dropped(summary_ND, HEAD, HEAD_STREAM))[:, 0]
    torch.testing.assert_close(model(BATCH, seed=SEED), expected)
