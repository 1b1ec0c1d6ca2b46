"""The loops in C are built by the compiler that is there, or the reason is told and the twins run."""

from __future__ import annotations

import inspect
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from electra_kernels import (
    available,
    dispatch,
    native,
    use,
)
from native_calls import leaves, run_layer_norm
from torch import Tensor

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=f"no loops in C: {native.problem()}")
needs_threads = pytest.mark.skipif(native.one_thread() is not None, reason=f"{native.one_thread()}")


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The loops are looked for again in the test, and once more after it."""
    native._load.cache_clear()
    yield
    monkeypatch.undo()
    native._load.cache_clear()
    dispatch._say_once.cache_clear()


@pytest.fixture
def no_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, afresh: None) -> None:
    """A library of next to nothing in a cache of its own, for tests of who builds it: no wait, nothing left."""
    source = tmp_path / "none.c"
    source.write_text("void layer_norm_forward(void) {}\nvoid layer_norm_backward(void) {}\n", encoding="utf-8")
    monkeypatch.setattr(native, "SOURCES", [source])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"ELECTRA_NATIVE": "0"}, "ELECTRA_NATIVE=0 is set"),
        ({"CC": "no-such-compiler -m64"}, "no C compiler (no-such-compiler) was found"),
        ({"CC": "", "PATH": "/no-such-folder"}, "no C compiler (cc or gcc) was found"),
        ({"CC": "gcc '-m64"}, "CC: expected a command, got gcc '-m64 (No closing quotation)"),
        ({"CC": "true"}, "/true made no library"),
    ],
    ids=["switched-off", "no-such-compiler", "none", "no-command", "no-library"],
)
def test_without_them_the_twins_run_and_say_why_once(
    variables: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    afresh: None,
) -> None:  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert available()["native"].endswith(reason) and not caplog.messages
    x, residual, weight, bias, dout = leaves((5, 16), (5, 16), (16,), (16,), (5, 16))
    got = run_layer_norm("auto", (x, residual, weight, bias, dout), 0.1)
    twin = run_layer_norm("reference", (x, residual, weight, bias, dout), 0.1)
    assert all(torch.equal(a, b) for a, b in zip(got, twin, strict=True))
    run_layer_norm("auto", (x, residual, weight, bias, dout), 0.1)
    line = f"this CPU computes without the loops in C, which is slower: {available()['native']}"
    assert caplog.messages == ([] if "ELECTRA_NATIVE" in variables else [line])


def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "electra-core").mkdir()
    (tmp_path / "electra-core").chmod(0o777)
    with pytest.raises(native.NativeError, match="may be written to by others"):
        native._cache_folder()


def test_a_user_without_a_home_trains_without_them(monkeypatch: pytest.MonkeyPatch, afresh: None) -> None:
    """In a container a user may have a number and nothing else."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert "XDG_CACHE_HOME can name one" in (native.problem() or "")


def test_on_windows_they_are_not_built(monkeypatch: pytest.MonkeyPatch, afresh: None) -> None:
    monkeypatch.delattr("os.RTLD_NOW")
    assert native.problem() == "they are built on Unix alone"


def compiler(folder: Path, refuses: str, name: str = "cc") -> str:
    """A C compiler that does not know some options, and says so in Latin-1 behind lines that tell nothing."""
    path = folder / name
    said = r"In file included from caf\351.c:\nerrors are fatal\n\351: error: unrecognized option\n"
    refuse = f'case "$option" in {refuses}) printf "{said}" >&2; exit 1;; esac'
    real = " ".join(native._load().compiler)
    path.write_text(f'#!/bin/sh\nfor option; do {refuse}; done\nexec {real} "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("refuses", "kept"),
    [("-mprefer*", "-march=native"), ("-mprefer*|-march*", "-fno-trapping-math")],
    ids=["arm", "old-arm"],
)
def test_a_compiler_for_another_processor_still_gives_threads(
    refuses: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, afresh: None
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, refuses))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._load.cache_clear()
    assert {"-fopenmp", kept} <= set(native._load().options)


