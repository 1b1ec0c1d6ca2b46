"""Compares the kernels with their twins (the reference implementations) once, before a run relies on a GPU.

A kernel that compiles and starts need not compute the right thing: the compiler, the driver or the chip may have a
fault, or the kernel itself on hardware it was never tried on. So before the first step on a GPU, the run's own
model, in the run's own sizes, reads a little random text in three ways:

    exact      through the twins, in fp32
    rounded    through the twins, in the run's precision
    found      through the kernels, in the run's precision

Found must be about as close to exact as rounded is, in the losses and in every parameter's gradient; and the
tokens drawn must be those that the twin draws from the same features (from differently rounded features, a trained
generator draws many other tokens). If not, or if a kernel does not compile or start, the log says what is wrong,
and "auto" uses the twins on that GPU for the rest of the process: slower, but right. `ELECTRA_TRITON=1` skips the
check. A fault smaller than the rounding goes unnoticed: this check is for the first minute of a run, `make
test-gpu` is for kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from electra_kernels import MLMHead, use
from electra_kernels.dispatch import distrust, gpu_problem
from electra_kernels.triton_support import in_words, switch
from torch import Tensor, nn

from electra_core.config import EncoderConfig
from electra_core.electra import Generator
from electra_core.execution.placement import autocast_context
from electra_core.execution.static_batch import Shapes
from electra_core.execution.torch_state import buffers_kept
from electra_core.packing import PretrainBatch, TokenBatch, from_lengths

Figures = dict[str, Tensor]
"""A model's results, by name."""
ROUNDINGS = 3.0
"""Maximum error of the kernels, as a multiple of the twins'."""
OWN, ALL = 5e-3, 1e-5
"""Errors always allowed, as fractions of a result's own norm and of the largest norm: sums in another order differ
even where the twins have no error, and some gradients are 0 except for rounding (such as that of the keys'
bias)."""
LUCK = 4.0
"""Minimum of OWN in units of the dtype's epsilon, because a single number may happen to be rounded little."""
OTHER_WORDS = 0.1
"""Share of draws from the same features that may differ: at the border of two tokens, rounding decides."""
ALIKE = 16
"""Triton compiles a separate kernel for sizes that are multiples of this, as in steps of fixed shapes."""
SHORT = 128
"""Length of the longest sequence that one attention program holds whole, on any architecture."""
SEED = 0x5EED


def check_pretraining(
    electra: Any, device: torch.device, dtype: torch.dtype, max_length: int, *, static: bool
) -> bool:
    """Checks the kernels with a pre-training objective's model, forward and backward, and leaves it unchanged.

    Args:
        electra: the model, on `device`.
        dtype: the dtype of the run's products.
        max_length: maximum length of the run's sequences.
        static: whether steps have fixed shapes, for which kernels are compiled with other types and weights.

    Returns:
        False if this check has found them wrong; True otherwise, also if they are not used anyway.
    """
    if not _uses_kernels(device, dtype):
        return True
    batch = _masked(_text(electra.discriminator.config, max_length))
    batch = (_in_fixed_shape(batch, max_length) if static else batch).to(device)

    def compute() -> Figures:
        with buffers_kept(electra):
            output = electra(batch, SEED)
            losses = {"the MLM loss": output.mlm_loss.detach(), "the RTD loss": output.rtd_loss.detach()}
            return losses | _gradients(electra, output.loss)

    generator = getattr(electra, "generator", None)
    draws: AbstractContextManager[list[Tensor]] = nullcontext([]) if generator is None else _one_draw(generator)
    with draws as other_words:
        return _check(compute, device, dtype, other_words)


def check_task_model(
    model: Any, device: torch.device, dtype: torch.dtype, max_length: int, *, training: bool, static: bool = False
) -> bool:
    """`check_pretraining` for a downstream task's model: its logits and, in training, its gradients.

    A batch's texts have similar lengths, and attention has a kernel for every power of two up to `SHORT`.
    """
    if not _uses_kernels(device, dtype):
        return True
    was_training = model.training
    model.train(training)
    limits = [limit for limit in (16, 32, 64, SHORT) if limit < max_length]
    right = all(_check_text(model, device, dtype, n, training, static) for n in (*limits, max_length))
    model.train(was_training)
    return right


def _check_text(
    model: Any, device: torch.device, dtype: torch.dtype, max_length: int, training: bool, static: bool
) -> bool:
    text = _text(model.config, max_length)
    if static:
        text = replace(text, cu_seqlens=text.cu_seqlens.long())
    text = text.to(device)

    def compute() -> Figures:
        with torch.set_grad_enabled(training), buffers_kept(model):
            logits = model(text, SEED if training else None).float()
            gradients = _gradients(model, logits.square().mean()) if training else {}
            return {"the logits": logits.detach()} | gradients

    return _check(compute, device, dtype)


