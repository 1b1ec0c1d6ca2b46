"""The loops in C against the twins: the same dropout decisions, values within the error budget, no surprises.

They are what trains on a CPU, and optional: without a C compiler the twins run, and these tests are skipped.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from electra_kernels import (
    attention,
    attention_native,
    available,
    dispatch,
    dropout_add_layer_norm,
    dropout_add_layer_norm_twice,
    fast_bf16,
    native,
    rng,
    use,
)
from electra_kernels.dispatch import Implementation
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import assert_within_budget, dtype_id
from torch import Tensor

from benchmarks import bench_native

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=f"no loops in C: {native.problem()}")
needs_threads = pytest.mark.skipif(native.one_thread() is not None, reason=f"{native.one_thread()}")
needs_avx2 = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="the processor has no AVX2")

SEED = torch.tensor([0x123456789ABCDEF, 2**32 - 7])  # rows wrap around 32 bits
STREAM = 11
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = {
    "one-token": [1],
    "equal": [24, 24],
    "unequal-and-empty": [5, 0, 33, 17],
    "more-than-a-block-of-queries": [150, 3],
    "whole-blocks-and-halves-of-one": [128, 64, 96, 32],
}


def leaves(*shapes: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def run_attention(
    path: Implementation, qkv: Tensor, dout: Tensor, lengths: Sequence[int], dropout_p: float
) -> tuple[Tensor, Tensor]:
    """(out, gradient of qkv)"""
    qkv = qkv.clone().requires_grad_()
    with use(path):
        longest = max(lengths)
        out = attention(qkv, offsets(lengths), longest, dropout_p=dropout_p, seed=SEED, stream=STREAM)
        return out.detach(), *torch.autograd.grad(out, qkv, dout.to(out.dtype))


def run_layer_norm(path: Implementation, tensors: Sequence[Tensor], dropout_p: float) -> list[Tensor]:
    """The result, read twice, and the gradients of x, residual, weight, bias and x's bias."""
    *inputs, dout = (tensor.clone() for tensor in tensors)
    inputs = [tensor.requires_grad_() for tensor in (*inputs, inputs[-1].flip(0))]
    *leaves, x_bias = inputs
    with use(path):
        outs = dropout_add_layer_norm_twice(
            *leaves, eps=1e-6, x_bias_D=x_bias, dropout_p=dropout_p, seed=SEED, stream=STREAM
        )
        douts = [d.to(outs[0].dtype) for d in (dout, dout.flip(0))]
        return [outs[0].detach(), *torch.autograd.grad(outs, inputs, douts)]


