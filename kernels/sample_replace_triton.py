"""The exact two-level draw on Triton, from stored logits (maths: `sample_replace`).

A program owns one row of logits and reads it once, TILES tiles of 128 tokens per step, with the tile sums in
registers. Then it draws a tile, reads its 128 logits again (from the L2 cache), draws the token and writes id,
corrupted id and label.

Left out on purpose: splitting a row over programs. With M in the hundreds the rows alone fill the chip.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from electra_kernels import sample_replace_reference as reference
from electra_kernels.blocks_triton import FUSED, finite_or_zero
from electra_kernels.compile_case import CompileCase
from electra_kernels.operators import operator
from electra_kernels.rng_triton import philox
from torch import Tensor

TILE_V = tl.constexpr(reference.TILE_V)
TILES_PER_STEP = 32  # 4096 tokens per step: four 128-bit loads in flight per thread for bf16


# ---------------------------------------------------------------- the draw, shared with mlm_head


@triton.jit
def row_uniforms(p_seed, row, stream):
    """`sample_replace_reference.row_uniforms`: the two float64 uniforms (tile, word) of one row."""
    zero = tl.zeros((1,), tl.int32)
    word0, word1, word2, word3 = philox(p_seed, zero, row + zero, stream, zero)
    tile = ((word0.to(tl.uint64) << 20) | (word1.to(tl.uint64) >> 12)).to(tl.float64)
    word = ((word2.to(tl.uint64) << 20) | (word3.to(tl.uint64) >> 12)).to(tl.float64)
    return (tl.sum(tile) + 0.5) * 2.0**-52, (tl.sum(word) + 0.5) * 2.0**-52


@triton.jit
def inverse_cdf(b_weights, uniform, SIZE: tl.constexpr):
    """First index whose cumulative weight exceeds uniform * total (0 if there is none), and whether it exists.

    A parallel scan may round non-monotonically, so a positive weight is required explicitly.
    """
    b_weights = b_weights.to(tl.float64)
    b_cumulative = tl.cumsum(b_weights, 0)
    total = tl.sum(b_weights, 0)  # NaN if any weight is; `max` would drop it
    b_hit = (b_cumulative > uniform * tl.max(b_cumulative, 0)) & (b_weights > 0)
    index = tl.min(tl.where(b_hit, tl.arange(0, SIZE), SIZE), 0)
    valid = (total > 0) & (total < float("inf")) & (index < SIZE)
    return tl.where(valid, index, 0), valid


# ---------------------------------------------------------------- the kernel


@triton.jit(do_not_specialize=["tokens", "stream"])
def _sample_kernel(
    p_logits, p_ids, p_positions, p_seed, p_corrupted, p_replaced, p_sampled,
    stride_m, tokens, stream, inverse_temperature,
    V: tl.constexpr, DIVISOR: tl.constexpr, TILES: tl.constexpr, STEPS_P2: tl.constexpr,
):  # fmt: skip
    """Draws a token for one masked position, and writes the id, the corrupted id and the label."""
    m = tl.program_id(0).to(tl.int64)
    p_row = p_logits + tl.multiple_of(m * stride_m, DIVISOR)
    ACC: tl.constexpr = tl.float64 if p_logits.dtype.element_ty == tl.float64 else tl.float32
    o_tile = tl.arange(0, TILES)[:, None] * TILE_V + tl.arange(0, TILE_V)[None, :]
    o_step = tl.arange(0, STEPS_P2)[:, None]
    b_max = tl.full((STEPS_P2, TILES), float("-inf"), ACC)
    b_sum = tl.zeros((STEPS_P2, TILES), ACC)
    for step in range(0, tl.cdiv(V, TILES * TILE_V)):
        o_v = step * (TILES * TILE_V) + o_tile
        b_x = tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")).to(ACC)
        b_tile_max = tl.max(b_x, 1)
        b_e = tl.exp((b_x - finite_or_zero(b_tile_max)[:, None]) * inverse_temperature)
        # The statistics of step s go to row s; a loop variable cannot index registers, hence the `where`.
        b_max = tl.where(o_step == step, b_tile_max[None, :], b_max)
        b_sum = tl.where(o_step == step, tl.sum(b_e, 1)[None, :], b_sum)

    row_max = finite_or_zero(tl.max(b_max))
    b_weights = tl.reshape(b_sum * tl.exp((b_max - row_max) * inverse_temperature), (STEPS_P2 * TILES,))
    u_tile, u_word = row_uniforms(p_seed, m, stream)
    tile, valid = inverse_cdf(b_weights, u_tile, STEPS_P2 * TILES)
    o_v = tile * TILE_V + tl.arange(0, TILE_V)
    b_x = tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")).to(ACC)
    b_e = tl.exp((b_x - finite_or_zero(tl.max(b_x, 0))) * inverse_temperature)
    word, valid_word = inverse_cdf(b_e, u_word, TILE_V)
    sampled = tl.where(valid & valid_word, tile * TILE_V + word, -1).to(tl.int64)
    tl.store(p_sampled + m, sampled)

    position = tl.load(p_positions + m).to(tl.int64)
    inside = (position >= 0) & (position < tokens)  # a wrong position must not corrupt memory
    original = tl.load(p_ids + position, mask=inside, other=0)
    new = tl.where(sampled >= 0, sampled, original.to(tl.int64))
    tl.store(p_corrupted + position, new.to(p_corrupted.dtype.element_ty), mask=inside)
    tl.store(p_replaced + position, new != original, mask=inside)


# ---------------------------------------------------------------- launcher and custom operator


def _divisor(stride: int) -> int:
    """Largest power of two <= 16 that divides the row stride; it limits how wide loads at a row's start can be."""
    return next(power for power in (16, 8, 4, 2, 1) if stride % power == 0)


