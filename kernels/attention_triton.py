"""Attention on Triton: tiles, launches and the torch operators (kernels: `attention_kernels.py`).

Two operators, `electra_kernels::attention` and `…_backward`; both draw the same dropout from the counter. The
forward operator also returns each row's log-sum-exp (base 2), [H, T]; it is empty on the path for short sequences,
whose backward pass does not need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from electra_kernels import attention_kernels as kernels
from electra_kernels import rng
from electra_kernels.blocks_triton import FUSED
from electra_kernels.compile_case import CompileCase
from electra_kernels.operators import architecture, operator, statistics_dtype
from torch import Tensor

# ---------------------------------------------------------------- tiles


class Tile(NamedTuple):
    """One kernel's blocks (queries, keys), warps per program, and stages of its software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# {architecture: {kernel: {head dim up to: tile}}} for 2-byte types. Chosen from the compile report: the
# largest tiles that do not spill. `python -m benchmarks.tune --only attention` sweeps them on a GPU. On sm_100
# the widest heads' forward has one stage, for the reason that `ONE_STAGE` gives.
TILES = {
    80: {
        "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 2)},
        "queries": {64: Tile(64, 32, 4, 2), 128: Tile(64, 64, 8, 2)},
        "keys": {64: Tile(32, 64, 4, 2), 128: Tile(64, 64, 8, 2)},
    },
    90: {
        "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2)},
        "queries": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2)},
        "keys": {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2)},
    },
    100: {
        "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 1)},
        "queries": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2)},
        "keys": {64: Tile(64, 128, 8, 2), 128: Tile(64, 128, 8, 2)},
    },
}
# float32 runs without tensor cores (tf32 is not float32); the same tiles serve all architectures.
TILES_FLOAT32 = {
    "forward": {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1)},
    "queries": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1)},
    "keys": {64: Tile(16, 16, 8, 1), 128: Tile(16, 32, 8, 1)},
}
# {architecture: {head dim up to: longest sequence of the short path}}, and its warps by BLOCK_S.
SHORT_LIMIT = {80: {32: 128, 64: 64, 128: 32}, 90: {64: 128, 128: 64}, 100: {128: 128}}
SHORT_LIMIT_FLOAT32 = {64: 32, 128: 16}
SHORT_WARPS = {16: 1, 32: 2, 64: 4, 128: 8}
SHORT_WARPS_FLOAT32 = 4
ONE_STAGE = 100, "queries"
"""(architecture, kernel) with a single stage where nothing is dropped: with two, Triton 3.7.1 and 3.8 set no fence
between the copies to shared memory and a product. (With dropout they do, and one stage would spill.)"""


def _entry(table: dict[int, Any], head_dim: int) -> Any:
    return next(value for limit, value in table.items() if head_dim <= limit)


def short_limit(capability: int, dtype: torch.dtype, head_dim: int) -> int:
    """The longest sequence that fits on chip as a whole."""
    table = SHORT_LIMIT[capability] if dtype.itemsize == 2 else SHORT_LIMIT_FLOAT32
    return int(_entry(table, head_dim))


def tile(kernel: str, capability: int, dtype: torch.dtype, head_dim: int) -> Tile:
    """The tile of "forward", "queries" or "keys"."""
    table = (TILES[capability] if dtype.itemsize == 2 else TILES_FLOAT32)[kernel]
    found: Tile = _entry(table, head_dim)
    return found


def _short_options(dtype: torch.dtype, max_seqlen: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(max_seqlen))
    warps = SHORT_WARPS[block] if dtype.itemsize == 2 else SHORT_WARPS_FLOAT32
    return {"BLOCK_S": block, "num_warps": warps, "num_stages": 1, **FUSED}


def _options(name: str, capability: int, dtype: torch.dtype, head_dim: int, dropout_p: float) -> dict[str, int]:
    chosen = tile(name, capability, dtype, head_dim)
    one_stage = (capability, name) == ONE_STAGE and rng.dropout_threshold(dropout_p) == 0
    return {
        "BLOCK_Q": chosen.queries,
        "BLOCK_J": chosen.keys,
        "num_warps": chosen.warps,
        "num_stages": 1 if one_stage else chosen.stages,
        **FUSED,
    }


