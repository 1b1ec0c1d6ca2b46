"""What may lie in a model directory: everything damaged, strange or hostile is refused in one clear line."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_models import PROJECTED, make
from refused_directories import LAYER, edit_config, edit_weights, refused
from safetensors.torch import load_file

import electra_core
from electra_core.encoder import Encoder
from electra_core.errors import UserError
from electra_core.model_dir import load
from electra_core.tokenizer import load_tokenizer

# What may lie in a directory -------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make("ElectraForPreTraining").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("kind", "said"), [(Encoder, r"load_discriminator\(source\).encoder"), (electra_core.Electra, "load_pair")]
)
def test_a_directory_is_of_one_model_with_its_head(
    kind: type[torch.nn.Module], said: str, directory: Path
) -> None:
    with pytest.raises(ValueError, match=f"^kind: expected .* got .*{said}"):
        load(kind, directory)


def test_amiss_tensors_are_listed_all_at_once(directory: Path) -> None:
    edit_weights(
        directory,
        **{
            LAYER + "attention.self.key.weight": None,
            LAYER + "output.dense.bias": torch.zeros(25),
            "electra.encoder.layer.3.output.dense.bias": torch.zeros(24),
            "discriminator_predictions.dense_prediction.bias": None,
        },
    )
    message = refused(directory, "the weights do not match a Discriminator with this config.json")
    for line in (
        f"missing: {LAYER}attention.self.key.weight [24, 24]",
        f"wrong shape: {LAYER}output.dense.bias [25], expected [24]",
        "unexpected: electra.encoder.layer.3.output.dense.bias [24]",
        "missing: discriminator_predictions.dense_prediction.bias [1]",
    ):
        assert line in message


def test_a_generator_does_not_pass_for_a_discriminator(tmp_path: Path) -> None:
    make("ElectraForMaskedLM").save_pretrained(tmp_path)
    refused(tmp_path, "holds ElectraForMaskedLM, not ElectraForPreTraining")


def test_a_directory_that_claims_a_head_must_have_it(tmp_path: Path) -> None:
    make("ElectraForSequenceClassification").save_pretrained(tmp_path)
    edit_weights(tmp_path, **{"classifier.out_proj.bias": None})
    with pytest.raises(UserError, match=r"missing: classifier\.out_proj\.bias \[3\]"):
        electra_core.SequenceClassifier.from_pretrained(tmp_path)


def test_tensors_of_no_use_are_named(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training code leaves such in a file. What the encoder does not have, though, its training did use."""
    before = electra_core.Discriminator.from_pretrained(directory)
    assert not caplog.records
    edit_weights(
        directory, **{"loss_fct.weight": torch.ones(2), "electra.pooler.dense.weight": torch.ones(24, 24)}
    )
    again = electra_core.Discriminator.from_pretrained(directory)
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), again.parameters(), strict=True))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "no use for" in line and "loss_fct.weight" in line and "electra.pooler.dense.weight" in line
    edit_weights(directory, **{"electra.encoder.layer.3.output.dense.bias": torch.zeros(24)})
    refused(directory, r"unexpected: electra.encoder.layer.3.output.dense.bias \[24\]")


def test_an_output_layer_of_its_own(tmp_path: Path) -> None:
    """transformers 5 would compute with it, 4 with the embeddings; here there is no place for it."""
    make("ElectraForMaskedLM").save_pretrained(tmp_path)
    words = load_file(tmp_path / "model.safetensors")["electra.embeddings.word_embeddings.weight"]
    edit_weights(tmp_path, **{"generator_lm_head.weight": words.clone()})
    electra_core.Generator.from_pretrained(tmp_path)
    other = words.clone()
    other[-1, -1] += 1
    for own in (other, words[:-1].clone()):
        edit_weights(tmp_path, **{"generator_lm_head.weight": own})
        with pytest.raises(
            UserError, match=r"generator_lm_head\.weight differs from the word embeddings; only a tied"
        ):
            electra_core.Generator.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "config.json", "vocab.txt"])
