"""What only Unix has, for those who lock files (`fcntl`) and read a process's figures (`resource`).

Raises:
    UserError: at the import, on Windows.
"""

from __future__ import annotations

from electra_core.errors import UserError

try:
    import fcntl
    import resource
except ModuleNotFoundError:
    raise UserError(
        "electra-core needs Linux or macOS, whose file locks it uses, and this is another system; on Windows, "
        "install it in WSL (the Windows Subsystem for Linux)"
    ) from None

__all__ = ["fcntl", "resource"]
