"""The trace tells the truth: every figure agrees with the running model's, and the pages show it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch

from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.electra import Electra, Generator
from electra_core.errors import UserError
from electra_core.model_dir import save_pretrained
from electra_core.pretraining.run_folder import write_config
from electra_core.tokenizer import Tokenizer, WordPieceTokenizer, tokenizer_from_json
from electra_core.trace import Trace, load_electra, trace
from electra_core.tracing.page import STAGES, to_html
from electra_core.tracing.terminal import to_terminal
from electra_core.tracing.words import percent, pieces_note, why_chosen

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the quick brown fox jumps over a lazy dog . , and some more <b>".split()
TEXT = (
    "the quick brown fox jumps over a lazy dog , and then some more . the dog jumps over the fox and then some ."
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return WordPieceTokenizer.from_vocab(path)


def build(tying: str = "embeddings", dropout: float = 0.0, **pretrain: object) -> Electra:
    config = EncoderConfig(
        vocab_size=len(WORDS), embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=40, hidden_dropout_prob=dropout, initializer_range=0.2,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    sizes: dict[str, object] = {
        "generator_hidden_size": 32 if tying == "all" else 16,
        "generator_attention_heads": 2 if tying == "all" else 1,
        "generator_intermediate_size": 48 if tying == "all" else 24,
        "generator_layers": 2 if tying == "all" else 1,
    }
    return Electra(config, PretrainConfig(model="tiny", tying=tying, **sizes | pretrain))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def result(tokenizer: Tokenizer) -> Trace:
    return trace(build(), tokenizer, TEXT, seed=3, model="a <test> model")


@pytest.mark.parametrize("seed", range(6))
def test_the_smallest_numbers_are_chosen_and_the_coin_keeps_words(tokenizer: Tokenizer, seed: int) -> None:
    """The numbers shown are computed beside `mask_tokens`: they must explain its choice exactly."""
    t = trace(build(), tokenizer, TEXT, seed=seed)
    words = [token for token in t.tokens if not token.special]
    expected = sorted(words, key=lambda token: token.order)[: t.num_chosen]
    assert {token.position for token in words if token.chosen} == {token.position for token in expected}
    assert t.num_chosen == max(1, round(0.15 * len(t.tokens)))
    for token in t.tokens:
        assert token.seen == ("[MASK]" if token.chosen and token.coin >= 0.15 else token.token)


def test_both_outcomes_of_the_coin_occur(tokenizer: Tokenizer) -> None:
    seen = {
        token.seen == "[MASK]"
        for seed in range(12)
        for token in trace(build(), tokenizer, TEXT, seed=seed).tokens
        if token.chosen
    }
    assert seen == {True, False}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_figures_agree_with_the_models_losses(tokenizer: Tokenizer, dropout: float, temperature: float) -> None:
    """The parts, computed from logits, add up to what `Electra.forward` returned, dropout included."""
    t = trace(build(dropout=dropout, temperature=temperature), tokenizer, TEXT, seed=1)
    assert sum(draw.mlm_loss for draw in t.draws) / len(t.draws) == pytest.approx(t.mlm_loss, rel=1e-5)
    assert sum(token.rtd_loss for token in t.tokens) / len(t.tokens) == pytest.approx(t.rtd_loss, rel=1e-5)
    assert t.loss == pytest.approx(t.mlm_loss + 50 * t.rtd_loss, rel=1e-5)
    for token in t.tokens:
        answer = token.probability if token.replaced else 1 - token.probability
        assert token.rtd_loss == pytest.approx(-math.log(answer), rel=1e-3, abs=1e-5)
        assert token.replaced == (token.corrupted != token.token)
        assert not token.replaced or token.chosen


@pytest.mark.parametrize(("temperature", "note"), [(1.0, None), (1.5, "flatter than"), (0.5, "steeper than")])
def test_a_temperature_is_said(tokenizer: Tokenizer, temperature: float, note: str | None) -> None:
    """Where the shown probabilities are not those that the loss goes by."""
    t = trace(build(temperature=temperature), tokenizer, TEXT, seed=1)
    for shown in (to_terminal(t, colour=False), to_html(t)):
        words = " ".join(shown.split())
        assert ("drawn at temperature" in words) == (note is not None)
        assert note is None or (f"at temperature {temperature:g}" in words and note in words)


@pytest.mark.parametrize("colour", [False, True])
def test_a_vocabulary_cannot_steer_the_terminal(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, colour: bool
) -> None:
    monkeypatch.setattr(WordPieceTokenizer, "token", lambda _, token_id: f"\x1b[2J{token_id}")
    shown = to_terminal(trace(build(), tokenizer, TEXT, model="\x1b[2Jmodel"), colour=colour)
    assert "\x1b[2J" not in shown and r"\x1b[2Jmodel" in shown
    assert shown.count(r"\x1b[2J") > 4 * len(TEXT.split()) and ("\x1b[1m" in shown) == colour


def test_entropy_is_of_the_generators_own_distribution(tokenizer: Tokenizer) -> None:
    """Beside a loss at temperature 1 it is at temperature 1, whatever words are drawn at."""
    plain, flat = (trace(build(temperature=t), tokenizer, TEXT, seed=1).draws for t in (1.0, 3.0))
    assert [draw.entropy for draw in flat] == pytest.approx([draw.entropy for draw in plain], rel=1e-5)
    assert [draw.mlm_loss for draw in flat] == pytest.approx([draw.mlm_loss for draw in plain], rel=1e-5)
    assert all(a.candidates[0].probability < b.candidates[0].probability for a, b in zip(flat, plain, strict=True))


@pytest.mark.parametrize(
    ("text", "most", "said"),
    [
        (TEXT, 19, "15% of 27 tokens are 4.05, so 4 of the 25 words"),
        (TEXT, 2, "15% of 27 tokens are 4.05 (at most 2 are taken), so 2 of the 25 words"),
        ("fox", 19, "15% of 3 tokens are 0.45 (at least 1 is taken), so 1 of the 1 words"),
    ],
    ids=["rounded", "at most", "at least"],
)
def test_why_so_many_are_chosen(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, text: str, most: int, said: str
) -> None:
    electra = build()
    monkeypatch.setattr(type(electra.config), "max_predictions", most)
    t = trace(electra, tokenizer, text)
    assert why_chosen(t).startswith(said) and said in to_html(t)


def test_candidates_hold_the_original_and_the_drawn_word(result: Trace) -> None:
    assert [draw.position for draw in result.draws] == [t.position for t in result.tokens if t.chosen]
    for draw in result.draws:
        token = result.tokens[draw.position]
        assert draw.original.token == token.token and draw.drawn.token == token.corrupted
        assert draw.original in draw.candidates and draw.drawn in draw.candidates
        assert draw.mlm_loss == pytest.approx(-math.log(draw.original.probability), rel=1e-4)
        probabilities = [candidate.probability for candidate in draw.candidates]
        assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) <= 1 + 1e-6
        assert draw.candidates[0].rank == 1
        assert 0 < draw.entropy <= math.log(len(WORDS)) + 1e-6


def test_ids_that_no_token_has_are_shown_as_numbers() -> None:
    """A model may have more words than the tokenizer, and the tokenizer's ids may have gaps."""
    sparse = WordPieceTokenizer.from_tokens([*WORDS[:5], "the", "fox"])
    content = json.loads(sparse.to_json())
    content["model"]["vocab"]["the"] = 12
    tokenizer = tokenizer_from_json(json.dumps(content))
    draws = [d for seed in range(4) for d in trace(build(), tokenizer, "the fox the fox the", seed=seed).draws]
    shown = {candidate.token for draw in draws for candidate in draw.candidates}
    assert shown & {f"#{i}" for i in range(8, 12)} and shown & {f"#{i}" for i in range(13, len(WORDS))}


