"""torch's settings for a whole process that a caller may have changed, and that training and loading rely on.

A notebook's earlier cell may have turned gradients off, or made float64 or a GPU the default. The functions are
contexts, and as decorators hold for a function. `buffers_kept` is about a model: what is computed on trial leaves
no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def usual_tensors() -> Iterator[None]:
    """A context in which new tensors are fp32 and on the CPU unless said otherwise, whatever
    `torch.set_default_dtype` and `torch.set_default_device` have been given."""
    before, there = torch.get_default_dtype(), torch.get_default_device()
    with nullcontext() if there.type == "cpu" else torch.device("cpu"):
        if before == torch.float32:  # other threads see a change
            yield
            return
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def for_training() -> Iterator[None]:
    """For training: `usual_tensors`, with gradients even inside `torch.no_grad`, `inference_mode`, `autocast`."""
    with usual_tensors(), torch.inference_mode(False), torch.enable_grad(), outside_autocast():
        yield


@contextmanager
def outside_autocast() -> Iterator[None]:
    """A context as outside of any `torch.autocast`; one that begins inside is an outermost one.

    `torch.autocast(..., enabled=False)` would not do. Only the end of an outermost one drops the copies that it
    made of parameters: in one inside another, all steps would compute with the copies of the first.
    """
    before = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    depth = 0
    while torch.autocast_decrement_nesting() >= 0:
        depth += 1
    torch.autocast_increment_nesting()
    try:
        for device in before:
            torch.set_autocast_enabled(device, False)
        yield
    finally:
        for device, enabled in before.items():
            torch.set_autocast_enabled(device, enabled)
        for _ in range(depth):
            torch.autocast_increment_nesting()


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """A context at whose end the model's buffers are those of before, with the same values at the same addresses.

    For forward passes on trial in training mode: they may write running statistics, a queue, a moving average.

    Yields:
        A function that names the buffers which since then are other tensors, instead of written in place.
    """
    kept = [
        (module, path, name, buffer, buffer.clone())
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]

    def replaced() -> list[str]:
        return [f"{path}.{name}".lstrip(".") for module, path, name, buffer, _ in kept
                if module._buffers.get(name) is not buffer]  # fmt: skip

    try:
        yield replaced
    finally:
        with torch.no_grad():
            for module, _, name, buffer, before in kept:
                module._buffers[name] = buffer.copy_(before)
