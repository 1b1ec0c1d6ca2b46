"""What the host spends on submitting a step: one encoder, forward and backward, with all Triton launches left out.

    TRITON_INTERPRET=1 python -m benchmarks.bench_host [--layers 12] [--rounds 5]

On a GPU an eager step on a small batch takes as long as the host needs to submit it. Here the model runs on tiny
CPU tensors as it would on a GPU, through Triton's launchers, except that launches do nothing. What remains is the
time of Python and PyTorch themselves, without the launches. Two ways take turns: operators called directly, as
`electra_kernels.operators` does, and all of them through PyTorch's dispatcher, as custom operators. Times are
milliseconds of processor time, medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from electra_kernels import use
from electra_kernels.dispatch import interpreting

from benchmarks.harness import environment
from electra_core.config import PRESETS
from electra_core.electra import Discriminator
from electra_core.execution.placement import autocast_context
from electra_core.packing import pack

STEPS = 20  # per round


@contextmanager
def no_launches() -> Iterator[None]:
    """Inside, calls of Triton kernels do nothing, and ids are not checked, as on a GPU."""
    from triton.runtime.interpreter import InterpretedFunction

    def launcher(*_: Any) -> Callable[..., None]:
        return lambda *_, **__: None

    # From sys.modules, because the name `electra_kernels.attention` is the function.
    unchecked = [sys.modules[f"electra_kernels.{name}"] for name in ("checks", "attention")]
    with mock.patch.object(InterpretedFunction, "__getitem__", launcher):
        patches = [mock.patch.object(module, "checks_values", lambda _: False) for module in unchecked]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def step_of(layers: int) -> Callable[[], None]:
    """Forward and backward pass of a discriminator with `layers` narrow layers, on seven tokens in bf16."""
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "embedding_size": 64}
    model = Discriminator(replace(PRESETS["small"].discriminator, num_hidden_layers=layers, **sizes)).train()
    batch, labels = pack([[1, 2, 3, 4], [5, 6, 7]], [[0] * 4, [0] * 3]), torch.zeros(7, dtype=torch.bool)
    autocast = autocast_context(torch.device("cpu"), torch.bfloat16)

    def step() -> None:
        with autocast, use("triton"):
            loss = model.judge(batch, labels, None, 1).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def milliseconds(step: Callable[[], None]) -> float:
    """Milliseconds of processor time per step."""
    begin = time.process_time()
    for _ in range(STEPS):
        step()
    return 1e3 * (time.process_time() - begin) / STEPS


def measure(layers: int, rounds: int) -> dict[str, list[float]]:
    """Way -> milliseconds of each round, without the first."""
    found: dict[str, list[float]] = {"as they are": [], "through the dispatcher": []}
    with no_launches():
        step = step_of(layers)
        for _ in range(rounds + 1):
            for way, times in found.items():
                seen = mock.patch("electra_kernels.operators._must_be_seen", lambda _: True)
                if way == "as they are":
                    times.append(milliseconds(step))
                else:
                    with seen:
                        times.append(milliseconds(step))
    return {way: times[1:] for way, times in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not interpreting():
        parser.error("set TRITON_INTERPRET=1: without it Triton's launchers want a GPU")
    torch.set_num_threads(1)
    print("{device}, {threads} thread(s)".format(**environment(torch.device("cpu"))))
    for way, times in measure(options.layers, options.rounds).items():
        low, high = min(times), max(times)
        print(f"operators {way:24} {statistics.median(times):6.2f} ms a step ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
