"""RUN, the folder of a pre-training run: what it is checked for before a run, and what is saved in it.

RUN/config.toml       the resolved configuration
RUN/state.json        whether the run is running, and how it ended (`runs/state.py`)
RUN/metrics.jsonl     a row every log_every steps, and one per evaluation
RUN/checkpoints/      training state, for --resume
RUN/discriminator/    model directory: the model to fine-tune afterwards
RUN/generator/        model directory: the masked language model
RUN/postmortem.json   the diagnosis of a run that diverged (`runs/guards.py`)

`runs/folder.py` creates it and finds the checkpoint to resume from.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from electra_core.checkpoint import Checkpoint
from electra_core.config import EncoderConfig, PretrainConfig, plain
from electra_core.corpus import Corpus
from electra_core.errors import UserError, option
from electra_core.examples import RULES
from electra_core.files.new_file import write_new
from electra_core.files.toml_files import read_table, read_toml, to_toml
from electra_core.hub.model_places import name_in_card
from electra_core.hub.weight_files import weights_digest
from electra_core.masking import MaskFunction, mask
from electra_core.model_dir import find_model, save_pretrained
from electra_core.runs.checkpoint_files import checkpoint_folders, read_record
from electra_core.runs.folder import FOLDERS, HALVES
from electra_core.runs.state import FINISHED, read_state
from electra_core.tokenizer import Tokenizer

log = logging.getLogger("electra_core")
Pair = tuple[Path | str | None, Path | str | None]
"""Model directories of a discriminator and a generator to start from; both or neither."""


def check_start(run: Path, start_from: Pair) -> None:
    """Checks that both models to start from are given, and that a new run in RUN does not touch them.

    Raises:
        UserError: only one is given; or one, or a file that it links to, lies where the new run removes or writes.
    """
    if (start_from[0] is None) != (start_from[1] is None):
        raise UserError(f"{option('init_discriminator')}, {option('init_generator')}: give both or neither")
    ours = [path.resolve() for path in (run, *(run / name for name in FOLDERS))]
    for kind, source in zip(HALVES, start_from):
        if source is None or not Path(source).is_dir():  # on the Hub, or missing, which is reported later
            continue
        if any(path.is_relative_to(place) for path in _real_paths(find_model(source, kind)) for place in ours):
            raise UserError(
                f"{run}: holds the model to start from ({option(f'init_{kind}', str(source))}); write the new run "
                "to another folder"
            )


def _real_paths(directory: Path) -> Iterator[Path]:
    """Paths of a model directory and its files, with links resolved."""
    yield directory.resolve()
    yield from (path.resolve() for path in directory.iterdir() if path.is_file())


def is_finished(run: Path, identity: dict[str, Any]) -> bool:
    """Whether RUN holds this run, finished, without checkpoints to resume from: they were removed, or are from a
    version that cut text into other examples. Then a line says so.

    Raises:
        UserError: the finished run has other settings than `identity`, or its model is gone, too; or the
            checkpoints cannot be seen.
    """
    state = read_state(run)
    if state.get("state") != FINISHED:
        return False
    began = identity
    if checkpoints := checkpoint_folders(run / "checkpoints"):
        try:
            record = read_record(checkpoints[-1])
            began, is_last = record["identity"], record["step"] == state.get("step")
        except (OSError, ValueError, KeyError, TypeError):  # damaged: an older one may be resumed
            return False
        if not is_last or _of_same_rules(began, identity):
            return False
    saved = {table: read_table(run / "config.toml", table) for table in ("pretrain", "discriminator")}
    if not saved["pretrain"]:
        raise UserError(f"cannot resume {run}: it is not a pre-training run")
    differences = [*_differences(saved, identity), *_other_data(began, identity), *_other_mask(state, identity)]
    if differences:
        raise UserError(f"cannot resume {run}, which is finished: {'; '.join(differences)}")
    if not (run / HALVES[0] / "config.json").is_file():
        raise UserError(
            f"{run}: is finished, but holds neither its model nor a checkpoint; {option('overwrite')} starts a "
            "new one"
        )
    log.info("%s: already finished", run)
    return True


# What may differ between a run and its resumption: how it is watched, saved and computed.
_FREE = {
    "checkpoint_every", "keep_checkpoints", "eval_every", "eval_examples", "log_every",
    "accumulate", "engine", "recompute", "sharding",
}  # fmt: skip


def run_identity(
    encoder: EncoderConfig, config: PretrainConfig, corpus: Corpus, mask: MaskFunction
) -> dict[str, Any]:
    """What must be the same to resume from a checkpoint; JSON values."""
    return {
        "pretrain": {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE},
        "discriminator": dataclasses.asdict(encoder),
        "data": corpus.fingerprint,
        "examples": RULES,
        **mask_record(mask),
    }


def mask_record(function: Any) -> dict[str, str]:
    """What is kept of a mask function: `module.function`, and of a partial also its arguments, as in a call.

    Of another callable object it is the class's name, of an argument that is none of Python's plain values, too.
    """
    told: list[str] = []
    keywords: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        told = [*map(_told, function.args), *told]
        function, keywords = function.func, function.keywords | keywords
    told += [f"{name}={_told(value)}" for name, value in sorted(keywords.items())]
    return {"mask": _name(function), "mask_arguments": ", ".join(told)}


def _name(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _told(value: Any) -> str:
    """The same in every process, so no address."""
    value = plain(value)
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_told, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_told(key)}: {_told(value[key])}' for key in value)}}}"
    return _call(mask_record(value))


def _call(record: dict[str, str]) -> str:
    arguments = record.get("mask_arguments")
    return f"{record['mask']}({arguments})" if arguments else record["mask"]


def check_identity(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Raises UserError with the differences if a checkpoint belongs to a run other than `identity`."""
    saved = checkpoint.meta.get("identity", {})
    if "pretrain" not in saved:
        raise UserError(f"cannot resume {checkpoint.path}: it is not a checkpoint of a pre-training run")
    differences = _differences(saved, identity)
    differences += _other_data(saved, identity)
    if not _of_same_rules(saved, identity):
        differences.append(
            "it was begun by a version that cuts text into other examples; finish it with that version, which is "
            "from before the changes of 29 November 2026"
        )
    differences += _other_mask(saved, identity)
    if differences:
        raise UserError(f"cannot resume {checkpoint.path}: " + "; ".join(differences))


