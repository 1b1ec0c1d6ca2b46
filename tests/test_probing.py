"""Probes of frozen states: they find what is there, and nothing where nothing is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reading import write_lines

from benchmarks import probing, render, render_probing
from electra_core.config import EncoderConfig
from electra_core.electra import DiscriminatorPredictions
from electra_core.encoder import Encoder
from electra_core.labelled_data.features import Features
from electra_core.model_dir import load_discriminator

SIZES = EncoderConfig(
    vocab_size=50, embedding_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=32,
)  # fmt: skip


class Ids:
    """A tokenizer's special ids."""

    cls_id, sep_id = 1, 2


def states(signal: float, seed: int) -> probing.States:
    """2,000 tokens of 40 words, of which some are more often repeated; each word has a vector of its own."""
    rng = np.random.default_rng(seed)
    words = rng.integers(3, 43, 2000)
    repeated = rng.random(2000) < words / 50
    vectors = np.random.default_rng(9).normal(size=(43, 8))[words]
    tokens = vectors + rng.normal(size=(2000, 8)) + signal * repeated[:, None] * np.ones(8)
    return probing.States(words, repeated, tokens[None], np.zeros((1, 0, 8)), np.zeros((1, 1)))


def test_a_repeated_word_is_found_if_its_state_tells() -> None:
    assert probing.repeated_words(states(1.0, 0), states(1.0, 1), 0) > 0.9


def test_a_frequent_word_alone_tells_nothing() -> None:
    """The words' vectors say how often each is repeated, but tokens are compared with those of the same word."""
    assert probing.repeated_words(states(0.0, 0), states(0.0, 1), 0) == pytest.approx(0.5, abs=0.05)


def test_a_verdict_is_the_discriminator_s_own() -> None:
    head = DiscriminatorPredictions(EncoderConfig(hidden_size=8, num_attention_heads=1, embedding_size=8))
    for judged, expected in ((states(1.0, 0), 1.0), (states(0.0, 0), 0.5)):
        with torch.no_grad():
            head.dense.weight.copy_(torch.ones(8, 8))
            head.dense.bias.fill_(100.0)  # GELU changes nothing
            head.dense_prediction.weight.fill_(-1.0)
        own = judged.tokens_LWD[-1].sum(1)
        assert probing.verdict(judged, head) == probing.auc_within_words(judged.words_W, judged.repeated_W, own)
        assert probing.verdict(judged, head) == pytest.approx(expected, abs=0.15)


def test_a_probe_is_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(500, 3)), np.array([1.0, -2.0, 0.5])
    found = probing.probe(x, x @ weights + 7, x)
    assert np.corrcoef(found, x @ weights)[0, 1] == pytest.approx(1)
    assert found.std() == pytest.approx((x @ weights).std() / (1 + probing.RIDGE), rel=1e-3)


def pairs() -> Features:
    features = Features(Ids.cls_id, Ids.sep_id)
    features.add(0, [5, 6, 7], [6, 8], 1.0)
    features.add(1, [9, 9], [9, 6, 9], 0.0)
    return features


def test_which_tokens_are_repeated() -> None:
    encoder = Encoder(SIZES)
    found = probing.states_of(encoder, Ids(), pairs())  # type: ignore[arg-type]
    assert found.words_W.tolist() == [5, 6, 7, 6, 8, 9, 9, 9, 6, 9]
    assert found.repeated_W.tolist() == [False, True, False, True, False, True, True, True, False, True]


def test_states_are_those_of_the_encoder() -> None:
    encoder = Encoder(SIZES)
    found = probing.states_of(encoder, Ids(), pairs())  # type: ignore[arg-type]
    batch = pairs().batch([0, 1]).tokens
    with torch.no_grad():
        last_TD, embedded_TD = encoder(batch), encoder.embeddings(batch)
    words = (batch.input_ids_T > 2).numpy()
    assert found.tokens_LWD.shape == (3, 10, 16)
    assert np.allclose(found.tokens_LWD[0], embedded_TD[words]) and np.allclose(
        found.tokens_LWD[2], last_TD[words]
    )
    assert np.allclose(found.means_LPD[2, 0], last_TD[:8].mean(0), atol=1e-6)