def disagreement(
    compute: Callable[[], Figures], autocast: AbstractContextManager[Any], dtype: torch.dtype
) -> str | None:
    """Which result the kernels get wrong and by how much, or the error they raised; None if all are right.

    Args:
        compute: returns the same results at every call, except for rounding.
        autocast: context of the run's precision.
        dtype: the dtype of that precision.
    """
    own = max(OWN, LUCK * torch.finfo(dtype).eps)
    with use("reference"):
        with _in_fp32():
            exact = compute()
        with autocast:
            rounded = _errors(compute(), exact)
    try:
        with autocast:
            found = _errors(compute(), exact)
    except torch.cuda.OutOfMemoryError:
        raise  # the twins need more memory
    except Exception as raised:  # Triton's own, if a kernel does not compile or fit
        return in_words(raised)
    norms = _numbers([value.float().norm() for value in exact.values()])
    for name, norm, error, rounding in zip(exact, norms, found, rounded, strict=True):
        if not error <= ROUNDINGS * rounding + own * norm + ALL * max(norms):  # NaN is wrong, too
            return f"{name} is off by {error:.3g} of {norm:.3g}, where rounding makes {rounding:.3g}"
    return None


def _check(
    compute: Callable[[], Figures], device: torch.device, dtype: torch.dtype,
    other_words: list[Tensor] | None = None,
) -> bool:  # fmt: skip
    problem = disagreement(compute, autocast_context(device, dtype), dtype)
    # The last draw is the kernels'.
    if problem is None and other_words and (others := float(other_words[-1])) > OTHER_WORDS:
        problem = f"{others:.0%} of the words are drawn otherwise"
    if problem is not None:
        distrust(device, f"compared with it on this machine they failed ({problem}); please report this")
    return problem is None


def _uses_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and switch() != "1" and gpu_problem(device, dtype) is None


def _gradients(model: nn.Module, loss: Tensor) -> Figures:
    """Gradients by name; not stored in the parameters, so no hook on gradients is triggered."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {f"the gradient of {name}": g for name, g in zip(parameters, gradients) if g is not None}


def _errors(values: Figures, exact: Figures) -> list[float]:
    return _numbers([(values[name].float() - exact[name].float()).norm() for name in exact])


def _numbers(scalars: list[Tensor]) -> list[float]:
    return torch.stack(scalars).tolist()


@contextmanager
def _in_fp32() -> Iterator[None]:
    """Inside, fp32 products do not use TF32. torch has an older and a newer name for that, and who asks for the
    older one (TunableOp does, in every fp32 product) gets an error where the two differ."""
    products: Any = torch.backends.cuda.matmul
    newer, older = products.fp32_precision, "highest"
    with suppress(RuntimeError):  # the caller has set only the newer one
        older = torch.get_float32_matmul_precision()
    products.allow_tf32 = False  # sets both
    try:
        yield
    finally:
        if older == "medium":
            torch.set_float32_matmul_precision(older)
        else:
            products.allow_tf32 = older == "high"
        products.fp32_precision = newer


@contextmanager
def _one_draw(generator: Generator) -> Iterator[list[Tensor]]:
    """Inside, `generator` repeats its first draw, because another token would change everything after it.

    Yields:
        A list to which each later call adds the share of its tokens that the twin does not draw from its features.
    """
    first: list[Tensor] = []
    others: list[Tensor] = []
    fill = generator.fill

    def repeated(*arguments: Any) -> MLMHead:
        with _same_features(generator):
            head = fill(*arguments)
            if first:
                with torch.no_grad(), _in_fp32():
                    ids_M = fill(*arguments).sampled_ids_M
                    with use("reference"):
                        others.append((ids_M != fill(*arguments).sampled_ids_M).float().mean())
        first.append(head.sampled_ids_M)
        return MLMHead(head.loss_M, first[0])

    generator.fill = repeated  # type: ignore[method-assign, assignment]
    try:
        yield others
    finally:
        del generator.fill


@contextmanager
def _same_features(generator: Generator) -> Iterator[None]:
    """Inside, `generator` returns the features of its first call again."""
    features = generator.features
    kept: list[Tensor] = []

    def once(*arguments: Any) -> Tensor:
        if not kept:
            kept.append(features(*arguments))
        return kept[0]

    generator.features = once  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del generator.features


def _text(config: EncoderConfig, max_length: int) -> TokenBatch:
    """Random tokens in sequences of different lengths, the longest first; T is a multiple of `ALIKE`."""
    random = torch.Generator().manual_seed(SEED)
    lengths = [max_length, max(1, max_length - 1), max_length // 2 + 1, max_length // 3 + 1, 1]
    while missing := -sum(lengths) % ALIKE:
        lengths.append(min(missing, max_length))
    ids_T = torch.randint(config.vocab_size, (sum(lengths),), generator=random)
    segments_T = torch.randint(config.type_vocab_size, (sum(lengths),), generator=random)
    return from_lengths(ids_T, segments_T, lengths)


def _in_fixed_shape(batch: PretrainBatch, max_length: int) -> PretrainBatch:
    """The batch as in a static step (`static_batch.py`)."""
    sequences = batch.tokens.num_sequences
    shapes = Shapes(sequences, max_length, -(-len(batch.masked_positions_M) // sequences))
    inputs = shapes.inputs([batch], pinned=False)
    inputs.fill([batch], SEED, rate=0.0)
    return inputs.parts[0]


def _masked(text: TokenBatch) -> PretrainBatch:
    """Every sixth token masked, by another token; M is a multiple of `ALIKE`, except for very short texts."""
    positions_M = torch.arange(0, text.num_tokens, 6)
    positions_M = positions_M[: len(positions_M) // ALIKE * ALIKE or None]
    masked_ids_T = text.input_ids_T.clone()
    masked_ids_T[positions_M] = text.input_ids_T.roll(1)[positions_M]
    return PretrainBatch(text, masked_ids_T, positions_M)
