"""Heads and losses: equal to padded formulas and to `transformers`; features: windows, truncation, batches."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_model
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_core import tasks
from electra_core.config import EncoderConfig
from electra_core.downstream.choices import ChoiceExample, Choose
from electra_core.downstream.classify import Classify
from electra_core.initialisation import initialise
from electra_core.labelled_data.features import (
    Features,
    batch_order,
    sorted_batches,
    truncate,
    truncate_pair,
    windows,
)
from electra_core.labelled_data.labelled import TextExample
from electra_core.packing import pack, to_padded
from electra_core.tokenizer import load_tokenizer

CONFIG = EncoderConfig(
    vocab_size=50, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=32,
)  # fmt: skip
BATCH = pack([[2, 10, 11, 12, 3], [2, 20, 3], [2, 30, 31, 3]], [[0, 0, 0, 1, 1], [0, 0, 0], [0, 0, 1, 1]])


def build(kind, **more):
    torch.manual_seed(0)
    model = kind(CONFIG, **more)
    initialise(model, 0.2, seed=1)
    return model


# ---- losses against padded formulas --------------------------------------------------------------------


def test_span_loss_is_the_padded_cross_entropy():
    logits_T2 = torch.randn(BATCH.num_tokens, 2, requires_grad=True)
    spans_N2 = torch.tensor([[1, 3], [0, 0], [2, 2]])
    loss = tasks.span_loss(logits_T2, spans_N2, BATCH)
    padded = to_padded(logits_T2, BATCH, fill=-torch.inf)  # [N, S, 2]
    expected = sum(F.cross_entropy(padded[..., side], spans_N2[:, side]) for side in (0, 1)) / 2
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits_T2)
    (wanted,) = torch.autograd.grad(expected, logits_T2)
    torch.testing.assert_close(gradient, wanted)


def test_choice_loss_takes_different_numbers_of_choices():
    logits_N = torch.tensor([1.0, 2.0, 0.5, -1.0, 3.0])
    loss = tasks.choice_loss(logits_N, torch.tensor([1, 2]), torch.tensor([0, 2, 5]))
    first, second = logits_N[:2].log_softmax(0)[1], logits_N[2:].log_softmax(0)[2]
    torch.testing.assert_close(loss, -(first + second) / 2)


def test_tagging_loss_ignores_unlabelled_tokens():
    logits_TC = torch.randn(4, 3)
    tags_T = torch.tensor([tasks.UNLABELLED, 2, tasks.UNLABELLED, 0])
    torch.testing.assert_close(
        tasks.tagging_loss(logits_TC, tags_T), F.cross_entropy(logits_TC[1::2], tags_T[1::2])
    )
    assert tasks.tagging_loss(logits_TC, torch.full((4,), tasks.UNLABELLED)) == 0


def test_class_weights_and_regression():
    logits_NC, labels_N = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    plain = -logits_NC.log_softmax(1)[:, 0]
    weights_C = torch.tensor([3.0, 1.0])
    torch.testing.assert_close(tasks.classification_loss(logits_NC, labels_N, weights_C), plain.mean())
    mixed = tasks.classification_loss(logits_NC, torch.tensor([0, 1]), weights_C)
    each = -logits_NC.log_softmax(1).diag()
    torch.testing.assert_close(mixed, (3 * each[0] + each[1]) / 4)
    loss = tasks.regression_loss(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0]))
    assert loss == pytest.approx((1 + 4) / 2)


# ---- models --------------------------------------------------------------------------------------------

HUB_CLASSES = {
    tasks.SequenceClassifier: ("A", "B", "C"),
    tasks.TokenClassifier: ("A", "B", "C"),
    tasks.QuestionAnswerer: (),
    tasks.MultipleChoice: (),
}


@pytest.mark.parametrize("kind", HUB_CLASSES, ids=lambda kind: kind.__name__)
def test_logits_equal_those_of_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    from electra_core.model_dir import save_pretrained

    model = build(kind, labels=HUB_CLASSES[kind]).eval()
    save_pretrained(model, tmp_path)
    hub = getattr(transformers, kind.architecture).from_pretrained(tmp_path).eval()
    inputs = {
        "input_ids": to_padded(BATCH.input_ids_T, BATCH),
        "token_type_ids": to_padded(BATCH.segment_ids_T, BATCH),
        "attention_mask": to_padded(torch.ones_like(BATCH.input_ids_T), BATCH),
    }
    if kind is tasks.MultipleChoice:
        inputs = {name: value[None] for name, value in inputs.items()}
    with torch.no_grad():
        ours, theirs = model(BATCH), hub(**inputs)
    if kind is tasks.QuestionAnswerer:
        padded = to_padded(ours, BATCH, fill=0)
        mask = inputs["attention_mask"].bool()
        torch.testing.assert_close(padded[..., 0][mask], theirs.start_logits[mask], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(padded[..., 1][mask], theirs.end_logits[mask], atol=1e-5, rtol=1e-4)
    elif kind is tasks.TokenClassifier:
        torch.testing.assert_close(ours, theirs.logits[inputs["attention_mask"].bool()], atol=1e-5, rtol=1e-4)
    else:
        torch.testing.assert_close(ours, theirs.logits.view_as(ours), atol=1e-5, rtol=1e-4)


def test_dropout_is_a_function_of_the_seed():
    model = build(tasks.SequenceClassifier).train()
    first, same, other = model(BATCH, seed=1), model(BATCH, seed=1), model(BATCH, seed=2)
    assert torch.equal(first, same) and not torch.equal(first, other)
    torch.testing.assert_close(model(BATCH), model.eval()(BATCH, seed=1))  # no seed, or no training: none


def test_both_dropouts_of_a_head_have_draws_of_their_own(monkeypatch):
    model, streams = build(tasks.SequenceClassifier).train(), []
    drawn = tasks.keep_mask

    def spied(key, rows_R, columns, dropout_p, stream):
        streams.append(stream)
        return drawn(key, rows_R, columns, dropout_p, stream)

    monkeypatch.setattr(tasks, "keep_mask", spied)
    model(BATCH, seed=1)
    assert len(streams) == len({*streams}) == 2


def test_new_heads_start_from_glorot_and_leave_the_encoder_alone():
    model = build(tasks.SequenceClassifier)
    before = {name: p.clone() for name, p in model.named_parameters()}
    tasks.initialise_head(model, seed=3)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"classifier.dense.weight", "classifier.out_proj.weight"}
    bound = (6 / (16 + 16)) ** 0.5
    assert 0.9 * bound < model.classifier.dense.weight.abs().max() <= bound
    for seed, is_same in ((3, True), (4, False)):
        other = build(tasks.SequenceClassifier)
        tasks.initialise_head(other, seed)
        assert torch.equal(other.classifier.dense.weight, model.classifier.dense.weight) == is_same


@pytest.mark.parametrize("kind", HUB_CLASSES, ids=lambda kind: kind.__name__)
def test_one_batch_is_overfitted(kind):
    model = build(kind, labels=HUB_CLASSES[kind]).eval()
    spans_N2, tags_T = torch.tensor([[1, 3], [0, 0], [2, 2]]), torch.arange(BATCH.num_tokens) % 3
    losses = {
        tasks.SequenceClassifier: lambda logits: tasks.classification_loss(logits, torch.tensor([0, 2, 1])),
        tasks.TokenClassifier: lambda logits: tasks.tagging_loss(logits, tags_T),
        tasks.QuestionAnswerer: lambda logits: tasks.span_loss(logits, spans_N2, BATCH),
        tasks.MultipleChoice: lambda logits: tasks.choice_loss(logits, torch.tensor([1]), torch.tensor([0, 3])),
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = losses[kind](model(BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


# ---- features ------------------------------------------------------------------------------------------


def features_of(lengths) -> Features:
    features = Features(cls_id=2, sep_id=3)
    for index, length in enumerate(lengths):
        features.add(index, [10 + index] * (length - 2), None, index)
    return features


def test_batches_hold_what_was_added():
    features = Features(cls_id=2, sep_id=3)
    features.add(0, [10, 11], [12], 7)
    features.add_sequence([20])
    features.add_sequence([30], [31, 32])
    features.end_unit(1, 8)
    batch = features.batch([1, 0])
    assert [ids.tolist() for ids in batch.tokens.split()] == [
        [2, 20, 3],
        [2, 30, 3, 31, 32, 3],
        [2, 10, 11, 3, 12, 3],
    ]
    assert batch.tokens.segment_ids_T.tolist() == [0] * 3 + [0, 0, 0, 1, 1, 1] + [0, 0, 0, 0, 1, 1]
    assert batch.unit_starts.tolist() == [0, 2, 3] and batch.targets.tolist() == [8, 7]
    assert features.lengths.tolist() == [6, 9]
    features.truncated = 1
    twice = Features(cls_id=2, sep_id=3)
    twice.extend(features, 0)
    twice.extend(features, 2)
    assert twice.targets == [7, 8, 7, 8] and twice.truncated == 2
    assert twice.owners == [0, 1, 2, 3] and twice.lengths.tolist() == [6, 9, 6, 9]
    assert torch.equal(twice.batch([3, 2]).tokens.input_ids_T, batch.tokens.input_ids_T)


def test_of_a_long_text_the_end_stands_before_its_endings(tmp_path):
    tokenizer = load_tokenizer(tiny_model.make_model(tmp_path))
    example = ChoiceExample("1", 1, "the film was great and ann met bob", ("eve met ann", "bad"), 1)
    features = Choose(max_length=10).encode([example], tokenizer)
    batch = features.batch([0])
    kept = ("and ann met bob", "eve met ann"), ("was great and ann met bob", "bad")
    for ids, (text, ending) in zip(batch.tokens.split(), kept, strict=True):
        first, second = tokenizer.encode_batch([text, ending])
        assert ids.tolist() == [tokenizer.cls_id, *first, tokenizer.sep_id, *second, tokenizer.sep_id]
    assert features.truncated == 1


def test_an_epoch_holds_every_unit_once_and_is_a_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(3, 60, size=1000)
    epoch = [batch.tolist() for batch in batch_order(lengths, batch_size=8, seed=1, epoch=0)]
    assert sorted(unit for batch in epoch for unit in batch) == list(range(1000))
    assert {len(batch) for batch in epoch} == {8}
    assert epoch == [batch.tolist() for batch in batch_order(lengths, batch_size=8, seed=1, epoch=0)]
    assert epoch != [batch.tolist() for batch in batch_order(lengths, batch_size=8, seed=1, epoch=1)]
    spread = np.mean([np.ptp(lengths[batch]) for batch in epoch])
    assert spread < 3  # like lengths together; unsorted batches spread over about 45
    means = [lengths[batch].mean() for batch in epoch]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3, "short batches are not followed by short ones"


@pytest.mark.parametrize("units", [1, 31, 32, 33, 65, 1600, 1601, 1633, 3199])
def test_what_is_left_is_a_batch_of_any_lengths(units):
    """Not of the longest, which are at the end of the last pool."""
    lengths = np.random.default_rng(0).integers(3, 120, size=units)
    longest = 0
    for epoch in range(20):
        order = batch_order(lengths, batch_size=32, seed=0, epoch=epoch)
        sizes = sorted(len(batch) for batch in order)
        assert sizes == sorted([32] * (units // 32) + [units % 32] * (units % 32 > 0))
        assert sorted(np.concatenate(order).tolist()) == list(range(units))
        spread = np.mean([np.ptp(lengths[batch]) for batch in order])
        assert units < 1000 or spread < 12
        smallest = min(order, key=len)
        longest += lengths[smallest].max() >= 0.9 * lengths.max()
    assert units <= 65 or units % 32 == 0 or longest < 10


@pytest.mark.parametrize("units", [40, 500, 1633])
def test_token_budgets_are_filled_evenly(units):
    """As many batches as the budget needs, none of them a rest of a few tokens."""
    lengths = np.random.default_rng(0).integers(3, 60, size=units)
    order = batch_order(lengths, batch_size=32, tokens_per_batch=512, seed=0, epoch=0)
    tokens = np.array([lengths[batch].sum() for batch in order])
    assert sorted(np.concatenate(order).tolist()) == list(range(units))
    assert tokens.max() <= 512 and tokens.min() > 512 - 2 * 60 - 30 * 512 // units
    assert len(order) <= 1.15 * -(-lengths.sum() // 512) + 1


def test_token_budgets():
    lengths = np.random.default_rng(0).integers(3, 60, size=500)
    epoch = batch_order(lengths, batch_size=32, tokens_per_batch=256, seed=0, epoch=0)
    assert sorted(np.concatenate(epoch).tolist()) == list(range(500))
    assert max(lengths[batch].sum() for batch in epoch) <= 256
    parts = list(sorted_batches(lengths, 100))
    assert sorted(np.concatenate(parts).tolist()) == list(range(500))
    assert all(lengths[part].sum() <= 100 for part in parts)
    assert lengths[parts[0]].max() == lengths.max()
    alone = list(sorted_batches(np.array([5, 500, 5]), 100))
    assert [part.tolist() for part in alone] == [[1], [0, 2]]
    full = list(sorted_batches(np.array([4, 6, 4, 6]), 12))
    assert [part.tolist() for part in full] == [[1, 3], [0, 2]]


@pytest.mark.parametrize("budget", [{}, {"tokens_per_batch": 6000}], ids=["sequences", "tokens"])
def test_who_meets_in_a_batch_changes_from_epoch_to_epoch(budget):
    """They are sorted within pools. In an epoch sorted as a whole, neighbours by length would always meet."""
    lengths = np.arange(1000, 2000)
    first, second = (
        {frozenset(batch.tolist()) for batch in batch_order(lengths, batch_size=4, **budget, seed=0, epoch=epoch)}
        for epoch in (0, 1)
    )
    assert len(first) >= 250 and len(first & second) < 0.1 * len(first)


def test_pairs_are_trained_on_in_both_orders_and_fill_the_input(tmp_path):
    tokenizer = load_tokenizer(tiny_model.make_model(tmp_path))
    a, b = tokenizer.encode("the film was great"), tokenizer.encode("the plot")
    short = TextExample("1", 1, "the film was great", "the plot", "pos")
    long = TextExample("2", 2, "a " * 9, "b " * 9, "neg")
    task = Classify(labels=("neg", "pos"), both_orders=True, max_length=12)
    features = task.encode([short, long], tokenizer, training=True)
    assert features.owners == [0, 0, 1, 1] and features.lengths.tolist() == [9, 9, 12, 12]
    for unit, (first, second) in enumerate(((a, b), (b, a))):
        assert features.batch([unit]).tokens.input_ids_T.tolist() == [2, *first, 3, *second, 3]
    assert task.encode([short, long], tokenizer).owners == [0, 1]


def test_the_other_order_is_cut_as_a_pair_of_its_own(tmp_path):
    """As in the original, which swaps first: of equally long texts the second gives the odd token each time."""
    tokenizer = load_tokenizer(tiny_model.make_model(tmp_path))
    pair = TextExample("1", 1, "a " * 9, "b " * 9, "neg")
    task = Classify(labels=("neg", "pos"), both_orders=True, max_length=12)
    features = task.encode([pair], tokenizer, training=True)
    a, b = (tokenizer.encode(text)[0] for text in "ab")
    assert features.batch([0]).tokens.input_ids_T.tolist() == [2, *[a] * 5, 3, *[b] * 4, 3]
    assert features.batch([1]).tokens.input_ids_T.tolist() == [2, *[b] * 5, 3, *[a] * 4, 3]


@pytest.mark.parametrize("how, expected", [("head", [0, 1, 2, 3]), ("tail", [6, 7, 8, 9]), ("both", [0, 7, 8, 9])])
def test_truncation(how, expected):
    assert truncate(list(range(10)), 4, how) == expected
    assert truncate([1, 2], 4, how) == [1, 2]


def test_the_longer_of_a_pair_gives_first():
    a, b = list(range(10)), list(range(100, 103))
    assert truncate_pair(a, b, 8, "head") == (a[:5], b)
    assert truncate_pair(b, a, 8, "head") == (b, a[:5])
    assert truncate_pair(a, a, 8, "tail") == (a[-4:], a[-4:])


@settings(max_examples=200)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 60))
def test_a_pair_is_cut_as_in_the_original(first, second, size):
    """google-research/electra takes tokens off one at a time: the longer text's, of equal ones the second's."""
    kept = [first, second]
    while sum(kept) > size:
        kept[0 if kept[0] > kept[1] else 1] -= 1
    cut = truncate_pair(list(range(first)), list(range(second)), size, "head")
    assert [len(ids) for ids in cut] == kept


@settings(max_examples=200)
@given(st.integers(0, 300), st.integers(1, 50), st.data())
def test_every_token_is_owned_once_where_its_context_is_best(length, size, data):
    stride = data.draw(st.integers(1, size))
    found = windows(length, size, stride)
    owned = [place for window in found for place in range(window.own_start, window.own_stop)]
    assert owned == list(range(length))
    stops = [window.stop for window in found]
    assert stops == sorted({*stops}), "none holds only what the one before holds, too"
    for window in found:
        assert window.stop - window.start <= size
        for place in range(window.own_start, window.own_stop):
            nearest = [min(place - w.start, w.stop - 1 - place) for w in found if w.start <= place < w.stop]
            assert min(place - window.start, window.stop - 1 - place) == max(nearest)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="stride: expected 1 to size"):
        windows(10, 4, 5)
    with pytest.raises(ValueError, match="how: expected one of head, tail, both"):
        truncate([1], 1, "middle")
