"""Model directories that are spoiled in one place, and the line with which they are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import electra_core
from electra_core.errors import UserError

LAYER = "electra.encoder.layer.1."


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
