"""The pair of models that pre-training continues from: a run adopts their sizes, and may have more positions."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from electra_core.config import GENERATOR_SIZES, PRESETS, EncoderConfig, PretrainConfig, generator_config
from electra_core.errors import UserError, option
from electra_core.hub.layout import saved_tensors
from electra_core.model_dir import find_model, load_config, load_pair
from electra_core.objectives import build_objective

log = logging.getLogger("electra_core")
Changes = dict[str, Any]
SHARED = ("embedding_size", "max_position_embeddings", "type_vocab_size")


@dataclass(frozen=True)
class StartPair:
    """Both models' sizes, from their config.json."""

    discriminator: EncoderConfig
    generator: EncoderConfig

    @property
    def encoder_changes(self) -> Changes:
        """Fields of the discriminator's `EncoderConfig`."""
        return {name: getattr(self.discriminator, name) for name in (*SHARED, *GENERATOR_SIZES)}

    @property
    def changes(self) -> Changes:
        """Fields of `PretrainConfig`."""
        return {ours: getattr(self.generator, name) for name, ours in GENERATOR_SIZES.items()}

    @property
    def preset(self) -> str:
        """The first preset with these layers, else small."""

        def sizes(encoder: EncoderConfig) -> list[int]:
            return [getattr(encoder, name) for name in ("embedding_size", *GENERATOR_SIZES)]

        ours = sizes(self.discriminator), sizes(self.generator)
        for name, preset in PRESETS.items():
            if (sizes(preset.discriminator), sizes(preset.generator())) == ours:
                return name
        return "small"

    @property
    def flags(self) -> str:
        """The command-line flags that request these sizes."""
        return " ".join(
            f"--{name.replace('_', '-')} {value}" for name, value in (self.encoder_changes | self.changes).items()
        )


def read_pair(discriminator: Path | str | None, generator: Path | str | None) -> StartPair | None:
    """Sizes of a pair; None without one, or if it cannot be read, which loading it will report."""
    if discriminator is None or generator is None:
        return None
    try:
        sources = find_model(discriminator, "discriminator"), find_model(generator, "generator")
        return StartPair(*(load_config(source)[0] for source in sources))
    except UserError:
        return None


def with_pair_sizes(
    model: str | None, changes: Changes, encoder_changes: Changes, pair: StartPair | None, *, tell: bool
) -> tuple[str, Changes, Changes]:
    """The preset and both kinds of changes; without a named preset, the pair's, with its sizes unless given."""
    if model is not None or pair is None:
        return model or "small", changes, encoder_changes
    given = {name.replace("-", "_") for name in (*changes, *encoder_changes)}
    taken = {name: size for name, size in pair.encoder_changes.items() if name not in given}
    of_generator = {name: size for name, size in pair.changes.items() if name not in given}
    if tell:
        said = ", ".join(f"{name} {size}" for name, size in (taken | of_generator).items())
        log.info(
            f"starting from a pair: as {option('model', pair.preset)}, with the pair's sizes: {said or 'given'}"
        )
    return pair.preset, of_generator | changes, taken | encoder_changes


def check_sizes(pair: StartPair, encoder: EncoderConfig, config: PretrainConfig) -> None:
    """Raises UserError if a run's sizes differ from the pair's; more positions are allowed."""
    ours = StartPair(encoder, generator_config(encoder, config))
    asked, found = ours.encoder_changes | ours.changes, pair.encoder_changes | pair.changes
    differing = [
        f"{name} {found[name]}, not {size}"
        for name, size in asked.items()
        if size != found[name] and not (name == "max_position_embeddings" and size > found[name])
    ]
    if differing:
        raise UserError(
            f"{option('init_discriminator')}: the pair has {'; '.join(differing)}; leave out "
            f"{option('model')} to use the pair's sizes, or set them with {pair.flags}"
        )


@torch.no_grad()
def start_from_pair(
    model: nn.Module,
    encoder: EncoderConfig,
    config: PretrainConfig,
    discriminator: Path | str,
    generator: Path | str,
) -> None:
    """Copies the pair's weights into `model`, in place.

    Positions beyond the pair's last one start as a repetition of the pair's: heads that look at neighbours then
    work at once, except where two repetitions meet (Beltagy, Peters and Cohan 2020, Longformer, section 5).

    Args:
        encoder, config: the configurations that `model` was built from.

    Raises:
        UserError: as `model_dir.load_pair`.
    """
    pair = read_pair(discriminator, generator)
    fewest = pair.discriminator.max_position_embeddings if pair else encoder.max_position_embeddings
    if fewest >= encoder.max_position_embeddings:
        return load_pair(model, discriminator, generator)  # type: ignore[arg-type]
    log.warning(
        f"{option('max_position_embeddings', encoder.max_position_embeddings)}: the pair has {fewest}; the others "
        f"start as a repetition of these and are learned up to {option('max_length')}"
    )
    shorter = build_objective(replace(encoder, max_position_embeddings=fewest), config)
    load_pair(shorter, discriminator, generator)  # type: ignore[arg-type]
    for (_, ours), (_, theirs) in zip(saved_tensors(model), saved_tensors(shorter), strict=True):
        if ours.shape == theirs.shape:
            ours.copy_(theirs)
        elif isinstance(ours, nn.Parameter):  # positions; a buffer of another size stays as it was made
            ours.copy_(theirs[torch.arange(len(ours)) % len(theirs)])
