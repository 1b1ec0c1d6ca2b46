"""What the settings of a fine-tuning mean for its start and its steps: rates, clipping, dropout, freezing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_runs import QUICK, data, model  # noqa: F401 (fixtures)

from electra_core.config import PRESETS
from electra_core.downstream.classify import Classify
from electra_core.electra import Discriminator
from electra_core.execution.distributed import Ranks
from electra_core.finetuning.data import encode_data, plan_batches, read_data
from electra_core.finetuning.folder import Run
from electra_core.finetuning.model import starting_model
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.finetuning.steps import Job, _full_step, _parts, finetuning_steps, task_optimizer
from electra_core.labelled_data.labelled import TextExample
from electra_core.model_dir import load as load_model
from electra_core.model_dir import save_pretrained
from electra_core.tasks import SequenceClassifier, TaskModel
from electra_core.tokenizer import load_tokenizer
from electra_core.training import StepResult


def job_of(model: Path, data: tuple[Path, Path], **changes: Any) -> tuple[Job, list[list[np.ndarray]]]:
    """One epoch over 160 examples, 16 at a time."""
    settings = replace(QUICK, epochs=1, precision="fp32", **changes)
    task, examples, dev, _ = read_data(Classify(), *data, settings, lambda line: None)
    encoded = encode_data(task, examples, dev, load_tokenizer(model), True, lambda line: None)
    job = Job(task, model, settings, encoded, torch.device("cpu"), torch.float32)
    return job, plan_batches(encoded.train, settings, seed=0)


def taken(job: Job, plan: list[list[np.ndarray]], steps: int) -> tuple[list[StepResult], torch.optim.Optimizer]:
    """The first steps of a new run, and the optimizer after them."""
    made: TaskModel = load_model(SequenceClassifier, job.directory, labels=job.task.labels)
    optimizer = task_optimizer(made, job.settings)
    results = finetuning_steps(job, made, optimizer, plan, Run(0))
    return [next(results) for _ in range(steps)], optimizer


def test_what_is_cut_of_the_dev_data_is_counted_too(model) -> None:
    short, long = (TextExample("1", 1, "the film was fine " * times, None, "a") for times in (1, 9))
    lines: list[str] = []
    task = Classify(labels=("a", "b"), max_length=8)
    encode_data(task, [short, short, long], [long, long, short, short], load_tokenizer(model), True, lines.append)
    assert lines == ["3 of 7 examples are longer than 8 tokens and were truncated"]


def test_rates_warm_up_over_the_nearest_number_of_steps(model, data) -> None:
    """A quarter and a bit of ten steps: three, from 0 to the peak; then down to 0 after the tenth."""
    job, plan = job_of(model, data, warmup=0.26, learning_rate=0.021)
    rates = [result.learning_rate for result in taken(job, plan, 10)[0]]
    assert rates == pytest.approx([0.0, 0.007, 0.014, *(0.003 * left for left in range(7, 0, -1))])


@pytest.mark.parametrize("most", [1e-3, 1e-2])
def test_gradients_are_clipped_to_the_norm_of_the_settings(model, data, most: float) -> None:
    """What reaches Adam: a tenth of it is its first mean of gradients."""
    (result,), optimizer = taken(*job_of(model, data, clip_norm=most), 1)
    assert result.gradient_norm > 2 * most
    means = [state["exp_avg"].flatten() for state in optimizer.state.values()]
    assert 10 * torch.cat(means).norm().item() == pytest.approx(most, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_every_part_of_a_step_has_dropout_of_its_own(model, data, size: int) -> None:
    job, plan = job_of(model, data, accumulate=3)
    seeds = []
    for rank in range(size):
        of_rank = replace(job, ranks=Ranks(rank, size))
        parts = [part for step in (0, 1) for part in _parts(of_rank, plan, _full_step(job.settings, plan), step)]
        seeds += [part.seed(step) for step, part in zip((0, 0, 0, 1, 1, 1), parts, strict=True)]
    assert len(set(seeds)) == 2 * 3 * size


def test_order_and_dropout_are_the_seed_s(model, data) -> None:
    job, plan = job_of(model, data, dropout=0.5)
    assert [len(units) for units in plan[0]] == [16]
    first = [plan_batches(job.data.train, job.settings, seed)[0][0].tolist() for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]
    made = starting_model(job.task, job.directory, job.settings, seed=0)
    losses = []
    for seed in (0, 0, 1):
        steps = finetuning_steps(job, made, torch.optim.SGD(made.parameters(), lr=0.0), plan, Run(seed))
        losses.append(float(next(steps).loss))
    assert losses[0] == losses[1] != losses[2]


def test_the_model_drops_by_the_seed_of_the_part(model, data, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[Any] = []
    whole = SequenceClassifier.forward

    def spied(self: SequenceClassifier, batch: Any, seed: Any = None) -> Any:
        seeds.append(seed)
        return whole(self, batch, seed)

    monkeypatch.setattr(SequenceClassifier, "forward", spied)
    taken(*job_of(model, data, accumulate=2), 3)
    assert len(set(seeds)) == len(seeds) == 3 * 2


@pytest.mark.parametrize(
    ("what", "frozen"),
    [
        ("none", ()),
        ("embeddings", ("encoder.embeddings",)),
        ("0", ("encoder.embeddings",)),
        ("1", ("encoder.embeddings", "encoder.layers.0.")),
        ("encoder", ("encoder.",)),
    ],
)
def test_what_is_frozen(what, frozen, tmp_path):
    config = replace(PRESETS["small"].discriminator, vocab_size=100, num_hidden_layers=2)
    save_pretrained(Discriminator(config), tmp_path)
    made = starting_model(Classify(labels=("a", "b")), tmp_path, replace(QUICK, freeze=what), seed=0)
    names = {name for name, _ in made.named_parameters()}
    assert "encoder.embeddings_project.weight" in names
    fixed = {name for name, parameter in made.named_parameters() if not parameter.requires_grad}
    assert fixed == {name for name in names if name.startswith(frozen)} if frozen else not fixed


@pytest.mark.parametrize(
    ("width", "rate", "decay"), [(256, 3e-4, 0.8), (320, 1e-4, 0.8), (768, 1e-4, 0.8), (1024, 5e-5, 0.9)]
)
def test_rate_and_decay_are_the_recipe_s_for_the_width(width, rate, decay):
    config = replace(PRESETS["small"].discriminator, hidden_size=width, max_position_embeddings=64)
    settings = FinetuneSettings(max_length=100).resolved(config)
    assert (settings.learning_rate, settings.layerwise_decay, settings.max_length) == (rate, decay, 64)
    given = FinetuneSettings(learning_rate=1e-5, layerwise_decay=0.5).resolved(config)
    assert (given.learning_rate, given.layerwise_decay, given.max_length) == (1e-5, 0.5, 0)


def test_a_random_start_is_the_seed_s_and_the_original_s(model):
    settings = replace(QUICK, random_start=True)
    made = [starting_model(Classify(labels=("a", "b")), model, settings, seed) for seed in (0, 0, 1)]
    for name, first in made[0].named_parameters():
        same, other = (dict(one.named_parameters())[name] for one in made[1:])
        assert torch.equal(first, same) and (first.dim() < 2 or not torch.equal(first, other)), name
    assert 0.017 < made[0].encoder.layers[0].intermediate.weight.std() < 0.019, "0.02, cut off at two deviations"
    head = made[0].classifier.dense.weight
    assert head.std().item() == pytest.approx((2 / sum(head.shape)) ** 0.5, rel=0.1)
