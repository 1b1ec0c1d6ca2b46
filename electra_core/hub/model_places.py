"""Resolves the name of a model: a directory, a run, the model in the package, or a repository on the Hub."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from electra_core.errors import UserError

SHIPPED = "tiny"
"""Name of the model in the package."""


def find_model(source: str | Path, kind: str = "discriminator", revision: str | None = None) -> Path:
    """The model directory that `source` names.

    Args:
        source: a model directory, a run's directory (for its model of that `kind`), "tiny" (the model in the
            package, unless a folder has this name), or a name on the Hub ("google/electra-small-discriminator",
            with the extra `hub`).
        kind: "discriminator" or "generator".

    Raises:
        UserError: there is no such model, or it cannot be downloaded.
    """
    directory = Path(source)
    if directory.is_dir():
        if not (directory / "config.json").exists() and (directory / kind / "config.json").exists():
            return directory / kind
        return directory
    if not is_name(source):
        raise UserError(f"{source}: no such model directory")
    if str(source) == SHIPPED:
        return shipped_model() / kind
    return _fetch(str(source), revision)


def find_pair(source: str) -> tuple[str, str] | None:
    """The names of the discriminator and the generator that `source` stands for together: "tiny", a run, or one of
    the two folders in it; None if it stands for no pair. The Hub, where a model is one half, is not asked."""
    kinds = ("discriminator", "generator")
    if is_name(source) and source != SHIPPED:
        return None
    try:
        found = [find_model(source, kind) for kind in kinds]
    except UserError:
        return None
    if found[0] != found[1]:
        names = source, source
    elif found[0].name in kinds:
        found = [found[0].with_name(kind) for kind in kinds]
        names = str(found[0]), str(found[1])
    else:
        return None
    return names if all((folder / "config.json").is_file() for folder in found) else None


def is_name(source: str | Path) -> bool:
    """Whether `source` is not an existing path, and may name a model in the package or on the Hub."""
    name = str(source)
    of_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return not Path(source).exists() and (name == SHIPPED or of_hub)


def name_in_card(source: str | Path) -> str:
    """A model's name for a model card, which others read: of a path only the last part.

    >>> name_in_card("google/electra-small-discriminator"), name_in_card("/home/ann/patients/RUN")
    ('`google/electra-small-discriminator`', '`RUN`')
    """
    name = str(source) if is_name(source) else Path(source).resolve().name
    return f"`{' '.join(name.split()).replace('`', '')}`"


def shipped_model() -> Path:
    """The folder of the pre-trained `tiny` model in the package, `discriminator` and `generator`."""
    return Path(str(files("electra_core"))) / SHIPPED


def hint_about(directory: Path) -> str:
    """What a folder without config.json may be, to follow a message; "" if nothing is known."""
    if (directory / "adapter_config.json").exists():
        return "; it holds an adapter (PEFT), to be merged into its model first: merge_and_unload, save_pretrained"
    if (directory / "state.safetensors").exists() or any(directory.glob("checkpoints/step-*")):
        return "; `electra convert --checkpoint` makes a model of a pre-training's checkpoint"
    if inner := [config.parent for config in directory.glob("*/config.json")]:
        return f"; {max(inner, key=_by_number)} may be meant"
    return ""


def _by_number(folder: Path) -> tuple[int, str]:
    """Sort key of checkpoint-500, checkpoint-1000, ..., which transformers' Trainer writes."""
    number = folder.name.rpartition("-")[2]
    return (int(number) if number.isdecimal() else -1, folder.name)


def _fetch(name: str, revision: str | None) -> Path:
    """Downloads a Hub repository into the Hub's own cache; weights as safetensors where it has them."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{name}: no such directory; to fetch a model of that name from the Hub, "
            "install the extra: pip install 'electra-core[hub]'"
        ) from error
    try:
        for weights in ("*.safetensors", "*.bin"):
            wanted = [weights, "*.json", "vocab.txt", "spiece.model"]
            found = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
            if any(found.glob(weights)):
                break
    except Exception as error:  # the library's, the network's or the disk's: all the same to the user
        raise UserError(f"{name}: not a directory, and cannot be fetched from the Hub ({error})") from error
    return found
