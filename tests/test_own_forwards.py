"""A `forward` of one's own in the encoder and in both halves: in every engine, and with layers computed again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from electra_kernels.dispatch import native_problem
from small_runs import ORIGINAL, data, one_thread, rows, train  # noqa: F401
from torch import Tensor

from electra_core.electra import Discriminator, Electra, Generator
from electra_core.encoder import Encoder
from electra_core.objectives import register


class Gated(Encoder):
    """Hidden states times a gate of their mean."""

    def forward(self, batch: Any, seed: Any = None, rows_R: Tensor | None = None) -> Tensor:
        hidden_TD = super().forward(batch, seed, rows_R)
        return hidden_TD * hidden_TD.mean(-1, keepdim=True).sigmoid()


class FlatterGenerator(Generator):
    encoder_class = Gated

    def forward(self, tokens: Any, positions_M: Any = None, seed: Any = None) -> Tensor:
        return 0.5 * super().forward(tokens, positions_M, seed)


class SharperDiscriminator(Discriminator):
    encoder_class = Gated

    def forward(self, tokens: Any, seed: Any = None) -> Tensor:
        return 2 * super().forward(tokens, seed)


@register
class OwnForwards(Electra):
    objective = "own-forwards"
    generator_class, discriminator_class = FlatterGenerator, SharperDiscriminator


OWN: dict[str, Any] = ORIGINAL | {"objective": "own-forwards", "steps": 3, "eval_every": 3}


def losses(data: Path, out: Path, **changes: Any) -> list[float]:
    train(data, out, OWN | changes, sizes={"num_attention_heads": 1})  # 16 wide, as the loops in C take it
    return [row["loss"] for row in rows(out) if "loss" in row]


@pytest.fixture(scope="module")
def eager(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(data, tmp_path_factory.mktemp("eager") / "run", engine="eager")


def test_layers_computed_again_give_the_same_bits(data: Path, eager: list[float], tmp_path: Path) -> None:
    assert losses(data, tmp_path / "run", engine="eager", recompute=True) == eager
    plain = losses(data, tmp_path / "plain", engine="eager", objective="electra")
    assert abs(plain[0] - eager[0]) > 0.01, "the forwards are what trains"


@pytest.mark.parametrize(("engine", "recompute"), [("static", False), ("static", True), ("compile", True)])
def test_fixed_shapes_train_alike(
    engine: str, recompute: bool, data: Path, eager: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled in one piece, but where attention's twin reads lengths. Inductor's own part takes minutes, so it is
    left out here."""
    calls: list[Any] = []
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=native_problem() is None)
    monkeypatch.setattr(torch, "compile", lambda model: calls.append(model) or compiled(model))
    found = losses(data, tmp_path / "run", engine=engine, recompute=recompute)
    assert found == pytest.approx(eager, rel=1e-4) and len(calls) == (engine == "compile")
