"""Parameters and FLOPs against the tables of the paper and of its repository."""

import dataclasses

import pytest
import torch
from electra_kernels import native

from electra_core import flops
from electra_core.config import OBJECTIVES, PRESETS, EncoderConfig, PretrainConfig, generator_config
from electra_core.electra import Discriminator, Electra, Generator, PretrainBatch
from electra_core.objectives import build_objective
from electra_core.packing import from_lengths
from electra_core.pretraining.meter import flops_per_token

# google-research/electra, flops_computation.py, to every digit that the project's recipe prints.
PAPER = {
    "bert_small": "1.4187e+18",
    "bert_base": "6.4283e+19",
    "bert_large": "1.9172e+20",
    "electra_small": "1.2937e+18",
    "electra_base": "6.4245e+19",
    "electra_400k": "7.1176e+20",
    "electra_1.75M": "3.1140e+21",
}


def electra(name: str, steps: int) -> flops.Run:
    preset = PRESETS[name]
    return dataclasses.replace(flops.run_of(preset.discriminator, preset.pretrain), steps=steps)


def bert(name: str, steps: int, batch_size: int) -> flops.Run:
    return dataclasses.replace(electra(name, steps), generator=None, batch_size=batch_size)


PAPER_RUNS = {
    "bert_small": bert("small", 1_450_000, 128),
    "bert_base": bert("base", 1_000_000, 256),
    "bert_large": bert("large", 1_000_000, 256),
    "electra_small": electra("small", 1_000_000),
    "electra_base": electra("base", 766_000),
    "electra_400k": electra("large", 400_000),
    "electra_1.75M": electra("large", 1_750_000),
}


@pytest.mark.parametrize("name", PAPER)
def test_training_flops_of_the_paper(name: str) -> None:
    assert f"{flops.original_training_flops(PAPER_RUNS[name]):.4e}" == PAPER[name]


def test_the_papers_comparison_at_equal_flops() -> None:
    """ELECTRA-Small's million steps cost nearly what 1.45 million of BERT-Small's cost; Base's exactly."""
    runs = {name: flops.original_training_flops(run) for name, run in PAPER_RUNS.items()}
    assert 0.9 < runs["electra_small"] / runs["bert_small"] < 1.0
    assert runs["electra_base"] / runs["bert_base"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "expected"), [("small", 13_549_057), ("base", 109_483_009), ("large", 335_142_913)]
)
def test_parameters_of_the_paper(name: str, expected: int) -> None:
    assert flops.discriminator_parameters(PRESETS[name].discriminator) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_models(name: str) -> None:
    preset = PRESETS[name]
    shallow = dataclasses.replace(preset.discriminator, num_hidden_layers=2)
    narrow = dataclasses.replace(preset.generator(), num_hidden_layers=2)
    for model, count in (
        (Discriminator(shallow), flops.discriminator_parameters(shallow)),
        (Generator(narrow), flops.generator_parameters(narrow)),
    ):
        assert sum(p.numel() for p in model.parameters()) == count


def counted_by_torch(model: torch.nn.Module, call) -> int:  # type: ignore[no-untyped-def]
    """FLOPs of the matrix products that really ran, forward and backward, attention aside: our operator cannot be
    seen, PyTorch's on a CPU is seen since 2.15.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call(model).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in counts.items() if "attention" not in str(operator))


def test_modern_counting_is_what_runs() -> None:
    """Against torch's counter of matrix products, attention aside."""
    config = EncoderConfig(
        vocab_size=100, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16,
    )  # fmt: skip
    lengths = [5, 9, 2]
    ids = torch.randint(5, 100, (16,), generator=torch.Generator().manual_seed(0))
    batch = from_lengths(ids, torch.zeros_like(ids), lengths)
    attention = 3 * (flops.forward_flops(config, 16, 25 + 81 + 4) - flops.forward_flops(config, 16, 0))
    assert attention == 3 * 4 * 32 * (25 + 81 + 4) * 3
    expected = 3 * (flops.forward_flops(config, 16, 0) + flops.rtd_head_flops(config, 16))
    assert counted_by_torch(Discriminator(config), lambda m: m(batch)) == expected
    positions = torch.tensor([1, 7, 12])
    expected = 3 * (flops.forward_flops(config, 16, 0) + flops.mlm_head_flops(config, 3))
    assert counted_by_torch(Generator(config), lambda m: m(batch, positions)) == expected


