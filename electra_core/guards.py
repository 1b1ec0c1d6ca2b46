"""What is watched while a model trains: spikes of the loss, and a post-mortem where it diverges.

A step whose loss or gradient is not finite changes nothing (`training.py`); after too many in a row the run
stops. `examine` then runs the last batch again with a hook on every module, and RUN/postmortem.json says which
module's output was the first that is not finite, whether its inputs still were, and how large weights,
gradients and outputs are, layer by layer. Whether a run learns at all is judged by `evaluation.health`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from electra_kernels.rng import fold
from torch import Tensor, nn

from electra_core.optim import gradient_norm
from electra_core.progress import Progress
from electra_core.training import Diverged, Loop, LossFunction, StepResult

Result = TypeVar("Result")
FEWEST_ROWS, SPIKE = 8, 6.0
"""A spike is further above the median of the rows before than `SPIKE` times their usual distance from it."""


def spike(losses: Sequence[float], loss: float) -> str | None:
    """A warning if `loss` is far above the losses of the rows of the log before it, else None.

    "Far" is `SPIKE` times the median distance of those from their median, and at least a tenth of it.
    """
    losses = [value for value in losses if math.isfinite(value)]
    if len(losses) < FEWEST_ROWS or not math.isfinite(loss):
        return None
    middle = median(losses)
    usual = median(abs(value - middle) for value in losses)
    if loss <= middle + max(SPIKE * usual, 0.1 * abs(middle)):
        return None
    return f"The loss has jumped to {loss:.4g}; the median of the {len(losses)} rows before is {middle:.4g}."


def left_out(last: StepResult) -> list[str]:
    """A warning if a run's `last` step changed nothing, and how many before it; empty if it did."""
    count = int(last.in_a_row)
    if not count:
        return []
    which = f"{count} steps" if count > 1 else "step"
    before = last.step - count
    return [f"No finite loss and gradient in the last {which}: the model is as it was after step {before}."]


def said(warnings: Sequence[str | None], bar: Progress) -> dict[str, list[str]]:
    """Tell the user, once; returns what a row of the log says of it."""
    found = [warning for warning in warnings if warning]
    for warning in found:
        bar.say(f"warning: {warning}")
    return {"warnings": found} if found else {}


def postmortem_name(rank: int) -> str:
    """Of the file in RUN: what one process of several finds is in its own part of the batch."""
    return f"postmortem-rank{rank}.json" if rank else "postmortem.json"


def with_postmortem(
    steps: Iterator[Result],
    file: Path,
    loop: Loop,
    batches: Callable[[int], Sequence[Any]],
    batch_size: int,
) -> Generator[Result, None, None]:
    """`steps` (those of `loop`), and where they diverge, `file` with the post-mortem.

    The same happens where the caller of the steps throws `Diverged` into them.

    Args:
        batch_size: sequences in a step: `file` names the examples of the batch by their indices in the run.

    Raises:
        Diverged: the same, naming file and module.
    """
    try:
        yield from steps
    except Diverged as error:
        parts, key = batches(error.step), fold(loop.seed, error.step)
        first = error.step * batch_size
        found: dict[str, Any] = {"step": error.step + 1, "error": str(error), "seed": loop.seed}
        found["examples"] = {"first": first, "last": first + batch_size - 1}
        found |= examine(loop.model, loop.loss_function, parts, key, loop.autocast)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        raise Diverged(f"{error}; {found['verdict']} ({file})", error.step) from None


def examine(
    model: nn.Module,
    loss_function: LossFunction,
    parts: Sequence[Any],
    seed: int,
    autocast: AbstractContextManager[Any],
) -> dict[str, Any]:
    """Forward and backward over a batch with a hook on every module; JSON values.

    Returns:
        "verdict", a sentence; "first_not_finite" of modules in forward order (None if all outputs are finite),
        "losses", "weights_not_finite" and "gradients_not_finite" by name, "gradient_norm" of all together, and for
        each "layer" the norm of its weights and gradients and the root mean square of its output. Numbers that are
        not finite are strings.
    """
    outputs: list[dict[str, Any]] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if tensors := _floats(output):
                outputs.append({
                    "module": name, "kind": type(module).__name__, "finite": _finite(tensors),
                    "inputs_finite": _finite(_floats(inputs)), "rms": _number(_norm(tensors, mean=True)),
                })  # fmt: skip

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    losses: dict[str, Any] = {}
    model.zero_grad(set_to_none=True)
    try:
        for index, part in enumerate(parts):
            with autocast:
                loss, figures = loss_function(part, seed)
            loss.backward()
            for name, value in {"loss": loss, **figures}.items():
                losses[name if len(parts) == 1 else f"{name} of part {index}"] = _number(float(value.detach()))
    finally:
        for handle in handles:
            handle.remove()
    first = next((row for row in outputs if not row["finite"]), None)
    found = {
        "first_not_finite": first,
        "losses": losses,
        "weights_not_finite": [name for name, p in model.named_parameters() if not _finite([p])],
        "gradients_not_finite": [
            name for name, p in model.named_parameters() if p.grad is not None and not _finite([p.grad])
        ],
        "gradient_norm": _number(float(gradient_norm([p for p in model.parameters() if p.grad is not None]))),
        "layers": _layers(model, outputs),
    }
    model.zero_grad(set_to_none=True)
    return {"verdict": _verdict(found), **found}


def _verdict(found: dict[str, Any]) -> str:
    if found["weights_not_finite"]:
        return f"weights are already not finite, such as {found['weights_not_finite'][0]}"
    if first := found["first_not_finite"]:
        where = f"the first output that is not finite is that of {first['module']} ({first['kind']})"
        return where + (", from finite inputs" if first["inputs_finite"] else "")
    if bad := [name for name, value in found["losses"].items() if isinstance(value, str)]:
        return f"every module's output is finite, but {', '.join(bad)} is not"
    if bad := found["gradients_not_finite"]:
        return f"the forward pass is finite, the gradients of {len(bad)} weights are not, such as {bad[0]}"
    if isinstance(found["gradient_norm"], str):
        return "loss and gradients are finite, but so large that the norm of all together is not"
    return "the same batch gave finite values when it was run again: suspect the hardware"


def _layers(model: nn.Module, outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Norms per module that has weights of its own."""
    rms = {row["module"]: row["rms"] for row in outputs}
    rows = []
    for name, module in model.named_modules():
        weights = list(module.parameters(recurse=False))
        if weights:
            gradients = [p.grad for p in weights if p.grad is not None]
            rows.append({
                "module": name, "weight_norm": _number(_norm(weights)), "gradient_norm": _number(_norm(gradients)),
                "output_rms": rms.get(name),
            })  # fmt: skip
    return rows


def _floats(values: Any) -> list[Tensor]:
    """The floating-point tensors in a module's inputs or output."""
    if isinstance(values, Tensor):
        return [values] if values.is_floating_point() else []
    if isinstance(values, tuple | list):
        return [tensor for value in values for tensor in _floats(value)]
    return []


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _norm(tensors: Sequence[Tensor], mean: bool = False) -> float:
    squares = sum(float(tensor.detach().double().square().sum()) for tensor in tensors)
    count = sum(tensor.numel() for tensor in tensors) if mean else 1
    return math.sqrt(squares / max(count, 1))


def _number(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)
