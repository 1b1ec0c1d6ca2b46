"""All benchmarks behind one command.

    python -m benchmarks list                   show all benchmarks and what has been measured
    python -m benchmarks NAME... | all | gpu    measure (gpu: everything that runs on one)
    python -m benchmarks gpu --minutes 9        make the best use of a GPU for so many minutes (`gpu_run.py`)
    python -m benchmarks render                 write docs/benchmarks.md and its figures from the results

Each benchmark runs in its own process, checks that both sides compute the same before it times anything, and
writes its result when it ends, so losing the machine costs at most one benchmark. Existing results are measured
again only with `--again`. On a GPU each takes less than nine minutes; nothing is downloaded. `--quick` runs tiny
shapes, to check that the commands work; its figures mean nothing and go to --out.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import render
from benchmarks.catalogue import BY_NAME, CATALOGUE, PIECE_SECONDS, RESULTS, Benchmark, result_file


def main(argv: list[str] | None = None) -> int:
    """List, measure or render; 1 if a benchmark failed."""
    options = arguments().parse_args(argv)
    if options.names == ["render"]:
        return render.main()
    if options.minutes is not None:
        return _in_minutes(options)
    device = options.device or _device()
    folder = options.out or RESULTS / ("gpu" if device == "cuda" else "cpu")
    if options.quick and options.out is None:
        folder = Path(tempfile.mkdtemp(prefix="benchmarks-quick-"))
    if options.names == ["list"]:
        for benchmark in CATALOGUE:
            state = "measured" if result_file(benchmark, folder).exists() else "not yet measured"
            print(f"{benchmark.name:<22} {state:<18} {benchmark.about}")
        return 0
    chosen = list(CATALOGUE) if options.names in (["all"], ["gpu"]) else [BY_NAME[name] for name in options.names]
    succeeded = [measure(benchmark, device, folder, options) for benchmark in chosen]  # all run, even if one fails
    return int(not all(succeeded))


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("list", "render", "all", "gpu", *BY_NAME)
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="run tiny shapes on a CPU, to see that it works")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="device (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results/gpu or cpu)")
    parser.add_argument("--again", action="store_true", help="measure again what is already measured")
    parser.add_argument(
        "--minutes", type=float, help="with gpu: run kernel tests and short benchmarks for so many minutes"
    )
    parser.add_argument("--archive", type=Path, help="with gpu --minutes: also pack --out into this .tar.gz")
    parser.add_argument("--corpus", type=Path, help="prepared corpus (default: a small one is made)")
    return parser


def measure(benchmark: Benchmark, device: str, folder: Path, options: argparse.Namespace) -> bool:
    """Run one benchmark if it has something to measure; False if it failed."""
    extra, out = benchmark.arguments(device, options.quick), result_file(benchmark, folder)
    if extra is None:
        print(f"{benchmark.name}: nothing to measure on {device}")
        return True
    if out.exists() and not options.again and not benchmark.resumes:
        print(f"{benchmark.name}: already measured ({out})")
        return True
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", benchmark.module, *extra, benchmark.out, str(out)]
    if benchmark.needs_corpus:
        work = folder / f"{benchmark.name}.work"
        command += ["--data", str(options.corpus or small_corpus(work)), "--work", str(work)]
    print(f"{benchmark.name}: {' '.join(command[1:])}", flush=True)
    try:
        code = subprocess.run(command, timeout=PIECE_SECONDS if device == "cuda" else None).returncode
    except subprocess.TimeoutExpired:
        print(f"{benchmark.name}: stopped after {PIECE_SECONDS} s", file=sys.stderr)
        return False
    if code:
        print(f"{benchmark.name}: failed with exit status {code}", file=sys.stderr)
    return code == 0


def _in_minutes(options: argparse.Namespace) -> int:
    """`gpu --minutes`."""
    if options.names != ["gpu"] or options.minutes <= 0:
        raise SystemExit(
            "--minutes: expected with gpu alone, and more than 0: python -m benchmarks gpu --minutes 9"
        )
    if importlib.util.find_spec("electra_kernels") is None:
        raise SystemExit(
            "electra_kernels is not installed: python3 -m pip install --no-deps --no-build-isolation -e ."
        )
    if _device() != "cuda":
        raise SystemExit("gpu --minutes: expected a CUDA device, and torch sees none")
    from benchmarks import gpu_run

    return gpu_run.main(options.minutes, options.out or Path("build/gpu"), options.archive)


def small_corpus(work: Path) -> Path:
    """A prepared corpus of this machine's docstrings: enough to check that everything works."""
    from electra_core.corpora.docstrings import documents, write_corpus
    from electra_core.prepare import prepare

    data = work / "data"
    if not data.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_corpus(work / "docstrings.txt", documents())
        prepare([work / "docstrings.txt"], data, vocab_size=8192, heldout_fraction=0.02)
    return data


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
