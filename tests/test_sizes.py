"""Sizes that follow from others: as in the original, unless given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import data, one_thread  # noqa: F401

from electra_core.cli import main
from electra_core.config import PRESETS, EncoderConfig, generator_config, updated
from electra_core.errors import UserError
from electra_core.pretraining.run_folder import read_config
from electra_core.sizes import with_followers


def resolved(
    model: str, changes: dict[str, Any] | None = None, sizes: dict[str, Any] | None = None
) -> tuple[EncoderConfig, EncoderConfig]:
    """Discriminator and generator."""
    preset = PRESETS[model]
    narrow, own = with_followers(preset, changes or {}, sizes or {})
    encoder = updated(preset.discriminator, own, "discriminator")
    return encoder, generator_config(encoder, updated(preset.pretrain, narrow, "configuration"))


def original(hidden: int, layers: int, part: float, embedding: int | None = None) -> list[tuple[int, ...]]:
    """Layers, width, heads, feed-forward, words of both, by the original's formulas (`get_bert_config`,
    `get_generator_config`)."""
    narrow = round(hidden * part)
    return [(layers, width, max(1, width // 64), 4 * width, embedding or hidden) for width in (hidden, narrow)]


def shape(config: EncoderConfig) -> tuple[int, ...]:
    return (
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size,
        config.embedding_size,
    )  # fmt: skip


@pytest.mark.parametrize("model", PRESETS)
def test_of_a_preset_nothing_changes(model: str) -> None:
    preset = PRESETS[model]
    assert resolved(model) == (preset.discriminator, preset.generator())


@pytest.mark.parametrize(
    ("model", "hidden", "layers", "part", "embedding"),
    [
        ("small", 512, 12, 0.25, 128), ("small", 256, 6, 0.25, 128), ("small++", 128, 12, 1.0, 128),
        ("base", 384, 12, 0.33333, None), ("base", 768, 3, 0.33333, None), ("large", 1536, 48, 0.25, None),
        ("small", 64, 2, 0.25, 128), ("small", 96, 2, 1.0, 128),
    ],
)  # fmt: skip
def test_a_changed_width_or_depth_is_followed_as_in_the_original(
    model: str, hidden: int, layers: int, part: float, embedding: int | None
) -> None:
    """The generator keeps its part of the width, or has one of its own."""
    narrow = {} if PRESETS[model].discriminator.hidden_size * part == PRESETS[model].generator().hidden_size else {
        "generator_hidden_size": round(hidden * part)
    }  # fmt: skip
    models = resolved(model, narrow, {"hidden_size": hidden, "num_hidden_layers": layers})
    assert [shape(config) for config in models] == original(hidden, layers, part, embedding)


def test_a_generator_of_another_width_has_its_heads() -> None:
    encoder, generator = resolved("small", {"generator-hidden-size": 128})
    assert shape(generator) == (12, 128, 2, 512, 128)
    assert encoder == PRESETS["small"].discriminator


def test_tiny_keeps_its_own_proportions() -> None:
    """Heads of 32, in the generator of 16, and a generator a quarter as deep."""
    encoder, generator = resolved("tiny", {}, {"hidden_size": 256, "num_hidden_layers": 8})
    assert shape(encoder) == (8, 256, 8, 1024, 256)
    assert shape(generator) == (2, 64, 4, 256, 256)
    assert resolved("tiny", {}, {"num_hidden_layers": 1})[1].num_hidden_layers == 1


def test_a_width_that_heads_of_64_do_not_divide_has_fewer() -> None:
    """There the original stops; one head of less than 64 is its own way with the narrowest."""
    assert resolved("small", {}, {"hidden_size": 200})[0].num_attention_heads == 2
    assert resolved("small", {}, {"hidden_size": 200})[1].hidden_size == 50


def test_what_is_given_stays() -> None:
    changes = {
        "generator_hidden_size": 128, "generator_attention_heads": 4, "generator_intermediate_size": 100,
        "generator_layers": 2,
    }  # fmt: skip
    sizes = {
        "hidden_size": 512, "num_attention_heads": 4, "intermediate_size": 1000, "embedding_size": 64,
        "num_hidden_layers": 3,
    }  # fmt: skip
    encoder, generator = resolved("small", changes, sizes)
    assert shape(encoder) == (3, 512, 4, 1000, 64)
    assert shape(generator) == (2, 128, 4, 100, 64)


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [0, -3, 2.5, "wide"])
def test_a_size_that_is_none_is_still_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        resolved("small", {}, {name: value})


def test_a_pretraining_run_has_them_from_flags_and_files(data: Path, tmp_path: Path) -> None:
    """What came out is in RUN/config.toml, whatever it came from."""
    (tmp_path / "run.toml").write_text("[discriminator]\nhidden-size = 128\nnum_hidden_layers = 2\n")
    settings = "--steps 1 --batch-size 2 --max-length 16 --eval-every 1 --eval-examples 2 --warmup-steps 0"
    flags = f"--generator-hidden-size 128 {settings} --quiet --device cpu".split()
    command = ["pretrain", "--data", str(data), "--model", "small", "--config", str(tmp_path / "run.toml")]
    assert main([*command, "--out", str(tmp_path / "run"), *flags]) == 0
    run, encoder = read_config(tmp_path / "run" / "config.toml")
    assert (encoder["num_attention_heads"], encoder["intermediate_size"], encoder["embedding_size"]) == (
        2,
        512,
        128,
    )
    assert (run["generator_attention_heads"], run["generator_intermediate_size"]) == (2, 512)
    assert run["generator_layers"] == 2


def test_a_fraction_may_follow_a_whole_number() -> None:
    """As in a preset of one's own: the field's type counts, not the value's."""
    whole = EncoderConfig(hidden_dropout_prob=0)
    assert updated(whole, {"hidden_dropout_prob": 0.1}, "here").hidden_dropout_prob == 0.1
