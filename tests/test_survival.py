"""Runs that meet what machines do to them: signals, a full or read-only disk, clocks that jump, NaN without end.

`test_reliability.py` looks at the parts; here whole runs are interrupted, told in one line, and resumed to
the bits of the undisturbed one. A full and a read-only disk are real ones (tmpfs) where this process may mount.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import forked, wait_for
from small_runs import SLOW_RUN, assert_same_run, base, data, one_thread, train

from electra_core.cli import DIVERGED, main
from electra_core.electra import Electra
from electra_core.pretraining import meter
from electra_core.pretraining.evaluation import evaluate, health
from electra_core.runs.metrics_log import MetricsLog, read_metrics
from electra_core.runs.state import FAILED, read_state
from electra_core.runs.status import read_run
from electra_core.runs.stop_request import StopRequest
from electra_core.training import StepResult

__all__ = ["base", "data", "one_thread"]  # fixtures


def command(data: Path, base: Path, out: Path, *more: str) -> list[str]:
    """`electra pretrain` with the settings of `base`."""
    given = ["pretrain", "--data", str(data), "--out", str(out), "--config", str(base / "config.toml")]
    return [*given, "--device", "cpu", "--quiet", *more]


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is told besides warnings."""
    lines = capsys.readouterr().err.strip().split("\n")
    (line,) = (line for line in lines if not line.startswith("warning: "))
    return line


# Signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", StopRequest.SIGNALS, ids=lambda number: number.name)
def test_each_signal_is_a_request_and_the_second_is_not(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does what it would do to any program: sent once more, it finds the system's own handler."""
    before, sent, clock = signal.getsignal(number), [], [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with StopRequest() as stop:
        assert not stop and stop.agreed() is None
        signal.raise_signal(number)
        assert stop.agreed() == number.name and signal.getsignal(number) is not signal.SIG_DFL
        clock[0] += StopRequest.SAME_SIGNAL + 1
        monkeypatch.setattr(os, "kill", lambda *call: sent.append((*call, signal.getsignal(number))))
        signal.raise_signal(number)
    assert sent == [(os.getpid(), number, signal.SIG_DFL)]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (("SIGTERM", "SIGTERM"), 0),
        (("SIGUSR1", "SIGUSR1"), 0),
        (("SIGTERM", "SIGUSR1"), 0),
        (("SIGTERM", "later", "SIGTERM"), -signal.SIGTERM),
        (("SIGINT", "SIGINT"), -signal.SIGINT),
        (("SIGTERM", "SIGINT"), -signal.SIGINT),
        (("SIGINT", "SIGTERM"), -signal.SIGTERM),
    ],
    ids=str,
)
def test_a_schedulers_signal_counts_once_though_it_comes_twice(sent: tuple[str, ...], status: int) -> None:
    """From the scheduler itself and from the job's script, which passes it on, as SIGUSR1 perhaps."""

    def signals() -> None:
        with StopRequest() as stop:
            for name in sent:
                if name == "later":
                    stop.SAME_SIGNAL = 0.0  # type: ignore[misc]
                else:
                    os.kill(os.getpid(), signal.Signals[name])
            assert stop.agreed() == sent[0]

    assert forked(signals) == status


@pytest.mark.parametrize(
    ("name", "value", "status"), [("LOCAL_RANK", "0", 75), ("TORCHELASTIC_RUN_ID", "none", 0)]
)
def test_only_torchrun_makes_a_stopped_run_end_with_0(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, status: int
) -> None:
    """Schedulers and earlier jobs leave a LOCAL_RANK, too."""
    monkeypatch.setenv(name, value)
    assert main(command(data, base, tmp_path / "run", "--max-minutes", "0")) == status


