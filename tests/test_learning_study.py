"""The learning study: what its pieces are, how rates are chosen, that it goes on, and what the page says of it."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import learning_study, learning_tasks, render, render_learning, tiny_tasks
from benchmarks.learning_plan import (
    BUDGETS,
    START,
    Finetuning,
    Pretraining,
    chosen_rate,
    pieces,
    steps_for_equal_flops,
    trial_scores,
)
from electra_core.config import OBJECTIVES, PRESETS
from electra_core.errors import UserError
from electra_core.flops import training_step_flops


def test_a_runs_pieces_come_before_what_is_made_of_them() -> None:
    for budget in BUDGETS.values():
        seen: set[Pretraining] = set()
        names = []
        for piece in pieces(budget):
            names.append(piece.name)
            assert not isinstance(piece, Finetuning) or piece.run in seen
            if isinstance(piece, Pretraining):
                if piece.equal == "seconds":  # measured on the runs of equal FLOPs
                    assert {
                        replace(piece, equal="flops"),
                        replace(piece, equal="flops", objective="electra"),
                    } <= seen
                if piece.trial is None and piece.objective != START:
                    trials = {run for run in seen if run.objective == piece.objective and run.trial is not None}
                    assert len(trials) == len(budget.rates), "its rate has been chosen"
                seen.add(piece)
        assert len(set(names)) == len(names)


def test_the_first_pieces_are_the_most_valuable() -> None:
    """The longest runs of one seed come before another seed, and equal time behind equal FLOPs."""
    names = [piece.name for piece in pieces(BUDGETS["minutes"])]
    seconds = [index for index, name in enumerate(names) if "-seconds" in name]
    for objective in OBJECTIVES:
        assert names.index(f"{objective}-flops2-seed0-sst-2-seed0") < names.index("electra-flops1-seed1")
        assert names.index(f"{objective}-flops0-seed1-sst-2-seed0") < min(seconds)


def test_a_budget_for_two_objectives_compares_no_others_and_nothing_by_time() -> None:
    runs = {piece for piece in pieces(BUDGETS["pair"]) if isinstance(piece, Pretraining)}
    assert {run.objective for run in runs} == {"electra", "mlm", START}
    assert {run.equal for run in runs} == {"flops"}
    assert {run.seed for run in runs if run.trial is None} == {0, 1, 2}


def trial(objective: str, rate: float, value: float) -> dict[str, Any]:
    return {"kind": "finetuning", "objective": objective, "trial": rate, "value": value}


def test_every_objective_gets_the_rate_with_which_it_did_best() -> None:
    rows = [trial("mlm", 0.5, 0.1), trial("mlm", 0.5, 0.5), trial("mlm", 1.0, 0.2), trial("mlm", 2.0, 0.3)]
    rows += [trial("electra", 2.0, 0.9), trial("electra", 1.0, 0.2), {"kind": "finetuning", "value": 7.0}]
    assert trial_scores(rows)["mlm"] == {0.5: 0.3, 1.0: 0.2, 2.0: 0.3}
    assert chosen_rate(rows, "mlm") == 0.5 and chosen_rate(rows, "electra") == 2.0
    assert chosen_rate(rows, START) == 1.0


def test_trials_are_as_long_for_every_objective_and_judged_by_rows_of_their_own(tmp_path: Path) -> None:
    budget, preset = BUDGETS["minutes"], PRESETS["tiny"]
    costs = []
    for objective in OBJECTIVES:
        run = Pretraining(objective, 0, 0, trial=1.0)
        step = training_step_flops(preset.discriminator, replace(preset.pretrain, objective=objective))
        costs.append(steps_for_equal_flops(budget, run, 8192) * step)
    assert max(costs) / min(costs) < 1.01
    for task in ("conll-2003", "sst-2"):
        if not learning_tasks.available(task):
            pytest.skip("the data folder is not here")
        rows = {}
        for part in ("dev", "tune"):
            train, judge = learning_tasks.task_files(task, tmp_path, part)
            separator = "\n" if learning_tasks.TASKS[task].unit == "line" else "\n\n"
            rows[part] = judge.read_text(encoding="utf-8").strip("\n").split(separator)
        rows["train"] = train.read_text(encoding="utf-8").strip("\n").split(separator)
        study = learning_tasks.TASKS[task]
        assert len(rows["train"]) == study.train_examples + study.header
        assert len(rows["tune"]) == len(rows["dev"]) == study.dev_examples + study.header
        shared = len(set(rows["train"]) & set(rows["tune"]))
        assert shared < 0.1 * len(rows["tune"]), "datelines and the like occur more than once"


def test_a_fine_tuning_that_was_stopped_gives_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (learning_tasks, tiny_tasks):
        monkeypatch.setattr(module, "finetune", lambda *_, **__: {"stopped_by": "SIGTERM", "seeds": []})
    (tmp_path / "conll2003").mkdir()
    for name in ("eng.train", "eng.testa"):
        (tmp_path / "conll2003" / name).touch()
    options = argparse.Namespace(model=tmp_path, seeds=1, epochs=1.0, train_examples=0)
    with pytest.raises(SystemExit, match="stopped by SIGTERM"):
        tiny_tasks.measure(options, tmp_path, "conll-2003", "pre-trained")
    (tmp_path / "tasks" / "docstrings").mkdir(parents=True)
    for part in ("train", "dev"):
        (tmp_path / "tasks" / "docstrings" / f"{part}.jsonl").touch()
    with pytest.raises(SystemExit, match="stopped by SIGTERM"):
        learning_tasks.judge(tmp_path, "docstrings", 0, {}, tmp_path, time.monotonic)


def test_equal_flops() -> None:
    preset = PRESETS["tiny"]
    budget, totals = BUDGETS["minutes"], {}
    for objective in OBJECTIVES:
        steps = steps_for_equal_flops(budget, Pretraining(objective, 2, 0), 8192)
        totals[objective] = steps * training_step_flops(
            preset.discriminator, replace(preset.pretrain, objective=objective)
        )
    assert max(totals.values()) / min(totals.values()) < 1.01
    a_step = training_step_flops(preset.discriminator, preset.pretrain)
    assert totals["electra"] == budget.electra_steps[2] * a_step


def test_equal_seconds() -> None:
    rows = [
        {
            "kind": "pretraining",
            "objective": name,
            "point": 1,
            "seed": 0,
            "equal": "flops",
            "seconds": s,
            "steps": n,
            "trial": None,
        }
        for name, s, n in (("electra", 50.0, 100), ("mlm", 30.0, 120))
    ]
    assert learning_study.steps_for_equal_seconds(rows, Pretraining("mlm", 1, 0, "seconds")) == 200


def test_the_stopwatch_knows_what_pretraining_calls() -> None:
    with learning_study.stopwatch(lambda: 0.0) as elsewhere:
        assert elsewhere == [0.0]


def test_a_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    study = object.__new__(learning_study.Study)
    study.budget, study.device = BUDGETS["quick"], torch.device("cpu")
    study.options = argparse.Namespace(out=tmp_path / "s.jsonl", minutes=1e9, elsewhere=False)
    monkeypatch.setattr(study, "_environment", lambda: {"kind": "environment"})
    monkeypatch.setattr(study, "_identity", lambda: {"budget": 1})
    monkeypatch.setattr(learning_study, "summary", lambda row: "")

    def piece(piece: Pretraining | Finetuning) -> dict[str, str] | None:
        done.append(piece.name)
        return None if len(done) == 3 else {"kind": "x"}

    monkeypatch.setattr(study, "_pretrain", piece)
    monkeypatch.setattr(study, "_finetune", piece)
    for _ in range(2):
        study.rows = learning_study.read_rows(study.options.out)
        study.run()
    expected = [piece.name for piece in pieces(BUDGETS["quick"])]
    assert done == expected[:3] + expected[2:]  # the one that was cut off comes again


def test_rows_of_another_study_are_refused(tmp_path: Path) -> None:
    rows = [{"kind": "environment", "study": {"preset": 1, "corpus": "a"}}, {"kind": "pretraining"}]
    learning_study.check_study(rows, {"preset": 1, "corpus": "a"}, tmp_path)
    with pytest.raises(UserError, match="a study with another preset, another corpus; take"):
        learning_study.check_study(rows, {"preset": 2, "corpus": "b"}, tmp_path)
    with pytest.raises(UserError, match="another preset"):
        learning_study.check_study([{"kind": "environment"}], {"preset": 2}, tmp_path)


def test_another_machine_may_go_on_if_it_is_said(tmp_path: Path) -> None:
    """And then the first one may, too."""
    preset = {"pretrain": {"steps": 9, "temperature": 1.0}}
    here = {"preset": preset, "machine": "a"}
    rows = [{"kind": "environment", "study": here}]
    with pytest.raises(UserError, match="another machine; take"):
        learning_study.check_study(rows, {**here, "machine": "b"}, tmp_path)
    there = {"preset": {"pretrain": {"steps": 7, "temperature": 1.0}}, "machine": "b"}  # steps are the runs' own
    learning_study.check_study(rows, there, tmp_path, elsewhere=True)
    learning_study.check_study([*rows, {"kind": "environment", "study": there, "elsewhere": True}], here, tmp_path)
    with pytest.raises(UserError, match="another preset; take"):
        learning_study.check_study(rows, {"preset": {"pretrain": {"steps": 9, "temperature": 1.5}}}, tmp_path)


def test_runs_from_elsewhere_show_no_seconds() -> None:
    rows = [run_row("electra", 0), run_row("mlm", 0, machine="b"), task_row("electra", 0, "one", 0.5)]
    rows += [task_row("mlm", 0, "one", 0.4, machine="b")]
    text = "\n".join(render_learning.tables(rows))
    assert "| electra | flops | 1 | 10 | 2.00 | 3e+12 | 50 |" in text
    assert "| mlm | flops | 1 | 10 | 2.00 | 3e+12 |  |" in text and "another machine, b." in text
    charts = render_learning.figures("s", rows)
    assert "mlm" in charts["s_0.svg"] and "mlm" not in charts["s_seconds.svg"]


def test_a_study_may_grow_and_not_change(tmp_path: Path) -> None:
    small, tasks = asdict(BUDGETS["quick"]), {"docstrings": {"epochs": 1}}
    rows = [{"kind": "environment", "study": {"budget": small, "tasks": tasks}}]
    larger = {**small, "electra_steps": (2, 3, 9), "seeds": 4, "later_tasks": ("cola",), "objectives": ("mlm",)}
    learning_study.check_study(rows, {"budget": larger, "tasks": {**tasks, "cola": {}}}, tmp_path)
    for change in ({"electra_steps": (2, 4)}, {"rate_steps": 7}, {"finetuning": {}}):
        with pytest.raises(UserError, match="another budget; take"):
            learning_study.check_study(rows, {"budget": {**small, **change}, "tasks": tasks}, tmp_path)
    with pytest.raises(UserError, match="another tasks; take"):
        learning_study.check_study(rows, {"budget": small, "tasks": {"docstrings": {"epochs": 2}}}, tmp_path)


def run_row(objective: str, seed: int, **more: Any) -> dict[str, Any]:
    evaluation = {"eval_mlm_loss": 6.5 + seed, "eval_rtd_auc": 0.75}
    return {
        "kind": "pretraining", "piece": f"{objective}{seed}", "objective": objective, "point": 0, "seed": seed,
        "equal": "flops", "trial": None, "steps": 10, "tokens": 2e6, "flops": 3e12, "seconds": 50.0 + seed,
        "evaluation": evaluation, "curve": [{"tokens": 2e6, **evaluation}], **more,
    }  # fmt: skip


def task_row(objective: str, seed: int, task: str, value: float, **more: Any) -> dict[str, Any]:
    about = {
        "kind": "finetuning",
        "objective": objective,
        "point": 0,
        "seed": seed,
        "equal": "flops",
        "trial": None,
    }
    return {**about, "task": task, "metric": "f1", "value": value, **more}


def test_the_page_shows_means_over_seeds_and_where_a_task_is_missing_no_mean_of_tasks(tmp_path: Path) -> None:
    rows = [
        {"kind": "environment", "environment": {"device": "a machine", "command": "python -m it"}},
        run_row("start", 0, flops=0.0), run_row("electra", 0), run_row("electra", 1), run_row("mlm", 0),
        task_row("start", 0, "one", 0.1), task_row("start", 0, "two", 0.2),
        task_row("electra", 0, "one", 0.5), task_row("electra", 0, "two", 0.7),
        task_row("electra", 1, "one", 0.6), task_row("mlm", 0, "one", 0.4),
        task_row("electra", 1000, "one", 0.111, trial=0.5), task_row("electra", 1000, "one", 0.222, trial=1.0),
    ]  # fmt: skip
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "learning.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pages = render.pages(tmp_path)
    page = pages["benchmarks.md"]
    assert "| electra | 11.1 | **22.2** |" in page
    assert "| electra | flops | 3e+12 | 55.0 (50.0 to 60.0) | 70.0 | 60.0 |" in page
    assert "| mlm | flops | 3e+12 | 40.0 |  |  |" in page
    assert "| start |  | 0 | 10.0 | 20.0 | 15.0 |" in page
    assert "7.000 (6.500 to 7.500)" in page and "a machine" in page
    charts = [name for name in pages if "learning" in name]
    assert sorted(charts) == [
        f"benchmarks/cpu_learning_{part}.svg" for part in ("0", "1", "2", "curves", "seconds")
    ]
