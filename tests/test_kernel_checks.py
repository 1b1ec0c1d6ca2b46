"""Each kernel beside its twin, a row each: right, wrong, not compiled, or the end of its process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from electra_kernels import attention_triton, bias_gelu_triton, mlm_head_triton
from kernel_helpers import INTERPRETED

from benchmarks import gpu_facts, kernel_checks
from benchmarks.harness import BEGUN, TIME_UP
from benchmarks.kernel_check_cases import operations
from benchmarks.kernel_checks import Lost, check, in_this_process, known, show

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels on CPU tensors, by Triton's interpreter")
CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.mark.parametrize("name", operations(CPU))
def test_right_kernels_are_right(name: str) -> None:
    row = check(name, FP32, CPU)
    assert row["problem"] is None and not row["error"] and row["seconds"] > 0


def test_a_wrong_kernel_is_told_by_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bias_gelu_triton.forward.direct
    monkeypatch.setattr(bias_gelu_triton.forward, "direct", lambda *inputs: right(*inputs) * 1.1)
    assert check("bias_gelu", FP32, CPU)["problem"].startswith("result 0 is off by")


def test_other_words_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mlm_head_triton.forward.direct

    def others(*inputs: object) -> object:
        loss, words, *rest = right(*inputs)
        return (loss, words.flip(0), *rest)

    monkeypatch.setattr(mlm_head_triton.forward, "direct", others)
    assert "of the words are drawn otherwise" in check("mlm_head", FP32, CPU)["problem"]


def test_what_does_not_compile_is_told_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("at 12:8:\n    acc += tl.dot(a, b)\n           ^\nthe compiler's own words")

    monkeypatch.setattr(attention_triton.forward, "direct", refused)
    row = check("attention short", FP32, CPU)
    assert row["problem"] == "RuntimeError: at 12:8:" and "the compiler's own words" in row["error"]
    assert row["seconds"] is None


def test_a_lost_gpu_and_a_process_that_ended_leave_the_rest_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "checks.jsonl"
    begun = {"kernel": "embedding", "dtype": "float32", "problem": BEGUN, "error": "", "seconds": None}
    out.write_text(json.dumps(begun) + '\n{"kernel": "cut o')  # by a process that is gone
    out.write_text(out.read_text() + "\n")

    def lost(name: str, dtype: torch.dtype, device: torch.device) -> None:
        raise Lost("an illegal access; after it the GPU computes nothing more", "text")

    monkeypatch.setattr(kernel_checks, "check", lost)
    assert in_this_process("embedding", out, CPU) == 1
    rows = known(out)
    assert rows[("embedding", "float32")]["problem"] == BEGUN, "where a process ended comes last"
    assert "an illegal access" in rows[("embedding", "float16")]["problem"]
    assert show(list(rows.values()), 9).startswith(
        "0 of 9 kernels and models are right\nembedding, float32: the process"
    )
    assert in_this_process("embedding", out, CPU) == 1 and BEGUN not in str(known(out)), "tried once more"
    assert in_this_process("embedding", out, CPU) == 0, "nothing is left"
    out.write_text(2 * (json.dumps(begun) + "\n"))
    assert in_this_process("embedding", out, CPU) == 1
    assert known(out)[("embedding", "float32")]["problem"] == BEGUN, "two processes ended in it: not tried again"
    assert in_this_process("embedding", out, CPU) == 0


def test_what_has_no_answer_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "checks.jsonl"
    monkeypatch.setattr(kernel_checks, "in_processes", lambda *_: None)  # its time was up at once
    command = ["--out", str(out), "--only", "embedding"]
    assert kernel_checks.main(command) == TIME_UP
    assert "0 of 2 kernels and models are right\n2 have no answer yet" in capsys.readouterr().out
    rows = [{"kernel": "embedding", "dtype": dtype, "problem": None} for dtype in ("float32", "float16")]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert kernel_checks.main(command) == 0
    assert capsys.readouterr().out == "2 of 2 kernels and models are right\n"
    out.write_text(json.dumps(rows[0] | {"problem": "off"}) + "\n" + json.dumps(rows[1]) + "\n")
    assert kernel_checks.main(command) == 1


def test_processes_go_on_behind_one_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the interpreter that ends in its first case."""
    out, stand_in = tmp_path / "checks.jsonl", tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\necho x >> {tmp_path}/calls\n[ $(wc -l < {tmp_path}/calls) -gt 1 ]\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(kernel_checks.sys, "executable", str(stand_in))
    kernel_checks.in_processes(["embedding"], out, CPU, jobs=1, seconds=60)
    assert (tmp_path / "calls").read_text().count("x") == 2
    stand_in.write_text("#!/bin/sh\nsleep 60\n")
    kernel_checks.in_processes(["embedding"], out, CPU, jobs=1, seconds=0.5)  # hangs, and is ended


def test_a_model_that_the_kernels_are_not_used_for_is_not_called_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_checks.dispatch, "gpu_problem", lambda *_: "no compiler")
    row = kernel_checks.check_model("pre-training", FP32, CPU)
    assert row["problem"] == "the kernels are not used: no compiler"


def test_facts_are_kept_though_a_question_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: str) -> None:
        raise RuntimeError("no nvidia-smi\nmore")

    monkeypatch.setattr(gpu_facts, "clocks_under_load", fails)
    gpu_facts.main(["--out", str(tmp_path / "facts.json")])
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["clocks_under_load"] == "RuntimeError: no nvidia-smi" and "device" in facts["environment"]
    assert facts["packages"]["pytest"] and "triton" in facts["kernels"] and facts["ceilings"] is None
