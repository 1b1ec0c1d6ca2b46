"""The figures in a row of the log about training since the previous row: losses, speed, memory, data wait."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.files.unix import resource
from electra_core.flops import training_step_flops
from electra_core.training import StepResult

Parts = TypeVar("Parts")

# Dense bf16 products with fp32 sums, in FLOP/s, from NVIDIA's data sheets; the first matching name counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12,
}  # fmt: skip


class Meter:
    """Sums of a run's figures since the last row of the log; they stay on the device until they are read.

    Args:
        tokens: number of tokens the run has seen so far.
        flops_per_token: training FLOPs per token, by modern counting (`flops_per_token`).
        device: the device whose memory and peak are reported.
        devices: number of devices that train together; the figures are those of all of them.
    """

    def __init__(self, tokens: int, flops_per_token: float, device: torch.device, devices: int = 1) -> None:
        self._tokens, self._flops_per_token, self._device = tokens, flops_per_token, device
        self._peak = peak_flops(device, devices)
        self._names: list[str] = []
        self._waiting: Tensor | None = None
        self._of_steps_taken: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Begins the next row."""
        self._sums: dict[str, float] = {}
        self._steps, self._since = 0, time.monotonic()
        self._data_seconds = 0.0

    def timing(self, batches: Callable[[int], Parts]) -> Callable[[int], Parts]:
        """`batches`, with its time counted as waiting for data."""

        def timed(step: int) -> Parts:
            begin = time.monotonic()
            parts = batches(step)
            self._data_seconds += time.monotonic() - begin
            return parts

        return timed

    def leave_out(self, begin: float) -> None:
        """Excludes the time since `begin` (of `time.monotonic`), which was not spent on training."""
        self._since += time.monotonic() - begin

    def add(self, result: StepResult) -> None:
        """Adds a step. Of a skipped one only the tokens count: a single NaN would make the whole row NaN.

        Raises:
            ValueError: the step's figures have other names than those before.
        """
        self._steps += 1
        names = [*result.figures, "skipped"]
        self._names = self._names or names
        if names != self._names:
            odd = sorted(set(names) ^ set(self._names))
            raise ValueError(f"PretrainOutput.more: expected the same names in every step, got {odd} in some only")
        figures = torch.stack([*result.figures.values(), result.skipped.float()]).double()
        if self._of_steps_taken is None:  # the columns of means; made once, as it is copied to the device
            means = [name not in ("tokens", "skipped") for name in self._names]
            self._of_steps_taken = torch.tensor(means, device=figures.device)
        figures = torch.where(result.skipped & self._of_steps_taken, 0.0, figures)
        self._waiting = figures if self._waiting is None else self._waiting + figures

    @property
    def tokens(self) -> int:
        """Number of tokens the run has seen since its beginning."""
        self._settle()
        return self._tokens

    def row(self, result: StepResult) -> dict[str, Any]:
        """The next row of the log, which ends with the step of `result`; then begins a new one.

        Losses are means over the row's steps without skipped ones. `data_wait` is the share of time spent on
        batches, `memory_mb` the peak memory since the start, `mfu` the share of the chip's peak FLOP/s where that
        is known (counting sequences as full).
        """
        self._settle()
        seconds = max(time.monotonic() - self._since, 1e-9)
        tokens, skipped = self._sums.pop("tokens"), int(self._sums.pop("skipped"))
        row: dict[str, Any] = {
            "tokens": self._tokens,
            "tokens_per_second": tokens / seconds,
            "data_wait": round(self._data_seconds / seconds, 4),
            "memory_mb": round(_peak_memory_mb(self._device)),
            "skipped_steps": skipped,
        }
        if self._peak is not None:
            row["mfu"] = round(self._flops_per_token * tokens / seconds / self._peak, 4)
        taken = self._steps - skipped
        row |= {name: value / taken if taken else math.nan for name, value in self._sums.items()}
        row |= {"gradient_norm": float(result.gradient_norm), "learning_rate": result.learning_rate}
        self.reset()
        return row

    def _settle(self) -> None:
        """Waits for the device and copies the sums from it to the host."""
        if self._waiting is not None:
            arrived = dict(zip(self._names, self._waiting.tolist()))
            self._sums = {name: self._sums.get(name, 0.0) + value for name, value in arrived.items()}
            self._tokens += int(arrived["tokens"])
            self._waiting = None


def flops_per_token(encoder: EncoderConfig, config: PretrainConfig) -> float:
    """Training FLOPs per token of full sequences, by modern counting (`flops.py`)."""
    return training_step_flops(encoder, config) / (config.batch_size * config.max_length)


def peak_flops(device: torch.device, devices: int = 1) -> float | None:
    """The peak dense bf16 FLOP/s of so many GPUs by their data sheet; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * devices for part, peak in PEAK_FLOPS.items() if _is_named(name, part)), None)


def _is_named(name: str, part: str) -> bool:
    """Whether a GPU's name contains `part` as whole words (L4 is not in L40) and is not a lesser variant, nor a
    slice of the GPU (MIG, named at the end)."""
    return re.search(rf"\b{part}\b(?! (Laptop|D\b|NVL)|.*\bMIG\b)", name) is not None


def _peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far, in MB (10^6 bytes): torch's on a GPU, otherwise this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e6