def test_pointers_of_git_lfs(directory: Path, file: str) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 54221\n"
    if file == "pytorch_model.bin":
        (directory / "model.safetensors").unlink()
    (directory / file).write_text(pointer)
    if file != "vocab.txt":
        refused(directory, f"{file}: a Git LFS pointer, not the file; run git lfs pull")
    else:
        with pytest.raises(UserError, match="a Git LFS pointer, not the file; run git lfs pull"):
            load_tokenizer(directory)


@pytest.mark.parametrize("keep", [0, 4, 100, 2000, -1], ids=lambda n: f"{n} bytes")
def test_truncated_weights(directory: Path, keep: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(directory, "damaged or not a safetensors file")


def test_a_header_that_promises_more_than_there_is(directory: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(directory, "damaged or not a safetensors file")


def test_wrong_dtypes(directory: Path) -> None:
    edit_weights(directory, **{LAYER + "output.dense.bias": torch.zeros(24, dtype=torch.int64)})
    refused(directory, "output.dense.bias has dtype I64; expected one of F64, F32, F16, BF16")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"vocab_size": 10**15}, "vocab_size: expected an integer from 1 to"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected an integer from 1 to 1024"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected"),
        ({"hidden_size": 16777215}, "wrong shape"),
        ({"hidden_size": 24.5}, "hidden_size: expected"),
        ({"hidden_size": "24"}, "hidden_size: expected a value of type int, got '24'"),
        ({"num_attention_heads": 5}, "does not divide hidden_size 24"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob: expected a number from 0 to below 1"),
        ({"hidden_dropout_prob": 10**400}, "hidden_dropout_prob: expected a number .* below 1, got 10{79}$"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps: expected a finite number"),
        ({"model_type": "bert"}, "model_type is 'bert'; only 'electra' is supported"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"embedding_size": 24}, "wrong shape"),
        ({"architectures": 5}, "architectures: expected a list of names, got 5"),
        ({"architectures": True}, "architectures: expected a list of names, got True"),
        ({"architectures": {"a": 1}}, "architectures: expected a list of names, got {'a': 1}"),
        ({"architectures": "ElectraForPreTraining"}, "architectures: expected a list of names"),
        ({"architectures": [["x"]]}, "architectures: expected a list of names"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_absurd_configs(directory: Path, change: dict[str, Any], match: str) -> None:
    edit_config(directory, **change)
    refused(directory, match)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"model_type": "\ud800'])
def test_a_config_that_is_no_json_object(directory: Path, text: str) -> None:
    (directory / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    said = refused(directory, r"config\.json: (not valid JSON|expected a JSON object)")
    assert "[[" not in text or "nested too deeply" in said


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ({"0": "a", "2": "b"}, 'expected names for "0", "1", ... without a gap'),
        ({}, "expected names"),
        (["a"], "expected names"),
        ("ab", "expected names"),
        (5, "expected names"),
        ({"0": "a", "1": 7.5}, 'expected a name for "1", got 7.5'),
        ({"0": None, "1": "a"}, 'expected a name for "0", got None'),
        ({"0": "a", "1": "b", "2": "a"}, 'expected a name of its own for every output, got \'a\' for "0" and "2"'),
    ],
    ids=str,
)
def test_labels_that_cannot_be(tmp_path: Path, labels: Any, match: str) -> None:
    make("ElectraForTokenClassification").save_pretrained(tmp_path)
    edit_config(tmp_path, id2label=labels)
    with pytest.raises(UserError, match=f"id2label: {match}"):
        electra_core.TokenClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "labels, names", [((0, 1, 2), ("0", "1", "2")), (("x", True, False), ("x", "True", "False"))]
)
def test_labels_that_are_numbers_are_texts(tmp_path: Path, labels: Any, names: tuple[str, ...]) -> None:
    make("ElectraForTokenClassification").save_pretrained(tmp_path)
    edit_config(tmp_path, id2label={str(index): label for index, label in enumerate(labels)})
    assert electra_core.TokenClassifier.from_pretrained(tmp_path).labels == names


def test_more_labels_than_any_model_has(tmp_path: Path) -> None:
    make("ElectraForTokenClassification").save_pretrained(tmp_path)
    edit_config(tmp_path, id2label=None, num_labels=1 << 24)
    with pytest.raises(UserError, match="num_labels: expected an integer from 1 to 1048576"):
        electra_core.TokenClassifier.from_pretrained(tmp_path)


