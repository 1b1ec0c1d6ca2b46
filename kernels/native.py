"""Builds and loads the loops in C (folder `c`) that make training on a CPU fast.

The machine's own C compiler (the command in CC, else `cc` or `gcc`) builds them within seconds when a model first
trains on a CPU. The library is kept in the user's cache folder (XDG_CACHE_HOME, else ~/.cache), under a digest of
the sources, the compiler, its options and the processor. Without a compiler, or with ELECTRA_NATIVE=0, the twins
run instead: the same dropout decisions, the same values up to rounding. `problem` returns the reason.

Neither Python's nor PyTorch's headers are needed: pointers and sizes go through `ctypes`. The loops share
PyTorch's OpenMP threads, because the library leaves OpenMP's (GOMP's) symbols for the process to resolve; where
PyTorch keeps them to itself (its wheels for ARM), `_share_openmp` makes them everybody's. Clang's have other
names, which PyTorch seldom has: what it builds runs on one thread, and `one_thread` says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import operator
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from electra_kernels import rng
from torch import Tensor

SOURCES = sorted(Path(__file__).with_name("c").glob("*.[ch]"))
PLAIN = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
NATIVE = (*PLAIN, "-march=native")
WIDE = (*NATIVE, "-mprefer-vector-width=512")
X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
# The vector width is an option on x86 only, not every ARM compiler knows `native`, and OpenMP's symbols may be
# missing from the process. The first that works is used, and threads come before the rest.
PROCESSOR = (WIDE, NATIVE, PLAIN) if X86 else (NATIVE, PLAIN)
THREADS, ONE_THREAD = ("-fopenmp", "-fopenmp-simd")
DTYPES = (torch.float32, torch.bfloat16)
LONGEST = 300
"""Seconds that a command of the compiler may take; usual are a few."""
BY_NAME = ("ccache", "distcc", "icecc")
"""Programs that call the compiler by the name of the link that leads to them."""
SWITCHED_OFF = "ELECTRA_NATIVE=0 is set"


class NativeError(Exception):
    """The library could not be built or loaded; the message says why."""


class TooSlowError(NativeError):
    """The compiler took too long, as it would with any options."""


class Loaded(NamedTuple):
    """The loops, with the compiler and the options that built them; or `problem`, why there are none."""

    library: ctypes.CDLL | None
    problem: str | None = None
    compiler: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    without_threads: str | None = None
    """Why the options that give threads did not do, if none of them did."""


def problem() -> str | None:
    """Why the loops in C cannot run here, or None. Builds them on first use."""
    return _load().problem


def one_thread() -> str | None:
    """Why the loops in C run on one thread, however many PyTorch has; or None."""
    return _load().without_threads


def call(function: str, *arguments: Tensor | int | float | None) -> None:
    """Calls a C function. Tensors are passed as pointers, ints as int64_t (`c_int`: int), floats as float.

    Raises:
        MemoryError: the function could not allocate its scratch space.
    """
    library = _load().library
    assert library is not None, "callers ask `problem` first"
    if getattr(library, function)(*(_as_c(value) for value in arguments)):
        raise MemoryError(f"{function}: no memory for its scratch space")


@torch.compiler.assume_constant_result
def has_avx2() -> bool:
    """Whether the processor has AVX2. Without, as on ARM, nobody has measured the products beside PyTorch's."""
    return bool(torch.cpu._is_avx2_supported())


@torch.compiler.assume_constant_result
def has_bf16_products() -> bool:
    """Whether `attention_in_bf16` can run: it was built for a processor with AVX-512 BF16, and if that has AMX,
    Linux lets this process use it."""
    library = _load().library
    return library is not None and _has_bf16_products(library)


@functools.cache
def _has_bf16_products(library: ctypes.CDLL) -> bool:
    return bool(library.have_bf16_products())


def dropout_arguments(dropout_p: float, stream: int) -> tuple[int, Any, float]:
    """(stream, threshold, scale), the arguments of every C function with dropout."""
    return operator.index(stream), c_int(rng.dropout_threshold(dropout_p)), rng.keep_scale(dropout_p)


def c_int(value: int) -> Any:
    """A C `int`; a plain Python int becomes an int64_t."""
    return ctypes.c_int(value)


