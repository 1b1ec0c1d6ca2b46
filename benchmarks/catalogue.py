"""Every benchmark: what it measures, how it is started, and where its result is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PIECE_SECONDS = 540
"""The most that one benchmark may take on a GPU, which is lent for ten minutes at a time."""


def is_ours(contender: str) -> bool:
    """Whether a kernel benchmark's contender is this project's kernel: without its time there is no result."""
    return contender.startswith("ours")


def is_baseline(contender: str) -> bool:
    """Whether others' times are given as multiples of its time: ours, but no part of it ("ours, without ...")."""
    return is_ours(contender) and "," not in contender


LEFT_OUT = "left out:"
"""What the note of a contender begins with that was not timed by choice; any other without a time has failed."""


@dataclass(frozen=True)
class Benchmark:
    """One program, with its arguments for a GPU, for a CPU and for a quick check on a CPU."""

    name: str
    about: str
    module: str
    gpu: tuple[str, ...] | None = ()
    """None: it measures nothing on a GPU."""
    cpu: tuple[str, ...] | None = None
    """None: its figures mean nothing on a CPU, where `quick` only shows that the command works."""
    quick: tuple[str, ...] = ()
    out: str = "--out"
    """The program's option for the result file."""
    suffix: str = ".json"
    needs_corpus: bool = False
    resumes: bool = False
    """Whether, started again, it resumes where it stopped, and ends at once if nothing is left."""

    def arguments(self, device: str, quick: bool) -> tuple[str, ...] | None:
        """The arguments to start it with; None if it measures nothing on `device`."""
        return (*self.quick, "--device", device) if quick else self.gpu if device == "cuda" else self.cpu


def _kernel(name: str, about: str) -> Benchmark:
    return Benchmark(name, about, f"benchmarks.bench_{name}", quick=("--repetitions", "1"))


def _sweep(model: str, gpu: tuple[str, ...], cpu: tuple[str, ...] | None) -> Benchmark:
    return Benchmark(
        f"sweep_{model}", f"Pre-training of {model} over batch and length, with memory, MFU and a step's stages",
        "benchmarks.sweep", ("--model", model, "--precision", "bf16", "--minutes", "6", *gpu),
        cpu and ("--model", model, *cpu),
        ("--model", "tiny", "--shapes", "2x16", "--rounds", "1", "--compiled", "0", "--threads", "1"),
        suffix=".jsonl", resumes=True,
    )  # fmt: skip


_STEP = ("--precision", "bf16", "--threads", "1")
_TINY_STEP = ("--model", "tiny", "--batch", "2", "--length", "16", "--rounds", "1", "--threads", "1")

