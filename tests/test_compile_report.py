"""The kernels as the compiler makes them, without a GPU: no spills, tensor cores, wide accesses.

Here a sample, because a case costs a second or two; `python -m benchmarks.compile_report --check` (or this
test with ELECTRA_COMPILE_ALL=1) compiles every kernel at every tile for every architecture.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compile_report
from benchmarks.compile_report import Row

ROOT = Path(__file__).parents[1]
# What the published ELECTRA-Small and -Base run: head dim 64, dropout, 128 and 512 tokens, V x E tied output.
SAMPLE = {
    75: ["backward_keys_kernel[fp32 K=128"],  # in fp32 only; of these tiles the one with the most shared memory
    80: ["backward_keys_kernel[bf16 K=64 Q=32 J=64 p=0.1"],
    90: [
        "short_backward_kernel[bf16 K=64 S=128 p=0.1",
        "attention.forward_kernel[bf16 K=64 Q=128 J=64 p=0.1",
        "backward_queries_kernel[bf16 K=64 Q=128 J=64 p=0.1",
        "mlm_head_tile_sums[bf16 E=128",
        "mlm_head_dembedding[bf16 E=128",
        "sample_and_replace[bf16 V=30528",
        "rtd_head[bf16 D=256",
    ],
    100: ["short_forward_kernel[bf16 K=64 S=128 p=0.1"],
    89: ["mlm_head_tile_sums[bf16 E=128"],
    120: ["backward_keys_kernel[bf16 K=128 Q=64 J=64 p=0.1"],  # of these tiles the one with the most shared memory
}
EVERYTHING = os.environ.get("ELECTRA_COMPILE_ALL", "0") == "1"


REPORT = """
import contextlib, io, json, sys
from benchmarks import compile_report
found = {}
for capability, only in json.loads(sys.argv[1]).items():
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        status = compile_report.main(["--json", "--check", "--capability", capability, "--only", *only])
    found[capability] = status, json.loads(told.getvalue())
print(json.dumps(found))
"""


def reports(asked: dict[int, list[str]]) -> dict[int, tuple[int, list[dict[str, Any]]]]:
    """Capability -> status and rows of the command, which was asked for cases by parts of their names.

    In one process of its own: this one may hold the interpreter instead of the compiler.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", REPORT, json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stderr)  # names what breaks a rule
    return {int(capability): found for capability, found in json.loads(done.stdout).items()}


EVERY_CASE = [{capability: [""] if capability > 75 else only} for capability, only in SAMPLE.items()]


@pytest.mark.parametrize(
    "asked", EVERY_CASE if EVERYTHING else [SAMPLE], ids=lambda asked: "-".join(map(str, asked))
)
def test_kernels_keep_the_rules(asked: dict[int, list[str]]) -> None:
    for capability, (status, rows) in reports(asked).items():
        assert status == 0
        for text in asked[capability]:
            assert any(text in row["name"] for row in rows), f"no case holds {text!r}"
        for row in rows:
            assert row["problems"] == [] and row["capability"] == capability
            assert row["registers"] > 0 and row["instructions"] > 0 and row["programs_per_multiprocessor"] > 0


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_case_names_every_argument(capability: int) -> None:
    names = []
    for module in compile_report.MODULES:
        for case in list(importlib.import_module(module).compile_cases(capability)):
            names.append(case.name)
            given = [*case.signature, *case.constexprs]
            assert sorted(given) == sorted(case.kernel.arg_names), case.name
    assert len(names) > 100 and len(set(names)) == len(names)


ROW = Row(
    name="kernel",
    capability=90,
    warps=4,
    stages=2,
    registers=64,
    stack_bytes=0,
    spill_instructions=0,
    shared_bytes=1024,
    programs_per_multiprocessor=8,
    limited_by="registers",
    tensor_instructions=4,
    load_bits=(32, 128),
    store_bits=(128,),
    loop_instructions=None,
    instructions=100,
    bound="issue",
    bound_cycles={"issue": 100},
    needs_dot=True,
    streaming=True,
    wide_stores=True,
)


