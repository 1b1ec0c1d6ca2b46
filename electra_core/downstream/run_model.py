"""A task's model over many sequences: sorted by length, packed up to a number of tokens, back in their order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from electra_core.errors import UserError
from electra_core.execution.placement import autocast_context
from electra_core.execution.torch_state import usual_tensors
from electra_core.labelled_data.features import Features, TaskBatch, sorted_batches
from electra_core.runs.progress import Progress
from electra_core.tasks import TaskModel

TOKENS_PER_BATCH = 8192
GPU_TOKENS_PER_BATCH = 32768  # the host needs as long for a small batch as for a large one


@torch.inference_mode()
@usual_tensors()
def run_model(
    model: TaskModel,
    features: Features,
    *,
    tokens_per_batch: int | None = None,
    precision: torch.dtype = torch.float32,
    bar: Progress | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[np.ndarray]:
    """The logits (fp32) of every unit, in the order of `features`.

    Args:
        model: put into evaluation mode during the call.
        tokens_per_batch: maximum, except for a single longer unit; None: 8,192, or 32,768 on a GPU.
        precision: torch.bfloat16 means autocast.
        share: (i, n): compute every n-th batch from the i-th on; the units of all others get empty arrays.

    Returns:
        Per unit: [1, C] from a classifier, [tokens, C] from a tagger, [tokens, 2] from a question answerer,
        [choices] from a multiple-choice model.
    """
    device = next(model.parameters()).device
    if tokens_per_batch is None:
        tokens_per_batch = GPU_TOKENS_PER_BATCH if device.type == "cuda" else TOKENS_PER_BATCH
    was_training = model.training
    model.eval()
    outputs: list[np.ndarray] = [np.empty(0)] * len(features)

    def take(units: np.ndarray, batch: TaskBatch, logits: Tensor) -> None:
        hand_out(outputs, units, batch, logits.cpu().numpy(), model.per_token)  # waits for a GPU
        if bar is not None:
            bar.update(batch.tokens.num_tokens)

    before: tuple[np.ndarray, TaskBatch, Tensor] | None = None
    for units in itertools.islice(sorted_batches(features.lengths, tokens_per_batch), share[0], None, share[1]):
        batch = features.batch(units)
        with autocast_context(device, precision):
            logits = model(batch.tokens.to(device, non_blocking=True)).float()
        if before is not None:
            take(*before)  # one batch late, so that a GPU has the next to work on
        before = units, batch, logits
    if before is not None:
        take(*before)
    model.train(was_training)
    return outputs


def check_finite(outputs: Sequence[np.ndarray], why: str) -> None:
    """Raises UserError for logits that are NaN or infinite: a class would be read from them all the same, and a
    plausible figure from the classes. (-inf may be a task's own mask.)

    Args:
        outputs: as from `run_model`.
        why: what it may come from, or what to do.
    """
    if lost := sum(not (logits < np.inf).all() for logits in outputs):
        raise UserError(
            f"the model's outputs for {lost:,} of {len(outputs):,} sequences are not finite numbers; {why}"
        )


def hand_out(
    outputs: list[np.ndarray], units: np.ndarray, batch: TaskBatch, rows: np.ndarray, per_token: bool
) -> None:
    """Puts a batch's logits, a row for each token or each sequence, in the places of its units in `outputs`."""
    starts = batch.tokens.cu_seqlens[batch.unit_starts] if per_token else batch.unit_starts
    for unit, (start, stop) in zip(units.tolist(), itertools.pairwise(starts.tolist())):
        outputs[unit] = rows[start:stop]