# The most valuable first, because a GPU may be taken away at any time.
CATALOGUE = (
    Benchmark(
        "pretrain_small_bf16", "Pre-training, ELECTRA-Small and BERT's MLM of its size, in bf16",
        "benchmarks.bench_pretrain", ("--precision", "bf16", "--batch", "128", "--steps", "10"),
        (*_STEP, "--rounds", "3"), (*_TINY_STEP, "--precision", "fp32"),
    ),
    _kernel("attention", "Attention without padding, forward and backward"),
    _kernel("mlm_head", "Projection on the vocabulary, loss and draw, without stored logits"),
    Benchmark(
        "finetune_small", "Fine-tuning and inference without padding", "benchmarks.bench_finetune",
        ("--rounds", "3"), ("--threads", "1", "--rounds", "3"),
        ("--model", "tiny", "--workloads", "sst2", "--rounds", "1", "--examples", "8", "--threads", "1"),
        out="--json",
    ),
    _kernel("layer_norm", "Dropout, residual sum and LayerNorm; embeddings and LayerNorm"),
    _kernel("bias_gelu", "Bias and GELU between the products of a feed-forward branch"),
    _kernel("sample_replace", "Draw and replace"),
    _kernel("rtd_loss", "The RTD head and its loss"),
    Benchmark(
        "pretrain_base_bf16", "Pre-training, ELECTRA-Base, on a GPU at 512 tokens", "benchmarks.bench_pretrain",
        ("--model", "base", "--precision", "bf16", "--batch", "32", "--length", "512", "--steps", "3"),
        quick=(*_TINY_STEP, "--precision", "fp32"),
    ),
    Benchmark(
        "pretrain_small_fp32", "Pre-training in fp32", "benchmarks.bench_pretrain",
        ("--precision", "fp32", "--batch", "128", "--steps", "5"),
        ("--precision", "fp32", "--threads", "1", "--rounds", "3"), (*_TINY_STEP, "--precision", "fp32"),
    ),
    _sweep(
        "small", ("--shapes", "128x128", "1024x128", "128x512", "--compiled", "2", "--steps", "10"),
        ("--shapes", "16x128", "64x128", "4x512", "--threads", "2"),
    ),
    _sweep("base", ("--shapes", "32x512", "256x128", "--compiled", "1", "--steps", "3"), None),
    Benchmark(
        "native", "On a CPU: loops in C beside the twins and PyTorch's operations", "benchmarks.bench_native",
        None, ("--threads", "1"), ("--rounds", "1", "--calls", "1", "--shapes", "2x16"),
    ),
    Benchmark(
        "input", "Examples and masks on the host, by stage, in processes and threads", "benchmarks.bench_input",
        (), (), ("--rounds", "1", "--seconds", "0.1", "--ways", "1x1"),
    ),
    Benchmark(
        "learning", "What is learned at equal FLOPs and in equal time", "benchmarks.learning_study",
        ("--budget", "ten-minutes", "--piece-minutes", "7", "--minutes", "1"),
        ("--budget", "minutes"), ("--budget", "quick"), suffix=".jsonl", needs_corpus=True, resumes=True,
    ),
)  # fmt: skip
BY_NAME = {benchmark.name: benchmark for benchmark in CATALOGUE}


OTHERS = {
    "adapting": "Continuing from a pair on other text: peak rates and warm-ups",
    "probing": "What frozen models know of two texts, layer by layer",
    "step_small": "A step of ELECTRA-Small by its stages",
    "tiny_tasks_mlm": "The tasks of a masked LM of the shipped model's size and FLOPs",
    "tiny_tasks_again": "The tasks of a second ELECTRA, made like the shipped one from another seed",
    "tiny_tasks": "The shipped model's tasks, beside a random start",
}
"""Prefix of a result's name -> what it is about, for programs not in the catalogue; the first one counts."""
ELSEWHERE = {
    "corpus_open": ("What opening a corpus costs", "scaling.md#what-opening-costs"),
    "corpus_prepare": ("What preparing a corpus costs", "scaling.md#what-preparing-costs"),
    "corpus_reads": ("What reading a corpus costs", "scaling.md#what-reading-costs"),
    "fuzz": ("Readers of files, given damaged ones", "decisions.md#large-corpora"),
    "kill_test": ("Runs that are killed at random moments", "reliability.md#what-was-shown"),
    "soak": ("Memory and open files of long runs", "reliability.md#what-was-shown"),
}
"""Prefix of a result's name -> (what it is about, where it is shown), for results on other pages."""


def about(result: str) -> str:
    """What a result is about; for a variant (`sweep_small_amd`), what its benchmark is about."""
    known = {**{name: benchmark.about for name, benchmark in BY_NAME.items()}, **OTHERS}
    return next((words for name, words in known.items() if result.startswith(name)), "")


def shown_elsewhere(result: str) -> tuple[str, str] | None:
    """What a result is about and the page that shows it, if that is not the benchmarks' page."""
    return next((place for name, place in ELSEWHERE.items() if result.startswith(name)), None)


def result_file(benchmark: Benchmark, folder: Path) -> Path:
    """The benchmark's result file below `folder`."""
    return folder / f"{benchmark.name}{benchmark.suffix}"
