"""Attention compared with its peers: forward, and forward with backward.

    python -m benchmarks.bench_attention [--device cuda] [--only TEXT] [--out FILE]

Peers: the twin in plain PyTorch (eager and under torch.compile); scaled_dot_product_attention, with each of its
backends where sequences are of equal length, else with a boolean mask on padded tensors (padding and unpadding are
not timed); and `aten::_flash_attention_forward` (FlashAttention 2), the only peer with variable lengths *and*
dropout. Peers get queries, keys and values as separate tensors, so that they are not charged for packing
gradients; ours are packed. Before timing, output and gradients without dropout are compared with those of the twin
in fp32; with dropout, the fraction that a peer keeps is measured. GB/s count each input read once and each output
written once; TFLOP/s count 4 and 10 · Σ length² · H · K.

On a GPU the eager twin is left out, and the table says so, where it would take most of the benchmark's time: with
dropout and lengths that differ it computes length by length (57,480 operations in a forward pass of "Small, 8 to
128", 489 without dropout; counted on a CPU).

Not run on a GPU so far; on a CPU it uses tiny shapes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from electra_kernels import attention, use
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.catalogue import LEFT_OUT
from benchmarks.kernel_report import Result, failed, keep, report, require_device
from benchmarks.kernel_timing import Work, compiled, parser, run, same, settle, with_gradients

COMPILED, EAGER = "twin, torch.compile", "twin, eager"
TOO_MANY = f"{LEFT_OUT} tens of thousands of launches, length by length"


@dataclass(frozen=True)
class Workload:
    """One batch: the `lengths` of its sequences, heads, head dim, dropout."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    dropout_p: float

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def is_equal(self) -> bool:
        return len(set(self.lengths)) == 1

    def bytes_moved(self, backward: bool, itemsize: int) -> int:
        """Q, K, V read and O written; backward: Q, K, V, dO read and dQ, dK, dV written."""
        return (4 + (7 if backward else 0)) * sum(self.lengths) * self.heads * self.head_dim * itemsize

    def flops(self, backward: bool) -> int:
        """Two matrix products forward, five backward."""
        square = sum(length * length for length in self.lengths)
        return (4 + (10 if backward else 0)) * square * self.heads * self.head_dim


@dataclass(frozen=True)
class Batch:
    """A workload's tensors: packed, and padded for peers that need it."""

    work: Workload
    qkv_T3HK: Tensor
    dout_THK: Tensor
    cu_seqlens: Tensor

    @staticmethod
    def of(work: Workload, dtype: torch.dtype, device: torch.device) -> Batch:
        tokens = sum(work.lengths)
        qkv = torch.randn(tokens, 3, work.heads, work.head_dim, device=device).to(dtype)
        dout = torch.randn(tokens, work.heads, work.head_dim, device=device).to(dtype)
        cu_seqlens = torch.tensor([0, *work.lengths]).cumsum(0).to(device, torch.int32)
        return Batch(work, qkv, dout, cu_seqlens)

    def padded(self, packed: Tensor) -> Tensor:
        """[T, H, K] -> [N, H, S, K], zeros where there is no token."""
        parts = packed.split(list(self.work.lengths))
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True).transpose(1, 2).contiguous()

    def packed(self, padded: Tensor) -> Tensor:
        """[N, H, S, K] -> [T, H, K]"""
        return padded.transpose(1, 2)[self.mask_NS()]

    def mask_NS(self) -> Tensor:
        """Where there is a token."""
        lengths = torch.tensor(self.work.lengths, device=self.qkv_T3HK.device)
        return torch.arange(self.work.longest, device=lengths.device) < lengths[:, None]


