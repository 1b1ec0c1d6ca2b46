"""Attention as an operator: sound for PyTorch, whole under torch.compile, and wrong arguments named."""

from __future__ import annotations

import math

import pytest
import torch
from attention_calls import SEED, inputs, offsets, run, tiny_tiles  # noqa: F401
from electra_kernels import attention, attention_triton, use
from kernel_helpers import DEVICE
from torch import Tensor

# ---------------------------------------------------------------- torch operators


def operator_arguments(lengths: list[int], dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    qkv = inputs(lengths, heads=1)[0].to(DEVICE, dtype).requires_grad_()
    return qkv, offsets(lengths).to(DEVICE), SEED.to(DEVICE), max(lengths), 0.3, 1, 0.25


@pytest.mark.host_only
@pytest.mark.parametrize("lengths", [[5, 9], [34, 3]], ids=["short", "general"])
def test_opcheck(lengths: list[int]) -> None:
    arguments = operator_arguments(lengths)
    torch.library.opcheck(attention_triton.forward.custom, arguments)
    qkv, *others = arguments
    with torch.no_grad():
        saved = attention_triton.forward(*arguments)
        dout = torch.ones_like(saved[0])
    torch.library.opcheck(attention_triton.backward.custom, (dout, *saved, qkv.detach(), *others))  # type: ignore[attr-defined]


@pytest.mark.host_only
@pytest.mark.parametrize("lengths", [[5, 9], [34, 3]], ids=["short", "general"])
def test_compiles_without_a_graph_break(lengths: list[int]) -> None:
    qkv, dout = inputs(lengths)
    expected = run("triton", qkv, dout, lengths, torch.float32, dropout_p=0.3)
    x = qkv.to(DEVICE, torch.float32).requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, cu_seqlens: Tensor, seed: Tensor) -> Tensor:
        return attention(x * 1.0, cu_seqlens, max(lengths), dropout_p=0.3, seed=seed, stream=3)

    with use("triton"):
        out = compiled(x, offsets(lengths).to(DEVICE), SEED.to(DEVICE))
        (grad,) = torch.autograd.grad(out, x, dout.to(DEVICE, torch.float32))
    assert torch.equal(out, expected[0]) and torch.equal(grad, expected[1])


@pytest.mark.host_only
def test_twin_compiles_whole_when_lengths_are_equal() -> None:
    qkv = inputs([8, 8])[0].float()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    arguments = (qkv, offsets([8, 8]), 8)
    with use("reference"):
        out = compiled(*arguments, dropout_p=0.3, seed=SEED)
        torch.testing.assert_close(out, attention(*arguments, dropout_p=0.3, seed=SEED))


# ---------------------------------------------------------------- errors

GOOD = {"qkv_T3HK": torch.zeros(4, 3, 2, 16), "cu_seqlens": torch.tensor([0, 4]), "max_seqlen": 4}
BAD = {
    "three-dimensional": ({"qkv_T3HK": torch.zeros(4, 3, 16)}, r"qkv_T3HK: expected shape \[.*\], got"),
    "two-instead-of-three": ({"qkv_T3HK": torch.zeros(4, 2, 2, 16)}, r"qkv_T3HK: expected shape \[.*\], got"),
    "integers": ({"qkv_T3HK": torch.zeros(4, 3, 2, 16).int()}, r"qkv_T3HK: expected .*got.*int32"),
    "offsets-as-floats": ({"cu_seqlens": torch.tensor([0.0, 4.0])}, r"cu_seqlens: expected .*got.*float32"),
    "offsets-as-matrix": ({"cu_seqlens": torch.tensor([[0, 4]])}, r"cu_seqlens: expected .*got"),
    "offsets-empty": ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, r"cu_seqlens: expected .*got"),
    "offsets-fall": ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, r"cu_seqlens: expected to rise .*got"),
    "offsets-start-late": ({"cu_seqlens": torch.tensor([1, 4])}, r"cu_seqlens: expected to rise from 0 .*got"),
    "offsets-end-early": ({"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens: expected .* to T = 4, got"),
    "max-too-small": ({"max_seqlen": 3}, r"max_seqlen: expected at least the longest sequence, 4, got 3"),
    "max-negative": ({"max_seqlen": -1}, r"max_seqlen: expected at least 0, got -1"),
    "dropout-one": ({"dropout_p": 1.0, "seed": 0}, r"dropout_p: expected a number in \[0, 1\), got 1.0"),
    "dropout-nan": ({"dropout_p": math.nan, "seed": 0}, r"dropout_p: expected .*got nan"),
    "dropout-without-seed": ({"dropout_p": 0.1}, r"seed: expected .*got None"),
    "seed-of-three": ({"dropout_p": 0.1, "seed": torch.tensor([1, 2, 3])}, r"seed: expected .*got"),
    "scale-zero": ({"softmax_scale": 0.0}, r"softmax_scale: expected a finite number > 0, got 0.0"),
    "elsewhere": (
        {"cu_seqlens": torch.empty(2, dtype=torch.int64, device="meta")},
        r"cu_seqlens: expected .*meta",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), BAD.values(), ids=BAD)
def test_errors_name_the_argument(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**{**GOOD, **wrong})  # type: ignore[arg-type]
