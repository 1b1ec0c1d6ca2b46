"""Attention beside its peers: forward, and forward with backward.

    python -m benchmarks.bench_attention [--device cuda] [--only TEXT] [--out FILE]

Peers: the twin in plain PyTorch (eager and under torch.compile), scaled_dot_product_attention with each of its
backends where all sequences are equally long, the same with a boolean mask on padded tensors where they are not
(padding and unpadding are not charged to it), and the only one that has variable lengths *and* dropout,
`aten::_flash_attention_forward` (FlashAttention 2). A peer's kept fraction is measured before its time is
believed. GB/s count each input read once and each output written once; TFLOP/s count 4 and 10 · Σ length² · H · K.

Not run on a GPU so far; on a CPU it takes tiny shapes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from electra_kernels import attention, use
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernel_timing import Result, Work, parser, report, run, settle, with_gradients


@dataclass(frozen=True)
class Workload:
    """One batch: `lengths` of its sequences, heads, head dim, dropout."""

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
        """[T, ...] -> [N, S, ...], zeros where there is no token."""
        parts = packed.split(list(self.work.lengths))
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)

    def mask_N11S(self) -> Tensor:
        lengths = torch.tensor(self.work.lengths, device=self.qkv_T3HK.device)
        return (torch.arange(self.work.longest, device=lengths.device) < lengths[:, None])[:, None, None]


# A peer makes its inputs from a batch: (tensor that takes the gradient, function of it, gradient of its result).
Setup = Callable[[Batch], tuple[Tensor, Callable[[Tensor], Tensor], Tensor]]


def _packed(implementation: Any, compiled: bool = False) -> Setup:
    def setup(batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
        function = torch.compile(attention) if compiled else attention
        seed = torch.tensor([1, 0], device=batch.qkv_T3HK.device)

        def run(qkv: Tensor) -> Tensor:
            with use(implementation):
                return function(
                    qkv, batch.cu_seqlens, batch.work.longest, dropout_p=batch.work.dropout_p, seed=seed
                )

        return batch.qkv_T3HK, run, batch.dout_THK

    return setup


def _sdpa(backend: SDPBackend | None, masked: bool = False) -> Setup:
    def setup(batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
        qkv = batch.padded(batch.qkv_T3HK).permute(2, 0, 3, 1, 4).contiguous()
        dout = batch.padded(batch.dout_THK).transpose(1, 2).contiguous()
        mask = batch.mask_N11S() if masked else None

        def run(qkv: Tensor) -> Tensor:
            q, k, v = qkv.unbind(0)
            if backend is None:
                return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=batch.work.dropout_p)
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=batch.work.dropout_p)

        return qkv, run, dout

    return setup


def _aten_flash(batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
    def run(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(1)
        cu, longest = batch.cu_seqlens, batch.work.longest
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, cu, cu, longest, longest, batch.work.dropout_p, False, False
        )
        result: Tensor = out[0]
        return result

    return batch.qkv_T3HK, run, batch.dout_THK


def contestants(work: Workload, device: torch.device) -> dict[str, Setup]:
    """Everything that can run `work` on `device`; ours first."""
    if device.type == "cpu":
        found: dict[str, Setup] = {"ours (twin)": _packed("reference")}
        found["SDPA, boolean mask"] = _sdpa(None, masked=True)
        return found | ({"SDPA": _sdpa(None)} if work.is_equal else {})
    found = {"ours": _packed("triton"), "twin, eager": _packed("reference")}
    if work.is_equal:
        found["twin, torch.compile"] = _packed("reference", compiled=True)
        found["SDPA, FlashAttention"] = _sdpa(SDPBackend.FLASH_ATTENTION)
        found["SDPA, cuDNN"] = _sdpa(SDPBackend.CUDNN_ATTENTION)
    found["SDPA, boolean mask"] = _sdpa(None, masked=True)
    found["aten FlashAttention 2, varlen"] = _aten_flash
    return found


def workloads(device: torch.device) -> list[Workload]:
    """Attention of ELECTRA-Small at 128 and of -Base at 512; equal lengths and a fine-tuning batch's."""
    if device.type == "cpu":
        return [
            Workload("equal 16", (16,) * 4, 2, 16, 0.0),
            Workload("mixed", (16, 5, 9), 2, 16, 0.1),
        ]
    generator = torch.Generator().manual_seed(0)
    mixed = tuple(torch.randint(8, 129, (1024,), generator=generator).tolist())
    found = []
    for dropout_p in (0.0, 0.1):
        found += [
            Workload(f"Small, 128, p={dropout_p}", (128,) * 1024, 4, 64, dropout_p),
            Workload(f"Base, 128, p={dropout_p}", (128,) * 512, 12, 64, dropout_p),
            Workload(f"Base, 512, p={dropout_p}", (512,) * 256, 12, 64, dropout_p),
            Workload(f"Small, 8 to 128, p={dropout_p}", mixed, 4, 64, dropout_p),
            Workload(f"Base, 32 to 512, p={dropout_p}", tuple(4 * n for n in mixed[:256]), 12, 64, dropout_p),
            Workload(f"Base, 8192, p={dropout_p}", (8192,) * 8, 12, 64, dropout_p),
        ]
    return found


def kept_fraction(setup: Setup, dropout_p: float, dtype: torch.dtype, device: torch.device) -> float:
    """Share of probabilities a contestant really keeps: equal logits, values that count keys."""
    work = Workload("kept", (64,) * 16, 4, 64, dropout_p)
    batch = Batch.of(work, dtype, device)
    batch.qkv_T3HK.zero_()
    tokens = torch.arange(sum(work.lengths), device=device)
    batch.qkv_T3HK[tokens, 2, :, tokens % 64] = 1.0
    x, run, _ = setup(batch)
    return (run(x) != 0).double().mean().item()


def bench(work: Workload, dtype: torch.dtype, options: argparse.Namespace) -> Iterator[Result]:
    """Results of all contestants, forward and with backward; one that cannot run says why."""
    device = torch.device(options.device)
    batch = Batch.of(work, dtype, device)
    for name, setup in contestants(work, device).items():
        x, function, dout = setup(batch)
        inputs = (x.detach().requires_grad_(), dout)
        try:
            note = _kept(setup, work, dtype, device)
        except (RuntimeError, NotImplementedError):  # a backend that refuses: `run` will say why
            note = ""

        def forward(x: Tensor, _: Tensor, function: Callable[[Tensor], Tensor] = function) -> Tensor:
            return function(x)

        for what, step in (("forward", torch.no_grad()(forward)), ("both", with_gradients(forward, 1))):
            backward = what == "both"
            amount = Work(work.bytes_moved(backward, dtype.itemsize), work.flops(backward))
            yield run(f"{work.name} {what}", name, step, inputs, options, amount, note)


def _kept(setup: Setup, work: Workload, dtype: torch.dtype, device: torch.device) -> str:
    return f"keeps {kept_fraction(setup, work.dropout_p, dtype, device):.4f}" if work.dropout_p > 0 else ""


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measures and prints."""
    arguments_ = parser(__doc__ or "")
    arguments_.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments_.add_argument("--only", default="", help="only workloads whose name holds this text")
    options = settle(arguments_.parse_args(arguments))
    dtype, everything = getattr(torch, options.dtype), workloads(torch.device(options.device))
    chosen = [work for work in everything if options.only in work.name]
    results = [result for work in chosen for result in bench(work, dtype, options)]
    report(results, options)
    return results


if __name__ == "__main__":
    main()
