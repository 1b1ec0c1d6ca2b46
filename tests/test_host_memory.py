"""The memory that is free for a run on a CPU: what the machine and the limits of its control groups leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from electra_core.errors import UserError
from electra_core.execution import memory
from electra_core.execution.host_memory import available_bytes
from electra_core.execution.memory import free_bytes

GIB = 2**30
PLENTY = 9223372036854771712  # version 1's word for no limit


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n", encoding="utf-8")
    return root


def v2(limit: str, usage: int, inactive: int = 0) -> dict[str, str]:
    stat = f"anon 7\ninactive_file_of_another 9\ninactive_file {inactive}"
    return {"memory.max": limit, "memory.current": str(usage), "memory.stat": stat}


def v1(limit: int, usage: int, inactive: int = 0) -> dict[str, str]:
    stat = f"inactive_file 5\ntotal_inactive_file {inactive}"
    return {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(usage), "memory.stat": stat}


@pytest.mark.parametrize(
    ("lines", "groups", "left"),
    [
        ("", {}, 8 * GIB),
        ("0::/job/step", {"job/step": v2("max", GIB)}, 8 * GIB),
        ("0::/job/step", {"job/step": v2(str(3 * GIB), GIB)}, 2 * GIB),
        ("0::/job/step", {"job/step": v2(str(3 * GIB), 2 * GIB, GIB // 2)}, 3 * GIB // 2),
        ("0::/job/step", {"job/step": v2("max", GIB), "job": v2(str(2 * GIB), GIB)}, GIB),
        ("0::/job/step", {"job/step": v2(str(3 * GIB), GIB), "job": v2(str(99 * GIB), GIB)}, 2 * GIB),
        ("0::/docker/1234", {"": v2(str(2 * GIB), GIB)}, GIB),
        ("0::/job", {"job": v2(str(GIB), 2 * GIB)}, 0),
        ("5:cpu,cpuacct:/x\n4:memory:/job\n0::/", {"memory/job": v1(2 * GIB, GIB, 9)}, GIB + 9),
        ("4:memory:/job", {"memory/job": v1(PLENTY, GIB), "memory": v1(3 * GIB, GIB)}, 2 * GIB),
    ],
)
def test_memory_is_what_machine_and_control_groups_leave(
    tmp_path: Path, lines: str, groups: dict[str, dict[str, str]], left: int
) -> None:
    """What is free without the page cache (MemFree) is not asked."""
    meminfo = f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {8 * GIB // 1024} kB"
    files(tmp_path, {"proc/meminfo": meminfo, "proc/self/cgroup": lines})
    for group, contents in groups.items():
        files(tmp_path / "sys/fs/cgroup" / group, contents)
    assert available_bytes(tmp_path) == left


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 8 * GIB)
    assert free_bytes(torch.device("cpu")) == 8 * GIB
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert free_bytes(torch.device("cpu")) == 2 * GIB


def test_a_system_that_does_not_tell_its_free_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: available_bytes(tmp_path))  # macOS has no /proc
    with pytest.raises(UserError, match="accumulate: this system does not report its free memory"):
        free_bytes(torch.device("cpu"))
