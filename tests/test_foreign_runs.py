"""Folders of runs whose checkpoints are out of sight, that were damaged, or that somebody else wrote."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from killed import contents
from small_runs import assert_same_run, base, data, make_data, one_thread, train  # noqa: F401

from electra_core.checkpoint import newest_intact
from electra_core.cli import main
from electra_core.errors import UserError
from electra_core.finetuning.folder import finished_report, write_json
from electra_core.runs import checkpoint_files
from electra_core.runs.folder import find_checkpoint
from electra_core.runs.metrics_log import MetricsLog, read_metrics
from electra_core.runs.state import FAILED, FINISHED, KILLED, RUNNING, STOPPED, RunState, read_state

FAR = 10**400
"""A whole number that no float holds."""
DEEP = "[" * 100_000


def write_state(run: Path, state: str, **facts: Any) -> None:
    (run / "state.json").write_text(json.dumps({"state": state, **facts}))


# Its checkpoints are out of sight -----------------------------------------------------------------------------


def hide_behind_a_link(run: Path) -> None:
    shutil.move(run / "checkpoints", run.parent / "hidden")
    (run / "checkpoints").symlink_to(run.parent / "not mounted")


def hide_behind_a_file(run: Path) -> None:
    shutil.move(run / "checkpoints", run.parent / "hidden")
    (run / "checkpoints").write_text("")


@pytest.mark.parametrize(
    ("hide", "said"),
    [
        (
            hide_behind_a_link,
            r"links to .*not mounted, which is not there; mount it, or remove the link to start anew",
        ),
        (hide_behind_a_file, r"checkpoints: cannot be read \(Not a directory\)"),
    ],
)
@pytest.mark.parametrize("state", [FINISHED, STOPPED, KILLED])
def test_a_run_whose_checkpoints_cannot_be_seen_is_left_alone(
    data: Path, base: Path, tmp_path: Path, hide: Any, said: str, state: str
) -> None:
    run = shutil.copytree(base, tmp_path / "run")
    write_state(run, RUNNING if state == KILLED else state, step=8 * (state != KILLED), steps=8)
    hide(run)
    before = contents(run)
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=said):
            train(data, run, **options)
        assert contents(run).items() >= before.items()
    assert main(["status", str(run)]) == 0, "the rest is shown"


def test_a_folder_that_may_not_be_read_is_not_one_without_checkpoints(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Any = ".") -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"checkpoints: cannot be read \(Permission denied\)"):
        checkpoint_files.checkpoint_folders(base / "checkpoints")


def test_a_finished_run_is_finished_without_its_checkpoints(
    data: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(base, tmp_path / "run")
    whole = train(data, run, resume=True)
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    with caplog.at_level("INFO"):
        result = train(data, run, {"log_every": 2}, resume=True)
    assert caplog.messages == [f"{run}: already finished"]
    assert (result.steps, result.tokens, result.stopped_by) == (8, whole.tokens, None)
    assert result.evaluation == whole.evaluation
    with pytest.raises(UserError, match="which is finished: steps was 8, is now 16"):
        train(data, run, {"steps": 16}, resume=True)
    assert contents(run) == before


def test_a_finished_fine_tuning_is_no_pre_training(data: Path, base: Path, tmp_path: Path) -> None:
    """Its config.toml has no tables."""
    run = shutil.copytree(base, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    (run / "config.toml").write_text("epochs = 1.0\n")
    with pytest.raises(UserError, match=r"cannot resume \S+run: it is not a pre-training run"):
        train(data, run, resume=True)


def test_a_run_that_an_earlier_version_finished_is_finished(
    data: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its checkpoints are of no use, since that version cut text into other examples, but nothing needs them."""
    run = shutil.copytree(base, tmp_path / "run")
    record_file = run / "checkpoints/step-00000008/state.json"
    record = json.loads(record_file.read_text())
    del record["identity"]["examples"], record["sha256_of_this"]
    record["sha256_of_this"] = checkpoint_files.record_digest(record)
    record_file.write_text(json.dumps(record))
    before = contents(run)
    with caplog.at_level("INFO"):
        result = train(data, run, resume=True)
    assert caplog.messages == [f"{run}: already finished"]
    assert (result.steps, result.stopped_by) == (8, None) and result.evaluation
    with pytest.raises(UserError, match="which is finished: steps was 8, is now 16"):
        train(data, run, {"steps": 16}, resume=True)
    with pytest.raises(UserError, match=r"which is finished: the corpus \(or its tokenizer\) differs"):
        train(make_data(tmp_path, seed=1), run, resume=True)
    assert contents(run) == before
    write_state(run, STOPPED, step=8, steps=8)
    with pytest.raises(
        UserError, match=r"finish it with that version, which is from before the changes of 29 Nov"
    ):
        train(data, run, resume=True)