def test_in_a_notebook_the_second_interrupt_is_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel with all its variables would end with the process."""
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed() == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_signal_ends_at_once_and_harms_nothing(data: Path, base: Path, tmp_path: Path) -> None:
    out, flag = tmp_path / "run", tmp_path / "flag"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, str(flag), "60", *command(data, base, out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        for seen in (flag, flag.with_name("flag-seen")):  # two that come at the same moment are one
            wait_for(seen, process)
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=50) == -signal.SIGINT, "not after the step of a minute"
    finally:
        process.kill()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]
    assert main(command(data, base, out, "--resume")) == 0
    assert_same_run(out, base)


# Disks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leaves no byte free."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    return filler


@pytest.mark.parametrize("step", [4, 8], ids=["while it logs", "while it saves"])
def test_a_disk_that_fills_up(
    data: Path,
    base: Path,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
) -> None:
    """Filled when step 5 begins, or between the last row of the log and the last checkpoint."""
    whole, evaluated = MetricsLog.write, itertools.count(1)

    def write(self: MetricsLog, at: int, **figures: Any) -> None:
        whole(self, at, **figures)
        if "eval_mlm_loss" in figures and 4 * next(evaluated) == step:
            fill(disk)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write)
        assert main(command(data, base, disk / "run")) == 2
    said = the_error(capsys)
    assert "the disk is full" in said
    kept = {path.name for path in (disk / "run" / "checkpoints").iterdir()}
    assert kept == ({"step-00000004"} if step == 8 else set())
    (disk / "filler").unlink()
    assert main(command(data, base, disk / "run", "--resume")) == 0
    assert_same_run(disk / "run", base)


def test_a_disk_that_is_read_only(data: Path, base: Path, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(data, base, disk / "run", "--steps", "4")) == 0
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    capsys.readouterr()
    for more in (("--resume",), ("--overwrite",)):
        assert main(command(data, base, disk / "run", "--steps", "4", *more)) == 2
        said = the_error(capsys)
        assert "read-only" in said.lower()
    assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before


# Clocks -------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_nothing(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of day goes back and forth by years, for this program and the libraries below it."""
    jumps, now = itertools.cycle((0.0, 1e8, -1e8, -3e8)), time.time
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    train(data, tmp_path / "run", max_minutes=1000)
    assert_same_run(tmp_path / "run", base)
    assert all(
        row["tokens_per_second"] > 0 for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row
    )


# It diverges, or learns nothing -------------------------------------------------------------------------------


def test_a_run_that_diverges_exits_with_a_status_of_its_own(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Electra.forward

    def spoiled(self: Electra, batch: Any, seed: Any) -> Any:
        output = whole(self, batch, seed)
        return dataclasses.replace(output, loss=output.loss * math.nan) if self.training else output

    monkeypatch.setattr(Electra, "forward", spoiled)
    assert main(command(data, base, tmp_path / "run", "--steps", "30")) == DIVERGED == 3
    said = the_error(capsys)
    assert "20 steps in a row" in said and "postmortem.json" in said
    assert json.loads((tmp_path / "run" / "postmortem.json").read_text())["step"] == 20
    assert read_state(tmp_path / "run")["state"] == FAILED


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"rtd_loss": 0.20, "base_rate_loss": 0.37, "replaced_fraction": 0.12}, None),
        ({"rtd_loss": 0.369, "base_rate_loss": 0.37, "replaced_fraction": 0.12}, "at the base rate"),
        ({"rtd_loss": 0.368, "base_rate_loss": 0.37, "replaced_fraction": 0.12}, "narrower one (generator hidden"),
        ({"rtd_loss": 0.05, "base_rate_loss": 0.09, "replaced_fraction": 0.017}, "is too good"),
        ({"mlm_loss": 3.0}, None),
    ],
    ids=["learns", "base rate", "what to do", "generator", "no discriminator"],
)  # fmt: skip
def test_collapse_is_told_in_words(figures: dict[str, float], said: str | None) -> None:
    warnings = health({f"eval_{name}": value for name, value in figures.items()})
    assert len(warnings) == (said is not None) and all(str(said) in warning for warning in warnings)


# It is watched ------------------------------------------------------------------------------------------------


