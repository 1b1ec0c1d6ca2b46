"""How a run stands and when it stops: state.json and its lock, clocks, time limits."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from killed import killed_child, names

import electra_core
from electra_core.errors import UserError
from electra_core.runs.folder import find_checkpoint
from electra_core.runs.state import FAILED, FINISHED, KILLED, RUNNING, STOPPED, RunState, read_state
from electra_core.runs.stop_request import StopRequest, check_time, deadline_of


def test_no_decision_hangs_on_a_clock_that_may_jump() -> None:
    """The exception is `--stop-at`, a time of day, for only that says when a scheduler ends a job."""
    for file in Path(electra_core.__file__).parent.rglob("*.py"):
        readings = re.findall(r"\btime\.time\(|datetime\.now\(\)", file.read_text(encoding="utf-8"))
        assert len(readings) == (2 if file.name == "stop_request.py" else 0), file.name


def test_the_earlier_limit_counts_and_a_clock_that_is_set_later_moves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = {"monotonic": 1000.0, "time": 2e9}
    monkeypatch.setattr("time.monotonic", lambda: clock["monotonic"])
    monkeypatch.setattr("time.time", lambda: clock["time"])
    assert deadline_of(900.0, None, None) is None
    assert deadline_of(900.0, 5.0, None) == 1200.0, "from the beginning, not from now"
    assert deadline_of(900.0, None, 2e9 + 60) == 1060.0
    assert deadline_of(900.0, 5.0, 2e9 + 60) == 1060.0 and deadline_of(900.0, 2.0, 2e9 + 60) == 1020.0
    stop = StopRequest(deadline_of(900.0, None, 2e9 + 60))
    clock |= {"monotonic": 1059.0, "time": 3e9}
    assert not stop
    clock |= {"monotonic": 1061.0, "time": 1e9}
    assert stop.agreed() == "time limit"


# How a run stands ---------------------------------------------------------------------------------------------


def test_state_is_a_fact_of_lock_and_file(tmp_path: Path) -> None:
    assert read_state(tmp_path) == {}
    with RunState(tmp_path) as state:
        state.begin(steps=8)
        assert read_state(tmp_path)["state"] == RUNNING
        with pytest.raises(UserError, match=f"being trained by process {os.getpid()}"):
            RunState(tmp_path)
        state.end(3, "SIGTERM")
    assert read_state(tmp_path) | {"written": ""} == {
        "state": STOPPED, "reason": "SIGTERM", "written": "", "step": 3, "steps": 8, "pid": os.getpid(),
        "host": read_state(tmp_path)["host"],
    }  # fmt: skip
    with RunState(tmp_path) as state:
        state.end(8)
    assert read_state(tmp_path)["state"] == FINISHED
    with pytest.raises(ZeroDivisionError), RunState(tmp_path):
        _ = 1 / 0
    assert (read_state(tmp_path)["state"], read_state(tmp_path)["reason"][:17]) == (FAILED, "ZeroDivisionError")
    killed_child(lambda: RunState(tmp_path).begin(steps=8))
    assert read_state(tmp_path)["state"] == KILLED
    assert names(tmp_path) == [".lock", "state.json"]
    (tmp_path / ".lock").unlink()
    assert read_state(tmp_path)["state"] == KILLED, "what is not there nobody holds"


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False),  # the script of a job
        (
            {"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16", "RANK": "0"},
            False,
        ),  # torchrun on each of two machines
    ],
    ids=str,
)
def test_a_command_that_srun_starts_twice_is_told_why_it_meets_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], told: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with RunState(tmp_path):
        for meets in (RunState, lambda run: find_checkpoint(run, resume=False, overwrite=False)):
            with pytest.raises(UserError) as error:
                meets(tmp_path)
            assert ("srun started this command 2 times: use --ntasks-per-node=1" in str(error.value)) == told


def test_without_locks_a_second_run_is_told_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By what state.json says: a process of this machine can be asked for; another may be dead as well."""

    def no_locks(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_locks)
    told = f"{tmp_path}: this file system has no locks: a second job here would not be noticed"
    with RunState(tmp_path) as state:
        state.begin(steps=8)
    RunState(tmp_path)  # "running" by this very process, which ended without a word
    dead = subprocess.Popen(["true"])
    dead.wait()
    facts = json.loads((tmp_path / "state.json").read_text())
    for pid in (dead.pid, 0, -1, 2**70, "1", None):
        (tmp_path / "state.json").write_text(json.dumps(facts | {"pid": pid}))
        RunState(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps(facts | {"pid": 7, "host": "elsewhere"}))
    RunState(tmp_path)
    assert caplog.messages[:-1] == [told] * 8, "neither this process nor a dead one trains it"
    assert caplog.messages[-1] == f"{told}; state.json says that process 7 on elsewhere trains it"
    (tmp_path / "state.json").write_text(json.dumps(facts | {"pid": os.getppid()}))
    with pytest.raises(UserError, match=f"trained by process {os.getppid()} on .*remove state.json if"):
        RunState(tmp_path)
    (tmp_path / "state.json").unlink()
    RunState(tmp_path)


def test_a_time_to_stop_at_is_a_number() -> None:
    for given in ("18:00", True, None, [1.9e9]):
        with pytest.raises(
            UserError, match=f"^stop_at: expected seconds since 1970.* got {type(given).__name__} "
        ):
            check_time(given)
