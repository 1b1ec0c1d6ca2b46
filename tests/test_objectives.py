"""The paper's other objectives against their formulas, and the options of the draw."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from small_objectives import CONFIG, MASK_ID, PRETRAIN, make, make_batch

import electra_core
from electra_core import model_dir
from electra_core.adam import ElectraAdam
from electra_core.config import OBJECTIVES
from electra_core.electra import SAMPLING_STREAM, Electra, PretrainBatch, replace_tokens, uniform_words
from electra_core.packing import from_lengths
from electra_core.tasks import HEAD_STREAM

WORDS = [name for name in OBJECTIVES if "mlm" in name]
HEAD = "discriminator.discriminator_predictions"


def louder(model: torch.nn.Module) -> None:
    """Weights large enough that predictions differ from place to place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns_one_batch(objective: str) -> None:
    """What is kept learns; the draws are a uniform generator's, so that its task stays the same."""
    model, batch = make(objective, uniform_generator=objective != "mlm"), make_batch()
    optimizer = ElectraAdam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        output = model(batch, seed=0)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append((output.rtd_loss if output.word_loss is None else output.word_loss).item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("objective", WORDS)
def test_a_hook_on_the_model_that_predicts_words_changes_its_loss(objective: str) -> None:
    """The loss went around it. Sharper logits are those of a head with larger weights."""
    hooked, larger, batch = make(objective), make(objective), make_batch()
    plain = hooked(batch, seed=0).word_loss
    hooked.discriminator.register_forward_hook(lambda module, inputs, output: 30 * output)
    with torch.no_grad():
        for p in (
            *larger.discriminator.generator_predictions.LayerNorm.parameters(),
            larger.discriminator.output_bias,
        ):
            p.mul_(30)
    found, expected = hooked(batch, seed=0).word_loss, larger(batch, seed=0).word_loss
    torch.testing.assert_close(found, expected)
    assert abs(found - plain) > 0.1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_parameter_starts_from_the_run_s_seed(objective: str) -> None:
    """And not from torch's own generator, whose state is whatever came before."""
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        starts.append(make(objective).state_dict())
    assert starts[0].keys() == starts[1].keys()
    assert not [name for name, value in starts[0].items() if not torch.equal(value, starts[1][name])]


@pytest.mark.parametrize("tying", ["embeddings", "none", "disentangled", "all"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_parameter_is_trained(objective: str, tying: str) -> None:
    sizes = {"generator_hidden_size": 16, "generator_attention_heads": 2, "generator_intermediate_size": 24}
    model = make(objective, tying=tying, **(sizes | {"generator_layers": 2} if tying == "all" else {}))
    output = model(make_batch(), seed=0)
    output.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    is_words = objective in WORDS
    assert (output.word_loss is not None) == is_words and (output.rtd_loss.item() == 0) == is_words


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_parts_of_a_batch_add_up_to_it(objective: str) -> None:
    """Two sequences, then one, with their rows counted on: the whole's losses, gradients, draws and dropout."""
    model, whole = make(objective), make_batch()
    ids, masked_ids = whole.tokens.input_ids_T, whole.masked_ids_T
    parts = []
    for tokens, lengths, masked in ((slice(0, 16), [12, 4], slice(0, 4)), (slice(16, 30), [14], slice(4, 7))):
        text = from_lengths(ids[tokens], torch.zeros_like(ids[tokens]), lengths)
        positions = whole.masked_positions_M[masked] - tokens.start
        shares = {"token_share": sum(lengths) / 30, "masked_share": len(positions) / 7}
        parts.append(PretrainBatch(text, masked_ids[tokens], positions, tokens.start, masked.start, **shares))
    one = model(whole, seed=8)
    one.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    two = [model(part, seed=8) for part in parts]
    sum(part.loss for part in two).backward()
    assert torch.equal(torch.cat([part.corrupted_ids_T for part in two]), one.corrupted_ids_T)
    for name in ("loss", "mlm_loss", "rtd_loss"):
        torch.testing.assert_close(sum(getattr(part, name) for part in two), getattr(one, name))
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5)


def test_electra_15_is_judged_at_masked_positions_only() -> None:
    model, batch = make("electra-15").eval(), make_batch()
    louder(model)
    output = model(batch, seed=5)
    at_M = batch.masked_positions_M
    labels_M = output.is_replaced_T[at_M].float()
    expected = F.binary_cross_entropy_with_logits(output.rtd_logits_T[at_M], labels_M)
    torch.testing.assert_close(output.rtd_loss, expected)
    torch.testing.assert_close(output.loss, output.mlm_loss + 50 * expected)
    everywhere = F.binary_cross_entropy_with_logits(output.rtd_logits_T, output.is_replaced_T.float())
    assert not torch.isclose(everywhere, expected)


def test_electra_15_reads_the_same_text_as_electra() -> None:
    """The two differ in where the loss is taken and in nothing else."""
    one, other, batch = make("electra").eval(), make("electra-15").eval(), make_batch()
    a, b = one(batch, seed=5), other(batch, seed=5)
    assert torch.equal(a.corrupted_ids_T, b.corrupted_ids_T) and torch.equal(a.rtd_logits_T, b.rtd_logits_T)
    assert torch.equal(a.mlm_loss, b.mlm_loss)


def test_mlm_is_cross_entropy_of_the_masked_words() -> None:
    model, batch = make("mlm").eval(), make_batch()
    louder(model)
    logits_MV = model.discriminator(batch.tokens.with_ids(batch.masked_ids_T), batch.masked_positions_M)
    output = model(batch, seed=0)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits_MV, batch.target_ids_M))
    assert torch.equal(output.corrupted_ids_T, batch.masked_ids_T)
    assert not output.is_replaced_T.any() and not output.rtd_logits_T.any(), "nothing is replaced, nothing judged"
    assert output.mlm_loss is output.word_loss and model.generator is model.discriminator
    names = [name for name, _ in model.named_parameters()]
    assert all(name.startswith("discriminator.") for name in names), "one model, once"