def _is_short(qkv_T3HK: Tensor, max_seqlen: int) -> bool:
    return max_seqlen <= short_limit(architecture(qkv_T3HK.device), qkv_T3HK.dtype, qkv_T3HK.shape[-1])


# ---------------------------------------------------------------- launches


@dataclass(frozen=True)
class _Batch:
    """The arguments that all kernels of one call share."""

    qkv_T3HK: Tensor
    cu_seqlens: Tensor
    seed: Tensor
    max_seqlen: int
    dropout_p: float
    stream: int
    softmax_scale: float

    def launch_short(self, kernel: Any, *tensors: Tensor) -> None:
        """One program for each (sequence, head)."""
        options = _short_options(self.qkv_T3HK.dtype, self.max_seqlen)
        self._launch(kernel, self._pairs(), tensors, (self.stream,), options)

    def launch(self, name: str, kernel: Any, *tensors: Tensor) -> None:
        """One program for each (sequence, head) and block of what the kernel called `name` in `TILES` owns."""
        qkv_T3HK = self.qkv_T3HK
        capability, head_dim = architecture(qkv_T3HK.device), qkv_T3HK.shape[-1]
        options = _options(name, capability, qkv_T3HK.dtype, head_dim, self.dropout_p)
        blocks = triton.cdiv(self.max_seqlen, options["BLOCK_J" if name == "keys" else "BLOCK_Q"])
        numbers = (self.stream, len(qkv_T3HK), blocks)
        self._launch(kernel, self._pairs() * blocks, tensors, numbers, options)

    def _pairs(self) -> int:
        return (self.cu_seqlens.numel() - 1) * self.qkv_T3HK.shape[2]

    def _launch(
        self,
        kernel: Any,
        programs: int,
        tensors: tuple[Tensor, ...],
        numbers: tuple[int, ...],
        options: dict[str, int],
    ) -> None:
        _, _, heads, head_dim = self.qkv_T3HK.shape
        constants = {"H": heads, "K": head_dim, "SCALE": self.softmax_scale}
        constants["THRESHOLD"] = rng.dropout_threshold(self.dropout_p)
        if programs:
            operands = (self.qkv_T3HK, self.cu_seqlens, self.seed, *tensors)
            kernel[(programs,)](*operands, *numbers, **constants, **options)


# ---------------------------------------------------------------- operators


