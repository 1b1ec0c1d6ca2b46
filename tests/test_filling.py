"""Filling sequences change nothing but the number of tokens."""

from __future__ import annotations

import pytest
import torch

from electra_core import tasks
from electra_core.config import EncoderConfig
from electra_core.execution.filling import SIZES_PER_OCTAVE, filled, filled_size, wants_filling
from electra_core.initialisation import initialise
from electra_core.packing import pack

SIZES = EncoderConfig(
    vocab_size=50, embedding_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=64, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
)  # fmt: skip


def batch(lengths: list[int]):
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 50, (length,), generator=draw).tolist() for length in lengths]
    return pack(rows, [[index % 2] * len(row) for index, row in enumerate(rows)])


def test_sizes_are_few_and_close():
    sizes = [filled_size(tokens) for tokens in range(1, 5000)]
    assert all(0 <= size - tokens <= tokens / SIZES_PER_OCTAVE for tokens, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and all(filled_size(size) == size for size in sizes)
    assert len({size for size in sizes if 1024 < size <= 2048}) == SIZES_PER_OCTAVE
    assert sizes[:16] == list(range(1, 17)) and filled_size(0) == 0


@pytest.mark.parametrize("lengths", [[31, 4, 30], [2, 2, 2, 2, 31], [64], [3] * 37, [1] * 33])
def test_the_batchs_own_sequences_stay_where_they_are(lengths):
    before = batch(lengths)
    after = filled(before)
    tokens, sequences = before.num_tokens, before.num_sequences
    assert after.num_tokens == filled_size(tokens) == after.cu_seqlens[-1]
    assert after.max_seqlen == before.max_seqlen == max(lengths)
    for name in ("input_ids_T", "segment_ids_T", "position_ids_T"):
        assert torch.equal(getattr(after, name)[:tokens], getattr(before, name))
        assert len(getattr(after, name)) == after.num_tokens
    assert torch.equal(after.cu_seqlens[: sequences + 1], before.cu_seqlens)
    assert after.cu_seqlens.dtype == before.cu_seqlens.dtype
    filling = after.lengths[sequences:]
    assert ((filling >= 1) & (filling <= max(lengths))).all()
    expected = torch.cat([torch.arange(length) for length in after.lengths.tolist()])
    assert torch.equal(after.position_ids_T, expected)


def test_a_batch_of_the_right_size_is_left_alone():
    before = batch([20, 12])
    assert filled(before) is before


MODELS = (tasks.SequenceClassifier, tasks.TokenClassifier, tasks.QuestionAnswerer, tasks.MultipleChoice)


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("train", [False, True], ids=["evaluating", "training"])
@pytest.mark.parametrize(
    "lengths, tokens, sequences", [([31, 4, 30], (65, 68), (3, 3)), ([3] * 37, (111, 112), (37, 38))]
)
def test_logits_and_gradients_are_those_of_the_batch(kind, train, lengths, tokens, sequences, monkeypatch):
    """In fp32 and with dropout: rounding is all that may differ."""
    model = kind(SIZES, ("a", "b", "c"))
    initialise(model, 0.1, seed=0)
    tasks.initialise_head(model, 0)
    model.train(train)
    results = []
    sizes: list[int] = []
    for wanted in (False, True):
        sizes.clear()
        monkeypatch.setattr(tasks, "wants_filling", lambda tensor, wanted=wanted: wanted)
        hooks = [
            model.encoder.register_forward_pre_hook(lambda _, given: sizes.append(given[0].num_tokens)),
            model.encoder.register_forward_hook(lambda *call: sizes.append(len(call[2]))),
        ]
        logits = model(batch(lengths), seed=7)
        for hook in hooks:
            hook.remove()
        model.zero_grad()
        logits.square().sum().backward()
        assert sizes == [tokens[wanted], tokens[wanted] if model.per_token else sequences[wanted]]
        results.append((logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (expected, gradients), (got, others) = results
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for name in gradients:
        torch.testing.assert_close(others[name], gradients[name], rtol=1e-4, atol=1e-5, msg=name)


def test_only_fast_bf16_wants_it(monkeypatch):
    ids = torch.zeros(3, dtype=torch.int64)
    for fast in (False, True):
        monkeypatch.setattr("electra_core.execution.filling.has_fast_bf16", lambda fast=fast: fast)
        assert not wants_filling(ids)
        with torch.autocast("cpu", dtype=torch.float16):
            assert not wants_filling(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert wants_filling(ids) is fast