def test_the_reason_is_the_line_that_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, afresh: None
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, "-O3"))
    native._load.cache_clear()
    assert native.problem() == f"{tmp_path / 'cc'} failed: \ufffd: error: unrecognized option"


def test_the_reason_is_that_of_the_plainest_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, afresh: None
) -> None:
    """On ARM the compiler refuses an option of x86, which says nothing of why there are no loops."""
    compiler(tmp_path, "-mprefer*")
    monkeypatch.setattr(native, "PROCESSOR", (native.WIDE, native.PLAIN))
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    monkeypatch.setattr(native, "SOURCES", [tmp_path / "loops.c"])
    (tmp_path / "loops.c").write_text("#error the loops are for a compiler that knows __asm\n", encoding="utf-8")
    native._load.cache_clear()
    assert "the loops are for a compiler" in (native.problem() or "")


def test_a_width_of_vectors_is_asked_for_on_x86_alone() -> None:
    wide = [any(option.startswith("-mprefer-vector-width") for option in options) for options in native.PROCESSOR]
    assert wide == ([True, False, False] if native.X86 else [False, False])


def test_a_compiler_that_takes_too_long_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, afresh: None
) -> None:
    """`cc` starts `cc1`, which does the work. No other options are tried: they would take as long."""
    slow, marks = tmp_path / "cc", tmp_path / "starts"
    begin = f'echo "$$" >> {marks}; sleep 600 & echo "$!" >> {marks}; wait'
    slow.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit\n{begin}\n', encoding="utf-8")
    slow.chmod(0o755)
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "LONGEST", 5)
    native._load.cache_clear()
    assert native.problem() == f"{slow} took longer than 5 s; ELECTRA_NATIVE=0 saves the wait"
    started = marks.read_text(encoding="utf-8").split()
    assert len(started) == 2, "one compiler and its child"
    until = time.monotonic() + 60  # SIGKILL is not at once
    while (left := [pid for pid in started if runs(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left


def runs(pid: str) -> bool:
    """Whether there is such a process that has not ended; one that nobody has asked about since is a zombie."""
    try:
        status = Path("/proc", pid, "stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@needs_threads
def test_openmp_that_is_loaded_for_another_library_alone_gives_threads() -> None:
    """PyTorch's wheels for ARM load it so. A process without PyTorch, in which it is nobody's yet."""
    built = native._load()
    assert built.library is not None
    openmp = [*built.compiler, "-print-file-name=libgomp.so.1"]
    path = Path(subprocess.run(openmp, capture_output=True, text=True, check=True).stdout.strip())
    if not path.is_absolute():
        pytest.skip("the compiler has no libgomp.so.1")
    program = f"""
import contextlib, ctypes, os
{inspect.getsource(native._share_openmp)}
def loads():
    with contextlib.suppress(OSError):
        return bool(ctypes.CDLL({built.library._name!r}, mode=os.RTLD_NOW | os.RTLD_LOCAL))
    return False
_share_openmp()
before = loads()
openmp = ctypes.CDLL({str(path)!r}, mode=os.RTLD_NOW | os.RTLD_LOCAL)
alone = loads()
_share_openmp()
print(before, alone, loads())
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("False False True\n", "")


def test_a_library_is_of_one_kind_of_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """On ARM makers number their parts each for themselves."""
    made = set()
    for maker, variant, part in (("0x41", "0x1", "0xd40"), ("0x51", "0x1", "0xd40"), ("0x41", "0x2", "0xd40")):
        lines = (
            "processor\t: 0",
            f"CPU implementer\t: {maker}",
            f"CPU variant\t: {variant}",
            f"CPU part\t: {part}",
        )
        monkeypatch.setattr(Path, "read_text", lambda *_, lines=lines, **__: "\n".join(lines))
        made.add(native._processor())
    assert len(made) == 3


@needs_threads
def test_a_command_with_arguments_is_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, afresh: None, no_loops: None
) -> None:
    monkeypatch.setenv("CC", f"env LANGUAGE=C '{compiler(tmp_path, '-none')}'")
    native._load.cache_clear()
    assert native.problem() is None and native._load().compiler[1:] == ("LANGUAGE=C", str(tmp_path / "cc"))


@needs_threads
def test_without_threads_fp32_takes_the_twin_where_torch_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, afresh: None
) -> None:
    """As with Clang, which may have no OpenMP or another than PyTorch's."""
    monkeypatch.setenv("CC", compiler(tmp_path, "-fopenmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._load.cache_clear()
    reason = f"{tmp_path / 'cc'} failed: \ufffd: error: unrecognized option"
    assert available()["native"] == f"yes, on one thread: {reason}"
    x, bf16 = torch.ones(2, 16), torch.ones(2, 16, dtype=torch.bfloat16)

    def takes(tensor: Tensor) -> bool:
        return dispatch.use_native(tensor, training=True, supported=True)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert takes(x) and takes(bf16) and not caplog.messages
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert not takes(x) and takes(bf16) and not takes(x)
    assert caplog.messages == [f"the loops in C use 1 of 4 threads, so fp32 takes plain PyTorch: {reason}"]
    with use("native"):
        assert takes(x)


@needs_threads
def test_an_openmp_that_the_process_lacks_is_the_reason_for_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, afresh: None
) -> None:
    whole, reason = native._build_and_load, "undefined symbol: __kmpc_fork_call"

    def load(compiler: tuple[str, ...], options: tuple[str, ...]) -> native.Loaded:
        if native.THREADS in options:
            raise OSError(reason)
        return whole(compiler, options)

    monkeypatch.setattr(native, "_build_and_load", load)
    native._load.cache_clear()
    said = f"has another OpenMP than PyTorch, which usually has GCC's ({reason})"
    assert native.problem() is None and str(native.one_thread()).endswith(said)


def test_a_link_to_the_same_compiler_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except one to a program that goes by the link's name."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for program, found in (("gcc-13", ["cc"]), ("ccache", ["cc", "gcc"])):
        compiler(tmp_path, "-none", program)
        for name in ("cc", "gcc"):
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).symlink_to(program)
        assert native._compilers() == [(str(tmp_path / name),) for name in found]


def test_a_compiler_is_asked_for_its_version_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, afresh: None
) -> None:
    asked, whole = [], native._run

    def run(command: list[str], folder: str | None = None) -> str:
        asked.append("--version" in command)
        return whole(command, folder)

    monkeypatch.setattr(native, "_run", run)
    monkeypatch.setenv("CC", compiler(tmp_path, "-O3"))
    native._load.cache_clear()
    assert native.problem() and asked.count(True) == 1 and asked.count(False) > 1


@needs_threads
def test_gcc_is_preferred_to_a_compiler_without_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, afresh: None, no_loops: None
) -> None:
    compiler(tmp_path, "-fopenmp")
    gcc = compiler(tmp_path, "-none", "gcc")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    native._load.cache_clear()
    assert native._load().compiler == (gcc,) and native.one_thread() is None


def test_gcc_11_is_not_asked_for_what_it_lacks() -> None:
    """Ubuntu 22.04's and RHEL 9's; __builtin_shufflevector came with GCC 12."""
    header = next(source for source in native.SOURCES if source.name == "common.h").read_text(encoding="utf-8")
    command = ["cc", "-E", "-P", "-U__clang__", "-"]
    expanded = subprocess.run(command, input=header, capture_output=True, text=True, check=True).stdout
    assert "__builtin_shuffle(" in expanded and "__builtin_shufflevector" not in expanded


def test_two_processes_building_at_once_both_load(tmp_path) -> None:  # type: ignore[no-untyped-def]
    program = "from electra_kernels import native; raise SystemExit(native.problem())"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert len(list((tmp_path / "electra-core").iterdir())) == 1