def test_files_hold_every_row_and_a_summary(tmp_path: Path) -> None:
    rows = [ROW, dataclasses.replace(ROW, registers=80), dataclasses.replace(ROW, name="other[x]", stack_bytes=8)]
    rows[:2] = [dataclasses.replace(row, name=f"kernel[{i}]") for i, row in enumerate(rows[:2])]
    compile_report.write(rows, tmp_path / "new" / "report.json")
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["kernel[0]", "kernel[1]", "other[x]"]
    assert "triton" in written["environment"]["versions"] and "spills" in written["rows"][2]["problems"][0]
    compile_report.write(rows, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "| `kernel` | 90 | 2 | 64–80 | 1 | 8 | 4 | 128 / 128 | 0 |" in text
    assert "3 cases compiled, 1 problems.\n- other[x] sm_90: spills" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stack_bytes": 8}, "spills"),
        ({"spill_instructions": 1}, "spills"),
        ({"tensor_instructions": 0}, "without tensor cores"),
        ({"load_bits": (16, 32, 64)}, "no 128-bit global load"),
        ({"store_bits": (64,)}, "no 128-bit global store"),
        ({"shared_bytes": 300_000}, "shared memory"),
    ],
    ids=lambda value: str(value),
)
def test_every_rule_can_be_broken(change: dict[str, Any], words: str) -> None:
    assert compile_report.problems(ROW) == []
    (problem,) = compile_report.problems(dataclasses.replace(ROW, **change))
    assert words in problem


SASS = """
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P1 LDG.E.U16 R5, desc[UR4][R2.64] ;
.L_x_1:
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], R8 ;
        /*0040*/                   MUFU.EX2 R9, R9 ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
        /*0060*/              @P2  STL [R1], R3 ;
        /*0070*/                   BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
"""


def test_sass_is_read() -> None:
    opcodes, loops = compile_report.parse_sass(SASS)
    assert opcodes[:3] == ["LDG.E.128", "LDG.E.U16", "HGMMA.64x64x16.F32.BF16"] and len(opcodes) == 9
    assert sorted(loops) == [(0, 6), (2, 4)], "a branch to itself is no loop"
    loop = compile_report.largest_inner_loop(opcodes, loops)
    assert loop == ["HGMMA.64x64x16.F32.BF16", "MUFU.EX2", "BRA"]
    assert compile_report.access_bits(opcodes, ("LDG", "LDGSTS")) == (16, 128)
    assert sum(compile_report.is_tensor(op) for op in opcodes) == 1
    cycles = compile_report.bound_cycles(loop, warps=8, capability=90)
    assert cycles == {"issue": 6, "special functions": 16, "tensor cores": 2 * 64 * 64 * 16 * 2 // 4096}


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [(128, 1024, 8, (2, "registers")), (32, 100_000, 4, (2, "shared memory")), (32, 0, 16, (4, "registers"))],
    ids=["registers", "shared-memory", "warps"],
)
def test_occupancy(registers: int, shared: int, warps: int, expected: tuple[int, str]) -> None:
    assert compile_report.occupancy(registers, shared, warps, 90) == expected


def test_flops_of_tensor_instructions() -> None:
    assert compile_report.tensor_flops("HMMA.16816.F32.BF16", warps=4) == 2 * 16 * 8 * 16 * 4
    assert compile_report.tensor_flops("HMMA.1688.F32.TF32", warps=1) == 2 * 16 * 8 * 8
    assert compile_report.tensor_flops("HGMMA.64x128x16.F32", warps=8) == 2 * 64 * 128 * 16 * 2


def test_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exit_:
        compile_report.main(["--json"])
    assert exit_.value.code == 2 and "TRITON_INTERPRET" in capsys.readouterr().err