@pytest.fixture
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How attention multiplies: in fp32, or bf16 on tiles, or bf16 in pairs (on processors with tiles, too)."""
    monkeypatch.setattr(attention_native, "has_fast_bf16", lambda: request.param != "fp32")
    if request.param == "tiles" and not (fast_bf16.has_amx() and native.has_bf16_products()):
        pytest.skip("the processor has no tiles")
    if request.param == "pairs":
        if not torch.cpu._is_avx512_bf16_supported():
            pytest.skip("the processor has no AVX-512 BF16")
        here = native._load()
        without_tiles = native._build_and_load(here.compiler, (*here.options, "-mno-amx-bf16"))
        monkeypatch.setattr(native, "_load", lambda: without_tiles)
        assert native.has_bf16_products()
    return str(request.param)


@pytest.mark.parametrize(
    ("dtype", "dim", "products"),
    [
        (torch.float32, 48, "fp32"),
        (torch.bfloat16, 48, "fp32"),
        (torch.bfloat16, 32, "fp32"),
        (torch.bfloat16, 32, "tiles"),
        (torch.bfloat16, 128, "tiles"),
        (torch.bfloat16, 32, "pairs"),
        (torch.bfloat16, 128, "pairs"),
    ],
    ids=str,
    indirect=["products"],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_is_within_the_error_budget(
    lengths: list[int],
    dropout_p: float,
    dtype: torch.dtype,
    dim: int,
    products: str,
) -> None:
    qkv, dout = leaves((sum(lengths), 3, 2, dim), (sum(lengths), 2, dim), dtype=dtype)
    exact = run_attention("reference", qkv.double(), dout.double(), lengths, dropout_p)
    same = run_attention("reference", qkv, dout, lengths, dropout_p)
    got = run_attention("native", qkv, dout, lengths, dropout_p)
    for name, *values in zip(("out", "dqkv"), got, same, exact, strict=True):
        assert_within_budget(name, *values)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (70, 300), (130, 64)], ids=str)
def test_layer_norm_is_within_the_error_budget(
    shape: tuple[int, int], dropout_p: float, dtype: torch.dtype
) -> None:
    tensors = leaves(shape, shape, shape[1:], shape[1:], shape, dtype=dtype)
    exact = run_layer_norm("reference", [tensor.double() for tensor in tensors], dropout_p)
    same = run_layer_norm("reference", tensors, dropout_p)
    got = run_layer_norm("native", tensors, dropout_p)
    for name, *values in zip(
        ("out", "dx", "dresidual", "dweight", "dbias", "dx_bias"), got, same, exact, strict=True
    ):
        assert_within_budget(name, *values)


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4).filter(any),
    heads=st.integers(1, 3),
    dim=st.sampled_from([16, 32, 64, 80]),
    dropout_p=st.sampled_from([0.0, 0.1, 0.9]),
)
def test_attention_of_any_shape(lengths: list[int], heads: int, dim: int, dropout_p: float) -> None:
    qkv, dout = leaves((sum(lengths), 3, heads, dim), (sum(lengths), heads, dim), seed=heads)
    got = run_attention("native", qkv, dout, lengths, dropout_p)
    for value, twin in zip(got, run_attention("reference", qkv, dout, lengths, dropout_p), strict=True):
        torch.testing.assert_close(value, twin, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dropout_p", [1e-5, 0.1, 0.5, 0.99])
def test_dropout_decides_as_specified(dropout_p: float) -> None:
    """Exactly the kept values of x reach its gradient; columns beyond one vector's 128 included."""
    x, residual, weight, bias, dout = leaves((9, 300), (9, 300), (300,), (300,), (9, 300))
    _, dx, dresidual, *_ = run_layer_norm("native", (x, residual, weight, bias, dout), dropout_p)
    keep = rng.keep_mask(SEED, torch.arange(9), 300, dropout_p, STREAM)
    assert torch.equal(dx, dresidual * (keep * torch.tensor(rng.keep_scale(dropout_p))))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dim", [64, 128])
