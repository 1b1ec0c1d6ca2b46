"""Derives the sizes that are not given: heads from the width, the generator's sizes from the discriminator's.

As in the original (util/training_utils.py `get_bert_config`, run_pretraining.py `get_generator_config`), with the
proportions of the preset. The paper's presets have the original's: heads 64 wide, a feed-forward block four times
the width, embeddings as wide as the layers (Small: 128), a generator as deep and with a fixed fraction of the
width. `tiny` has its own: heads of 32, of 16 in the generator, and a generator a quarter as deep.
"""

from __future__ import annotations

from typing import Any

from electra_core.config import Preset

Changes = dict[str, Any]


def with_followers(preset: Preset, changes: Changes, encoder_changes: Changes) -> tuple[Changes, Changes]:
    """Both sets of changes, completed with every size they lack. `updated` rejects values of wrong types later.

    Args:
        changes: the given fields of `PretrainConfig`.
        encoder_changes: the given fields of the discriminator's `EncoderConfig`.
    """
    encoder, run = preset.discriminator, preset.pretrain
    generator = preset.generator()
    own, narrow = _underscored(encoder_changes), _underscored(changes)

    hidden = _size(own, "hidden_size", encoder.hidden_size)
    layers = _size(own, "num_hidden_layers", encoder.num_hidden_layers)
    own.setdefault("num_attention_heads", _heads(hidden, encoder.head_size))
    own.setdefault("intermediate_size", _part(hidden, encoder.intermediate_size, encoder.hidden_size))
    if encoder.embedding_size == encoder.hidden_size:
        own.setdefault("embedding_size", hidden)

    narrow.setdefault("generator_hidden_size", _part(hidden, generator.hidden_size, encoder.hidden_size))
    narrow.setdefault("generator_layers", _part(layers, run.generator_layers, encoder.num_hidden_layers))
    width = _size(narrow, "generator_hidden_size", generator.hidden_size)
    narrow.setdefault("generator_attention_heads", _heads(width, generator.head_size))
    narrow.setdefault(
        "generator_intermediate_size", _part(width, generator.intermediate_size, generator.hidden_size)
    )
    return narrow, own


def _underscored(values: Changes) -> Changes:
    return {name.replace("-", "_"): value for name, value in values.items()}


def _size(values: Changes, name: str, default: int) -> int:
    value = values.get(name, default)
    return value if type(value) is int and value >= 1 else default


def _heads(hidden: int, head_size: int) -> int:
    """As many heads as fit at `head_size`; if these do not divide the width, the next smaller number that does."""
    return next(heads for heads in range(max(1, hidden // head_size), 0, -1) if hidden % heads == 0)


def _part(size: int, part: int, whole: int) -> int:
    """`size` times `part` / `whole`, rounded."""
    return max(1, round(size * part / whole))
