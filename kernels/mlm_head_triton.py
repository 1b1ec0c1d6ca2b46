"""Projection + cross-entropy + exact draw on Triton, without storing the M x V logits (maths: `mlm_head`).

Logits are kept in units of log 2, x = (hidden · embedding + bias) · log2 e, so that 2^x is one instruction.

**Tile sums.** The vocabulary is split into tiles of 128 entries. For each row and tile, the maximum and the sum of
2^(x - maximum) are stored: 2 x 239 numbers per row instead of 30522 logits. How tiles are distributed over
programs does not change any number. With a temperature ≠ 1, the sum at that temperature is stored as well.
**Draw.** A program owns one row. It merges the tile sums into the logsumexp, computes the target's logit and the
loss, draws a tile, recomputes the tile's 128 logits and draws the token: one Philox call per row.
**Backward.** Hidden, embedding, bias, targets and the logsumexp are saved. The upstream gradient g is applied in
two factors, g / max|g| inside the kernels and max|g| at the end. With a mean loss the first factor is exactly 1,
so half precision neither rounds once more nor underflows.

Which kernels compute tile sums and gradients depends on E: `mlm_head_narrow_triton` (half precision, E ≤ 128,
ELECTRA-Small) keeps everything on chip, `mlm_head_wide_triton` leaves the large products to cuBLAS.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
import triton
import triton.language as tl
from electra_kernels import mlm_head_narrow_triton as narrow
from electra_kernels import mlm_head_wide_triton as wide
from electra_kernels.blocks_triton import LOG2E, ROUNDED, finite_or_zero, load_bias2, load_rows
from electra_kernels.compile_case import CompileCase, signature_of
from electra_kernels.mlm_head_autograd import register
from electra_kernels.operators import operator, statistics_dtype
from electra_kernels.sample_replace_reference import inverse_temperature
from electra_kernels.sample_replace_triton import TILE_V, inverse_cdf, row_uniforms
from torch import Tensor


@triton.jit
def _row_logits2(
    p_row, p_embedding, p_bias, o_v, ACC: tl.constexpr, V: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """One row's logits of the vocabulary entries `o_v`, in units of log 2; -inf outside the vocabulary."""
    b_x = load_bias2(p_bias, o_v, ACC, V)
    for first in range(0, E, BLOCK_E):
        o_e = first + tl.arange(0, BLOCK_E)
        b_hidden = tl.load(p_row + o_e, mask=o_e < E, other=0.0).to(ACC)
        b_words = load_rows(p_embedding, o_v, o_v < V, o_e, E).to(ACC)
        b_x += tl.sum(b_words * b_hidden[None, :], 1) * LOG2E
    return b_x


@triton.jit(do_not_specialize=["stream"])
def _draw_kernel(
    p_hidden, p_embedding, p_bias, p_target, p_seed, p_max, p_sum, p_drawn_sum,
    p_loss, p_sampled, p_logsumexp, stream, inverse_temperature,
    V: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, TILES_P2: tl.constexpr,
):  # fmt: skip
    """Logsumexp, loss and draw of one row, from its tile sums."""
    m = tl.program_id(0).to(tl.int64)
    TILES: tl.constexpr = tl.cdiv(V, TILE_V)
    ACC: tl.constexpr = p_max.dtype.element_ty
    o_tile = tl.arange(0, TILES_P2)
    b_max = tl.load(p_max + m * TILES + o_tile, mask=o_tile < TILES, other=float("-inf"))
    b_sum = tl.load(p_sum + m * TILES + o_tile, mask=o_tile < TILES, other=0.0)
    row_max = finite_or_zero(tl.max(b_max, 0))
    logsumexp = row_max + tl.log2(tl.sum(b_sum * tl.exp2(b_max - row_max), 0))
    tl.store(p_logsumexp + m, logsumexp)

    p_row = p_hidden + m * E
    o_one = tl.zeros((1,), tl.int32)
    target = tl.load(p_target + m)
    inside = (target >= 0) & (target < V)  # a wrong target gives NaN, not a wild read
    b_x = _row_logits2(p_row, p_embedding, p_bias, o_one + tl.where(inside, target, 0), ACC, V, E, BLOCK_E)
    x_target = tl.where(inside, tl.sum(b_x, 0), float("nan"))
    tl.store(p_loss + m, (logsumexp - x_target) / LOG2E)

    u_tile, u_word = row_uniforms(p_seed, m, stream)
    b_drawn = tl.load(p_drawn_sum + m * TILES + o_tile, mask=o_tile < TILES, other=0.0)
    b_drawn *= tl.exp2((b_max - row_max) * inverse_temperature)
    tile, valid = inverse_cdf(b_drawn, u_tile, TILES_P2)
    o_v = tile * TILE_V + tl.arange(0, TILE_V)
    b_x = _row_logits2(p_row, p_embedding, p_bias, o_v, ACC, V, E, BLOCK_E)
    b_x = tl.exp2((b_x - finite_or_zero(tl.max(b_x, 0))) * inverse_temperature)
    word, valid_word = inverse_cdf(b_x, u_word, TILE_V)
    tl.store(p_sampled + m, tl.where(valid & valid_word, tile * TILE_V + word, -1).to(tl.int64))


