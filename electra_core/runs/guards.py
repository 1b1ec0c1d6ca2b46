"""Guards of a training run: warnings about spikes of the loss, and a post-mortem if it diverges.

A step whose loss or gradient is not finite changes nothing (`training.py`); after too many in a row the run
stops. `examine` then runs the last batch again, once as it was and once with a hook on every module, and
RUN/postmortem.json says which module's output was the first that was not finite, whether its inputs still were,
and how large weights, gradients and outputs are, layer by layer. `pretraining.evaluation.health` judges whether a
run learns at all.
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

from electra_core import electra
from electra_core.files.new_file import write_new
from electra_core.linear import calls_just
from electra_core.optim import gradient_norm
from electra_core.runs.progress import Progress
from electra_core.training import Diverged, Loop, LossFunction, StepResult

Result = TypeVar("Result")
LossesOf = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
"""A part of a batch -> its loss and figures, in the run's precision."""
FEWEST_ROWS, SPIKE = 8, 6.0
"""A spike lies above the median of the rows before by more than `SPIKE` times their median distance from it."""


def spike(losses: Sequence[float], loss: float) -> str | None:
    """A warning if `loss` is far above the `losses` of the log's previous rows, else None.

    "Far" is `SPIKE` times their median distance from their median, and at least a tenth of that median.
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
    """A warning if a run's `last` step was skipped, with the number of skipped steps; empty otherwise."""
    count = int(last.in_a_row)
    if not count:
        return []
    which = f"{count} steps" if count > 1 else "step"
    before = last.step - count
    return [f"No finite loss and gradient in the last {which}: the model is as it was after step {before}."]


def said(warnings: Sequence[str | None], bar: Progress) -> dict[str, list[str]]:
    """Shows the warnings to the user; returns them as an entry of the log's row."""
    found = [warning for warning in warnings if warning]
    for warning in found:
        bar.say(f"warning: {warning}")
    return {"warnings": found} if found else {}


def postmortem_name(rank: int) -> str:
    """Name of a rank's post-mortem in RUN: each of several processes examines its own part of the batch."""
    return f"postmortem-rank{rank}.json" if rank else "postmortem.json"


def with_postmortem(
    steps: Iterator[Result],
    file: Path,
    loop: Loop,
    batches: Callable[[int], Sequence[Any]],
    batch_size: int,
) -> Generator[Result, None, None]:
    """Yields `steps` (those of `loop`); if they diverge, writes the post-mortem to `file`.

    The same happens if the caller throws `Diverged` into the generator.

    Args:
        batch_size: sequences per step; `file` gives the indices of the batch's examples in the run.

    Raises:
        Diverged: the same error, with file and module added.
    """
    try:
        yield from steps
    except Diverged as error:
        parts, key = batches(error.step), fold(loop.seed, error.step)
        first = error.step * batch_size
        found: dict[str, Any] = {"step": error.step + 1, "error": str(error), "seed": loop.seed}
        found["examples"] = {"first": first, "last": first + batch_size - 1}
        found |= examine(loop.model, loop.loss_function, parts, key, loop.autocast)
        write_new(file, json.dumps(found, indent=1) + "\n")
        raise Diverged(f"{error}; {found['verdict']} ({file})", error.step) from None


def examine(
    model: nn.Module,
    loss_function: LossFunction,
    parts: Sequence[Any],
    seed: int,
    autocast: AbstractContextManager[Any],
) -> dict[str, Any]:
    """Runs a batch again, forward and backward as the step did, then forward with a hook on every module.

    A hook has the module called as it is written, where a step may take several together; so the two passes may
    differ by rounding, and losses and gradients are the first one's.

    Returns:
        JSON values: "verdict", a sentence; "first_not_finite", the first such module in forward order (None if all
        outputs are finite); "losses"; the names "weights_not_finite" and "gradients_not_finite"; "gradient_norm"
        of all together; and "layers", each with the norms of its weights and gradients and the root mean square
        of its output. Numbers that are not finite are strings.
    """

    def losses_of(part: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast:
            return loss_function(part, seed)

    model.zero_grad(set_to_none=True)
    found: dict[str, Any] = {
        "losses": _losses(losses_of, parts),
        "weights_not_finite": [name for name, p in model.named_parameters() if not _finite([p])],
        "gradients_not_finite": [
            name for name, p in model.named_parameters() if p.grad is not None and not _finite([p.grad])
        ],
        "gradient_norm": _number(float(gradient_norm([p for p in model.parameters() if p.grad is not None]))),
        "layers": _layers(model),
    }
    model.zero_grad(set_to_none=True)
    outputs = _outputs(model, losses_of, parts)
    found["first_not_finite"] = next((row for row in outputs if not row["finite"]), None)
    rms = {row["module"]: row["rms"] for row in outputs}
    for row in found["layers"]:
        row["output_rms"] = rms.get(row["module"])
    return {"verdict": _verdict(found), **found}


def _losses(losses_of: LossesOf, parts: Sequence[Any]) -> dict[str, Any]:
    """The parts' losses and figures by name; leaves the batch's gradients in the parameters."""
    losses: dict[str, Any] = {}
    for index, part in enumerate(parts):
        loss, figures = losses_of(part)
        loss.backward()
        for name, value in {"loss": loss, **figures}.items():
            losses[name if len(parts) == 1 else f"{name} of part {index}"] = _number(float(value.detach()))
    return losses


def _outputs(model: nn.Module, losses_of: LossesOf, parts: Sequence[Any]) -> list[dict[str, Any]]:
    """What each module returns, in the order of their calls."""
    outputs: list[dict[str, Any]] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if tensors := _floats(output):
                outputs.append({
                    "module": name, "kind": type(module).__name__, "finite": _finite(tensors),
                    "inputs_finite": _finite(_floats(inputs)), "rms": _number(_norm(tensors, mean=True)),
                })  # fmt: skip

        return hook

    named = [(name, module) for name, module in model.named_modules() if name and not _is_gone_around(module)]
    handles = [module.register_forward_hook(look(name)) for name, module in named]
    try:
        # What torch.compile has made of the model knows nothing of these hooks.
        with torch.compiler.set_stance("force_eager"):
            for part in parts:
                losses_of(part)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _is_gone_around(module: nn.Module) -> bool:
    """Whether a step takes no logits from this generator; a hook would have it compute and store them."""
    return isinstance(module, electra.Generator) and calls_just(module, electra.FORWARDS[electra.Generator])


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


def _layers(model: nn.Module) -> list[dict[str, Any]]:
    """Norms for each module that has weights of its own."""
    rows = []
    for name, module in model.named_modules():
        weights = list(module.parameters(recurse=False))
        if weights:
            gradients = [p.grad for p in weights if p.grad is not None]
            rows.append({
                "module": name, "weight_norm": _number(_norm(weights)), "gradient_norm": _number(_norm(gradients)),
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
    """`value`, as a string if it is not finite, because JSON has no NaN."""
    return value if math.isfinite(value) else str(value)
