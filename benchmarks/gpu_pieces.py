"""What to run on a GPU that is available for minutes only, the most informative pieces first.

First come checks of which kernels are right in the sizes of runs, and the one figure that says most of how fast
they are, a whole step beside the library's; then the tests, each kernel's speed, and what could be faster. Seconds
are predictions for the first run, when nothing is compiled yet: none of this has run on a GPU.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from benchmarks.catalogue import CATALOGUE, PIECE_SECONDS


@dataclass(frozen=True)
class Piece:
    """A program, and the time it may take."""

    name: str
    about: str
    words: tuple[str, ...]
    """The command; `{python}` is the interpreter, `{out}` the result file, `{seconds}` its limit less a margin."""
    seconds: int
    """Predicted duration; with less time left the piece is not started."""
    limit: int
    """After so many seconds it is stopped."""
    suffix: str = ".json"
    judges: bool = False
    """Whether exit status 1 means that it found something wrong, not that it failed itself."""
    resumes: bool = False
    """Whether, when stopped early, it leaves rows and continues after them the next time."""

    needs: str = ""
    """A program that must be on the path."""

    @property
    def result(self) -> str:
        """Name of the result file."""
        return f"{self.name}{self.suffix}"

    def command(self, folder: str, seconds: float) -> list[str]:
        """The command line that starts it."""
        given = {
            "python": sys.executable,
            "out": f"{folder}/{self.result}",
            "seconds": str(max(1, int(seconds) - 5)),
        }
        return [word.format(**given) for word in self.words]


def _module(name: str, *words: str, out: str = "--out") -> tuple[str, ...]:
    return ("{python}", "-m", f"benchmarks.{name}", *words, out, "{out}")


def _kernel(name: str, seconds: int) -> Piece:
    words = _module(f"bench_{name}", "--no-compile", "--repetitions", "30")
    return Piece(name, f"{name} beside its peers, none compiled", words, seconds, 4 * seconds)


def _pretrain(name: str, about: str, seconds: int, *words: str) -> Piece:
    peers = ("--peers", "transformers", "transformers, masked states")
    return Piece(
        name, about, _module("bench_pretrain", "--rounds", "3", *words, *peers), seconds, 3 * seconds
    )  # fmt: skip


def _finetune(mode: str, seconds: int) -> Piece:
    words = ("--workloads", "sst2", "--modes", mode, "--rounds", "1")
    return Piece(
        f"finetune_small_sst2_{mode}", f"Texts as long as SST-2's beside transformers: {mode}",
        _module("bench_finetune", *words, out="--json"), seconds, 3 * seconds,
    )  # fmt: skip


_BF16 = ("--precision", "bf16")
FIRST = (
    Piece("facts", "The machine", _module("gpu_facts"), 15, 60),
    Piece(
        "checks", "Each kernel and four models beside their twins",
        _module("kernel_checks", "--seconds", "{seconds}"), 30, 110, ".jsonl", judges=True, resumes=True,
    ),
    _pretrain(
        "pretrain_small_bf16", "Pre-training of Small beside transformers", 50,
        *_BF16, "--objectives", "electra", "--batch", "128", "--steps", "10",
    ),
    Piece("tests", "The tests of kernels", _module("kernel_tests"), 40, 160, ".jsonl", judges=True, resumes=True),
    _kernel("attention", 35),
    _kernel("mlm_head", 30),
    _kernel("layer_norm", 20),
    _finetune("train", 60),
    _kernel("bias_gelu", 20),
    _kernel("sample_replace", 20),
    _kernel("rtd_loss", 20),
    Piece(
        "step_small_bf16", "A step of Small by its stages",
        _module("bench_step", *_BF16, "--batch", "128", out="--json"), 20, 60,
    ),
    Piece(
        "tests_of_runs", "Tests of other parts that need a GPU",
        _module("kernel_tests", "--others"), 40, 120, ".jsonl", judges=True, resumes=True,
    ),
    Piece(
        "tune", "Tiles", _module("tune", "--compile-first", "--minutes", "60"), 60, PIECE_SECONDS, resumes=True,
    ),
    _finetune("infer", 50),
    _pretrain(
        "pretrain_small_bf16_mlm", "BERT's objective beside transformers", 50,
        *_BF16, "--objectives", "mlm", "--batch", "128", "--steps", "10",
    ),
    _pretrain(
        "pretrain_base_bf16", "Pre-training of Base at 512 tokens", 70,
        *_BF16, "--model", "base", "--objectives", "electra", "--batch", "32", "--length", "512", "--steps", "3",
    ),
    Piece(
        "memcheck", "A call of every kernel under compute-sanitizer",
        ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", "memcheck",
         "--error-exitcode", "1", "{python}", "tests/kernel_calls.py"),
        90, 240, ".log", judges=True, needs="compute-sanitizer",
    ),
)  # fmt: skip


def _rest() -> tuple[Piece, ...]:
    """The catalogue's benchmarks in full, with compiled peers and more rounds."""
    taken = {piece.name for piece in FIRST}
    pieces = []
    for benchmark in CATALOGUE:
        if benchmark.gpu is None or benchmark.needs_corpus:
            continue
        name = f"{benchmark.name}_in_full" if benchmark.name in taken else benchmark.name
        words = ("{python}", "-m", benchmark.module, *benchmark.gpu, benchmark.out, "{out}")
        pieces.append(
            Piece(name, benchmark.about, words, 90, PIECE_SECONDS, benchmark.suffix, resumes=benchmark.resumes)
        )
    return tuple(pieces)


PIECES = (*FIRST, *_rest())
