"""Attention on a GPU: what the interpreter cannot show. Skipped, visibly, where there is none.

The tests of `test_attention.py` and `test_every_kernel.py` run on the GPU too, the former in three precisions.
"""

from __future__ import annotations

import pytest
import torch
from attention_calls import dropout_mask
from electra_kernels import attention, rng, use
from kernel_helpers import LARGE, assert_within_budget, skip_without_memory
from torch import Tensor

pytestmark = pytest.mark.gpu
PATHS = pytest.mark.parametrize("length", [128, 512], ids=["short", "general"])


def batch(
    count: int, length: int, heads: int = 4, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """(qkv that takes gradients, offsets) of equally long sequences."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (count * length, 3, heads, head_dim)
    qkv = torch.randn(shape, device="cuda", generator=generator).to(dtype).requires_grad_()
    return qkv, torch.arange(count + 1, device="cuda", dtype=torch.int32) * length


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("lengths", [[128, 77, 1, 0, 128], [512, 300, 129], [8192, 5]], ids=["128", "512", "8192"])
def test_real_sizes_are_within_the_error_budget(lengths: list[int], dropout_p: float, dtype: torch.dtype) -> None:
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    qkv = torch.randn(sum(lengths), 3, 2, 64, device="cuda").to(dtype)
    options = {"dropout_p": dropout_p, "seed": torch.tensor([3, 5], device="cuda"), "stream": 1}
    results = []
    for implementation, precision in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        x = qkv.to(precision).requires_grad_()
        with use(implementation):  # type: ignore[arg-type]
            out = attention(x, cu_seqlens, max(lengths), **options)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(out, x, qkv[:, 0].to(precision))
        results.append((out.detach(), grad))
    for name, got, same, exact in zip(("out", "grad"), *results, strict=True):
        assert_within_budget(name, got, same, exact)


def test_kept_fraction_of_the_kernels() -> None:
    mask = dropout_mask(4096, 512, 4, dropout_p=0.1, seed=3, device="cuda")
    expected = 1 / rng.keep_scale(0.1)
    assert abs(mask.double().mean().item() - expected) < 5 * (0.09 / mask.numel()) ** 0.5


@LARGE
@PATHS
def test_offsets_beyond_31_bits(length: int) -> None:
    """The last sequence of a batch with more than 2^31 elements equals the same sequence alone."""
    skip_without_memory(8)
    count = 2**31 // (length * 3 * 16 * 128) + 2
    qkv = torch.randn(count * length, 3, 16, 128, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    cu_seqlens = torch.arange(count + 1, device="cuda") * length
    with torch.no_grad(), use("triton"):
        last = attention(qkv, cu_seqlens, length)[-length:]
        alone = attention(qkv[-length:], cu_seqlens[:2], length)
    assert torch.equal(last, alone)


def test_debug_switch_checks_values(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, cu_seqlens = batch(2, 16)
    monkeypatch.setenv("ELECTRA_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="cu_seqlens: expected to rise"):
        attention(qkv, cu_seqlens.flip(0), 16)
