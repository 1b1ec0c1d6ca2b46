"""sample_and_replace against its twin and what torch offers: softmax + multinomial, the Gumbel trick.

    python -m benchmarks.bench_sample_replace [--out FILE] [--no-compile]

Different samplers draw different tokens, so before timing their distributions are compared (chi-square over many
rows of equal logits), and our ids with the twin's. Not run on a GPU so far; on a CPU it uses tiny shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from electra_kernels import sample_and_replace
from scipy import stats
from torch import Tensor

from benchmarks.kernel_report import Mismatch, Result, failed, keep, report, require_device
from benchmarks.kernel_timing import (
    Work,
    by_kernel,
    compare,
    compiled,
    one_case,
    parser,
    settle,
    twin,
)

# (M, V, T): ELECTRA-Small at 128 and 1024 sequences of 128 tokens; a vocabulary padded to a multiple of 64.
GPU_SHAPES = ((2458, 30522, 16384), (2458, 30528, 16384), (19661, 30528, 131072))
CPU_SHAPES = ((16, 300, 120),)
Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(logits_MV: Tensor, ids_T: Tensor, positions_M: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """(corrupted ids, is replaced)."""
    return sample_and_replace(logits_MV, ids_T, positions_M, seed=seed)[:2]


def _scatter(drawn_M: Tensor, ids_T: Tensor, positions_M: Tensor) -> tuple[Tensor, Tensor]:
    corrupted_T = ids_T.scatter(0, positions_M, drawn_M)
    return corrupted_T, corrupted_T != ids_T


def multinomial(logits_MV: Tensor, ids_T: Tensor, positions_M: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """softmax + multinomial: what a reader of the paper would write first."""
    drawn_M = torch.multinomial(torch.softmax(logits_MV.float(), -1), 1)[:, 0]
    return _scatter(drawn_M, ids_T, positions_M)


def gumbel(logits_MV: Tensor, ids_T: Tensor, positions_M: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """One exponential per logit: what the original implementation does, and what torch.compile fuses."""
    noise_MV = torch.rand_like(logits_MV, dtype=torch.float32).clamp_min(1e-20)
    drawn_M = (logits_MV.float() - (-noise_MV.log()).log()).argmax(-1)
    return _scatter(drawn_M, ids_T, positions_M)


def inputs(rows: int, vocabulary: int, tokens: int, device: str) -> tuple[Tensor, ...]:
    """Logits (bf16 on a GPU), ids, positions, seed."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    logits_MV = (2 * torch.randn(rows, vocabulary, generator=generator)).to(device, dtype)
    ids_T = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    positions_M = torch.randperm(tokens, generator=generator)[:rows].to(device)
    return logits_MV, ids_T, positions_M, torch.tensor([1, 0], device=device)


def check_distribution(name: str, step: Step, device: str, rows: int = 8192) -> None:
    """Chi-square test of the tokens that `step` draws in many rows with the same logits."""
    logits_V = torch.randn(40, generator=torch.Generator().manual_seed(1))
    everywhere = torch.arange(rows, device=device)
    ids_T = torch.zeros(rows, dtype=torch.int64, device=device)
    seed = torch.tensor([3, 0], device=device)
    corrupted_T, _ = step(logits_V.to(device).repeat(rows, 1), ids_T, everywhere, seed)
    counts = torch.bincount(corrupted_T.cpu(), minlength=40).double()
    p_value = stats.chisquare(counts, torch.softmax(logits_V.double(), 0) * rows).pvalue
    if not p_value > 1e-5:
        raise Mismatch(f"{name}: draws do not follow the softmax (p = {p_value:.2g})")


def check_ids(tensors: tuple[Tensor, ...]) -> None:
    """Our ids must be the twin's, except for draws so close to a boundary that the order of sums decides."""
    agree = (by_kernel(ours)(*tensors)[0] == twin(ours)(*tensors)[0]).float().mean().item()
    if agree < 0.999:
        raise Mismatch(f"ours and the twin agree on {agree:.2%} of the tokens only")


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Checks, measures and prints."""
    options = settle(parser(__doc__ or "").parse_args(arguments))
    torch.manual_seed(0)
    for rows, vocabulary, tokens in CPU_SHAPES if options.device == "cpu" else GPU_SHAPES:
        with one_case(case := f"sample_and_replace M={rows} V={vocabulary}", options):
            tensors = inputs(rows, vocabulary, tokens, options.device)
            contenders: dict[str, Step] = {"ours": by_kernel(ours), "twin, eager": twin(ours)}
            contenders |= {"softmax + multinomial, eager": multinomial, "Gumbel, eager": gumbel}
            if options.compile:
                contenders |= {
                    "twin, torch.compile": twin(compiled(ours), chunked=False),
                    "Gumbel, torch.compile": compiled(gumbel),
                }
            for name, step in list(contenders.items()):
                try:
                    check_distribution(name, step, options.device)
                    if name == "ours":
                        check_ids(tensors)
                except Exception as error:
                    keep(failed(case, name, error), options)
                    require_device(f"{case}, {name}", error)
                    del contenders[name]
            moved = tensors[0].numel() * tensors[0].element_size() + 17 * tokens
            compare(case, dict(contenders), tensors, options, Work(moved))
    return report(options)


if __name__ == "__main__":
    main()
