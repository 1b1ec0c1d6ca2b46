"""TensorFlow 1 checkpoints: the file format, the names, and whole models.

TensorFlow is not needed here either: the tests write the format themselves, from its description, with what a
reader can stumble over (several blocks, keys that share beginnings, a second data file).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tf_bundles import write_bundle

import electra_core
from electra_core.cli import main
from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.conversion import convert_tf
from electra_core.conversion.tf_bundle import read_bundle
from electra_core.electra import Electra
from electra_core.errors import UserError
from electra_core.files.protobuf import fields

CONFIG = EncoderConfig(
    vocab_size=30, embedding_size=8, hidden_size=128, num_hidden_layers=11, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=16,
)  # fmt: skip
PRETRAIN = PretrainConfig(
    generator_hidden_size=64, generator_attention_heads=1, generator_intermediate_size=12, generator_layers=2
)


def variables_of(electra: Electra) -> dict[str, np.ndarray]:
    """A checkpoint's variables, named by a table written out here and not by the program's rules."""
    in_layer = {
        "attention.dense": "attention/output/dense",
        "attention_norm": "attention/output/LayerNorm",
        "intermediate": "intermediate/dense",
        "output": "output/dense",
        "output_norm": "output/LayerNorm",
    }
    out: dict[str, np.ndarray] = {"global_step": np.array(7)}

    def put(name: str, module: Any) -> None:
        is_norm = isinstance(module, torch.nn.LayerNorm)
        weight = module.weight.detach().numpy()
        out[f"{name}/{'gamma' if is_norm else 'kernel'}"] = weight if is_norm else weight.T
        out[f"{name}/{'beta' if is_norm else 'bias'}"] = module.bias.detach().numpy()

    for scope, model in (("electra", electra.discriminator), ("generator", electra.generator)):
        encoder: Any = model.encoder
        put(f"{scope}/embeddings_project", encoder.embeddings_project)
        for number, layer in enumerate(encoder.layers):
            for ours, theirs in in_layer.items():
                put(f"{scope}/encoder/layer_{number}/{theirs}", layer.get_submodule(ours))
            weights, biases = layer.attention.qkv.weight.chunk(3), layer.attention.qkv.bias.chunk(3)
            for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
                name = f"{scope}/encoder/layer_{number}/attention/self/{part}"
                out[f"{name}/kernel"], out[f"{name}/bias"] = weight.detach().numpy().T, bias.detach().numpy()
    embeddings: Any = electra.discriminator.encoder.embeddings
    for kind in ("word", "position", "token_type"):
        table = getattr(embeddings, f"{kind}_embeddings").weight.detach().numpy()
        out[f"electra/embeddings/{kind}_embeddings"] = table
    put("electra/embeddings/LayerNorm", embeddings.LayerNorm)
    put("discriminator_predictions/dense", electra.discriminator.discriminator_predictions.dense)
    put("discriminator_predictions/dense_1", electra.discriminator.discriminator_predictions.dense_prediction)
    put("generator_predictions/dense", electra.generator.generator_predictions.dense)
    put("generator_predictions/LayerNorm", electra.generator.generator_predictions.LayerNorm)
    out["generator_predictions/output_bias"] = electra.generator.output_bias.detach().numpy()
    moments = {f"{name}/adam_{moment}": value for name, value in out.items() for moment in "mv" if "/" in name}
    return out | moments


@pytest.fixture
def electra() -> Electra:
    model = Electra(CONFIG, PRETRAIN)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    return model


@pytest.mark.parametrize("shards", [1, 3])
def test_bundles_give_back_every_variable(electra: Electra, shards: int, tmp_path: Path) -> None:
    variables = variables_of(electra)
    write_bundle(tmp_path / "model.ckpt-7", variables, shards)
    stored = read_bundle(tmp_path / "model.ckpt-7")
    assert stored.keys() == variables.keys()
    for name, value in variables.items():
        np.testing.assert_array_equal(stored[name].read(), value)


@pytest.mark.parametrize("path", ["model.ckpt-7", "model.ckpt-7.index", "."], ids=["prefix", "index", "directory"])
def test_both_models_come_over_bit_for_bit(electra: Electra, path: str, tmp_path: Path) -> None:
    write_bundle(tmp_path / "model.ckpt-7", variables_of(electra))
    written = convert_tf.convert_checkpoint(tmp_path / path, tmp_path / "out")
    assert [directory.name for directory in written] == ["discriminator", "generator"]
    discriminator = electra_core.Discriminator.from_pretrained(tmp_path / "out")
    generator = electra_core.Generator.from_pretrained(tmp_path / "out")
    assert discriminator.config == CONFIG and generator.config == electra.generator.config
    for ours, theirs in ((electra.discriminator, discriminator), (electra.generator, generator)):
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q), name


def test_without_a_projection_and_with_untied_embeddings(tmp_path: Path) -> None:
    config = EncoderConfig(
        vocab_size=30, embedding_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=16,
    )  # fmt: skip
    pretrain = PretrainConfig(
        generator_hidden_size=64, generator_intermediate_size=8, generator_layers=1, tying="none"
    )
    electra = Electra(config, pretrain)
    electra.discriminator.encoder.embeddings_project = electra.generator.encoder.embeddings_project = (
        torch.nn.Linear(1, 1)
    )
    variables = {name: v for name, v in variables_of(electra).items() if "embeddings_project" not in name}
    own: Any = electra.generator.encoder.embeddings
    for kind in ("word", "position", "token_type"):
        variables[f"generator/embeddings/{kind}_embeddings"] = (
            getattr(own, f"{kind}_embeddings").weight.detach().numpy()
        )
    variables["generator/embeddings/LayerNorm/gamma"] = own.LayerNorm.weight.detach().numpy()
    variables["generator/embeddings/LayerNorm/beta"] = own.LayerNorm.bias.detach().numpy()
    write_bundle(tmp_path / "ckpt", variables)
    convert_tf.convert_checkpoint(tmp_path / "ckpt", tmp_path / "out")
    generator = electra_core.Generator.from_pretrained(tmp_path / "out")
    discriminator = electra_core.Discriminator.from_pretrained(tmp_path / "out")
    assert torch.equal(generator.encoder.embeddings.word_weight(), own.word_weight())
    theirs = electra.discriminator.encoder.embeddings.word_weight()
    assert torch.equal(discriminator.encoder.embeddings.word_weight(), theirs)


def test_a_checkpoint_without_its_generator(electra: Electra, tmp_path: Path) -> None:
    """As the released fine-tuning checkpoints: the discriminator alone."""
    variables = {name: v for name, v in variables_of(electra).items() if not name.startswith("generator")}
    write_bundle(tmp_path / "ckpt", variables)
    written = convert_tf.convert_checkpoint(tmp_path / "ckpt", tmp_path / "out")
    assert [directory.name for directory in written] == ["discriminator"]


def test_a_script_can_read_what_the_command_wrote(
    electra: Electra, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(tmp_path / "ckpt", variables_of(electra))
    assert main(["convert", "--tf", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"wrote {tmp_path / 'out' / kind}" for kind in ("discriminator", "generator")]


def test_the_vocabulary_comes_along(electra: Electra, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxy"]
    (tmp_path / "vocab.txt").write_text("".join(word + "\n" for word in words))
    write_bundle(tmp_path / "ckpt", variables_of(electra))
    convert_tf.convert_checkpoint(tmp_path / "ckpt", tmp_path / "out")
    tokenizer = electra_core.load_tokenizer(tmp_path / "out" / "generator")
    assert tokenizer.encode("A b") == [5, 6]
    for kind in convert_tf.convert_checkpoint(tmp_path / "ckpt", tmp_path / "cased", lowercase=False):
        assert electra_core.load_tokenizer(kind).encode("A b") == [1, 6], "a cased vocabulary has no A here"


def test_a_vocabulary_larger_than_the_model_is_refused(electra: Electra, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (tmp_path / "vocab.txt").write_text("".join(word + "\n" for word in words))
    write_bundle(tmp_path / "ckpt", variables_of(electra))
    with pytest.raises(UserError, match=r"vocab.txt: .* differ: 31 in the tokenizer, 30 in the model"):
        convert_tf.convert_checkpoint(tmp_path / "ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_number_of_heads_is_the_discriminator_s(electra: Electra, tmp_path: Path) -> None:
    """A checkpoint does not say it; the generator's is told by its own width."""
    write_bundle(tmp_path / "ckpt", variables_of(electra))
    convert_tf.convert_checkpoint(tmp_path / "ckpt", tmp_path / "out", num_heads=4)
    heads = [
        kind.from_pretrained(tmp_path / "out").config.num_attention_heads
        for kind in (electra_core.Discriminator, electra_core.Generator)
    ]
    assert heads == [4, 1]


