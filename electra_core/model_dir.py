"""Saves and loads model directories in the Hub's ELECTRA layout.

What is saved here opens in `transformers` unchanged, and an ELECTRA directory of the Hub opens here unchanged (an
encoder with classes of the user's own is not an ELECTRA, and opens only where the same classes are set):

    config.json           sizes, kind of model, names of the labels      (`hub/layout.py`)
    model.safetensors     the weights under the Hub's names              (`hub/weight_files.py`)
    tokenizer files       if a tokenizer is given
    README.md             a model card, if one is given

A model is built without memory for its weights, the shapes are compared, and only then are the weights copied
from the file into place: loading takes the model's own memory and no second copy.

`pretrained.py` offers the same as `from_pretrained` and `save_pretrained`. The models themselves do no reading
or writing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from electra_core import electra, tasks
from electra_core.config import EncoderConfig
from electra_core.encoder import DisentangledEmbeddings, Encoder
from electra_core.errors import UserError, option
from electra_core.execution.torch_state import usual_tensors
from electra_core.files.new_folder import temporary_folder
from electra_core.hub.folder_files import read_json_object
from electra_core.hub.layout import (
    HEADS,
    MULTI_LABEL,
    architecture,
    changed_classes,
    classes_named,
    hub_names,
    hub_tensors,
    parts,
    persistent_buffers,
    read_config,
    read_labels,
    saved_tensors,
    write_config,
)
from electra_core.hub.meta_models import check_parameters, needs_its_constructor, on_meta
from electra_core.hub.model_places import find_model, hint_about
from electra_core.hub.model_places import shipped_model as shipped_model
from electra_core.hub.weight_files import SAFETENSORS, WeightFiles, open_weights, write_weights

log = logging.getLogger("electra_core")
_MOST_LISTED = 20  # tensors named in one message
_TIED = "generator_lm_head.weight"
_OF_ENCODER = re.compile(r"(electra\.)?(embeddings|embeddings_project|encoder)\.")

Model = TypeVar("Model", bound=nn.Module)


class SavesItself(Protocol):
    """A tokenizer, as far as this file needs it."""

    def save(self, directory: str | Path, *, max_length: int) -> None:
        """Writes its files into the directory, for a model that reads up to `max_length` tokens."""


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: SavesItself | None = None,
    card: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a model directory; files of the same names are replaced, each one whole or not at all.

    Args:
        model: a Discriminator, Generator or task model.
        directory: created if necessary.
        tokenizer: saved with the model.
        card: text of README.md (`model_card`).
        dtype: of the weights in the file (torch.bfloat16 halves it); None: unchanged.

    Raises:
        ValueError: another kind of model (for an Electra, save its `discriminator` and its `generator`), or one
            whose parameters are not those of its kind, as with adapters or pruning, or are sharded; or the encoder
            has other classes than this program would load it with.
        UserError: `directory` is a file.
    """
    directory = Path(directory)
    check_parameters(model)
    tensors = hub_tensors(model)
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    config = write_config(model, next(iter(tensors.values())).dtype)
    with temporary_folder(directory) as new:
        write_weights(tensors, new / SAFETENSORS)
        (new / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copymode(new / "config.json", new / SAFETENSORS)  # safetensors' files are for their owner only
        if tokenizer is not None:
            tokenizer.save(new, max_length=config["max_position_embeddings"])
        if card is not None:
            (new / "README.md").write_text(card, encoding="utf-8")
        _move_into_place(new, directory)


def _move_into_place(new: Path, directory: Path) -> None:
    if not directory.exists():
        new.rename(directory)
        return
    if not directory.is_dir():
        raise UserError(f"{directory}: exists and is not a directory")
    for file in new.iterdir():
        os.replace(file, directory / file.name)


def load_config(source: str | Path) -> tuple[EncoderConfig, dict[str, Any]]:
    """The sizes in a model directory's config.json, and all of its fields as they are."""
    directory = find_model(source)
    if not (directory / "config.json").exists():
        raise UserError(f"{directory}: not a model directory (no config.json){hint_about(directory)}")
    raw = read_json_object(directory, "config.json")
    return read_config(raw, str(directory / "config.json")), raw


@usual_tensors()
def load(
    kind: type[Model],
    source: str | Path,
    *,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    revision: str | None = None,
    same_classes: bool = False,
    head_may_be_new: bool = False,
) -> Model:
    """A model of `kind` from a model directory (see `find_model`), in fp32, on the CPU, in evaluation mode.

    A task model may be loaded from a directory without its head, such as a pre-trained discriminator's: the head
    is then new, drawn from `seed`, and a warning says so. What a subclass of yours adds and the file does not
    hold (parameters outside the head, buffers) is as its constructor makes it.

    Args:
        labels: names of the classes, for a head with another number of classes than the file's.
        revision: of a repository on the Hub.
        same_classes: refuse an ELECTRA's weights for an encoder with classes of yours; otherwise it starts from
            them, and a warning says so.
        head_may_be_new: no warning about a new head, which training starts with.

    Raises:
        UserError: not a model directory, another kind of model, an encoder with classes that are not set here, or
            weights that are missing, unexpected, of the wrong shape or unreadable; the message lists them.
        ValueError: `kind` is an encoder without a head, or a pair; `labels` for a kind that has none.
    """
    _check_kind(kind)
    directory = find_model(source, _part_of_run(kind), revision)
    config, raw = load_config(directory)
    options = _head_options(kind, raw, labels, str(directory / "config.json"))
    model = on_meta(kind, config, **options)
    if needs_its_constructor(model):
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed % 2**63)
            model = kind(config, **options)
    _check_classes(model, directory, raw, same_classes)
    new_head = _fill(model, directory, raw, another_head=labels is not None)
    if new_head:
        tasks.initialise_head(model, seed)  # type: ignore[arg-type]
        if not head_may_be_new:
            names = ", ".join(new_head)
            log.warning("%s: the head is newly initialised and not trained yet: %s", directory, names)
    return model.eval()


