"""The demo: the whole story on a small made-up corpus, and every judgement it passes."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from electra_core import cli, config, demo
from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.corpora.docstrings import Document, Example, LabelledTask
from electra_core.corpus import Corpus
from electra_core.demo import Clock, Start, run_demo
from electra_core.electra import Electra
from electra_core.errors import UserError
from electra_core.model_dir import load_config, save_pretrained, shipped_model
from electra_core.reports.demo_report import (
    counting_accuracy,
    guessing_accuracy,
    judge_comparison,
    judge_pretraining,
    pretraining_charts,
    unigram_loss,
)
from electra_core.reports.passages import generated_passage
from electra_core.reports.plots import Dots
from electra_core.tokenizer import Tokenizer, load_tokenizer
from electra_core.trace import trace

AREAS = {"arrays": "array element axis dtype shape", "internet": "socket server request header host"}
_LETTERS = random.Random(1)
COMMON = ["".join(_LETTERS.choices("abdefgilmnoprstuv", k=_LETTERS.randint(2, 7))) for _ in range(80)]


def made_up_documents() -> list[Document]:
    """600 documents of two areas, each with words of its own; some of no area."""
    draw = random.Random(0)
    documents = []
    for number in range(600):
        area = ["arrays", "internet", ""][number % 3]
        words = COMMON + 3 * AREAS.get(area, "").split()
        lines = [" ".join(draw.choices(words, k=12)).capitalize() + "." for _ in range(draw.randint(1, 4))]
        documents.append(Document("\n".join(lines), f"pack.{area or 'other'}.m{number % 60}", area, f"f{number}"))
    return documents


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo with a made-up corpus, minute models and few steps."""
    encoder = EncoderConfig(
        num_hidden_layers=1, hidden_size=32, embedding_size=32, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    pretrain = PretrainConfig(
        model="tiny", batch_size=8, max_length=48, learning_rate=1e-3, generator_hidden_size=16,
        generator_attention_heads=1, generator_intermediate_size=32, generator_layers=1,
    )  # fmt: skip
    monkeypatch.setitem(config.PRESETS, "tiny", config.Preset(encoder, pretrain))
    monkeypatch.setattr(demo, "documents", lambda: iter(made_up_documents()))
    monkeypatch.setattr(demo, "VOCABULARY", 120)
    monkeypatch.setattr(demo, "HELDOUT_FRACTION", 0.1)
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "MOST_SEEDS", 2)
    monkeypatch.setattr(demo, "PATIENCE", 100.0)  # a run that is stopped may have no evaluation to plot
    shipped = Electra(replace(encoder, vocab_size=load_tokenizer("tiny").vocab_size), pretrain)
    for kind in ("discriminator", "generator"):
        save_pretrained(getattr(shipped, kind), tmp_path / "tiny" / kind, tokenizer=load_tokenizer("tiny"))
    monkeypatch.setattr(demo, "shipped_model", lambda: tmp_path / "tiny")


