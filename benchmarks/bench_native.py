"""On a CPU: the loops in C compared with the twins and with PyTorch, forward and backward, with dropout.

    python -m benchmarks.bench_native [--threads 1] [--rounds 7] [--calls 10] [--march haswell] [--out FILE]

Attention, dropout + residual sum + LayerNorm, and the MLM head with its draw, of ELECTRA-Small in training, in
fp32 and bf16. "PyTorch" is `scaled_dot_product_attention` on a rectangular batch (sequences of equal length, so
without padding); dropout, sum and `layer_norm` one after the other; `linear` and `cross_entropy`, without a draw.
Before timing, all three must give the same values and gradients without dropout, and loops and twin, which drop
the same values, also with it.

`--march` builds the loops for an older processor (haswell: AVX2, no AVX-512). PyTorch is held to the same by
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 in the environment.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from electra_kernels import attention, dropout_add_layer_norm, mlm_head, mlm_head_native, native, rng, use
from torch import Tensor

from benchmarks.harness import Comparison, compare, interleave, write_report

CPU, SEED, EPSILON = torch.device("cpu"), 7, 1e-12
HEADS, HEAD_DIM, WIDTH, DROPOUT = 4, 64, 256, 0.1
EMBEDDING_SIZE, VOCABULARY, MASKED = 128, 30522, 19 / 128
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""How far two ways may differ, relative to the largest value."""
Operation = Callable[..., Tensor]


def attention_ways(count: int, length: int, dropout_p: float) -> dict[str, Operation]:
    """Name -> function [T, 3, H, K] -> [T, H, K]."""
    cu_seqlens = torch.arange(count + 1, dtype=torch.int32) * length

    def ours(qkv_T3HK: Tensor) -> Tensor:
        return attention(qkv_T3HK, cu_seqlens, length, dropout_p=dropout_p, seed=rng.seed_tensor(SEED))

    def pytorch(qkv_T3HK: Tensor) -> Tensor:
        q, k, v = qkv_T3HK.view(count, length, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p).transpose(1, 2).flatten(0, 1)

    return {"loops": using("native", ours), "twin": using("reference", ours), "PyTorch": pytorch}


