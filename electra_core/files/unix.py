"""Imports the Unix-only modules for locking files (`fcntl`) and reading a process's resource usage (`resource`).

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