@pytest.mark.parametrize("disallowed", [False, True])
def test_drawn_words_follow_the_shown_probabilities(tokenizer: Tokenizer, disallowed: bool) -> None:
    """Over many seeds the drawn word's mean probability is that of a draw, not of the likeliest word."""
    electra = build(disallow_correct=disallowed)
    draws = [d for seed in range(60) for d in trace(electra, tokenizer, TEXT, seed=seed).draws]
    hits = sum(draw.candidates[0] == draw.drawn for draw in draws) / len(draws)
    expected = sum(draw.candidates[0].probability for draw in draws) / len(draws)
    deviation = math.sqrt(expected * (1 - expected) / len(draws))
    assert abs(hits - expected) < 4 * deviation
    assert not disallowed or all(draw.original.probability == 0 for draw in draws)


@pytest.mark.parametrize("tying", ["embeddings", "none", "disentangled", "all"])
def test_gradients_meet_only_where_something_is_shared(tokenizer: Tokenizer, tying: str) -> None:
    electra = build(tying)
    t = trace(electra, tokenizer, TEXT, seed=2)
    parts = {gradient.part: gradient for gradient in t.gradients}
    shared = {"embeddings": {"embeddings, shared"}, "all": {"embeddings, shared", "encoder, shared"}}
    assert {name for name in parts if "shared" in name} == shared.get(tying, set())
    for name, gradient in parts.items():
        if "shared" in name:
            assert gradient.mlm > 0 and gradient.rtd > 0
        elif name.startswith("generator"):
            assert gradient.mlm > 0 and gradient.rtd == 0, "no gradient may flow through the draw"
        else:
            assert gradient.mlm == 0 and gradient.rtd > 0
    assert sum(gradient.parameters for gradient in t.gradients) == sum(p.numel() for p in electra.parameters())


