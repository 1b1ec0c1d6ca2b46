"""`mlm_head` for narrow embeddings (E ≤ 128): logits stay on chip both ways (design: `mlm_head_triton`).

**Forward.** A program owns BLOCK_M rows of hidden and one split of the vocabulary, which it streams in tiles of
128 entries.
**Backward.** Two kernels recompute P = 2^(x - logsumexp); together they take 8·M·V·E operations, which cost less
than moving M x V numbers. For dhidden a program owns BLOCK_M rows and one split of the vocabulary and writes a
partial sum; a third kernel adds the splits in order. For dembedding and dbias a program owns BLOCK_V vocabulary
entries and loops over all rows. There are no atomics, so results are bitwise reproducible.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from electra_kernels.blocks_triton import FUSED, LOG2E, dot, finite_or_zero, load_bias2, load_rows, store_rows
from electra_kernels.compile_case import CompileCase, signature_of
from electra_kernels.operators import architecture
from electra_kernels.sample_replace_triton import TILE_V
from torch import Tensor

WIDEST = 128  # for wider embeddings, a program's rows, tile and sums no longer fit on chip together


class Tile(NamedTuple):
    """What a program owns (rows; vocabulary entries in dembedding), what it takes per step (a tile of the
    vocabulary; rows in dembedding), warps, stages."""

    block: int
    step: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of one architecture."""

    forward: Tile
    dhidden: Tile
    dembedding: Tile


