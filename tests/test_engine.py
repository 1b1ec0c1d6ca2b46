"""Engines: the static step trains as the eager one, in a bounded number of shapes, and waits for nothing."""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import re
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import contrastive  # noqa: F401
import pretend_graphs
import pytest
import torch
from electra_kernels import use
from kernel_helpers import INTERPRETED, ON_PTX_MACHINE
from small_runs import make_data, one_thread, train
from tiny_steps import CASES, CONFIG, ENCODER, batch_of
from torch import Tensor

from benchmarks.gpu_summary import FALLBACKS
from electra_core import muon, training
from electra_core.config import EncoderConfig, PretrainConfig, updated
from electra_core.electra import PretrainBatch
from electra_core.errors import UserError
from electra_core.execution import step_runners
from electra_core.execution.engine import choose_engine, static_steps
from electra_core.execution.static_batch import BUCKETS, Shapes, StaticInputs
from electra_core.objectives import build_objective
from electra_core.optim import build_optimizer
from electra_core.packing import from_lengths
from electra_core.training import MOST_SKIPPED_STEPS, Diverged, Loop, StepResult, training_steps

__all__ = ["one_thread"]  # a fixture of every test here

CPU = torch.device("cpu")


def run(
    engine: str, config: PretrainConfig = CONFIG, device: torch.device = CPU, capture: bool = False,
    encoder: EncoderConfig = ENCODER, lengths_of: Callable[[int], list[int]] | None = None,
) -> tuple[list[StepResult], Any]:  # fmt: skip
    """The run's steps with an engine: their results and the trained model."""
    model = build_objective(encoder, config).to(device)

    def loss_function(batch: PretrainBatch, seed: Any) -> tuple[Tensor, dict[str, Tensor]]:
        output = model(batch, seed)
        replaced = batch.mean_over_tokens(output.is_replaced_T.float())
        return output.loss, {"mlm": output.mlm_loss, "rtd": output.rtd_loss, "replaced": replaced,
                             "tokens": batch.counted_tokens()}  # fmt: skip

    loop = Loop(
        model, build_optimizer(model, config), loss_function,
        schedule=lambda step: config.learning_rate * (1 - step / config.steps),
        steps=config.steps, seed=config.seed, clip_norm=config.clip_norm,
    )  # fmt: skip
    if engine == "eager":
        batches = lambda step: [part.to(device) for part in batch_of(step, config, lengths_of)]  # noqa: E731
        return list(training_steps(loop, batches)), model
    steps = static_steps(
        loop, lambda step: batch_of(step, config, lengths_of), shapes=Shapes.of_run(config), device=device,
        capture=capture,
    )  # fmt: skip
    return list(steps), model


@pytest.mark.parametrize("name", CASES)
def test_the_static_step_trains_as_the_eager_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Muon rounds to bf16 on some processors, which would make much of fp32's last bits.
    monkeypatch.setattr(muon, "has_fast_bf16", lambda: False)
    config = updated(CONFIG, CASES[name], "test")
    (eager, model), (static, other) = run("eager", config), run("static", config)
    for a, b in zip(eager, static, strict=True):
        assert a.step == b.step and a.learning_rate == b.learning_rate and not b.skipped
        torch.testing.assert_close(b.loss, a.loss, rtol=2e-4, atol=1e-5)
        torch.testing.assert_close(b.gradient_norm, a.gradient_norm, rtol=2e-3, atol=1e-5)
        for figure, value in a.figures.items():
            torch.testing.assert_close(b.figures[figure], value, rtol=2e-3, atol=1e-5, msg=figure)
    for (path, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-2, atol=2e-4, msg=path)


def two_shapes(step: int) -> list[int]:
    """Lengths of four sequences, of one of two sizes together."""
    return [7, 24, 11, 16] if step % 3 else [5, 9, 20, 3]


def shuffled(step: int) -> list[int]:
    """Those of one size, in an order of each step's own."""
    order = torch.randperm(4, generator=torch.Generator().manual_seed(step))
    return [two_shapes(1)[i] for i in order]