def test_gradients_are_those_of_the_step(tokenizer: Tokenizer) -> None:
    """All parts together give the norm that a plain backward pass of the whole loss gives."""
    electra = build()
    t = trace(electra, tokenizer, TEXT, seed=2)
    from electra_core.masking import mask_tokens
    from electra_core.packing import pack

    ids = [tokenizer.cls_id, *tokenizer.encode(TEXT), tokenizer.sep_id]
    special = (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    batch = mask_tokens(
        pack([ids]), [0], seed=2, mask_id=tokenizer.mask_id, special_ids=special, fraction=0.15, max_predictions=19
    )
    output = electra.train()(batch, 2)
    output.loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in electra.parameters() if p.grad is not None])
    assert math.hypot(*(gradient.both for gradient in t.gradients)) == pytest.approx(norm.item(), rel=1e-4)
    assert t.loss == pytest.approx(output.loss.item(), rel=1e-6)


def test_shapes_are_read_off_the_model(result: Trace) -> None:
    shapes = {(shape.owner, shape.name): shape.shape for shape in result.shapes}
    tokens, masked = len(result.tokens), result.num_chosen
    assert shapes["batch", "input_ids_T"] == (tokens,)
    assert shapes["batch", "logits_MV"] == (masked, len(WORDS))
    assert shapes["generator", "encoder.embeddings"] == (tokens, 16)
    assert shapes["generator", "generator_predictions"] == (masked, 16)
    assert shapes["discriminator", "encoder.embeddings_project"] == (tokens, 32)
    assert shapes["discriminator", "encoder.layers.0.attention.qkv"] == (tokens, 96)
    assert shapes["discriminator", "encoder.layers.0.intermediate"] == (tokens, 48)
    assert shapes["discriminator", "discriminator_predictions.dense"] == (tokens, 32)


def test_the_model_is_left_as_it_was(tokenizer: Tokenizer) -> None:
    electra = build().eval()
    before = {name: p.clone() for name, p in electra.named_parameters()}
    assert trace(electra, tokenizer, TEXT, seed=5) == trace(electra, tokenizer, TEXT, seed=5)
    assert trace(electra, tokenizer, TEXT, seed=5) != trace(electra, tokenizer, TEXT, seed=6)
    assert not electra.training and not any(m._forward_hooks for m in electra.modules())
    for name, parameter in electra.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_odd_texts(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="no tokens"):
        trace(build(), tokenizer, "  \n", seed=0)
    assert trace(build(), tokenizer, "fox", seed=0).num_chosen == 1
    long = trace(build(), tokenizer, "fox " * 100, seed=0)
    assert len(long.tokens) == 40 and long.truncated == 62
    assert "62 tokens did not fit" in to_terminal(long, colour=False)
    assert "62 tokens did not fit" in to_html(long)
    plain = trace(build(), tokenizer, "the [MASK] fox", seed=0)
    assert "[MASK]" not in [token.token for token in plain.tokens]


