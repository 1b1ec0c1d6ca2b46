"""RUN, the folder of a run: created, locked, cleared of an earlier run, and searched for a checkpoint.

What a pre-training writes in it: `pretraining/run_folder.py`; a fine-tuning: `finetuning/folder.py`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from electra_core.checkpoint import Checkpoint, newest_intact
from electra_core.errors import UserError, option
from electra_core.execution import torchrun
from electra_core.files.clutter import entries
from electra_core.files.new_folder import remove_leftovers
from electra_core.runs.checkpoint_files import remove_checkpoints
from electra_core.runs.metrics_log import is_figure
from electra_core.runs.state import FINISHED, KILLED, LOCK, RunState, read_state

log = logging.getLogger("electra_core")
HALVES = ("discriminator", "generator")
"""Names of a pre-training's two models, and of their folders in RUN."""
FOLDERS = ("checkpoints", *HALVES, "tensorboard")
_FILES = ("config.toml", "metrics.jsonl", "state.json", "postmortem*.json")
"""What a pre-training creates in RUN, and a new one removes."""

_SIGNS = {LOCK, "state.json", ".state.json.new", "checkpoints"}
"""RUN holds one of these from its first moment on; before that, it may hold a user's config.toml."""


def find_checkpoint(run: Path, resume: bool, overwrite: bool) -> Checkpoint | None:
    """The checkpoint to resume from, if any; nothing is written.

    Raises:
        UserError: RUN is not empty and is neither to be resumed nor overwritten; it is to be resumed but holds
            no run, or no intact checkpoint, though it had one; its name is not UTF-8.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file, expected a folder")
    try:
        str(run).encode()
    except UnicodeEncodeError:
        raise UserError(f"{run}: expected a name in UTF-8, as safetensors can open no other") from None
    if resume:
        return _checkpoint_to_resume(run, overwrite)
    if run.exists() and any(entries(run)) and not overwrite:
        raise UserError(
            f"{run}: not empty{torchrun.hint_about_srun()}; {option('resume')} continues the run in it, "
            f"{option('overwrite')} starts a new one"
        )
    return None


def _checkpoint_to_resume(run: Path, overwrite: bool) -> Checkpoint | None:
    checkpoint, damaged = newest_intact(run / "checkpoints")
    for line in damaged:
        log.warning(line)
    if checkpoint is not None:
        if others := checkpoint.other_versions():
            log.warning("%s: continues, but perhaps not bit for bit: %s", run, "; ".join(others))
        return checkpoint
    if damaged:
        raise UserError(f"{run}: no intact checkpoint to resume from")
    if not overwrite and _is_foreign(run):
        raise UserError(f"{run}: not empty, but holds no run to resume; {option('overwrite')} starts one in it")
    if not overwrite and _had_checkpoint(run):
        raise UserError(f"{run}: holds a run but no checkpoint of it; {option('overwrite')} starts a new one")
    return None


def _is_foreign(run: Path) -> bool:
    """Whether there are files in the folder, but none of a run."""
    found = {path.name for path in entries(run)} if run.is_dir() else set()
    return bool(found - {"config.toml"}) and not found & _SIGNS


def _had_checkpoint(run: Path) -> bool:
    """Whether a checkpoint of the run in RUN was ever complete, as its state says, and is needed to go on: a
    finished one is nothing to resume.

    Earlier versions did not record it: one of their runs counts if it ended after its first step, or left models,
    which one that was killed may have done before its first checkpoint was complete.
    """
    facts = read_state(run)
    saved = facts.get("saved", facts.get("step", 0))
    if is_figure(saved) and saved > 0:
        return facts.get("state") != FINISHED
    has_models = any((run / kind / "config.json").is_file() for kind in HALVES)
    return "saved" not in facts and facts.get("state") != KILLED and has_models


def make_run(
    run: Path, resumed: bool, folders: Iterable[str] = FOLDERS, files: Iterable[str] = _FILES
) -> RunState:
    """Creates and locks RUN. Unless a run is resumed, removes what an earlier run made (`folders` and `files`,
    patterns of names), and in any case what a killed run left unfinished.

    Raises:
        UserError: RUN cannot be created, or another process trains in it.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        state = RunState(run)
        if not resumed:
            remove_checkpoints(run / "checkpoints")  # else --resume would continue from them
        if not resumed and (run / "state.json").is_file():  # otherwise the files here are not a run's
            for folder in (found for pattern in folders for found in run.glob(pattern)):
                shutil.rmtree(folder, ignore_errors=True)
            for file in (found for pattern in files for found in run.glob(pattern)):
                file.unlink()
        for folder in (run, run / "checkpoints"):
            if folder.is_dir():
                remove_leftovers(folder)
    except OSError as error:
        raise UserError(f"{run}: cannot be created ({error.strerror})") from None
    return state
