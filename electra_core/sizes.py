"""Sizes that follow from others, where nobody gives them: heads from the width, the generator's from both.

As in the original (util/training_utils.py `get_bert_config`, run_pretraining.py `get_generator_config`), with the
proportions of the preset. The paper's presets have the original's: heads 64 wide, a feed-forward block four times
the width, words as wide as the layers (Small: 128), a generator as deep and with a fixed part of the width.
`tiny` has its own: heads of 32, in the generator of 16, and a generator a quarter as deep.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from electra_core.config import PRESETS, Preset
from electra_core.errors import UserError
from electra_core.run_folder import read_config

Changes = dict[str, Any]

LEADERS = ("hidden_size", "num_hidden_layers")
"""What the other sizes follow from."""
FOLLOWERS = (
    "num_attention_heads", "intermediate_size", "embedding_size", "generator_hidden_size", "generator_layers",
    "generator_attention_heads", "generator_intermediate_size",
)  # fmt: skip
"""Sizes that follow from others; the generator's last two from its width."""


def with_followers(preset: Preset, changes: Changes, encoder_changes: Changes) -> tuple[Changes, Changes]:
    """Both, with a value for every size that is not among them. Values of other types are left to `updated`.

    Args:
        changes: fields of `PretrainConfig` that are given.
        encoder_changes: fields of the discriminator's `EncoderConfig` that are given.
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


def as_begun(run: Path, model: str, changes: Changes, encoder_changes: Changes) -> tuple[Changes, Changes]:
    """Both, with RUN's own sizes for those that follow from others, are not given, and follow from the same.

    RUN may have been begun by a version in which fewer sizes followed from others.
    """
    begun = _begun_with(run)
    if begun is None or model not in PRESETS or begun[0].get("model") != model:
        return changes, encoder_changes
    narrow, own = _underscored(changes), _underscored(encoder_changes)
    encoder = PRESETS[model].discriminator
    asked = {"hidden_size": encoder.hidden_size, "num_hidden_layers": encoder.num_hidden_layers, **narrow, **own}
    sizes = begun[0] | begun[1]
    if any(asked.get(name, sizes.get(name)) != sizes.get(name) for name in (*LEADERS, *FOLLOWERS)):
        return changes, encoder_changes
    theirs = ({name: values[name] for name in FOLLOWERS if name in values} for values in begun)
    return next(theirs) | narrow, next(theirs) | own


def _begun_with(run: Path) -> tuple[Changes, Changes] | None:
    """The configuration that a run has written down, if it can be read; None if no run was begun there.

    (Before that, a user's own file of the same name may lie there.)
    """
    if not (run / "checkpoints").is_dir():
        return None
    try:
        return read_config(run / "config.toml")
    except UserError:
        return None


def _underscored(values: Changes) -> Changes:
    return {name.replace("-", "_"): value for name, value in values.items()}


def _size(values: Changes, name: str, default: int) -> int:
    value = values.get(name, default)
    return value if type(value) is int and value >= 1 else default


def _heads(hidden: int, head_size: int) -> int:
    """As many as the original has; where these do not divide the width, as many fewer as it takes."""
    return next(heads for heads in range(max(1, hidden // head_size), 0, -1) if hidden % heads == 0)


def _part(size: int, part: int, whole: int) -> int:
    """`size` times `part` / `whole`, rounded."""
    return max(1, round(size * part / whole))
