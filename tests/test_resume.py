"""Pre-training runs that are interrupted, by a signal, a limit or a failure, go on as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from killed import wait_for
from small_runs import SLOW_RUN, assert_same_run, base, data, one_thread, rows, stop_at, train  # noqa: F401

from electra_core.cli import main
from electra_core.errors import on_command_line
from electra_core.pretrain import pretrain
from electra_core.runs.stop_request import StopRequest, tell_python


def test_a_run_stopped_between_evaluations_reports_the_last_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals = iter([None] * 4 + ["SIGTERM", "SIGTERM"])
    monkeypatch.setattr(StopRequest, "agreed", lambda self: next(signals))
    first = train(data, tmp_path / "run")  # evaluates after 4 steps
    second = train(data, tmp_path / "run", resume=True)
    assert (first.steps, second.steps) == (5, 6) and first.evaluation
    assert second.evaluation == pytest.approx(first.evaluation)


@pytest.mark.parametrize("optimizer", ["muon", "electra-adam", "adamw"])
def test_resumed_equals_uninterrupted(data: Path, base: Path, tmp_path: Path, optimizer: str) -> None:
    """What the log says after the checkpoint was written is of a part that is done again: it is dropped."""
    changes = {"optimizer": optimizer}
    if optimizer == "muon":
        whole = base
    else:
        whole = tmp_path / "whole"
        train(data, whole, changes)
    run = stop_at(tmp_path / "run", whole, 4)
    result = train(data, run, changes, resume=True)
    assert result.steps == 8 and result.stopped_by is None
    assert_same_run(run, whole)


def test_resume_of_a_finished_run_changes_nothing(data: Path, base: Path, tmp_path: Path) -> None:
    run = stop_at(tmp_path / "run", base, 8)
    train(data, run, resume=True)
    assert_same_run(run, base)


def test_an_interrupt_in_python_is_one_once_all_is_saved(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals = iter([None, "SIGINT"])
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "agreed", lambda self: next(signals))
        with pytest.raises(
            KeyboardInterrupt, match=r"stopped by SIGINT; .*run holds step 2; resume=True continues"
        ):
            train(data, tmp_path / "run")
    train(data, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", base)


def test_an_interrupt_that_comes_too_late_to_stop_the_run_is_one(
    data: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So that a sweep ends. It comes after the last step, while the model is evaluated."""

    def interrupt(figures: dict[str, float]) -> None:
        if figures["step"] == 8:
            os.kill(os.getpid(), signal.SIGINT)

    said = r"^it came too late to stop this run, which is finished; .*run holds step 8$"
    with pytest.raises(KeyboardInterrupt, match=said):
        train(data, tmp_path / "run", on_evaluation=interrupt)
    assert_same_run(tmp_path / "run", base)
    assert train(data, tmp_path / "run", resume=True).stopped_by is None


def test_an_interrupt_counts_though_something_else_stops_the_run(data: Path, tmp_path: Path) -> None:
    def interrupt(figures: dict[str, float]) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return True

    with pytest.raises(KeyboardInterrupt, match=r"^stopped by on_evaluation; .*run holds step 4; resume=True"):
        train(data, tmp_path / "run", on_evaluation=interrupt)


def test_on_the_command_line_the_exit_status_says_it_all() -> None:
    with on_command_line():
        for reason in (None, "SIGINT", "SIGTERM"):
            tell_python(reason, "SIGINT", "OUT holds the model", pytest.fail)


def test_a_time_limit_saves_and_says_so(
    data: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = train(data, tmp_path / "run", max_minutes=0.0)
    assert (result.steps, result.stopped_by) == (1, "time limit")
    assert result.evaluation and len(rows(tmp_path / "run")) == 1, "figures, of which the log has none out of turn"
    assert "warning: stopped by time limit; " in caplog.text
    assert train(data, tmp_path / "run", resume=True).steps == 8
    assert_same_run(tmp_path / "run", base)


def test_a_limit_counts_from_the_call_and_a_time_of_day_is_one_for_all_restarts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting words takes longer than the limit here; and a time that has come ends every restart alike."""
    module, late, now = sys.modules[pretrain.__module__], [0.0], time.monotonic
    opened = module.open_job
    monkeypatch.setattr(time, "monotonic", lambda: now() + late[0])

    def slow(*arguments: Any) -> Any:
        late[0] += 3600.0
        return opened(*arguments)

    monkeypatch.setattr(module, "open_job", slow)
    result = train(data, tmp_path / "run", max_minutes=30)
    assert (result.steps, result.stopped_by) == (1, "time limit")
    for steps in (2, 3):
        result = train(data, tmp_path / "run", resume=True, stop_at=time.time())
        assert (result.steps, result.stopped_by) == (steps, "time limit")
    assert train(data, tmp_path / "run", resume=True, stop_at=time.time() + 9e4).stopped_by is None


def test_the_folder_of_the_data_is_not_read_after_the_start(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is mapped stays readable; a name may not: a job's scratch disk is cleared, a mount lost."""
    module, copy = sys.modules[pretrain.__module__], tmp_path / "data"
    opened = module.open_job
    shutil.copytree(data, copy)

    def removed(*arguments: Any) -> Any:
        job = opened(*arguments)
        shutil.rmtree(copy)
        return job

    monkeypatch.setattr(module, "open_job", removed)
    train(copy, tmp_path / "run")
    assert_same_run(tmp_path / "run", base)


def test_sigterm_saves_and_exits_75_and_the_run_goes_on(data: Path, base: Path, tmp_path: Path) -> None:
    out, flag = tmp_path / "run", tmp_path / "flag"
    arguments = ["pretrain", "--data", str(data), "--out", str(out), "--model", "tiny", "--device", "cpu"]
    arguments += ["--config", str(base / "config.toml")]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, str(flag), "0", *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(flag, process)
        process.send_signal(signal.SIGTERM)
        said, complained = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 75, complained
    assert "SIGTERM" in said and "--resume" in said
    saved = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert saved == ["step-00000004", "step-00000006"], "in the middle, between two regular ones"
    assert main([*arguments, "--resume", "--quiet"]) == 0
    assert_same_run(out, base)


def test_a_request_to_stop_at_the_last_step_stops_nothing(data: Path, tmp_path: Path) -> None:
    result = train(data, tmp_path / "run", {"steps": 1}, max_minutes=0.0)
    assert (result.steps, result.stopped_by) == (1, None)
