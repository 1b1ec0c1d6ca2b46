"""Traces a training step on tensors without values: its kernel launches, kept activations and peak memory.

PyTorch's fake tensors have shapes and types but no memory, so a step of any model with any batch is traced within
seconds on any machine, with or without a GPU. The step traced is the real one, `training.take_step`, with the
kernels of a GPU (`kernels="triton"`) or of a CPU (`"auto"`); nothing here repeats the model in formulas that could
become outdated.

**Bytes.** A tensor's memory counts from the operation that makes it to its last reference, under the
stage of the model that was running. What is alive when the backward pass begins is what the forward pass keeps.
Temporary memory inside a kernel is not seen.

**Traffic.** The bytes that an operation reads and writes if it touches every operand once, and of a table only the
rows it takes; operations without a launch move nothing. Data passed between the kernels of one operation is not
seen, nor what caches save.

**Launches.** An operation that only makes a view costs none; other PyTorch operations count 1, those on lists of
tensors as many as their multi-tensor kernels take, our own operators as many as `KERNELS` says, a table made by
reading the kernels.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from electra_kernels import use
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.encoder import set_recompute
from electra_core.execution.placement import autocast_context
from electra_core.execution.static_batch import Shape, StaticInputs
from electra_core.objectives import build_objective
from electra_core.optim import build_optimizer, make_capturable, state_tensors
from electra_core.training import Loop, take_step

STAGES = {
    "embeddings": "embeddings",
    "generator.encoder": "generator layers",
    "generator.generator_predictions": "word head",
    "discriminator.encoder": "discriminator layers",
    "discriminator.discriminator_predictions.dense": "detection head",
    "discriminator.generator_predictions": "word head",
}
"""Module (or the end of its name) -> stage; everything outside them is "losses"."""
OTHER = "losses"
BACKWARD, OPTIMIZER = "backward", "optimizer"

KERNELS = {
    "attention": 1, "attention_backward": 1,  # one more if a sequence does not fit a tile: LONG_ATTENTION
    "dropout_add_layer_norm": 1, "dropout_add_layer_norm_backward": 2,
    "bias_gelu": 1, "bias_gelu_backward": 2,
    "embedding_layer_norm": 1, "embedding_layer_norm_backward": 2,
    "mlm_head": 3, "mlm_head_backward": 6,
    "rtd_loss": 2, "rtd_loss_backward": 1, "rtd_head": 2, "rtd_head_backward": 3,
    "sample_and_replace": 4,
}  # fmt: skip
"""Launches of our operators in half precision with narrow embeddings, small sums and casts included."""
LONG_ATTENTION = 128
SILENT = {
    "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::detach",
    "aten::_unsafe_view", "aten::lift_fresh", "aten::_reshape_alias", "aten::empty_permuted",
    "aten::_has_compatible_shallow_copy_type", "aten::new_empty_strided", "aten::sym_size",
}  # fmt: skip
SEVERAL = {
    "aten::constant_pad_nd": 2, "aten::native_layer_norm_backward": 2, "aten::stack": 1,
    # Indices are sorted, runs of equal ones found, then summed (torch's EmbeddingBackwardKernel.cu, Indexing.cu).
    "aten::embedding_dense_backward": 15, "aten::index_put": 8,
}  # fmt: skip
TAKE_ROWS = {"aten::embedding", "aten::index_select", "aten::index", "aten::gather"}
OVERWRITE = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::_foreach_copy_", "aten::_foreach_zero_"}
# torch's MultiTensorApply.cuh: tensors and blocks per launch, elements per block.
TENSORS_PER_LAUNCH, BLOCKS_PER_LAUNCH, BLOCK = (110, 64, 48, 36, 30), 320, 65536


@dataclass
class StepTrace:
    """The cost of a step, in bytes and launches."""

    tokens: int = 0
    """T of the batch."""
    weights: int = 0
    optimizer: int = 0
    gradients: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    """Stage -> bytes that the forward pass leaves for the backward pass."""
    peak: int = 0
    """Peak number of bytes alive, weights included."""
    launches: dict[str, Counter[str]] = field(default_factory=dict)
    """Stage -> operation -> launches; "backward" and "optimizer" are stages, too."""
    traffic: dict[str, Counter[str]] = field(default_factory=dict)
    """Stage -> operation -> bytes read and written."""

    @property
    def activations(self) -> int:
        """Bytes kept for the backward pass by all stages, including the weights' copies in half precision."""
        return sum(self.kept.values())

    @property
    def total_launches(self) -> int:
        """Launches of the whole step."""
        return sum(sum(counter.values()) for counter in self.launches.values())

    @property
    def total_traffic(self) -> int:
        """Bytes read and written in the whole step."""
        return sum(sum(counter.values()) for counter in self.traffic.values())


