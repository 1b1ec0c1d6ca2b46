"""Models for downstream tasks, and their losses.

Each model is an encoder with a small head, whose parts are named as in the Hub's layout, so that a fine-tuned
model opens in other libraries:

| model | head | logits |
|---|---|---|
| `SequenceClassifier` | dropout, `classifier.dense`, GELU, dropout, `classifier.out_proj` on [CLS] | [N, C] |
| `TokenClassifier` | dropout, `classifier` on every token | [T, C] |
| `QuestionAnswerer` | `qa_outputs` on every token: scores as first and last of the answer | [T, 2] |
| `MultipleChoice` | `sequence_summary.summary`, GELU, dropout, `classifier` on [CLS] | [N] |

A regressor is a `SequenceClassifier` with one output. The original's classification head is one linear
layer (docs/deviations.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from electra_kernels.dispatch import is_fake
from electra_kernels.operators import without_autocast
from electra_kernels.rng import Seed, keep_mask, keep_scale, seed_tensor
from torch import Tensor, nn

from electra_core.config import EncoderConfig
from electra_core.encoder import Encoder
from electra_core.execution.filling import filled, filled_size, wants_filling
from electra_core.initialisation import started
from electra_core.packing import TokenBatch, check_packed

HEAD_PARTS = ("classifier", "qa_outputs", "sequence_summary")
HEAD_STREAM = 1 << 18  # of the random numbers for a head's dropout: above those of any encoder
UNLABELLED = -100
"""Target of a token without a label (`torch.nn.functional.cross_entropy` ignores it by default)."""


class TaskModel(nn.Module):
    """Base class of the four models.

    Args:
        config: the encoder's sizes.
        labels: names of the classes, in the order of the outputs.
        encoder: a pre-trained encoder to build on; None: a new one (`initialisation.started`).
        classifier_dropout: dropout in the head; None: the encoder's hidden_dropout_prob.

    Raises:
        ValueError: `labels` is not a list of names.
    """

    architecture: ClassVar[str]
    """The Hub's name for this kind of model, for config.json."""
    per_token: ClassVar[bool] = False
    """Whether the logits' rows are tokens; otherwise they are sequences."""
    output_layer: ClassVar[str] = "classifier"
    """Name of the layer whose rows are the outputs."""
    encoder_class: ClassVar[type[Encoder]] = Encoder

    def __init__(
        self,
        config: EncoderConfig,
        labels: Sequence[str] = (),
        encoder: Encoder | None = None,
        classifier_dropout: float | None = None,
    ):
        super().__init__()
        names = tuple(labels) if isinstance(labels, Iterable) else (None,)
        if isinstance(labels, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"labels: expected a list of names, got {labels!r}")
        self.config, self.labels = config, names
        self.encoder = encoder if encoder is not None else started(self.encoder_class(config))
        self.classifier_dropout = classifier_dropout

    @property
    def head_dropout(self) -> float:
        """The dropout probability that the head uses."""
        return self.config.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    def _drop(self, values_RD: Tensor, seed: Seed | None, place: int = 0) -> Tensor:
        """Dropout in training; its decisions are a function of (seed, place in the head, row, feature)."""
        dropout_p = self.head_dropout
        if not self.training or seed is None or dropout_p == 0.0:
            return values_RD
        key, rows_R = seed_tensor(seed, values_RD.device), torch.arange(len(values_RD), device=values_RD.device)
        keep_RD = keep_mask(key, rows_R, values_RD.shape[1], dropout_p, HEAD_STREAM + place)
        return values_RD * keep_RD * keep_scale(dropout_p)

    def _hidden(self, batch: TokenBatch, seed: Seed | None, rows_R: Tensor | None = None) -> Tensor:
        """Hidden states of the batch's tokens, [T or more, D]; further rows are filling (`execution/filling.py`).
        With `rows_R`, only of these rows, [R, D]."""
        check_packed(batch)
        return self.encoder(filled(batch) if wants_filling(batch.input_ids_T) else batch, seed, rows_R)

    def _cls(self, batch: TokenBatch, seed: Seed | None) -> Tensor:
        """[N, D]: the hidden state of each sequence's [CLS]."""
        check_packed(batch)
        rows_N = batch.cu_seqlens[:-1]
        if wants_filling(batch.input_ids_T):  # the last layer's products, too, then have one of a few shapes
            rows_N = F.pad(rows_N, (0, filled_size(len(rows_N)) - len(rows_N)))
        return self._hidden(batch, seed, rows_N)[: batch.num_sequences]