def layer_norm_ways(dropout_p: float) -> dict[str, Operation]:
    """Name -> function (x, residual, weight, bias) -> [T, D]."""

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        seed = rng.seed_tensor(SEED)
        return dropout_add_layer_norm(x, residual, weight, bias, eps=EPSILON, dropout_p=dropout_p, seed=seed)

    def pytorch(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total = F.dropout(x, dropout_p) + residual
        return F.layer_norm(total.float(), (WIDTH,), weight, bias, EPSILON).to(x.dtype)

    return {"loops": using("native", ours), "twin": using("reference", ours), "PyTorch": pytorch}


def mlm_head_ways(targets_M: Tensor, _dropout_p: float) -> dict[str, Operation]:
    """Name -> function (hidden, embedding, bias) -> loss_M."""

    def ours(hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor) -> Tensor:
        return mlm_head(hidden_ME, embedding_VE, bias_V, targets_M, seed=SEED).loss_M

    def pytorch(hidden_ME: Tensor, embedding_VE: Tensor, bias_V: Tensor) -> Tensor:
        weights = (parameter.to(hidden_ME.dtype) for parameter in (embedding_VE, bias_V))
        return F.cross_entropy(F.linear(hidden_ME, *weights).float(), targets_M, reduction="none")

    return {"loops": using("native", ours), "twin": using("reference", ours), "PyTorch": pytorch}


def using(implementation: str, operation: Operation) -> Operation:
    """`operation`, run by one implementation."""

    def run(*inputs: Tensor) -> Tensor:
        with use(implementation):  # type: ignore[arg-type]
            return operation(*inputs)

    return run


@contextmanager
def loops_for(processor: str | None) -> Iterator[None]:
    """Inside, the loops in C are those for another processor, unless it is None.

    Raises:
        SystemExit: they cannot be built.
    """
    here = native._load
    if processor is not None:
        try:
            built = native.load_for(processor)
        except native.NativeError as error:
            raise SystemExit(f"--march: {error}") from None
        native._load = lambda: built  # type: ignore[assignment]
    try:
        yield
    finally:
        native._load = here


def with_gradients(operation: Operation, inputs: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """The operation's result and the gradients of its inputs."""
    out = operation(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def check(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Raises SystemExit if two ways differ by more than rounding explains."""
    for one, other in zip(found, expected, strict=True):
        worst = float((one.float() - other.float()).abs().max() / other.float().abs().max())
        if not worst <= max(TOLERANCE[result.dtype] for result in found):
            raise SystemExit(f"{what}: differ by {worst:.2g} of the largest value")


def measure(
    figure: str,
    ways: Callable[[float], dict[str, Operation]],
    inputs: Sequence[Tensor],
    dout: Tensor,
    options: argparse.Namespace,
) -> list[Comparison]:
    """Thousands of tokens per second of the loops and of the other ways, after checking that all agree."""
    for dropout_p in (0.0, DROPOUT):
        results = {name: with_gradients(run, inputs, dout) for name, run in ways(dropout_p).items()}
        for name in ("twin", "PyTorch") if dropout_p == 0.0 else ("twin",):  # PyTorch drops different values
            check(results["loops"], results[name], f"{figure}, loops and {name}, dropout {dropout_p}")

    def repeated(run: Operation) -> Callable[[], None]:
        def calls() -> None:
            for _ in range(options.calls):
                with_gradients(run, inputs, dout)

        return calls

    programs = {name: repeated(run) for name, run in ways(DROPOUT).items()}
    seconds = interleave(programs, options.rounds, CPU)
    found = compare(figure, "thousand tokens/s", options.calls * len(dout) / 1e3, seconds, "loops")
    print("\n".join(map(str, found)), flush=True)
    return found


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that require a gradient."""
    return torch.randn(*shape).to(dtype).requires_grad_()


def report(options: argparse.Namespace) -> list[Comparison]:
    """All workloads."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    found: list[Comparison] = []
    for dtype in (torch.float32, torch.bfloat16):
        precision = str(dtype).removeprefix("torch.")
        for count, length in options.shapes:
            tokens = count * length
            qkv, dout = normal(tokens, 3, HEADS, HEAD_DIM, dtype=dtype), torch.randn(tokens, HEADS, HEAD_DIM)
            found += measure(
                f"attention, {count} x {length}, {precision}",
                partial(attention_ways, count, length), [qkv], dout.to(dtype),
                options,
            )  # fmt: skip
        tokens = options.shapes[0][0] * options.shapes[0][1]
        inputs = [*(normal(tokens, WIDTH, dtype=dtype) for _ in range(2)), normal(WIDTH), normal(WIDTH)]
        dout = torch.randn(tokens, WIDTH).to(dtype)
        figure = f"dropout + residual + LayerNorm, {tokens} x {WIDTH}, {precision}"
        found += measure(figure, layer_norm_ways, inputs, dout, options)
        masked = max(1, int(MASKED * tokens))
        embedding_VE = (torch.randn(VOCABULARY, EMBEDDING_SIZE) / EMBEDDING_SIZE**0.5).requires_grad_()
        inputs = [normal(masked, EMBEDDING_SIZE, dtype=dtype), embedding_VE, normal(VOCABULARY)]
        figure = f"MLM head and draw, {masked} x {VOCABULARY}, {precision}"
        ways = partial(mlm_head_ways, torch.randint(VOCABULARY, (masked,)))
        if mlm_head_native.takes(*inputs[:2]):  # bf16 on processors that are fast at it
            found += measure(figure, ways, inputs, torch.full((masked,), 1 / masked), options)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=10, help="calls per round")
    parser.add_argument("--shapes", nargs="+", default=[(16, 128), (4, 512)], metavar="SEQUENCESxTOKENS",
                        type=lambda text: tuple(map(int, text.split("x"))))  # fmt: skip
    parser.add_argument("--march", metavar="PROCESSOR", help="builds the loops for another processor than this")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if problem := native.problem():
        raise SystemExit(f"no loops in C: {problem}")
    with loops_for(options.march):
        found = report(options)
    if options.out:
        facts = {"march": options.march or "native", "pytorch": torch.backends.cpu.get_cpu_capability()}
        write_report(options.out, found, CPU, dropout=DROPOUT, calls=options.calls, **facts)


if __name__ == "__main__":
    main()