@pytest.mark.parametrize(("name", "sequences"), [("tiny", 16), ("small", 128)])
def test_a_step_is_the_sum_of_its_parts(name: str, sequences: int) -> None:
    preset, tokens = PRESETS[name], sequences * 128
    model, generator, pairs = preset.discriminator, preset.generator(), tokens * 128
    parts = (
        flops.forward_flops(model, tokens, pairs) + flops.rtd_head_flops(model, tokens)
        + flops.forward_flops(generator, tokens, pairs) + flops.mlm_head_flops(generator, 0.15 * tokens)
    )  # fmt: skip
    step = flops.training_step_flops(model, preset.pretrain)
    assert step == pytest.approx(3 * parts, rel=1e-12)
    figures = flops.summary(model, preset.pretrain)
    assert figures["training_flops_modern_counting"] == preset.pretrain.steps * step


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("uniform", [False, True])
def test_a_step_of_every_objective_is_what_runs(
    objective: str, uniform: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch's counter, attention aside; on sequences that are full, with as many masked as is counted."""
    monkeypatch.setattr(native, "has_avx2", lambda: False)  # the head by its twin: loops in C are not seen
    config = EncoderConfig(
        vocab_size=100, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=20,
    )  # fmt: skip
    run = PretrainConfig(
        objective=objective, uniform_generator=uniform, batch_size=2, max_length=20, generator_hidden_size=16,
        generator_intermediate_size=32, generator_layers=2,
    )  # fmt: skip
    ids = torch.randint(5, 100, (40,), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([1, 7, 12, 22, 30, 38])
    batch = PretrainBatch(from_lengths(ids, torch.zeros_like(ids), [20, 20]), ids, positions)
    counted = counted_by_torch(build_objective(config, run), lambda m: m(batch, 0).loss)
    models = [(config, 3)] + ([(generator_config(config, run), 2)] if objective != "mlm" and not uniform else [])
    attention = sum(3 * 4 * model.hidden_size * 2 * 20 * 20 * layers for model, layers in models)
    assert flops.training_step_flops(config, run) - attention == counted


def test_what_an_ablation_costs_is_in_the_log() -> None:
    """All-tokens MLM predicts a word at every token: nearly twice ELECTRA's cost with tiny."""
    preset = PRESETS["tiny"]
    per_token = {
        name: flops_per_token(preset.discriminator, dataclasses.replace(preset.pretrain, objective=name))
        for name in OBJECTIVES
    }
    assert per_token["all-tokens-mlm"] / per_token["electra"] == pytest.approx(1.94, abs=0.01)
    assert per_token["electra-15"] == per_token["electra"]
    uniform = dataclasses.replace(preset.pretrain, uniform_generator=True)
    rtd = flops.rtd_head_flops(preset.discriminator, 1) + flops.forward_flops(preset.discriminator, 1, 128)
    assert flops_per_token(preset.discriminator, uniform) == pytest.approx(3 * rtd)


def test_the_originals_counting_is_of_what_its_script_knows() -> None:
    preset = PRESETS["small"]
    for changes, known in (({}, True), ({"objective": "mlm"}, True), ({"objective": "replace-mlm"}, False),
                           ({"uniform_generator": True}, False)):  # fmt: skip
        figures = flops.summary(preset.discriminator, dataclasses.replace(preset.pretrain, **changes))
        assert ("training_flops_original_counting" in figures) == known
        assert figures["training_flops_modern_counting"] == 1_000_000 * figures["modern_flops_per_step"]


def test_the_two_countings_are_apart() -> None:
    """Neither is the other times a constant: look-ups dominate the small model's, and not the large one's."""
    ratios = {}
    for name in ("small", "large"):
        figures = flops.summary(PRESETS[name].discriminator, PRESETS[name].pretrain)
        original = figures["training_flops_original_counting"]
        ratios[name] = figures["training_flops_modern_counting"] / original
    assert ratios["small"] < 1 < ratios["large"] < 1.5


def test_summary_of_a_model_alone() -> None:
    figures = flops.summary(PRESETS["base"].discriminator)
    assert figures.keys() == {"discriminator_parameters", "forward_flops_per_token"}


def test_presets_build_models_of_the_counted_size() -> None:
    preset = PRESETS["tiny"]
    model = Electra(preset.discriminator, preset.pretrain)
    summary = flops.summary(preset.discriminator, preset.pretrain)
    assert sum(p.numel() for p in model.discriminator.parameters()) == summary["discriminator_parameters"]
    assert sum(p.numel() for p in model.generator.parameters()) == summary["generator_parameters"]
