"""`electra status`: runs beside each other, how each stands, and what is said where there is none."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from electra_core.cli import main
from electra_core.config import PRESETS
from electra_core.files.toml_files import to_toml
from electra_core.reports.status_views import shown
from electra_core.runs import status
from electra_core.runs.metrics_log import MetricsLog
from electra_core.runs.state import FINISHED, RUNNING, STOPPED, RunState


def make_run(folder: Path, loss: float, warnings: list[str] | None = None) -> Path:
    folder.mkdir()
    with RunState(folder) as state:
        log = MetricsLog(folder)
        for step in range(1, 9):
            log.write(step, tokens=100 * step, tokens_per_second=50.0, loss=loss + 8 / step)
        log.write(
            8, tokens=800, eval_mlm_loss=loss, eval_rtd_auc=0.7, **({"warnings": warnings} if warnings else {})
        )
        log.close()
        state.begin(steps=16)
        state.end(8, "SIGTERM")
    return folder


def test_status_shows_runs_beside_each_other_and_a_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = make_run(tmp_path / "good", 5.0), make_run(tmp_path / "bad", 7.0, ["It learns nothing."])
    page = tmp_path / "page.html"
    assert main(["status", str(good), str(bad), "--reference", str(good), "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "stopped (SIGTERM)" in said and "8 of 16" in said and "warning: bad: It learns nothing." in said
    assert "good: mlm loss 5.000 after 800 tokens: level with the reference (5.000)" in said
    assert "bad: mlm loss 7.000 after 800 tokens: behind the reference (5.000)" in said
    assert "training loss" in said and "* good  o bad" in said and max(map(len, said.split("\n"))) <= 100
    html = page.read_text(encoding="utf-8")
    assert html.count("<polyline") >= 4 and "It learns nothing." in html and "http" not in html.split("<body>")[1]
    assert main(["status", str(bad), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["state"], run["step"], run["steps"], run["tokens"], run["seconds_left"]) == (
        "stopped",
        8,
        16,
        800,
        None,
    )


def test_a_log_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(make_run(tmp_path / "run", 5.0, ["\x1b[2Jfine"]))]) == 0
    said = capsys.readouterr().out
    assert r"warning: run: \x1b[2Jfine" in said and "\x1b" not in said


def test_status_shows_each_run_once_and_tells_them_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        make_run(folder / "run", 5.0)
    monkeypatch.chdir(tmp_path / "a")
    same = ["run", "run/", str(tmp_path / "a" / "run")]
    for paths, names in ((same, ["run"]), ([*same, "../b/run"], ["a/run", "b/run"])):
        assert main(["status", *paths, "--json"]) == 0
        assert [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]] == names


def test_time_left_is_told_of_a_run_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", 5.0)
    with RunState(folder) as state:
        state.begin(steps=16)
        assert main(["status", str(folder), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["state"] == RUNNING and run["seconds_left"] == pytest.approx(8 * 100 / 50)


def test_status_of_several_seeds_is_that_of_the_folder_around_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def states(*paths: Path) -> list[tuple[str, str]]:
        assert main(["status", *map(str, paths), "--json"]) == 0
        return [(run["name"], run["state"]) for run in json.loads(capsys.readouterr().out)["runs"]]

    out = tmp_path / "out"
    out.mkdir()
    for seed in (2, 10):
        (make_run(out / f"seed-{seed}", 5.0) / "state.json").unlink()
    with RunState(out) as state:
        state.begin()
        assert states(out) == [("seed-2", FINISHED), ("seed-10", RUNNING)], "in the order of their numbers"
        assert states(out / "seed-10") == [("seed-10", RUNNING)]
        state.end(12, "SIGINT")
    assert states(out) == [("seed-2", FINISHED), ("seed-10", STOPPED)]
    (run,) = status.find_runs([out / "seed-10"])
    assert (run.reason, run.step) == ("SIGINT", run.rows[-1]["step"]), "the steps of all seeds are not this one's"
    (out / "state.json").unlink()
    assert states(out) == [("seed-2", "unknown"), ("seed-10", "unknown")]


@pytest.mark.parametrize("folder", ["out", "out/seed-3"])
def test_the_curve_of_a_fine_tuning_is_what_chooses_its_best_model(tmp_path: Path, folder: str) -> None:
    log = tmp_path / folder / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 1, "dev_acc_and_f1": 0.5, "dev_auc": 0.6, "dev_mcc": 0.1}\n')
    assert shown(status.find_runs([log.parent])) == ["dev_acc_and_f1"]
    for task, figure in (('{"metric": "mcc"}', "dev_mcc"), ("[]", "dev_acc_and_f1"), ("x", "dev_acc_and_f1")):
        (tmp_path / "out" / "task.json").write_text(task)
        assert shown(status.find_runs([log.parent])) == [figure]


def test_status_of_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "not a run's folder" in capsys.readouterr().err
    run = make_run(tmp_path / "run", 5.0)
    (tmp_path / "x.json").write_text("{}")
    assert main(["status", str(run), "--reference", str(tmp_path / "x.json")]) == 2
    assert "not a reference curve" in capsys.readouterr().err


def test_status_as_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run", 5.0)
    assert main(["status", str(run), "--png", str(tmp_path / "run.png")]) == 0
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("flag", ["--html", "--png"])
def test_status_where_nothing_can_be_written(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if flag == "--png":
        pytest.importorskip("matplotlib")
    run, file = make_run(tmp_path / "run", 5.0), tmp_path / "nowhere" / "curves"
    assert main(["status", str(run), flag, str(file)]) == 2
    assert (
        capsys.readouterr().err
        == f"electra status: {flag} {file}: cannot be written (No such file or directory)\n"
    )


@pytest.mark.parametrize(
    ("changes", "sizes", "compared"),
    [
        ({}, {}, True),
        ({"steps": 300, "learning_rate": 1e-4, "seed": 7}, {"hidden_dropout_prob": 0.1}, True),
        ({"objective": "mlm"}, {}, False),
        ({"generator_hidden_size": 64, "generator_intermediate_size": 256}, {}, False),
        ({}, {"vocab_size": 30_522}, False),
        ({}, {"num_hidden_layers": 6}, False),
        ({"model": "small"}, {}, False),
        ({"model": "mine"}, {}, False),
    ],
)
def test_the_preset_s_curve_is_for_runs_like_it(
    tmp_path: Path, changes: dict, sizes: dict, compared: bool
) -> None:
    """A masked LM's loss says nothing beside that of ELECTRA's narrow generator."""
    run, tiny = make_run(tmp_path / "run", 5.0), PRESETS["tiny"]
    tables = {"pretrain": asdict(tiny.pretrain) | changes, "discriminator": asdict(tiny.discriminator) | sizes}
    (run / "config.toml").write_text("".join(f"[{name}]\n{to_toml(table)}" for name, table in tables.items()))
    (found,) = status.find_runs([run])
    curve = status.reference_curve(None, found)
    assert (curve is not None) == compared and (curve is None or curve[0] == "reference (tiny)")
    assert status.reference_curve(str(run), found) is not None
