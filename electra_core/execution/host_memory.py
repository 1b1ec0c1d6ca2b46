"""Main memory that a process may still take: what the machine has free, and what its control groups leave.

Schedulers and containers limit a job by control groups (cgroups), which the machine's own figures do not show. A
limit counts the page cache, too, but gives up its inactive part before it kills (the kernel's
Documentation/admin-guide/cgroup-v2.rst, and cgroup-v1/memory.rst).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

V1, V2 = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), ("max", "current", "inactive_file")
"""Names in a control group's folder, after "memory.": limit, usage; and of inactive page cache in memory.stat."""


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that can be allocated without swapping or being killed; None if the system does not say (macOS).

    Args:
        root: where proc/ and sys/ are.
    """
    free = _field(root / "proc/meminfo", "MemAvailable:")
    if free is None:
        return None
    return max(0, min([free * 1024, *_left_by_groups(root)]))


def _left_by_groups(root: Path) -> Iterator[int]:
    """Of each control group with a limit that this process is in, parents included, the bytes that it leaves."""
    for line in _lines(root / "proc/self/cgroup"):
        controllers, _, path = line.partition(":")[2].partition(":")  # 4:memory:/job, or 0::/job in version 2
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = root / "sys/fs/cgroup", V2
        if controllers:
            top, names = top / "memory", V1
        here = top / path.lstrip("/")
        for folder in (here, *here.parents):  # within a container, a part of the path may not be there
            if folder.is_relative_to(top) and (left := _left_by(folder, *names)) is not None:
                yield left


def _left_by(group: Path, limit: str, usage: str, cache: str) -> int | None:
    most, used = _number(group / f"memory.{limit}"), _number(group / f"memory.{usage}")
    if most is None or used is None:
        return None
    return most - used + (_field(group / "memory.stat", cache) or 0)


def _number(file: Path) -> int | None:
    """None if there is no such file, or no limit ("max")."""
    word = "".join(_lines(file)).strip()
    return int(word) if word.isdecimal() else None


def _field(file: Path, name: str) -> int | None:
    """The number after `name` in a file of names and numbers."""
    found = [line.split() for line in _lines(file) if line.startswith(f"{name} ")]
    return int(found[0][1]) if found else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
