"""The Hub's ELECTRA layout: names of tensors, and the fields of config.json. No files are touched here.

ours                                    the Hub's
encoder.embeddings.*                    electra.embeddings.*
encoder.embeddings_project.*            electra.embeddings_project.*      (if embedding and hidden size differ)
encoder.layers.N.attention.qkv.*        electra.encoder.layer.N.attention.self.{query,key,value}.*
encoder.layers.N.attention.dense.*      electra.encoder.layer.N.attention.output.dense.*
encoder.layers.N.attention_norm.*       electra.encoder.layer.N.attention.output.LayerNorm.*
encoder.layers.N.intermediate.*         electra.encoder.layer.N.intermediate.dense.*
encoder.layers.N.output.*               electra.encoder.layer.N.output.dense.*
encoder.layers.N.output_norm.*          electra.encoder.layer.N.output.LayerNorm.*
output_bias                             generator_lm_head.bias
heads                                   the same names

An encoder with classes of the user's own (`changed_classes`) computes something else from such tensors. Its folder
is no ELECTRA: it has another `model_type` and the classes' names, and its further parameters keep our names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from electra_core.config import SIZES, EncoderConfig, updated
from electra_core.electra import Discriminator, Generator
from electra_core.encoder import Encoder
from electra_core.errors import UserError
from electra_core.tasks import MultipleChoice, SequenceClassifier, TaskModel

_IN_LAYER = {
    "attention.dense": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}

# Every head of the Hub's ELECTRA models. A model may be opened with another head than its file's.
HEADS = (
    "discriminator_predictions.", "generator_predictions.", "generator_lm_head.", "classifier.",
    "qa_outputs.", "sequence_summary.",
)  # fmt: skip

MULTI_LABEL = "multi_label_classification"
"""config.json's problem type for texts with any number of labels."""
REGRESSION = "regression"
"""config.json's problem type for numbers."""

ELECTRA, CHANGED = "electra", "changed-electra"
"""config.json's kind of model: the Hub's, and one whose encoder has other classes."""

# The defaults of `transformers`' ElectraConfig for missing fields (its model is "small").
HUB_DEFAULTS = EncoderConfig(
    embedding_size=128, hidden_size=256, num_attention_heads=4, intermediate_size=1024
)  # fmt: skip

# Larger than any existing model: a config.json beyond these is damaged or hostile.
_MOST, _MOST_LAYERS, _MOST_LABELS = 1 << 24, 1 << 10, 1 << 20


def hub_names(name: str) -> tuple[str, ...]:
    """The Hub's name of our parameter; three names, query, key and value, for a fused `qkv`. What a changed layer
    adds keeps its name."""
    if name == "output_bias":
        return ("generator_lm_head.bias",)
    if not name.startswith("encoder."):
        return (name,)
    parts = name.split(".")
    if parts[1] != "layers":
        return ("electra." + name.removeprefix("encoder."),)
    layer = f"electra.encoder.layer.{parts[2]}."
    module, kind = ".".join(parts[3:-1]), parts[-1]
    if module == "attention.qkv":
        return tuple(f"{layer}attention.self.{part}.{kind}" for part in ("query", "key", "value"))
    return (f"{layer}{_IN_LAYER[module]}.{kind}",) if module in _IN_LAYER else (name,)


