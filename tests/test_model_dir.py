"""Model directories: the same numbers as `transformers` both ways, and no trust in what lies in a directory."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import electra_core
from electra_core import hub_layout, model_dir, pretrained
from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.electra import Electra
from electra_core.errors import UserError
from electra_core.initialisation import initialise
from electra_core.packing import from_padded, to_padded

SAME = EncoderConfig(
    vocab_size=60, embedding_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=12,
)  # fmt: skip
PROJECTED = EncoderConfig(
    vocab_size=60, embedding_size=8, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
    intermediate_size=40, max_position_embeddings=12,
)  # fmt: skip
CONFIGS = pytest.mark.parametrize("config", [SAME, PROJECTED], ids=["embedding=hidden", "embedding<hidden"])
KINDS = pytest.mark.parametrize("name", list(pretrained.KINDS))
LABELS = ("no", "perhaps", "yes")


def make(name: str, config: EncoderConfig = PROJECTED, seed: int = 0) -> Any:
    """A model of the Hub's kind `name` with random weights, large enough that all of them matter."""
    labels = {"labels": LABELS} if "SequenceC" in name or "TokenC" in name else {}
    model = pretrained.KINDS[name](config, **labels)
    initialise(model, 0.3, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def ragged(vocab: int = 60) -> dict[str, torch.Tensor]:
    """Four sequences of 12, 7, 1 and 4 tokens, padded as `transformers` takes them."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([12, 7, 1, 4])
    mask = (torch.arange(12)[None] < lengths[:, None]).long()
    ids = torch.randint(1, vocab, (4, 12), generator=generator) * mask
    segments = (torch.arange(12)[None] >= lengths[:, None] // 2).long() * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}


def theirs_of(name: str, directory: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    model, info = getattr(transformers, name).from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def our_logits(name: str, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    packed = from_padded(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    return model(packed)


def their_logits(name: str, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Their logits in our packed shape."""
    if name == "ElectraForMultipleChoice":
        return model(**{key: value[None] for key, value in batch.items()}).logits[0]
    output = model(**batch)
    keep = batch["attention_mask"].bool()
    if name == "ElectraForQuestionAnswering":
        return torch.stack([output.start_logits, output.end_logits], -1)[keep]
    return output.logits if name == "ElectraForSequenceClassification" else output.logits[keep]


def assert_same(name: str, ours: Any, theirs: Any) -> None:
    """Logits within 1e-5 and the gradients of an arbitrary loss within 1e-4, every tensor of them."""
    batch = ragged()
    a, b = our_logits(name, ours, batch), their_logits(name, theirs, batch)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    direction = torch.randn(a.shape, generator=torch.Generator().manual_seed(9))
    for model, logits in ((ours, a), (theirs, b)):
        model.zero_grad()
        (logits * direction).sum().div(len(direction)).backward()
    gradients = hub_layout.to_hub({key: p.grad for key, p in ours.named_parameters()})
    compared = 0
    for key, p in theirs.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[key], p.grad, rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared == len(gradients)


@KINDS
@CONFIGS
def test_what_we_write_opens_in_transformers(name: str, config: EncoderConfig, tmp_path: Path) -> None:
    ours = make(name, config)
    ours.save_pretrained(tmp_path / "model")
    theirs = theirs_of(name, tmp_path / "model")
    assert_same(name, ours, theirs)
    if "SequenceC" in name or "TokenC" in name:
        assert theirs.config.id2label == dict(enumerate(LABELS))


@KINDS
@CONFIGS
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "sharded"])
def test_what_transformers_writes_opens_here(
    name: str, config: EncoderConfig, shards: bool, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    fields = hub_layout.write_config(make(name, config), torch.float32)
    theirs = getattr(transformers, name)(transformers.ElectraConfig(**fields)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path, max_shard_size="5KB" if shards else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    assert_same(name, pretrained.KINDS[name].from_pretrained(tmp_path), theirs)
    assert type(pretrained.load_any(tmp_path)) is pretrained.KINDS[name]


@KINDS
def test_a_directory_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "a" / "b")
    again = pretrained.KINDS[name].from_pretrained(tmp_path / "a" / "b")
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in again.state_dict().items())
    assert again.config == model.config and not again.training
    assert getattr(again, "labels", ()) == getattr(model, "labels", ())