def test_a_vocabulary_of_another_size_is_refused(tokenizer: Tokenizer) -> None:
    electra = build()
    small = replace(electra.generator.config, vocab_size=7)
    with pytest.raises(ValueError, match="tokenizer: expected at most 7 entries, got 20"):
        trace(Electra(small, electra.config), tokenizer, TEXT)


@pytest.mark.parametrize("tying", ["embeddings", "none", "disentangled", "all"])
def test_a_saved_run_traces_as_the_model_in_memory(tokenizer: Tokenizer, tmp_path: Path, tying: str) -> None:
    electra = build(tying, mask_fraction=0.3, discriminator_weight=20.0)
    save_pretrained(electra.discriminator, tmp_path / "run" / "discriminator", tokenizer=tokenizer)
    save_pretrained(electra.generator, tmp_path / "run" / "generator")
    write_config(tmp_path / "run" / "config.toml", electra.discriminator.config, electra.config)
    expected = trace(electra, tokenizer, TEXT, seed=4)
    assert expected.mask_fraction == 0.3 and expected.discriminator_weight == 20
    for source in (tmp_path / "run", tmp_path / "run" / "discriminator"):
        loaded, loaded_tokenizer = load_electra(source)
        found = trace(loaded, loaded_tokenizer, TEXT, seed=4)
        assert found.num_chosen == expected.num_chosen
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert [g.part for g in found.gradients] == [g.part for g in expected.gradients]


def test_a_run_of_another_objective_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    electra = build()
    save_pretrained(electra.discriminator, tmp_path / "run" / "discriminator", tokenizer=tokenizer)
    save_pretrained(electra.generator, tmp_path / "run" / "generator")
    other = replace(electra.config, objective="electra-15")
    write_config(tmp_path / "run" / "config.toml", electra.discriminator.config, other)
    said = r"run/config\.toml: objective: expected 'electra', the one traced, got 'electra-15'"
    with pytest.raises(UserError, match=said):
        load_electra(tmp_path / "run")


def test_words_drawn_without_a_generator_are_no_trace(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="uniform_generator: the words are drawn without a generator"):
        trace(build(uniform_generator=True), tokenizer, TEXT)


def test_a_damaged_configuration_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    electra = build()
    save_pretrained(electra.discriminator, tmp_path / "run" / "discriminator", tokenizer=tokenizer)
    save_pretrained(electra.generator, tmp_path / "run" / "generator")
    for text, said in (
        ("[pretrain\nsteps = ", ""),
        ("pretrain = 3", r"\[pretrain\] is a table"),
        ("[pretrain]\nmask_fraction = 2.0", "mask_fraction: expected"),
        ("[pretrain]\nmask_fraction = 'all'", "mask_fraction: expected a value of type float"),
    ):
        (tmp_path / "run" / "config.toml").write_text(text)
        with pytest.raises(UserError, match=rf"run/config\.toml: {said}"):
            load_electra(tmp_path / "run")