def to_hub(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names -> the same tensors (views, nothing is copied) by the Hub's names."""
    hub: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        names = hub_names(name)
        hub.update(zip(names, parts(tensor, len(names))))
    return hub


def parts(tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    """The tensor's rows in `count` equal parts; a scalar is a single part."""
    return tensor.chunk(count) if count > 1 else (tensor,)


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the buffers that are saved. No model here has any, but a subclass may."""
    saved = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all that a model directory or a checkpoint holds of a model."""
    yield from model.named_parameters()
    yield from persistent_buffers(model)


def hub_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a model in the Hub's layout, and any buffers of a subclass.

    Raises:
        ValueError: as `architecture`.
    """
    architecture(model)
    ours = {name: p.detach() for name, p in saved_tensors(model)}
    encoder: Encoder = model.encoder  # type: ignore[assignment]
    # Disentangled embeddings are a sum of two matrices; the sum, in which tokens are looked up, is saved.
    ours["encoder.embeddings.word_embeddings.weight"] = encoder.embeddings.word_weight().detach()
    return to_hub(ours)


def architecture(model: nn.Module | type[nn.Module]) -> str:
    """The Hub's name for the model's class ("ElectraForPreTraining").

    Raises:
        ValueError: not a model of ours with a place in the Hub's layout.
    """
    kind = model if isinstance(model, type) else type(model)
    if issubclass(kind, Discriminator):
        return "ElectraForPreTraining"
    if issubclass(kind, Generator):
        return "ElectraForMaskedLM"
    if issubclass(kind, TaskModel):
        return kind.architecture
    raise ValueError(f"model: expected a Discriminator, Generator or task model, got {kind.__name__}")


def changed_classes(encoder: nn.Module) -> dict[str, str]:
    """Names of the classes of an encoder's modules that are neither ours nor torch's, by the modules' names."""
    kinds = {name: type(module) for name, module in encoder.named_modules()}
    known = "electra_core", "torch"
    return {name: kind.__name__ for name, kind in kinds.items() if kind.__module__.partition(".")[0] not in known}


def write_config(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of config.json for a model."""
    config: EncoderConfig = model.config  # type: ignore[assignment]
    changed = sorted({*changed_classes(model.encoder).values()})  # type: ignore[arg-type]
    fields: dict[str, Any] = dataclasses.asdict(config) | {
        "model_type": CHANGED if changed else ELECTRA,
        "architectures": [architecture(model)],
        "hidden_act": "gelu",
        "dtype": str(dtype).removeprefix("torch."),
        "classifier_dropout": getattr(model, "classifier_dropout", None),
        "summary_type": "first",
        "summary_use_proj": True,
        "summary_activation": "gelu",
        "summary_last_dropout": 0.1,
        "tie_word_embeddings": True,
        "is_decoder": False,
        "add_cross_attention": False,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if isinstance(model, MultipleChoice):
        fields["summary_last_dropout"], fields["classifier_dropout"] = model.head_dropout, None
    if labels := getattr(model, "labels", ()):
        fields["id2label"] = {str(index): label for index, label in enumerate(labels)}
        fields["label2id"] = {label: index for index, label in enumerate(labels)}
    if isinstance(model, SequenceClassifier) and model.multi_label:
        fields["problem_type"] = MULTI_LABEL
    elif isinstance(model, SequenceClassifier) and len(labels) == 1:
        fields["problem_type"] = REGRESSION  # otherwise the Hub's pipelines apply a sigmoid to the number
    return fields | ({"changed_classes": changed} if changed else {})


def read_config(raw: Mapping[str, Any], where: str) -> EncoderConfig:
    """The sizes in a config.json.

    Raises:
        UserError: another kind of model, an option that this implementation lacks, or an impossible value.
    """
    if not classes_named(raw, where):
        _expect(raw, "model_type", ELECTRA, where)
    for key, only in (
        ("hidden_act", "gelu"),
        ("position_embedding_type", "absolute"),
        ("is_decoder", False),
    ):
        _expect(raw, key, only, where)
    if not _are_names(names := raw.get("architectures") or []):
        raise UserError(f"{where}: architectures: expected a list of names, got {names!r:.80}")
    known = {field.name for field in dataclasses.fields(EncoderConfig)}
    given = {key: value for key, value in raw.items() if key in known}
    if given.get("pad_token_id", 0) is None:
        del given["pad_token_id"]
    _check_sizes(given, where)
    return updated(HUB_DEFAULTS, given, where)


def classes_named(raw: Mapping[str, Any], where: str) -> list[str]:
    """The classes of its user's own that the encoder described by a config.json has; none in an ELECTRA.

    Raises:
        UserError: a changed encoder's classes are not named.
    """
    if raw.get("model_type") != CHANGED:
        return []
    if not (names := raw.get("changed_classes")) or not _are_names(names):
        raise UserError(f"{where}: changed_classes: expected a list of names, got {names!r:.80}")
    return sorted(names)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _expect(raw: Mapping[str, Any], key: str, only: Any, where: str) -> None:
    if raw.get(key, only) != only:
        raise UserError(f"{where}: {key} is {raw[key]!r:.80}; only {only!r} is supported")


def _check_sizes(given: Mapping[str, Any], where: str) -> None:
    """Checks beyond those of `EncoderConfig`."""
    for key in (*SIZES, "pad_token_id"):
        most = _MOST_LAYERS if key == "num_hidden_layers" else _MOST
        least = 0 if key == "pad_token_id" else 1
        if isinstance(value := given.get(key), int) and not least <= value <= most:
            raise UserError(f"{where}: {key}: expected an integer from {least} to {most}, got {value!r:.80}")


def read_labels(raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The class names in a config.json, in order; the Hub's default is LABEL_0 and LABEL_1.

    Raises:
        UserError: id2label does not number its labels 0, 1, ..., or two have the same name.
    """
    table = raw.get("id2label")
    if table is None:
        count = raw.get("num_labels", 2)
        if not isinstance(count, int) or not 1 <= count <= _MOST_LABELS:
            expected = f"an integer from 1 to {_MOST_LABELS}"
            raise UserError(f"{where}: num_labels: expected {expected}, got {count!r:.80}")
        return tuple(f"LABEL_{index}" for index in range(count))
    numbers = {str(index) for index in range(len(table))} if isinstance(table, dict) else set()
    if not numbers or numbers != set(table):
        raise UserError(f'{where}: id2label: expected names for "0", "1", ... without a gap')
    for index, label in table.items():
        if not isinstance(label, (str, int)):
            raise UserError(f'{where}: id2label: expected a name for "{index}", got {label!r:.80}')
    labels = tuple(str(table[str(index)]) for index in range(len(table)))
    first: dict[str, int] = {}
    for index, label in enumerate(labels):
        if first.setdefault(label, index) < index:
            raise UserError(
                f"{where}: id2label: expected a name of its own for every output, got {label!r:.80} for "
                f'"{first[label]}" and "{index}"; rename one'
            )
    return labels
