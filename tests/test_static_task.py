"""Fine-tuning in fixed shapes trains as the eager steps do; a replayed graph keeps nothing of the batch it saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pretend_graphs
import pytest
import tiny_model
import torch
from electra_kernels import use
from finetune_runs import model  # noqa: F401
from kernel_helpers import INTERPRETED, ON_PTX_MACHINE
from safetensors.torch import load_file
from small_runs import one_thread
from torch import Tensor

from electra_core.config import EncoderConfig
from electra_core.downstream.choices import Choose
from electra_core.downstream.classify import Classify, Regress
from electra_core.downstream.interface import Task
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag
from electra_core.execution import engine
from electra_core.execution.fake_step import Recorder, loop_of
from electra_core.execution.step_runners import MOST_GRAPHS
from electra_core.finetune import finetune
from electra_core.finetuning import steps as finetune_steps
from electra_core.finetuning.folder import Run
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.finetuning.static_task import SHORTEST, Part, TaskShapes
from electra_core.finetuning.steps import Job, finetuning_steps, task_optimizer
from electra_core.initialisation import initialise
from electra_core.labelled_data.features import Features, TaskBatch, batch_order
from electra_core.optim import make_capturable
from electra_core.packing import from_lengths
from electra_core.runs.metrics_log import read_metrics
from electra_core.tasks import UNLABELLED
from electra_core.training import take_step

__all__ = ["one_thread"]  # a fixture of every test here

CPU = torch.device("cpu")
kernels = pytest.mark.skipif(not (INTERPRETED or ON_PTX_MACHINE), reason="kernels on CPU tensors")
QUICK = FinetuneSettings(
    epochs=1.2, batch_size=16, learning_rate=1e-3, layerwise_decay=0.8, log_every=1, dropout=0.1, precision="fp32"
)


def numbers(path: Path, count: int, seed: int = 0) -> Path:
    """Reviews with a number for a label."""
    header, *rows = tiny_model.reviews(path, count, seed).read_text().splitlines()
    texts = [row.split("\t")[0] for row in rows]
    path.write_text("\n".join([header, *(f"{text}\t{len(text) / 7}" for text in texts)]) + "\n")
    return path


Case = tuple[Task, Callable[..., Path], str, dict[str, Any]]
CASES: dict[str, Case] = {
    "classify": (Classify(), tiny_model.reviews, "tsv", {}),
    "class-weights": (Classify(), tiny_model.reviews, "tsv", {"class_weights": True, "optimizer": "adamw"}),
    "regress": (Regress(), numbers, "tsv", {}),
    "tag": (Tag(max_length=8), tiny_model.names_to_tag, "conll", {}),
    "qa": (Answer(max_length=64), tiny_model.questions, "json", {}),
    "choose": (Choose(), tiny_model.choices, "jsonl", {}),
    "multilabel": (MultiLabel(), tiny_model.several_labels, "jsonl", {"batch_size": 7, "accumulate": 2}),
    "parts": (Classify(), tiny_model.reviews, "tsv", {"batch_size": 7, "accumulate": 3}),
    "by-tokens": (Classify(), tiny_model.reviews, "tsv", {"tokens_per_batch": 150}),
    "frozen": (Classify(), tiny_model.reviews, "tsv", {"freeze": "1"}),
}


@pytest.mark.parametrize("name", CASES)
def test_fixed_shapes_train_as_the_eager_steps(name: str, model: Path, tmp_path: Path) -> None:
    task, make, suffix, changes = CASES[name]
    files = make(tmp_path / f"train.{suffix}", 50), make(tmp_path / f"dev.{suffix}", 20, seed=1)
    rows, weights = [], []
    for name in ("eager", "static"):
        settings = replace(QUICK, engine=name, **changes)
        finetune(model, task, *files, tmp_path / name, settings, quiet=True)
        rows.append([row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row])
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert len(rows[0]) == len(rows[1]) > 3
    for eager, static in zip(*rows, strict=True):
        assert eager["learning_rate"] == static["learning_rate"]
        assert static["loss"] == pytest.approx(eager["loss"], rel=1e-4)
        assert static["gradient_norm"] == pytest.approx(eager["gradient_norm"], rel=1e-3)
    for path, value in weights[0].items():
        torch.testing.assert_close(weights[1][path], value, rtol=1e-3, atol=1e-4, msg=path)


ENCODER = EncoderConfig(
    vocab_size=50, embedding_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
    intermediate_size=32, max_position_embeddings=32, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
)  # fmt: skip
TASKS: dict[str, Task] = {
    "classify": Classify(labels=("a", "b"), class_weights=(0.5, 1.5)),
    "regress": Regress(),
    "tag": Tag(labels=("O", "B")),
    "qa": Answer(max_length=32),
    "choose": Choose(),
    "multilabel": MultiLabel(labels=("a", "b", "c")),
}
LENGTHS = [12, 9, 14, 7]


def features_of(task: Task) -> Features:
    """Eight sequences, two batches of the same lengths in another order, and words and targets of their own."""
    draw = np.random.default_rng(0)
    made = Features(2, 3, per_token=isinstance(task, Tag))
    for index in range(8):
        length = LENGTHS[::-1][index - 4] if index >= 4 else LENGTHS[index]
        made.add_sequence(draw.integers(5, 50, length - 2).tolist())
        if isinstance(task, Choose) and index % 2 == 0:
            continue  # two endings make a unit
        targets = {
            Classify: int(draw.integers(2)),
            Regress: float(draw.normal()),
            Tag: draw.choice([0, 1, UNLABELLED], length).astype(np.int64),
            Answer: sorted(draw.integers(0, length, 2).tolist()),
            Choose: int(draw.integers(2)),
            MultiLabel: draw.integers(0, 2, 3).astype(np.uint8),
        }
        made.end_unit(index, targets[type(task)])
    return made


def job_of(task: Task, **settings: Any) -> tuple[Job, Any]:
    """A job whose every step has one shape, and its model."""
    data: Any = type("Data", (), {"train": features_of(task)})
    made = task.model_class(ENCODER, task.labels)
    initialise(made, 0.1, seed=0)
    chosen = replace(QUICK, **settings).resolved(ENCODER)
    return Job(task, Path(), chosen, data, CPU, torch.float32), made


def plan_of(job: Job, steps: int = 3) -> list[list[np.ndarray]]:
    half = len(job.data.train) // 2
    return [[np.arange(half) + half * (step % 2)] for step in range(steps)]


@kernels
@pytest.mark.parametrize("name", TASKS)
def test_a_replayed_step_keeps_nothing_of_the_one_captured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as without graphs: words, targets, shares, seed and rate are the step's own."""
    results, weights = [], []
    pretend_graphs.on_a_cpu(monkeypatch)
    monkeypatch.setattr(finetune_steps, "graph_problem", lambda *_: None)
    monkeypatch.setattr(engine, "graph_problem", lambda *_: None)
    for chosen in ("static", "auto"):
        job, made = job_of(TASKS[name], engine=chosen)
        with use("triton"):
            steps = finetuning_steps(job, made, task_optimizer(made, job.settings), plan_of(job), Run(0))
            results.append([(float(step.loss), float(step.gradient_norm)) for step in steps])
        weights.append(made.state_dict())
    (graph,) = pretend_graphs.Graph.made  # the largest shape is the only one
    assert graph.replays == 1 + 3
    assert results[0] == results[1] and len({loss for loss, _ in results[0]}) == 3
    for path, value in weights[0].items():
        assert torch.equal(weights[1][path], value), path


