"""The original recipe, and by number the details that re-implementations of ELECTRA get wrong.

Facts from google-research/electra and the paper; `docs/deviations.md` has what differs on purpose (5 and, as a
default, 13 and 14).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from electra_kernels import mlm_head, sample_and_replace
from torch import nn

from electra_core import optim, tasks
from electra_core.adam import ElectraAdam
from electra_core.config import PRESETS, EncoderConfig, PretrainConfig
from electra_core.electra import Discriminator, Electra, Generator, PretrainBatch
from electra_core.finetuning import steps as finetune_steps
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.masking import mask_tokens
from electra_core.packing import from_lengths

CLS, SEP, MASK = 2, 3, 4
CONFIG = EncoderConfig(
    vocab_size=40, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=16,
)  # fmt: skip
PRETRAIN = PretrainConfig(
    generator_hidden_size=12, generator_attention_heads=1, generator_intermediate_size=16, generator_layers=2
)


def make_electra(**changes: Any) -> Any:
    return Electra(CONFIG, dataclasses.replace(PRETRAIN, **changes))


def make_batch() -> PretrainBatch:
    """Two sequences, four masked positions, of which the second kept its word."""
    ids = torch.randint(5, 40, (20,), generator=torch.Generator().manual_seed(0))
    tokens = from_lengths(ids, torch.zeros_like(ids), [12, 8])
    positions = torch.tensor([1, 5, 13, 18])
    return PretrainBatch(tokens, ids.index_fill(0, positions[[0, 2, 3]], MASK), positions)


def masked(lengths: list[int], fraction: float = 0.15, most: int = 10**6, seed: int = 0) -> PretrainBatch:
    """`mask_tokens` on sequences [CLS] words [SEP] of these lengths, all words different from special ones."""
    ids = torch.cat([torch.tensor([CLS, *(5 + i % 30 for i in range(n - 2)), SEP][:n]) for n in lengths])
    tokens = from_lengths(ids, torch.zeros_like(ids), lengths)
    return mask_tokens(
        tokens, range(len(lengths)), seed=seed, mask_id=MASK, special_ids=[CLS, SEP, MASK], fraction=fraction,
        max_predictions=most,
    )  # fmt: skip


def counts_per_sequence(batch: PretrainBatch) -> list[int]:
    owner_T = torch.repeat_interleave(batch.tokens.lengths.long())
    return owner_T[batch.masked_positions_M].bincount(minlength=batch.tokens.num_sequences).tolist()


# The table --------------------------------------------------------------------------------------------------

TABLE: dict[str, tuple[Any, ...]] = {
    # layers, hidden, feed-forward, heads, embedding, generator's hidden and heads,
    # mask fraction, most masked, length, batch, peak rate, steps
    "small": (12, 256, 1024, 4, 128, 64, 1, 0.15, 19, 128, 128, 5e-4, 1_000_000),
    "small++": (12, 256, 1024, 4, 128, 256, 4, 0.15, 79, 512, 128, 5e-4, 4_000_000),
    "base": (12, 768, 3072, 12, 768, 256, 4, 0.15, 79, 512, 256, 2e-4, 766_000),
    "large": (24, 1024, 4096, 16, 1024, 256, 4, 0.25, 130, 512, 2048, 2e-4, 1_750_000),
}


@pytest.mark.parametrize("name", TABLE)
def test_presets_are_the_papers(name: str) -> None:
    model, run = PRESETS[name].discriminator, PRESETS[name].pretrain
    generator = PRESETS[name].generator()
    assert TABLE[name] == (
        model.num_hidden_layers, model.hidden_size, model.intermediate_size, model.num_attention_heads,
        model.embedding_size, generator.hidden_size, generator.num_attention_heads, run.mask_fraction,
        run.max_predictions, run.max_length, run.batch_size, run.learning_rate, run.steps,
    )  # fmt: skip
    assert generator.num_hidden_layers == model.num_hidden_layers
    assert generator.intermediate_size == 4 * generator.hidden_size
    assert generator.embedding_size == model.embedding_size
    assert model.head_size == generator.head_size == 64
    for config in (model, generator):
        assert (config.vocab_size, config.max_position_embeddings, config.type_vocab_size) == (30522, 512, 2)
        assert (config.layer_norm_eps, config.initializer_range) == (1e-12, 0.02)
        assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.1)
    assert (run.generator_weight, run.discriminator_weight, run.temperature) == (1.0, 50.0, 1.0)
    assert (run.adam_beta1, run.adam_beta2, run.adam_epsilon) == (0.9, 0.999, 1e-6)
    assert (run.weight_decay, run.clip_norm, run.warmup_steps) == (0.01, 1.0, 10_000)
    assert (run.optimizer, run.objective, run.tying) == ("electra-adam", "electra", "embeddings")


def test_loss_is_over_all_tokens_and_over_masked_ones() -> None:
    """RTD: mean over every token, [CLS] and [SEP] included; MLM: mean over masked positions."""
    model, batch = make_electra().eval(), make_batch()
    output = model(batch, seed=1)
    rtd = F.binary_cross_entropy_with_logits(output.rtd_logits_T, output.is_replaced_T.float())
    logits_MV = model.generator(batch.tokens.with_ids(batch.masked_ids_T), batch.masked_positions_M)
    mlm = F.cross_entropy(logits_MV, batch.target_ids_M)
    torch.testing.assert_close(output.rtd_loss, rtd)
    torch.testing.assert_close(output.mlm_loss, mlm)
    torch.testing.assert_close(output.loss, mlm + 50 * rtd)


def test_weight_decay_spares_biases_and_layer_norm_only() -> None:
    groups = optim.parameter_groups(make_electra(), learning_rate=1.0, weight_decay=0.01)
    for group in groups:
        for name, _ in group["params"]:
            spared = name.endswith("bias") or "norm" in name.lower()
            assert group["weight_decay"] == (0.0 if spared else 0.01), name


# The fourteen details -----------------------------------------------------------------------------------------


def test_01_adam_has_no_bias_correction() -> None:
    """The first update is 0.1 g / (sqrt(0.001) |g| + eps): 3.16 times the rate, where Adam's is 1."""
    for kind, expected in ((ElectraAdam, 0.1 / math.sqrt(0.001)), (torch.optim.AdamW, 1.0)):
        p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        p.grad = torch.tensor([1.0, -2.0, 50.0], dtype=torch.float64)
        kind([p], lr=0.01, eps=1e-6, weight_decay=0.0).step()
        update = -p.detach() / 0.01
        torch.testing.assert_close(update, expected * p.grad.sign(), rtol=1e-4, atol=0)


