"""Facts about a machine with a GPU: the first thing to collect when it is available for minutes only.

    python -m benchmarks.gpu_facts --out FILE.json

GPU, clocks under load, driver, versions, the rates of a large copy and of a large matrix product, compilers and
tools on the path, installed packages, and which kernels can run. If a fact cannot be found out, the reason takes
its place and the others are still collected.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import electra_kernels
import torch

from benchmarks.harness import replace_text, use_device, versions
from benchmarks.kernel_report import clocks_under_load, environment, in_a_line
from benchmarks.kernel_timing import ceilings

TOOLS = ("gcc", "cc", "nvcc", "ptxas", "cuobjdump", "compute-sanitizer", "ncu", "git", "make")
PACKAGES = (
    "torch", "triton", "transformers", "numpy", "scipy", "safetensors", "tokenizers", "sentencepiece",
    "scikit-learn", "tqdm", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "liger-kernel", "flash-attn",
    "seqeval", "onnx", "onnxruntime", "pyarrow", "zstandard", "tensorboard",
)  # fmt: skip


def facts(device: str) -> dict[str, Any]:
    """Question -> answer, or one line that says why there is none."""
    questions: dict[str, Callable[[], Any]] = {
        "kernels": electra_kernels.available,
        "environment": lambda: environment(device, {}),
        "clocks_under_load": lambda: clocks_under_load(device),
        "ceilings": lambda: asdict(best) if (best := ceilings(device)) else None,
        "gpu": lambda: _gpu(device),
        "nvidia_smi": lambda: _printed(["nvidia-smi"]),
        "compute_mode": lambda: _printed(["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]),
        "cores": os.cpu_count,
        "memory": lambda: _printed(["free", "-m"]),
        "tools": lambda: {tool: shutil.which(tool) for tool in TOOLS},
        "packages": lambda: versions(*PACKAGES),
        "folders": lambda: {name: os.environ.get(name) for name in ("HOME", "TRITON_CACHE_DIR", "TMPDIR", "CC")},
    }  # fmt: skip
    answers: dict[str, Any] = {}
    for question, ask in questions.items():
        started = time.perf_counter()
        try:
            answers[question] = ask()
        except Exception as error:
            answers[question] = in_a_line(error)
        answers.setdefault("seconds", {})[question] = round(time.perf_counter() - started, 2)
    return answers


def _gpu(device: str) -> dict[str, Any] | None:
    if device == "cpu":
        return None
    found = torch.cuda.get_device_properties(device)
    names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size")
    return {name: getattr(found, name, None) for name in names}


def _printed(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    use_device(torch.device(device))
    text = json.dumps(facts(device), indent=1)
    replace_text(options.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
