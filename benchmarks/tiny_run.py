"""The smallest possible pre-training run (1 layer, 16 wide, some 60 words), for endurance tests and the suite's.

Its corpus is made here and its commands are those a user types. `start` runs them in processes forked from this
one, which has imported torch already, so that no time of a run is spent on imports.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import torch

from electra_core.cli import main
from electra_core.runs.metrics_log import read_metrics

WORDS = "the a cat dog sat ran on by mat door of red big old and saw it . , was in house tree king son".split()
SIZES = (
    "--num-hidden-layers 1 --hidden-size 16 --embedding-size 16 --num-attention-heads 2 --intermediate-size 32 "
    "--max-position-embeddings 32 --generator-hidden-size 16 --generator-attention-heads 1 "
    "--generator-intermediate-size 32 --hidden-dropout-prob 0.1 --attention-probs-dropout-prob 0.1 "
    "--batch-size 8 --max-length 24 --warmup-steps 2 --eval-examples 16 --precision fp32 --device cpu --quiet"
).split()


def write_text(path: Path, documents: int = 120, seed: int = 0) -> Path:
    """Writes documents of sentences in which words have a preferred order, and a vocab.txt in the same folder."""
    draw, lines = random.Random(seed), []
    for _ in range(documents):
        for _ in range(draw.randint(3, 8)):
            at, words = draw.randrange(len(WORDS)), []
            for _ in range(draw.randint(3, 9)):
                words.append(WORDS[at])
                at = (at + draw.choice((1, 1, 1, 2, 7))) % len(WORDS)
            lines.append(" ".join(words))
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"bcdefghijklmnopqrstuvwxyz"]
    path.with_name("vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    return path


def prepare_command(text: Path, out: Path) -> list[str]:
    """`electra prepare` for `write_text`'s files."""
    return [
        "prepare", "--text", str(text), "--out", str(out), "--tokenizer", str(text.with_name("vocab.txt")),
        "--lines", "sentence", "--heldout-fraction", "0.1", "--quiet",
    ]  # fmt: skip


def pretrain_command(data: Path, out: Path, steps: int, *more: str) -> list[str]:
    """`electra pretrain` of the smallest model."""
    return ["pretrain", "--data", str(data), "--out", str(out), "--model", "tiny", "--steps", str(steps),
            *SIZES, *more]  # fmt: skip


def without_clock(log: Path) -> list[dict[str, float]]:
    """Rows of a run's log without the columns that differ between equal runs."""
    clock = {"tokens_per_second", "data_wait", "memory_mb", "mfu"}
    return [{name: value for name, value in row.items() if name not in clock} for row in read_metrics(log)]


def start(arguments: list[str], log: Path) -> int:
    """Run an `electra` command in a forked process, with its output appended to `log`; returns the pid."""
    torch.set_num_threads(1)  # a process with threads must not be forked
    if pid := os.fork():
        return pid
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Exit status of a process that `start` started; if negative, the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