def test_02_learning_rate_decays_during_the_warm_up_too() -> None:
    assert optim.learning_rate(0, 5e-4, 1_000_000, 10_000) == 0.0, "the first update is zero"
    for step in (1, 5_000, 9_999, 10_000, 10_001, 500_000, 999_999):
        expected = 5e-4 * (1 - step / 1e6) * min(1.0, step / 1e4)
        assert optim.learning_rate(step, 5e-4, 1_000_000, 10_000) == pytest.approx(expected, rel=1e-12)
    assert max(optim.learning_rate(t, 1.0, 1000, 100) for t in range(1001)) == pytest.approx(0.9)
    assert optim.learning_rate(1000, 1.0, 1000, 100) == 0.0
    assert optim.learning_rate(0, 1.0, 10, 0) == 1.0


def test_03_masked_positions_are_85_percent_mask_15_percent_kept_none_random() -> None:
    batch = masked([512] * 200)
    at_M = batch.masked_ids_T[batch.masked_positions_M]
    is_mask, is_kept = at_M == MASK, at_M == batch.target_ids_M
    assert (is_mask ^ is_kept).all(), "a masked position shows [MASK] or its word, nothing else"
    share, deviation = is_mask.float().mean().item(), math.sqrt(0.85 * 0.15 / len(at_M))
    assert abs(share - 0.85) < 4 * deviation
    elsewhere = torch.ones_like(batch.masked_ids_T, dtype=torch.bool)
    elsewhere[batch.masked_positions_M] = False
    assert torch.equal(batch.masked_ids_T[elsewhere], batch.tokens.input_ids_T[elsewhere])