def test_config_has_the_fields_that_transformers_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    make("ElectraForSequenceClassification").save_pretrained(tmp_path / "ours")
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    theirs_of("ElectraForSequenceClassification", tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert theirs.pop("transformers_version") == transformers.__version__
    assert ours == theirs


def test_bf16_files_are_half_as_large_and_load_as_fp32(tmp_path: Path) -> None:
    model = make("ElectraForPreTraining")
    model.save_pretrained(tmp_path / "fp32")
    model.save_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    large, small = ((tmp_path / kind / "model.safetensors").stat().st_size for kind in ("fp32", "bf16"))
    assert small < 0.65 * large  # the header is of the same size
    again = electra_core.Discriminator.from_pretrained(tmp_path / "bf16")
    for p, q in zip(model.parameters(), again.parameters()):
        assert q.dtype == torch.float32 and torch.equal(q, p.bfloat16().float())
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_old_pickled_weights_and_an_old_config(tmp_path: Path) -> None:
    """As of 2020: a .bin with `position_ids` and the tied projection, few fields in config.json."""
    model = make("ElectraForMaskedLM")
    tensors = dict(hub_layout.hub_tensors(model))
    tensors["electra.embeddings.position_ids"] = torch.arange(12)[None]
    tensors["generator_lm_head.weight"] = tensors["electra.embeddings.word_embeddings.weight"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    old = ("vocab_size embedding_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
           "max_position_embeddings model_type architectures").split()  # fmt: skip
    config = hub_layout.write_config(model, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in old}))
    again = electra_core.Generator.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_fields_that_config_leaves_out_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "electra"}')
    config, _ = model_dir.load_config(tmp_path)
    theirs = transformers.ElectraConfig()
    assert all(getattr(theirs, key) == value for key, value in vars(config).items())


def test_files_of_the_bare_encoder_open_as_task_models(tmp_path: Path) -> None:
    model = make("ElectraForPreTraining")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {k.removeprefix("electra."): v for k, v in tensors.items() if k.startswith("electra.")}
    save_file(bare, tmp_path / "model.safetensors")
    again: Any = electra_core.SequenceClassifier.from_pretrained(tmp_path)
    assert torch.equal(again.encoder.layers[1].attention.qkv.weight, model.encoder.layers[1].attention.qkv.weight)


def test_a_new_head_is_said_once_and_depends_on_the_seed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make("ElectraForPreTraining").save_pretrained(tmp_path)
    load = electra_core.SequenceClassifier.from_pretrained
    one = load(tmp_path, labels=LABELS, seed=1)
    assert len(caplog.records) == 1 and "the head is new" in caplog.text
    assert "classifier.out_proj.weight" in caplog.text
    same, other = load(tmp_path, labels=LABELS, seed=1), load(tmp_path, labels=LABELS, seed=2)
    weights = [m.classifier.out_proj.weight for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert one.labels == LABELS and weights[0].shape == (3, 24) and weights[0].abs().max() > 0


def test_a_head_of_other_labels_is_replaced_only_when_asked(tmp_path: Path) -> None:
    make("ElectraForTokenClassification").save_pretrained(tmp_path)
    assert electra_core.TokenClassifier.from_pretrained(tmp_path).labels == LABELS
    again = electra_core.TokenClassifier.from_pretrained(tmp_path, labels=("a", "b"))
    assert again.labels == ("a", "b") and again.classifier.weight.shape == (2, 24)
    renamed = electra_core.TokenClassifier.from_pretrained(tmp_path, labels=("a", "b", "c"))
    kept = load_file(tmp_path / "model.safetensors")["classifier.weight"]
    assert torch.equal(renamed.classifier.weight, kept), "as many labels: the trained head stays"


def test_a_run_directory_means_its_model(tmp_path: Path) -> None:
    electra = Electra(PROJECTED, PretrainConfig(generator_layers=1))
    model_dir.save_pretrained(electra.discriminator, tmp_path / "discriminator")
    model_dir.save_pretrained(electra.generator, tmp_path / "generator")
    assert electra_core.Discriminator.from_pretrained(tmp_path).config == PROJECTED
    assert electra_core.Generator.from_pretrained(tmp_path).config.num_hidden_layers == 1
    assert model_dir.load_config(tmp_path)[0] == PROJECTED


@pytest.mark.parametrize("tying", ["none", "embeddings", "all", "disentangled"])
def test_a_pair_goes_on_where_it_stopped(tying: str, tmp_path: Path) -> None:
    """Saving both models and loading them into a fresh pair gives the same pair, whatever they share."""
    sizes = {"generator_hidden_size": 24, "generator_attention_heads": 3, "generator_intermediate_size": 40}
    whole: dict[str, Any] = dict(sizes)
    pretrain = PretrainConfig(tying=tying, generator_layers=3, **(whole if tying == "all" else {}))
    one, two = Electra(PROJECTED, pretrain), Electra(PROJECTED, pretrain)
    with torch.no_grad():
        for p in one.parameters():
            p.copy_(torch.randn_like(p))
    for part in ("generator", "discriminator"):
        model_dir.save_pretrained(getattr(one, part), tmp_path / part)
    model_dir.load_pair(two, tmp_path, tmp_path)
    for (key, p), q in zip(one.named_parameters(), two.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6 if tying == "disentangled" else 0, msg=key)


def test_strangers_are_no_pair(tmp_path: Path) -> None:
    pretrain = PretrainConfig(generator_layers=1)
    for part, seed in (("generator", 0), ("discriminator", 1)):
        electra = Electra(PROJECTED, dataclasses.replace(pretrain, seed=seed))
        model_dir.save_pretrained(getattr(electra, part), tmp_path / part)
    with pytest.raises(UserError, match="have different word embeddings"):
        model_dir.load_pair(Electra(PROJECTED, pretrain), tmp_path, tmp_path)
    model_dir.load_pair(Electra(PROJECTED, dataclasses.replace(pretrain, tying="none")), tmp_path, tmp_path)


def test_load_into_another_size_is_refused(tmp_path: Path) -> None:
    make("ElectraForPreTraining", SAME).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="hidden_size 16, not 24"):
        model_dir.load_into(make("ElectraForPreTraining", PROJECTED), tmp_path)


