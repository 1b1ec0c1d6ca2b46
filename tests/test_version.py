"""Which code made a run or a model: the version's number and a digest of the sources."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_runs import data, one_thread, train  # noqa: F401

from electra_core import __version__, checkpoint
from electra_core.checkpoint import CheckpointWriter, newest_intact
from electra_core.cli import main
from electra_core.execution.machine import facts
from electra_core.runs.folder import find_checkpoint
from electra_core.version import source_digest, version

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    (folder / "c").mkdir(parents=True)
    (folder / "a.py").write_text("a = 1")
    (folder / "c" / "loops.h").write_text("int b;")
    return folder


def test_the_digest_changes_with_the_code(package: Path) -> None:
    seen = {source_digest([package])}
    (package / "c" / "loops.h").write_text("int c;")
    seen.add(source_digest([package]))
    (package / "a.py").rename(package / "b.py")
    seen.add(source_digest([package]))
    (package / "c.py").touch()
    seen.add(source_digest([package]))
    assert len(seen) == 4


def test_the_digest_does_not_change_with_what_is_no_code(package: Path) -> None:
    before = source_digest([package])
    (package / "notes.txt").write_text("mine")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.cpython-313.pyc").write_text("")
    (package / ".ipynb_checkpoints").mkdir()
    (package / ".ipynb_checkpoints" / "a.py").write_text("a = 2")
    (package / ".#a.py").symlink_to("me@here.123")  # Emacs's lock
    assert source_digest([package]) == before
    copy = package.with_name("installed")
    shutil.copytree(package, copy, symlinks=True)
    assert source_digest([copy]) == before


def test_this_version_is_that_of_both_packages(capsys: pytest.CaptureFixture[str]) -> None:
    expected = f"{__version__} (source {source_digest([ROOT / 'electra_core', ROOT / 'kernels'])[:8]})"
    assert version() == expected
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"electra-core {expected}\n"
    assert facts()["electra-core"] == expected


def test_a_run_records_the_code_and_names_another(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    run = tmp_path / "run"
    train(data, run, {"steps": 4})
    found, _ = newest_intact(run / "checkpoints")
    assert found is not None and found.meta["versions"]["electra-core"] == version()
    assert f"pre-trained with electra-core {version()}" in (run / "discriminator" / "README.md").read_text()
    monkeypatch.setattr(checkpoint, "version", lambda: "0.1.0 (source another)")
    find_checkpoint(run, resume=True, overwrite=False)
    said = f"electra-core {version()}, now 0.1.0 (source another)"
    assert caplog.messages == [f"{run}: continues, but perhaps not bit for bit: {said}"]


def test_the_code_is_read_when_a_run_begins_to_save(tmp_path: Path) -> None:
    """Before the first save, hours later, the files may be another version's."""
    version.cache_clear()
    CheckpointWriter(tmp_path, 1)
    assert version.cache_info().currsize == 1