def test_04_how_many_are_masked_and_which_may_be() -> None:
    """max(1, min(most, round(fraction n))), n with [CLS] and [SEP]; never a special token."""
    lengths = [3, 4, 7, 10, 17, 30, 64, 128]
    expected = [1, 1, 1, 2, 3, 4, 10, 19]  # halves, as 1.5 and 4.5, round to even
    assert counts_per_sequence(masked(lengths)) == expected
    assert counts_per_sequence(masked([128, 20], fraction=0.5, most=19)) == [19, 10]
    assert [PRESETS[name].pretrain.max_predictions for name in ("small", "base", "large")] == [19, 79, 130]
    for seed in range(20):
        batch = masked([5, 9, 128], fraction=0.5, seed=seed)
        assert not torch.isin(batch.target_ids_M, torch.tensor([CLS, SEP, MASK])).any()
    assert masked([2]).masked_positions_M.tolist() == [], "[CLS] [SEP] has nothing to mask"


def test_05_positions_are_drawn_without_replacement() -> None:
    """Ours are distinct. The original's are not, and a position drawn twice gets an unrelated word.

    Of 19 positions the original draws from 126 candidates, 6.8% repeat an earlier one. It then divides the
    *sum* of the sampled ids by how often the position was drawn.
    """
    batch = masked([128] * 50)
    assert batch.masked_positions_M.diff().min() > 0
    assert counts_per_sequence(batch) == [19] * 50
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, 126, (20_000, 19))
    repeats = np.mean([19 - len(np.unique(row)) for row in drawn]) / 19
    assert repeats == pytest.approx(1 - 126 / 19 * (1 - (1 - 1 / 126) ** 19), abs=1e-3)
    assert repeats == pytest.approx(0.068, abs=1e-3)
    positions, words = np.array([4, 9, 4]), np.array([1_000, 7, 2_001])
    sums, times = np.zeros(12, int), np.zeros(12, int)
    np.add.at(sums, positions, words)
    np.add.at(times, positions, 1)
    assert (sums // np.maximum(times, 1))[4] == 1_500, "the mean of two ids is no word that anybody drew"


def test_06_kept_words_are_sampled_and_replaced_like_the_others() -> None:
    model, batch = make_electra(), make_batch()
    kept = batch.masked_positions_M[1]
    assert batch.masked_ids_T[kept] == batch.tokens.input_ids_T[kept]
    outputs = [model(batch, seed=seed) for seed in range(10)]
    assert sum(bool(output.is_replaced_T[kept]) for output in outputs) >= 5
    logits_MV = model.eval().generator(batch.tokens.with_ids(batch.masked_ids_T), batch.masked_positions_M)
    loss_M = F.cross_entropy(logits_MV, batch.target_ids_M, reduction="none")
    torch.testing.assert_close(model(batch, seed=0).mlm_loss, loss_M.mean())  # all four, the kept one too


def test_07_a_sample_equal_to_the_original_counts_as_original() -> None:
    model, batch = make_electra(), make_batch()
    word = batch.target_ids_M[0]
    with torch.no_grad():
        model.generator.output_bias[word] = 100.0  # the generator always says this word
    output = model(batch, seed=0)
    assert (output.corrupted_ids_T[batch.masked_positions_M] == word).all()
    assert not output.is_replaced_T[batch.masked_positions_M[0]], "here it is right"
    others_M = batch.masked_positions_M[batch.target_ids_M != word]
    assert len(others_M) == 3 and output.is_replaced_T[others_M].all()
    assert output.is_replaced_T.sum() == 3


@pytest.mark.parametrize("tying", ["none", "embeddings", "disentangled"])
def test_08_no_gradient_flows_through_the_sampling(tying: str) -> None:
    """What only the generator has is trained by MLM alone, whatever the discriminator's loss weighs."""
    model, batch = make_electra(tying=tying), make_batch()
    output = model(batch, seed=0)
    output.mlm_loss.backward(retain_graph=True)
    alone = {name: p.grad for name, p in model.generator.named_parameters()}
    for p in model.parameters():
        p.grad = None
    output.loss.backward()
    for name, p in model.generator.named_parameters():
        if "embeddings." in name and tying == "embeddings":
            assert not torch.allclose(p.grad, alone[name]), f"{name} is shared: there the gradients meet"
        else:
            assert torch.equal(p.grad, alone[name]), name
    for p in model.parameters():
        p.grad = None
    model(batch, seed=0).rtd_loss.backward()
    own = [p for name, p in model.generator.named_parameters() if "embeddings." not in name]
    assert len(own) == 31 and all(p.grad is None for p in own)


def test_09_embeddings_and_their_layer_norm_are_shared_projections_are_not() -> None:
    model = make_electra()
    generator, discriminator = model.generator, model.discriminator
    ours = dict(generator.encoder.embeddings.named_parameters())
    theirs = dict(discriminator.encoder.embeddings.named_parameters())
    assert ours.keys() == theirs.keys() == {
        "word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight",
        "LayerNorm.weight", "LayerNorm.bias",
    }  # fmt: skip
    assert all(ours[name] is theirs[name] for name in ours)
    projects = generator.encoder.embeddings_project, discriminator.encoder.embeddings_project
    assert [p.weight.shape for p in projects] == [(12, 8), (16, 8)]
    # The output projection is the word matrix, with a bias of its own.
    batch = make_batch()
    before = generator.eval()(batch.tokens).detach()
    with torch.no_grad():
        generator.output_bias[7] += 1.5
    after = generator(batch.tokens).detach()
    expected = torch.zeros(40).index_fill(0, torch.tensor([7]), 1.5).expand_as(before)
    torch.testing.assert_close(after - before, expected)
    assert sum(p.numel() for p in generator.parameters() if p.shape == (40, 8)) == 320, "one matrix [V, E]"


def test_10_projections_and_heads_start_from_glorot_uniform() -> None:
    wide = dataclasses.replace(CONFIG, hidden_size=128, embedding_size=64, vocab_size=500)
    model: Any = Electra(wide, PRETRAIN)
    head: Any = tasks.SequenceClassifier(wide, labels=tuple("abc"))
    tasks.initialise_head(head, 0)
    glorot = [
        model.discriminator.encoder.embeddings_project, model.generator.encoder.embeddings_project,
        model.discriminator.discriminator_predictions.dense_prediction, head.classifier.dense,
        head.classifier.out_proj,
    ]  # fmt: skip
    for linear in glorot:
        fan_out, fan_in = linear.weight.shape
        limit = math.sqrt(6 / (fan_in + fan_out))
        assert 0.9 * limit < linear.weight.abs().max() <= limit
        assert linear.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.15)
        assert not linear.bias.any()
    layer = model.discriminator.encoder.layers[0]
    normal = [
        layer.attention.qkv, layer.attention.dense, layer.intermediate, layer.output,
        model.discriminator.discriminator_predictions.dense, model.generator.generator_predictions.dense,
        model.generator.encoder.embeddings.word_embeddings,
    ]  # fmt: skip
    for module in normal:
        assert 0.03 < module.weight.abs().max() <= 0.04, "truncated at two deviations of 0.02"
        assert module.weight.std().item() == pytest.approx(0.02 * 0.88, rel=0.05)  # what truncation leaves
    assert not layer.attention.qkv.bias.any() and (layer.output_norm.weight == 1).all()


