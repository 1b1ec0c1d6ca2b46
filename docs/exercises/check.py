"""Checks answers to the exercises of docs/exercises.md:

    python docs/exercises/check.py mine.py

Every function in mine.py that has the name of an exercise is checked, against what the project itself computes.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels run on the CPU

from electra_kernels import rtd_loss
from electra_kernels.rng import keep_mask, seed_tensor
from torch import Tensor

from electra_core.adam import ElectraAdam
from electra_core.electra import replace_tokens
from electra_core.masking import masked_counts
from electra_core.optim import learning_rate


def assert_close(what: str, got: Tensor, expected: Tensor) -> None:
    """As torch's, but the message has both; of a wrong shape or type, torch's own words as well."""

    def message(words: str) -> str:
        first = words.split("\n")[0]
        reason = "" if first.startswith(("Tensor-likes", "Scalars")) else f" ({first})"
        return f"{what}: expected {shown(expected)}, got {shown(got)}{reason}"

    assert isinstance(got, Tensor), f"{what}: expected a tensor, {shown(expected)}, got {got!r}"
    torch.testing.assert_close(got, expected, msg=message)


def shown(values: Tensor) -> str:
    """The numbers, to four digits."""
    numbers = ", ".join(f"{value:.4g}" for value in values.detach().flatten().tolist())
    return numbers if values.ndim == 0 else f"[{numbers}]"


def check_masked_count(masked_count: Callable[[int, float, int], int]) -> None:
    """1. How many positions are masked, up to the longest sequences; the presets' fractions and limits."""
    for fraction, most in ((0.15, 19), (0.15, 79), (0.25, 130)):
        for tokens in range(3, 513):
            expected = int(masked_counts(torch.tensor([tokens]), fraction, most))
            got = masked_count(tokens, fraction, most)
            assert got == expected, (
                f"{tokens} tokens, {fraction:.0%}, at most {most}: expected {expected}, got {got} "
                f"(in fp32 the product is {torch.tensor(tokens) * fraction:.8g})"
            )


def check_draw_word(draw_word: Callable[[list[float], float, float, int], int]) -> None:
    """2. A draw in two levels: over a grid of uniforms, words come out as often as their weights say."""
    weights, tile = [1.0, 2.0, 3.0, 4.0, 0.0, 6.0], 2  # tiles weigh 3, 7 and 6 of 16
    counts = [0] * len(weights)
    for i, j in product(range(16), range(42)):
        counts[draw_word(weights, (i + 0.5) / 16, (j + 0.5) / 42, tile)] += 1
    expected = [round(42 * weight) for weight in weights]
    assert counts == expected, f"words should come out {expected} times, and come out {counts} times"
    cases = (4, 0.1, 0.9, 2, 1), (3, 0.9, 0.5, 2, 2), (4, 0.5, 0.9, 3, 2)  # neither one level nor other tiles do
    for words, u_tile, u_word, tile, expected_word in cases:
        got = draw_word([1.0] * words, u_tile, u_word, tile)
        assert got == expected_word, (
            f"{words} words of equal weight in tiles of {tile}, u_tile = {u_tile}, u_word = {u_word}: "
            f"expected word {expected_word}, got {got}"
        )


def check_rtd_gradient(rtd_gradient: Callable[[Tensor, Tensor], Tensor]) -> None:
    """3. The gradient of the RTD loss, also where logits are large."""
    logits_T = torch.tensor([-200.0, -3.0, -0.1, 0.0, 0.5, 4.0, 200.0], requires_grad=True)
    is_replaced_T = torch.tensor([True, False, True, False, True, False, True])
    rtd_loss(logits_T, is_replaced_T).backward()
    assert logits_T.grad is not None
    assert_close(f"logits {shown(logits_T)}", rtd_gradient(logits_T.detach(), is_replaced_T), logits_T.grad)


