"""What the pre-training model takes, what it refuses and in which words, and batches at the edge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_objectives import CONFIG, PRETRAIN, make, make_batch

from electra_core.config import OBJECTIVES, PRESETS
from electra_core.electra import Discriminator, Electra
from electra_core.objectives import Electra15
from electra_core.packing import pack


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "electra"])
def test_another_objective_is_another_model(objective: str) -> None:
    with pytest.raises(
        ValueError, match=rf"objective 'electra', got '{objective}', .*objectives\.build_objective"
    ):
        Electra(CONFIG, replace(PRETRAIN, objective=objective))
    assert type(make(objective)) is not Electra
    with pytest.raises(ValueError, match="objective 'electra-15', got 'electra'"):
        Electra15(CONFIG, PRETRAIN)
    own = type("Own", (Electra,), {"objective": "own"})
    with pytest.raises(
        ValueError, match=r"objective 'own', .*; or give dataclasses\.replace\(pretrain, objective='own'\)"
    ):
        own(CONFIG, PRETRAIN)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("tiny", PRETRAIN),
            r"config: .*class EncoderConfig, as .*discriminator is one, got str",
        ),
        ((PRESETS["tiny"], PRETRAIN), "config: .*got Preset"),
        ((PRETRAIN, CONFIG), "config: .*got PretrainConfig"),
        (
            (CONFIG, CONFIG),
            r"pretrain: .*class PretrainConfig, as .*\.pretrain is one, got Enc",
        ),
    ],
)
def test_other_configurations_are_refused(arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Electra(*arguments)


def test_a_generator_of_other_sizes_is_not_one_and_the_same_model() -> None:
    with pytest.raises(ValueError, match="tying: 'all' needs a generator of the discriminator's sizes"):
        Electra(CONFIG, replace(PRETRAIN, tying="all"))


def test_a_model_without_a_config_is_refused() -> None:
    with pytest.raises(ValueError, match=r"config: .*got str"):
        Discriminator("tiny")  # type: ignore[arg-type]


BATCH = make_batch()


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (BATCH.tokens, "batch: expected a PretrainBatch .*mask_tokens.*, got TokenBatch"),
        ({"input_ids": BATCH.masked_ids_T}, "batch: expected a PretrainBatch .*, got dict"),
        (replace(BATCH, tokens={}), "batch: expected a TokenBatch .*, got dict"),
        (
            replace(BATCH, masked_positions_M=BATCH.masked_positions_M.int()),
            "positions_M: .*int64, got int32",
        ),
        (replace(BATCH, masked_positions_M=[1, 2]), "masked_positions_M: expected a tensor, got list"),
        (replace(BATCH, masked_positions_M=torch.tensor([1, 2, 2])), "masked_positions_M: .*distinct values"),
        (replace(BATCH, masked_positions_M=torch.tensor([1, 99])), r"masked_positions_M: .*\[0, 30\), got 99"),
        (replace(BATCH, masked_ids_T=BATCH.masked_ids_T[1:]), r"masked_ids_T: expected shape \[30\], got \[29\]"),
        (replace(BATCH, masked_ids_T=BATCH.masked_ids_T.int()), "masked_ids_T: expected dtype int64"),
        (replace(BATCH, tokens=BATCH.tokens.with_ids(BATCH.tokens.input_ids_T.int())), "input_ids_T: .* int64"),
    ],
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_other_batches_are_refused(objective: str, batch: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(objective)(batch, 0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_without_a_masked_word(objective: str) -> None:
    """A short text may have nothing to mask: nothing is learned of it there, and nothing is NaN."""
    tokens = pack([[2, 3]])
    batch = replace(
        BATCH, tokens=tokens, masked_ids_T=tokens.input_ids_T, masked_positions_M=torch.tensor([]).long()
    )
    model = make(objective).train()
    output = model(batch, 1)
    output.loss.backward()
    assert torch.isfinite(output.loss) and output.mlm_loss == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_on_the_meta_device(objective: str) -> None:
    """Shapes without numbers."""
    with torch.device("meta"):
        model = make(objective)
    output = model(BATCH.to("meta"), 0)
    assert output.loss.is_meta and output.corrupted_ids_T.shape == (30,)