def _check_kind(kind: type[nn.Module]) -> None:
    if issubclass(kind, Encoder):
        raise ValueError(
            f"kind: expected a model with a head, got {kind.__name__}; an encoder alone is "
            "load_discriminator(source).encoder"
        )
    if issubclass(kind, electra.Electra):
        raise ValueError(f"kind: expected one model, got the pair {kind.__name__}, which load_pair fills")


def _part_of_run(kind: type[nn.Module]) -> str:
    return "generator" if issubclass(kind, electra.Generator) else "discriminator"


def _head_options(
    kind: type[nn.Module], raw: dict[str, Any], labels: Sequence[str] | None, where: str
) -> dict[str, Any]:
    if issubclass(kind, electra.Generator) and raw.get("tie_word_embeddings", True) is not True:
        raise UserError(f"{where}: tie_word_embeddings is false; only a tied output layer is supported")
    named = issubclass(kind, tasks.SequenceClassifier | tasks.TokenClassifier)
    if labels and not named and kind.__module__.startswith("electra_core."):
        raise ValueError(f"labels: a {kind.__name__} has none, got {labels!r}")
    if not issubclass(kind, tasks.TaskModel):
        return {}
    options: dict[str, Any] = {"classifier_dropout": raw.get("classifier_dropout")}
    if issubclass(kind, tasks.MultipleChoice):
        options["classifier_dropout"] = raw.get("summary_last_dropout", 0.1)
        for key, only in (("summary_type", "first"), ("summary_use_proj", True), ("summary_activation", "gelu")):
            if raw.get(key, only) != only:
                raise UserError(f"{where}: {key} is {raw[key]!r}; only {only!r} is supported")
    elif not issubclass(kind, tasks.QuestionAnswerer):
        options["labels"] = read_labels(raw, where) if labels is None else labels
    if issubclass(kind, tasks.SequenceClassifier) and labels is None:
        options["multi_label"] = raw.get("problem_type") == MULTI_LABEL
    dropout = options["classifier_dropout"]
    if dropout is not None and not (type(dropout) in (int, float) and 0 <= dropout < 1):
        raise UserError(f"{where}: classifier_dropout: expected a number in [0, 1), got {dropout!r}")
    return options