def test_attention_drops_what_the_specification_drops(dim: int, dtype: torch.dtype) -> None:
    """Queries of zero make every probability 1 / length, values of one-hot rows show which were kept."""
    length, heads = dim, 3
    qkv = torch.zeros(2 * length, 3, heads, dim, dtype=dtype)
    qkv[:, 2] = torch.eye(dim, dtype=dtype).repeat(2, 1)[:, None]
    with use("native"):
        out = attention(qkv, offsets([length] * 2), length, dropout_p=0.3, seed=SEED, stream=STREAM)
    for head in range(heads):
        keep = rng.keep_mask(SEED, torch.arange(2 * length), length, 0.3, STREAM, plane=head)
        torch.testing.assert_close(out[:, head], (keep * rng.keep_scale(0.3) / length).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_attentions_gradient_goes_to_what_was_kept(dtype: torch.dtype) -> None:
    """With equal probabilities the gradient of value j is the sum of the gradients of those who kept it."""
    length = 96
    qkv = torch.zeros(length, 3, 2, 32, dtype=dtype)
    dout = torch.zeros(length, 2, 32, dtype=dtype)
    dout[torch.arange(length), :, torch.arange(length) % 32] = 1.0
    _, dqkv = run_attention("native", qkv, dout, [length], 0.3)
    for head in range(2):
        keep = rng.keep_mask(SEED, torch.arange(length), length, 0.3, STREAM, plane=head)
        counts = keep.float().T.reshape(length, 3, 32).sum(1)  # queries 32 apart have the same one-hot gradient
        expected = counts * (rng.keep_scale(0.3) / length)
        torch.testing.assert_close(
            dqkv[:, 2, head].float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    lengths = [40, 7, 25, 60]
    qkv, dout = leaves((132, 3, 2, 32), (132, 2, 32), dtype=dtype)
    tensors = leaves((300, 96), (300, 96), (96,), (96,), (300, 96))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                [*run_attention("native", qkv, dout, lengths, 0.1), *run_layer_norm("native", tensors, 0.1)]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_stays_in_its_sequence_and_large_logits_are_no_problem(dtype: torch.dtype) -> None:
    qkv, dout = leaves((30, 3, 1, 32), (30, 1, 32), dtype=dtype)
    qkv[:10] *= 1e4
    clean = run_attention("native", qkv, dout, [10, 10, 10], 0.1)
    qkv[12, 0] = torch.nan
    spoilt = run_attention("native", qkv, dout, [10, 10, 10], 0.1)
    for before, after in zip(clean, spoilt, strict=True):
        others = torch.cat([torch.arange(10), torch.arange(20, 30)])
        assert before.isfinite().all() and torch.equal(before[others], after[others])
    assert spoilt[0][12].isnan().all() and spoilt[1][10:20, 1].isnan().all()


def test_opcheck() -> None:
    qkv = torch.randn(12, 3, 2, 16, requires_grad=True)
    arguments = (qkv, offsets([5, 7]), SEED, 7, 0.2, STREAM, 0.25)
    torch.library.opcheck(torch.ops.electra_kernels.native_attention.default, arguments)
    tensors = [tensor.requires_grad_() for tensor in leaves((6, 24), (6, 24), (24,), (24,))]
    torch.library.opcheck(
        torch.ops.electra_kernels.native_dropout_add_layer_norm.default, (*tensors, None, 1e-6, 0.2, SEED, STREAM)
    )


def test_what_the_loops_cannot_do_takes_the_twin_or_is_said() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    arguments = (x, x, x[0], x[0])
    assert dropout_add_layer_norm(*arguments, eps=1e-6, dropout_p=0.1, seed=1).dtype == torch.float64
    with use("native"), pytest.raises(RuntimeError, match=r"native was asked for but cannot run: torch.float64"):
        dropout_add_layer_norm(*arguments, eps=1e-6)


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The loops are looked for again in the test, and once more after it."""
    native._load.cache_clear()
    yield
    monkeypatch.undo()
    native._load.cache_clear()
    dispatch._say_once.cache_clear()


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, afresh: None
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
        return dispatch.use_native(tensor, dropout_p=0.1, supported=True)

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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, afresh: None
) -> None:
    compiler(tmp_path, "-fopenmp")
    gcc = compiler(tmp_path, "-none", "gcc")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._load.cache_clear()
    assert native._load().compiler == (gcc,) and native.one_thread() is None


@needs_avx2
@pytest.mark.parametrize("processor", ["haswell", "x86-64"])
def test_loops_for_older_processors(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AVX-512, and without AVX, products have other vectors, and random numbers other code."""
    here, older = native._load(), native.load_for(processor)
    assert older.library is not here.library and f"-march={processor}" in older.options
    monkeypatch.setattr(native, "_load", lambda: older)
    for dtype in DTYPES:
        test_attention_is_within_the_error_budget([5, 0, 33, 150], 0.2, dtype, 48, "fp32")
        test_layer_norm_is_within_the_error_budget((70, 300), 0.2, dtype)
    test_dropout_decides_as_specified(0.1)


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


def test_the_benchmark_compares_ways_that_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "native.json"
    arguments = ["--rounds", "1", "--calls", "1", "--shapes", "2x16", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_native", *arguments])
    threads = torch.get_num_threads()
    bench_native.main()
    torch.set_num_threads(threads)
    compared = json.loads(out.read_text())["comparisons"]
    assert {row["peer"] for row in compared} == {"twin", "PyTorch"} and len(compared) == 8
    with pytest.raises(SystemExit, match="it: differ by 1"):
        bench_native.check([torch.zeros(2)], [torch.ones(2)], "it")


@needs_avx2
def test_the_benchmark_of_loops_for_another_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, here = tmp_path / "native.json", native._load()
    ran = []
    monkeypatch.setattr(bench_native, "report", lambda options: ran.append(native._load()) or [])
    monkeypatch.setattr(sys, "argv", ["bench_native", "--march", "haswell", "--out", str(out)])
    bench_native.main()
    assert "-march=haswell" in ran[0].options and native._load() is here
    facts = json.loads(out.read_text())
    assert (facts["march"], facts["pytorch"]) == ("haswell", torch.backends.cpu.get_cpu_capability())
    monkeypatch.setattr(sys, "argv", ["bench_native", "--march", "abacus"])
    with pytest.raises(SystemExit, match=r"--march: .* failed: .*error: .*abacus"):
        bench_native.main()
