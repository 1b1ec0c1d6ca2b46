"""Objectives of one's own: registered, trained by every engine, evaluated, counted, resumed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contrastive import Contrastive, Crops
from ranks import pretrain_own, run_ranks
from small_objectives import CONFIG, PRETRAIN
from small_runs import ORIGINAL, RUN, SIZES, assert_same_run, data, one_thread, rows, train  # noqa: F401

from electra_core import PRESETS, flops
from electra_core.cli import main
from electra_core.config import OBJECTIVES, EncoderConfig, PretrainConfig
from electra_core.corpus import Corpus
from electra_core.electra import Discriminator, Electra, PretrainBatch, PretrainOutput
from electra_core.errors import UserError
from electra_core.execution import cross_check
from electra_core.execution.fake_step import trace_step
from electra_core.execution.memory import fitting_parts
from electra_core.execution.static_batch import Shapes
from electra_core.objectives import MaskedLM, build_objective, register
from electra_core.packing import pack
from electra_core.pretraining.batches import Batches
from electra_core.pretraining.evaluation import BATCH_SIZE, TAKEN, evaluate, heldout_loss
from electra_core.pretraining.setup import resolve_config
from electra_core.runs.checkpoint_files import read_record
from electra_core.runs.metrics_log import read_metrics

OWN: dict[str, Any] = ORIGINAL | {"objective": "contrastive"}


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps, never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(data, out, OWN | {"engine": "eager"})
    return out


def test_it_is_logged_evaluated_and_judged_by_its_whole_loss(whole: Path) -> None:
    trained, evaluated = ([row for row in rows(whole) if name in row] for name in ("loss", "eval_loss"))
    for row in trained:
        weighted = row["mlm_loss"] + 50 * row["rtd_loss"] + row["contrastive_loss"]
        assert row["loss"] == pytest.approx(weighted, rel=1e-5) and 0 <= row["found"] <= 1
    assert len(trained) == 8 and all(0 < row["contrastive_loss"] < 5 for row in trained)
    last = evaluated[-1]
    assert {"eval_contrastive_loss", "eval_found", "eval_rtd_loss", "eval_rtd_auc", "eval_mlm_accuracy"} <= set(
        last
    )
    summed = last["eval_mlm_loss"] + 50 * last["eval_rtd_loss"] + last["eval_contrastive_loss"]
    assert last["eval_loss"] == pytest.approx(summed, rel=1e-5), "held out in a single batch"
    score = read_record(whole / "checkpoints" / "step-00000008")["score"]
    assert score == last["eval_loss"] != heldout_loss({**last, "eval_loss": 0.0}, PretrainConfig())


def test_fixed_shapes_train_it_alike(data: Path, whole: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", OWN | {"engine": "static"})
    compared = ("loss", "contrastive_loss", "found")
    for ours, theirs in zip(rows(tmp_path / "run")[:2], rows(whole)):
        assert [ours[name] for name in compared] == pytest.approx([theirs[name] for name in compared], rel=2e-3)


def test_what_it_adds_is_compiled_without_a_break(data: Path) -> None:
    """Means over sequences of a filled batch, and an output with a mapping in it."""
    _, config = resolve_config("tiny", RUN | OWN, SIZES, Corpus.open(data))
    parts = Batches(Corpus.open(data), config, torch.device("cpu"))(0)
    inputs = Shapes.of_run(config).inputs(parts, pinned=False)
    inputs.fill(parts, seed=3, rate=0.0)

    def added(batch: PretrainBatch) -> PretrainOutput:
        loss = batch.mean_over_sequences(batch.tokens.lengths.float() + batch.first_tokens_N)
        ids_T = batch.masked_ids_T
        output = PretrainOutput(loss, loss, loss, ids_T, ids_T > 0, ids_T.float())
        return replace(output, more={"one": loss, "two": 2 * loss})

    compiled = torch.compile(added, backend="aot_eager", fullgraph=True)(inputs.parts[0])
    assert list(compiled.more) == ["one", "two"]
    torch.testing.assert_close(compiled.more["two"], added(inputs.parts[0]).more["two"])


def test_parts_in_fixed_shapes_with_empty_sequences(data: Path, tmp_path: Path) -> None:
    """Its rivals are those of a part, so only a part's own figures are compared: eager with static."""
    runs = {}
    for engine in ("eager", "static"):
        train(data, tmp_path / engine, OWN | {"engine": engine, "accumulate": 2, "steps": 3})
        runs[engine] = [row["contrastive_loss"] for row in rows(tmp_path / engine) if "loss" in row]
    assert runs["static"] == pytest.approx(runs["eager"], rel=1e-3)


