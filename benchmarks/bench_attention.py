"""Attention beside its peers: forward, and forward with backward.

    python -m benchmarks.bench_attention [--device cuda] [--repeats 50] [--only TEXT] [--json FILE]

Peers: the twin in plain PyTorch (eager and under torch.compile), scaled_dot_product_attention with each of its
backends where all sequences are equally long, the same with a boolean mask on padded tensors where they are not
(padding and unpadding are not charged to it), and the only one that has variable lengths *and* dropout,
`aten::_flash_attention_forward` (FlashAttention 2). A peer's kept fraction is measured before its time is
believed. GB/s count each input read once and each output written once; TFLOP/s count 4 and 10 · Σ length² · H · K.

These programs have not been run on a GPU yet: no figure of this file is published. On a CPU (`--device cpu`)
the shapes are tiny; that run checks the program and says nothing about the kernels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from electra_kernels import attention, use
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import Timing, copy_bandwidth, machine, measure


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


@dataclass(frozen=True)
class Result:
    """One contestant at one workload."""

    workload: str
    contestant: str
    forward: Timing | None
    both: Timing | None
    kept: float | None
    gigabytes_per_second: float | None
    """Of forward and backward together."""
    tflops_per_second: float | None
    failed: str | None = None


def bench(work: Workload, dtype: torch.dtype, device: torch.device, repeats: int) -> Iterator[Result]:
    """Results of all contestants; one that cannot run says why."""
    batch = Batch.of(work, dtype, device)
    for name, setup in contestants(work, device).items():
        try:
            yield _bench_one(name, setup, batch, repeats)
        except (RuntimeError, NotImplementedError) as error:  # a peer's backend may refuse shape or dropout
            reason = str(error).partition("\n")[0]
            yield Result(work.name, name, None, None, None, None, None, reason)


def _bench_one(name: str, setup: Setup, batch: Batch, repeats: int) -> Result:
    work, dtype, device = batch.work, batch.qkv_T3HK.dtype, batch.qkv_T3HK.device
    x, run, dout = setup(batch)
    kept = kept_fraction(setup, work.dropout_p, dtype, device) if work.dropout_p > 0 else None
    x = x.detach().requires_grad_()

    def forward_and_backward() -> None:
        x.grad = None
        run(x).backward(dout)

    with torch.no_grad():
        forward = measure(lambda: run(x), device, repeats)
    both = measure(forward_and_backward, device, repeats)
    seconds = both.median_ms * 1e-3
    return Result(
        workload=work.name,
        contestant=name,
        forward=forward,
        both=both,
        kept=kept,
        gigabytes_per_second=work.bytes_moved(True, dtype.itemsize) / seconds / 1e9,
        tflops_per_second=work.flops(True) / seconds / 1e12,
    )


def _line(result: Result) -> str:
    head = f"{result.workload:<26} {result.contestant:<30}"
    if result.forward is None or result.both is None:
        return f"{head} cannot run: {result.failed}"
    kept = "" if result.kept is None else f"  keeps {result.kept:.4f}"
    return (
        f"{head} forward {result.forward.median_ms:9.4f} ms  with backward {result.both.median_ms:9.4f} ms  "
        f"{result.gigabytes_per_second:8.1f} GB/s {result.tflops_per_second:7.2f} TFLOP/s{kept}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--only", default="", help="only workloads whose name holds this text")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    about: dict[str, Any] = {**machine(device), "dtype": options.dtype}
    if device.type == "cuda":
        about["copy_bytes_per_second"] = copy_bandwidth(device)
    else:
        print("No GPU: tiny shapes on the CPU, to check this program; the figures say nothing about the kernels.")
    results = []
    for work in workloads(device):
        if options.only in work.name:
            for result in bench(work, dtype, device, options.repeats):
                results.append(result)
                print(_line(result), flush=True)
    if options.json:
        rows = [asdict(result) for result in results]
        options.json.write_text(json.dumps({"machine": about, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