def test_saving_again_replaces_files_whole_and_keeps_others(tmp_path: Path) -> None:
    first, second = make("ElectraForPreTraining", seed=1), make("ElectraForPreTraining", seed=2)
    first.save_pretrained(tmp_path / "model", card="# one")
    (tmp_path / "model" / "vocab.txt").write_text("kept")
    opened = open(tmp_path / "model" / "model.safetensors", "rb")
    before = opened.read()
    second.save_pretrained(tmp_path / "model")
    opened.seek(0)
    assert opened.read() == before, "who has the old file open still reads the old file"
    assert sorted(os.listdir(tmp_path / "model")) == ["README.md", "config.json", "model.safetensors", "vocab.txt"]
    modes = {os.stat(tmp_path / "model" / name).st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1, "who may read the one may read the other"
    assert os.listdir(tmp_path) == ["model"], "no temporary directory is left"
    again = electra_core.Discriminator.from_pretrained(tmp_path / "model")
    assert all(torch.equal(p, q) for p, q in zip(second.parameters(), again.parameters()))


def test_loading_takes_the_models_memory_once(tmp_path: Path) -> None:
    """Peak resident memory of a process that loads a model: under 1.3 times the file above what it had."""
    config = EncoderConfig(
        vocab_size=8000, embedding_size=512, hidden_size=512, num_hidden_layers=6, num_attention_heads=8,
        intermediate_size=2048,
    )  # fmt: skip
    make("ElectraForPreTraining").save_pretrained(tmp_path / "little")
    electra_core.Discriminator(config).save_pretrained(tmp_path / "large")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 80e6, "large beside what an interpreter's memory varies by"
    script = """
import sys, electra_core, electra_core.pretrained
status = lambda key: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
electra_core.Discriminator.from_pretrained(sys.argv[1])  # libraries that load at first use
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = status("VmRSS")
model = electra_core.Discriminator.from_pretrained(sys.argv[2])
print(status("VmHWM") - before)
"""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux' /proc to measure peak memory")
    command = [sys.executable, "-c", script, str(tmp_path / "little"), str(tmp_path / "large")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 * size < int(run.stdout) < 1.3 * size


# What may lie in a directory -------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make("ElectraForPreTraining").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(directory: Path, match: str) -> str:
    with pytest.raises(UserError, match=match) as caught:
        electra_core.Discriminator.from_pretrained(directory)
    return str(caught.value)


def edit_config(directory: Path, **changes: Any) -> None:
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | changes))


def edit_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = load_file(directory / "model.safetensors")
    for name, value in changes.items():
        tensors[name] = value
    save_file({k: v for k, v in tensors.items() if v is not None}, directory / "model.safetensors")


LAYER = "electra.encoder.layer.1."


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
    message = refused(directory, "not those of a Discriminator as config.json describes it")
    for line in (
        f"missing: {LAYER}attention.self.key.weight [24, 24]",
        f"wrong shape: {LAYER}output.dense.bias [25], expected [24]",
        "unexpected: electra.encoder.layer.3.output.dense.bias [24]",
        "missing: discriminator_predictions.dense_prediction.bias [1]",
    ):
        assert line in message


