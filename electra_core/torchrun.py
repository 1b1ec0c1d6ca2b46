"""What torchrun tells the processes that it starts, by their environment: read here and nowhere else.

A process that nobody started so is rank 0 of 1.
"""

from __future__ import annotations

import os


def is_used() -> bool:
    """Whether this process is one that torchrun, or a script in its place, started."""
    return "LOCAL_RANK" in os.environ


def local_rank() -> int:
    """This process's number among those on its machine; only where one `is_used`."""
    return int(os.environ["LOCAL_RANK"])


def rank() -> int:
    """This process's number among all."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_on_one_machine() -> bool:
    """Whether torchrun says that all processes are on this machine."""
    return os.environ.get("GROUP_WORLD_SIZE") == "1"


def start() -> str:
    """The number of the start: torchrun starts all processes again when one has failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def keeps_the_store() -> bool:
    """Whether the processes' store is torchrun's own, which outlives them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def hands_on_signals() -> bool:
    """Whether torchrun watches this process, and sends it the signals that it gets itself."""
    return "TORCHELASTIC_RUN_ID" in os.environ
