"""Pre-training runs: they learn, repeat bit for bit, leave what they promise, and notice when they diverge."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from electra_kernels.rng import fold
from small_runs import ORIGINAL, RUN, SIZES, assert_same_run, base, data, one_thread, rows, state, train  # noqa: F401
from torch import Tensor, nn

from electra_core import examples, masking, training
from electra_core.adam import ElectraAdam
from electra_core.cli import main
from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.corpus import Corpus
from electra_core.electra import Electra
from electra_core.encoder import Encoder
from electra_core.errors import UserError
from electra_core.execution.torch_state import for_training
from electra_core.optim import build_optimizer
from electra_core.pretraining.batches import Batches
from electra_core.pretraining.evaluation import heldout_loss
from electra_core.pretraining.run_folder import read_config
from electra_core.pretraining.setup import resolve_config
from electra_core.runs.checkpoint_files import checkpoint_folders, read_record
from electra_core.runs.metrics_log import MetricsLog
from electra_core.runs.state import FAILED, read_state
from electra_core.training import MOST_SKIPPED_STEPS, Diverged, Loop, StepResult, training_steps

# It learns ----------------------------------------------------------------------------------------------------


def fit_one_batch(data: Path, steps: int, **changes: Any) -> tuple[list[StepResult], Electra, Any]:
    """The first batch over and over, with one seed: the same masks and dropout-free forward each time."""
    corpus = Corpus.open(data)
    sizes = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings = RUN | ORIGINAL | {"steps": steps, "learning_rate": 5e-3, "tying": "none"} | changes
    encoder, config = resolve_config("tiny", settings, sizes, corpus)
    model = Electra(encoder, config)
    batch = Batches(corpus, config, torch.device("cpu"))(0)

    def loss_function(part: Any, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        output = model(part, seed=1)
        return output.loss, {"mlm": output.mlm_loss, "rtd": output.rtd_loss}

    loop = Loop(
        model, build_optimizer(model, config), loss_function, schedule=lambda t: config.learning_rate, steps=steps,
        seed=0, clip_norm=1.0,
    )  # fmt: skip
    return list(training_steps(loop, lambda step: batch)), model, batch[0]


def test_one_batch_is_learned_by_heart_by_the_generator(data: Path) -> None:
    results, _, _ = fit_one_batch(data, 150)
    first, last = (float(results[i].figures["mlm"]) for i in (0, -1))
    assert first > 3.0, "about log 55 = 4.0"
    assert last < 0.1 * first
    assert float(results[-1].figures["rtd"]) < 0.2 * float(results[0].figures["rtd"])


def test_one_batch_is_learned_by_heart_by_the_discriminator(data: Path) -> None:
    """With uniform draws that stay the same, so that there is always something replaced to find."""
    results, model, batch = fit_one_batch(data, 150, uniform_generator=True)
    first, last = (float(results[i].figures["rtd"]) for i in (0, -1))
    output = model(batch, seed=1)
    assert 0.05 < output.is_replaced_T.float().mean() < 0.25
    assert last < 0.1 * first
    assert torch.equal(output.rtd_logits_T > 0, output.is_replaced_T), "every token is judged rightly"


# It repeats ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(data: Path, base: Path) -> None:
    assert {path.name for path in base.iterdir()} >= {
        "config.toml", "metrics.jsonl", "checkpoints", "discriminator", "generator",
    }  # fmt: skip
    steps = [row["step"] for row in rows(base)]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8], "a row a step, and one per evaluation"
    figures = [value for row in rows(base) for name, value in row.items() if name != "warnings"]
    assert all(math.isfinite(value) for value in figures)
    evaluation = rows(base)[-1]
    changes, sizes = read_config(str(base / "config.toml"))
    corpus = Corpus.open(data)
    batches = Batches(corpus, resolve_config("tiny", changes, sizes, corpus)[1], torch.device("cpu"))
    seen = sum(part.tokens.num_tokens for step in range(8) for part in batches(step))
    assert evaluation["tokens"] == seen
    assert 0 <= evaluation["eval_rtd_auc"] <= 1 and evaluation["eval_mlm_loss"] > 0


def test_electra_15_is_evaluated_where_it_is_trained(data: Path, tmp_path: Path) -> None:
    """At the masked positions, of which nearly all are replaced; ELECTRA's figures are over all tokens."""
    changes = {"steps": 1, "eval_every": 1, "eval_examples": 32}
    everywhere, masked = (
        train(data, tmp_path / name, changes | {"objective": name}).evaluation
        for name in ("electra", "electra-15")
    )
    assert everywhere["eval_replaced_fraction"] < 0.2 and masked["eval_replaced_fraction"] > 0.5
    share = masked["eval_replaced_fraction"]
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert masked["eval_base_rate_loss"] == pytest.approx(entropy)
    assert everywhere["eval_mlm_loss"] == pytest.approx(masked["eval_mlm_loss"], rel=1e-2)