class Recorder(TorchDispatchMode):
    """Counts the launches and memory of the operations under it; works on fake and on real tensors."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.stage = OTHER
        self.live: dict[int, tuple[int, str]] = {}
        self.bytes = self.peak = 0
        self.launches: dict[str, Counter[str]] = {}
        self.traffic: dict[str, Counter[str]] = {}
        self.waits: list[str] = []
        """Operations that would block the host, or copy something from it."""
        for tensor in known:
            self._note(tensor, "weights")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        count = launches(func, args)
        if count:
            self.launches.setdefault(self.stage, Counter())[name] += count
            self.traffic.setdefault(self.stage, Counter())[name] += moved_bytes(func, args, kwargs or {}, output)
        if name in ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero", "aten::item"):
            self.waits.append(name)
        # Autograd sums gradients of one tensor in place in one of them; for non-plain tensors, in a new one.
        in_place = name == "aten::add" and _called_by_autograd()
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._note(tensor, self.stage, in_place)
        return output

    def _note(self, tensor: Tensor, stage: str, in_place: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live or not storage.nbytes():
            return
        self.live[key] = storage.nbytes(), stage
        self.bytes += storage.nbytes()
        if not in_place:
            self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size, _ = self.live.pop(key, (0, ""))
        self.bytes -= size

    def by_stage(self) -> dict[str, int]:
        """Bytes alive now, by the stage that made them."""
        sums: Counter[str] = Counter()
        for size, stage in self.live.values():
            sums[stage] += size
        return dict(sums)


def _called_by_autograd() -> bool:
    """Whether autograd's engine itself called the current operation, and not a function in Python."""
    frame = sys._getframe(2)
    while frame.f_code.co_name in ("_fn", "inner") and frame.f_back is not None:  # torch's wrappers around a mode
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


def launches(func: Any, args: tuple) -> int:
    """How many kernels one operation launches on a GPU (see the header)."""
    namespace, name = func.name().split(".")[0].split("::")
    if namespace == "electra_kernels":
        numbers = {a.name: value for a, value in zip(func._schema.arguments, args)}
        return KERNELS.get(name, 1) + (name == "attention_backward" and numbers["max_seqlen"] > LONG_ATTENTION)
    full = f"{namespace}::{name}"
    if func.is_view or full in SILENT or namespace in ("prim", "profiler"):
        return 0
    if name.startswith(("_foreach_", "_fused_")):
        lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
        fused = {"_fused_adamw_": 4}.get(name, len(lists))
        return multi_tensor_launches([tensor.numel() for tensor in lists[0]], fused)
    return SEVERAL.get(full, 1)


