"""The operations that `kernel_checks` compares: all, in the shapes of real runs, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from electra_kernels import (
    attention,
    bias_gelu,
    dropout_add_layer_norm_twice,
    embedding_layer_norm,
    mlm_head,
    rtd_head,
    rtd_loss,
    sample_and_replace,
    use,
)
from torch import Tensor

from electra_core.execution import cross_check

DROPOUT = 0.1


@dataclass
class Working:
    """The dtype of an operation's inputs: `dtype` inside the context (as under autocast), else fp32."""

    dtype: torch.dtype
    now: torch.dtype = torch.float32

    def __enter__(self) -> None:
        self.now = self.dtype

    def __exit__(self, *_: object) -> None:
        self.now = torch.float32


@dataclass(frozen=True)
class Operation:
    """A function of leaves with gradients. Its float results are compared; its integer results are counted."""

    shapes: tuple[tuple[int, ...], ...]
    """One for each leaf, in order."""
    function: Callable[..., tuple[Tensor, ...]]
    gradients: bool = True


def _seed(device: torch.device) -> Tensor:
    return torch.tensor([7, 0], device=device)


def _ids(count: int, upper: int, device: torch.device) -> Tensor:
    return torch.randint(upper, (count,), generator=torch.Generator().manual_seed(upper)).to(device)


def _attention(lengths: Sequence[int], head_dim: int, dropout_p: float, device: torch.device) -> Operation:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

    def run(qkv: Tensor) -> tuple[Tensor, ...]:
        return (attention(qkv, cu_seqlens, max(lengths), dropout_p=dropout_p, seed=_seed(device)),)

    return Operation(((sum(lengths), 3, 4, head_dim),), run)


def _mlm(rows: int, vocabulary: int, size: int, device: torch.device) -> Operation:
    targets = _ids(rows, vocabulary, device)

    def run(hidden: Tensor, embedding: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(mlm_head(hidden, embedding / size**0.5, bias, targets, seed=_seed(device)))

    return Operation(((rows, size), (vocabulary, size), (vocabulary,)), run)


def _sample(rows: int, vocabulary: int, device: torch.device) -> Operation:
    ids, positions = _ids(4 * rows, vocabulary, device), torch.arange(0, 4 * rows, 4, device=device)

    def run(logits: Tensor) -> tuple[Tensor, ...]:
        return (sample_and_replace(logits, ids, positions, seed=_seed(device)).sampled_ids_M,)

    return Operation(((rows, vocabulary),), run, gradients=False)


def _rtd(tokens: int, size: int, device: torch.device) -> Operation:
    labels = _ids(tokens, 2, device).bool()

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        head = rtd_head(hidden, weight, bias, labels)
        return head.loss, rtd_loss(hidden[:, 0], labels), head.logits_T

    return Operation(((tokens, size), (size,), (1,)), run)


def _layer_norm(tokens: int, size: int, device: torch.device) -> Operation:
    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> tuple[Tensor, ...]:
        return dropout_add_layer_norm_twice(
            x, residual, weight, bias, eps=1e-12, x_bias_D=x_bias, dropout_p=DROPOUT, seed=_seed(device)
        )

    return Operation(((tokens, size), (tokens, size), (size,), (size,), (size,)), run)


def _bias_gelu(tokens: int, size: int, device: torch.device) -> Operation:
    return Operation(((tokens, size), (size,)), lambda x, bias: (bias_gelu(x, bias),))


def _embedding(tokens: int, vocabulary: int, size: int, device: torch.device) -> Operation:
    uppers = vocabulary, 512, 2
    ids = [_ids(tokens, upper, device) for upper in uppers]

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        return (embedding_layer_norm(*ids, *leaves, eps=1e-12, dropout_p=DROPOUT, seed=_seed(device)),)

    return Operation((*((upper, size) for upper in uppers), (size,), (size,)), run)


def operations(device: torch.device) -> dict[str, Callable[[], Operation]]:
    """Name -> operation, each for a process of its own; tiny on a CPU, under Triton's interpreter."""
    if device.type != "cuda":
        return {
            "attention short": lambda: _attention([16, 9, 1], 16, DROPOUT, device),
            "mlm_head": lambda: _mlm(8, 140, 16, device),
            "sample_and_replace": lambda: _sample(4, 140, device),
            "rtd_head and rtd_loss": lambda: _rtd(32, 16, device),
            "layer_norm": lambda: _layer_norm(9, 16, device),
            "bias_gelu": lambda: _bias_gelu(9, 16, device),
            "embedding": lambda: _embedding(9, 50, 16, device),
        }
    short = {
        f"attention short {limit}": lambda n=limit: _attention([n] * 24 + [n // 2 + 1, 1] * 4, 64, DROPOUT, device)
        for limit in (16, 32, 64, 128)
    }
    return {
        **short,
        "attention short 128, no dropout": lambda: _attention([128] * 16, 64, 0.0, device),
        "attention general": lambda: _attention([512, 300, 129, 1, 82], 64, DROPOUT, device),
        "attention general, no dropout": lambda: _attention([512] * 2, 64, 0.0, device),
        "mlm_head narrow": lambda: _mlm(2464, 30522, 128, device),
        "mlm_head wide": lambda: _mlm(1024, 30522, 768, device),
        "sample_and_replace": lambda: _sample(512, 30522, device),
        "rtd_head and rtd_loss": lambda: _rtd(16384, 256, device),
        "layer_norm": lambda: _layer_norm(16384, 256, device),
        "bias_gelu": lambda: _bias_gelu(16384, 1024, device),
        "embedding": lambda: _embedding(16384, 30522, 128, device),
    }


@dataclass(frozen=True)
class Computation:
    """An operation on random leaves that are the same in every call, except for rounding to the working dtype."""

    operation: Operation
    working: Working
    device: torch.device

    def _results(self, gradients: bool) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        random = torch.Generator().manual_seed(cross_check.SEED)
        values = (torch.randn(*shape, generator=random) for shape in self.operation.shapes)
        rounded = (value.to(self.working.dtype).to(self.device, self.working.now) for value in values)
        leaves = [value.requires_grad_(gradients) for value in rounded]
        return leaves, self.operation.function(*leaves)

    def figures(self) -> cross_check.Figures:
        """The float results, and the leaves' gradients."""
        leaves, results = self._results(self.operation.gradients)
        floats = [result for result in results if result.is_floating_point()]
        figures = {f"result {index}": result.detach() for index, result in enumerate(floats)}
        if not self.operation.gradients:
            return figures
        losses = [_weighted(result) for result in floats if result.requires_grad]
        gradients = torch.autograd.grad(losses, leaves)
        return figures | {f"gradient {index}": gradient for index, gradient in enumerate(gradients)}

    def words(self) -> Tensor | None:
        """The ids drawn, if the operation draws any."""
        with torch.no_grad():
            _, results = self._results(gradients=False)
        return next((result for result in results if not result.is_floating_point()), None)

    def problem(self) -> str | None:
        """What the kernels compute wrong, or None."""
        if self.operation.gradients:  # an operation without gradients returns only ids
            found = cross_check.disagreement(self.figures, self.working, self.working.dtype)
            if found is not None:
                return found
        return self._other_words()

    def _other_words(self) -> str | None:
        with self.working:
            found = self.words()
            with use("reference"):
                wanted = self.words()
        if found is None or wanted is None:
            return None
        share = float((found != wanted).float().mean())
        return f"{share:.0%} of the words are drawn otherwise" if share > cross_check.OTHER_WORDS else None


def _weighted(result: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(result.numel())
    return (result.float() * torch.randn(result.shape, generator=random).to(result.device)).sum()
