"""Folders and files appear whole, whoever is killed beside them, on NFS and without locks too."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from killed import killed_child, names

from electra_core.errors import UserError
from electra_core.files.new_folder import new_folder, partial_folder, remove_leftovers

ROOT = Path(__file__).parent.parent


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    def killed() -> None:
        with new_folder(tmp_path / "data") as folder:
            (folder / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)

    killed_child(killed)
    left = names(tmp_path)[0]
    assert left.endswith(".tmp") and names(tmp_path) == [left, f"{left}.lock"]
    with new_folder(tmp_path / "data") as folder:
        (folder / "whole").write_text("x")
        remove_leftovers(tmp_path)
        assert folder.is_dir(), "a writer that lives is left alone"
    assert names(tmp_path) == ["data"] and names(tmp_path / "data") == ["whole"]


@pytest.fixture
def nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks as Linux has them on NFS: an exclusive one needs a descriptor open for writing (flock(2))."""
    whole = fcntl.flock

    def flock(descriptor: int, kind: int) -> None:
        if kind & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        whole(descriptor, kind)

    monkeypatch.setattr("fcntl.flock", flock)


def test_folders_are_locked_on_nfs_too(nfs: None, tmp_path: Path) -> None:
    test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path / "new")
    with partial_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        with pytest.raises(UserError, match="another process is writing"), partial_folder(tmp_path / "out"):
            pass
        assert (folder / "file").exists()
    assert names(tmp_path) == ["new", "out"]


def test_many_writers_of_one_folder_leave_one(tmp_path: Path) -> None:
    """Locks are taken, given back and removed all the time; no writer loses its folder to another."""
    script = """
import sys
from pathlib import Path
from electra_core.files.new_folder import temporary_folder, remove_leftovers
for turn in range(150):
    with temporary_folder(Path(sys.argv[1]) / "data") as folder:
        (folder / "file").write_text("x")
        remove_leftovers(folder.parent)
        assert [path.name for path in folder.iterdir()] == ["file"]
"""
    writers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    assert names(tmp_path) == []


def test_without_locks_a_leftover_of_the_same_number_is_in_nobody_s_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container every process may have the number of the one before."""

    def no_locks(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    left = f".data.{os.getpid()}.tmp"
    (tmp_path / left).mkdir()
    (tmp_path / f"{left}.lock").touch()
    for content in ("first", "second"):
        with new_folder(tmp_path / "data") as folder:
            (folder / "file").write_text(content)
        assert (
            names(tmp_path) == [left, f"{left}.lock", "data"]
            and (tmp_path / "data" / "file").read_text() == content
        )


def test_another_users_leftover_of_the_same_number_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, whole = f".data.{os.getpid()}.tmp", os.open

    def not_ours(path: Any, *how: Any, **more: Any) -> int:
        if str(path).endswith(f"{left}.lock"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return whole(path, *how, **more)

    monkeypatch.setattr(os, "open", not_ours)
    with pytest.raises(UserError, match="no permission to write here"), new_folder(tmp_path / "data"):
        pass
    (tmp_path / left).mkdir()
    (tmp_path / f"{left}.lock").write_bytes(b"")
    with new_folder(tmp_path / "data") as folder:
        (folder / "file").touch()
    assert names(tmp_path) == [left, f"{left}.lock", "data"] and names(tmp_path / "data") == ["file"]


def test_what_an_earlier_version_left_is_removed_and_its_model_put_back(tmp_path: Path) -> None:
    """It locked the temporary folder itself; such a one is left alone as long as its writer lives."""
    for name in (".data.77.tmp", ".data.77.old", ".data.78.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name[-3:]).touch()
    writes = os.open(tmp_path / ".data.78.tmp", os.O_RDONLY)
    fcntl.flock(writes, fcntl.LOCK_EX)
    remove_leftovers(tmp_path, "data")
    assert names(tmp_path) == [".data.78.tmp", "data"] and names(tmp_path / "data") == ["old"]
    os.close(writes)
    remove_leftovers(tmp_path, "data")
    assert names(tmp_path) == ["data"]


def test_a_folder_moved_aside_by_a_killed_writer_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".data.123.old").mkdir()
    (tmp_path / ".data.123.old" / "kept").write_text("x")
    remove_leftovers(tmp_path, "data")
    assert names(tmp_path) == ["data"] and names(tmp_path / "data") == ["kept"]
    (tmp_path / ".data.124.old").mkdir()
    remove_leftovers(tmp_path, "data")
    assert names(tmp_path) == ["data"], "the replacement came after all"


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_replaced_and_what_it_leads_to_is_kept(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "mine").touch()
    (tmp_path / "data").symlink_to("elsewhere")
    with new_folder(tmp_path / "data") as folder:
        (folder / "whole").touch()
    assert names(tmp_path) == (["data", "elsewhere"] if there else ["data"])
    assert names(tmp_path / "data") == ["whole"] and not (tmp_path / "data").is_symlink()
    assert not there or names(tmp_path / "elsewhere") == ["mine"]
    (tmp_path / ".data.124.old").symlink_to("elsewhere")  # a writer was killed before it removed the link
    remove_leftovers(tmp_path, "data")
    assert ".data.124.old" not in names(tmp_path) and names(tmp_path / "data") == ["whole"]


@pytest.mark.parametrize(
    ("code", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "the disk is read-only")]
)
def test_a_disk_that_takes_nothing_is_said_in_one_line(tmp_path: Path, code: int, said: str) -> None:
    with pytest.raises(UserError, match=said) as error, new_folder(tmp_path / "data"):
        raise OSError(code, os.strerror(code))
    assert "\n" not in str(error.value) and names(tmp_path) == []
