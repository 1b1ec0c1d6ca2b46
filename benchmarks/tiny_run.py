"""A pre-training run as small as runs can be (1 layer, 16 wide, some 60 words), for tests of endurance.

Its corpus is made here, its commands are the ones a user types, and `start` runs them in processes of their own,
forked from one that has torch imported already: a run's every moment is then one in which it does something.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import torch

from electra_core.cli import main

WORDS = "the a cat dog sat ran on by mat door of red big old and saw it . , was in house tree king son".split()
SIZES = (
    "--num-hidden-layers 1 --hidden-size 16 --embedding-size 16 --num-attention-heads 2 --intermediate-size 32 "
    "--max-position-embeddings 32 --generator-hidden-size 16 --generator-attention-heads 1 "
    "--generator-intermediate-size 32 --hidden-dropout-prob 0.1 --attention-probs-dropout-prob 0.1 "
    "--batch-size 8 --max-length 24 --warmup-steps 2 --eval-examples 16 --precision fp32 --device cpu --quiet"
).split()


def write_text(path: Path, documents: int = 120, seed: int = 0) -> Path:
    """Documents of sentences in which words come in a preferred order; a vocab.txt beside it."""
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


def start(arguments: list[str], log: Path) -> int:
    """Run a command of the command line in a forked process, its output appended to `log`; returns its pid."""
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
    """Exit status of a process that `start` began; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