def _empty_outputs(qkv_T3HK: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    tokens, _, heads, head_dim = qkv_T3HK.shape
    out_THK = qkv_T3HK.new_empty(tokens, heads, head_dim)
    lse_HT = (0,) if _is_short(qkv_T3HK, max_seqlen) else (heads, tokens)
    return out_THK, qkv_T3HK.new_empty(lse_HT, dtype=statistics_dtype(qkv_T3HK))


@operator("attention")
def forward(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor,
    max_seqlen: int,
    dropout_p: float,
    stream: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """(out_THK, log-sum-exp); `qkv_T3HK` is contiguous, `seed` holds [key, first_row]."""
    batch = _Batch(qkv_T3HK, cu_seqlens, seed, max_seqlen, dropout_p, stream, softmax_scale)
    out_THK, lse_HT = _empty_outputs(qkv_T3HK, max_seqlen)
    if _is_short(qkv_T3HK, max_seqlen):
        batch.launch_short(kernels.short_forward_kernel, out_THK)
    else:
        batch.launch("forward", kernels.forward_kernel, out_THK, lse_HT)
    return out_THK, lse_HT


@forward.register_fake
def _(qkv_T3HK: Tensor, _offsets: Tensor, _seed: Tensor, max_seqlen: int, *_: float) -> tuple[Tensor, Tensor]:
    return _empty_outputs(qkv_T3HK, max_seqlen)


@operator("attention_backward")
def backward(
    dout_THK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor,
    max_seqlen: int,
    dropout_p: float,
    stream: int,
    softmax_scale: float,
) -> Tensor:
    """Gradient of `qkv_T3HK`; all tensors contiguous."""
    batch = _Batch(qkv_T3HK, cu_seqlens, seed, max_seqlen, dropout_p, stream, softmax_scale)
    dqkv_T3HK = torch.empty_like(qkv_T3HK)
    if _is_short(qkv_T3HK, max_seqlen):
        batch.launch_short(kernels.short_backward_kernel, dout_THK, dqkv_T3HK)
        return dqkv_T3HK
    delta_HT = torch.empty_like(lse_HT)
    written = (delta_HT, dqkv_T3HK)
    batch.launch("queries", kernels.backward_queries_kernel, dout_THK, out_THK, lse_HT, *written)
    batch.launch("keys", kernels.backward_keys_kernel, dout_THK, lse_HT, *written)
    return dqkv_T3HK


@backward.register_fake
def _(_dout: Tensor, _out: Tensor, _lse: Tensor, qkv_T3HK: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv_T3HK)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_seqlen, ctx.dropout_p, ctx.stream, ctx.softmax_scale = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout_THK: Tensor | None, _dlse: None) -> tuple[Tensor | None, ...]:
    if dout_THK is None:
        return (None,) * 7
    numbers = (ctx.max_seqlen, ctx.dropout_p, ctx.stream, ctx.softmax_scale)
    return backward(dout_THK.contiguous(), *ctx.saved_tensors, *numbers), *(None,) * 6


forward.register_autograd(_differentiate, setup_context=_save)


def dropout_mask(tokens: int, keys: int, heads: int, dropout_p: float, seed: Tensor, stream: int) -> Tensor:
    """The kernels' dropout decisions, bool [heads, tokens, keys], for tests: as the twin's."""
    mask = torch.empty(heads, tokens, keys, dtype=torch.uint8, device=seed.device)
    grid = (triton.cdiv(tokens, 32), triton.cdiv(keys, 32), heads)
    with torch.cuda.device_of(seed):
        kernels.dropout_mask_kernel[grid](
            seed, mask, stream, tokens, keys, rng.dropout_threshold(dropout_p), BLOCK_Q=32, BLOCK_J=32, **FUSED
        )
    return mask.bool()


# ---------------------------------------------------------------- ahead-of-time compilation

_POINTERS = {"p_cu_seqlens": "*i32", "p_seed": "*i64", "p_lse": "*fp32", "p_delta": "*fp32"}
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every kernel at every tile of the tables; without dropout (fewer registers) at one head dim only."""
    types = [(torch.bfloat16, dim) for dim in (16, 32, 64, 128)]
    types += [(dtype, dim) for dtype in (torch.float16, torch.float32) for dim in (64, 128)]
    for dtype, head_dim in types:
        limit = short_limit(capability, dtype, head_dim)
        for dropout_p in (0.0, 0.1) if (dtype, head_dim) == (torch.bfloat16, 64) else (0.1,):
            runs = [
                (kernel, _short_options(dtype, block))
                for block in SHORT_WARPS
                if block <= limit
                for kernel in (kernels.short_forward_kernel, kernels.short_backward_kernel)
            ] + [
                (kernel, _options(name, capability, dtype, head_dim, dropout_p))
                for name, kernel in {
                    "forward": kernels.forward_kernel,
                    "queries": kernels.backward_queries_kernel,
                    "keys": kernels.backward_keys_kernel,
                }.items()
            ]
            for kernel, options in runs:
                yield _compile_case(kernel, options, dtype, head_dim, dropout_p)


def _compile_case(
    kernel: Any, options: dict[str, int], dtype: torch.dtype, head_dim: int, dropout_p: float
) -> CompileCase:
    blocks = {name: size for name, size in options.items() if name.startswith("BLOCK")}
    constants = {"H": 4, "K": head_dim, "SCALE": head_dim**-0.5, "THRESHOLD": rng.dropout_threshold(dropout_p)}
    sizes = " ".join(f"{name.removeprefix('BLOCK_')}={size}" for name, size in blocks.items())
    runtime = [name for name in kernel.arg_names if name not in blocks and name not in constants]
    data = f"*{_TYPES[dtype]}"
    return CompileCase(
        name=f"attention.{kernel.__name__}[{_TYPES[dtype]} K={head_dim} {sizes} p={dropout_p}]",
        kernel=kernel,
        signature={n: _POINTERS.get(n, data) if n.startswith("p_") else "i32" for n in runtime},
        constexprs={**constants, **blocks},
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        needs_dot=dtype.itemsize == 2,
        streaming=True,
        wide_stores=head_dim >= 32,  # with narrower rows a thread has less than 16 bytes to store
    )
