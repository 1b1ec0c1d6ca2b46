"""What may lie in a file of weights, and how it may be unreadable; hostile pickles among it."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_models import make
from refused_directories import LAYER, edit_weights, refused
from safetensors.torch import load_file

import electra_core


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make("ElectraForPreTraining").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_no_numbers(directory: Path, file: str, value: float) -> None:
    bias = torch.zeros(24)
    bias[7] = value
    edit_weights(directory, **{LAYER + "output.dense.bias": bias})
    if file == "pytorch_model.bin":
        torch.save(load_file(directory / "model.safetensors"), directory / file)
        (directory / "model.safetensors").unlink()
    refused(directory, rf"{file}: {LAYER}output.dense.bias: expected numbers, got NaN or infinity")


def test_a_number_that_becomes_infinite_in_fp32(directory: Path) -> None:
    edit_weights(directory, **{LAYER + "output.dense.bias": torch.full((24,), 1e300, dtype=torch.float64)})
    refused(directory, "output.dense.bias: expected numbers, got NaN or infinity")


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
    message = refused(directory, "not a file of plain tensors, nothing was executed")
    assert "weights_only" not in message and "Weights only" not in message, "torch's advice is to unpickle it"
    assert not (directory / "executed").exists()


def test_a_pickle_named_safetensors(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(pickle.dumps(Bomb()) * 10)
    refused(directory, "damaged or not a safetensors file")


@pytest.mark.parametrize("value", [{"a": 1}, [torch.zeros(2)], {"x": torch.zeros(2, dtype=torch.int32)}], ids=str)
def test_a_bin_of_something_else(directory: Path, value: Any) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(value, directory / "pytorch_model.bin")
    refused(directory, "expected a dictionary of tensors|not a dense tensor of floats")


@pytest.mark.parametrize("name", [1, ("a", "b"), None], ids=str)
def test_a_bin_with_names_that_are_no_text(directory: Path, name: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save({**tensors, name: torch.zeros(2)}, directory / "pytorch_model.bin")
    refused(directory, "expected a dictionary of tensors")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["meta", "nested", "sparse"])
@pytest.mark.parametrize("name", ["classifier.x", "electra.embeddings.position_ids"])
def test_a_bin_with_tensors_that_are_not_dense(directory: Path, kind: str, name: str) -> None:
    odd = {
        "meta": torch.zeros(2, device="meta"),
        "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        "sparse": torch.eye(3).to_sparse(),
    }
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save({**tensors, name: odd[kind]}, directory / "pytorch_model.bin")
    said = f"{name} is not a dense tensor of floats"  # from 2.15 on, torch does not read nested tensors
    refused(directory, f"{said}|it holds something else" if kind == "nested" else said)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_bin_of_either_format(directory: Path, as_zip: bool) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    file = directory / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=as_zip)
    loaded = electra_core.Discriminator.from_pretrained(directory)
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(loaded.encoder.get_parameter(name), tensors[f"electra.{name}"])


def test_a_compressed_bin_which_could_need_any_memory(directory: Path) -> None:
    file = directory / "pytorch_model.bin"
    torch.save(load_file(directory / "model.safetensors"), file)
    (directory / "model.safetensors").unlink()
    with zipfile.ZipFile(file) as stored:
        contents = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in contents.items():
            packed.writestr(name, content)
    refused(
        directory, r"pytorch_model.bin: not a file of plain tensors, nothing was executed \(it is compressed\)"
    )


@pytest.mark.parametrize("content", [b"\x80\x02.", b"\x80\x02e.", b"\x80\x02M.", b"PK\3\4"], ids=repr)
def test_pickles_that_end_early(directory: Path, content: bytes) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(content)
    refused(directory, "not a file of plain tensors")


def test_a_lack_of_memory_is_not_the_files_fault(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    torch.save({}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(MemoryError):
        electra_core.Discriminator.from_pretrained(directory)


def test_a_file_that_cannot_be_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_permission(path: Path, **options: Any) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", no_permission)
    refused(directory, r"config\.json: cannot be read \(Permission denied\)$")