@pytest.mark.parametrize("name", [*CASES, "kernels"])
def test_a_replayed_step_keeps_nothing_of_the_one_captured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own code for graphs, over graphs that work on a CPU: the same bits as without them.

    The twins of attention look at the lengths of the sequences, so only with the kernels may those differ.
    """
    kernels = name == "kernels"
    if kernels and not (INTERPRETED or ON_PTX_MACHINE):
        pytest.skip("kernels run on CPU tensors in the interpreter only")
    changes: dict[str, Any] = {"steps": 4 if kernels else 7, "batch_size": 4} | CASES.get(name, {})
    if "accumulate" in changes:
        changes["batch_size"] = 8
    options: dict[str, Any] = {
        "config": updated(CONFIG, changes, "test"),
        "encoder": dataclasses.replace(ENCODER, num_attention_heads=1),
        "lengths_of": shuffled if kernels else two_shapes,
    }
    with use("triton" if kernels else "auto"):
        static, model = run("static", **options)
        pretend_graphs.on_a_cpu(monkeypatch)
        replayed, other = run("static", **options, capture=True)
    graphs = pretend_graphs.Graph.made
    assert len(graphs) == (2 if kernels else 3)  # of the largest shape, and of those that occur
    assert graphs[0].replays == 1 and min(graph.replays for graph in graphs[1:]) >= 2
    for a, b in zip(static, replayed, strict=True):
        assert torch.equal(a.loss, b.loss) and torch.equal(a.gradient_norm, b.gradient_norm), a.step
        assert all(torch.equal(a.figures[figure], b.figures[figure]) for figure in a.figures), a.step
    for (path, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), path


def read_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient's norm on the host: no graph can hold such a step."""
    clip = training.clip_gradients

    def reading(*arguments: Any) -> Tensor:
        norm = clip(*arguments)
        norm.item()
        return norm

    monkeypatch.setattr(training, "clip_gradients", reading)


def fell_back(caplog: pytest.LogCaptureFixture) -> bool:
    """Whether the log says that there are no graphs or kernels; a GPU's summary looks for the same words."""
    return any(words in caplog.text for words in FALLBACKS)


