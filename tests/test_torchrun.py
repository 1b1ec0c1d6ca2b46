"""What torchrun sets: leftovers of it, ranks that do not meet, and ranks that lose one another."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_runs import ORIGINAL, RUN, SIZES, data  # noqa: F401

from electra_core.cli import main
from electra_core.errors import UserError
from electra_core.execution import distributed
from electra_core.pretrain import pretrain

TORCHRUNS = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
CLEAR = ("WORLD_SIZE", *TORCHRUNS)


def small_flags() -> list[tuple[str, str]]:
    """RUN, ORIGINAL and SIZES as flags of `electra pretrain`."""
    return [(f"--{name.replace('_', '-')}", str(value)) for name, value in (RUN | ORIGINAL | SIZES).items()]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE: is 8, but RANK, MASTER_ADDR, MASTER_PORT are missing; .* unset"),
        (TORCHRUNS | {"WORLD_SIZE": "8", "MASTER_PORT": ""}, "WORLD_SIZE: .* but MASTER_PORT is missing"),
        (TORCHRUNS | {"WORLD_SIZE": "many"}, "WORLD_SIZE: .* number from 1 .* got 'many'; unset it"),
        (TORCHRUNS | {"WORLD_SIZE": "0"}, "WORLD_SIZE: .* number from 1 .* got '0'"),
        (TORCHRUNS | {"WORLD_SIZE": "2", "RANK": "-1"}, "RANK: .* number from 0 .* got '-1'"),
        (TORCHRUNS | {"WORLD_SIZE": "2", "RANK": "2"}, "RANK: expected a number below WORLD_SIZE=2, got 2"),
        (TORCHRUNS | {"WORLD_SIZE": "2", "MASTER_PORT": "http"}, "MASTER_PORT: .* got 'http'"),
        (TORCHRUNS | {"WORLD_SIZE": "2", "MASTER_PORT": "65536"}, "MASTER_PORT: .* number below 65536, got 65536"),
    ],
    ids=str,
)
def test_ranks_that_cannot_meet_are_told_what_is_missing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    variables: dict[str, str], said: str,
) -> None:  # fmt: skip
    for name in CLEAR:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = ["pretrain", "--data", str(data), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert re.match(f"electra pretrain: {said}", line), line


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": ""}, {"WORLD_SIZE": "2"}, {"RANK": "3"}], ids=str)
def test_leftover_variables_stand_in_nobodys_way(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
) -> None:  # fmt: skip
    for name in CLEAR:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["info", "--json"]) == 0
    assert capsys.readouterr().out
    if "2" not in variables.values():
        command = ["pretrain", "--data", str(data), "--out", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
        more = [word for pair in small_flags() for word in pair]
        assert main([*command, *more, "--max-minutes", "0"]) == 75
        assert "stopped by time limit" in capsys.readouterr().out


def test_other_commands_refuse_to_run_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (TORCHRUNS | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    assert main(["info"]) == 2
    said = capsys.readouterr().err
    assert "runs in a single process" in said and "without torchrun, unset WORLD_SIZE and RANK" in said


def test_a_module_run_with_a_wrong_number_is_told_so_in_a_line() -> None:
    """`python -m electra_core` asks for torchrun's variables before anything else."""
    environment = os.environ | TORCHRUNS | {"WORLD_SIZE": "abc"}
    command = [sys.executable, "-m", "electra_core", "info"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and re.fullmatch("electra info: WORLD_SIZE: .* got 'abc'.*\n", ended.stderr)


def test_who_waits_for_the_others_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(distributed, "PATIENCE", timedelta(seconds=0.2))
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=3))
    for name, value in (TORCHRUNS | {"WORLD_SIZE": "8", "MASTER_PORT": "0"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=r"^localhost:0: only some of 8 processes came within 0.05 minutes; .*\(.+\)$"
    ):
        distributed.join_ranks(torch.device("cpu"))
    assert caplog.messages == ["waiting for 8 processes at localhost:0; to run alone, unset WORLD_SIZE"]


def test_who_finds_the_port_taken_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in (TORCHRUNS | {"WORLD_SIZE": "2", "MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"^localhost:{port}: another program uses this port; .*MASTER_PORT"):
            distributed.join_ranks(torch.device("cpu"))


@pytest.mark.parametrize(("device", "made_current"), [("cuda", []), ("cuda:1", [torch.device("cuda:1")])])
def test_ranks_on_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch, device: str, made_current: list[torch.device]
) -> None:
    """Without a LOCAL_RANK, as a script with a process per machine may start them: the GPU is the current one,
    and NCCL's."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in {**TORCHRUNS, "WORLD_SIZE": "2"}.items():
        if name != "LOCAL_RANK":
            monkeypatch.setenv(name, value)
    current: list[torch.device] = []

    def set_device(wanted: torch.device) -> None:  # like torch's, which refuses a device without a number
        assert wanted.index is not None
        current.append(wanted)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    bound: list[torch.device | None] = []
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, device_id=None, **__: bound.append(device_id))
    assert distributed.join_ranks(torch.device(device)).size == 2
    assert current == made_current
    assert bound == (made_current or [None])


LOST = (
    "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3248. This is typically",
    "[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:6538: Connection reset by peer. This is\nmore",
    "NCCL error: remote process exited or there was a network error, NCCL version 2.27\nncclRemoteError: ...",
)


@pytest.mark.parametrize("said", [*LOST, "broken on purpose"])
@pytest.mark.parametrize("size", ["1", "2"])
def test_a_rank_that_lost_another_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str, size: str
) -> None:
    """The one that ended has said why; a traceback below would hide it."""

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(sys.modules[pretrain.__module__], "pretrain", broken)
    for name, value in (TORCHRUNS | {"RANK": "1", "WORLD_SIZE": size}).items():
        monkeypatch.setenv(name, value)
    command = ["pretrain", "--data", "DATA", "--out", "RUN"]
    if said not in LOST or size == "1":
        with pytest.raises(RuntimeError):
            main(command)
        return
    assert main(command) == 1
    first = said.split("\n")[0]
    assert capsys.readouterr().err == (
        f"electra pretrain: rank 1: lost another rank, which may say why ({first})\n"
    )
