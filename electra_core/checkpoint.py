"""Training state on disk: everything needed to resume bit for bit, written completely or not at all.

    RUN/checkpoints/step-00001000/state.safetensors    parameters, persistent buffers, optimizer state
    RUN/checkpoints/step-00001000/state.json           step, configuration, fingerprints, versions, checksums

A checkpoint is written to a temporary folder, flushed, and renamed (`files/new_folder.py`): a crash at any moment
leaves the older ones untouched. Training continues meanwhile: `snapshot` copies the state to host memory, and
`CheckpointWriter` writes the copy in a thread. Model directories for later use are separate (`model_dir.py`).

**Why this is enough.** A checkpoint holds no random generator's state, no data iterator and no schedule: step t's
examples, masks, draws, dropout and learning rate are functions of the seed and t (`examples.py`, `masking.py`,
`electra_kernels.rng`, `optim.learning_rate`), and sums are computed in a fixed order. So the same parameters,
optimizer state and t give the same next step, and with it all later ones.

All decisions about a checkpoint depend on its step and its contents, none on a clock.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from electra_core.errors import UserError, option
from electra_core.execution.distributed import Ranks
from electra_core.execution.sharding import gathered, placed_like
from electra_core.files.byte_files import sha256_of
from electra_core.files.new_file import write_durably
from electra_core.files.new_folder import new_folder
from electra_core.hub.layout import persistent_buffers, saved_tensors
from electra_core.hub.weight_files import write_weights
from electra_core.optim import load_state_tensors, state_tensors
from electra_core.runs.checkpoint_files import (
    best_checkpoint,
    checkpoint_folders,
    folder_name,
    read_record,
    record_digest,
)
from electra_core.version import version

log = logging.getLogger("electra_core")


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint, checked against its checksums."""

    path: Path
    step: int
    meta: dict[str, Any]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restores parameters, persistent buffers and optimizer state, bit for bit.

        A checkpoint of before buffers were saved leaves them as the model's constructor made them, with a warning.

        Raises:
            UserError: the state belongs to another model or optimizer.
        """
        tensors = self.restore_model(model)
        try:
            load_state_tensors(optimizer, _with_prefix(tensors, "optimizer/"))
        except ValueError as error:
            raise UserError(f"{self.path}: belongs to another optimizer ({error})") from None

    def restore_model(self, model: nn.Module) -> dict[str, Tensor]:
        """`restore` without an optimizer. Returns all tensors of the checkpoint."""
        tensors = load_file(self.path / "state.safetensors")
        model_state = _with_prefix(tensors, "model/")
        ours = dict(saved_tensors(model))
        buffers = {name for name, _ in persistent_buffers(model)}
        if new := sorted(buffers - model_state.keys()):
            log.warning("%s: holds no %s; starting with the model's own", self.path, ", ".join(new))
        if different := sorted((ours.keys() ^ model_state.keys()) - set(new)):
            raise UserError(
                f"{self.path}: belongs to another model ({len(different)} tensors differ: {different[0]}, ...)"
            )
        with torch.no_grad():
            for name, tensor in ours.items():
                value = model_state.get(name, tensor)
                if tensor.shape != value.shape:
                    raise UserError(f"{self.path}: {name} has shape {tuple(value.shape)}, "
                                    f"expected {tuple(tensor.shape)}")  # fmt: skip
                tensor.copy_(placed_like(value, tensor))
        return tensors

    def other_versions(self) -> list[str]:
        """Versions it was written with, where they differ from those installed: last bits may differ, too."""
        written = self.meta["versions"]
        return [f"{name} {written.get(name)}, now {value}" for name, value in versions().items()
                if written.get(name) != value]  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of everything that may change the last bits of a run."""
    return {
        "electra-core": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Tensor]:
    """Copies in host memory of all parameters and persistent buffers ("model/...") and optimizer state
    ("optimizer/..."). Of several ranks, the first one's buffers are saved, and restored on all.

    Args:
        keep: False on ranks that do not save; they help to gather sharded tensors, and keep nothing.
    """
    tensors = {f"model/{name}": tensor for name, tensor in saved_tensors(model)}
    tensors |= {f"optimizer/{name}": value for name, value in state_tensors(optimizer).items()}
    copies = {}
    for name, value in tensors.items():
        whole = gathered(value.detach())
        if keep:
            copies[name] = whole.to("cpu", copy=True)
    return copies


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time; a context that ends when the last one is on disk.

    A save's error is raised by the next call, or at the end: training has continued meanwhile, and the older
    checkpoints are untouched.

    Args:
        folder, keep: as for `save_checkpoint`.
        resumed_from: step of the checkpoint that the run continues from.
        saved: called in the thread with each checkpoint's step, once it is complete.
    """

    def __init__(self, folder: Path, keep: int, resumed_from: int = 0, saved: Callable[[int], None] | None = None):
        self.folder, self.keep, self._saved = folder, keep, saved
        for path in _superfluous(folder, resumed_from, keep):  # left by a process killed while removing them
            if path < folder / folder_name(resumed_from):
                shutil.rmtree(path, ignore_errors=True)
        version()  # read now: the sources may change before the first save
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Starts writing `tensors` (a `snapshot`, which must not change any more) as the state after `step`.

        Call `wait` before taking the snapshot to need memory for only one at a time.

        Raises:
            UserError: the previous save failed.
        """
        self.wait()
        self._running = self._thread.submit(self._save, step, tensors, meta)

    def _save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        save_checkpoint(self.folder, step, tensors, meta, self.keep)
        if self._saved is not None:
            self._saved(step)

    def wait(self) -> None:
        """Waits until nothing is being written any more. Raises the error of a failed save."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:  # after another exception the save is finished, too, but its error is not raised
            self._thread.shutdown()


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int
) -> Path:
    """Writes the state after `step` steps, then removes all checkpoints but the newest `keep` and the best (with a
    `keep` of 0, all but the newest).

    Checkpoints of later steps are removed, too: this run resumed before them because they are damaged.

    Args:
        folder: RUN/checkpoints.
        tensors: a `snapshot`.
        meta: further JSON values that belong to the state; "score", if given, is better the lower it is.

    Raises:
        UserError: disk full, no permission, ...; older checkpoints are untouched.
    """
    target = folder / folder_name(step)
    try:
        with new_folder(target) as temporary:
            write_weights(tensors, temporary / "state.safetensors")
            record = {"step": step, **meta, "versions": versions()}
            record["sha256"] = sha256_of(temporary / "state.safetensors")
            record["sha256_of_this"] = record_digest(record)
            write_durably(temporary / "state.json", json.dumps(record, indent=1) + "\n")
            shutil.copymode(temporary / "state.json", temporary / "state.safetensors")  # else its owner's alone
    except UserError as error:
        raise UserError(f"{error}; older checkpoints are unchanged") from None
    for old in _superfluous(folder, step, keep):
        shutil.rmtree(old, ignore_errors=True)
    return target


def agreed_on(ranks: Ranks, find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """The checkpoint, if any, that `find` finds on rank 0; the same on all ranks.

    Raises:
        UserError: that of `find`, or the checkpoint is not visible on another rank's machine.
    """

    def place() -> list[Any] | None:
        found = find()
        return None if found is None else [str(found.path), found.step, found.meta]

    def check() -> None:
        if agreed is not None and not Path(agreed[0]).is_dir():
            raise UserError(
                f"{agreed[0]}: not found on {socket.gethostname()}; {option('out')} must be visible to all "
                "machines"
            )

    agreed = ranks.decided_by_first(place)
    ranks.together(check)
    return None if agreed is None else Checkpoint(Path(agreed[0]), agreed[1], agreed[2])


def newest_intact(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose checksums match, and a line about each newer one that is damaged."""
    damaged: list[str] = []
    for path in reversed(checkpoint_folders(folder)):
        try:
            return intact(path), damaged
        except UserError as error:
            damaged.append(f"{error}; trying the previous one")
    return None, damaged


def intact(path: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        UserError: its checksums do not match, it is incomplete, or of another step than its name says.
    """
    try:
        meta = read_record(path)
        if path.name != folder_name(meta["step"]):
            raise ValueError(f"it is of step {meta['step']}")
        if meta["sha256"] != sha256_of(path / "state.safetensors"):
            raise ValueError("the checksum does not match")
        return Checkpoint(path, int(meta["step"]), meta)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error})") from None


def _superfluous(folder: Path, step: int, keep: int) -> list[Path]:
    newest = folder / folder_name(step)
    here = [path for path in checkpoint_folders(folder) if path <= newest]
    kept = set(here[-max(1, keep) :])
    if keep and (best := best_checkpoint(here)):
        kept.add(best[0])
    return [path for path in checkpoint_folders(folder) if path not in kept]


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