def moved_bytes(func: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> int:
    """Bytes that one operation reads and writes (see the header)."""
    name, schema = func.name().split(".")[0], func._schema
    given = dict(zip((a.name for a in schema.arguments), args)) | kwargs
    overwritten = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    written = _bytes_of(output) if len(schema.returns) else _bytes_of([given[name] for name in overwritten])
    if name in TAKE_ROWS:
        indices = [v for v in given.values() if isinstance(v, Tensor) and v.dtype == torch.int64]
        return 2 * written + _bytes_of(indices)
    unread = overwritten if name in OVERWRITE else set()
    return written + _bytes_of([value for name, value in given.items() if name not in unread])


def _bytes_of(tree: Any) -> int:
    """Bytes of all tensors in `tree`; repeated elements of an expanded tensor count once."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return sum(
        t.element_size() * math.prod(n if stride else min(n, 1) for n, stride in zip(t.shape, t.stride()))
        for t in tensors
    )


def multi_tensor_launches(sizes: list[int], depth: int) -> int:
    """Launches of a multi-tensor kernel over `depth` lists of tensors of these sizes."""
    count, tensors, blocks = 0, 0, 0
    for size in sizes:
        tensors += 1
        blocks += max(1, -(-size // BLOCK))
        count, blocks = count + blocks // BLOCKS_PER_LAUNCH, blocks % BLOCKS_PER_LAUNCH
        if tensors == TENSORS_PER_LAUNCH[min(depth, 5) - 1]:
            count, tensors, blocks = count + 1, 0, 0
    return count + (tensors > 0)


def trace_step(
    encoder: EncoderConfig,
    config: PretrainConfig,
    sequences: int,
    length: int,
    *,
    kernels: str = "triton",
    precision: torch.dtype = torch.bfloat16,
) -> StepTrace:
    """The trace of one step of `config`'s objective, in one part, with the optimizer state already allocated.

    Args:
        sequences, length: number and length of the batch's sequences, all of which are full.
        kernels: "triton": as on a GPU; "auto": as on a CPU; "reference": the reference implementations.
        precision: dtype of the products.
    """
    config = replace(config, max_length=length, position_init="normal", embedding_init="normal")
    with FakeTensorMode(), use(kernels):  # type: ignore[arg-type]
        model, optimizer = built(encoder, config)
        inputs = StaticInputs(full_shape(sequences, length, config.max_predictions), 1)
        return record_step(model, optimizer, inputs, config.clip_norm, precision)


def record_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: StaticInputs, clip_norm: float,
    precision: torch.dtype,
) -> StepTrace:  # fmt: skip
    """Takes two steps and records the second, on fake or real tensors."""
    trace = StepTrace(tokens=inputs.shape.tokens)
    loop = loop_of(model, optimizer, clip_norm, precision)
    trace.weights = trace.gradients = sum(p.nbytes for p in loop.parameters)
    take_step(loop, inputs.parts, inputs.seed, inputs.rate)
    state = state_tensors(optimizer).values()
    trace.optimizer = sum(value.nbytes for value in state)
    recorder = Recorder([*loop.parameters, *state])

    def recorded(batch: Any, seed: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with stages(model, recorder):
            loss = model(batch, seed).loss
        kept = recorder.by_stage()
        trace.kept = {stage: size for stage, size in kept.items() if stage != "weights"}
        recorder.stage = BACKWARD
        return loss, {}

    handle = optimizer.register_step_pre_hook(lambda *_: setattr(recorder, "stage", OPTIMIZER))
    with recorder:
        take_step(replace(loop, loss_function=recorded), inputs.parts, inputs.seed, inputs.rate)
    handle.remove()
    trace.peak, trace.launches, trace.traffic = recorder.peak, recorder.launches, recorder.traffic
    return trace


def loop_of(model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float, precision: torch.dtype) -> Loop:
    """A `Loop` for `take_step` on a CPU, which is given seed and rate, so the loop's own are not used."""
    return Loop(
        model, optimizer, lambda batch, seed: (model(batch, seed).loss, {}), schedule=lambda step: 0.0, steps=2,
        seed=0, clip_norm=clip_norm, autocast=autocast_context(torch.device("cpu"), precision),
    )  # fmt: skip


@contextmanager
def stages(model: nn.Module, recorder: Any) -> Iterator[None]:
    """Inside, `recorder.stage` is the name of the part of the model that is running."""
    handles, stack = [], [recorder.stage]

    def enter(stage: str) -> Any:
        def hook(*_: Any) -> None:
            stack.append(stage)
            recorder.stage = stage

        return hook

    def leave(*_: Any) -> None:
        stack.pop()
        recorder.stage = stack[-1]

    for name, module in model.named_modules():
        stage = STAGES.get(name) or STAGES.get(name.rsplit(".", 1)[-1])
        if stage is not None:
            handles += [module.register_forward_pre_hook(enter(stage)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def built(encoder: EncoderConfig, config: PretrainConfig) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer as in a run; fake inside a `FakeTensorMode`."""
    model = build_objective(encoder, config)
    set_recompute(model, config.recompute)
    optimizer = build_optimizer(model, config)
    make_capturable(optimizer, torch.device("cpu"))
    return model.train(), optimizer


def full_shape(sequences: int, length: int, max_predictions: int) -> Shape:
    """The shape of a batch of full sequences, without filling."""
    return Shape(sequences * length, sequences, sequences * max_predictions, length)
