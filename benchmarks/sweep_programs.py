"""The programs that `sweep.py` times: ours and `transformers`, each in a process of its own.

A process checks that its losses equal ours, builds its model and warms up. Then it runs a round of steps each time
it is asked, so that several processes can take turns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from electra_kernels.rng import seed_tensor
from torch import nn

from benchmarks.bench_pretrain import (
    LOSS_TOLERANCE,
    batches_like_text,
    largest,
    losses_with_our_weights,
    relative,
    take,
)
from benchmarks.harness import use_device, wait_for
from benchmarks.our_steps import OURS, OURS_EAGER, engine_steps, run_engine
from benchmarks.pretrain_peers import HubElectra, HubMaskedLM, Peer, hub_steps, padded_inputs
from electra_core.config import PRESETS, EncoderConfig, PretrainConfig
from electra_core.errors import first_line
from electra_core.execution.placement import autocast_context, resolve_device, resolve_precision
from electra_core.objectives import build_objective

OURS_COMPILED = "ours, compiled"
EAGER, SDPA, SDPA_COMPILED = (
    "transformers, masked states, eager attention", "transformers, masked states, SDPA",
    "transformers, masked states, SDPA, compiled",
)  # fmt: skip
PROGRAMS = (OURS, OURS_EAGER, OURS_COMPILED, EAGER, SDPA, SDPA_COMPILED)
COMPILED = (OURS_COMPILED, SDPA_COMPILED)
ENGINES = {OURS_EAGER: "eager", OURS_COMPILED: "compile"}


@dataclass(frozen=True)
class Case:
    """One program at one shape."""

    model: str
    objective: str
    batch: int
    length: int
    program: str
    precision: str
    device: str
    threads: int
    steps: int
    """Optimizer steps per round."""

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.model}-{self.objective}-{self.batch}x{self.length}-{self.program}"

    @property
    def configs(self) -> tuple[EncoderConfig, PretrainConfig]:
        """The configurations of the discriminator and of the run."""
        preset = PRESETS[self.model]
        longest = max(self.length, preset.discriminator.max_position_embeddings)
        encoder = replace(
            preset.discriminator, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
            max_position_embeddings=longest,
        )  # fmt: skip
        changes = {"objective": self.objective, "batch_size": self.batch, "max_length": self.length}
        return encoder, replace(preset.pretrain, **changes)


def worker(case: Case, rounds: int) -> Iterator[Any]:
    """Answers for `harness.OwnProcess`: after checking, building and warming up how far its losses are from ours,
    then each round's seconds, last its memory; in the place of what fails a note, and then nothing more."""
    torch.set_num_threads(case.threads)
    device = resolve_device(case.device)
    use_device(device)
    try:
        before = _memory_now(device)
        difference = check_same(case, device)
        _forget_peak(device)
        loop = steps_of(case, device)
        take(loop, 2)
        yield {"difference": difference}
        for _ in range(rounds):
            begin = _clocks(device)
            take(loop, case.steps)
            yield [b - a for a, b in zip(begin, _clocks(device))]
        yield (_peak_memory(device) - before) / 2**20
    except Exception as error:  # out of memory, no compiler, ...: a row says so, and the other programs continue
        yield {"note": f"{type(error).__name__}: {first_line(error)}"[:200]}


def _clocks(device: torch.device) -> tuple[float, float]:
    wait_for(device)
    return time.perf_counter(), time.process_time()


def _memory_now(device: torch.device) -> int:
    """Bytes in use."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _of_status("VmRSS")


def _peak_memory(device: torch.device) -> int:
    """Most bytes in use since `_forget_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _of_status("VmHWM")


def _forget_peak(device: torch.device) -> None:
    """Resets the peak, because the memory of the check does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak to the present size


def _of_status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").split("\n")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def their_model(case: Case, encoder: EncoderConfig, pretrain: PretrainConfig) -> nn.Module:
    """The library's program for a case, not compiled."""
    peer = Peer("states", "eager" if case.program == EAGER else "sdpa")
    return HubMaskedLM(encoder, peer) if case.objective == "mlm" else HubElectra(encoder, pretrain, peer)


def steps_of(case: Case, device: torch.device) -> Iterator[object]:
    """The program's loop, one optimizer step for each item taken."""
    encoder, pretrain = case.configs
    dtype = resolve_precision(case.precision, device)
    autocast = autocast_context(device, dtype)
    batches = batches_like_text(encoder.vocab_size, case.batch, case.length, pretrain)
    if case.program in (OURS, OURS_EAGER, OURS_COMPILED):
        engine = run_engine(device, dtype, encoder) if case.program == OURS else ENGINES[case.program]
        model = build_objective(encoder, pretrain).to(device)
        return engine_steps(engine, model, batches, pretrain, device, autocast)
    theirs = their_model(case, encoder, pretrain).to(device)
    if case.program == SDPA_COMPILED:
        theirs.compile()
    padded = [{name: t.to(device) for name, t in padded_inputs(batch).items()} for batch in batches]
    return hub_steps(theirs, padded, pretrain, autocast)


def check_same(case: Case, device: torch.device) -> float:
    """Largest relative difference between a program's losses and ours, in fp32 without dropout.

    Raises:
        ValueError: it is above LOSS_TOLERANCE, or not a number.
    """
    encoder, pretrain = case.configs
    encoder = replace(encoder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if case.program in COMPILED:
        encoder = replace(encoder, num_hidden_layers=2)
        pretrain = replace(pretrain, generator_layers=2)
    batch = batches_like_text(encoder.vocab_size, 2, min(48, case.length), pretrain, 1)[0]
    batch, inputs = batch.to(device), {name: t.to(device) for name, t in padded_inputs(batch).items()}
    ours = build_objective(encoder, pretrain).to(device)
    seed = seed_tensor(1, device)
    output = ours(batch, seed)
    losses = [output.loss, output.mlm_loss, output.rtd_loss]
    if case.program in (OURS, OURS_EAGER):
        theirs = losses  # a graph replays the same function; tests/test_engine.py compares the engines' losses
    elif case.program == OURS_COMPILED:
        ours.compile()
        again = ours(batch, seed)
        theirs = [again.loss, again.mlm_loss, again.rtd_loss]
    else:
        model = their_model(case, encoder, pretrain).to(device)
        if case.program == SDPA_COMPILED:
            model.compile()
        theirs = losses_with_our_weights(ours, model, inputs, output, batch)
    difference = largest(relative(a, b) for a, b in zip(theirs, losses))
    if not difference <= LOSS_TOLERANCE:
        raise ValueError(f"computes other losses than ours (relative difference {difference:.2g}): not timed")
    return difference
