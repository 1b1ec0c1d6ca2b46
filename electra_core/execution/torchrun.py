"""Reads the environment variables that torchrun sets for its processes; nothing else reads them.

A process that was not started this way is rank 0 of 1.
"""

from __future__ import annotations

import os


def is_used() -> bool:
    """Whether torchrun, or a script in its place, started this process."""
    return "LOCAL_RANK" in os.environ


def local_rank() -> int:
    """This process's number among those on its machine; only if `is_used()`."""
    return int(os.environ["LOCAL_RANK"])


def rank() -> int:
    """This process's number among all."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_on_one_machine() -> bool:
    """Whether all processes are on this machine, according to torchrun."""
    return os.environ.get("GROUP_WORLD_SIZE") == "1"


def start() -> str:
    """Number of the start: torchrun restarts all processes when one has failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def keeps_the_store() -> bool:
    """Whether the processes' store is torchrun's own, which outlives them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def hands_on_signals() -> bool:
    """Whether torchrun supervises this process and forwards to it the signals that torchrun receives."""
    return "TORCHELASTIC_RUN_ID" in os.environ
