"""`mlm_head` for wide embeddings (E > 128) and for fp32: forward on chip, products of the gradients in cuBLAS.

**Forward.** A program owns one tile of logits (BLOCK_M rows by 128 vocabulary entries), computes it in a loop over
E and stores only each row's maximum and sum: nothing of size M x V.
**Backward.** At this width recomputing P twice would cost more than storing it once. For one chunk of the
vocabulary at a time, a kernel with the same tiles recomputes the logits and stores
error = (P - onehot) · g / max|g| in hidden's dtype; then cuBLAS computes errorᵀ @ hidden (all of the chunk's rows
of dembedding) and error @ embedding, which is added to dhidden. Chunking the vocabulary rather than the rows means
that dembedding is written once and the running sum is M x E, not V x E. Memory: `CHUNK_ELEMENTS` errors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from electra_kernels.blocks_triton import FUSED, LOG2E, dot, load_bias2, load_rows
from electra_kernels.compile_case import CompileCase, signature_of
from electra_kernels.mlm_head_narrow_triton import store_tile_sums
from electra_kernels.sample_replace_triton import TILE_V
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25  # errors held at a time: 64 MB in half precision
# (BLOCK_M, BLOCK_E, warps, stages). fp32 runs without tensor cores; a short inner block keeps it from spilling.
HALF, FULL = (128, 64, 8, 3), (64, 16, 8, 2)


@triton.jit
def _logits2(
    p_hidden, p_embedding, p_bias, o_m, m_m, o_v, ACC: tl.constexpr,
    V: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile of logits in units of log 2."""
    b_x = tl.zeros((BLOCK_M, TILE_V), ACC)
    for first in range(0, E, BLOCK_E):
        o_e = first + tl.arange(0, BLOCK_E)
        b_hidden = load_rows(p_hidden, o_m, m_m, o_e, E)
        b_words = load_rows(p_embedding, o_v, o_v < V, o_e, E)
        b_x += dot(b_hidden, tl.trans(b_words))
    return b_x * LOG2E + load_bias2(p_bias, o_v, ACC, V)[None, :]