def test_11_mlm_head_is_dense_gelu_layer_norm_then_the_tied_projection() -> None:
    torch.manual_seed(0)
    model: Any = Generator(CONFIG).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    batch = make_batch()
    positions = batch.masked_positions_M
    hidden_MD = model.encoder(batch.tokens)[positions]
    head = model.generator_predictions
    x = hidden_MD @ head.dense.weight.T + head.dense.bias
    x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-12)
    x = x * head.LayerNorm.weight + head.LayerNorm.bias
    expected = x @ model.encoder.embeddings.word_embeddings.weight.T + model.output_bias
    torch.testing.assert_close(model(batch.tokens, positions), expected, rtol=1e-4, atol=1e-4)
    seen = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    whole = make_electra()
    whole.generator.generator_predictions.register_forward_hook(lambda m, i, output: seen.append(len(output)))
    whole(batch, seed=0)
    assert seen == [4], "the head runs at masked positions only"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_12_sampling_and_softmax_do_not_underflow_in_half_precision(dtype: torch.dtype) -> None:
    """log(u + 1e-9), the original's Gumbel noise, is log 0 in fp16: here nothing is NaN, and draws stay exact."""
    assert torch.tensor(1e-9, dtype=torch.float16) == 0
    rows = 20_000
    logits_MV = torch.tensor([12.0, 5.0, 0.0, -15.0]).to(dtype).repeat(rows, 1)
    every_M = torch.arange(rows)
    sampled_M = sample_and_replace(logits_MV, torch.zeros(rows, dtype=torch.int64), every_M, seed=0).sampled_ids_M
    expected = torch.softmax(logits_MV[0].double(), 0)
    counts = sampled_M.bincount(minlength=4)
    deviation = (expected * (1 - expected) * rows).sqrt()
    assert sampled_M.min() == 0 and ((counts - expected * rows).abs() < 4 * deviation + 1).all()
    hidden_ME = torch.full((3, 8), 4.0, dtype=dtype)
    words_VE = torch.full((40, 8), -3.0)
    words_VE[5] = 3.0  # logits of 96 and -96: exp(-192) is 0 in fp32, its logarithm is not
    head = mlm_head(hidden_ME, words_VE, torch.zeros(40), torch.tensor([5, 6, 7]), seed=0)
    torch.testing.assert_close(head.loss_M, torch.tensor([0.0, 192.0, 192.0]))
    assert head.sampled_ids_M.tolist() == [5, 5, 5]