def _as_c(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int64(value) if isinstance(value, int) else value


@functools.cache
def _load() -> Loaded:
    if os.environ.get("ELECTRA_NATIVE", "1") == "0":
        return Loaded(None, SWITCHED_OFF)
    if not hasattr(os, "RTLD_NOW"):
        return Loaded(None, "they are built on Unix alone")
    try:
        compilers = _compilers()
    except NativeError as error:
        return Loaded(None, str(error))
    _share_openmp()
    reason, without_threads = "", None
    for threads, compiler, options in itertools.product((THREADS, ONE_THREAD), compilers, PROCESSOR):
        try:
            loaded = _build_and_load(compiler, (*options, threads))
            return loaded if threads == THREADS else loaded._replace(without_threads=without_threads)
        except (NativeError, OSError) as error:
            reason = str(error)
            if isinstance(error, TooSlowError):
                break
            if threads == THREADS:
                without_threads = reason if isinstance(error, NativeError) else _other_openmp(compiler, reason)
    return Loaded(None, reason)  # of the plainest options: others may fail for a reason of their own


def _other_openmp(compiler: tuple[str, ...], reason: str) -> str:
    """What to tell of a library that was built with threads and does not load."""
    return f"{shlex.join(compiler)} has another OpenMP than PyTorch, which usually has GCC's ({reason})"


def _share_openmp() -> None:
    """Makes the symbols of GCC's OpenMP, if it is loaded, everybody's: some wheels load it for PyTorch alone."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_GLOBAL | os.RTLD_NOLOAD)


def load_for(processor: str) -> Loaded:
    """The loops as another `processor` would run them (a name that `-march` knows); for tests and benchmarks.

    Raises:
        NativeError: they cannot be built.
    """
    here = _load()
    options = [f"-march={processor}" if option == "-march=native" else option for option in here.options]
    if here.problem or f"-march={processor}" not in options:
        raise NativeError(here.problem or f"{shlex.join(here.compiler)} has no -march=native to replace")
    return _build_and_load(here.compiler, tuple(options))._replace(without_threads=here.without_threads)


def _compilers() -> list[tuple[str, ...]]:
    """The commands to try, with their arguments: the one in CC, else all that this machine has, each once."""
    try:
        asked_for = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise NativeError(f"CC: expected a command, got {os.environ['CC']} ({error})") from None
    commands = [asked_for] if asked_for else [["cc"], ["gcc"]]
    found = [(path, *arguments) for name, *arguments in commands if (path := shutil.which(name))]
    if not found:
        raise NativeError(f"no C compiler ({' or '.join(name for name, *_ in commands)}) was found")
    programs: dict[str, tuple[str, ...]] = {}  # `cc` usually is a link to `gcc`
    for path, *arguments in found:
        program = os.path.realpath(path)
        by_name = os.path.basename(program) in BY_NAME
        programs.setdefault(path if by_name else program, (path, *arguments))
    return [*programs.values()]


def _build_and_load(compiler: tuple[str, ...], options: tuple[str, ...]) -> Loaded:
    texts = [source.read_text(encoding="utf-8") for source in SOURCES]
    facts = "\n".join([*compiler, *options, _version(compiler), _processor(), *texts])
    library = _cache_folder() / f"native-{hashlib.sha256(facts.encode()).hexdigest()[:24]}.so"
    if not library.exists():
        _build(compiler, options, library)
    loaded = ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    for name in ("layer_norm_forward", "layer_norm_backward"):
        getattr(loaded, name).restype = None
    return Loaded(loaded, None, compiler, options)


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"])


def _build(compiler: tuple[str, ...], options: tuple[str, ...], library: Path) -> None:
    """Compiles next to `library` and renames the result, so that no process loads half a library."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        sources = [str(source) for source in SOURCES if source.suffix == ".c"]
        _run([*compiler, *options, "-c", *sources], folder)
        # Linked without OpenMP's library: PyTorch's, already loaded in this process, has the symbols.
        objects = [path.name for path in sorted(Path(folder).glob("*.o"))]
        _run([*compiler, "-shared", *objects, "-lm", "-o", "native.so"], folder)
        built = Path(folder, "native.so")
        if not built.exists():
            raise NativeError(f"{shlex.join(compiler)} made no library")
        built.replace(library)


def _run(command: list[str], folder: str | None = None) -> str:
    """What it prints.

    Raises:
        NativeError: it failed.
        TooSlowError: it took longer than `LONGEST`. Its children are ended, too: `cc` leaves the work to `cc1`.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace", cwd=folder, start_new_session=True
    ) as process:
        try:
            printed, complaints = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            advice = "ELECTRA_NATIVE=0 saves the wait"
            raise TooSlowError(f"{command[0]} took longer than {LONGEST} s; {advice}") from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        lines = complaints.strip().splitlines() or [f"status {process.returncode}"]
        telling = [line for sign in ("error:", "error") for line in lines if sign in line]
        raise NativeError(f"{command[0]} failed: {(telling or lines)[0]}")
    return printed


def _processor() -> str:
    """What determines the instructions that `-march=native` stands for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    except OSError:
        lines = []
    on_arm = ("Features", "CPU implementer", "CPU variant", "CPU part")
    kept = sorted({line for line in lines if line.startswith(("model name", "flags", *on_arm))})
    return "\n".join([platform.machine(), platform.system(), platform.node() if not kept else "", *kept])


def _cache_folder() -> Path:
    """The user's own folder. Nobody else may write to it, because libraries are loaded from it."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # in a container, a user without a name
        raise NativeError("this user has no home folder to keep them in; XDG_CACHE_HOME can name one") from None
    folder = base / "electra-core"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise NativeError(f"{folder} may be written to by others, so nothing is loaded from it")
    return folder