def test_of_the_short_run_that_measures_the_speed_nothing_is_said(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo._prepare(_with_corpus(tmp_path), 0, quiet=True)
    assert demo._steps_per_second(tmp_path, "cpu", 0) > 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(("rate", "threads", "told"), [(1.0, 2, True), (1.0, 1, False), (9.0, 2, False)])
def test_a_machine_on_which_threads_wait_for_each_other(
    rate: float, threads: int, told: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    monkeypatch.setattr(demo, "_steps_per_second", lambda *_: rate)
    monkeypatch.setattr(demo, "pretrain", lambda *_, **__: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    demo._pretrain(tmp_path, 60.0, "cpu", 0, True, said.append)
    assert told == any("OMP_NUM_THREADS=1" in line for line in said)


def _with_corpus(out: Path) -> Path:
    demo._read_docstrings(out, quiet=True)
    return out


def test_whole_story_and_again(small: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "demo"
    said: list[str] = []
    report = run_demo(out, minutes=0.1, quiet=True, say=said.append)

    text = "\n".join(said)
    assert "warmup_steps" not in caplog.text, "of a run that only measures the speed"
    assert said[0].startswith("torch ") and "CPU cores" in said[0]
    assert str(out / "report.html") in text
    corpus = (out / "corpus.txt").read_text(encoding="utf-8")
    dev = [json.loads(line) for line in (out / "task" / "dev.jsonl").read_text().split("\n") if line]
    train = [json.loads(line) for line in (out / "task" / "train.jsonl").read_text().split("\n") if line]
    assert not {row["module"] for row in dev} & {row["module"] for row in train}
    documents = corpus.removesuffix("\n").split("\n\n")
    texts = {document.replace("\n", " ") for document in documents}
    assert not texts & {row["text"] for row in dev}, "what is judged on must not be pre-trained on"
    assert len(documents) == 600 - len(dev)

    figures = json.loads((out / "report.json").read_text())
    accuracies = figures["accuracies"]
    assert len(accuracies["shipped"]) == len(accuracies["pretrained"]) == len(accuracies["random"]) >= 1
    assert all(0 <= value <= 1 for values in accuracies.values() for value in values)
    assert figures["references"]["counting words"] > 0.9 > figures["references"]["guessing"] >= 0.5
    assert figures["pretraining"]["steps"] >= 2 and 0 < figures["pretraining"]["eval_rtd_auc"] < 1
    html = (out / "report.html").read_text(encoding="utf-8")
    for start in report.starts:
        assert start.name in html
    assert html.count("data-chart=") == 3 and len(report.passages) == 2
    assert {name for name, _ in report.stages} >= {"pre-training", "fine-tuning"}

    with pytest.raises(UserError, match="not empty; "):
        run_demo(out, minutes=0.1, quiet=True, say=said.append)
    report = run_demo(out, minutes=0.1, quiet=True, overwrite=True, say=said.append)
    assert [bool(start.values) for start in report.starts] == [True, True, True]
    assert report.passages[0].title == "What the shipped model sees" and len(report.passages) == 2


def test_bad_arguments(tmp_path: Path, small: None) -> None:
    for seed in (-1, 1 << 64):
        with pytest.raises(UserError, match=f"seed: expected a number from 0 to below 2.64, got {seed}"):
            run_demo(tmp_path / "x", seed=seed)
    for minutes in (0.01, 0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="minutes: expected"):
            run_demo(tmp_path / "x", minutes=minutes)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        run_demo(tmp_path / "file", say=lambda line: None)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("mine", ["data", "task", "pretrained"])
def test_a_folder_that_is_not_a_demo_s_is_left_alone(tmp_path: Path, small: None, mine: str) -> None:
    (tmp_path / "out" / mine).mkdir(parents=True)
    (tmp_path / "out" / mine / "letter").write_text("dear")
    (tmp_path / "out" / "thesis.tex").write_text("x")
    for overwrite, said in (
        (False, "not empty; "),
        (True, "holds thesis.tex, and overwrite replaces nothing but a demo"),
    ):
        with pytest.raises(UserError, match=said):
            run_demo(tmp_path / "out", overwrite=overwrite, say=lambda line: None)
    (tmp_path / "out" / "thesis.tex").unlink()
    if mine != "task":
        with pytest.raises(UserError, match="holds no demo"):
            demo.texts_only(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / mine / "letter").read_text() == "dear"


def test_a_killed_demo_is_replaced(tmp_path: Path, small: None) -> None:
    for name in ("task", ".data.partial"):
        (tmp_path / "out" / name).mkdir(parents=True)
    demo.texts_only(tmp_path / "out", quiet=True, overwrite=True)
    assert (tmp_path / "out" / "corpus.txt").is_file()


def test_a_signal_during_pretraining_ends_the_demo(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = demo._pretrain

    def interrupted(*arguments: object) -> object:
        return replace(original(*arguments), stopped_by="SIGTERM")  # type: ignore[arg-type]

    monkeypatch.setattr(demo, "_pretrain", interrupted)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        run_demo(tmp_path / "demo", minutes=0.1, quiet=True, say=lambda line: None)


@pytest.mark.parametrize(("budget", "seconds", "seeds"), [(1000, 1, 5), (0, 10, 1), (35, 10, 3), (200, 120, 2)])
def test_fine_tuning_stops_when_the_minutes_are_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, budget: float, seconds: float, seeds: int
) -> None:
    """A round of seeds is begun if it fits; the second one may overdraw a quarter; all starts get the same."""
    now = 0.0

    def finetune_once(start: Start, *rest: object) -> float:
        nonlocal now
        now += seconds / 2
        return 0.5

    monkeypatch.setattr(demo.time, "monotonic", lambda: now)
    monkeypatch.setattr(demo, "_finetune_once", finetune_once)
    starts = [Start("a", "A", tmp_path), Start("b", "B", tmp_path, random=True)]
    found = demo._finetune(starts, tmp_path, Clock(budget, started=0.0), "cpu", True, lambda line: None)
    assert found == {"a": [0.5] * seeds, "b": [0.5] * seeds}


# ------------------------------------------------------------------------------------------------- judgements

HEALTHY = {"eval_rtd_auc": 0.8, "eval_rtd_loss": 0.25, "eval_base_rate_loss": 0.37, "eval_mlm_loss": 4.0}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"eval_rtd_auc": 0.52}, "AUC 0.52"),
        ({"eval_rtd_loss": 0.369}, "base rate, 0.370"),
        ({"eval_mlm_loss": 6.29}, "word frequencies alone, 6.30"),
        ({"eval_mlm_loss": math.nan}, "word frequencies alone"),
    ],
    ids=["healthy", "auc", "rtd", "mlm", "nan"],
)
def test_a_plateau_is_told(change: dict[str, float], told: str | None) -> None:
    warnings = judge_pretraining(HEALTHY | change, 6.30)
    if told is None:
        assert warnings == []
    else:
        ((headline, text),) = warnings
        assert "plateau" in headline and told in text and text[0].isupper()