def _steps(vocabulary: int, tiles: int) -> int:
    return triton.next_power_of_2(triton.cdiv(vocabulary, tiles * reference.TILE_V))


def _tiles_per_step(vocabulary: int) -> int:
    return min(TILES_PER_STEP, triton.next_power_of_2(triton.cdiv(vocabulary, reference.TILE_V)))


@operator("sample_and_replace")
def sample_and_replace(
    logits_MV: Tensor, input_ids_T: Tensor, positions_M: Tensor, seed: Tensor, stream: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(corrupted_ids_T, is_replaced_T, sampled_ids_M); see the contract in `sample_replace`."""
    rows, vocabulary = logits_MV.shape
    logits_MV = logits_MV if logits_MV.stride(1) == 1 else logits_MV.contiguous()
    corrupted_T = input_ids_T.clone(memory_format=torch.contiguous_format)
    is_replaced_T = torch.zeros_like(corrupted_T, dtype=torch.bool)
    sampled_M = torch.full((rows,), -1, dtype=torch.int64, device=logits_MV.device)
    if rows and vocabulary:
        tiles = _tiles_per_step(vocabulary)
        _sample_kernel[(rows,)](
            logits_MV, input_ids_T.contiguous(), positions_M.contiguous(), seed,
            corrupted_T, is_replaced_T, sampled_M,
            logits_MV.stride(0), len(input_ids_T), stream, reference.inverse_temperature(temperature),
            V=vocabulary, DIVISOR=_divisor(logits_MV.stride(0)), TILES=tiles,
            STEPS_P2=_steps(vocabulary, tiles), num_warps=4, **FUSED,
        )  # fmt: skip
    return corrupted_T, is_replaced_T, sampled_M


@sample_and_replace.register_fake
def _(
    logits_MV: Tensor, input_ids_T: Tensor, positions_M: Tensor, seed: Tensor, stream: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = input_ids_T.shape
    return (
        input_ids_T.new_empty(shape),
        input_ids_T.new_empty(shape, dtype=torch.bool),
        logits_MV.new_empty(logits_MV.shape[0], dtype=torch.int64),
    )


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """The kernel for BERT's vocabulary, as it is and padded to a multiple of 64."""
    pointers = {"p_ids": "*i64", "p_positions": "*i64", "p_seed": "*i64", "p_corrupted": "*i64"}
    outputs = {"p_replaced": "*i1", "p_sampled": "*i64"}
    numbers = {"stride_m": "i32", "tokens": "i32", "stream": "i32", "inverse_temperature": "fp32"}
    for dtype, vocabulary in (("bf16", 30522), ("bf16", 30528), ("fp32", 30528)):
        tiles = _tiles_per_step(vocabulary)
        yield CompileCase(
            name=f"sample_and_replace[{dtype} V={vocabulary}]",
            kernel=_sample_kernel,
            signature={"p_logits": f"*{dtype}", **pointers, **outputs, **numbers},
            constexprs={
                "V": vocabulary, "DIVISOR": _divisor(vocabulary), "TILES": tiles,
                "STEPS_P2": _steps(vocabulary, tiles),
            },
            num_warps=4, **FUSED,
            num_stages=3,
            multiples_of_16=("stride_m",) if vocabulary % 16 == 0 else (),
            # Rows of 30522 half-precision logits start on 4-byte boundaries only.
            streaming=vocabulary % 16 == 0,
        )  # fmt: skip
