"""Going on from a pair of models: whose sizes count, and what may be more than the pair has."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import RUN, data, one_thread, train  # noqa: F401
from torch import nn

from electra_core.cli import main
from electra_core.config import PRESETS, EncoderConfig, PretrainConfig
from electra_core.electra import Discriminator, Electra
from electra_core.encoder import Encoder
from electra_core.errors import UserError, on_command_line
from electra_core.hub.weight_files import weights_digest
from electra_core.model_dir import save_pretrained
from electra_core.pretrain import pretrain
from electra_core.pretraining import start_pair
from electra_core.pretraining.start_pair import StartPair
from electra_core.runs.metrics_log import read_metrics
from electra_core.tokenizer import load_tokenizer

STILL = {"learning_rate": 1e-30, "weight_decay": 0.0, "optimizer": "adamw"}
RECIPE = {name: value for name, value in RUN.items() if not name.startswith("generator_")} | STILL
POSITIONS = "electra.embeddings.position_embeddings.weight"
WORDS = "electra.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "run"
    train(data, out, {"steps": 2}, sizes={"hidden_size": 32})
    return out


def pair(folder: Path) -> dict[str, Path]:
    return {"init_discriminator": folder / "discriminator", "init_generator": folder / "generator"}


def go_on(data: Path, out: Path, folder: Path, sizes=None, **changes):
    return pretrain(
        data, out, changes=RECIPE | changes, encoder_changes=sizes or {}, quiet=True, device="cpu", **pair(folder)
    )


def tensors(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    return load_file(folder / kind / "model.safetensors")


@pytest.mark.parametrize("name", PRESETS)
def test_the_preset_of_a_pair_is_known_by_its_layers(name: str) -> None:
    preset = PRESETS[name]
    found = StartPair(dataclasses.replace(preset.discriminator, max_position_embeddings=64), preset.generator())
    assert found.preset == name
    assert (
        StartPair(dataclasses.replace(preset.discriminator, num_hidden_layers=3), preset.generator()).preset
        == "small"
    )


def test_sizes_that_nobody_gives_are_the_pair_s(data: Path, base: Path, tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        go_on(data, tmp_path / "more", base)
    (told,) = [message for message in caplog.messages if message.startswith("starting from a pair")]
    assert "model='small', with the pair's sizes: embedding_size 16" in told and "generator_hidden_size 16" in told
    for kind in ("discriminator", "generator"):
        before, after = tensors(base, kind), tensors(tmp_path / "more", kind)
        assert all(torch.equal(before[name], after[name]) for name in before)
        digest = weights_digest(base / kind)[:16]
        assert f"`{kind}` (weights `{digest}`)" in (tmp_path / "more" / kind / "README.md").read_text()
        assert "Continued from" not in (base / kind / "README.md").read_text()


def test_what_the_pair_knew_before_the_first_step_is_in_the_log(data: Path, base: Path, tmp_path: Path) -> None:
    go_on(data, tmp_path / "more", base, steps=1)
    before, after = [row for row in read_metrics(tmp_path / "more/metrics.jsonl") if "eval_rtd_auc" in row]
    assert before.pop("step") == 0 and before.pop("tokens") == 0
    assert before == {name: after[name] for name in before}  # at a rate of 1e-30 nothing is learned
    assert all("eval_rtd_auc" not in row for row in read_metrics(base / "metrics.jsonl") if row["step"] == 0)


@pytest.mark.parametrize("sizes, changes", [({"hidden_size": 64}, {}), ({}, {"generator_layers": 2})])
def test_sizes_that_disagree_are_answered_with_flags(
    data: Path, base: Path, tmp_path: Path, sizes, changes
) -> None:
    with on_command_line(), pytest.raises(UserError, match=r"^--init-discriminator: the pair has ") as caught:
        go_on(data, tmp_path / "more", base, sizes, **changes)
    flags = str(caught.value).split("or set them with ")[1]
    assert "--hidden-size 32 " in flags and "--generator-layers 1" in flags
    given = [
        "--steps",
        "1",
        "--batch-size",
        "8",
        "--max-length",
        "24",
        "--device",
        "cpu",
        "--quiet",
        "--model",
        "small",
    ]
    starts = [f"--{name.replace('_', '-')}={folder}" for name, folder in pair(base).items()]
    command = ["pretrain", "--data", str(data), "--out", str(tmp_path / "more"), *given, *starts]
    assert main(command) == 2
    assert main([*command, *flags.split()]) == 0


def test_counted_words_of_the_preset_do_not_stand_in_the_way(
    data: Path, base: Path, tmp_path: Path, monkeypatch
) -> None:
    """The vocabulary may be too large to be counted; nobody counts where the pair has the words already."""
    monkeypatch.setattr("electra_core.pretraining.cooccurrence.LARGEST_VOCABULARY", 20)
    with pytest.raises(UserError, match="embedding_init: 'cooccurrence' needs a vocabulary of"):
        train(data, tmp_path / "new", sizes={"hidden_size": 32})
    train(data, tmp_path / "more", {"steps": 1}, sizes={"hidden_size": 32}, **pair(base))


def test_a_model_may_have_more_words_than_its_tokenizer(data: Path, base: Path, tmp_path: Path) -> None:
    wide = shutil.copytree(base, tmp_path / "wide")
    for kind in ("discriminator", "generator"):
        config = json.loads((wide / kind / "config.json").read_text())
        held = tensors(wide, kind)
        for name, tensor in held.items():
            if len(tensor) == config["vocab_size"]:
                held[name] = torch.cat((tensor, torch.zeros(9, *tensor.shape[1:])))
        save_file(held, wide / kind / "model.safetensors", {"format": "pt"})
        config["vocab_size"] += 9
        (wide / kind / "config.json").write_text(json.dumps(config))
    go_on(data, tmp_path / "more", wide)
    size = load_tokenizer(data / "tokenizer").vocab_size
    assert len(tensors(tmp_path / "more", "generator")[WORDS]) == size + 9
    result = go_on(data, tmp_path / "again", tmp_path / "more", steps=3, temperature=100.0)
    assert result.steps == 3, "draws of words that the tokenizer has not are words like any"


def test_more_positions_begin_as_a_repetition(data: Path, base: Path, tmp_path: Path, caplog) -> None:
    before = tensors(base, "discriminator")
    few = len(before[POSITIONS])
    go_on(data, tmp_path / "long", base, {"max_position_embeddings": 2 * few + 5})
    assert f"max_position_embeddings={2 * few + 5}: the pair has {few}; the others start as" in caplog.text
    for kind in ("discriminator", "generator"):
        before, after = tensors(base, kind), tensors(tmp_path / "long", kind)
        repeated = torch.arange(2 * few + 5) % few
        assert torch.equal(after.pop(POSITIONS), before[POSITIONS][repeated])
        assert all(torch.equal(before[name], after[name]) for name in after)
    with pytest.raises(UserError, match=f"max_position_embeddings {few}, not {few - 1}"):
        go_on(data, tmp_path / "short", base, {"max_position_embeddings": few - 1})


def test_more_positions_beside_a_number_and_buffers_of_one_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number has no rows to repeat; a buffer comes along, but one with a value for each position is kept."""

    class Counting(Encoder):
        def __init__(self, config: EncoderConfig, *rest: Any) -> None:
            super().__init__(config, *rest)
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("places", torch.arange(config.max_position_embeddings))

    class Own(Electra):
        def __init__(self, *configs: Any) -> None:
            super().__init__(*configs)
            self.scale = nn.Parameter(torch.tensor(2.0))

    monkeypatch.setattr(Discriminator, "encoder_class", Counting)
    monkeypatch.setattr(start_pair, "build_objective", Own)
    sizes = dict.fromkeys(("vocab_size", "embedding_size", "hidden_size", "intermediate_size"), 16)
    few = EncoderConfig(**sizes, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=8)
    config = PretrainConfig(generator_hidden_size=8, generator_attention_heads=1, generator_layers=1)
    short = Own(few, config)
    short.get_buffer("discriminator.encoder.seen").fill_(7)
    for half in ("discriminator", "generator"):
        save_pretrained(getattr(short, half), tmp_path / half)

    many = dataclasses.replace(few, max_position_embeddings=12)
    model: Any = Own(many, config)
    start_pair.start_from_pair(model, many, config, tmp_path / "discriminator", tmp_path / "generator")
    assert float(model.scale.detach()) == 2 and float(model.get_buffer("discriminator.encoder.seen")) == 7
    assert model.get_buffer("discriminator.encoder.places").tolist() == list(range(12))