class ClassificationHead(nn.Module):
    """The two linear layers of `SequenceClassifier`'s head."""

    def __init__(self, width: int, num_labels: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, num_labels)


class SequenceClassifier(TaskModel):
    """Classifies a text or a pair of texts; with one label, predicts a number.

    Args:
        multi_label: whether a text may have any number of the labels. The computation is the same; config.json
            records it, to tell other libraries what the logits mean and which loss to use.
    """

    architecture = "ElectraForSequenceClassification"
    output_layer = "classifier.out_proj"

    def __init__(
        self,
        config: EncoderConfig,
        labels: Sequence[str] = ("0", "1"),
        *,
        multi_label: bool = False,
        **more: Any,
    ):
        super().__init__(config, labels, **more)
        self.multi_label = multi_label
        self.classifier = ClassificationHead(config.hidden_size, len(self.labels))
        initialise_head(self)

    def forward(self, batch: TokenBatch, seed: Seed | None = None) -> Tensor:
        """Logits [N, C]."""
        hidden_ND = self._drop(self._cls(batch, seed), seed, 0)
        hidden_ND = self._drop(F.gelu(self.classifier.dense(hidden_ND)), seed, 1)
        if len(self.labels) == 1 and not self.training:  # a number, of which bf16 would keep only 8 bits
            with without_autocast(hidden_ND):
                return self.classifier.out_proj(hidden_ND.to(self.classifier.out_proj.weight.dtype))
        return self.classifier.out_proj(hidden_ND)


class TokenClassifier(TaskModel):
    """Predicts a tag for every token."""

    architecture = "ElectraForTokenClassification"
    per_token = True

    def __init__(self, config: EncoderConfig, labels: Sequence[str] = ("0", "1"), **more: Any):
        super().__init__(config, labels, **more)
        self.classifier = nn.Linear(config.hidden_size, len(self.labels))
        initialise_head(self)

    def forward(self, batch: TokenBatch, seed: Seed | None = None) -> Tensor:
        """Logits [T, C]."""
        return self.classifier(self._drop(self._hidden(batch, seed), seed))[: batch.num_tokens]


class QuestionAnswerer(TaskModel):
    """Predicts where in a text the answer begins and ends."""

    architecture = "ElectraForQuestionAnswering"
    output_layer = "qa_outputs"
    per_token = True

    def __init__(self, config: EncoderConfig, labels: Sequence[str] = (), **more: Any):
        super().__init__(config, labels, **more)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        initialise_head(self)

    def forward(self, batch: TokenBatch, seed: Seed | None = None) -> Tensor:
        """Logits [T, 2], for being the answer's first and last token."""
        return self.qa_outputs(self._hidden(batch, seed))[: batch.num_tokens]


class SequenceSummary(nn.Module):
    """The linear layer of `MultipleChoice`'s head, under the Hub's name for it."""

    def __init__(self, width: int):
        super().__init__()
        self.summary = nn.Linear(width, width)


class MultipleChoice(TaskModel):
    """Scores each ending; the sequences of one question compete (`choice_loss`)."""

    architecture = "ElectraForMultipleChoice"

    def __init__(self, config: EncoderConfig, labels: Sequence[str] = (), **more: Any):
        super().__init__(config, labels, **more)
        self.sequence_summary = SequenceSummary(config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)
        initialise_head(self)

    def forward(self, batch: TokenBatch, seed: Seed | None = None) -> Tensor:
        """Logits [N], one per sequence."""
        summary_ND = F.gelu(self.sequence_summary.summary(self._cls(batch, seed)))
        return self.classifier(self._drop(summary_ND, seed)).squeeze(-1)