def check_labels(labels: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """4. Labels: a lucky draw is original, and -1 (no draw) leaves the word."""
    ids_T, positions_M = torch.tensor([2, 7, 8, 9, 7, 3]), torch.tensor([1, 2, 4])
    for sampled in ([7, 5, 5], [5, 8, -1], [8, -1, 7]):
        sampled_M = torch.tensor(sampled)
        expected = replace_tokens(ids_T, positions_M, sampled_M) != ids_T
        got = labels(ids_T, positions_M, sampled_M)
        assert torch.equal(got, expected), f"drawn {sampled}: expected {expected.tolist()}, got {got.tolist()}"


def check_first_update(first_update: Callable[[Tensor], Tensor]) -> None:
    """5. What the original's Adam subtracts at its first step, for a rate of 1 and no weight decay."""
    gradient = torch.tensor([0.5, -2.0, 1e-3, 0.0])
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = gradient.clone()
    ElectraAdam([parameter], lr=1.0, weight_decay=0.0, fused=False).step()
    assert_close(f"gradient {shown(gradient)}", first_update(gradient), -parameter.detach())


def check_rate(rate: Callable[[int, float, int, int], float]) -> None:
    """6. The learning rate of every step."""
    for step in range(100):
        expected, got = learning_rate(step, 5e-4, 100, 10), rate(step, 5e-4, 100, 10)
        assert abs(got - expected) < 1e-12, (
            f"step {step} of 100, warm-up 10: expected {expected:.3g}, got {got:.3g}"
        )


def check_softmax_in_blocks(softmax_in_blocks: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    """7. softmax(scores) @ values, a block of scores at a time."""
    generator = torch.Generator().manual_seed(0)
    for size, block in ((16, 4), (10, 3), (5, 8)):
        scores = (
            torch.randn(size, generator=generator).sort().values * 300
        )  # the maximum grows from block to block
        values = torch.randn(size, 4, generator=generator)
        for order in (scores, scores.flip(0), torch.randn(size, generator=generator)):
            what = f"{size} scores of up to {order.max():.0f}, {block} at a time"
            assert_close(what, softmax_in_blocks(order, values, block), order.softmax(0) @ values)


def check_kept(kept: Callable[[int, int, int, float, int], bool]) -> None:
    """8. A dropout decision from the counter."""
    for dropout_p, stream in ((0.1, 3), (0.5, 0)):
        mask = keep_mask(seed_tensor(17), torch.arange(5), 24, dropout_p, stream)
        for row, column in product(range(5), range(24)):
            got = bool(kept(17, row, column, dropout_p, stream))
            expected = bool(mask[row, column])
            assert got == expected, f"row {row}, column {column}, p = {dropout_p}: expected {expected}, got {got}"


def check_electra_15_loss(electra_15_loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """9. The RTD loss at the masked positions alone."""
    logits_T, is_replaced_T = torch.linspace(-3, 3, 12), torch.arange(12) % 5 == 0
    positions_M = torch.tensor([0, 4, 5, 11])
    expected = rtd_loss(logits_T[positions_M], is_replaced_T[positions_M])
    assert_close("12 tokens, 4 masked", electra_15_loss(logits_T, is_replaced_T, positions_M), expected)


def check_count_replaced(count_replaced: Callable[[Tensor], Tensor]) -> None:
    """10. A Triton kernel that counts, for lengths that fill no block."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for size in (1, 128, 300):
        whole = torch.ones(512, dtype=torch.bool, device=device)  # what lies behind the tokens would count, too
        is_replaced_T = whole[:size].copy_(torch.arange(size, device=device) % 3 == 0)
        expected, got = int(is_replaced_T.sum()), int(count_replaced(is_replaced_T))
        assert got == expected, f"{size} tokens: expected {expected}, got {got}"


CHECKS: dict[str, Callable[[Any], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


def main(*paths: str) -> int:
    """Checks what is in a file; 0 if all of it is right, 2 if there is nothing to check."""
    if len(paths) != 1 or os.path.isdir(paths[0]):
        print("which file has your answers? python docs/exercises/check.py mine.py")
        return 2
    path = paths[0]
    if not os.path.exists(path):
        print(f"{path}: no such file or folder; name the file that has your answers")
        return 2
    answers = {name: value for name, value in runpy.run_path(path).items() if name in CHECKS}
    if not answers:
        print(f"{path} defines none of {', '.join(CHECKS)}")
        return 2
    wrong = 0
    for name, answer in answers.items():
        try:
            CHECKS[name](answer)
            print(f"{name}: right")
        except Exception as error:  # whatever an answer does wrong, the others are checked too
            wrong += 1
            print(f"{name}: not yet. {type(error).__name__}: {error}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