def test_a_generator_does_not_pass_for_a_discriminator(tmp_path: Path) -> None:
    make("ElectraForMaskedLM").save_pretrained(tmp_path)
    refused(tmp_path, r"missing: discriminator_predictions\.dense\.weight")


def test_a_directory_that_claims_a_head_must_have_it(tmp_path: Path) -> None:
    make("ElectraForSequenceClassification").save_pretrained(tmp_path)
    edit_weights(tmp_path, **{"classifier.out_proj.bias": None})
    with pytest.raises(UserError, match=r"missing: classifier\.out_proj\.bias \[3\]"):
        electra_core.SequenceClassifier.from_pretrained(tmp_path)


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
        ({"vocab_size": 10**15}, "vocab_size expects an integer from 1 to"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers expects an integer from 1 to 1024"),
        ({"num_hidden_layers": 0}, "num_hidden_layers expects"),
        ({"hidden_size": 16777215}, "wrong shape"),
        ({"hidden_size": 24.5}, "hidden_size expects"),
        ({"hidden_size": "24"}, "hidden_size expects a value of type int, got '24'"),
        ({"num_attention_heads": 5}, "does not divide hidden_size 24"),
        ({"hidden_dropout_prob": 1.5}, r"hidden_dropout_prob expects a number in \[0, 1\)"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps expects a finite number"),
        ({"model_type": "bert"}, "model_type is 'bert'; this implementation has only 'electra'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"embedding_size": 24}, "wrong shape"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_absurd_configs(directory: Path, change: dict[str, Any], match: str) -> None:
    edit_config(directory, **change)
    refused(directory, match)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"model_type": "\ud800'])
def test_a_config_that_is_no_json_object(directory: Path, text: str) -> None:
    (directory / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(directory, r"config\.json: (not valid JSON|expected a JSON object)")


@pytest.mark.parametrize("labels", [{"0": "a", "2": "b"}, {}, {"0": 7}, ["a"], "ab"], ids=str)
def test_labels_that_cannot_be(tmp_path: Path, labels: Any) -> None:
    make("ElectraForTokenClassification").save_pretrained(tmp_path)
    edit_config(tmp_path, id2label=labels)
    with pytest.raises(UserError, match="id2label expects names"):
        electra_core.TokenClassifier.from_pretrained(tmp_path)


class Bomb:
    """Unpickled by a trusting reader, this writes a file."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_nothing_in_a_pickle_is_executed(directory: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    (directory / "model.safetensors").unlink()
    if how == "pickle":
        (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"electra.embeddings.LayerNorm.weight": Bomb()}, directory / "pytorch_model.bin")
    refused(directory, "not a file of plain tensors, nothing was executed")
    assert not (directory / "executed").exists()


def test_a_pickle_named_safetensors(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(pickle.dumps(Bomb()) * 10)
    refused(directory, "damaged or not a safetensors file")


@pytest.mark.parametrize("value", [{"a": 1}, [torch.zeros(2)], {"x": torch.zeros(2, dtype=torch.int32)}], ids=str)
def test_a_bin_of_something_else(directory: Path, value: Any) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(value, directory / "pytorch_model.bin")
    refused(directory, "expected a dictionary of tensors|not a dense tensor of floats")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_links_out_of_the_directory(directory: Path, file: str) -> None:
    (directory / file).rename(directory.parent / "elsewhere")
    (directory / file).symlink_to(directory.parent / "elsewhere")
    refused(directory, "is a link out of its directory")


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


def test_a_missing_shard(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory, "model-00001-of-00002.safetensors: no such file")


def test_empty_and_absent_directories(tmp_path: Path) -> None:
    refused(tmp_path, "is not a model directory: it has no config.json")
    refused(tmp_path / "nothing", "no such model directory")
    (tmp_path / "config.json").write_text('{"model_type": "electra"}')
    refused(tmp_path, "holds no weights: expected model.safetensors")
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
    with pytest.raises(UserError, match=r"some/model: not a directory, and not fetched .*no route to host"):
        electra_core.Discriminator.from_pretrained("some/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"install the extra: pip install 'electra-core\[hub\]'"):
        electra_core.Discriminator.from_pretrained("some/model")


def test_packed_logits_pad_back() -> None:
    """The border in one picture: padded in, packed through, padded out."""
    batch = ragged()
    packed = from_padded(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    assert torch.equal(to_padded(packed.input_ids_T, packed), batch["input_ids"])
    assert F.pad(packed.lengths.cumsum(0), (1, 0)).tolist() == packed.cu_seqlens.tolist()