def equally_long(path: Path, count: int, seed: int = 0) -> Path:
    """Reviews of five words, so that the twins, which look at lengths, may be replayed, too."""
    header, *rows = tiny_model.reviews(path, count, seed).read_text().splitlines()
    texts = [("a film " + row.split("\t")[0] + " was and the").split()[-5:] for row in rows]
    labels = [row.split("\t")[1] for row in rows]
    lines = [f"{' '.join(words)}\t{label}" for words, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_a_whole_finetuning_in_graphs(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds, two shapes, evaluations and checkpoints between steps: the bits of the steps as they are."""
    files = equally_long(tmp_path / "train.tsv", 20), equally_long(tmp_path / "dev.tsv", 8, seed=1)
    pretend_graphs.on_a_cpu(monkeypatch)
    monkeypatch.setattr(finetune_steps, "graph_problem", lambda *_: None)
    settings = replace(QUICK, epochs=3.0, batch_size=8, seeds=2, checkpoint_every=2)
    for chosen in ("static", "auto"):
        finetune(model, Classify(), *files, tmp_path / chosen, replace(settings, engine=chosen), quiet=True)
    assert [graph.replays > 1 for graph in pretend_graphs.Graph.made] == [True] * 4  # of two shapes, for two seeds
    for seed in ("seed-0", "seed-1"):
        rows = [
            [
                (row.get("loss"), row.get("dev_accuracy"))
                for row in read_metrics(tmp_path / chosen / seed / "metrics.jsonl")
            ]
            for chosen in ("static", "auto")
        ]
        assert rows[0] == rows[1] and len(rows[0]) == 9 + 3
    weights = [load_file(tmp_path / chosen / "model.safetensors") for chosen in ("static", "auto")]
    assert all(torch.equal(value, weights[1][path]) for path, value in weights[0].items())


@kernels
@pytest.mark.parametrize("name", TASKS)
def test_nothing_in_a_static_step_waits_for_the_device_or_the_host(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_graphs.without_checks(monkeypatch)
    job, made = job_of(TASKS[name])
    optimizer, part = task_optimizer(made, job.settings), Part(job.data.train.batch(plan_of(job)[0][0]), 1.0, 0)
    make_capturable(optimizer, CPU)
    shapes = TaskShapes(per_token=job.data.train.per_token, positions=32, largest=lambda: [part])
    inputs = shapes.in_vain([part], pinned=False)

    def loss(part: Part, _: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits = made(part.batch.tokens, part.key)
        return job.task.loss(logits if made.per_token else logits[:-1], part.batch) * part.share, {}

    loop = replace(loop_of(made, optimizer, clip_norm=1.0, precision=torch.float32), loss_function=loss)
    with use("triton"):
        # The first makes the optimizer's state, and brings what stays the same.
        take_step(loop, inputs.parts, inputs.seed, inputs.rate)
        with Recorder() as recorder:
            take_step(loop, inputs.parts, inputs.seed, inputs.rate)
    assert recorder.waits == []


def test_shapes_are_few_and_hold_every_batch() -> None:
    """Lengths and number as SST-2's: three epochs have a few dozen shapes."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(2.6, 0.6, 67_349).astype(int), 3, 128)
    shapes, seen = TaskShapes(per_token=False, positions=512, largest=lambda: []), set()
    filled = own = 0
    for epoch in range(3):
        for units in batch_order(lengths, batch_size=32, seed=0, epoch=epoch):
            ids_T = torch.ones(int(lengths[units].sum()), dtype=torch.int64)
            text = from_lengths(ids_T, ids_T * 0, lengths[units])
            shape = shapes.fit(TaskBatch(text, torch.zeros(len(units)), torch.arange(len(units) + 1)))
            assert 1 <= shape.tokens - len(ids_T) <= shape.max_seqlen and text.max_seqlen <= shape.max_seqlen
            assert shape.max_seqlen < 2 * max(text.max_seqlen, SHORTEST)
            filled, own = filled + shape.tokens, own + len(ids_T)
            seen.add(shape)
    assert len(seen) <= MOST_GRAPHS and filled / own < 1.05


def test_what_does_not_fit_is_refused() -> None:
    job, _ = job_of(TASKS["classify"])
    shapes = TaskShapes(per_token=False, positions=32, largest=lambda: [])
    first, second = (job.data.train.batch(units) for units in ([0, 1, 2], [0, 1, 2, 3]))
    inputs = shapes.inputs([Part(first, 1.0, 0)], pinned=False)
    with pytest.raises(ValueError, match="do not fit"):
        inputs.fill([Part(second, 1.0, 0)], 0, 0.0)
