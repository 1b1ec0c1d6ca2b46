"""What a program of one's own puts into pre-training: means over sequences, objectives, masks."""

from __future__ import annotations

import functools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import assert_same_run, base, data, one_thread, state, train  # noqa: F401
from torch import Tensor, nn

from electra_core import electra, encoder, load_tokenizer, masking, objectives, pack
from electra_core.adam import ElectraAdam
from electra_core.checkpoint import newest_intact, save_checkpoint, snapshot
from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.corpus import Corpus
from electra_core.electra import PretrainBatch
from electra_core.errors import UserError
from electra_core.execution.static_batch import Shapes
from electra_core.model_dir import load_generator
from electra_core.optim import parameter_groups
from electra_core.pretraining import setup
from electra_core.pretraining.batches import Batches
from electra_core.pretraining.evaluation import HELDOUT_SEED
from electra_core.pretraining.run_folder import mask_record, read_config
from electra_core.runs.state import STOPPED, read_state

CONFIG = PretrainConfig(
    batch_size=8, max_length=24, generator_hidden_size=8, generator_attention_heads=1,
    generator_intermediate_size=16, generator_layers=1,
)  # fmt: skip
TINY = EncoderConfig(
    vocab_size=40, embedding_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=24,
)  # fmt: skip


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
    config = replace(CONFIG, accumulate=accumulate)
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
    """A layer with a further parameter."""

    def __init__(self, config: EncoderConfig, first: int) -> None:
        super().__init__(config, first)
        self.gate = nn.Linear(config.hidden_size, 1)


def test_a_model_that_could_not_be_saved_is_refused_before_the_first_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(config: EncoderConfig, pretrain: PretrainConfig) -> electra.Electra:
        model = electra.Electra(config, pretrain)
        model.discriminator.encoder.layers[0] = GatedLayer(config, 0)
        return model

    monkeypatch.setattr(setup, "build_objective", replaced)
    with pytest.raises(ValueError, match=r"discriminator: cannot be saved .*gate"):
        train(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Counting(electra.Electra):
    """Counts its training steps, and keeps something random."""

    def __init__(self, config: EncoderConfig, pretrain: PretrainConfig) -> None:
        super().__init__(config, pretrain)
        self.register_buffer("queue", torch.randn(4))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, batch: PretrainBatch, seed: Any) -> electra.PretrainOutput:
        if self.training:
            self.steps += 1
            self.queue.add_(float(self.steps))
        return super().forward(batch, seed)


def test_buffers_are_resumed_with(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "Electra", Counting)
    train(data, tmp_path / "run", {"steps": 4, "checkpoint_every": 2})
    saved = state(tmp_path / "run", 4)
    assert saved["model/steps"] == 4 and saved["model/steps"].dtype == torch.int64
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000004")
    train(data, tmp_path / "run", {"steps": 4, "checkpoint_every": 2}, resume=True)
    again = state(tmp_path / "run", 4)
    assert torch.equal(again["model/queue"], saved["model/queue"]) and again["model/steps"] == 4


def test_a_checkpoint_without_buffers_leaves_them_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, counting = (
        kind(TINY, replace(CONFIG, seed=seed)) for kind, seed in ((electra.Electra, 0), (Counting, 1))
    )
    save_checkpoint(tmp_path, 1, snapshot(plain, ElectraAdam(named(plain))), {}, keep=1)
    found, _ = newest_intact(tmp_path)
    assert found is not None
    found.restore(counting, ElectraAdam(named(counting)))
    assert "holds no queue, steps; starting with the model's own" in caplog.text
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), counting.parameters(), strict=True))
    with pytest.raises(UserError, match="belongs to another model"):
        save_checkpoint(tmp_path, 2, snapshot(counting, ElectraAdam(named(counting))), {}, keep=1)
        newest_intact(tmp_path)[0].restore(plain, ElectraAdam(named(plain)))  # type: ignore[union-attr]


class Frozen(electra.Electra):
    """Takes its generator from elsewhere, as Fast-ELECTRA does (Dong et al. 2024)."""

    def __init__(self, config: EncoderConfig, pretrain: PretrainConfig) -> None:
        super().__init__(config, pretrain)
        torch.manual_seed(1)
        self.generator = electra.Generator(replace(config, embedding_size=8)).requires_grad_(False)


