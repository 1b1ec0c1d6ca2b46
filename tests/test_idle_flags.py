"""Flags that have no effect beside others are refused by name; a flag that is not given never is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_model
from small_runs import data, one_thread, train  # noqa: F401

from electra_core.cli import build_parser, main

PREPARE, MERGE = ["prepare", "--out", "out", "--text", "a.txt"], ["prepare", "--out", "out", "--merge", "a", "b"]
PRETRAIN = ["pretrain", "--data", "DATA", "--out", "out", "--model", "tiny"]
FINETUNE = ["finetune", "--model", "m", "--train", "t.tsv", "--out", "out", "--task"]
PREDICT = ["predict", "--model", "m", "--input", "x.tsv"]
IDLE: dict[str, list[str]] = {
    "--vocab-size: no effect with --tokenizer words": [*PREPARE, "--tokenizer", "words", "--vocab-size", "8192"],
    "--model-type, --sample-characters: no effect with --tokenizer words": [
        *PREPARE, "--tokenizer", "words", "--model-type", "bpe", "--sample-characters", "9",
    ],
    "--model-type: no effect with --tokenizer wordpiece": [
        *PREPARE, "--tokenizer", "wordpiece", "--model-type", "unigram",
    ],
    "--lines, --workers: no effect with --tokenizer-only": [
        *PREPARE, "--tokenizer-only", "--workers", "2", "--lines", "sentence",
    ],
    "--tokenizer, --seed: no effect with --merge": [*MERGE, "--tokenizer", "words", "--seed", "0"],
    "--tokenizer-only: no effect with --merge": [*MERGE, "--tokenizer-only"],
    "--documents: no effect with --merge": [*MERGE, "--documents", "file"],
    "--temperature, --tying: no effect with --objective mlm": [
        *PRETRAIN, "--objective", "mlm", "--temperature", "1.0", "--tying", "none",
    ],
    "--discriminator-weight: no effect with --objective replace-mlm": [
        *PRETRAIN, "--objective", "replace-mlm", "--discriminator-weight", "50",
    ],
    "--temperature: no effect with --uniform-generator": [
        *PRETRAIN, "--uniform-generator", "--temperature", "2",
    ],
    "--muon-learning-rate: no effect with --optimizer adamw": [
        *PRETRAIN, "--optimizer", "adamw", "--muon-learning-rate", "0.01",
    ],
    "--embedding-init: no effect with --init-discriminator": [
        *PRETRAIN, "--init-discriminator", "a", "--init-generator", "b", "--embedding-init", "normal",
    ],
    "--batch-size: no effect with --tokens-per-batch": [
        *FINETUNE, "classify", "--tokens-per-batch", "512", "--batch-size", "32",
    ],
    "--original-depths: no effect with --layerwise-decay 1": [
        *FINETUNE, "classify", "--layerwise-decay", "1", "--original-depths",
    ],
    "--text-pair-column: no effect with tag": [*FINETUNE, "tag", "--text-pair-column", "3"],
    "--text-pair-column: no effect with choose": [*FINETUNE, "choose", "--text-pair-column", "b"],
    "--format: no effect with --submission": [*PREDICT, "--submission", "rte", "--format", "jsonl"],
    "--header: no effect with x.jsonl": ["predict", "--model", "m", "--input", "x.jsonl", "--header"],
    "--encoding: no effect with x.jsonl": [
        "predict", "--model", "m", "--input", "x.jsonl", "--encoding", "cp1252",
    ],
    "--no-header: no effect with x.jsonl.gz": [
        "evaluate", "--model", "m", "--data", "x.jsonl.gz", "--no-header",
    ],
    "--device, --precision: no effect with m.onnx": [
        "predict", "--model", "m.onnx", "--input", "x.tsv", "--precision", "bf16", "--device", "cuda",
    ],
    "--device: no effect with m.onnx": ["evaluate", "--model", "m.onnx", "--data", "x.tsv", "--device", "cpu"],
    "--minutes, --seed: no effect with --texts-only": [
        "demo", "--texts-only", "--out", "out", "--seed", "1", "--minutes", "3",
    ],
    "--batch, --measure: no effect without --memory": ["info", "--model", "m", "--measure", "--batch", "128"],
}  # fmt: skip


@pytest.mark.parametrize("said", IDLE)
def test_idle_flags_are_refused(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(IDLE[said]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert re.search(re.escape(said), line)
    assert list(tmp_path.iterdir()) == []


def test_what_was_given_is_known() -> None:
    def given(*words: str) -> set[str]:
        return build_parser().parse_args(words).given_flags

    assert given(*PREPARE) == {"out", "text"}
    assert given(*PREPARE, "--vocab-size", "8192", "--cased") == {"out", "text", "vocab_size", "cased"}
    assert given(*PRETRAIN, "--data", "B", "--no-recompute") == {"data", "out", "model", "recompute"}
    assert build_parser().parse_args([*PRETRAIN, "--data", "B"]).data == ["DATA", "B"]
    assert given("detect", "a text") == {"text"}


def test_a_file_of_settings_may_hold_idle_ones(data: Path, tmp_path: Path) -> None:
    """RUN/config.toml has all of them."""
    train(data, tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    again = ["pretrain", "--data", str(data), "--out", str(tmp_path / "again"), "--config", str(config), "--quiet"]
    assert main([*again, "--objective", "mlm", "--optimizer", "adamw", "--device", "cpu"]) == 0


def test_a_way_of_cutting_for_tasks_that_do_not_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_model.make_model(tmp_path / "model"))
    rows = tmp_path / "tags.jsonl"
    rows.write_text("".join(json.dumps({"tokens": ["a"], "tags": [tag]}) + "\n" for tag in "XYXY"))
    command = ["finetune", "--model", model, "--task", "tag", "--train", str(rows), "--out", str(tmp_path / "out")]
    assert main([*command, "--truncate", "tail"]) == 2
    assert "truncate: no effect on tag, only on classification and regression" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_process_has_nothing_to_share(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "electra_core")
    train(data, tmp_path / "run", {"sharding": "fsdp", "optimizer": "adamw", "steps": 3})
    assert caplog.messages == ["sharding='fsdp': no effect with one process, which holds the whole model"]