def is_head(name: str, module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the module with this name is a linear layer of a task model's head."""
    return isinstance(module, nn.Linear) and name.partition(".")[0] in HEAD_PARTS


def initialise_head(model: TaskModel, seed: int | None = None) -> None:
    """Glorot uniform weights and zero biases for the head's linear layers, in place.

    The original leaves its heads at its framework's default, which is Glorot's.

    Args:
        seed: None: use torch's global generator.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed % 2**63)
    for name, module in model.named_modules():
        if is_head(name, module) and not is_fake(module.weight):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def classification_loss(logits_NC: Tensor, labels_N: Tensor, class_weights_C: Tensor | None = None) -> Tensor:
    """Cross-entropy, a scalar: mean over the sequences, weighted by their classes' weights if given."""
    return F.cross_entropy(logits_NC.float(), labels_N, weight=class_weights_C)


def multilabel_loss(logits_NC: Tensor, labels_NC: Tensor) -> Tensor:
    """Binary cross-entropy, a scalar: mean over sequences and labels.

    The same as `BCEWithLogitsLoss` in `transformers` (`loss_utils.ForSequenceClassificationLoss`).

    Args:
        labels_NC: 1 where a sequence has the label, otherwise 0; any dtype.
    """
    return F.binary_cross_entropy_with_logits(logits_NC.float(), labels_NC.float())


def regression_loss(logits_N1: Tensor, values_N: Tensor) -> Tensor:
    """Mean squared error, a scalar."""
    return F.mse_loss(logits_N1.float().squeeze(-1), values_N.float())


def tagging_loss(logits_TC: Tensor, tags_T: Tensor) -> Tensor:
    """Cross-entropy, a scalar: mean over the tokens that have a tag (are not `UNLABELLED`)."""
    summed = F.cross_entropy(logits_TC.float(), tags_T, ignore_index=UNLABELLED, reduction="sum")
    return summed / (tags_T != UNLABELLED).sum().clamp(min=1)  # a batch may hold no tagged token


def span_loss(logits_T2: Tensor, spans_N2: Tensor, batch: TokenBatch) -> Tensor:
    """Mean cross-entropy of the answer's first and last token, each among its sequence's tokens.

    Args:
        spans_N2: first and last token of the answer, counted from the sequence's start; (0, 0), the [CLS], if the
            sequence holds no answer. Filling sequences after the N do not count.
    """
    count, filling = len(spans_N2), batch.num_sequences - len(spans_N2)
    targets_N2 = F.pad(spans_N2, (0, 0, 0, filling)) + batch.cu_seqlens[:-1, None]
    return grouped_cross_entropy(logits_T2.float(), batch.lengths.long(), targets_N2)[:count].mean()


def choice_loss(logits_N: Tensor, right_U: Tensor, unit_starts: Tensor) -> Tensor:
    """Mean cross-entropy of the right ending among each question's endings, however many there are."""
    targets_U1 = (unit_starts[:-1] + right_U)[:, None]
    return grouped_cross_entropy(logits_N.float()[:, None], unit_starts.diff(), targets_U1).mean()


def grouped_cross_entropy(scores_RC: Tensor, rows_G: Tensor, targets_GC: Tensor) -> Tensor:
    """-log softmax within groups of rows, for C independent columns of scores.

    Args:
        scores_RC: scores of R rows.
        rows_G: int64, number of rows in each of the G groups, which follow one another.
        targets_GC: int64, the target row of each group, as an index into all R.

    Returns:
        [G, C]: log-sum-exp of the group's scores minus the target's score.
    """
    group_R = torch.repeat_interleave(rows_G, output_size=len(scores_RC))  # so the host need not ask a GPU
    index_RC = group_R[:, None].expand_as(scores_RC)
    peak_GC = scores_RC.new_full(targets_GC.shape, -torch.inf)
    peak_GC = peak_GC.scatter_reduce(0, index_RC, scores_RC.detach(), "amax")
    shifted_RC = (scores_RC - peak_GC[group_R]).exp()
    # Not `index_add`, whose order of additions on a GPU is undefined.
    sums_GC = torch.segment_reduce(shifted_RC, "sum", lengths=rows_G, unsafe=True)
    return sums_GC.log() + peak_GC - scores_RC.gather(0, targets_GC)
