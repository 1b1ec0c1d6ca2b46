"""Training state on disk: everything needed to go on bit for bit, whole or not there at all.

    RUN/checkpoints/step-00001000/state.safetensors    parameters and optimizer state, fp32
    RUN/checkpoints/step-00001000/state.json           step, configuration, fingerprints, checksum

A checkpoint is written to a temporary folder, flushed, and renamed (`new_folder`): a crash at any moment
leaves the older ones untouched. Model directories for use are something else (`model_dir.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from electra_core.errors import UserError
from electra_core.new_folder import new_folder
from electra_core.optim import load_state_tensors, state_tensors


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint, checked against its checksum."""

    path: Path
    step: int
    meta: dict[str, Any]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put parameters and optimizer state back, bit for bit.

        Raises:
            UserError: the state is of another model.
        """
        tensors = load_file(self.path / "state.safetensors")
        model_state = _with_prefix(tensors, "model/")
        parameters = dict(model.named_parameters())
        if missing := parameters.keys() ^ model_state.keys():
            raise UserError(f"{self.path}: is of another model (differs in {sorted(missing)[0]})")
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.shape != model_state[name].shape:
                    raise UserError(f"{self.path}: {name} has shape {tuple(model_state[name].shape)}, "
                                    f"expected {tuple(parameter.shape)}")  # fmt: skip
                parameter.copy_(model_state[name])
        load_state_tensors(optimizer, _with_prefix(tensors, "optimizer/"))


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, meta: Mapping[str, Any], keep: int
) -> Path:
    """Write the state after `step` steps, then remove all but the newest `keep`.

    Args:
        folder: RUN/checkpoints.
        meta: what else belongs to the state; JSON values.

    Raises:
        UserError: disk full, no permission, ...; older checkpoints are untouched.
    """
    tensors: dict[str, Tensor] = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"optimizer/{name}": value for name, value in state_tensors(optimizer).items()}
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    target = folder / f"step-{step:08d}"
    with new_folder(target) as temporary:
        state = temporary / "state.safetensors"
        save_file(tensors, state)
        _flush(state)
        record = {"step": step, "sha256": _sha256(state), **meta}
        (temporary / "state.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _flush(temporary / "state.json")
    for old in checkpoint_folders(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest_intact(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose checksum fits, and a line about each newer one that is damaged."""
    damaged: list[str] = []
    for path in reversed(checkpoint_folders(folder)):
        try:
            meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if meta["sha256"] != _sha256(path / "state.safetensors"):
                raise ValueError("the checksum does not fit")
            return Checkpoint(path, int(meta["step"]), meta), damaged
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(f"{path}: damaged ({error}); trying the one before")
    return None, damaged


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoints under RUN/checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
        )


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