def test_a_discriminator_alone_cannot_be_traced(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_pretrained(build().discriminator, tmp_path / "model", tokenizer=tokenizer)
    with pytest.raises(UserError, match="no generator beside it"):
        load_electra(tmp_path / "model")


@pytest.mark.parametrize(("size", "number"), [("embedding_size", 24), ("vocab_size", 50)])
def test_a_generator_of_other_sizes_is_told(tokenizer: Tokenizer, tmp_path: Path, size: str, number: int) -> None:
    electra = build()
    save_pretrained(electra.discriminator, tmp_path / "run" / "discriminator", tokenizer=tokenizer)
    save_pretrained(Generator(replace(electra.generator.config, **{size: number})), tmp_path / "run" / "generator")
    with pytest.raises(UserError, match=rf"run/generator: the model has {size} {number}, not "):
        load_electra(tmp_path / "run")


# ------------------------------------------------------------------------------------------------ the two views


def test_terminal_shows_every_stage(result: Trace) -> None:
    text = to_terminal(result, colour=False)
    assert "\x1b" not in text
    titles = [(i, stage.title) for i, stage in enumerate(STAGES, 1)]  # the page's stages, with its numbers
    assert [(int(n), title) for n, title in re.findall(r"^(\d+)  ([A-Z].*)$", text, flags=re.M)] == titles
    for draw in result.draws:
        assert f"position {draw.position}: {draw.original.token}, loss {draw.mlm_loss:.2f}" in text
    assert text.count("drawn") >= len(result.draws)
    assert re.search(r"from MLM +from 50 x RTD", text)
    for token in result.tokens:
        assert not token.chosen or f"{token.coin:.4f}  position {token.position} " in text
    assert f"1 x MLM {result.mlm_loss:.4f} + 50 x RTD {result.rtd_loss:.4f} = {result.loss:.4f}" in text
    assert why_chosen(result).split(";")[0][:40] in text
    coloured = to_terminal(result, colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == text
    assert all(len(line) <= 100 for line in text.split("\n"))


def test_page_shows_every_stage_and_escapes(result: Trace) -> None:
    html = to_html(result)
    assert html.count('<section class="stage"') == len(STAGES) == 10
    assert "a &lt;test&gt; model" in html
    assert not re.search(r"https?:|src=|@import|url\(", html)
    cells = re.search(r'id="stage-5".*?</ol>', html, flags=re.S)
    assert cells is not None
    words = [unescape(re.sub(r"<.*?>", "", word)) for word in re.findall(r"<b>(.*?)</b>", cells[0])]
    assert words == [token.corrupted for token in result.tokens]
    answers = re.search(r'id="stage-7".*?</ol>', html, flags=re.S)
    assert answers is not None
    masked = re.search(r'id="stage-3".*?</ol>', html, flags=re.S)
    assert masked is not None and all(f"{t.coin:.3f}" in masked[0] for t in result.tokens if t.chosen)
    assert "from 50 × RTD" in html
    shades = [float(p) for p in re.findall(r"--p:([\d.]+)", answers[0])]
    assert shades == [round(token.probability, 4) for token in result.tokens]
    assert re.search(r"\n\.cell :is\(b, [^}]*unicode-bidi: plaintext;", html)  # for Arabic words


def test_signs_of_the_vocabulary_are_explained(result: Trace) -> None:
    """SentencePiece marks where words begin, WordPiece where they go on; the page keeps the sign, faint."""

    def beginning_with(token: str) -> Trace:
        return replace(result, tokens=[replace(result.tokens[0], token=token), *result.tokens[1:]])

    assert pieces_note(result) == ""
    for token, note in (("▁fox", "▁ stands where a word begins"), ("##ox", "## marks a piece that goes on")):
        changed = beginning_with(token)
        assert pieces_note(changed).startswith(note)
        assert note in to_terminal(changed, colour=False) and note in to_html(changed)
    assert '<i class="begins">▁</i>fox' in to_html(beginning_with("▁fox"))


def test_percentages() -> None:
    shown = [percent(p) for p in (0.934, 0.042, 0.00078, 0.000001, 1.0)]
    assert shown == ["93%", "4.2%", "0.08%", "<0.01%", "100%"]


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
STEPPING = """<script>
const log = [];
const current = () => document.querySelector(".stage.current").id.slice(6);
const visible = () => [...document.querySelectorAll(".stage")].filter((s) => s.offsetHeight > 0).length;
const press = (key) => { dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true})); log.push(current()); };
log.push(current() + "/" + visible());
["ArrowRight", "ArrowRight", "ArrowLeft", " ", "End", "ArrowRight", "Home", "ArrowLeft"].forEach(press);
document.getElementById("next").click(); log.push(current());
document.querySelectorAll(".steps a")[6].click(); log.push(current() + location.hash);
document.getElementById("back").click(); log.push(current() + "/" + visible());
document.title = "LOG " + log.join(" ");
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium to open the page in")
def test_page_can_be_stepped_through_in_a_browser(result: Trace, tmp_path: Path) -> None:
    """Arrow keys, space, Home, End, both buttons and the numbers, in a real browser."""
    page = tmp_path / "trace.html"
    page.write_text(to_html(result).replace("</body>", STEPPING), encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-500:]
    assert title[1] == "LOG 1/1 2 3 2 3 10 10 1 1 2 7#stage-7 6/1"
