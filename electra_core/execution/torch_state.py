"""torch's settings for a whole process that a caller may have changed, and that training and loading rely on.

A notebook's earlier cell may have turned gradients off or made float64 the default. Both functions are contexts,
and as decorators hold for a function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_fp32() -> Iterator[None]:
    """A context in which new parameters are fp32, whatever `torch.set_default_dtype` has been given."""
    before = torch.get_default_dtype()
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
    """For training: in fp32 and with gradients, even inside `torch.no_grad` or `torch.inference_mode`."""
    with in_fp32(), torch.inference_mode(False), torch.enable_grad():
        yield
