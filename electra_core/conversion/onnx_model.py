"""Runs an exported model with onnxruntime; `predict.Predictor` takes one in place of a PyTorch model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from electra_core.downstream.run_model import hand_out
from electra_core.errors import UserError
from electra_core.labelled_data.features import Features, sorted_batches
from electra_core.packing import to_padded
from electra_core.runs.progress import Progress
from electra_core.tasks import MultipleChoice, QuestionAnswerer, TaskModel
from electra_core.tokenizer import Tokenizer

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""The graph's inputs (`onnx_export.py`), int64 [N, S] each."""
TOKENS_PER_BATCH = 4096  # padding included; sequences are sorted, so there is little


class OnnxModel:
    """The graph of a NAME.onnx, on the CPU.

    Args:
        kind: class of the model that it was exported from.
        labels: number of its labels; 0 if its outputs have none.

    Raises:
        UserError: as `open_session`.
    """

    def __init__(self, file: Path, kind: type[TaskModel], labels: int):
        self.session, self.file, self.kind = open_session(str(file)), file, kind
        self.columns = columns_of(kind, labels)

    def check(self, tokenizer: Tokenizer) -> None:
        """Runs the graph on few tokens, and compares its number of words with the tokenizer's.

        Raises:
            UserError: its inputs or outputs are others than those of an exported model of this kind, it gives NaN,
                or the tokenizer has ids that the model lacks.
        """
        words, ones = tokenizer.vocab_size, np.ones((1, 3), dtype=np.int64)
        if not np.isfinite(self._run((0 * ones, ones, 0 * ones))).all():
            raise UserError(f"{self.file}: damaged, its logits are not finite numbers")
        known = self.session.get_modelmeta().custom_metadata_map.get("vocab_size", "")
        if re.fullmatch("[0-9]{1,9}", known):
            return tokenizer.check_fits(int(known), self.file)
        try:
            self._run(((words - 1) * ones, ones, 0 * ones))
        except UserError:
            raise UserError(
                f"{self.file}: vocabulary sizes differ: {words:,} in the tokenizer, fewer in the model"
            ) from None

    def logits(self, features: Features, bar: Progress | None = None) -> list[np.ndarray]:
        """Logits of every unit, as from `downstream.run_model`."""
        outputs: list[np.ndarray] = [np.empty(0)] * len(features)
        per_token = self.kind.per_token
        for units in sorted_batches(features.lengths, TOKENS_PER_BATCH):
            batch = features.batch(units)
            tokens = batch.tokens
            mask = to_padded(tokens.input_ids_T.new_ones(tokens.num_tokens), tokens)
            padded = (to_padded(tokens.input_ids_T, tokens), mask, to_padded(tokens.segment_ids_T, tokens))
            logits = self._run([part.numpy() for part in padded])
            if per_token:
                logits = logits[mask.numpy().astype(bool)]
            elif issubclass(self.kind, MultipleChoice):
                logits = logits[:, 0]
            hand_out(outputs, units, batch, logits, per_token)
            if bar is not None:
                bar.update(tokens.num_tokens)
        return outputs

    def _run(self, padded: Sequence[np.ndarray]) -> np.ndarray:
        """The graph's logits; UserError if it cannot be run or gives something else."""
        try:
            (logits,) = self.session.run(["logits"], dict(zip(INPUTS, padded)))
        except MemoryError:
            raise
        except Exception as error:  # the library's own exceptions, of many kinds
            raise UserError(f"{self.file}: the graph cannot be run ({error!s:.200})") from None
        shape = (*padded[0].shape[: 1 + self.kind.per_token], self.columns)
        if not isinstance(logits, np.ndarray) or logits.dtype.kind != "f" or logits.shape != shape:
            raise UserError(f"{self.file}: logits: expected floats of shape {list(shape)}, got {logits!r:.80}")
        return logits


def columns_of(kind: type[TaskModel], labels: int) -> int:
    """Number of logits of a token or a sequence; `labels`: number of the model's labels."""
    return 2 if issubclass(kind, QuestionAnswerer) else max(1, labels)


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
    except MemoryError:
        raise
    except Exception as error:  # the library's own exceptions, of many kinds
        name = model if isinstance(model, str) else "the exported graph"
        raise UserError(f"{name}: not a model that onnxruntime can run ({str(error)[:200]})") from None
