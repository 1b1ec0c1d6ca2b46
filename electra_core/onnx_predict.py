"""Predictions by an exported model, through onnxruntime: the same tasks, inputs and outputs as `predict.py`."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from electra_core.errors import UserError
from electra_core.features import Features, sorted_batches
from electra_core.named_tasks import TASK_FILE
from electra_core.onnx_export import INPUTS, open_session
from electra_core.packing import to_padded
from electra_core.predict import Predictor, load_task
from electra_core.progress import Progress
from electra_core.tokenizer import load_tokenizer

TOKENS_PER_BATCH = 4096  # of the padded rectangle; sequences are sorted, so little of it is padding


class OnnxPredictor(Predictor):
    """A model.onnx with the tokenizer and task.json that lie beside it.

    Raises:
        UserError: no such file, nothing beside it, or a library missing.
    """

    def __init__(self, file: str | Path):
        file = Path(file)
        if not file.is_file():
            raise UserError(f"{file}: there is no such file")
        if not (file.parent / TASK_FILE).exists():
            raise UserError(
                f"{file}: expected {TASK_FILE} and the tokenizer beside it, as electra export writes them"
            )
        self.session = open_session(str(file))
        self.task, self.tokenizer = load_task(file.parent), load_tokenizer(file.parent)
        self.truncated = 0

    def logits(self, features: Features, bar: Progress | None = None) -> list[np.ndarray]:
        """Logits of every unit, as `predict.run_model` gives them."""
        outputs: list[np.ndarray] = [np.empty(0)] * len(features)
        per_token = self.task.model_class.per_token
        for units in sorted_batches(features.lengths, TOKENS_PER_BATCH):
            batch = features.batch(units)
            tokens = batch.tokens
            mask = to_padded(tokens.input_ids_T.new_ones(tokens.num_tokens), tokens)
            padded = (to_padded(tokens.input_ids_T, tokens), mask, to_padded(tokens.segment_ids_T, tokens))
            (logits,) = self.session.run(["logits"], {k: v.numpy() for k, v in zip(INPUTS, padded)})
            if per_token:
                logits = logits[mask.numpy().astype(bool)]
            elif self.task.kind == "choose":
                logits = logits[:, 0]
            starts = tokens.cu_seqlens[batch.unit_starts] if per_token else batch.unit_starts
            for unit, (start, stop) in zip(units.tolist(), itertools.pairwise(starts.tolist())):
                outputs[unit] = logits[start:stop]
            if bar is not None:
                bar.update(tokens.num_tokens)
        return outputs
