"""Reads and writes the tensors of a model directory: safetensors, sharded safetensors, old pytorch_model.bin.

A directory may come from a stranger. So nothing is unpickled (an old .bin is read by torch's restricted reader,
which knows only tensors), a link may not lead out of the directory, an index may name only files beside it, and
sizes are compared with what the model needs before any memory is allocated.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from electra_core.errors import UserError, first_line
from electra_core.files.byte_files import sha256_of
from electra_core.files.clutter import entries
from electra_core.hub.folder_files import inside, read_json_object

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
_OF_OTHERS = {"tf_model.h5": ("TensorFlow", "from_tf"), "flax_model.msgpack": ("Flax", "from_flax")}
"""Weights of other frameworks, and how transformers 4 reads them."""
_OLD_LAYER_NORM = re.compile(r"\bLayerNorm\.(gamma|beta)$")
_FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


class WeightFiles:
    """The tensors of one directory: shapes first, then contents, one by one and straight into place.

    `place_of` has for each tensor its file, and its name there.
    """

    def __init__(self, directory: Path, place_of: dict[str, tuple[Path, str]], shapes: dict[str, tuple[int, ...]]):
        self.directory, self.place_of, self.shapes = directory, place_of, shapes

    def copy_to(self, name: str, target: Tensor) -> None:
        """Copies tensor `name` into `target`, which has its shape, converting to its dtype."""
        raise NotImplementedError


class _Safetensors(WeightFiles):
    def __init__(self, directory: Path, files: list[Path], of_any_dtype: Collection[str]):
        place_of: dict[str, tuple[Path, str]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with _opened(file) as handle:
                for name, stored in _todays_names(handle.keys()).items():
                    piece = handle.get_slice(stored)
                    shapes[name], place_of[name] = tuple(piece.get_shape()), (file, stored)
                    if name not in of_any_dtype:
                        _check_dtype(file, name, piece.get_dtype())
        super().__init__(directory, place_of, shapes)

    def copy_to(self, name: str, target: Tensor) -> None:
        # Opened again for each tensor: the file is memory-mapped, and pages that were read count as this
        # process's until it is closed. So loading needs the model's memory once, not twice.
        file, stored = self.place_of[name]
        with _opened(file) as handle:
            target.copy_(handle.get_tensor(stored))


class _Bin(WeightFiles):
    def __init__(self, directory: Path, files: list[Path], of_any_dtype: Collection[str]):
        self.tensors: dict[str, Tensor] = {}
        place_of: dict[str, tuple[Path, str]] = {}
        for file in files:
            tensors = _restricted_load(file, of_any_dtype)
            for name, stored in _todays_names(tensors).items():
                self.tensors[name], place_of[name] = tensors[stored], (file, stored)
        super().__init__(directory, place_of, {name: tuple(tensor.shape) for name, tensor in self.tensors.items()})

    def copy_to(self, name: str, target: Tensor) -> None:
        target.copy_(self.tensors.pop(name))


def open_weights(directory: Path, of_any_dtype: Collection[str] = ()) -> WeightFiles:
    """Opens the weights in `directory`: safetensors if present, else an old pytorch_model.bin; whole or sharded.

    Args:
        of_any_dtype: names of tensors that need not be floats (a model's buffers).

    Raises:
        UserError: there are no weights, or they are damaged or unsafe.
    """
    for name, reader in ((SAFETENSORS, _Safetensors), (BIN, _Bin)):
        if (directory / name).exists():
            return reader(directory, [inside(directory, name)], of_any_dtype)
        index = f"{name}.index.json"
        if (directory / index).exists():
            return reader(directory, _shards(directory, index), of_any_dtype)
    raise UserError(f"{directory}: no weights (expected {SAFETENSORS} or {BIN}){_weights_of_others(directory)}")


def _weights_of_others(directory: Path) -> str:
    """What to do with another framework's weights in the directory; "" if there are none."""
    for name, (framework, option) in _OF_OTHERS.items():
        if (directory / name).exists():
            how = f"from_pretrained(..., {option}=True)"
            return f"; {name} is {framework}'s: save it anew from transformers 4, with {how}"
    return ""


def _todays_names(names: Iterable[str]) -> dict[str, str]:
    """Today's name of each tensor -> its name in the file: models of 2019 call LayerNorm's parameters gamma and
    beta."""
    known = {*names}
    renamed = {_OLD_LAYER_NORM.sub(_layer_norm_name, name): name for name in known if _OLD_LAYER_NORM.search(name)}
    renamed = {name: stored for name, stored in renamed.items() if name not in known}
    return {name: name for name in names if name not in renamed.values()} | renamed


def _layer_norm_name(match: re.Match[str]) -> str:
    return f"LayerNorm.{'weight' if match[1] == 'gamma' else 'bias'}"


def weights_digest(directory: Path) -> str:
    """A digest of the weight files' bytes, which identifies a model directory's weights wherever they are."""
    return sha256_of(*sorted([*entries(directory, "*.safetensors"), *entries(directory, "*.bin")]))


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes safetensors as `transformers` expects them, and waits until they are on the disk.

    Raises:
        OSError: with its errno, such as that of a full disk (safetensors' own error has it only in its text).
    """
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        raise
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _shards(directory: Path, index: str) -> list[Path]:
    weight_map = read_json_object(directory, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{directory / index}: expected a weight_map from tensors to files")
    return [inside(directory, name) for name in sorted(set(weight_map.values()))]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or not a safetensors file ({error})") from error


def _check_dtype(file: Path, name: str, dtype: str) -> None:
    if dtype not in _FLOATS and not name.endswith("position_ids"):
        raise UserError(f"{file}: {name:.200} has dtype {dtype}; expected one of {', '.join(_FLOATS)}")


def _is_zip(file: Path) -> bool:
    """Whether torch reads the file as a zip (it may then be mapped into memory) or in its older format.

    Raises:
        ValueError: a compressed zip: it could need any amount of memory, and torch would map what is compressed.
    """
    with open(file, "rb") as start:
        if start.read(4) != b"PK\3\4":  # as torch decides it
            return False
    with zipfile.ZipFile(file) as content:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in content.infolist()):
            raise ValueError("it is compressed")
    return True


def _restricted_load(file: Path, of_any_dtype: Collection[str]) -> dict[str, Tensor]:
    """Reads an old pytorch_model.bin with the restricted unpickler, which makes tensors and calls nothing else."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except MemoryError:
        raise
    except Exception as error:  # what damages can make of a pickle fails in many ways
        reason = first_line(error)[:200]
        if re.search("weights.only", str(error), re.IGNORECASE):  # torch's advice is to read it all the same
            reason = "it holds something else, or is damaged"
        raise UserError(f"{file}: not a file of plain tensors, nothing was executed ({reason})") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{file}: expected a dictionary of tensors")
    for name, tensor in tensors.items():
        is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        may_be_any = name.endswith("position_ids") or name in of_any_dtype
        if not is_dense or not (tensor.is_floating_point() or may_be_any):
            raise UserError(f"{file}: {name:.200} is not a dense tensor of floats ({tensor.dtype})")
    return tensors