# Chosen from the compile report, for E = 128: two forward programs fit on a multiprocessor (96 KB of shared memory
# each), so that the exponentials of one overlap with the products of the other. Larger backward tiles spill on
# sm_80 and, with Triton 3.6, on sm_100, where dhidden also spills with four warps (3.8 and 3.9). Not swept on a
# GPU yet: `python -m benchmarks.tune --only mlm_head`.
TILES = {
    80: Tiles(Tile(128, 128, 8, 2), Tile(64, 128, 8, 2), Tile(128, 32, 8, 2)),
    90: Tiles(Tile(128, 128, 8, 2), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
    100: Tiles(Tile(128, 128, 8, 2), Tile(128, 128, 8, 2), Tile(128, 32, 8, 2)),
}


# ---------------------------------------------------------------- forward


@triton.jit
def store_tile_sums(
    b_x, p_max, p_sum, p_drawn_sum, o_rows, m_rows, tile, inverse_temperature, TEMPERED: tl.constexpr
):
    """Stores the maximum and Σ 2^(x - maximum) over one tile, for each row of logits in units of log 2."""
    b_max = tl.max(b_x, 1)
    b_x -= finite_or_zero(b_max)[:, None]
    o_out = o_rows + tile
    tl.store(p_max + o_out, b_max, mask=m_rows)
    tl.store(p_sum + o_out, tl.sum(tl.exp2(b_x), 1), mask=m_rows)
    if TEMPERED:
        tl.store(p_drawn_sum + o_out, tl.sum(tl.exp2(b_x * inverse_temperature), 1), mask=m_rows)


@triton.jit(do_not_specialize=["M", "tiles_per_program"])
def _tile_sums_kernel(
    p_hidden, p_embedding, p_bias, p_max, p_sum, p_drawn_sum, M, tiles_per_program, inverse_temperature,
    V: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """Logits of BLOCK_M rows, tile by tile; only each tile's maxima and sums leave the chip."""
    o_m, o_e = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    m_m = o_m < M
    TILES: tl.constexpr = tl.cdiv(V, TILE_V)
    ACC: tl.constexpr = p_max.dtype.element_ty
    b_hidden = load_rows(p_hidden, o_m, m_m, o_e, E)
    first = tl.program_id(1) * tiles_per_program
    o_rows = o_m.to(tl.int64) * TILES  # before the loop: inside it Triton 3.6 cannot widen a value from outside
    for tile in range(first, tl.minimum(first + tiles_per_program, TILES)):
        o_v = tile * TILE_V + tl.arange(0, TILE_V)
        b_words = load_rows(p_embedding, o_v, o_v < V, o_e, E)
        b_x = dot(b_hidden, tl.trans(b_words)) * LOG2E + load_bias2(p_bias, o_v, ACC, V)[None, :]
        store_tile_sums(
            b_x, p_max, p_sum, p_drawn_sum, o_rows, m_m, tile, inverse_temperature, TEMPERED
        )  # fmt: skip


# ---------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["M", "tiles_per_program"])
def _dhidden_kernel(
    p_hidden, p_embedding, p_bias, p_target, p_logsumexp, p_partial, M, tiles_per_program,
    V: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """partial[split] = Σ (P - onehot) · embedding over this program's split of the vocabulary. The difference is
    taken before rounding: where P of the target is nearly 1, half precision would keep nothing of it."""
    o_m, o_e = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    m_m = o_m < M
    b_hidden = load_rows(p_hidden, o_m, m_m, o_e, E)
    ACC: tl.constexpr = p_partial.dtype.element_ty
    b_logsumexp = tl.load(p_logsumexp + o_m, mask=m_m, other=float("inf"))
    b_target = tl.load(p_target + o_m, mask=m_m, other=-1).to(tl.int32)
    b_partial = tl.zeros((BLOCK_M, BLOCK_E), ACC)
    first = tl.program_id(1) * tiles_per_program
    for tile in range(first, tl.minimum(first + tiles_per_program, tl.cdiv(V, TILE_V))):
        o_v = tile * TILE_V + tl.arange(0, TILE_V)
        b_words = load_rows(p_embedding, o_v, o_v < V, o_e, E)
        b_x = dot(b_hidden, tl.trans(b_words)) * LOG2E + load_bias2(p_bias, o_v, ACC, V)[None, :]
        b_error = tl.exp2(b_x - b_logsumexp[:, None])
        b_column = b_target - tile * TILE_V  # compared with constants, which take no registers
        b_error = tl.where(tl.arange(0, TILE_V)[None, :] == b_column[:, None], b_error - 1.0, b_error)
        b_partial += dot(b_error.to(b_words.dtype), b_words)
    store_rows(p_partial + tl.program_id(1).to(tl.int64) * M * E, o_m, m_m, o_e, b_partial, E)


@triton.jit(do_not_specialize=["M", "splits"])
def _finish_dhidden_kernel(
    p_partial, p_grad, p_dhidden, M, splits, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """dhidden = g · Σ partial, the splits added in order."""
    o_m, o_e = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    m_m = o_m < M
    b_sum = tl.zeros((BLOCK_M, BLOCK_E), p_partial.dtype.element_ty)
    for split in range(splits):
        b_sum += load_rows(p_partial + tl.cast(split, tl.int64) * M * E, o_m, m_m, o_e, E)
    b_grad = tl.load(p_grad + o_m, mask=m_m, other=0.0)
    store_rows(p_dhidden, o_m, m_m, o_e, b_sum * b_grad[:, None], E)


@triton.jit(do_not_specialize=["M"])
def _dembedding_kernel(
    p_hidden, p_embedding, p_bias, p_target, p_logsumexp, p_grad, p_grad_max, p_dembedding, p_dbias, M,
    V: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dembedding = Σ over all rows of (P - onehot)ᵀ · g · hidden, and dbias, for BLOCK_V vocabulary entries."""
    o_v, o_e = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_E)
    m_v = o_v < V
    b_words = load_rows(p_embedding, o_v, m_v, o_e, E)
    b_bias = load_bias2(p_bias, o_v, p_logsumexp.dtype.element_ty, V)
    grad_max = tl.load(p_grad_max)
    inverse_max = tl.where(grad_max == 0, 0.0, 1.0 / grad_max)
    b_dwords = tl.zeros((BLOCK_V, BLOCK_E), p_logsumexp.dtype.element_ty)
    b_dbias = tl.zeros((BLOCK_V,), p_logsumexp.dtype.element_ty)
    for start in range(0, M, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        b_hidden = load_rows(p_hidden, o_m, m_m, o_e, E)
        b_logsumexp = tl.load(p_logsumexp + o_m, mask=m_m, other=float("inf"))
        b_target = tl.load(p_target + o_m, mask=m_m, other=-1)
        b_grad = tl.load(p_grad + o_m, mask=m_m, other=0.0) * inverse_max
        b_x = dot(b_words, tl.trans(b_hidden)) * LOG2E + b_bias[:, None]
        b_error = tl.exp2(b_x - b_logsumexp[None, :])
        b_error = tl.where(o_v[:, None] == b_target[None, :], b_error - 1.0, b_error)
        b_scaled = (b_hidden * b_grad[:, None]).to(b_hidden.dtype)
        b_dwords += dot(b_error.to(b_words.dtype), b_scaled)
        b_dbias += tl.sum(b_error * b_grad[None, :], 1)
    store_rows(p_dembedding, o_v, m_v, o_e, b_dwords * grad_max, E)
    tl.store(p_dbias + o_v, (b_dbias * grad_max).to(p_dbias.dtype.element_ty), mask=m_v)


# ---------------------------------------------------------------- launchers


def _shapes(hidden_ME: Tensor, embedding_VE: Tensor) -> dict[str, int]:
    size = hidden_ME.shape[1]
    return {"V": len(embedding_VE), "E": size, "BLOCK_E": max(16, triton.next_power_of_2(size))}


def _tiles(device: torch.device) -> Tiles:
    return TILES[architecture(device)]


def vocabulary_splits(rows: int, block: int, vocabulary: int, device: torch.device) -> tuple[int, int]:
    """(splits, tiles per split): about four programs per multiprocessor, with 8 tiles or more where there are."""
    tiles = triton.cdiv(vocabulary, TILE_V.value)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = triton.cdiv(4 * processors, triton.cdiv(rows, block))
    per_split = max(min(8, triton.cdiv(tiles, 2)), triton.cdiv(tiles, wanted))
    return triton.cdiv(tiles, per_split), per_split


def tile_sums(
    hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, sums: tuple[Tensor, Tensor, Tensor], inverse: float
) -> None:
    """Fills `sums`: maximum, sum, and sum at the draw's temperature (the same tensor if it is 1)."""
    rows, tile = len(hidden_ME), _tiles(hidden_ME.device).forward
    splits, per_split = vocabulary_splits(rows, tile.block, len(embedding_VE), hidden_ME.device)
    _tile_sums_kernel[(triton.cdiv(rows, tile.block), splits)](
        hidden_ME, embedding_VE, bias_V, *sums, rows, per_split, inverse,
        **_shapes(hidden_ME, embedding_VE), BLOCK_M=tile.block, TEMPERED=sums[1] is not sums[2],
        num_warps=tile.warps, num_stages=tile.stages, **FUSED,
    )  # fmt: skip


def backward(
    grad_M: Tensor, grad_max: Tensor, hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor,
    target_M: Tensor, logsumexp_M: Tensor, embedding_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dhidden_ME, dembedding_VE, dbias_V) in the dtypes of hidden, the embedding parameter and bias."""
    rows, size = hidden_ME.shape
    shapes = _shapes(hidden_ME, embedding_VE)
    _, tile, words_tile = _tiles(hidden_ME.device)
    splits, per_split = vocabulary_splits(rows, tile.block, len(embedding_VE), hidden_ME.device)
    partial = logsumexp_M.new_empty(splits, rows, size)
    _dhidden_kernel[(triton.cdiv(rows, tile.block), splits)](
        hidden_ME, embedding_VE, bias_V, target_M, logsumexp_M, partial, rows, per_split,
        **shapes, BLOCK_M=tile.block, num_warps=tile.warps, num_stages=tile.stages, **FUSED,
    )  # fmt: skip
    dhidden_ME = torch.empty_like(hidden_ME)
    _finish_dhidden_kernel[(triton.cdiv(rows, 16),)](
        partial, grad_M, dhidden_ME, rows, splits,
        E=size, BLOCK_E=shapes["BLOCK_E"], BLOCK_M=16, num_warps=4, **FUSED,
    )  # fmt: skip
    dembedding_VE = torch.empty_like(embedding_VE, dtype=embedding_dtype)
    dbias_V = torch.empty_like(bias_V)
    _dembedding_kernel[(triton.cdiv(len(embedding_VE), words_tile.block),)](
        hidden_ME, embedding_VE, bias_V, target_M, logsumexp_M, grad_M, grad_max, dembedding_VE, dbias_V, rows,
        **shapes, BLOCK_V=words_tile.block, BLOCK_M=words_tile.step,
        num_warps=words_tile.warps, num_stages=words_tile.stages, **FUSED,
    )  # fmt: skip
    return dhidden_ME, dembedding_VE, dbias_V


# ---------------------------------------------------------------- what is compiled ahead of time


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every kernel for ELECTRA-Small's E = 128 and for E = 64; `mlm_head_wide_triton` covers wider E and fp32."""
    for dtype, size in (("bf16", 128), ("fp16", 64)):
        yield from _compile_cases(dtype, size, TILES[capability])


def _compile_cases(dtype: str, size: int, tiles: Tiles) -> Iterator[CompileCase]:
    shapes = {"V": 30522, "E": size, "BLOCK_E": size}
    types = {"p_hidden": f"*{dtype}", "p_embedding": f"*{dtype}", "p_dhidden": f"*{dtype}", "p_target": "*i64"}
    types |= {"M": "i32", "tiles_per_program": "i32", "splits": "i32", "inverse_temperature": "fp32"}

    def case(kernel: triton.JITFunction, name: str, tile: Tile, **constexprs: int | bool) -> CompileCase:
        known = {name: n for name, n in {**shapes, **constexprs}.items() if name in kernel.arg_names}
        signature = signature_of(kernel, types, known)
        product = kernel is not _finish_dhidden_kernel
        name = f"mlm_head_{name}[{dtype} E={size}]"
        return CompileCase(name, kernel, signature, known, tile.warps, tile.stages, needs_dot=product)

    for tempered in (False, True):
        name = "tile_sums_tempered" if tempered else "tile_sums"
        yield case(_tile_sums_kernel, name, tiles.forward, BLOCK_M=tiles.forward.block, TEMPERED=tempered)
    yield case(_dhidden_kernel, "dhidden", tiles.dhidden, BLOCK_M=tiles.dhidden.block)
    yield case(_finish_dhidden_kernel, "finish_dhidden", Tile(16, 1, 4, 3), BLOCK_M=16)
    block_v, block_m = tiles.dembedding.block, tiles.dembedding.step
    yield case(_dembedding_kernel, "dembedding", tiles.dembedding, BLOCK_V=block_v, BLOCK_M=block_m)
