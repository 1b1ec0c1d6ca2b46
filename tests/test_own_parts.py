"""What a program of one's own puts into pre-training: means over sequences, objectives, masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import data, one_thread, train  # noqa: F401
from torch import Tensor, nn

from electra_core import encoder
from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.corpus import Corpus
from electra_core.electra import PretrainBatch
from electra_core.execution.static_batch import Shapes
from electra_core.pretraining.batches import Batches

CONFIG = PretrainConfig(batch_size=8, max_length=24)


def lengths_and_first_ids(batch: PretrainBatch) -> Tensor:
    """[N]: something of each sequence that differs between them."""
    return batch.tokens.lengths + batch.tokens.input_ids_T.roll(-1)[batch.first_tokens_N].float()


@pytest.mark.parametrize(("accumulate", "size"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_means_over_sequences_add_up_and_leave_out_filling_ones(
    data: Path,
    accumulate: int,
    size: int,
) -> None:
    corpus, cpu = Corpus.open(data), torch.device("cpu")
    config = PretrainConfig(batch_size=8, max_length=24, accumulate=accumulate)
    (whole,) = Batches(corpus, CONFIG, cpu)(3)
    expected = lengths_and_first_ids(whole).mean()
    eager, static, emptied = 0.0, 0.0, 0
    for rank in range(size):
        parts = Batches(corpus, config, cpu, rank, size)(3)
        inputs = Shapes.of_run(config, size).inputs(parts, pinned=False)
        inputs.fill(parts, seed=0, rate=0.0)
        for plain, filled in zip(parts, inputs.parts, strict=True):
            assert filled.tokens.num_sequences > plain.tokens.num_sequences
            emptied += int((filled.tokens.lengths == 0).sum())
            assert torch.equal(
                filled.sequence_weights_N[: len(plain.sequence_weights_N)], plain.sequence_weights_N
            )
            eager = eager + plain.mean_over_sequences(lengths_and_first_ids(plain))
            static = static + filled.mean_over_sequences(lengths_and_first_ids(filled))
    torch.testing.assert_close(eager, expected)
    torch.testing.assert_close(static, expected)
    assert emptied or accumulate == 1


class GatedLayer(encoder.Layer):
    """A layer with a parameter that the Hub's layout has no name for."""

    def __init__(self, config: EncoderConfig, first: int) -> None:
        super().__init__(config, first)
        self.gate = nn.Linear(config.hidden_size, 1)


def test_a_model_that_could_not_be_saved_is_refused_before_the_first_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "Layer", GatedLayer)
    with pytest.raises(ValueError, match=r"discriminator: cannot be saved .*gate"):
        train(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
