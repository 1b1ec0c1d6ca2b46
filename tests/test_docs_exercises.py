"""The checks of the exercises accept the solutions and refuse the mistakes that people make."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from electra_core.optim import linear_schedule

FOLDER = Path(__file__).parents[1] / "docs" / "exercises"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"exercises_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # triton looks kernels' modules up by name
    spec.loader.exec_module(module)
    return module


check, solutions = load("check"), load("solutions")


def not_rescaled(scores: Any, values: Any, block: int) -> Any:
    largest, total, out = torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(values.shape[1])
    for first in range(0, len(scores), block):
        part = scores[first : first + block]
        largest = torch.maximum(largest, part.max())
        weights = (part - largest).exp()
        total, out = total + weights.sum(), out + weights @ values[first : first + block]
    return out / total


def all_masked_are_replaced(ids_T: Any, positions_M: Any, sampled_M: Any) -> Any:
    return torch.zeros_like(ids_T, dtype=torch.bool).index_fill(0, positions_M, True)


def minus_one_is_a_word(ids_T: Any, positions_M: Any, sampled_M: Any) -> Any:
    return ids_T.index_copy(0, positions_M, sampled_M) != ids_T


def upside_down(seed: int, row: int, column: int, p: float, stream: int) -> bool:
    return solutions.kept(seed, row, column ^ 1, p, stream)  # the high half first


MISTAKES: dict[str, list[Callable[..., Any]]] = {
    "masked_count": [
        lambda n, fraction, most: max(1, min(most, int(fraction * n))),  # floor
        lambda n, fraction, most: min(most, round(fraction * n)),  # none in short texts
        lambda n, fraction, most: max(1, round(fraction * n)),  # no limit
        lambda n, fraction, most: max(1, min(most, math.floor(fraction * n + 0.5))),  # halves always up
        lambda n, fraction, most: max(1, min(most, round(fraction * n))),  # the product in float64
    ],
    "draw_word": [
        lambda w, u, _, tile: solutions.draw_word(w, u, u, tile),  # one number for both levels
        lambda w, _, u, tile: solutions.draw_word(w, 0.5, u, tile),  # always the middle tile
        lambda w, u, __, ___: solutions.draw_word([1.0] * 6, u, __, ___),  # forgets the weights
        lambda w, u, __, ___: solutions.draw_word(w, 0.5, u, len(w)),  # one level
        lambda w, u, v, ___: solutions.draw_word(w, u, v, 2),  # tiles of two words always
    ],
    "rtd_gradient": [
        lambda x, y: x.sigmoid() - y.float(),  # the sum's
        lambda x, y: (y.float() - x.sigmoid()) / len(x),  # uphill
        lambda x, y: (x.exp() / (1 + x.exp()) - y.float()) / len(x),  # overflows
    ],
    "labels": [all_masked_are_replaced, minus_one_is_a_word],
    "first_update": [
        lambda g: g / (g.abs() + 1e-6),  # with bias correction
        lambda g: 0.1 * g / ((0.001 * g**2 + 1e-6).sqrt()),  # epsilon inside the root
    ],
    "rate": [
        linear_schedule,  # decays only after the warm-up
        lambda t, peak, steps, warmup: solutions.rate(t + 1, peak, steps, warmup),  # from 1
    ],
    "softmax_in_blocks": [
        not_rescaled,
        lambda s, v, _: s.exp() @ v / s.exp().sum(),  # overflows
    ],
    "kept": [
        upside_down,
        lambda seed, row, column, p, stream: not solutions.kept(seed, row, column, p, stream),
        lambda seed, row, column, p, stream: solutions.kept(seed, column, row, p, stream),
    ],
    "electra_15_loss": [
        lambda x, y, at: solutions.electra_15_loss(x, y, at) * len(at) / len(x),  # divided by all tokens
        lambda x, y, at: solutions.electra_15_loss(x, y, torch.arange(len(x))),  # at all tokens
    ],
    "count_replaced": [
        lambda flags: solutions.count_replaced(flags[: len(flags) // 128 * 128]),  # forgets the last block
        lambda flags: torch.tensor(len(flags)),
        lambda flags: flags.as_strided((-(-len(flags) // 128) * 128,), (1,)).sum(),  # reads whole blocks
    ],
}


@pytest.mark.parametrize("name", check.CHECKS)
def test_solutions_are_right(name: str) -> None:
    check.CHECKS[name](getattr(solutions, name))


@pytest.mark.parametrize(
    ("name", "number"), [(name, i) for name, wrong in MISTAKES.items() for i in range(len(wrong))]
)
def test_mistakes_are_seen(name: str, number: int) -> None:
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check.CHECKS[name](MISTAKES[name][number])


def test_every_exercise_is_on_the_page_with_its_solution_and_mistakes() -> None:
    page = (FOLDER.parent / "exercises.md").read_text(encoding="utf-8")
    assert set(MISTAKES) == set(check.CHECKS)
    for name in check.CHECKS:
        assert f"\n`{name}(" in page and f"solutions.py#{name})" in page


def test_the_command_tells_right_from_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.py"
    wrong = "def rate(step, peak, steps, warmup):\n    return peak\n"
    right = "import numpy as np\n\n"
    right += "def masked_count(n, fraction, most):\n"
    right += "    return max(1, min(most, round(float(np.float32(fraction) * np.float32(n)))))\n"
    mine.write_text(wrong + right)
    assert check.main(str(mine)) == 1
    told = capsys.readouterr().out
    assert "masked_count: right" in told and "rate: not yet. AssertionError: step 0 of 100" in told
    for name, answer in (("first_update", "g / (g.abs() + 1e-6)"), ("rtd_gradient", "y.double()")):
        mine.write_text(f"def {name}(g, y=None):\n    return {answer}\n")
        assert check.main(str(mine)) == 1
        told = capsys.readouterr().out
        assert re.search(r"not yet.*\[[^]]+\]: expected \[[^]]+\], got \[[^]]+\]", told), told
    assert "dtype" in told
    mine.write_text("x = 1\n")
    assert check.main(str(mine)) == 2
    capsys.readouterr()
    assert check.main() == 2 and check.main(str(tmp_path)) == 2
    assert capsys.readouterr().out.count("which file has your answers?") == 2
    assert check.main(str(tmp_path / "none.py")) == 2
    assert "none.py: no such file or folder; name the file" in capsys.readouterr().out
