"""The measurement of runs that continue from a pair: what a row holds, that it resumes, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import data, one_thread, train  # noqa: F401

from benchmarks import adapting, render
from benchmarks.harness import read_rows


def test_every_combination_is_a_row_once_and_the_page_shows_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(data, tmp_path / "pair", {"steps": 2}, sizes={"max_position_embeddings": 128})
    pair = [str(tmp_path / "pair" / half) for half in ("discriminator", "generator")]
    out = tmp_path / "cpu" / "adapting.jsonl"
    command = ["--data", str(data), "--pair", *pair, "--steps", "2", "4", "--rates", "1", "0.5",
               "--warmup", "0.5", "--out", str(out)]  # fmt: skip
    adapting.main(command)
    head, *rows = read_rows(out)
    assert head["kind"] == "environment"
    assert [(row["steps"], row["rate"], row["warmup_steps"]) for row in rows] == [
        (2, 1.0, 1), (2, 0.5, 1), (4, 1.0, 2), (4, 0.5, 2),
    ]  # fmt: skip
    assert rows[1]["changes"]["learning_rate"] == rows[0]["changes"]["learning_rate"] / 2
    assert len({json.dumps(row["before"]) for row in rows}) == 1 and rows[2]["after"] != rows[2]["before"]
    monkeypatch.setattr(adapting, "pretrain", None)  # nothing is run again
    adapting.main(command)
    assert read_rows(out) == [head, *rows]
    out.with_suffix(".notes.md").write_text("What it shows.")
    page = render.pages(tmp_path)["benchmarks.md"]
    lost, judged = rows[3]["after"]["mlm_loss"], rows[3]["same_draws"]["rtd_auc"]
    (line,) = [
        line for line in page.split("\n") if line.startswith(f"| {data.name} | 4 | x 0.5 | 2 | {lost:.3f} |")
    ]
    assert line.endswith(f"| {judged:.3f} |") and "What it shows." in page
    assert rows[3]["same_draws"]["mlm_loss"] == rows[3]["before"]["mlm_loss"], "the pair's generator"