def test_a_finished_run_begins_anew_where_that_is_asked_for(
    data: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(base, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    train(data, run, {"steps": 4}, resume=True, overwrite=True)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert "already finished" not in caplog.text


def test_a_finished_run_without_its_model_is_not_finished(data: Path, base: Path, tmp_path: Path) -> None:
    run = shutil.copytree(base, tmp_path / "run")
    for name in ("checkpoints", "discriminator", "generator"):
        shutil.rmtree(run / name)
    before = contents(run)
    with pytest.raises(UserError, match="is finished, but holds neither its model nor a checkpoint; overw"):
        train(data, run, resume=True)
    assert contents(run) == before


def kill(train_it: Any, after: int) -> None:
    """Ends `train_it` as SIGKILL would, at the row of the log that follows that of step `after`."""
    pid = os.fork()
    if pid == 0:
        write = MetricsLog.write

        def dies(log: MetricsLog, step: int, **figures: Any) -> None:
            if step > after:
                os.kill(os.getpid(), signal.SIGKILL)
            write(log, step, **figures)

        MetricsLog.write = dies  # type: ignore[method-assign]
        try:
            train_it()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("resumed", [False, True])
def test_a_killed_run_that_lost_its_checkpoints_is_not_begun_anew(
    data: Path, base: Path, tmp_path: Path, resumed: bool
) -> None:
    run, often = tmp_path / "run", {"checkpoint_every": 2}
    kill(lambda: train(data, run, often), after=6)  # the thread has written step 4, and perhaps 6
    if resumed:
        kill(lambda: train(data, run, often, resume=True), after=6)
    assert read_state(run)["saved"] in (4, 6)
    (run / "checkpoints").rename(tmp_path / "hidden")
    before = contents(run)
    with pytest.raises(UserError, match="holds a run but no checkpoint of it; overwrite starts a new one"):
        train(data, run, often, resume=True)
    assert contents(run) == before
    (tmp_path / "hidden").rename(run / "checkpoints")
    train(data, run, often, resume=True)
    assert_same_run(run, base)


def test_a_run_killed_before_its_first_checkpoint_leaves_the_fact(data: Path, base: Path, tmp_path: Path) -> None:
    kill(lambda: train(data, tmp_path / "run"), after=2)
    assert read_state(tmp_path / "run")["saved"] == 0
    train(data, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", base)


@pytest.mark.parametrize("state", [STOPPED, KILLED, FAILED, "", "without steps"])
def test_a_run_that_lost_its_checkpoints_is_not_begun_anew_unasked(
    data: Path, base: Path, tmp_path: Path, state: str
) -> None:
    run = shutil.copytree(base, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    write_state(run, RUNNING if state == KILLED else state, **({} if state == "without steps" else {"step": 4}))
    if state in (STOPPED, KILLED):
        for kind in ("discriminator", "generator"):
            shutil.rmtree(run / kind)
    before = contents(run)
    with pytest.raises(UserError, match="holds a run but no checkpoint of it; overwrite starts a new one"):
        train(data, run, resume=True)
    assert contents(run) == before
    assert find_checkpoint(run, resume=True, overwrite=True) is None


def test_a_run_killed_before_its_first_checkpoint_begins_anew(data: Path, base: Path, tmp_path: Path) -> None:
    """As queues repeat a command: after rows of the log, in the middle of the first save, after an error."""
    for number, (state, models) in enumerate(((RUNNING, False), (RUNNING, True), (FAILED, False))):
        run = shutil.copytree(base, tmp_path / str(number))
        for path in (run / "checkpoints").iterdir():
            path.rename(path.with_name(f".{path.name}.123.tmp"))
        write_state(run, state, step=0, steps=8)
        for kind in () if models else ("discriminator", "generator"):
            shutil.rmtree(run / kind)
        train(data, run, resume=True)
        assert_same_run(run, base)


# It is damaged ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["null", '"text"', "5", "[]", DEEP])
def test_a_checkpoint_whose_record_is_none_is_passed_over(
    base: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(base, tmp_path / "run")
    (run / "checkpoints/step-00000008/state.json").write_text(content)
    checkpoint, damaged = newest_intact(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 4 and len(damaged) == 1
    assert main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["best_checkpoint"] == 4


@pytest.mark.parametrize("step", [-8, 9, "8", float("inf"), None])
def test_a_checkpoint_of_another_step_than_its_name_says_is_passed_over(
    base: Path, tmp_path: Path, step: Any
) -> None:
    run = shutil.copytree(base, tmp_path / "run")
    file = run / "checkpoints/step-00000008/state.json"
    record = json.loads(file.read_text()) | {"step": step}
    del record["sha256_of_this"]
    file.write_text(json.dumps(record | {"sha256_of_this": checkpoint_files.record_digest(record)}))
    checkpoint, damaged = newest_intact(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 4 and len(damaged) == 1


# Somebody else wrote it ---------------------------------------------------------------------------------------


def test_no_link_leads_out_of_the_folder(data: Path, base: Path, tmp_path: Path) -> None:
    run, mine = shutil.copytree(base, tmp_path / "run"), tmp_path / "mine"
    mine.write_text("dear")
    places = ("config.toml", "state.json", "metrics.jsonl", "metrics.json")
    for name in (*places, *(f".{name}.new" for name in places)):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(mine)
    train(data, run, resume=True)
    write_json(run / "metrics.json", {})
    assert mine.read_text() == "dear"
    assert {name for name in places if not (run / name).is_symlink()} == {*places}


FOREIGN: list[dict[str, Any]] = [
    *({"tokens_per_second": value} for value in ("x", [], None, FAR)),
    *({"tokens": value} for value in ("x", [1], FAR, float("inf"))),
    *({"loss": value} for value in ("x", [1], FAR, 1e308, -1e308, float("inf"))),
    *({"eval_mlm_loss": value} for value in ("x", [1], None, FAR, float("inf"))),
    *({"warnings": value} for value in (5, None, "text", [[1], {}])),
    *({"step": value} for value in (FAR, -5, "x", None)),
    {"dev_accuracy": "x"},
]


@pytest.mark.parametrize("values", FOREIGN, ids=lambda values: str(values)[:40])
def test_figures_that_are_none_are_left_out(
    base: Path, tmp_path: Path, values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = shutil.copytree(base, tmp_path / "run"), tmp_path / "rows.json"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [*rows[:-3], *(row | values for row in rows[-3:])]
    (run / "metrics.jsonl").write_text("\n".join([*map(json.dumps, rows), DEEP]))
    file.write_text(json.dumps(rows))
    with RunState(run) as state:  # for the time left
        state.begin(steps=1000)
        for options in (["--html", str(tmp_path / "page.html")], ["--reference", str(run)], ["--json"]):
            assert main(["status", str(run), *options]) == 0
        bad = not isinstance(values.get("step", 1), int) or values.get("step") == FAR
        assert main(["status", str(run), "--reference", str(file)]) == 2 * bad
    with MetricsLog(run, first_step=6) as log:
        assert all(isinstance(loss, float) for loss in log.recent_losses)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("content", [DEEP, '{"step": 1e999, "steps": 1e999}', f'{{"steps": {FAR}}}'])
def test_the_status_of_a_state_that_is_none(base: Path, tmp_path: Path, content: str) -> None:
    run = shutil.copytree(base, tmp_path / "run")
    (run / "state.json").write_text(content)
    assert main(["status", str(run)]) == 0
    (run / "config.toml").write_text(f'[pretrain]\nmodel = "{"x" * 10_000}"\n')
    assert main(["status", str(run)]) == 0


@pytest.mark.parametrize("content", [DEEP, '{"rows": 5}', '{"rows": [5]}', '[{"step": null}]', "[]"])
def test_a_reference_that_is_none(
    base: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.json").write_text(content)
    assert main(["status", str(base), "--reference", str(tmp_path / "rows.json")]) == 2
    assert "rows.json: not a reference curve" in capsys.readouterr().err


def test_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    for name in (".lock", "state.json", "metrics.json", "metrics.jsonl"):
        os.mkfifo(tmp_path / name)
    assert read_state(tmp_path) == {} and read_metrics(tmp_path / "metrics.jsonl") == []
    assert finished_report(tmp_path) is None


# Its name is not UTF-8 ----------------------------------------------------------------------------------------


NOT_UTF_8 = os.fsdecode(b"o\xff")


def test_a_run_s_name_is_utf_8(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a name in UTF-8"):
        train(data, tmp_path / NOT_UTF_8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--html", "--png"])
def test_the_status_of_a_run_whose_name_is_not_utf_8(base: Path, tmp_path: Path, flag: str) -> None:
    if flag == "--png":
        pytest.importorskip("matplotlib")
    run, file = shutil.copytree(base, tmp_path / NOT_UTF_8), tmp_path / NOT_UTF_8 / "curves"
    assert main(["status", str(run), "--reference", str(run), flag, str(file)]) == 0
    assert flag == "--png" or "o\\udcff" in file.read_text(encoding="utf-8")