def test_replace_mlm_predicts_the_originals_from_the_generators_text() -> None:
    model, batch = make("replace-mlm", generator_weight=2.0).eval(), make_batch()
    louder(model)
    output = model(batch, seed=3)
    assert output.is_replaced_T.any() and not (output.corrupted_ids_T == MASK_ID).all()
    text = batch.tokens.with_ids(output.corrupted_ids_T)
    expected = F.cross_entropy(model.discriminator(text, batch.masked_positions_M), batch.target_ids_M)
    torch.testing.assert_close(output.word_loss, expected)
    torch.testing.assert_close(output.loss, 2.0 * output.mlm_loss + expected)
    assert output.rtd_logits_T.is_floating_point() and not output.rtd_logits_T.any(), "nothing is judged"


def test_all_tokens_mlm_is_the_mixture_of_copy_and_softmax() -> None:
    model, batch = make("all-tokens-mlm").double().eval(), make_batch()
    louder(model)
    output = model(batch, seed=3)
    text = batch.tokens.with_ids(output.corrupted_ids_T)
    copy_T1 = torch.sigmoid(model.copy_head(model.discriminator.encoder(text)))
    softmax_TV = model.discriminator(text).softmax(-1)
    mixture_TV = copy_T1 * F.one_hot(output.corrupted_ids_T, 40) + (1 - copy_T1) * softmax_TV
    torch.testing.assert_close(mixture_TV.sum(-1), torch.ones(30, dtype=torch.float64))
    originals_T1 = batch.tokens.input_ids_T[:, None]
    expected = -mixture_TV.gather(1, originals_T1).log().mean()
    assert output.is_replaced_T.any() and not output.is_replaced_T.all()
    torch.testing.assert_close(output.word_loss, expected, rtol=1e-6, atol=1e-6)  # the gate is fp32
    torch.testing.assert_close(torch.sigmoid(-output.rtd_logits_T), copy_T1[:, 0].float())


@pytest.mark.parametrize("gate", [-200.0, 200.0])
def test_all_tokens_mlm_survives_a_certain_gate(gate: float) -> None:
    model, batch = make("all-tokens-mlm"), make_batch()
    with torch.no_grad():
        model.copy_head.bias.fill_(gate)
    output = model(batch, seed=3)
    output.loss.backward()
    assert output.loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"disallow_correct": True}], ids=["any word", "not the original"])
@pytest.mark.parametrize("part", ["generator", "discriminator", HEAD, f"{HEAD}.dense_prediction"])
def test_a_model_that_is_called_as_it_is_computes_the_same(part: str, options: dict[str, Any]) -> None:
    """For a hook the logits are computed, which the shorter way never stores: draws, dropout and means stay."""
    plain, hooked, seen = *(make("electra-15", temperature=0.5, **options) for _ in range(2)), []
    hooked.get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
    for model in (plain, hooked):
        louder(model)
    ours, theirs = plain(make_batch(), seed=3), hooked(make_batch(), seed=3)
    assert seen == [part] and torch.equal(ours.corrupted_ids_T, theirs.corrupted_ids_T)
    torch.testing.assert_close(ours.rtd_logits_T, theirs.rtd_logits_T.detach())
    torch.testing.assert_close(ours.loss, theirs.loss)


def test_a_draw_takes_its_place_unless_there_is_none() -> None:
    """From logits that are NaN comes -1; 0 is a word like any."""
    ids_T = torch.tensor([5, 6, 7, 8])
    assert replace_tokens(ids_T, torch.tensor([0, 1, 3]), torch.tensor([-1, 0, 9])).tolist() == [5, 0, 7, 9]
    assert ids_T.tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("objective", WORDS)