@dataclass(frozen=True)
class Contestant:
    """A contestant's inputs, its function, and how to convert results to packed tensors."""

    leaves: tuple[Tensor, ...]
    """The tensors that get gradients: packed qkv, or queries, keys and values."""
    function: Callable[..., Tensor]
    dout: Tensor
    packed: Callable[[Tensor], Tensor]
    """[T, H, K] of a result or of one leaf's gradient (ours: of qkv's)."""

    def both(self) -> tuple[Tensor, ...]:
        """Packed output, dq, dk, dv."""
        leaves = tuple(leaf.detach().requires_grad_() for leaf in self.leaves)
        out = self.function(*leaves)
        gradients = torch.autograd.grad(out, leaves, self.dout)
        if len(gradients) == 1:
            return out.detach(), *gradients[0].unbind(1)
        return tuple(self.packed(result) for result in (out.detach(), *gradients))


Setup = Callable[[Batch], Contestant]


def _ours(implementation: Any, compiles: bool = False) -> Setup:
    def setup(batch: Batch) -> Contestant:
        function = compiled(attention) if compiles else attention
        seed = torch.tensor([1, 0], device=batch.qkv_T3HK.device)

        def run(qkv: Tensor) -> Tensor:
            with use(implementation):
                return function(
                    qkv, batch.cu_seqlens, batch.work.longest, dropout_p=batch.work.dropout_p, seed=seed
                )

        return Contestant((batch.qkv_T3HK,), run, batch.dout_THK, lambda result: result)

    return setup


def _sdpa(backend: SDPBackend | None, masked: bool = False) -> Setup:
    def setup(batch: Batch) -> Contestant:
        leaves = tuple(batch.padded(part) for part in batch.qkv_T3HK.unbind(1))
        mask = batch.mask_NS()[:, None, None] if masked else None

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with nullcontext() if backend is None else sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=batch.work.dropout_p)

        return Contestant(leaves, run, batch.padded(batch.dout_THK), batch.packed)

    return setup


def _aten_flash(batch: Batch) -> Contestant:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cu, longest = batch.cu_seqlens, batch.work.longest
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, cu, cu, longest, longest, batch.work.dropout_p, False, False
        )
        result: Tensor = out[0]
        return result

    leaves = tuple(part.contiguous() for part in batch.qkv_T3HK.unbind(1))
    return Contestant(leaves, run, batch.dout_THK, lambda result: result)


def contestants(work: Workload, options: argparse.Namespace) -> dict[str, Setup]:
    """All that can run `work`; ours first."""
    if options.device == "cpu":
        found: dict[str, Setup] = {"ours (twin)": _ours("reference")}
        found["SDPA, boolean mask"] = _sdpa(None, masked=True)
        return found | ({"SDPA": _sdpa(None)} if work.is_equal else {})
    found = {"ours": _ours("triton")}
    if not leaves_out_twin(work, options):
        found[EAGER] = _ours("reference")
    if work.is_equal:
        if options.compile and work.name.startswith(("Small, 128", "Base, 512")):  # each takes a minute
            found[COMPILED] = _ours("reference", compiles=True)
        found["SDPA, FlashAttention"] = _sdpa(SDPBackend.FLASH_ATTENTION)
        found["SDPA, cuDNN"] = _sdpa(SDPBackend.CUDNN_ATTENTION)
    found["SDPA, boolean mask"] = _sdpa(None, masked=True)
    found["aten FlashAttention 2, varlen"] = _aten_flash
    return found


def leaves_out_twin(work: Workload, options: argparse.Namespace) -> bool:
    """Whether the eager twin is left out; see the file's header."""
    return options.device != "cpu" and not work.is_equal and work.dropout_p > 0


def workloads(on_gpu: bool) -> list[Workload]:
    """Attention of ELECTRA-Small at 128 and of -Base at 512 tokens, with equal lengths and with those of a
    fine-tuning batch; the most informative come first."""
    if not on_gpu:
        return [
            Workload("equal 16", (16,) * 4, 2, 16, 0.0),
            Workload("mixed", (16, 5, 9), 2, 16, 0.1),
        ]
    generator = torch.Generator().manual_seed(0)
    mixed = tuple(torch.randint(8, 129, (1024,), generator=generator).tolist())
    longer = tuple(4 * n for n in mixed[:256])
    shapes = {
        "Small, 128": ((128,) * 1024, 4),
        "Base, 512": ((512,) * 256, 12),
        "Small, 8 to 128": (mixed, 4),
        "Base, 32 to 512": (longer, 12),
        "Base, 128": ((128,) * 512, 12),
        "Base, 8192": ((8192,) * 8, 12),
    }
    return [
        Workload(f"{name}, p={dropout_p}", lengths, heads, 64, dropout_p)
        for name, (lengths, heads) in shapes.items()
        for dropout_p in (0.1, 0.0)
    ]