def test_13_layer_wise_decay_as_intended_and_as_in_the_original() -> None:
    """The original's table puts the top layer at d^2. The paper gives the factor alone; we take d to be meant."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=12)
    model = tasks.SequenceClassifier(config)

    def exponents(**options: Any) -> dict[str, float]:
        options |= {"learning_rate": 1e-4, "weight_decay": 0.01, "layerwise_decay": 0.8}
        groups = optim.parameter_groups(model, **options)
        assert all(group["lr"] == pytest.approx(1e-4 * group["lr_scale"]) for group in groups)
        return {name: math.log(group["lr_scale"], 0.8) for group in groups for name, _ in group["params"]}

    ours, original = exponents(), exponents(original_depths=True)
    assert ours["classifier.out_proj.weight"] == original["classifier.out_proj.weight"] == 0
    for layer in range(12):
        name = f"encoder.layers.{layer}.output.weight"
        assert ours[name] == pytest.approx(12 - layer) and original[name] == pytest.approx(13 - layer)
    for name in ("encoder.embeddings.word_embeddings.weight", "encoder.embeddings_project.bias"):
        assert ours[name] == pytest.approx(13) and original[name] == pytest.approx(14)
    assert len(ours) == len(list(model.parameters()))
    for depths, expected in ((False, ours), (True, original)):
        settings = FinetuneSettings(layerwise_decay=0.8, learning_rate=1e-4, original_depths=depths)
        groups = finetune_steps.task_optimizer(model, settings).param_groups
        scales = {name: group["lr_scale"] for group in groups for name in group["param_names"]}
        assert scales == pytest.approx({name: 0.8**exponent for name, exponent in expected.items()})
    uniform = optim.parameter_groups(Discriminator(config), learning_rate=1e-4, weight_decay=0.01)
    assert {group["lr"] for group in uniform} == {1e-4}, "pre-training has none"


def test_14_fine_tuning_loss_is_a_mean_and_the_scale_hardly_matters() -> None:
    """The original sums over the batch before clipping. With its Adam an update hardly knows the scale."""
    logits, labels = torch.randn(32, 3), torch.arange(32) % 3
    mean = tasks.classification_loss(logits, labels)
    torch.testing.assert_close(mean, F.cross_entropy(logits, labels, reduction="sum") / 32)
    updates = []
    for factor in (1.0, 32.0):
        p = nn.Parameter(torch.zeros(1000, dtype=torch.float64))
        p.grad = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * factor
        ElectraAdam([p], lr=1e-4, weight_decay=0.0).step()
        updates.append(p.detach().clone())
    difference = (updates[0] - updates[1]).norm() / updates[0].norm()
    assert difference < 0.01
