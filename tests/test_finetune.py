"""Fine-tuning: every task is learned, the best checkpoint is what stays, the same seed gives the same model."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from finetune_runs import QUICK, at_step, data, model, run, weights  # noqa: F401
from reading import write_lines

from benchmarks.gpu_summary import FALLBACKS
from electra_core import model_dir
from electra_core.adam import ElectraAdam
from electra_core.config import PRESETS
from electra_core.downstream.choices import Choose
from electra_core.downstream.classify import Classify, Regress
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag
from electra_core.errors import UserError
from electra_core.finetuning import seed as finetune_seed
from electra_core.finetuning.model import starting_model
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.finetuning.steps import evaluation_steps, task_optimizer
from electra_core.hub.weight_files import weights_digest
from electra_core.labelled_data.labelled import BadRows, TextExample
from electra_core.optim import parameter_groups
from electra_core.predict import evaluate, load
from electra_core.runs.metrics_log import read_metrics
from electra_core.tasks import SequenceClassifier

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Settings with which any seed learns: roundings that differ by processor are as good as another seed.
TASKS = {
    "multilabel": (MultiLabel(), tiny_model.several_labels, replace(QUICK, epochs=16, learning_rate=1e-3), 0.95),
    "classify": (Classify(), tiny_model.reviews, replace(QUICK, epochs=8, learning_rate=1e-3), 0.95),
    "tag": (Tag(), tiny_model.names_to_tag, replace(QUICK, epochs=10), 0.9),
    "qa": (Answer(max_length=64), tiny_model.questions, replace(QUICK, epochs=16), 80.0),
    "choose": (Choose(), tiny_model.choices, replace(QUICK, epochs=6), 0.95),
}
SUFFIXES = {"multilabel": "jsonl", "classify": "tsv", "tag": "conll", "qa": "json", "choose": "jsonl"}


def files_of(name, folder):
    """(training, dev) data of one of TASKS; skips where its metric is not installed."""
    if name == "tag":
        pytest.importorskip("seqeval")
    make = TASKS[name][1]
    return make(folder / f"train.{SUFFIXES[name]}", 160), make(folder / f"dev.{SUFFIXES[name]}", 40, seed=1)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_learned_and_its_directory_predicts_the_same(name, model, tmp_path):
    task, _, settings, enough = TASKS[name]
    files = files_of(name, tmp_path)
    report = run(model, files, tmp_path / "out", task, settings)
    assert report["best"][report["metric"]] >= enough
    again = evaluate(load(tmp_path / "out"), files[1])
    assert again.metrics == pytest.approx({k: v for k, v in report["best"].items() if k not in ("seed", "step")})


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("random_start", [False, True])
def test_what_a_caller_has_set_in_torch_changes_nothing(model, data, tmp_path, random_start, precision):
    """In an earlier cell of the notebook, perhaps."""
    settings = replace(QUICK, epochs=1, dropout=0.1, random_start=random_start, precision=precision)
    run(model, data, tmp_path / "plain", settings=settings)
    for name, state in (
        ("no_grad", torch.no_grad()),
        ("inference", torch.inference_mode()),
        ("float64", default_dtype(torch.float64)),
        ("autocast", torch.autocast("cpu", dtype=torch.bfloat16)),
        ("another default device", torch.device("meta")),  # as torch.set_default_device
    ):
        with state:
            run(model, data, tmp_path / name, settings=settings)
            figures = evaluate(load(tmp_path / name), data[1]).metrics
            assert torch.get_default_dtype() == (torch.float64 if name == "float64" else torch.float32)
        assert figures == evaluate(load(tmp_path / "plain"), data[1]).metrics
        ours, theirs = weights(tmp_path / name), weights(tmp_path / "plain")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_number_is_learned(model, data, tmp_path):
    files = []
    for file in data:  # 4 for good, 1 for bad
        text = file.read_text().replace("\tpos", "\t4.0").replace("\tneg", "\t1.0")
        files.append(tmp_path / file.name)
        files[-1].write_text(text)
    report = run(model, files, tmp_path / "out", Regress())
    assert report["best"]["pearson"] > 0.9 and report["best"]["mse"] < 0.5  # in the file's units, not the scaled
    assert load(tmp_path / "out")("the film is great")["value"] == pytest.approx(4, abs=1)


def test_unanswerable_questions_and_their_threshold(model, tmp_path):
    files = [
        tiny_model.questions(tmp_path / f"{name}.json", count, seed, unanswerable=True)
        for name, count, seed in (("train", 160, 0), ("dev", 40, 1))
    ]
    report = run(model, files, tmp_path / "out", Answer(max_length=64), replace(QUICK, epochs=12))
    assert report["best"]["f1"] > 75  # half are unanswerable
    assert report["best"]["f1"] == pytest.approx(report["best"]["best_f1"])  # the tuned threshold is in use
    assert (
        report["best"]["best_exact"] >= report["best"]["exact_match"] and "best_exact_threshold" in report["best"]
    )
    fields = json.loads((tmp_path / "out/task.json").read_text())
    assert fields["unanswerable"] and fields["null_threshold"] == report["best"]["best_f1_threshold"]


def test_what_is_saved_opens_in_transformers(model, data, tmp_path):
    transformers = pytest.importorskip("transformers")
    run(model, data, tmp_path / "out", settings=replace(QUICK, epochs=1))
    hub = transformers.pipeline("text-classification", model=str(tmp_path / "out"), top_k=None)
    text = "the film was great"
    theirs = {row["label"]: row["score"] for row in hub([text])[0]}
    ours = load(tmp_path / "out", precision="fp32")
    assert ours(text)["scores"] == pytest.approx(theirs, abs=1e-5)
    assert set(theirs) == {"pos", "neg"}


def test_the_same_seed_gives_the_same_model(model, data, tmp_path):
    settings = replace(QUICK, epochs=1, dropout=0.1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(model, data, tmp_path / name, settings=replace(settings, seed=seed))
    first, same, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["classifier.out_proj.weight"], other["classifier.out_proj.weight"])


def test_every_seed_trains_as_it_would_alone(model, data, tmp_path):
    settings = replace(QUICK, epochs=0.3, dropout=0.1, log_every=1)
    run(model, data, tmp_path / "two", settings=replace(settings, seed=5, seeds=2))
    run(model, data, tmp_path / "one", settings=replace(settings, seed=6))
    first, second, alone = (
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("two/seed-5", "two/seed-6", "one")
    )
    assert second == alone and len(alone) == 3
    assert not {*first} & {*second}


def test_training_drops(model, data, tmp_path):
    losses = []
    for dropout in (0.0, 0.5):
        out = tmp_path / str(dropout)
        run(model, data, out, settings=replace(QUICK, epochs=0.1, dropout=dropout))
        losses.append(read_metrics(out / "metrics.jsonl")[0]["loss"])  # of one batch, before anything is learned
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.5, -1.0], ids=["none", "half", "as the model"])
def test_training_drops_as_much_as_the_settings_say(dropout, tmp_path):
    model = tiny_model.make_model(tmp_path, dropout=0.2)
    encoder = starting_model(Classify(labels=("a", "b")), model, replace(QUICK, dropout=dropout), seed=0).encoder
    expected = 0.2 if dropout < 0 else dropout
    assert encoder.config.hidden_dropout_prob == encoder.config.attention_probs_dropout_prob == expected


@pytest.mark.parametrize(
    ("steps", "epochs", "evaluations", "expected"),
    [(10, 2, 2, {2, 5, 8, 10}), (10, 0.2, 1, {10}), (3, 10, 1, {1, 2, 3})],
)
def test_evaluations_are_evenly_spaced_and_the_last_step_s_among_them(steps, epochs, evaluations, expected):
    settings = replace(QUICK, epochs=epochs, evaluations=evaluations)
    assert evaluation_steps(steps, settings) == expected


def test_the_best_of_all_evaluations_and_seeds_is_kept(model, data, tmp_path):
    settings = replace(QUICK, epochs=2, evaluations=2, seeds=2, seed=5, learning_rate=1e-3)
    lines = []
    report = run(model, data, tmp_path / "out", settings=settings, say=lines.append)
    assert lines[-2].startswith(f"accuracy over 2 seeds: median {report['over_seeds']['median']:.4g}, mean ")
    assert lines[-1].startswith("at the last step instead of the best: median ")
    logs = {seed: read_metrics(tmp_path / f"out/seed-{seed}/metrics.jsonl") for seed in (5, 6)}
    figures = {seed: [row["dev_accuracy"] for row in rows if "dev_accuracy" in row] for seed, rows in logs.items()}
    assert [len(values) for values in figures.values()] == [4, 4]
    assert report["best"]["accuracy"] == max(max(values) for values in figures.values())
    assert evaluate(load(tmp_path / "out"), data[1]).metrics["accuracy"] == report["best"]["accuracy"]
    bests = [max(values) for values in figures.values()]
    assert report["over_seeds"]["mean"] == pytest.approx(np.mean(bests))
    assert report["over_seeds"]["max"] == report["best"]["accuracy"]
    assert [run["last"]["accuracy"] for run in report["seeds"]] == [values[-1] for values in figures.values()]
    assert report["last_over_seeds"]["mean"] == pytest.approx(np.mean([values[-1] for values in figures.values()]))
    assert [run["seed"] for run in report["seeds"]] == [5, 6]


def test_bf16_learns_too(model, data, tmp_path):
    report = run(model, data, tmp_path / "out", settings=replace(QUICK, precision="bf16"))
    assert report["best"]["accuracy"] >= 0.95
    assert weights(tmp_path / "out")["classifier.out_proj.weight"].dtype == torch.float32


def test_a_full_disk_is_the_users_to_mend(model, data, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_dir, "save_pretrained", full)
    with pytest.raises(UserError, match=r"out: cannot be written \(No space left on device\)"):
        run(model, data, tmp_path / "out", settings=replace(QUICK, epochs=1))


def test_early_stopping(model, data, tmp_path):
    settings = replace(QUICK, epochs=5, learning_rate=1e-12, patience=2)
    report = run(model, data, tmp_path / "out", settings=settings)
    assert report["seeds"][0]["steps"] == 30  # three epochs of ten: the first, and two without gain


def test_of_equal_figures_the_last_model_of_the_first_seed_is_kept(model, data, tmp_path, monkeypatch):
    def with_figures(name, figures, **changes):
        given = iter(figures)
        monkeypatch.setattr(finetune_seed, "_judged", lambda job, _: (job.task, {job.task.metric: next(given)}))
        report = run(model, data, tmp_path / name, settings=replace(QUICK, epochs=2, **changes))
        return report["best"], [seed["best_step"] for seed in report["seeds"]], weights(tmp_path / name)

    best, steps, kept = with_figures("equal", [0.5] * 4, seeds=2)
    assert (best["seed"], best["step"], steps) == (QUICK.seed, 20, [20, 20])
    *_, last = with_figures("rising", [0.5, 0.6])
    *_, first = with_figures("falling", [0.5, 0.4])
    differences = [max((kept[name] - other[name]).abs().max() for name in kept) for other in (last, first)]
    assert differences[0] == 0 < differences[1]


def mostly_good(path: Path, count: int, seed: int = 0) -> Path:
    """Reviews of which an eighth is bad, so that a part may hold none of them."""
    header, *rows = tiny_model.reviews(path, 8 * count, seed).read_text().splitlines()
    bad, good = ([row for row in rows if row.endswith(label)] for label in ("neg", "pos"))
    path.write_text("\n".join([header, *bad[: count // 8], *good[: count - count // 8]]) + "\n")
    return path


@pytest.mark.parametrize(
    "task, make, name",
    [
        (Classify(), tiny_model.reviews, "train.tsv"),  # a mean over sequences
        (Classify(), mostly_good, "weighted.tsv"),  # over the weights of their classes
        (Tag(max_length=8), tiny_model.names_to_tag, "train.conll"),  # over words, some twice in windows
        (Answer(max_length=64), tiny_model.questions, "train.json"),
        (Choose(), tiny_model.choices, "train.jsonl"),
        (MultiLabel(), tiny_model.several_labels, "train.jsonl"),
    ],
    ids=["classify", "class-weights", "tag", "qa", "choose", "multilabel"],
)
def test_accumulated_batches_give_the_step_of_the_whole(task, make, name, model, tmp_path, monkeypatch):
    def descent(model, settings):  # moves by the gradient itself; Adam's first step is little more than its sign
        return torch.optim.SGD(parameter_groups(model, learning_rate=1.0, weight_decay=0.0), lr=1.0, fused=True)

    monkeypatch.setattr(finetune_seed, "task_optimizer", descent)
    files = [make(tmp_path / name, 16)] * 2
    for out, size, parts in (("whole", 99, 1), ("parts", 6, 99)):  # parts of 6, 6 and 4 of 16 units
        settings = replace(
            QUICK, epochs=1, batch_size=size, accumulate=parts, learning_rate=1.0, warmup=0.0, dropout=0.0,
            precision="fp32", class_weights=make is mostly_good,
        )  # fmt: skip
        run(model, files, tmp_path / out, task, settings)
    rows = [
        [row for row in read_metrics(tmp_path / out / "metrics.jsonl") if "loss" in row]
        for out in ("whole", "parts")
    ]
    assert [len(steps) for steps in rows] == [1, 1]
    for figure in ("loss", "gradient_norm"):
        assert rows[1][0][figure] == pytest.approx(rows[0][0][figure], rel=1e-5)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    start = weights(model)
    moved = (whole["electra.embeddings.LayerNorm.bias"] - start["electra.embeddings.LayerNorm.bias"]).abs().max()
    assert moved > 1e-3
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=2e-6, rtol=0, msg=name)


def test_a_step_without_a_word_to_judge_teaches_nothing(model, tmp_path):
    """Windows inside a long word hold no first sub-token; with one sequence a step, some have nothing else."""
    file = tmp_path / "train.conll"
    file.write_text(f"{'bcd' * 20} I-PER\n\nthe O\n\n")
    settings = replace(QUICK, epochs=1, batch_size=1)
    run(model, (file, file), tmp_path / "out", Tag(max_length=16), settings)
    losses = [row["loss"] for row in read_metrics(tmp_path / "out/metrics.jsonl") if "loss" in row]
    assert len(losses) > 4 and sum(loss > 0 for loss in losses) == 2 and min(losses) == 0


@pytest.mark.parametrize(("name", "kind"), [("electra-adam", ElectraAdam), ("adamw", torch.optim.AdamW)])
def test_the_optimizer_is_the_one_of_the_settings(name, kind):
    model = SequenceClassifier(PRESETS["tiny"].discriminator)
    optimizer = task_optimizer(model, replace(QUICK, optimizer=name, weight_decay=0.25))
    assert type(optimizer) is kind
    decays = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {1: 0.0, 2: 0.25}


def test_freezing_and_random_starts(model, data, tmp_path):
    settings = replace(QUICK, epochs=1)
    start = weights(model)
    run(model, data, tmp_path / "frozen", settings=replace(settings, freeze="encoder"))
    frozen = weights(tmp_path / "frozen")
    assert all(torch.equal(start[name], frozen[name]) for name in start if name.startswith("electra."))
    run(model, data, tmp_path / "lowest", settings=replace(settings, freeze="1"))
    lowest = weights(tmp_path / "lowest")
    changed = {name.split(".layer.")[-1][0] for name in start if name in lowest and ".layer." in name
               and not torch.equal(start[name], lowest[name])}  # fmt: skip
    assert changed == {"1"}
    run(model, data, tmp_path / "random", settings=replace(settings, random_start=True, learning_rate=1e-12))
    random = weights(tmp_path / "random")
    word = "electra.embeddings.word_embeddings.weight"
    assert (random[word] - start[word]).abs().max() > 0.01
    with pytest.raises(UserError, match="freeze: the model has 2 layers, got 3"):
        run(model, data, tmp_path / "x", settings=replace(settings, freeze="3"))


@pytest.mark.parametrize(
    "labels, message",
    [
        (["0.1"] * 3, "every training example has the label 0.1"),  # whose deviation is 1.4e-17
        (["1e308", "-1e308", "1"], r"the labels are too large to learn from \(up to 1e\+308\)"),
    ],
)
def test_numbers_that_nothing_can_be_learned_from(labels, message, recwarn):
    with pytest.raises(UserError, match=message):
        Regress().fitted([TextExample("1", 1, "text", None, label) for label in labels])
    assert not recwarn.list


@pytest.mark.parametrize("task", [Classify(), Regress(), Regress(scale=2.0), Classify(labels=("0", "1"))])
def test_single_texts_and_pairs_are_not_mixed_up(task, tmp_path):
    singles = write_lines(tmp_path / "singles.csv", "text,label", "a,0", "b,1")
    pairs = write_lines(tmp_path / "pairs.csv", "text1,text2,label", "a,b,0", "b,a,1")
    for own, other, message in ((singles, pairs, "a pair of texts"), (pairs, singles, "a single text")):
        assert len(list(task.read(other, BadRows(other)))) == 2  # before training, both are fine
        fitted = task.fitted(list(task.read(own, BadRows(own))))
        for labelled in (True, False):
            assert len(list(fitted.read(own, BadRows(own), labelled=labelled))) == 2
            with pytest.raises(UserError, match=rf"{other.name}:2: {message} instead of a"):
                list(fitted.read(other, BadRows(other), labelled=labelled))


def test_class_weights_are_inverse_to_frequency():
    task = Classify(labels=("a", "b"))
    examples = [TextExample("1", 1, "text", None, label) for label in "aaab"]
    weights = task.balanced(examples).class_weights
    assert weights == pytest.approx((4 / 6, 2.0))
    assert np.mean([weights["ab".index(label)] for label in "aaab"]) == pytest.approx(1)


def test_without_dev_data_a_tenth_is_held_out(model, data, tmp_path):
    report = run(model, (data[0], None), tmp_path / "out", settings=replace(QUICK, epochs=1))
    assert (report["train_examples"], report["dev_examples"]) == (144, 16)


def test_a_label_is_no_markup_in_the_model_card(model, tmp_path):
    rows = [{"text": f"a {'fine' if i % 2 else 'dull'} film", "label": ("neg", "pos\n---\n# <evil>")[i % 2]}
            for i in range(40)]  # fmt: skip
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    run(model, (file, file), tmp_path / "out", settings=replace(QUICK, epochs=1))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name:")
    lines = card.split("---\n", 2)[2].splitlines()
    assert [line for line in lines if line.startswith(("#", "-"))] == ["# classify"]
    assert r"f1 (pos --- # \<evil\>)" in lines[-1]


def test_the_model_card_says_where_the_model_comes_from(model, data, tmp_path):
    run(model, data, tmp_path / "out", settings=replace(QUICK, epochs=1))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"from `{Path(model).name}` (weights `{weights_digest(model)[:16]}`) on 160 examples" in card
    assert str(tmp_path) not in card and "chose the best evaluation by accuracy" in card
    run(model, data, tmp_path / "random", settings=replace(QUICK, epochs=1, random_start=True))
    assert "from random weights, in the sizes of" in (tmp_path / "random" / "README.md").read_text()


def test_the_folder_holds_settings_and_log(model, data, tmp_path):
    settings = replace(QUICK, epochs=1)
    run(model, data, tmp_path / "out", settings=settings)
    saved = tomllib.loads((tmp_path / "out/config.toml").read_text())
    assert FinetuneSettings(**saved) == settings
    rows = read_metrics(tmp_path / "out/metrics.jsonl")
    rates = [row["learning_rate"] for row in rows if "loss" in row]
    assert len(rates) == 10 and rates[0] == 0 and max(rates) == rates[1] == settings.learning_rate
    assert {"best", "over_seeds", "seeds", "settings"} <= json.loads(
        (tmp_path / "out/metrics.json").read_text()
    ).keys()


def test_an_interrupt_leaves_the_best_so_far(model, data, tmp_path, monkeypatch):
    at_step(monkeypatch, 12, lambda: os.kill(os.getpid(), signal.SIGINT))
    told = r"stopped by SIGINT; \S+out holds the best model so far; resume=True continues"
    with pytest.raises(KeyboardInterrupt, match=told):  # so that a sweep ends here
        run(model, data, tmp_path / "out", settings=replace(QUICK, seeds=3))
    report = json.loads((tmp_path / "out/metrics.json").read_text())
    assert report["stopped_by"] == "SIGINT" and len(report["seeds"]) == 1 and report["seeds"][0]["steps"] == 12
    assert evaluate(load(tmp_path / "out"), data[1]).metrics["accuracy"] == report["best"]["accuracy"]


def test_an_interrupt_after_the_last_step_is_one_too(model, data, tmp_path):
    settings, asked = replace(QUICK, epochs=1), []

    def interrupt(figures):
        asked.append(figures["step"])
        os.kill(os.getpid(), signal.SIGINT)

    told = r"^it came too late to stop this run, which is finished; \S+out holds the best model$"
    with pytest.raises(KeyboardInterrupt, match=told):
        run(model, data, tmp_path / "out", settings=settings, on_evaluation=interrupt)
    report = run(model, data, tmp_path / "out", settings=settings, resume=True, on_evaluation=interrupt)
    assert report["stopped_by"] is None and len(asked) == 1, "it was finished"


def test_without_seqeval_only_tags_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "seqeval", None)  # as where it is not installed
    left_out = []
    for name in TASKS:
        try:
            files_of(name, tmp_path)
        except pytest.skip.Exception:
            left_out.append(name)
    assert left_out == ["tag"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_a_gpu_learns_the_same_tasks(name, model, tmp_path, caplog):
    task, _, settings, enough = TASKS[name]
    files = files_of(name, tmp_path)
    report = run(model, files, tmp_path / "out", task, settings, device="cuda")
    assert not any(words in caplog.text for words in FALLBACKS), caplog.text
    assert report["best"][report["metric"]] >= enough
    on_gpu = evaluate(load(tmp_path / "out", device="cuda", precision="fp32"), files[1])
    on_cpu = evaluate(load(tmp_path / "out", device="cpu", precision="fp32"), files[1])
    assert on_gpu.metrics == pytest.approx(on_cpu.metrics, abs=0.02 * max(1.0, enough))
