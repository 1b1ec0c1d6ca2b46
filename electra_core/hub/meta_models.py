"""Models on torch's `meta` device, without memory for their weights: directories are loaded into them, and the
parameters of a model to be saved are compared with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from electra_core import tasks
from electra_core.execution.sharding import is_sharded
from electra_core.hub.layout import architecture, changed_classes

Built = TypeVar("Built", bound=nn.Module)
CLASSES = (
    "a class of your own is saved and loaded once it is Layer.attention_class, Encoder.layer_class or the model's "
    "encoder_class; or keep torch.save(model.state_dict(), FILE)"
)
"""What to do with a model whose encoder has other classes."""


def on_meta(kind: Callable[..., Built], *arguments: Any, **options: Any) -> Built:
    """A module without memory for its weights."""
    with torch.device("meta"), _NoInitialisation():
        return kind(*arguments, **options)


class _NoInitialisation(TorchFunctionMode):
    """Makes the functions of torch.nn.init leave their tensor alone: its values will come from a file.

    There is no memory to fill, but drawing random numbers on the meta device still loads half of torch's
    compiler (2.6 seconds and 144 MB, measured with torch 2.13).
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def needs_its_constructor(model: nn.Module) -> bool:
    """Whether a model has values that may come neither from a file nor from `tasks.initialise_head`: buffers,
    tensors as plain attributes, and a task model's parameters outside the encoder and the head."""
    for name, module in model.named_modules():
        tensors = [*module.buffers(recurse=False), *(v for v in vars(module).values() if isinstance(v, Tensor))]
        if tensors:
            return True
        own = any(True for _ in module.parameters(recurse=False)) and not f"{name}.".startswith("encoder.")
        if own and isinstance(model, tasks.TaskModel) and not tasks.is_head(name, module):
            return True
    return False


def check_parameters(model: nn.Module) -> None:
    """Raises ValueError for parameters and classes that could not be loaded again from a directory."""
    architecture(model)  # raises for an Electra, which has no encoder
    kind: Any = type(model)
    found = model.state_dict()
    encoder = on_meta(kind.encoder_class, model.config)
    expected = {f"encoder.{name}": t for name, t in encoder.state_dict().items()}
    if kind.__module__.startswith("electra_core."):  # a subclass may have parts of its own beside the encoder
        head = {"labels": model.labels} if isinstance(model, tasks.TaskModel) else {}
        expected |= on_meta(kind, model.config, **head).state_dict()
    else:
        found = {name: t for name, t in found.items() if name.startswith("encoder.")}
    odd = [f"has no {name}" for name in expected if name not in found]
    odd += [f"has {name}" for name in found if name not in expected]
    odd += [
        f"has {name} of shape {list(found[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if odd:
        raise ValueError(
            f"model: expected the parameters of a {kind.__name__} of its config, but it {odd[0]}; merge or remove "
            f"what changed it (adapters, prune.remove, parametrize.remove_parametrizations), then save; {CLASSES}"
        )
    if spread := [name for name, tensor in found.items() if is_sharded(tensor)]:
        raise ValueError(
            f"model: expected whole parameters, but {spread[0]} is a DTensor, spread over processes; gather them "
            "(full_tensor) into a model that is not sharded, and save that"
        )
    _check_classes(kind.__name__, model.encoder, encoder)  # type: ignore[arg-type]


def _check_classes(kind: str, ours: nn.Module, expected: nn.Module) -> None:
    """Raises ValueError if an encoder has other classes than the one expected, which this program would load."""
    classes, theirs = changed_classes(ours), changed_classes(expected)
    if differing := [name for name in {**classes, **theirs} if classes.get(name) != theirs.get(name)]:
        got, wanted = (type(dict(encoder.named_modules()).get(differing[0])) for encoder in (ours, expected))
        raise ValueError(
            f"model: expected a {kind} as this program would load it, but "
            f"{f'encoder.{differing[0]}'.rstrip('.')} is of class {got.__name__}, not {wanted.__name__}; {CLASSES}"
        )