def test_a_frozen_generator_keeps_its_words(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted words took their place; the discriminator starts from them, whatever it was to be tied to."""
    monkeypatch.setattr(objectives, "Electra", Frozen)
    ends = {}
    for tying in ("none", "embeddings"):
        changes = {"steps": 2, "embedding_init": "cooccurrence", "tying": tying, "engine": "eager"}
        train(data, tmp_path / tying, changes)
        ends[tying] = state(tmp_path / tying, 2)["model/discriminator.encoder.embeddings.word_embeddings.weight"]
    torch.testing.assert_close(ends["embeddings"], ends["none"], atol=5e-3, rtol=0)  # after two steps
    torch.manual_seed(1)
    saved = load_generator(tmp_path / "none" / "generator")
    given = electra.Generator(saved.config)
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), given.parameters(), strict=True))


def named(model: nn.Module) -> Any:
    return parameter_groups(model, learning_rate=1e-3, weight_decay=0.0)


# Masks --------------------------------------------------------------------------------------------------------


def first_words(tokens: Any, indices: Any, tokenizer: Any, config: PretrainConfig, seed: int) -> PretrainBatch:
    """The first words of each example, as many as usual: the same with any seed."""
    counts = masking.masked_counts(tokens.lengths.long(), config.mask_fraction, config.max_predictions)
    free = ~torch.isin(tokens.input_ids_T, torch.tensor(masking.special_ids(tokenizer)))
    begins = tokens.cu_seqlens.tolist()
    places = [
        begin + free[begin:end].nonzero().squeeze(1)[:count]
        for begin, end, count in zip(begins, begins[1:], counts.tolist())
    ]
    positions = torch.cat(places)
    return PretrainBatch(tokens, tokens.input_ids_T.index_fill(0, positions, tokenizer.mask_id), positions)


def every_second(tokens: Any, indices: Any, tokenizer: Any, config: PretrainConfig, seed: int) -> PretrainBatch:
    """The usual positions, but half of them."""
    usual = masking.mask(tokens, indices, tokenizer, config, seed)
    return replace(usual, masked_positions_M=usual.masked_positions_M[::2])


def test_a_mask_of_ones_own_is_trained_and_evaluated_with(data: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def spied(tokens: Any, indices: Any, tokenizer: Any, config: PretrainConfig, seed: int) -> PretrainBatch:
        seen.append("held out" if seed == HELDOUT_SEED else "trained")
        return first_words(tokens, indices, tokenizer, config, seed)

    one = train(data, tmp_path / "one", {"steps": 2, "engine": "eager"}, mask=functools.partial(spied))
    assert seen == ["trained", "trained", "held out"]
    usual = train(data, tmp_path / "usual", {"steps": 2, "engine": "eager"})
    assert one.evaluation["eval_mlm_loss"] != usual.evaluation["eval_mlm_loss"]
    for engine, accumulate in (("eager", 2), ("static", 1), ("static", 2)):
        other = train(
            data, tmp_path / f"{engine} {accumulate}", {"steps": 2, "engine": engine, "accumulate": accumulate},
            mask=first_words,
        )  # fmt: skip
        assert other.evaluation == pytest.approx(one.evaluation, rel=1e-3)


def test_a_run_is_resumed_with_its_mask_only(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", {"steps": 4}, mask=first_words, max_minutes=0)
    with pytest.raises(UserError, match=r"mask was \w+\.first_words, is now electra_core\.masking\.mask"):
        train(data, tmp_path / "run", {"steps": 4}, resume=True)
    assert train(data, tmp_path / "run", {"steps": 4}, resume=True, mask=first_words).steps == 4


def test_a_finished_run_without_checkpoints_has_its_mask_only(data: Path, tmp_path: Path) -> None:
    settings = {"steps": 2, "keep_checkpoints": 0}
    one = train(data, tmp_path / "run", settings, mask=first_words)
    with pytest.raises(
        UserError, match=r"is finished: mask was \w+\.first_words, is now electra_core\.masking\.mask"
    ):
        train(data, tmp_path / "run", settings, resume=True)
    assert train(data, tmp_path / "run", settings, resume=True, mask=first_words).evaluation == one.evaluation
    path = tmp_path / "run" / "state.json"
    older = {name: value for name, value in json.loads(path.read_text()).items() if name != "mask"}
    path.write_text(json.dumps(older))
    assert train(data, tmp_path / "run", settings, resume=True).steps == 2, "an older version's: the usual mask"


def some_words(
    tokens: Any,
    indices: Any,
    tokenizer: Any,
    config: PretrainConfig,
    seed: int,
    *,
    spans: Any = (1, 2),
    order: Any = len,
) -> PretrainBatch:
    """The first words, whatever it is asked for."""
    return first_words(tokens, indices, tokenizer, config, seed)


@pytest.mark.parametrize("settings", [{}, {"keep_checkpoints": 0}], ids=["", "without checkpoints"])
def test_a_partial_s_arguments_belong_to_the_run(data: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """They make other masks as another function does."""
    settings, run = {"steps": 2, **settings}, tmp_path / "run"
    one = train(
        data, run, settings, mask=functools.partial(some_words, spans=(3, "a"), order=functools.partial(max, 1))
    )
    named = re.escape(f"{__name__}.some_words(order=builtins.max(1), spans=[3, 'a'])")
    for other, told in (
        (functools.partial(some_words, spans=(4, "a")), r"some_words\(spans=\[4, 'a'\]\)"),
        (some_words, "some_words"),
    ):
        with pytest.raises(UserError, match=rf"mask was {named}, is now {__name__}\.{told}$"):
            train(data, run, settings, resume=True, mask=other)
    same = functools.partial(
        functools.partial(some_words, order=functools.partial(max, 1)), spans=[np.int64(3), "a"]
    )
    assert train(data, run, settings, resume=True, mask=same).evaluation == one.evaluation
    assert (run / "config.toml").read_text().startswith(f"# masks: {__name__}.some_words(order=")
    read_config(run / "config.toml")
    state = json.loads((run / "state.json").read_text())
    assert state["mask_arguments"] == "order=builtins.max(1), spans=[3, 'a']"


def test_arguments_without_plain_values_are_known_by_their_class() -> None:
    """An address would be another in every process."""
    record = mask_record(functools.partial(first_words, np.zeros(3), {"a": None}, Counting, key=object()))
    assert record["mask_arguments"] == f"numpy.ndarray, {{'a': None}}, {__name__}.Counting, key=builtins.object"


def test_a_run_of_before_arguments_were_kept_is_resumed(data: Path, tmp_path: Path) -> None:
    """With those that it is given."""
    masked, run = functools.partial(some_words, spans=3), tmp_path / "run"
    settings = {"steps": 2, "keep_checkpoints": 0}
    train(data, run, settings, mask=masked)
    state = json.loads((run / "state.json").read_text())
    del state["mask_arguments"]
    (run / "state.json").write_text(json.dumps(state))
    assert train(data, run, settings, resume=True, mask=masked).steps == 2
    with pytest.raises(UserError, match=r"mask was \S+some_words\(spans=3\), is now \S+first_words\(spans=3\)"):
        train(data, run, settings, resume=True, mask=functools.partial(first_words, spans=3))


def test_a_mask_of_another_number_of_words_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mask: expected \d masked positions in a sequence of \d+ tokens"):
        train(data, tmp_path / "run", mask=every_second)


def test_a_mask_that_is_no_function_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^mask: expected a function .*masking\.mask, got 'spans'"):
        train(data, tmp_path / "run", mask="spans")
    assert not (tmp_path / "run").exists()


def test_fewer_are_masked_where_there_are_fewer_words() -> None:
    tokenizer = load_tokenizer("tiny")
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    tokens = pack([[cls, 7, *[sep] * 18], [cls, *range(5, 23), sep]])
    batch = masking.mask(tokens, range(2), tokenizer, CONFIG, seed=0)
    counts = masking.masked_counts(tokens.lengths.long(), CONFIG.mask_fraction, CONFIG.max_predictions)
    assert counts.tolist() == [3, 3] and len(batch.masked_positions_M) == 4
    masking.check_masked(batch, counts, tokenizer)


# Stopping -----------------------------------------------------------------------------------------------------


def test_an_answer_to_an_evaluation_stops_the_run_and_it_goes_on(data: Path, base: Path, tmp_path: Path) -> None:
    seen: list[float] = []

    def enough(figures: dict[str, float]) -> bool:
        seen.append(figures["step"])
        return figures["eval_mlm_loss"] < 100

    result = train(data, tmp_path / "run", on_evaluation=enough)
    assert (result.stopped_by, result.steps, seen) == ("on_evaluation", 4, [4])
    told = read_state(tmp_path / "run")
    assert told["state"] == STOPPED and told["reason"] == "on_evaluation"
    result = train(data, tmp_path / "run", on_evaluation=enough, resume=True)
    assert (result.stopped_by, result.steps, seen) == (None, 8, [4, 8]), "at the last step nothing is left to stop"
    assert_same_run(tmp_path / "run", base)


@pytest.mark.parametrize(
    ("answer", "stops"),
    [
        (True, True), (np.bool_(True), True), (torch.tensor(True), True),
        (False, False), (None, False), (1, False), ("a line", False), (np.zeros(3), False), (torch.ones(2), False),
    ],
    ids=repr,
)  # fmt: skip
def test_only_true_stops_a_run(data: Path, tmp_path: Path, answer: object, stops: bool) -> None:
    """A function that logs may return what its logger does: a number of characters, a table."""
    settings = {"steps": 2, "eval_every": 1, "engine": "eager"}
    result = train(data, tmp_path / "run", settings, on_evaluation=lambda _: answer)
    assert (result.steps, result.stopped_by) == ((1, "on_evaluation") if stops else (2, None))