@pytest.mark.parametrize("objective", ["crops", "host-crops"])
def test_crops_train_in_fixed_shapes_too(objective: str, data: Path, tmp_path: Path) -> None:
    """With empty sequences at the batch's end; dropout, which goes by rows, tells the two kinds of crops apart."""
    losses = {}
    settings = ORIGINAL | {"objective": objective, "steps": 2, "accumulate": 2}
    for engine in ("eager", "static"):
        train(data, tmp_path / engine, settings | {"engine": engine})
        losses[engine] = [row["crop_loss"] for row in rows(tmp_path / engine) if "loss" in row]
    assert losses["static"] == pytest.approx(losses["eager"], rel=1e-3)


def test_cut_on_the_device_they_are_the_same_texts() -> None:
    texts = pack([[2, 7, 8, 9, 3], [2, 30, 3]])
    model = build_objective(CONFIG, replace(PRETRAIN, objective="host-crops")).eval()
    first_ND = lambda text: model.discriminator.encoder(text, None, text.first_tokens_N)  # noqa: E731
    torch.testing.assert_close(Crops.crops(model, first_ND, texts), model.crops(first_ND, texts))


def test_only_values_that_are_read_on_the_host_hinder_a_graph() -> None:
    """As kernels would run it, on tensors without values."""
    config = replace(PRETRAIN, objective="crops")
    assert trace_step(CONFIG, config, sequences=4, length=16).peak > 0
    with pytest.raises(
        UserError, match=r"^accumulate: .* values from the device \(at contrastive\.py:\d+\) cannot"
    ):
        fitting_parts(CONFIG, replace(config, objective="host-crops", max_length=16), torch.device("cpu"), 1)


def test_it_is_resumed(data: Path, whole: Path, tmp_path: Path) -> None:
    settings = OWN | {"engine": "eager"}
    train(data, tmp_path / "run", settings, on_evaluation=lambda figures: True)
    train(data, tmp_path / "run", settings, resume=True)
    assert_same_run(tmp_path / "run", whole)
    with pytest.raises(UserError, match="objective was 'contrastive', is now 'electra'"):
        train(data, tmp_path / "run", settings | {"objective": "electra", "steps": 9}, resume=True)


def test_several_processes_train_it(data: Path, tmp_path: Path) -> None:
    settings = RUN | OWN | {"steps": 2, "engine": "eager"}
    reports = run_ranks(2, pretrain_own, data, tmp_path / "run", settings, SIZES)
    figures = [report[2] for report in reports]
    assert figures[0] == figures[1] and {"eval_loss", "eval_found"} <= set(figures[0])


def test_held_out_means_are_over_sequences(data: Path) -> None:
    """80 examples, in batches of 64 and 16."""
    encoder, config = resolve_config("tiny", RUN | OWN | {"eval_examples": 80}, SIZES, Corpus.open(data))
    model, seen = build_objective(encoder, config), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.more["contrastive_loss"].item()))
    figures = evaluate(model, Corpus.open(data, "heldout"), config, torch.device("cpu"), nullcontext())
    assert figures["eval_contrastive_loss"] == pytest.approx(0.8 * seen[0] + 0.2 * seen[1], rel=1e-6)


def test_what_it_adds_starts_from_the_run_s_seed() -> None:
    """Not from torch's own generator, with which two runs of one seed were two runs."""

    @register
    class WithHead(Electra):
        objective = "with-head"

        def __init__(self, config: EncoderConfig, pretrain: PretrainConfig) -> None:
            super().__init__(config, pretrain)
            self.head = torch.nn.Linear(config.hidden_size, 3)

    state = torch.get_rng_state()
    one, same, other = (
        build_objective(CONFIG, replace(PRETRAIN, objective="with-head", seed=s)) for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state), "which is left alone"
    assert torch.equal(one.head.weight, same.head.weight) and not torch.equal(one.head.weight, other.head.weight)