def load_pair(model: electra.Electra, discriminator: str | Path, generator: str | Path) -> None:
    """Copies two directories' weights into both halves of `model`, in place, to continue pre-training.

    Raises:
        UserError: as `load_into`; or the two have different embeddings though `model` shares them.
    """
    load_into(model.generator, generator)
    words_VE = model.generator.encoder.embeddings.word_embeddings.weight
    of_generator = words_VE.detach().clone()
    load_into(model.discriminator, discriminator)
    if not torch.equal(words_VE, of_generator):
        raise UserError(
            f"{discriminator} and {generator} have different word embeddings, so they were not trained as a pair "
            f"with shared ones; use {option('tying', 'none')}"
        )


def load_into(model: nn.Module, source: str | Path) -> None:
    """Copies a directory's weights into an existing model, in place, to continue pre-training.

    Parameters that `model` shares with another model change there too.

    Raises:
        UserError: as `load`, or the sizes differ.
    """
    directory = find_model(source, _part_of_run(type(model)))
    config, raw = load_config(directory)
    ours: EncoderConfig = model.config  # type: ignore[assignment]
    differing = [
        f"{key} {theirs}, not {getattr(ours, key)}"
        for key, theirs in dataclasses.asdict(config).items()
        if isinstance(theirs, int) and key != "pad_token_id" and theirs != getattr(ours, key)
    ]
    if differing:
        raise UserError(f"{directory}: the model has {'; '.join(differing)}")
    _check_classes(model, directory, raw)
    _fill(model, directory, raw, another_head=False)


@torch.no_grad()
def _fill(model: nn.Module, directory: Path, raw: dict[str, Any], another_head: bool) -> list[str]:
    """Copies the weights from the directory's files to the model, which may still be on the meta device.

    Returns:
        Names of the head's parameters if the directory does not have this head, otherwise [].
    """
    buffers = dict(persistent_buffers(model))
    files = open_weights(directory, {stored for name in buffers for stored in hub_names(name)})
    new_head = _compare(model, directory, raw, files.shapes, another_head)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device="cpu")
    for name, tensor in saved_tensors(model):
        names = _stored_names(name, files.shapes)
        if name not in new_head and not (name in buffers and names[0] not in files.shapes):
            for stored, target in zip(names, parts(tensor, len(names))):
                files.copy_to(stored, target)
                if name not in buffers and not _is_finite(target):
                    file, there = files.place_of[stored]
                    raise UserError(f"{file}: {there}: expected numbers, got NaN or infinity")
    embeddings = model.encoder.embeddings  # type: ignore[union-attr]
    if isinstance(model, electra.Generator):
        _check_tied(model.encoder.embeddings.word_weight(), files)
    if isinstance(embeddings, DisentangledEmbeddings):  # the file holds the sum: subtract the other part
        own = embeddings.word_embeddings.weight
        own.sub_(embeddings.word_weight() - own)
    return new_head


def _check_classes(model: nn.Module, directory: Path, raw: dict[str, Any], same_classes: bool = False) -> None:
    """Raises UserError if the directory's encoder has classes of its user's own that the model's has not. A model
    with such classes may start from the weights of an ELECTRA, with a warning, unless `same_classes`."""
    named = classes_named(raw, str(directory / "config.json"))
    here = sorted({*changed_classes(model.encoder).values()})  # type: ignore[arg-type]
    if named and named != here:
        raise UserError(
            f"{directory}: its encoder has classes of its user's own, {', '.join(named)}, which are not set here; "
            "set Layer.attention_class, Encoder.layer_class or the model's encoder_class before you load it"
            + (f" (here: {', '.join(here)})" if here else "")
        )
    if named or not here:
        return
    if same_classes:
        raise UserError(
            f"{directory}: was trained with ELECTRA's own classes, not with those set here, {', '.join(here)}; "
            "set them back (Layer.attention_class = SelfAttention, Encoder.layer_class = Layer)"
        )
    log.warning("%s: an encoder with %s starts from an ELECTRA's weights", directory, ", ".join(here))