def test_of_uniform_draws_no_accuracy_is_told(data: Path, tmp_path: Path) -> None:
    """The generator beside them was never trained; their loss is the logarithm of the number of words."""
    result = train(data, tmp_path / "run", {"steps": 1, "eval_every": 1, "uniform_generator": True})
    assert "eval_mlm_accuracy" not in result.evaluation
    assert result.evaluation["eval_mlm_loss"] == pytest.approx(math.log(Corpus.open(data).tokenizer.vocab_size))
    masked_lm = {"steps": 1, "eval_every": 1, "uniform_generator": True, "objective": "mlm"}
    assert "eval_mlm_accuracy" in train(data, tmp_path / "mlm", masked_lm).evaluation


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("eval_examples", 0), ("keep_checkpoints", -1), ("max_length", 2), ("warmup_steps", -5),
        ("clip_norm", 0.0), ("temperature", 0.0), ("temperature", math.nan), ("learning_rate", -1e-3),
        ("weight_decay", -0.1), ("adam_beta2", 1.0), ("mask_fraction", 0.5), ("learning_rate", math.inf),
        ("clip_norm", math.inf), ("discriminator_weight", math.nan), ("generator_layers", 0),
        ("clip_norm", 1e308), ("seed", 10**30), ("steps", 2**63), ("batch_size", 2**31),
        ("generator_layers", 2**31),
        ("generator_weight", math.inf),
        ("generator_hidden_size", 0), ("generator_intermediate_size", 0), ("generator_attention_heads", 3),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field}: expected"):
        PretrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_dropout_prob", 1.5), ("hidden_dropout_prob", math.nan), ("attention_probs_dropout_prob", 1.0),
        ("initializer_range", -1.0), ("initializer_range", 0.0), ("layer_norm_eps", -1.0),
        ("layer_norm_eps", math.inf), ("type_vocab_size", 1), ("num_hidden_layers", 0), ("embedding_size", 0),
        ("hidden_size", -16), ("intermediate_size", 0), ("num_attention_heads", 0), ("max_position_embeddings", 0),
        ("initializer_range", 1e38 * 10), ("intermediate_size", 2**31), ("num_hidden_layers", 10**30),
    ],
)  # fmt: skip
def test_sizes_that_make_no_sense_are_refused_by_name(
    data: Path, tmp_path: Path, field: str, value: float
) -> None:
    with pytest.raises(UserError, match=f"{field}: expected .* got {re.escape(str(value))}"):
        train(data, tmp_path / "run", sizes={field: value})
    assert not (tmp_path / "run").exists()
    if (field, value) not in {("initializer_range", 0.0), ("type_vocab_size", 1)}:  # elsewhere those may be
        with pytest.raises(ValueError, match=f"{field}: expected"):
            EncoderConfig(**{field: value})


@pytest.mark.parametrize("engine", ["eager", "static"])
def test_examples_of_one_segment_need_one_type(engine: str, data: Path, tmp_path: Path) -> None:
    changes = {"one_segment_probability": 1.0, "steps": 2, "engine": engine}
    assert train(data, tmp_path / "run", changes, sizes={"type_vocab_size": 1}).steps == 2


def test_examples_are_at_most_as_long_as_there_are_positions(data: Path) -> None:
    corpus = Corpus.open(data)
    assert resolve_config("tiny", RUN | {"max_length": 32}, SIZES, corpus)[1].max_length == 32
    with pytest.raises(UserError, match="max_length: 33 exceeds the model's 32 positions"):
        resolve_config("tiny", RUN | {"max_length": 33}, SIZES, corpus)