def test_what_is_kept_opens_as_any_other_model(objective: str, tmp_path: Path) -> None:
    model = make(objective)
    model_dir.save_pretrained(model.discriminator, tmp_path / "discriminator")
    classifier: Any = electra_core.SequenceClassifier.from_pretrained(tmp_path)
    weights = model.discriminator.encoder.layers[0].intermediate.weight
    assert torch.equal(classifier.encoder.layers[0].intermediate.weight, weights)
    again = electra_core.Generator.from_pretrained(tmp_path / "discriminator")
    assert torch.equal(again.output_bias, model.discriminator.output_bias)


# Options of the draw -----------------------------------------------------------------------------------------


def many_draws(**options: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Probabilities [V] of one masked position, and how often each word is drawn for 20,000 copies of it."""
    model = Electra(CONFIG, dataclasses.replace(PRETRAIN, **options)).eval()
    louder(model)
    batch = make_batch()
    text, repeats = batch.tokens.with_ids(batch.masked_ids_T), 20_000
    position, original = batch.masked_positions_M[:1], batch.target_ids_M[:1]
    with torch.no_grad():
        probabilities = (model.generator(text, position)[0] / options.get("temperature", 1.0)).softmax(-1)
        filled = model.generator.fill(text, position.expand(repeats), original.expand(repeats), model.config, 0, 1)
    return probabilities, filled.sampled_ids_M.bincount(minlength=40), (int(original), filled.loss_M)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("disallow", [False, True], ids=["any word", "not the original"])
def test_draws_follow_the_generator(disallow: bool, temperature: float) -> None:
    probabilities, counts, (original, loss_M) = many_draws(disallow_correct=disallow, temperature=temperature)
    if disallow:
        assert probabilities[original] > 1e-4 and counts[original] == 0
        probabilities[original] = 0
    expected = probabilities.double() / probabilities.double().sum() * counts.sum()
    likely = expected >= 5
    observed = torch.cat((counts[likely].double(), counts[~likely].sum()[None].double()))
    expected = torch.cat((expected[likely], expected[~likely].sum()[None]))
    present = expected > 0
    scale = observed.sum() / expected[present].sum()
    assert chisquare(observed[present], expected[present] * scale).pvalue > 1e-4
    assert loss_M.unique().numel() == 1, "the loss does not know the option"


@pytest.mark.parametrize("disallow", [False, True], ids=["any word", "not the original"])
def test_uniform_generator(disallow: bool) -> None:
    originals = torch.tensor([0, 7, 39]).repeat(8000)
    loss_M, drawn_M = uniform_words(originals, 40, seed=4, disallow_correct=disallow)
    torch.testing.assert_close(loss_M.exp(), torch.full_like(loss_M, 40.0))
    for word in (0, 7, 39):
        counts = drawn_M[originals == word].bincount(minlength=40)
        assert len(counts) == 40 and (counts[word] == 0) == disallow
        assert chisquare(counts[torch.arange(40) != word] if disallow else counts).pvalue > 1e-4


def test_a_uniform_generator_is_not_trained() -> None:
    model, batch = make("electra", uniform_generator=True), make_batch()
    output = model(batch, seed=0)
    output.loss.backward()
    assert output.is_replaced_T.any()
    assert all(p.grad is None for p in model.generator.encoder.layers.parameters())
    assert model.generator.encoder.embeddings.word_embeddings.weight.grad is not None, (
        "shared with what is trained"
    )


def test_disallow_correct_replaces_every_masked_word() -> None:
    for options in ({}, {"uniform_generator": True}):
        output = make("electra", disallow_correct=True, **options)(make_batch(), seed=0)
        assert torch.equal(output.is_replaced_T.nonzero()[:, 0], make_batch().masked_positions_M)


def test_a_draw_of_another_word_is_not_rounded_by_autocast() -> None:
    """Words that differ by half a unit at 1000 are one and the same in bf16, where the next number is 4 away."""
    model, batch = make("electra", disallow_correct=True, temperature=0.01).eval(), make_batch()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model.generator.output_bias.copy_(1000 + 0.5 * torch.arange(40))
        output = model(batch, seed=0)
    best_M = torch.where(batch.target_ids_M == 39, 38, 39)
    assert torch.equal(output.corrupted_ids_T[batch.masked_positions_M], best_M)


def test_no_two_uses_of_random_numbers_share_a_stream() -> None:
    """Else the discriminator would drop what the generator drops, and draws would go with dropout."""
    model = make("electra")
    streams = [SAMPLING_STREAM, HEAD_STREAM, HEAD_STREAM + 1]
    for encoder in (model.generator.encoder, model.discriminator.encoder):
        streams.append(encoder.first_stream)  # of its embeddings
        for layer in encoder.layers:
            streams += [layer.attention.stream, *layer.streams]
    assert len(set(streams)) == len(streams) == 3 + (1 + 3) + (1 + 2 * 3)
