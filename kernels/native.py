"""Builds and loads the loops in C (folder `c`) that make training on a CPU fast.

The machine's own C compiler (`cc`, or the one that CC names) builds them within seconds when a model first trains
on a CPU. The library is kept in the user's cache folder (XDG_CACHE_HOME, else ~/.cache), under a digest of the
sources, the compiler, its options and the processor. Without a compiler, or with ELECTRA_NATIVE=0, the twins run
instead: the same dropout decisions, the same values up to rounding. `problem` returns the reason.

Neither Python's nor PyTorch's headers are needed: pointers and sizes go through `ctypes`. The loops share
PyTorch's OpenMP threads, because the library leaves OpenMP's (GOMP's) symbols for the process to resolve.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from electra_kernels import rng
from torch import Tensor

SOURCES = sorted(Path(__file__).with_name("c").glob("*.[ch]"))
PLAIN = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
NATIVE = (*PLAIN, "-march=native")
WIDE = (*NATIVE, "-mprefer-vector-width=512")
# The vector width is an option on x86 only, not every ARM compiler knows `native`, and OpenMP's symbols may be
# missing from the process. The first set of options that works is used.
ATTEMPTS = tuple(
    (*options, threads) for threads in ("-fopenmp", "-fopenmp-simd") for options in (WIDE, NATIVE, PLAIN)
)
DTYPES = (torch.float32, torch.bfloat16)
SWITCHED_OFF = "ELECTRA_NATIVE=0 is set"


class NativeError(Exception):
    """The library could not be built or loaded; the message says why."""


def problem() -> str | None:
    """Why the loops in C cannot run here, or None. Builds them on first use."""
    return _load()[1]


def call(function: str, *arguments: Tensor | int | float | None) -> None:
    """Calls a C function. Tensors are passed as pointers, ints as int64_t (`c_int`: int), floats as float.

    Raises:
        MemoryError: the function could not allocate its scratch space.
    """
    library = _load()[0]
    assert library is not None, "callers ask `problem` first"
    if getattr(library, function)(*(_as_c(value) for value in arguments)):
        raise MemoryError(f"{function}: no memory for its scratch space")


@torch.compiler.assume_constant_result
def has_bf16_products() -> bool:
    """Whether `attention_in_bf16` can run: it was built for a processor with AVX-512 BF16, and if that has AMX,
    Linux lets this process use it."""
    return _has_bf16_products()


@functools.cache
def _has_bf16_products() -> bool:
    library = _load()[0]
    return library is not None and bool(library.have_bf16_products())


def dropout_arguments(dropout_p: float, stream: int) -> tuple[int, Any, float]:
    """(stream, threshold, scale), the arguments of every C function with dropout."""
    return stream, c_int(rng.dropout_threshold(dropout_p)), rng.keep_scale(dropout_p)


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
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """(library, None), or (None, why not)."""
    if os.environ.get("ELECTRA_NATIVE", "1") == "0":
        return None, SWITCHED_OFF
    reasons = []
    for options in ATTEMPTS:
        try:
            return _build_and_load(options), None
        except (NativeError, OSError, subprocess.SubprocessError) as error:
            reasons.append(str(error))
    return None, reasons[0]


def _build_and_load(options: tuple[str, ...]) -> ctypes.CDLL:
    if not hasattr(os, "RTLD_NOW"):
        raise NativeError("they are built on Unix alone")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NativeError("no C compiler (cc) was found")
    command = [compiler, *options]
    version = _run([compiler, "--version"])
    texts = [source.read_text(encoding="utf-8") for source in SOURCES]
    facts = "\n".join([*command, version, _processor(), *texts])
    library = _cache_folder() / f"native-{hashlib.sha256(facts.encode()).hexdigest()[:24]}.so"
    if not library.exists():
        _build(command, library)
    loaded = ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    for name in ("layer_norm_forward", "layer_norm_backward"):
        getattr(loaded, name).restype = None
    return loaded


def _build(command: list[str], library: Path) -> None:
    """Compiles next to `library` and renames the result, so that no process loads half a library."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        sources = [str(source) for source in SOURCES if source.suffix == ".c"]
        _run([*command, "-c", *sources], folder)
        # Linked without OpenMP's library: PyTorch's, already loaded in this process, has the symbols.
        objects = [path.name for path in sorted(Path(folder).glob("*.o"))]
        _run([command[0], "-shared", *objects, "-lm", "-o", "native.so"], folder)
        Path(folder, "native.so").replace(library)


def _run(command: list[str], folder: str | None = None) -> str:
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=300, cwd=folder
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise NativeError(f"{command[0]} failed: {next((line for line in lines if 'error' in line), lines[0])}")
    return done.stdout


def _processor() -> str:
    """What determines the instructions that `-march=native` stands for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    except OSError:
        lines = []
    kept = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
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