def test_a_pretrained_start_that_does_not_help_is_told() -> None:
    random_start = Dots("Random start", "", [0.5, 0.6, 0.4])
    better, worse = Dots("Better", "", [0.6, 0.7, 0.8]), Dots("Worse", "", [0.5, 0.3, 0.4])
    absent = Dots("Absent", "", [])
    assert judge_comparison([better, absent, random_start]) == []
    ((headline, text),) = judge_comparison([better, worse, random_start])
    assert "Worse" in headline and "40.0%" in text and "50.0%" in text


def test_references_by_hand() -> None:
    def example(text: str, label: str) -> Example:
        return Example(text, label, Document(text, "m", label, "n"))

    train = [example("red apple", "fruit"), example("green pear", "fruit"), example("fast car", "car")]
    dev = [example("an apple", "fruit"), example("a car", "car"), example("the pear", "fruit")]
    task = LabelledTask(train, dev, ["fruit", "car"])
    assert guessing_accuracy(task) == pytest.approx(2 / 3)
    assert counting_accuracy(task) == 1.0


def test_unigram_loss_is_the_cross_entropy_of_word_frequencies(tmp_path: Path) -> None:
    from electra_core.prepare import prepare

    words = [" ".join(random.Random(i).choices(COMMON, k=40)) for i in range(60)]
    (tmp_path / "text.txt").write_text("\n\n".join(words) + "\n")
    prepare([tmp_path / "text.txt"], tmp_path / "data", vocab_size=50, heldout_fraction=0.3)
    train, heldout = (
        np.concatenate([shard.tokens for shard in Corpus.open(tmp_path / "data", split).shards]).tolist()
        for split in ("train", "heldout")
    )
    size = Corpus.open(tmp_path / "data").tokenizer.vocab_size
    expected = [-math.log((train.count(word) + 1) / (len(train) + size)) for word in heldout]
    assert unigram_loss(tmp_path / "data") == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def test_charts_show_training_and_held_out_rows() -> None:
    rows = [
        {"step": 10, "mlm_loss": 8.0, "rtd_loss": 0.5},
        {"step": 20, "mlm_loss": 7.0, "rtd_loss": 0.4},
        {
            "step": 20,
            "eval_mlm_loss": 7.1,
            "eval_rtd_loss": 0.41,
            "eval_rtd_auc": 0.55,
            "eval_base_rate_loss": 0.4,
        },
    ]
    charts = pretraining_charts(rows, 6.5)
    assert len(charts) == 3
    assert "word frequencies alone: 6.50" in charts[0] and "base rate: 0.400" in charts[1]
    assert all("held-out" in chart for chart in charts)
    assert len(pretraining_charts([], 6.5)) == 3, "nothing was measured, nothing breaks"


# --------------------------------------------------------------------------------------------------- passages


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from electra_core.corpora.vocabulary import train_sentencepiece

    return train_sentencepiece([" ".join(COMMON), "the mountains river rises and the valley is given, here."], 70)


@pytest.fixture(scope="module")
def electra(tokenizer: Tokenizer) -> Electra:
    encoder = EncoderConfig(
        vocab_size=tokenizer.vocab_size, embedding_size=16, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=1, intermediate_size=32, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    generator = {"generator_hidden_size": 16, "generator_attention_heads": 1, "generator_intermediate_size": 32}
    return Electra(encoder, PretrainConfig(mask_fraction=0.4, generator_layers=1, **generator))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_generated_passage_reads_as_the_discriminator_read_it(
    electra: Electra, tokenizer: Tokenizer, seed: int
) -> None:
    text = "The  River rises, and\nthe valley is given."
    passage = generated_passage(electra, tokenizer, text, title="t", note="n", seed=seed)
    tokens = trace(electra, tokenizer, text, seed).tokens[1:-1]
    assert [score.token for score in passage.scores] == [token.corrupted for token in tokens]
    assert [score.probability for score in passage.scores] == [token.probability for token in tokens]
    assert set(passage.originals) == {i for i, token in enumerate(tokens) if token.replaced}
    for score, token in zip(passage.scores, tokens, strict=True):
        shown = passage.text[score.start : score.end].lower()
        assert shown == score.token.removeprefix("▁").lower()
        if score.token.startswith("▁") and score.start and token.replaced:
            assert passage.text[score.start - 1].isspace()
    kept = [i for i in range(len(tokens)) if i not in passage.originals]
    assert kept and passage.originals, "both kinds occur"


def test_the_shipped_model_is_whole() -> None:
    folder = shipped_model()
    sizes, _ = load_config(folder / "discriminator")
    assert load_tokenizer(folder / "discriminator").vocab_size <= sizes.vocab_size
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 10e6


def test_texts_only(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text and labelled examples for other commands, and nothing else."""
    out = tmp_path / "sample"
    assert cli.main(["demo", "--texts-only", "--out", str(out), "--quiet"]) == 0
    told = capsys.readouterr().out
    train, dev = (len((out / "task" / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "dev"))
    assert f"{train:,} + {dev:,} examples of 2 areas" in told
    assert sorted(path.name for path in out.rglob("*.*")) == ["corpus.txt", "dev.jsonl", "train.jsonl"]
    assert cli.main(["demo", "--texts-only", "--out", str(out), "--quiet"]) == 2, "the folder is occupied"
