"""Model directories: the same numbers as `transformers` both ways, and nothing lost on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hub_models import CLASSES, LABELS, PROJECTED, SAME, make
from safetensors.torch import load_file, save_file

import electra_core
from electra_core import model_dir, pretrained
from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.electra import Electra
from electra_core.errors import UserError
from electra_core.hub import layout as hub_layout
from electra_core.hub.tokenizer_parts import SPECIAL_TOKENS
from electra_core.packing import from_padded, to_padded
from electra_core.tokenizer import WordPieceTokenizer, load_tokenizer

CONFIGS = pytest.mark.parametrize("config", [SAME, PROJECTED], ids=["embedding=hidden", "embedding<hidden"])
KINDS = pytest.mark.parametrize("name", CLASSES)


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
    assert_same(name, CLASSES[name].from_pretrained(tmp_path), theirs)


@KINDS
def test_a_directory_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "a" / "b")
    again = CLASSES[name].from_pretrained(tmp_path / "a" / "b")
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
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
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
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_layer_norms_by_their_names_of_2019(file: str, tmp_path: Path) -> None:
    """gamma and beta; transformers, too, reads them."""
    model = make("ElectraForSequenceClassification")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    assert sum("gamma" in name for name in tensors) == 1 + 2 * PROJECTED.num_hidden_layers
    (save_file if file.endswith("safetensors") else torch.save)(tensors, tmp_path / file)
    again = pretrained.SequenceClassifier.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert_same("ElectraForSequenceClassification", again, theirs_of("ElectraForSequenceClassification", tmp_path))


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


@pytest.mark.parametrize("name", ["ElectraForPreTraining", "ElectraForQuestionAnswering"])
def test_labels_for_a_model_that_has_none_are_refused(name: str, tmp_path: Path) -> None:
    make(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"labels: a \w+ has none, got \['a'\]"):
        CLASSES[name].from_pretrained(tmp_path, labels=["a"])


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
    for (key, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
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


@pytest.mark.parametrize("positions", [12, 1024])
def test_transformers_truncates_to_the_models_positions(positions: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = make("ElectraForPreTraining", dataclasses.replace(SAME, max_position_embeddings=positions))
    for tokenizer in (load_tokenizer("tiny"), WordPieceTokenizer.from_tokens([*SPECIAL_TOKENS, "the"])):
        model.save_pretrained(tmp_path, tokenizer=tokenizer)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert theirs.model_max_length == positions
        assert len(theirs("the " * 2000, truncation=True)["input_ids"]) == positions


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
    assert all(torch.equal(p, q) for p, q in zip(second.parameters(), again.parameters(), strict=True))


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


def test_packed_logits_pad_back() -> None:
    """The border in one picture: padded in, packed through, padded out."""
    batch = ragged()
    packed = from_padded(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    assert torch.equal(to_padded(packed.input_ids_T, packed), batch["input_ids"])
    assert F.pad(packed.lengths.cumsum(0), (1, 0)).tolist() == packed.cu_seqlens.tolist()


def test_tiny_is_the_package_s_model_where_no_folder_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = model_dir.shipped_model()
    monkeypatch.chdir(tmp_path)
    assert model_dir.find_model("tiny") == shipped / "discriminator"
    assert model_dir.find_model("tiny", "generator") == shipped / "generator"
    assert model_dir.load_config("tiny")[0].hidden_size == 128
    (tmp_path / "tiny").mkdir()
    assert model_dir.find_model("tiny") == Path("tiny")