def test_long_values_are_not_printed_whole(directory: Path) -> None:
    edit_config(directory, vocab_size=10**400, hidden_dropout_prob="x" * 5000, hidden_act="y" * 5000)
    assert len(refused(directory, "hidden_act is 'yy")) < 500
    edit_config(directory, hidden_act="gelu")
    assert len(refused(directory, "vocab_size: expected .*got 1000")) < 500
    edit_config(directory, vocab_size=50)
    assert len(refused(directory, "hidden_dropout_prob: expected .* got 'xx")) < 500


def test_long_names_are_not_printed_whole(directory: Path) -> None:
    edit_weights(directory, **{"electra.encoder." + "x" * 5000: torch.zeros(1)})
    assert len(refused(directory, r"unexpected: electra.encoder.xx[^\n]* \[1\]$")) < 1000
    edit_weights(directory, **{"electra.encoder." + "x" * 5000: torch.zeros(1, dtype=torch.int64)})
    assert len(refused(directory, "xx.* has dtype I64")) < 1000


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_links_out_of_the_directory(directory: Path, file: str) -> None:
    (directory / file).rename(directory.parent / "elsewhere")
    (directory / file).symlink_to(directory.parent / "elsewhere")
    refused(directory, "a link out of its directory")


def test_the_hubs_cache_may_link_to_its_blobs(directory: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--some--model"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in ("model.safetensors", "config.json"):
        (directory / file).rename(cache / "blobs" / file)
        (snapshot / file).symlink_to(f"../../blobs/{file}")
    assert electra_core.Discriminator.from_pretrained(snapshot).config == PROJECTED


@pytest.mark.parametrize("shard", ["../elsewhere", "/etc/passwd", "sub/file", "", ".."])
def test_an_index_names_only_files_beside_it(directory: Path, shard: str) -> None:
    (directory / "model.safetensors").rename(directory.parent / "elsewhere")
    index = {"weight_map": {"electra.embeddings.LayerNorm.weight": shard}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory, "is not the name of a file in this directory")


@pytest.mark.parametrize("index", [{}, {"weight_map": 3}, {"weight_map": {"a": 1}}], ids=str)
def test_a_broken_index(directory: Path, index: Any) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory, "expected a weight_map from tensors to files")


@pytest.mark.parametrize("shard", ["model-00001-of-00002.safetensors", "x" * 5000, "a\0b"], ids=len)
def test_a_missing_shard(directory: Path, shard: str) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    refused(directory, f"{shard}: no such file")


def test_empty_and_absent_directories(tmp_path: Path) -> None:
    refused(tmp_path, r"not a model directory \(no config.json\)")
    refused(tmp_path / "nothing", "no such model directory")
    for number in (500, 1000):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "config.json").write_text("{}")
    refused(tmp_path, r"no config.json\); .*checkpoint-1000 may be meant$")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, r"no config.json\); it holds an adapter \(PEFT\), to be merged")
    (tmp_path / "config.json").write_text('{"model_type": "electra"}')
    refused(tmp_path, r"no weights \(expected model.safetensors or pytorch_model.bin\)$")
    (tmp_path / "tf_model.h5").write_text("")
    refused(tmp_path, r"no weights \(expected .*\); tf_model.h5 is TensorFlow's: save it anew .*from_tf=True")
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, "model.safetensors: no such file")


# The Hub itself ------------------------------------------------------------------------------------------------


def test_a_hub_name_goes_through_its_library(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, allow_patterns[0]))
        return str(directory)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    model = electra_core.Discriminator.from_pretrained("some/model", revision="v1")
    assert model.config == PROJECTED and calls == [("some/model", "v1", "*.safetensors")]


def test_a_hub_name_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(UserError, match=r"some/model: not a directory, and cannot be fetched .*no route to host"):
        electra_core.Discriminator.from_pretrained("some/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"install the extra: pip install 'electra-core\[hub\]'"):
        electra_core.Discriminator.from_pretrained("some/model")