def test_data_wait_and_mfu_are_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 s of which batches took 1; 4,000 tokens of 10 FLOPs at a peak of 32,000 a second."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(meter, "peak_flops", lambda device, devices: 32_000.0)
    watched = meter.Meter(500, 10.0, torch.device("cpu"))

    def slow(step: int) -> int:
        clock[0] += 0.5
        return step

    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    for step in (1, 2):
        assert watched.timing(slow)(step) == step
        clock[0] += 2.0
        figures = {"loss": step * one, "tokens": torch.tensor(2000.0)}
        result = StepResult(
            step, one, figures, gradient_norm=one, learning_rate=0.1, skipped=zero.bool(), in_a_row=zero
        )
        watched.add(result)
    clock[0] += 7.0
    watched.leave_out(clock[0] - 7.0)  # an evaluation
    row = watched.row(result)
    assert (row["data_wait"], row["mfu"], row["tokens_per_second"]) == (0.2, 0.25, 800.0)
    assert (row["tokens"], row["loss"], row["skipped_steps"]) == (4500, 1.5, 0)
    clock[0] += 5.0  # a row of its own: nothing of the first counts again, nor what is read before its end
    for tokens in (6500, 8500):
        watched.add(result)
        assert watched.tokens == watched.tokens == tokens
    row = watched.row(result)
    assert (row["data_wait"], row["tokens_per_second"], row["tokens"], row["loss"]) == (0.0, 800.0, 8500, 2.0)


def test_an_evaluation_slows_no_row_of_the_log(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rows' time only training counts; by this clock nothing but evaluations takes any."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow(*arguments: Any) -> dict[str, float]:
        clock[0] += 1000
        return evaluate(*arguments)

    monkeypatch.setattr("electra_core.pretrain.evaluate", slow)
    train(data, tmp_path / "run", {"steps": 4, "eval_every": 2})
    speeds = [row["tokens_per_second"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert clock[0] == 2000 and len(speeds) == 4 and min(speeds) > 1000


def test_a_skipped_step_spoils_no_row_of_the_log(tmp_path: Path) -> None:
    """Losses are means over the steps that were taken; tokens were read in all of them."""
    watched, one = meter.Meter(0, 10.0, torch.device("cpu")), torch.tensor(1.0)

    def row(*losses: float) -> dict[str, Any]:
        for loss in losses:
            figures = {"loss": loss * one, "tokens": torch.tensor(2000.0)}
            skipped = torch.tensor(not math.isfinite(loss))
            result = StepResult(1, loss * one, figures, loss * one, 0.1, skipped, skipped.long())
            watched.add(result)
        return watched.row(result)

    first, second = row(1.0, math.nan, 2.0), row(math.nan)
    assert (first["loss"], first["tokens"], first["skipped_steps"]) == (1.5, 6000, 1)
    assert math.isnan(second["loss"]) and second["skipped_steps"] == 1
    with MetricsLog(tmp_path) as log:
        for step, figures in enumerate([first, second], start=1):
            log.write(step, **figures)

    def no_json(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=no_json)["loss"] for line in lines] == [1.5, None]
    back = read_metrics(tmp_path / "metrics.jsonl")
    assert back[0] == {"step": 1} | first and math.isnan(back[1]["loss"])
    with MetricsLog(tmp_path) as log:
        log.write(2, eval_loss=math.nan)
    run = read_run(tmp_path)
    assert math.isnan(run.evaluation["eval_loss"]) and run.to_json()["evaluation"] == {"eval_loss": None}


def test_weights_and_biases_gets_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in of its three calls; the package itself is not needed."""
    calls: list[Any] = []
    wandb: Any = types.ModuleType("wandb")
    wandb.init = lambda **options: calls.append(options) or wandb
    wandb.log = lambda numbers, step: calls.append((step, numbers))
    wandb.finish = lambda exit_code: calls.append(("finished", exit_code))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = MetricsLog(tmp_path, wandb="project")
    log.write(3, loss=2.0, warnings=["said"])
    log.close()
    MetricsLog(tmp_path, first_step=3, wandb="project").close()
    MetricsLog(tmp_path, wandb="project").close()
    begun, _, _, resumed, _, anew, _ = calls
    known = {"project": "project", "name": tmp_path.name, "dir": str(tmp_path), "resume": "allow"}
    assert begun == known | {"id": begun["id"]} and calls[1:3] == [(3, {"loss": 2.0}), ("finished", 0)]
    assert resumed["id"] == begun["id"] != anew["id"], "a run that goes on is known by its id alone"


def test_tensorboard_keeps_the_row_that_a_run_goes_on_from(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, steps in ((0, (2, 4, 6)), (4, (6, 8))):
        with MetricsLog(tmp_path, first_step=first) as log:
            for step in steps:
                log.write(step, loss=float(first + step))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 2), (4, 4), (6, 10), (8, 12)]
