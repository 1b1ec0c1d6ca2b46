"""Reads the environment variables that torchrun sets for its processes, and srun; nothing else reads them.

A process that was not started this way is rank 0 of 1. Schedulers and earlier jobs may leave some of the variables
behind, so none is believed alone.
"""

from __future__ import annotations

import os

from electra_core.errors import UserError


def may_be_used() -> bool:
    """Whether torchrun, or a script in its place, may have started this process; never an error."""
    return "LOCAL_RANK" in os.environ


def is_used() -> bool:
    """Whether torchrun, or a script in its place, started this process as one of several.

    Raises:
        UserError: WORLD_SIZE is no number.
    """
    return size() > 1 and may_be_used()


def local_rank() -> int:
    """This process's number among those on its machine; only if `is_used()`."""
    return _number("LOCAL_RANK") or 0


def rank() -> int:
    """This process's number among all."""
    return (_number("RANK") or 0) if size() > 1 else 0


def size() -> int:
    """Number of processes.

    Raises:
        UserError: the variable is no number.
    """
    return _number("WORLD_SIZE", least=1) or 1


def local_size() -> int:
    """Number of processes on this machine, according to torchrun."""
    return (_number("LOCAL_WORLD_SIZE", least=1) or 1) if size() > 1 else 1


def is_one_of_several() -> bool:
    """Whether this process was started as one of several; a WORLD_SIZE alone may be a leftover."""
    return size() > 1 and (may_be_used() or "RANK" in os.environ)


def check() -> None:
    """Checks that several processes could meet.

    Raises:
        UserError: variables are missing, or make no sense.
    """
    if size() == 1:
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        are = "are" if len(missing) > 1 else "is"
        raise UserError(
            f"WORLD_SIZE: is {size()}, but {', '.join(missing)} {are} missing; start the processes with torchrun, "
            "or unset WORLD_SIZE to run alone"
        )
    if rank() >= size():
        raise UserError(f"RANK: expected a number below WORLD_SIZE={size()}, got {rank()}")
    if (port := _number("MASTER_PORT") or 0) >= 1 << 16:
        raise UserError(f"MASTER_PORT: expected a number below {1 << 16}, got {port}")


def meeting_point() -> str:
    """Where the processes meet: HOST:PORT."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def is_on_one_machine() -> bool:
    """Whether all processes are on this machine, according to torchrun."""
    return os.environ.get("GROUP_WORLD_SIZE") == "1"


def hint_about_srun() -> str:
    """For a message that another process uses the folder: srun started the command several times, without torchrun
    between; empty if it did not.

    It is no error by itself, as each of them may have a folder of its own.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    if not tasks.isdecimal() or int(tasks) < 2 or size() > 1:
        return ""
    return (
        f" (srun started this command {tasks} times: use --ntasks-per-node=1, with torchrun for several processes)"
    )


def start() -> str:
    """Number of the start: torchrun restarts all processes when one has failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def keeps_the_store() -> bool:
    """Whether the processes' store is torchrun's own, which outlives them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def hands_on_signals() -> bool:
    """Whether torchrun supervises this process and forwards to it the signals that torchrun receives."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _number(name: str, least: int = 0) -> int | None:
    """The variable's number; None if it is not set, or empty."""
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    if not (value.isdecimal() and value.isascii() and int(value) >= least):
        raise UserError(
            f"{name}: expected a number from {least} in this variable, got {value!r}; unset it to run alone"
        )
    return int(value)