def check(name: str, setup: Setup, work: Workload, dtype: torch.dtype, device: torch.device) -> None:
    """Output and gradients of a few of the workload's sequences, without dropout, are the twin's in fp32.

    Raises:
        Mismatch: they are not.
    """
    batch = Batch.of(replace(work, lengths=work.lengths[:4], dropout_p=0.0), dtype, device)
    exact = replace(batch, qkv_T3HK=batch.qkv_T3HK.float(), dout_THK=batch.dout_THK.float())
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    same(name, setup(batch).both(), _ours("reference")(exact).both(), tolerance)


def kept_fraction(setup: Setup, dropout_p: float, dtype: torch.dtype, device: torch.device) -> float:
    """The measured fraction of probabilities that a contestant keeps: equal logits, values that count keys."""
    work = Workload("kept", (64,) * 16, 4, 64, dropout_p)
    batch = Batch.of(work, dtype, device)
    batch.qkv_T3HK.zero_()
    tokens = torch.arange(sum(work.lengths), device=device)
    batch.qkv_T3HK[tokens, 2, :, tokens % 64] = 1.0
    contestant = setup(batch)
    return (contestant.function(*contestant.leaves) != 0).double().mean().item()


def bench(work: Workload, dtype: torch.dtype, options: argparse.Namespace) -> None:
    """Results of all contestants, forward and with backward, or the reason why there are none."""
    device, found = torch.device(options.device), contestants(work, options)
    try:
        batch = Batch.of(work, dtype, device)
    except Exception as error:
        for name in found:
            keep(failed(work.name, name, error), options)
        require_device(work.name, error)
        return
    if leaves_out_twin(work, options):
        keep(Result(work.name, EAGER, None, note=TOO_MANY), options)
    for name, setup in found.items():
        try:
            contestant, note = setup(batch), ""
            if name == COMPILED:  # it drops what the twin drops; other shapes would compile it again
                same(name, contestant.both(), _ours("reference")(batch).both(), 2e-2)
            else:
                check(name, setup, work, dtype, device)
                if work.dropout_p > 0:
                    note = f"keeps {kept_fraction(setup, work.dropout_p, dtype, device):.4f}"
        except Exception as error:  # the backend refuses, or computes something else
            keep(failed(work.name, name, error), options)
            require_device(f"{work.name}, {name}", error)
            continue
        leaves = tuple(leaf.detach().requires_grad_() for leaf in contestant.leaves)
        inputs = (*leaves, contestant.dout)

        def forward(*inputs: Tensor, function: Callable[..., Tensor] = contestant.function) -> Tensor:
            return function(*inputs[:-1])

        for what, step in (("forward", torch.no_grad()(forward)), ("both", with_gradients(forward, len(leaves)))):
            backward = what == "both"
            amount = Work(work.bytes_moved(backward, dtype.itemsize), work.flops(backward))
            run(f"{work.name} {what}", name, step, inputs, options, amount, note)


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Checks, measures and prints."""
    arguments_ = parser(__doc__ or "")
    arguments_.add_argument("--dtype", default=None, choices=["bfloat16", "float16", "float32"],
                            help="data type (default: bfloat16; on a CPU float32)")  # fmt: skip
    arguments_.add_argument("--only", default="", help="only workloads whose name contains this text")
    options = settle(arguments_.parse_args(arguments))
    on_gpu = options.device != "cpu"
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    for work in workloads(on_gpu):
        if options.only in work.name:
            bench(work, dtype, options)
    return report(options)


if __name__ == "__main__":
    main()
