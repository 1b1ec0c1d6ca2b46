"""Runs an exported model with onnxruntime; `predict.Predictor` takes one in place of a PyTorch model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from electra_core.errors import UserError
from electra_core.labelled_data.features import Features, sorted_batches
from electra_core.packing import to_padded
from electra_core.runs.progress import Progress
from electra_core.tasks import MultipleChoice, TaskModel

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""The graph's inputs (`onnx_export.py`), int64 [N, S] each."""
TOKENS_PER_BATCH = 4096  # padding included; sequences are sorted, so there is little


class OnnxModel:
    """The graph of a NAME.onnx, on the CPU.

    Args:
        kind: class of the model that it was exported from.

    Raises:
        UserError: as `open_session`.
    """

    def __init__(self, file: Path, kind: type[TaskModel]):
        self.session, self.kind = open_session(str(file)), kind

    def logits(self, features: Features, bar: Progress | None = None) -> list[np.ndarray]:
        """Logits of every unit, as from `predict.run_model`."""
        outputs: list[np.ndarray] = [np.empty(0)] * len(features)
        per_token = self.kind.per_token
        for units in sorted_batches(features.lengths, TOKENS_PER_BATCH):
            batch = features.batch(units)
            tokens = batch.tokens
            mask = to_padded(tokens.input_ids_T.new_ones(tokens.num_tokens), tokens)
            padded = (to_padded(tokens.input_ids_T, tokens), mask, to_padded(tokens.segment_ids_T, tokens))
            (logits,) = self.session.run(["logits"], {k: v.numpy() for k, v in zip(INPUTS, padded)})
            if per_token:
                logits = logits[mask.numpy().astype(bool)]
            elif issubclass(self.kind, MultipleChoice):
                logits = logits[:, 0]
            starts = tokens.cu_seqlens[batch.unit_starts] if per_token else batch.unit_starts
            for unit, (start, stop) in zip(units.tolist(), itertools.pairwise(starts.tolist())):
                outputs[unit] = logits[start:stop]
            if bar is not None:
                bar.update(tokens.num_tokens)
        return outputs


def open_session(model: bytes | str) -> Any:
    """An onnxruntime session on the CPU, from a file's name or contents.

    Raises:
        UserError: onnxruntime is not installed, or cannot run the model.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError("running ONNX models needs: pip install 'electra-core[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's own exceptions, of many kinds
        name = model if isinstance(model, str) else "the exported graph"
        raise UserError(f"{name}: not a model that onnxruntime can run ({str(error)[:200]})") from None