# ---------------------------------------------------------------- custom operators and autograd


def _kernels(hidden_ME: Tensor) -> ModuleType:
    """The module whose `tile_sums` and `backward` suit this width and dtype."""
    # In fp32 the narrow kernels would spill to the stack; the interpreter has none and can run them.
    fits = hidden_ME.itemsize == 2 or not hidden_ME.is_cuda
    return narrow if hidden_ME.shape[1] <= narrow.WIDEST and fits else wide


def _operands(hidden_ME: Tensor, embedding_VE: Tensor, *others: Tensor) -> list[Tensor]:
    """The tensors, contiguous; the embedding in hidden's dtype."""
    return [tensor.contiguous() for tensor in (hidden_ME, embedding_VE.to(hidden_ME.dtype), *others)]


@operator("mlm_head")
def forward(
    hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, target_M: Tensor, seed: Tensor, stream: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss_M, sampled_ids_M, logsumexp_M in units of log 2)."""
    hidden_ME, embedding_VE, bias_V, target_M = _operands(hidden_ME, embedding_VE, bias_V, target_M)
    (rows, size), vocabulary = hidden_ME.shape, len(embedding_VE)
    dtype = statistics_dtype(hidden_ME)
    loss_M, logsumexp_M = (hidden_ME.new_empty(rows, dtype=dtype) for _ in range(2))
    sampled_M = torch.empty(rows, dtype=torch.int64, device=hidden_ME.device)
    if rows == 0:
        return loss_M, sampled_M, logsumexp_M
    tiles = triton.cdiv(vocabulary, TILE_V.value)
    maximum, total = (hidden_ME.new_empty(rows, tiles, dtype=dtype) for _ in range(2))
    sums = (maximum, total, total if temperature == 1.0 else torch.empty_like(total))
    inverse = inverse_temperature(temperature)
    _kernels(hidden_ME).tile_sums(hidden_ME, embedding_VE, bias_V, sums, inverse)
    _draw_kernel[(rows,)](
        hidden_ME, embedding_VE, bias_V, target_M, seed, *sums, loss_M, sampled_M, logsumexp_M, stream, inverse,
        V=vocabulary, E=size, BLOCK_E=_draw_block(size), TILES_P2=triton.next_power_of_2(tiles),
        num_warps=4, **ROUNDED,
    )  # fmt: skip
    return loss_M, sampled_M, logsumexp_M


def _draw_block(size: int) -> int:
    return min(64, triton.next_power_of_2(size))


@operator("mlm_head_backward")
def backward(
    grad_M: Tensor, hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, target_M: Tensor,
    logsumexp_M: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dhidden_ME, dembedding_VE, dbias_V)."""
    if len(hidden_ME) == 0:
        return tuple(t.new_zeros(t.shape) for t in (hidden_ME, embedding_VE, bias_V))  # type: ignore[return-value]
    dtype = embedding_VE.dtype
    grad_M, grad_max = grad_M.contiguous(), grad_M.abs().amax()
    operands = _operands(hidden_ME, embedding_VE, bias_V, target_M)
    return _kernels(hidden_ME).backward(grad_M, grad_max, *operands, logsumexp_M, dtype)


register(forward, backward)


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """The draw kernel, and the kernels for narrow and for wide embeddings."""
    for dtype, size in (("bf16", 128), ("fp16", 768), ("fp32", 128)):
        types = {"p_hidden": f"*{dtype}", "p_embedding": f"*{dtype}", "stream": "i32"}
        integers = dict.fromkeys(("p_target", "p_seed", "p_sampled"), "*i64")
        types |= {**integers, "inverse_temperature": "fp32"}
        constexprs = {"V": 30522, "E": size, "BLOCK_E": _draw_block(size), "TILES_P2": 256}
        signature = signature_of(_draw_kernel, types, constexprs)
        name = f"mlm_head_draw[{dtype} E={size}]"
        yield CompileCase(name, _draw_kernel, signature, constexprs, num_warps=4, num_stages=3, **ROUNDED)
    yield from narrow.compile_cases(capability)
    yield from wide.compile_cases(capability)