def test_attention_to_the_same_word() -> None:
    """Beside a query by query computation."""
    torch.manual_seed(0)
    encoder = Encoder(SIZES)
    batch = pairs().batch([0]).tokens
    with torch.no_grad():
        hidden_TD = encoder.embeddings(batch)
        same, other = probing.same_and_other(batch, slice(0, 8), batch.input_ids_T > 2)
        paid_H2 = probing.attention_paid(encoder, 0, hidden_TD, same, other)
        qkv = encoder.layers[0].attention.qkv(hidden_TD).view(8, 3, 2, 8)
        expected = torch.zeros(2, 2)
        for query, key, others in (
            (2, 5, [6]),
            (5, 2, [1, 3]),
        ):  # the tokens with id 6: in [CLS] 5 6 7 [SEP] 6 8 [SEP]
            for head in range(2):
                weights = torch.softmax(qkv[:, 1, head] @ qkv[query, 0, head] / 8**0.5, 0)
                expected[head] += torch.stack([weights[key], weights[others].mean()])
    assert torch.allclose(paid_H2, expected)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = ["a man plays a guitar", "a woman eats", "the dog runs", "a man plays", "two dogs run in snow"] * 8
    head = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    lines = [
        "\t".join([str(n), *["x"] * 6, one, sentences[(3 * n + n // 5) % 40], f"{n % 6}.0"])
        for n, one in enumerate(sentences)
    ]
    for name in ("train", "dev"):
        (tmp_path / "glue/STS-B").mkdir(parents=True, exist_ok=True)
        write_lines(tmp_path / f"glue/STS-B/{name}.tsv", head, *lines)
    monkeypatch.setenv("ELECTRA_DATA", str(tmp_path))
    probing.main(["--models", "ours=tiny", "random", "--out", str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    rows = report["rows"]
    assert [(row["model"], row["layer"]) for row in rows] == [(m, n) for m in ("ours", "random") for n in range(5)]
    assert all(0 <= row["repeated"] <= 100 and abs(row["similarity"]) <= 100 for row in rows)
    assert report["environment"]["command"].startswith("python -m ") and "ours layer 4" in capsys.readouterr().out


def test_random_has_the_first_model_s_sizes() -> None:
    ours, random = load_discriminator("tiny").encoder, probing.random_encoder("tiny")
    assert random.config == ours.config
    assert random.layers[0].intermediate.weight.std().item() == pytest.approx(
        0.02 * 0.88, rel=0.05
    )  # cut at two deviations


def test_the_page_has_a_table_for_each_probe(tmp_path: Path) -> None:
    rows = [
        {"model": name, "step": step, "layer": layer, "repeated": 50.0 + layer, "similarity": value + layer,
         "verdict": value + 40 if layer and name == "electra" else None, "attention": 3.0 if layer else None}
        for name, value in (("electra", 20.0), ("mlm", 10.0)) for step in (2000, 4000) for layer in range(2)
    ]  # fmt: skip
    text = "\n".join(render_probing.tables(rows))
    assert "| model | embeddings | layer 1 |" in text and "| electra, 2,000 steps | 20.0 | 21.0 |" in text
    verdicts, attention = text.split("| model | layer 1 |")[1:]
    assert "| electra, 4,000 steps | 60.0 |" in verdicts and "mlm" not in verdicts
    assert "| mlm, 4,000 steps | 3.0 |" in attention
    [(name, figure)] = render_probing.figures("probing_training", rows).items()
    assert name == "probing_training.svg" and "over training" in figure and ">electra</text>" in figure
    assert next(made for fits, made in render.FORMATS if fits({"rows": rows})) is render.probes