def test_flops_are_those_of_the_objective_it_derives_from() -> None:
    preset = PRESETS["tiny"]
    own, electra = (
        flops.summary(preset.discriminator, replace(preset.pretrain, objective=name))
        for name in ("contrastive", "electra")
    )
    assert electra.pop("training_flops_original_counting") and own == electra


def test_an_objective_on_other_grounds() -> None:
    """From BERT's: no generator, words at the masked positions."""

    @register
    class Twice(MaskedLM):
        objective = "twice"

    preset = PRESETS["tiny"]
    config = replace(preset.pretrain, objective="twice")
    assert isinstance(build_objective(preset.discriminator, config), Twice)
    step = flops.training_step_flops(preset.discriminator, config)
    assert step == flops.training_step_flops(preset.discriminator, replace(config, objective="mlm"))

    @register
    class Again(MaskedLM):
        objective = "twice"

    assert type(build_objective(preset.discriminator, config)) is Again, "as when a notebook's cell runs again"


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({}, "Own: expected a class attribute `objective` with a name of its own, got None"),
        ({"objective": "mlm"}, "with a name of its own, got 'mlm'"),
        ({"objective": "own", "judges": "words"}, r"Own\.judges: expected one of .* got 'words'"),
        ({"objective": "own", "has_generator": None}, r"Own\.has_generator: expected one of"),
    ],
)
def test_what_cannot_be_registered(attributes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        register(type("Own", (Electra,), attributes))
    with pytest.raises(UserError, match="objective: expected one of"):
        PretrainConfig(objective="own")


def test_names_of_the_log_are_not_taken(data: Path, tmp_path: Path) -> None:
    class Taken(Contrastive):
        objective = "taken"

        def forward(self, batch: Any, seed: Any) -> Any:
            return replace(super().forward(batch, seed), more={"tokens": torch.tensor(1.0)})

    register(Taken)
    with pytest.raises(ValueError, match=r"PretrainOutput\.more: expected other names .* got 'tokens'"):
        train(data, tmp_path / "run", OWN | {"objective": "taken", "engine": "eager"})


def test_figures_in_any_order_are_not_mixed_but_need_their_names(data: Path, tmp_path: Path) -> None:
    class Changing(Contrastive):
        objective, calls = "changing", 0

        def forward(self, batch: Any, seed: Any) -> Any:
            Changing.calls += 1
            one = torch.tensor(float(batch.token_share))
            more = {"one": one, "two": 2 * one, "lost": one}
            if Changing.calls > lost_after:
                more.pop("lost")
            order = sorted(more, reverse=Changing.calls % 2 == 0)
            return replace(super().forward(batch, seed), more={name: more[name] for name in order})

    register(Changing)
    settings, lost_after = OWN | {"objective": "changing", "engine": "eager", "log_every": 2}, 99
    train(data, tmp_path / "run", settings)
    logged = [(row["one"], row["two"]) for row in rows(tmp_path / "run") if "loss" in row]
    assert logged and set(logged) == {(1, 2)}
    lost_after = Changing.calls + 3
    said = r"PretrainOutput\.more: expected the same names in every step, got \['lost'\] in some only"
    with pytest.raises(ValueError, match=said):
        train(data, tmp_path / "other", settings | {"eval_every": 100})


def test_no_column_of_the_log_or_of_the_evaluation_is_free(data: Path, whole: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", ORIGINAL | {"objective": "all-tokens-mlm", "steps": 2, "log_every": 2})
    lines = [line for run in (whole, tmp_path / "run") for line in read_metrics(run / "metrics.jsonl")]
    columns = {name.removeprefix("eval_") for line in lines for name in line}
    assert columns - {"contrastive_loss", "found"} <= TAKEN


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"learning_rate": torch.tensor(1.0)}, "names than .* got 'learning_rate'"),
        ({"rtd_auc": torch.tensor(1.0)}, "got 'rtd_auc'"),
        ({"eval_mine": torch.tensor(1.0)}, "got 'eval_mine'"),
        ({3: torch.tensor(1.0)}, "got 3"),
        ({"mine": 1.0}, r"more\['mine'\]: expected a scalar tensor, got float"),
        ({"mine": torch.ones(2)}, r"more\['mine'\]: expected a scalar tensor, got one of shape \[2\]"),
    ],
)
def test_what_it_adds_is_checked_in_both_places(more: Any, said: str, data: Path, tmp_path: Path) -> None:
    class Adding(Electra):
        objective = "adding"

        def forward(self, batch: Any, seed: Any) -> Any:
            return replace(super().forward(batch, seed), more=more)

    register(Adding)
    changes = OWN | {"objective": "adding", "engine": "eager"}
    with pytest.raises(ValueError, match=said):
        train(data, tmp_path / "run", changes)
    encoder, config = resolve_config("tiny", RUN | changes, SIZES, Corpus.open(data))
    model = Adding(encoder, config)
    with pytest.raises(ValueError, match=said):
        evaluate(model, Corpus.open(data, "heldout"), config, torch.device("cpu"), nullcontext())


