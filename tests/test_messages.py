"""What reaches the terminal is readable, whatever files, names and labels hold."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_model
import torch

from electra_core.cli import main
from electra_core.commands import use
from electra_core.errors import (
    LONGEST_ENTRY,
    LONGEST_MESSAGE,
    AnotherRankFailed,
    UserError,
    first_line,
    one_line,
    place_of,
    printable,
)
from electra_core.labelled_data.labelled import BadRows
from electra_core.packing import pack, to_padded

CLEAR = "\x1b[2J"
CLEAR_SHOWN = "\\x1b[2J"


def test_control_characters_are_spelled_out() -> None:
    every = "".join(map(chr, range(0x120)))
    assert printable(every).count("\\x") == 0x20 + 0x21 - 2
    assert printable("a\tb\nc é ▁ \u2026") == "a\tb\nc é ▁ \u2026"
    assert printable("\r\x1b]0;title\x07\x9b2J") == r"\x0d\x1b]0;title\x07\x9b2J"


def test_a_message_is_one_line_but_for_our_own_lists() -> None:
    ours = "model: the weights do not match\n  missing: a\n  unexpected: b"
    assert one_line(ours) == ours
    assert one_line(f"a\nb{CLEAR}: no such file") == f"a\\x0ab{CLEAR_SHOWN}: no such file"


@pytest.mark.parametrize(
    "error, line",
    [
        (RuntimeError("\n  no such kernel \nat f.py"), "no such kernel"),
        (ValueError("a\r\nb"), "a"),
        (MemoryError(), "MemoryError"),
        (KeyError(" "), "' '"),
        (RuntimeError(" \n"), "RuntimeError"),
    ],
)
def test_the_first_line_of_what_an_exception_says(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_an_error_is_placed_in_the_program_that_uses_this() -> None:
    """Not where torch or this package raised it, unless nobody else was there."""
    try:
        to_padded(torch.zeros(2), pack([[2, 3], [4]]))
    except Exception as error:
        line = inspect.currentframe().f_lineno - 2  # type: ignore[union-attr]
        assert place_of(error) == f"test_messages.py:{line}"
        error.__traceback__ = error.__traceback__.tb_next  # type: ignore[union-attr]
        assert place_of(error).startswith("packing.py:")


def test_an_error_of_triton_s_is_placed_at_the_kernel_s_call() -> None:
    launcher: dict[str, Any] = {"__name__": "triton.runtime.jit"}
    exec(compile("def run(): raise RuntimeError", "jit.py", "exec"), launcher)
    caller = launcher | {"__name__": "electra_kernels.layer_norm_triton"}
    exec(compile("def forward(): run()", "layer_norm_triton.py", "exec"), caller)
    with pytest.raises(RuntimeError) as caught:
        caller["forward"]()
    assert place_of(caught.value.with_traceback(caught.tb.tb_next)) == "layer_norm_triton.py:1"


def test_a_notebook_shows_the_line_alone() -> None:
    """IPython's protocol for an exception that shows itself."""
    assert UserError(f"{CLEAR}: no such file")._render_traceback_() == [f"UserError: {CLEAR_SHOWN}: no such file"]
    assert AnotherRankFailed("a")._render_traceback_() == ["AnotherRankFailed: a"]


def test_a_long_value_loses_its_middle() -> None:
    said = one_line(f"--model {'x' * 10**6}: no such model; do this")
    assert len(said) < LONGEST_MESSAGE + 9
    assert said.startswith("--model xxx") and "x … x" in said and said.endswith("xxx: no such model; do this")


def test_a_list_of_tensors_is_whole_but_for_names_that_are_too_long() -> None:
    ours = (
        "model: the weights do not match"
        + "\n  missing: encoder.layer.attention.self.query.weight [256, 256]" * 40
    )
    assert one_line(ours) == ours
    first, long, last = one_line(f"model: no\n  missing: {'x' * 10**6}\n  missing: a").split("\n")
    assert (first, last) == ("model: no", "  missing: a") and "x … x" in long and len(long) < LONGEST_ENTRY + 9
    assert len(one_line("\n  a" * 10**6)) < LONGEST_MESSAGE + 9


def test_a_name_of_escape_sequences_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", f"a{CLEAR}\nb"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"a{CLEAR_SHOWN}\\x0ab" in line and "\x1b" not in line


def test_what_is_logged_is_printable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    level = root.level
    monkeypatch.setattr(root, "handlers", [])  # as a new process finds it
    main([])
    root.setLevel(level)
    logging.getLogger("electra_core").warning("labels: %s", CLEAR)
    assert capsys.readouterr().err == f"labels: {CLEAR_SHOWN}\n"


def test_what_is_said_of_a_file_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    bad = BadRows(f"{CLEAR}.tsv", skip=True)
    bad.add(3, f"the label is {CLEAR}")
    task = SimpleNamespace(max_length=8)
    use._say_what_was_lost(bad, SimpleNamespace(truncated=1, unknown=9, words=9, task=task))
    said = capsys.readouterr().err
    assert "\x1b" not in said and said.count(CLEAR_SHOWN) >= 5


def test_a_foreign_config_cannot_write_over_what_info_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_model.make_model(tmp_path / "model") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": [CLEAR]}))
    assert main(["info", "--model", str(config.parent)]) == 0
    said = capsys.readouterr().out
    assert CLEAR_SHOWN in said and "\x1b" not in said


# ---- what cannot be read


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EIO, errno.ELOOP])
def test_what_cannot_be_read_is_one_line(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def predict(options: object) -> None:
        raise OSError(number, os.strerror(number), "MODEL/config.json")

    monkeypatch.setattr(use, "predict", predict)
    assert main(["predict", "--model", "MODEL", "--input", "x.txt"]) == 2
    expected = f"electra predict: MODEL/config.json: cannot be read ({os.strerror(number)})\n"
    assert capsys.readouterr().err == expected


def test_other_errors_of_the_system_are_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(options: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument", "x")

    monkeypatch.setattr(use, "predict", predict)
    with pytest.raises(OSError, match="Invalid argument"):
        main(["predict", "--model", "MODEL", "--input", "x.txt"])


@pytest.mark.parametrize(
    "command",
    ["info --model NAME", "detect text --model NAME", "status NAME", "predict --model NAME.onnx --input -",
     "evaluate --model NAME --data -", "finetune --model NAME --task classify --train x.tsv --out OUT"],
)  # fmt: skip
def test_names_that_are_too_long(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([part.replace("NAME", "n" * 5000) for part in command.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"electra {command.split()[0]}: nnn") and len(line) < LONGEST_MESSAGE + 9