def test_a_step_that_cannot_be_captured_goes_on_kernel_by_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here because it reads a value; the capture breaks off in the middle, and the run knows nothing of it."""
    config = updated(CONFIG, {"batch_size": 4}, "test")
    plain, model = run("static", config, lengths_of=two_shapes)
    pretend_graphs.on_a_cpu(monkeypatch)
    read_in_every_step(monkeypatch)
    going_on, other = run("static", config, lengths_of=two_shapes, capture=True)
    assert "a step cannot be captured (" in caplog.text and "not permitted when stream is capturing" in caplog.text
    assert re.search(r", at \w+\.py:\d+\); .* one by one instead, as with engine='static'", caplog.text)
    assert fell_back(caplog)
    assert [graph.replays for graph in pretend_graphs.Graph.made] == [0, 0]  # the failed one, and one to clean up
    assert pretend_graphs.left_behind() == []
    assert [float(result.loss) for result in going_on] == [float(result.loss) for result in plain]
    for (path, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), path


def test_memory_that_does_not_suffice_for_a_graph_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the end of the capture complains of something else."""
    pretend_graphs.on_a_cpu(monkeypatch)
    calls: list[int] = []
    clip = training.clip_gradients

    def out_of_memory(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:  # the first step of the largest shape is eager
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return clip(*arguments)

    monkeypatch.setattr(training, "clip_gradients", out_of_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        run("static", updated(CONFIG, {"batch_size": 4}, "test"), lengths_of=two_shapes, capture=True)
    assert pretend_graphs.left_behind() == [], "a notebook may try a smaller batch"


def test_an_error_that_a_script_is_handling_is_no_cause_of_a_failed_capture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A notebook tries a smaller batch in its `except`; the memory that the larger one lacked is there now."""
    pretend_graphs.on_a_cpu(monkeypatch)
    read_in_every_step(monkeypatch)
    try:
        raise torch.cuda.OutOfMemoryError("of a larger batch")
    except torch.cuda.OutOfMemoryError:
        run("static", updated(CONFIG, {"steps": 2, "batch_size": 4}, "test"), lengths_of=two_shapes, capture=True)
    assert "not permitted when stream is capturing" in caplog.text


@pytest.mark.parametrize("ends", ["the capture", "the run"])
def test_a_failed_capture_keeps_no_tensors(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would lie in a cycle until Python looks for one, which a lack of GPU memory does not make it do."""
    pretend_graphs.on_a_cpu(monkeypatch)
    clip, norms = training.clip_gradients, []

    def failing(*arguments: Any) -> Tensor:
        norm = clip(*arguments)
        norms.append(weakref.ref(norm))
        if len(norms) == 2:  # the first step of the largest shape is eager
            raise torch.cuda.OutOfMemoryError("CUDA out of memory") if ends == "the run" else RuntimeError("no")
        return norm

    monkeypatch.setattr(training, "clip_gradients", failing)
    gc.collect()
    gc.disable()
    try:
        with suppress(torch.cuda.OutOfMemoryError):
            run("static", updated(CONFIG, {"steps": 2, "batch_size": 4}, "test"), capture=True)
        pretend_graphs.Graph.made.clear()  # CUDA's hold no tensors
        assert [norm() for norm in norms] == [None] * (2 if ends == "the run" else 4)
    finally:
        gc.enable()


def test_a_buffer_that_is_made_anew_is_in_no_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All replays would read the tensor that was the buffer at the capture."""
    config = updated(CONFIG, {"objective": "replacing", "steps": 7, "batch_size": 4}, "test")
    plain, model = run("static", config, lengths_of=two_shapes)
    pretend_graphs.on_a_cpu(monkeypatch)
    going_on, other = run("static", config, lengths_of=two_shapes, capture=True)
    assert [float(result.loss) for result in going_on] == [float(result.loss) for result in plain]
    assert torch.equal(model.mean_D, other.mean_D) and model.mean_D.any()
    assert "engine='graph': the forward pass makes the buffer mean_D anew" in caplog.text


def test_more_shapes_than_graphs_go_on_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    config = updated(CONFIG, {"steps": 7, "batch_size": 4}, "test")
    plain, model = run("static", config, lengths_of=two_shapes)
    pretend_graphs.on_a_cpu(monkeypatch)
    monkeypatch.setattr(step_runners, "MOST_GRAPHS", 2)  # the rehearsed one, and one of two
    some, other = run("static", config, lengths_of=two_shapes, capture=True)
    assert len(pretend_graphs.Graph.made) == 2
    assert [float(result.loss) for result in some] == [float(result.loss) for result in plain]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    model = build_objective(ENCODER, CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss_function(batch: PretrainBatch, seed: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return model(batch, seed).loss * math.nan, {}

    results = []
    loop = Loop(
        model, build_optimizer(model, CONFIG), loss_function, schedule=lambda step: 1e-3, steps=30, seed=0,
        clip_norm=1.0,
    )  # fmt: skip
    with pytest.raises(Diverged):
        for result in static_steps(loop, batch_of, shapes=Shapes.of_run(CONFIG), device=CPU, capture=False):
            results.append(result)
    assert len(results) == MOST_SKIPPED_STEPS - 1 and all(result.skipped for result in results)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_shapes_are_few_and_hold_every_batch() -> None:
    shapes, seen = Shapes.of_run(CONFIG), set()
    for tokens in range(CONFIG.batch_size, CONFIG.batch_size * CONFIG.max_length + 1):
        lengths = [
            tokens // CONFIG.batch_size + (i < tokens % CONFIG.batch_size) for i in range(CONFIG.batch_size)
        ]
        text = from_lengths(torch.ones(tokens, dtype=torch.int64), torch.zeros(tokens, dtype=torch.int64), lengths)
        part = PretrainBatch(text, text.input_ids_T, torch.tensor([0, 1]))
        shape = shapes.fit([part])
        inputs = StaticInputs(shape, 1)
        inputs.fill([part], seed=7, rate=0.5)
        batch = inputs.parts[0].tokens
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == batch.num_tokens == shape.tokens
        assert 0 <= int(batch.lengths.min()) and int(batch.lengths.max()) <= CONFIG.max_length
        assert shape.tokens - tokens <= shapes.bucket
        assert inputs.parts[0].counted_tokens() == tokens
        seen.add(shape)
    assert len(seen) <= BUCKETS + 1


def test_what_does_not_fit_is_refused() -> None:
    shapes = Shapes.of_run(CONFIG)
    small = shapes.fit([from_text(CONFIG.batch_size)])
    with pytest.raises(ValueError, match="do not fit"):
        StaticInputs(small, 1).fill([from_text(CONFIG.batch_size * 20)], 0, 0.0)


def from_text(tokens: int) -> PretrainBatch:
    """A batch of `CONFIG.batch_size` equally long sequences."""
    each = tokens // CONFIG.batch_size
    ids_T = torch.ones(tokens, dtype=torch.int64)
    return PretrainBatch(from_lengths(ids_T, ids_T * 0, [each] * CONFIG.batch_size), ids_T, torch.tensor([0]))


def test_an_engine_that_does_not_work_falls_back_with_its_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("electra_core.execution.engine.gpu_problem", lambda *_: None)  # else: test_hardware.py
    caplog.set_level(logging.WARNING, "electra_core")
    assert choose_engine("auto", CPU) == "eager" and not caplog.records
    assert choose_engine("graph", CPU) == "eager" and "need a GPU" in caplog.text and fell_back(caplog)
    assert (
        choose_engine("graph", torch.device("cuda"), sharded=True) == "eager"
        and "stores only a part" in caplog.text
    )
    assert choose_engine("auto", torch.device("cuda"), head_sizes={64, 16}) == "graph"
    assert choose_engine("auto", torch.device("cuda"), head_sizes={64, 192}) == "eager"
    assert choose_engine("graph", torch.device("cuda"), head_sizes={192}) == "eager" and "width 192" in caplog.text
    with pytest.raises(UserError, match="expected one of"):
        updated(CONFIG, {"engine": "fast"}, "test")


def test_processors_fast_at_bf16_train_in_fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    import electra_core.execution.engine as module

    monkeypatch.setattr(module, "has_fast_bf16", lambda: True)
    assert choose_engine("auto", CPU, dtype=torch.bfloat16) == "static"
    assert choose_engine("auto", CPU, dtype=torch.float32) == "eager"
    assert choose_engine("auto", CPU, sharded=True, dtype=torch.bfloat16) == "eager"
    assert choose_engine("static", CPU, dtype=torch.float32) == "static"
    monkeypatch.setattr(module, "has_fast_bf16", lambda: False)
    assert choose_engine("auto", CPU, dtype=torch.bfloat16) == "eager"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["electra", "two-parts", "adamw", "muon"])
def test_replayed_graphs_train_as_the_eager_engine(name: str, caplog: pytest.LogCaptureFixture) -> None:
    config, device = updated(CONFIG, {"steps": 24} | CASES[name], "test"), torch.device("cuda")
    encoder = dataclasses.replace(ENCODER, num_attention_heads=1)  # 16 wide: one that has a kernel
    eager, _ = run("eager", config, device, encoder=encoder)
    static, _ = run("static", config, device, capture=True, encoder=encoder)
    assert not fell_back(caplog), caplog.text  # the losses would be the same
    for a, b in zip(eager, static, strict=True):
        torch.testing.assert_close(b.loss, a.loss, rtol=2e-3, atol=1e-4)
        assert float(b.figures["tokens"]) == float(a.figures["tokens"])


def test_pretrain_names_its_engine_and_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--accumulate 0` is resolved before the run is written down; the static step runs a whole run on a CPU."""
    import electra_core.pretraining.setup as module

    data = make_data(tmp_path)
    eager = train(data, tmp_path / "eager", {"accumulate": 0})
    monkeypatch.setattr(module, "choose_engine", lambda *_: "static")
    static = train(data, tmp_path / "static", {"recompute": True})
    assert eager.tokens == static.tokens
    for name, value in eager.evaluation.items():
        assert static.evaluation[name] == pytest.approx(value, rel=1e-2), name
    assert "accumulate = 1" in (tmp_path / "eager" / "config.toml").read_text(encoding="utf-8")