class Shuffled(torch.nn.Module):
    """Without a generator: every masked position's token is replaced by a fixed other one."""

    objective, judges, predicts, has_generator = "shuffled", "tokens", None, False

    def __init__(self, config: EncoderConfig, pretrain: PretrainConfig):
        super().__init__()
        self.discriminator = Discriminator(config)

    def forward(self, batch: PretrainBatch, seed: Any) -> PretrainOutput:
        vocab_size, ids_T = self.discriminator.config.vocab_size, batch.tokens.input_ids_T.clone()
        ids_T[batch.masked_positions_M] = (batch.target_ids_M * 7 + 13) % vocab_size
        replaced_T = ids_T != batch.tokens.input_ids_T
        text, token_seed = batch.tokens.with_ids(ids_T), batch.seeds(seed)[0]
        head = self.discriminator.judge(text, replaced_T, batch.token_weights_T, token_seed)
        loss = head.loss * batch.token_share
        return PretrainOutput(loss, torch.zeros_like(loss), loss, ids_T, replaced_T, head.logits_T)


@pytest.mark.parametrize("embedding_init", ["normal", "cooccurrence"])
def test_one_without_any_generator(
    embedding_init: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(Shuffled)
    told: list[str] = []
    monkeypatch.setattr(cross_check, "_uses_kernels", lambda *_: True)
    monkeypatch.setattr(cross_check, "distrust", lambda _, reason: told.append(reason))
    result = train(data, tmp_path / "run", OWN | {"objective": "shuffled", "embedding_init": embedding_init})
    assert {"eval_loss", "eval_rtd_auc"} <= result.evaluation.keys() and not told
    assert "eval_mlm_accuracy" not in result.evaluation
    assert (tmp_path / "run" / "discriminator").is_dir() and not (tmp_path / "run" / "generator").exists()


@pytest.mark.parametrize("missing", ["discriminator", "generator"])
def test_a_half_that_is_missing_is_named_before_the_first_step(missing: str, data: Path, tmp_path: Path) -> None:
    class Halved(Electra):
        objective = "halved"

        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self.other = getattr(self, missing)
            delattr(self, missing)

    register(Halved)
    with pytest.raises(ValueError, match=rf"Halved\.{missing}: expected .* got none"):
        train(data, tmp_path / "run", OWN | {"objective": "halved"})
    assert not (tmp_path / "run").exists()


def test_the_command_line_says_that_it_does_not_know_it(
    data: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("electra_core.config.OWN_OBJECTIVES", [])
    command = [
        "pretrain",
        "--data",
        str(data),
        "--out",
        str(whole),
        "--config",
        str(whole / "config.toml"),
        "--resume",
    ]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "got 'contrastive'; an objective of one's own exists only in the program that registers it" in said
    assert said.count("\n") == 1 and all(name in said for name in OBJECTIVES)
    assert main(["status", str(whole)]) == 0


def test_an_evaluation_needs_the_same_names_in_every_batch(data: Path) -> None:
    class Losing(Electra):
        objective, calls = "losing", 0

        def forward(self, batch: Any, seed: Any) -> Any:
            Losing.calls += 1
            return replace(
                super().forward(batch, seed), more={"mine": torch.tensor(1.0)} if Losing.calls < 2 else {}
            )

    register(Losing)
    changes = OWN | {"objective": "losing", "eval_examples": BATCH_SIZE + 1}
    encoder, config = resolve_config("tiny", RUN | changes, SIZES, Corpus.open(data))
    said = r"PretrainOutput\.more: expected the same names in every batch, got \['mine'\] and \[\]"
    with pytest.raises(ValueError, match=said):
        evaluate(Losing(encoder, config), Corpus.open(data, "heldout"), config, torch.device("cpu"), nullcontext())
