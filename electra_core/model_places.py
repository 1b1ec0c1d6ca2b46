"""What the name of a model means: a directory, a run, the model in the package, a repository on the Hub."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from electra_core.errors import UserError

SHIPPED = "tiny"
"""Name of the model in the package."""


def find_model(source: str | Path, kind: str = "discriminator", revision: str | None = None) -> Path:
    """The model directory that `source` means.

    Args:
        source: a model directory, a run's directory (its `kind` is meant), "tiny" (where no folder is called so,
            the model in the package), or a name on the Hub ("google/electra-small-discriminator", with the extra
            `hub`).
        kind: "discriminator" or "generator".

    Raises:
        UserError: there is no such thing, or it cannot be fetched.
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


def is_name(source: str | Path) -> bool:
    """Whether this is no path to anything here, and may be the name of a model in the package or on the Hub."""
    name = str(source)
    of_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return not Path(source).exists() and (name == SHIPPED or of_hub)


def shipped_model() -> Path:
    """The folder of the pre-trained `tiny` model in the package, `discriminator` and `generator`."""
    return Path(str(files("electra_core"))) / SHIPPED


def _fetch(name: str, revision: str | None) -> Path:
    """A snapshot of a Hub repository in the Hub's own cache; weights as safetensors where it has them."""
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
    except Exception as error:  # the library's own, the network's, the disk's: all end the same for the user
        raise UserError(f"{name}: not a directory, and cannot be fetched from the Hub ({error})") from error
    return found