def test_what_is_amiss_is_listed(electra: Electra, tmp_path: Path) -> None:
    variables = variables_of(electra)
    variables["electra/encoder/layer_0/output/dense/kernel"] = np.zeros((3, 4), "float32")
    del variables["electra/encoder/layer_1/output/dense/bias"]
    write_bundle(tmp_path / "ckpt", variables)
    with pytest.raises(UserError) as caught:
        convert_tf.convert_checkpoint(tmp_path / "ckpt", tmp_path / "out")
    assert "missing: electra.encoder.layer.1.output.dense.bias" in str(caught.value)
    assert "wrong shape: electra.encoder.layer.0.output.dense.weight (3, 4)" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_other_things(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no TensorFlow checkpoint"):
        convert_tf.convert_checkpoint(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(UserError, match="expected one checkpoint in this directory, got none"):
        convert_tf.convert_checkpoint(tmp_path, tmp_path / "out")
    write_bundle(tmp_path / "mnist", {"layer/kernel": np.zeros((2, 2), "float32")})
    with pytest.raises(UserError, match="it has neither of the two heads"):
        convert_tf.convert_checkpoint(tmp_path / "mnist", tmp_path / "out")
    write_bundle(tmp_path / "head", {"discriminator_predictions/dense/kernel": np.zeros((2, 2), "float32")})
    with pytest.raises(UserError, match=r"not an ELECTRA checkpoint: '.*word_embeddings\.weight' is missing"):
        convert_tf.convert_checkpoint(tmp_path / "head", tmp_path / "out")


@pytest.mark.parametrize("message", [b"\x0a\x05ab", b"\x0d\x01\x02", b"\x09\x01", b"\x0a", b"\x08\x80"])
def test_a_truncated_message_is_an_error(message: bytes) -> None:
    with pytest.raises((IndexError, ValueError)):
        list(fields(message))


def test_an_index_of_gigabytes_is_not_read(electra: Electra, tmp_path: Path) -> None:
    write_bundle(tmp_path / "ckpt", variables_of(electra))
    with open(tmp_path / "ckpt.index", "r+b") as file:
        file.truncate(6 << 30)  # sparse
    with pytest.raises(UserError, match=r"ckpt.index: 6,442,450,944 bytes is too large"):
        read_bundle(tmp_path / "ckpt")


def test_damaged_checkpoints(electra: Electra, tmp_path: Path) -> None:
    write_bundle(tmp_path / "ckpt", variables_of(electra))
    data, index = tmp_path / "ckpt.data-00000-of-00001", tmp_path / "ckpt.index"
    whole = index.read_bytes()
    for keep in (0, 10, len(whole) // 2, len(whole) - 1):
        index.write_bytes(whole[:keep])
        with pytest.raises(UserError, match="damaged or not the index"):
            read_bundle(tmp_path / "ckpt")
    generator = np.random.default_rng(0)
    for _ in range(60):  # whatever is changed, there is an answer or a UserError
        changed = bytearray(whole)
        changed[generator.integers(len(whole))] ^= 1 << generator.integers(8)
        index.write_bytes(changed)
        try:
            read_bundle(tmp_path / "ckpt")
        except UserError:
            pass
    index.write_bytes(whole)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match="missing or truncated"):
        read_bundle(tmp_path / "ckpt")