@triton.jit(do_not_specialize=["M"])
def _wide_tile_sums_kernel(
    p_hidden, p_embedding, p_bias, p_max, p_sum, p_drawn_sum, M, inverse_temperature,
    V: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of each row of one tile of logits."""
    o_m, tile = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    o_v = tile * TILE_V + tl.arange(0, TILE_V)
    ACC: tl.constexpr = p_max.dtype.element_ty
    b_x = _logits2(p_hidden, p_embedding, p_bias, o_m, o_m < M, o_v, ACC, V, E, BLOCK_E, BLOCK_M)
    TILES: tl.constexpr = tl.cdiv(V, TILE_V)
    o_rows = o_m.to(tl.int64) * TILES
    store_tile_sums(b_x, p_max, p_sum, p_drawn_sum, o_rows, o_m < M, tile, inverse_temperature, TEMPERED)


@triton.jit(do_not_specialize=["M"])
def _errors_kernel(
    p_hidden, p_embedding, p_bias, p_target, p_logsumexp, p_grad, p_grad_max, p_errors, p_dbias_parts, M,
    first_word, words,
    V: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """errors[:, chunk] = (P - onehot) · g / max|g|, and their column sums over this block of rows."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    o_column = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    o_v = first_word + o_column
    ACC: tl.constexpr = p_logsumexp.dtype.element_ty
    b_x = _logits2(p_hidden, p_embedding, p_bias, o_m, m_m, o_v, ACC, V, E, BLOCK_E, BLOCK_M)
    b_logsumexp = tl.load(p_logsumexp + o_m, mask=m_m, other=float("inf"))
    b_target = tl.load(p_target + o_m, mask=m_m, other=-1)
    grad_max = tl.load(p_grad_max)
    b_grad = tl.load(p_grad + o_m, mask=m_m, other=0.0) * tl.where(grad_max == 0, 0.0, 1.0 / grad_max)
    b_error = tl.exp2(b_x - b_logsumexp[:, None])
    b_error = tl.where(o_v[None, :] == b_target[:, None], b_error - 1.0, b_error) * b_grad[:, None]
    p_tile = p_errors + o_m.to(tl.int64)[:, None] * words + o_column[None, :]
    tl.store(p_tile, b_error.to(p_errors.dtype.element_ty), mask=m_m[:, None])
    # Rows outside are zero already. The `where` keeps the product above from being fused with the sum, which
    # would give two lanes different values of it. (`blocks_triton.ROUNDED` would prevent that, too, but at the
    # cost of the exponent's precision.)
    b_dbias = tl.sum(tl.where(m_m[:, None], b_error, 0.0), 0)
    tl.store(p_dbias_parts + tl.program_id(0).to(tl.int64) * words + o_column, b_dbias)


# ---------------------------------------------------------------- launchers


def _tile(itemsize: int) -> tuple[int, int, int, int]:
    return HALF if itemsize == 2 else FULL


def tile_sums(
    hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor, sums: tuple[Tensor, Tensor, Tensor], inverse: float
) -> None:
    """Fills `sums`: maximum, sum, and sum at the draw's temperature (the same tensor if it is 1)."""
    (rows, size), vocabulary = hidden_ME.shape, len(embedding_VE)
    block_m, block_e, warps, stages = _tile(hidden_ME.itemsize)
    _wide_tile_sums_kernel[(triton.cdiv(rows, block_m), triton.cdiv(vocabulary, TILE_V.value))](
        hidden_ME, embedding_VE, bias_V, *sums, rows, inverse,
        V=vocabulary, E=size, BLOCK_E=block_e, BLOCK_M=block_m, TEMPERED=sums[1] is not sums[2],
        num_warps=warps, num_stages=stages, **FUSED,
    )  # fmt: skip


def _exact_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b accumulated in `dtype`; half-precision operands stay half precision where cuBLAS supports it."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def backward(
    grad_M: Tensor, grad_max: Tensor, hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor,
    target_M: Tensor, logsumexp_M: Tensor, embedding_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dhidden_ME, dembedding_VE, dbias_V) in the dtypes of hidden, the embedding parameter and bias."""
    (rows, size), vocabulary, statistics = hidden_ME.shape, len(embedding_VE), logsumexp_M.dtype
    block_m, block_e, warps, stages = _tile(hidden_ME.itemsize)
    row_blocks, tile = triton.cdiv(rows, block_m), TILE_V.value
    words = tile * max(1, min(triton.cdiv(vocabulary, tile), CHUNK_ELEMENTS // (rows * tile)))
    errors = hidden_ME.new_empty(rows, words)
    dbias_parts = logsumexp_M.new_empty(row_blocks, words)
    dhidden_ME = torch.zeros_like(hidden_ME, dtype=statistics)
    dembedding_VE = torch.empty_like(embedding_VE, dtype=embedding_dtype)
    dbias_V = torch.empty_like(bias_V)
    for first in range(0, vocabulary, words):
        last = min(first + words, vocabulary)
        _errors_kernel[(row_blocks, triton.cdiv(last - first, tile))](
            hidden_ME, embedding_VE, bias_V, target_M, logsumexp_M, grad_M, grad_max, errors, dbias_parts,
            rows, first, words,
            V=vocabulary, E=size, BLOCK_E=block_e, BLOCK_M=block_m, num_warps=warps, num_stages=stages, **FUSED,
        )  # fmt: skip
        chunk = errors[:, : last - first]
        dembedding_VE[first:last] = _exact_product(chunk.T, hidden_ME, statistics) * grad_max
        dhidden_ME += _exact_product(chunk, embedding_VE[first:last], statistics)
        dbias_V[first:last] = dbias_parts[:, : last - first].sum(0) * grad_max
    return (dhidden_ME * grad_max).to(hidden_ME.dtype), dembedding_VE, dbias_V


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every kernel for Base's and Large's E in half precision, and for Small's in fp32."""
    for dtype, size in (("bf16", 768), ("fp16", 1024), ("fp32", 128)):
        block_m, block_e, warps, stages = _tile(4 if dtype == "fp32" else 2)
        types = {"p_hidden": f"*{dtype}", "p_embedding": f"*{dtype}", "p_errors": f"*{dtype}", "p_target": "*i64"}
        types |= {"M": "i32", "first_word": "i32", "words": "i32", "inverse_temperature": "fp32"}
        shapes = {"V": 30522, "E": size, "BLOCK_E": block_e, "BLOCK_M": block_m}
        for kernel, name, extra in (
            (_wide_tile_sums_kernel, "tile_sums", {"TEMPERED": False}),
            (_wide_tile_sums_kernel, "tile_sums_tempered", {"TEMPERED": True}),
            (_errors_kernel, "errors", {}),
        ):
            constexprs = {**shapes, **extra}
            signature = signature_of(kernel, types, constexprs)
            yield CompileCase(
                f"mlm_head_wide_{name}[{dtype} E={size}]", kernel, signature, constexprs, warps, stages,
                multiples_of_16=("first_word", "words") if name == "errors" else (),
                needs_dot=dtype != "fp32",
                wide_stores=name == "errors",
            )  # fmt: skip