def _check_tied(words_VE: Tensor, files: WeightFiles) -> None:
    """Raises UserError if the files hold an output layer of its own; old ones repeat the word embeddings there."""
    if _TIED not in files.shapes:
        return
    own_VE = torch.empty_like(words_VE)
    fits = files.shapes[_TIED] == tuple(own_VE.shape)
    if fits:
        files.copy_to(_TIED, own_VE)
    if not fits or not torch.equal(own_VE, words_VE):
        raise UserError(
            f"{files.directory}: {_TIED} differs from the word embeddings; only a tied output layer is supported"
        )


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; takes one pass and no memory."""
    return not tensor.numel() or all(math.isfinite(value) for value in tensor.aminmax())


def _stored_names(name: str, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Names of our parameter in a file; a file of the bare encoder leaves out the prefix `electra.`."""
    bare = "embeddings.word_embeddings.weight" in shapes
    return [hub.removeprefix("electra.") if bare else hub for hub in hub_names(name)]


def _compare(
    model: nn.Module, directory: Path, raw: dict[str, Any], shapes: dict[str, tuple[int, ...]], another_head: bool
) -> list[str]:
    """The names of the head's parameters if it has to be new; UserError if anything else does not match."""
    expected: dict[str, tuple[int, ...]] = {}
    head: list[str] = []
    for name, tensor in saved_tensors(model):
        stored = _stored_names(name, shapes)
        expected |= {part: tuple(t.shape) for part, t in zip(stored, parts(tensor, len(stored)))}
        if not name.startswith("encoder."):
            head += stored
    may_be_missing = {name for name, _ in persistent_buffers(model)}  # the constructor's values then stay
    missing = [name for name in expected if name not in shapes and name not in may_be_missing]
    wrong = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    unexpected = [name for name in shapes if name not in expected and not _expendable(name)]
    claims_head = architecture(model) in (raw.get("architectures") or [])
    new_head = isinstance(model, tasks.TaskModel) and (
        (not claims_head and any(name in missing for name in head))
        or (another_head and any(name in wrong for name in head))
    )
    if new_head:
        missing, wrong = ([name for name in names if name not in head] for names in (missing, wrong))
    if head and missing == head and not isinstance(model, tasks.TaskModel):
        what = (raw.get("architectures") or ["a model"])[0]
        raise UserError(f"{directory}: holds {what}, not {architecture(model)} with its pre-trained head")
    problems = [f"missing: {name} {list(expected[name])}" for name in missing]
    problems += [f"wrong shape: {name} {list(shapes[name])}, expected {list(expected[name])}" for name in wrong]
    if not problems and not any(map(_OF_ENCODER.match, unexpected)):
        if unexpected:
            names = _listed([f"{name:.200}" for name in unexpected], ", ")
            log.warning("%s: tensors that this model has no use for: %s", directory, names)
        return head if new_head else []
    problems += [f"unexpected: {name:.200} {list(shapes[name])}" for name in unexpected]
    raise UserError(
        f"{directory}: the weights do not match a {type(model).__name__} with this config.json\n  "
        + _listed(problems, "\n  ")
    )


def _listed(items: Sequence[str], separator: str) -> str:
    more = [f"and {len(items) - _MOST_LISTED} more"] if len(items) > _MOST_LISTED else []
    return separator.join([*items[:_MOST_LISTED], *more])


def _expendable(name: str) -> bool:
    """Whether a tensor may be ignored: other heads (also a tied output projection) and buffers of old versions."""
    return name.startswith(HEADS) or name.endswith("embeddings.position_ids")


def load_discriminator(source: str | Path, **options: Any) -> electra.Discriminator:
    """A discriminator with its pre-training head; options as for `load`."""
    return load(electra.Discriminator, source, **options)


def load_generator(source: str | Path, **options: Any) -> electra.Generator:
    """A generator with its masked-language-model head; options as for `load`."""
    return load(electra.Generator, source, **options)