@pytest.mark.parametrize("minutes", [-1.0, math.nan])
def test_a_time_limit_is_a_time(data: Path, tmp_path: Path, minutes: float) -> None:
    with pytest.raises(UserError, match=f"^max_minutes: expected a number of at least 0, got {minutes:g}"):
        train(data, tmp_path / "run", max_minutes=minutes)
    assert not (tmp_path / "run").exists()


def test_a_warm_up_that_never_ends_is_told(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The presets' 10,000 steps are more than many a small run takes."""
    for warmup, said in (
        (1, []),
        (20, ["warmup_steps=20 of 2 steps: the learning rate reaches only 2.5% of its peak"]),
    ):
        train(data, tmp_path / str(warmup), {"steps": 2, "warmup_steps": warmup})
        assert caplog.messages == said


def test_the_shortest_examples_are_trained_on(data: Path, tmp_path: Path) -> None:
    changes = {"steps": 2, "max_length": 8, "mask_fraction": 0.01}
    assert train(data, tmp_path / "short", changes).steps == 2


def test_the_log_is_closed_whatever_ends_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[bool] = []
    monkeypatch.setattr(MetricsLog, "close", lambda self, failed=False: ends.append(failed))
    train(data, tmp_path / "good", {"steps": 1})

    def broken(*_: object) -> None:
        raise UserError("no evaluation today")

    monkeypatch.setattr("electra_core.pretrain.evaluate", broken)
    with pytest.raises(UserError, match="today"):
        train(data, tmp_path / "bad", {"steps": 1})
    assert ends == [False, True]


def test_steps_are_taken_as_the_configuration_says(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: list[Loop] = []

    def spied(loop: Loop, batches: Any) -> Iterator[StepResult]:
        loops.append(loop)
        yield from training_steps(loop, batches)

    monkeypatch.setattr("electra_core.pretrain.training_steps", spied)
    changes = {"steps": 4, "clip_norm": 0.25, "learning_rate": 0.5, "warmup_steps": 2, "recompute": True}
    train(data, tmp_path / "run", changes)
    (loop,) = loops
    encoders = [module for module in loop.model.modules() if isinstance(module, Encoder)]
    assert len(encoders) == 2 and all(encoder.recompute for encoder in encoders)
    assert (loop.steps, loop.first_step, loop.clip_norm) == (4, 0, 0.25)
    assert [loop.schedule(t) for t in range(4)] == [0.0, 0.5 * 0.75 * 0.5, 0.5 * 0.5, 0.5 * 0.25]


def test_same_seed_same_run_bit_for_bit(data: Path, base: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "again")
    assert_same_run(tmp_path / "again", base)


def test_what_a_caller_has_set_in_torch_changes_nothing(data: Path, base: Path, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.device("meta"):  # as torch.set_default_device, which stays
            train(data, tmp_path / "run")
            assert torch.get_default_device().type == "meta"
            assert torch.get_default_dtype() == torch.float64 and not torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_run(tmp_path / "run", base)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_callers_autocast_changes_nothing(data: Path, tmp_path: Path, precision: str) -> None:
    """And is there afterwards. In bf16, training inside another autocast would keep its first copy of weights."""
    changes = {"precision": precision}
    train(data, tmp_path / "plain", changes)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", dtype=torch.float16):
        train(data, tmp_path / "run", changes)
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16
        assert torch.autocast_decrement_nesting() == 1 and torch.autocast_increment_nesting() == 2
    assert not torch.is_autocast_enabled("cpu")
    assert_same_run(tmp_path / "run", tmp_path / "plain")


def test_in_training_an_autocast_computes_with_the_weights_of_now() -> None:
    """torch keeps its bf16 copies of weights until the outermost autocast ends, a disabled one included."""
    layer, ones = nn.Linear(4, 4, bias=False), torch.ones(1, 4)
    for outside in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with outside, for_training():
            for weight in (1.0, 2.0):
                nn.init.constant_(layer.weight, weight)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    assert layer(ones).tolist() == [[4 * weight] * 4]


def test_no_two_uses_of_randomness_share_a_key(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every key that a run draws with: of the examples' order, borders and coins, of masks, of each step."""
    keys: dict[str, list[int]] = {}

    def recording(name: str) -> Callable[..., int]:
        def recorded(*parts: int) -> int:
            keys.setdefault(name, []).append(fold(*parts))
            return keys[name][-1]

        return recorded

    for module in (examples, masking, training):
        monkeypatch.setattr(module, "fold", recording(module.__name__))
    train(data, tmp_path / "run", ORIGINAL)
    of_steps = keys.pop(training.__name__)
    assert len(set(of_steps)) == len(of_steps) == RUN["steps"]
    others = {key for found in keys.values() for key in found}
    assert len(keys) == 2 and len(others) >= 4 and others.isdisjoint(of_steps)
    keys.clear()
    corpus = Corpus.open(data)
    batches = Batches(corpus, resolve_config("tiny", RUN, SIZES, corpus)[1], torch.device("cpu"))
    batches(0)  # with what is planned ahead: every epoch's order and borders once, coins once, masks once
    of_batch = keys[examples.__name__] + keys[masking.__name__]
    assert len(set(of_batch)) == len(of_batch) >= 2 * 2 + 1 + 1


def test_another_seed_another_run(data: Path, base: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "other", {"seed": 1, "steps": 1})
    assert rows(tmp_path / "other")[0]["loss"] != rows(base)[0]["loss"]


def test_the_resolved_configuration_gives_the_same_run(data: Path, base: Path, tmp_path: Path) -> None:
    """RUN/config.toml given back by --config, through the command line."""
    out, config = tmp_path / "run", str(base / "config.toml")
    arguments = ["pretrain", "--data", str(data), "--out", str(out), "--model", "tiny", "--config", config]
    assert main([*arguments, "--quiet", "--device", "cpu"]) == 0
    assert_same_run(out, base)
    assert (out / "config.toml").read_text() == Path(config).read_text()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_parts_of_a_batch_add_up_to_the_whole(data: Path, tmp_path: Path, dropout: float) -> None:
    """accumulate 1, 2 and 4: the same examples, masks, draws and dropout, so the same losses up to rounding."""
    sizes = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    curves = []
    for accumulate in (1, 2, 4):
        out = tmp_path / str(accumulate)
        train(data, out, ORIGINAL | {"accumulate": accumulate, "steps": 5}, sizes=sizes)
        curves.append([row for row in rows(out) if "loss" in row])
    for curve in curves[1:]:
        for ours, whole in zip(curve, curves[0], strict=True):
            assert ours == pytest.approx(whole, rel=2e-4), f"step {whole['step']}"


def test_bf16_runs_and_is_about_the_same(data: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        train(data, tmp_path / precision, {"precision": precision, "steps": 3})
    fp32, bf16 = rows(tmp_path / "fp32"), rows(tmp_path / "bf16")
    assert bf16[0]["loss"] == pytest.approx(fp32[0]["loss"], rel=0.05) and bf16[0]["loss"] != fp32[0]["loss"]
    assert all(tensor.dtype == torch.float32 for tensor in state(tmp_path / "bf16", 3).values())


def test_an_occupied_folder_is_left_alone(data: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "generator").mkdir()
    for name in ("letter.txt", "generator/letter.txt"):
        (tmp_path / name).write_text("dear")
    with pytest.raises(UserError, match=r"not empty; resume .* overwrite"):
        train(data, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generator", "letter.txt"]
    train(data, tmp_path, {"steps": 1}, overwrite=True)
    for name in ("letter.txt", "generator/letter.txt"):
        assert (tmp_path / name).read_text() == "dear", "a run replaces runs, not letters"
    train(data, tmp_path, overwrite=True)
    assert_same_run(tmp_path, base)


def test_old_checkpoints_are_removed_new_ones_kept(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", {"checkpoint_every": 1, "keep_checkpoints": 3, "steps": 5})
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000004", "step-00000005"], "and nothing temporary"


def test_a_checkpoint_between_evaluations_has_no_score(data: Path, tmp_path: Path) -> None:
    """An older evaluation's would let it pass for the best."""
    train(data, tmp_path / "run", {"checkpoint_every": 1, "eval_every": 2, "keep_checkpoints": 4, "steps": 4})
    records = [read_record(path) for path in checkpoint_folders(tmp_path / "run" / "checkpoints")]
    changes, _ = read_config(tmp_path / "run" / "config.toml")
    evaluated = {row["step"]: row for row in rows(tmp_path / "run") if "eval_mlm_loss" in row}
    expected = {step: heldout_loss(row, PretrainConfig(**changes)) for step, row in evaluated.items()}
    assert {record["step"]: record["score"] for record in records if "score" in record} == expected
    assert [record["step"] for record in records] == [1, 2, 3, 4] and list(expected) == [2, 4]


def test_of_a_finished_run_none_may_be_kept(data: Path, base: Path, tmp_path: Path) -> None:
    """While it runs there is one, from which it can go on."""
    settings = {"checkpoint_every": 2, "keep_checkpoints": 0}
    checkpoints = tmp_path / "run" / "checkpoints"
    train(data, tmp_path / "run", settings, on_evaluation=lambda figures: True)
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000004"]
    train(data, tmp_path / "run", settings, resume=True)
    assert not checkpoints.exists()
    weights = "discriminator/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (base / weights).read_bytes()
    again = train(data, tmp_path / "run", settings, resume=True)
    assert (again.steps, again.seconds, again.stopped_by) == (8, 0.0, None), "nothing is left to do"


# It diverges --------------------------------------------------------------------------------------------------


def steps_with_nan(bad: set[int], steps: int, poison: str) -> Iterator[tuple[StepResult, nn.Linear]]:
    """A linear model whose loss or gradient is NaN at the steps in `bad`."""
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.fill_(0.5)
    optimizer = ElectraAdam(model.parameters())
    place = {"step": 0}

    def loss_function(batch: Tensor, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (model(batch) ** 2).mean()
        if place["step"] in bad:
            # 0 * sqrt(0): the loss is fine, its gradient is 0 * inf.
            loss = loss * math.nan if poison == "loss" else loss + 0 * (model.weight - 0.5).abs().sum().sqrt()
        return loss, {}

    def batches(step: int) -> list[Tensor]:
        place["step"] = step
        return [torch.ones(2, 3)]

    loop = Loop(model, optimizer, loss_function, schedule=lambda t: 0.01, steps=steps, seed=0, clip_norm=1.0)
    for result in training_steps(loop, batches):
        yield result, model


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(poison: str) -> None:
    before, seen = torch.full((1, 3), 0.5), []
    for result, model in steps_with_nan({0, 1}, 5, poison):
        assert result.skipped == (result.step <= 2)
        assert torch.equal(model.weight.detach(), before) == result.skipped
        before = model.weight.detach().clone()
        seen.append(bool(torch.isfinite(model.weight).all()))
    assert seen == [True] * 5


def test_twenty_such_steps_in_a_row_end_the_run() -> None:
    run = steps_with_nan(set(range(3, 100)), 100, "loss")
    with pytest.raises(Diverged, match=f"{MOST_SKIPPED_STEPS} steps in a row"):
        done = [result.step for result, _ in run]
        raise AssertionError(done)
    interrupted = steps_with_nan(set(range(100)) - {19, 38}, 50, "loss")
    assert sum(result.skipped for result, _ in interrupted) == 48, "one good step begins the count anew"


def test_a_run_that_diverges_leaves_good_checkpoints(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Electra.forward

    def spoiled(self: Electra, batch: Any, seed: Any) -> Any:
        output = whole(self, batch, seed)
        bad = self.training and len(list((tmp_path / "run" / "checkpoints").glob("step*"))) > 0
        return dataclasses.replace(output, loss=output.loss * math.nan) if bad else output

    monkeypatch.setattr(Electra, "forward", spoiled)
    with pytest.raises(Diverged):
        train(data, tmp_path / "run", {"steps": 50})
    assert read_state(tmp_path / "run")["state"] == FAILED
    newest = state(tmp_path / "run", 20)
    assert all(tensor.isfinite().all() for tensor in newest.values()), "what is saved is from before"
    skipped = [row["skipped_steps"] for row in rows(tmp_path / "run") if "skipped_steps" in row]
    good = skipped.index(1)
    assert good >= 4 and skipped == [0] * good + [1] * 19, "the log says which steps were skipped"