def _differences(saved: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """The settings that differ, in words. One that older versions did not have was as its default is now."""
    before = {
        "pretrain": dataclasses.asdict(PretrainConfig()),
        "discriminator": dataclasses.asdict(EncoderConfig()),
    }
    return [
        f"{name} was {was!r}, is now {value!r}"
        for table in ("pretrain", "discriminator")
        for name, value in identity[table].items()
        if (was := saved[table].get(name, before[table].get(name))) != value
    ]


def _other_data(saved: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """That the corpus differs, in words."""
    return [] if saved.get("data") == identity["data"] else ["the corpus (or its tokenizer) differs"]


def _of_same_rules(saved: dict[str, Any], identity: dict[str, Any]) -> bool:
    """Whether text was cut into the same examples; the first rules had no number."""
    return bool(saved.get("examples", 1) == identity["examples"])


def _other_mask(saved: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """That the mask function differs, in words. Older versions had only one and did not name it, or did not keep a
    partial's arguments."""
    now = {name: identity[name] for name in ("mask", "mask_arguments")}
    was = {**now, "mask": _name(mask)} | {name: saved[name] for name in now if name in saved}
    return [] if was == now else [f"mask was {_call(was)}, is now {_call(now)}"]


def start_record(start_from: Pair) -> dict[str, list[str]]:
    """What a new run starts from, for its checkpoints: each model's name as given, and its weights' digest."""
    given = {kind: source for kind, source in zip(HALVES, start_from) if source is not None}
    return {kind: [str(source), weights_digest(find_model(source, kind))] for kind, source in given.items()}


def check_same_start(checkpoint: Checkpoint, start_from: Pair) -> None:
    """Checks that a checkpoint's run started from `start_from`; if none is given, any run may be resumed.

    The weights decide, because the folders may have been moved; if the weights are not there, the name does.

    Raises:
        UserError: the run started from other weights, or from none.
    """
    began = checkpoint.meta.get("start")  # older versions did not write it
    for kind, source in zip(HALVES, start_from):
        if source is None or began is None:
            continue
        name, digest = began.get(kind, ("", ""))
        found = weights_digest(find_model(source, kind)) if Path(source).is_dir() else None
        if found == digest or (found is None and str(source) == name):
            continue
        named = name if name != str(source) else "other weights of that name"
        raise UserError(
            f"cannot resume {checkpoint.path}: {option(f'init_{kind}', str(source))}, but the run was started "
            f"{f'with {named}' if name else 'without'} (to continue it, leave out {option('init_')}...)"
        )


def model_card(
    encoder: EncoderConfig, config: PretrainConfig, corpus: str, step: int, tokens: int,
    evaluation: dict[str, float], start: dict[str, list[str]] | None, made_with: dict[str, str],
) -> str:  # fmt: skip
    """README.md of a model directory: where the weights come from.

    Args:
        corpus: what it was trained on, in words.
        step, tokens: done so far.
        evaluation: figures after that step, if there are any.
        start: the run's `start_record`.
        made_with: the versions that trained it (`checkpoint.versions`).
    """
    pair = " and ".join(
        f"{name_in_card(name)} (weights `{digest[:16]}`)" for name, digest in (start or {}).values()
    )
    continued = f"Continued from {pair}; what follows counts this run only.\n\n" if pair else ""
    taken = f"{step:,} of {config.steps:,} steps"
    figures = "\n".join(f"| {name.removeprefix('eval_')} | {value:.4f} |" for name, value in evaluation.items())
    table = f"\n| held-out | value |\n|---|---|\n{figures}\n" if evaluation else ""
    return f"""---
library_name: electra-core
tags: [electra, replaced-token-detection]
---
# ELECTRA `{config.model}`, pre-trained with electra-core {made_with["electra-core"]}

{continued}Objective `{config.objective}`, {taken} of {config.batch_size} x {config.max_length}
tokens ({tokens:,} tokens in all), seed {config.seed}, on {corpus},
vocabulary of {encoder.vocab_size:,}.
torch {made_with["torch"]}, {made_with["machine"]}, Python {made_with["python"]}.
{table}"""


def save_models(folder: Path, electra: Any, tokenizer: Tokenizer, card: str) -> list[Path]:
    """Writes FOLDER/discriminator and FOLDER/generator as model directories; returns those that there are."""
    parts = {folder / kind: part for kind in HALVES if (part := getattr(electra, kind, None)) is not None}
    for directory, part in parts.items():
        save_pretrained(part, directory, tokenizer=tokenizer, card=card)
    return list(parts)


def write_config(
    path: Path, encoder: EncoderConfig, config: PretrainConfig, mask_function: MaskFunction = mask
) -> None:
    """Writes the resolved configuration as TOML, with tables [pretrain] and [discriminator]; a mask function of
    one's own is named in a comment, as no table can bring it back."""
    comment = [] if mask_function is mask else [f"# masks: {_call(mask_record(mask_function))}\n"]
    tables = (("pretrain", config), ("discriminator", encoder))
    written = [f"[{name}]\n{to_toml(dataclasses.asdict(values))}" for name, values in tables]
    write_new(path, "\n".join((*comment, *written)))


def read_config(path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """([pretrain], [discriminator]) of a TOML file; keys outside a table count as [pretrain].

    Raises:
        UserError: no such file, or not TOML of that form.
    """
    tables = read_toml(path)
    encoder = tables.pop("discriminator", {})
    changes = tables.pop("pretrain", {})
    for values in (encoder, changes):
        if not isinstance(values, dict):
            raise UserError(f"{path}: [pretrain] and [discriminator] are tables")
    encoder = {key: value for key, value in encoder.items() if key not in ("vocab_size", "pad_token_id")}
    return {**tables, **changes}, encoder
