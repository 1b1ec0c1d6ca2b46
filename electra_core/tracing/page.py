"""A trace as one self-contained page, to step through forward and back with keyboard or mouse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from electra_core.detect import SCALE_HTML
from electra_core.masking import KEEP_PROBABILITY
from electra_core.reports.pages import page
from electra_core.trace import Candidate, Draw, TokenTrace, Trace
from electra_core.tracing.probes import PartGradient
from electra_core.tracing.words import (
    LETTERS,
    labels_note,
    percent,
    pieces_note,
    temperature_note,
    weighted_losses,
    why_chosen,
)

MOST_LOSSES = 8


@dataclass(frozen=True)
class Stage:
    """One step of the story: an equation of the paper, what it means, and this sentence's figures (HTML)."""

    title: str
    equation: str
    text: str
    body: Callable[[Trace], str]
    where: str
    """The place in the code."""
    tensors: tuple[str, ...] = ()
    """The tensors of the batch that are computed here."""


def to_html(trace: Trace) -> str:
    """The page. Without JavaScript it shows all stages one below the other."""
    links = "".join(
        f'<a href="#stage-{i}" title="{escape(stage.title)}">{i}</a>' for i, stage in enumerate(STAGES, 1)
    )
    bar = (
        '<nav class="bar"><span class="name">One step of ELECTRA</span>'
        f'<span class="steps">{links}</span>'
        '<button id="back" aria-keyshortcuts="ArrowLeft" aria-label="back">← <span>Back</span></button>'
        '<button id="next" aria-keyshortcuts="ArrowRight" aria-label="next"><span>Next</span> →</button></nav>'
    )
    sections = "\n".join(_section(i, stage, trace) for i, stage in enumerate(STAGES, 1))
    cut = f" {trace.truncated} tokens did not fit and were left out." if trace.truncated else ""
    model = f"Model: <code>{escape(trace.model)}</code>, " if trace.model else ""
    footer = f"<footer>{model}seed {trace.seed}.{cut} Step with ← and →, or the space bar.</footer>"
    return page(
        "One pre-training step of ELECTRA",
        f"{bar}\n{sections}\n{footer}",
        styles=("trace.css",),
        scripts=("page.js", "trace.js"),
    )


def _section(number: int, stage: Stage, trace: Trace) -> str:
    equation = f'<p class="eq">{stage.equation}</p>' if stage.equation else ""
    shapes = {shape.name: " × ".join(map(str, shape.shape)) for shape in trace.shapes if shape.owner == "batch"}
    tensors = "".join(f" · <code>{name}</code> {shapes[name]}" for name in stage.tensors)
    return (
        f'<section class="stage" id="stage-{number}"><h2><small>{number} of {len(STAGES)}</small>'
        f"{escape(stage.title)}</h2><p>{stage.text}</p>{equation}{stage.body(trace)}"
        f'<p class="where">In the code: {stage.where}{tensors}</p></section>'
    )


# --------------------------------------------------------------------------------------------------- the stages


@dataclass(frozen=True)
class Cell:
    """How one token is shown: its word, CSS classes, HTML below the word, and a shade in [0, 1]."""

    word: str
    classes: str = ""
    below: str = ""
    shade: float | None = None


def _cells(tokens: Sequence[TokenTrace], cell: Callable[[TokenTrace], Cell]) -> str:
    """The sentence, a cell per token."""
    items = []
    for token in tokens:
        shown = cell(token)
        classes = " ".join(filter(None, ["cell", "special" if token.special else "", shown.classes]))
        style = "" if shown.shade is None else f' style="--p:{shown.shade:.4f}"'
        items.append(
            f'<li class="{classes}"{style}><small>{token.position}</small><b>{_word(shown.word)}</b>'
            f"{shown.below}</li>"
        )
    return f'<ol class="cells">{"".join(items)}</ol>'


def _word(piece: str) -> str:
    """A token of the vocabulary; SentencePiece's sign for the start of a word is shown faintly."""
    return '<i class="begins">▁</i>' * piece.startswith("▁") + escape(piece.removeprefix("▁"))


def _info(text: str) -> str:
    return f'<span class="info">{escape(text)}</span>'


def _before(word: str) -> str:
    return f'<span class="before">{_word(word)}</span>'


def _keys(*keys: tuple[str, str]) -> str:
    """A legend: (classes of the mark, meaning)."""
    return (
        '<div class="keys">' + "".join(f'<span><i class="{c}"></i>{escape(t)}</span>' for c, t in keys) + "</div>"
    )


def _tokens(trace: Trace) -> str:
    sign = pieces_note(trace)
    note = f'<p class="small">{escape(sign)}</p>' if sign else ""
    return _cells(trace.tokens, lambda t: Cell(t.token, below=_info(f"id {t.token_id}"))) + note


def _positions(trace: Trace) -> str:
    def cell(t: TokenTrace) -> Cell:
        if t.special:
            return Cell(t.token, below=_info("never chosen"))
        meter = f'<span class="meter"><i style="width:{100 * t.order:.1f}%"></i></span>'
        return Cell(t.token, "chosen" if t.chosen else "", _info(f"{t.order:.3f}") + meter)

    keys = _keys(("tone0", "chosen: the smallest numbers"))
    return f"<p>{escape(why_chosen(trace))}</p>{_cells(trace.tokens, cell)}{keys}"


def _masked(trace: Trace) -> str:
    def cell(t: TokenTrace) -> Cell:
        if not t.chosen:
            return Cell(t.seen)
        if t.coin < KEEP_PROBABILITY:
            return Cell(t.seen, "chosen kept", _info(f"{t.coin:.3f}: stays"))
        return Cell(t.seen, "chosen masked", _before(t.token) + _info(f"{t.coin:.3f}"))

    keys = _keys(("tone0", "to be guessed"), ("tone0 dashed", "to be guessed, though the word stays"))
    return _cells(trace.tokens, cell) + keys


def _candidates(trace: Trace) -> str:
    cards = "".join(_draw_card(draw, trace.tokens[draw.position]) for draw in trace.draws)
    legend = _keys(("tone2", "the original"), ("tone1", "drawn"), ("tone3", "other candidates"))
    note = temperature_note(trace)
    return (f"<p>{note}</p>" if note else "") + f'<div class="draws">{cards}</div>{legend}'


def _draw_card(draw: Draw, token: TokenTrace) -> str:
    top = max(candidate.probability for candidate in draw.candidates)
    rows = [_candidate_row(c, top, far=c.rank > place) for place, c in enumerate(draw.candidates, 1)]
    return (
        f'<div class="card draw"><h3>{_word(token.token)}<span>position {draw.position} · entropy '
        f"{draw.entropy:.2f} · loss {draw.mlm_loss:.2f}</span></h3>{''.join(rows)}</div>"
    )


def _candidate_row(candidate: Candidate, top: float, far: bool) -> str:
    names = ["original"] * candidate.is_original + ["drawn"] * candidate.is_drawn
    classes = " ".join(["cand", *names, *(["far"] if far else [])])
    note = ", ".join([*names, *([f"rank {candidate.rank:,}"] if far else [])])
    label = f"<em>{note}</em>" if note else ""
    width = 100 * candidate.probability / top if top else 0
    return (
        f'<div class="{classes}"><b>{_word(candidate.token)}{label}</b>'
        f'<div class="track"><i style="width:{width:.2f}%"></i></div>'
        f"<span>{percent(candidate.probability)}</span></div>"
    )


def _corrupted(trace: Trace) -> str:
    def cell(t: TokenTrace) -> Cell:
        if t.replaced:
            return Cell(t.corrupted, "replaced", _before(t.token))
        return Cell(t.corrupted, "lucky", _info("the original")) if t.chosen else Cell(t.corrupted)

    keys = _keys(("tone1", "another word was drawn"), ("tone2", "the original itself was drawn"))
    return _cells(trace.tokens, cell) + keys


def _labels(trace: Trace) -> str:
    def cell(t: TokenTrace) -> Cell:
        if t.replaced:
            return Cell(t.corrupted, "replaced", _info("1 · replaced"))
        if t.chosen:
            return Cell(t.corrupted, "lucky", _info("0 · the original"))
        return Cell(t.corrupted, below=_info("0"))

    return f"<p>{labels_note(trace)}</p>" + _cells(trace.tokens, cell)


def _answers(trace: Trace) -> str:
    def cell(t: TokenTrace) -> Cell:
        classes = "shaded replaced" if t.replaced else "shaded"
        return Cell(t.corrupted, classes, _info(percent(t.probability)), t.probability)

    return _cells(trace.tokens, cell) + _keys(("tone1", "was replaced")) + SCALE_HTML


def _losses(trace: Trace) -> str:
    def box(name: str, value: float) -> str:
        return f'<div class="card"><b>{value:.3f}</b><span>{name}</span></div>'

    total = (
        f'<div class="sum"><span class="op">{trace.generator_weight:g} ×</span>'
        f"{box('MLM, mean over the chosen', trace.mlm_loss)}"
        f'<span class="op">+ {trace.discriminator_weight:g} ×</span>'
        f"{box('RTD, mean over all tokens', trace.rtd_loss)}"
        f'<span class="op">=</span>{box("the loss", trace.loss)}</div>'
        f"<p>For comparison: a generator that knows nothing pays {trace.uniform_loss:.2f}; a discriminator that "
        f"only knows how many tokens are replaced pays {trace.base_rate_loss:.3f}.</p>"
    )
    rows = [(trace.tokens[d.position].token, f"position {d.position}", d.mlm_loss) for d in trace.draws]
    worst = sorted(trace.tokens, key=lambda t: -t.rtd_loss)[:MOST_LOSSES]
    answers = [
        (t.corrupted, f"{'replaced' if t.replaced else 'original'}, answer {percent(t.probability)}", t.rtd_loss)
        for t in worst
    ]
    return (
        f'{total}<div class="grid2">{_bars("The generator, word by word", rows, 0)}'
        f"{_bars('Where the discriminator pays most', answers, 1)}</div>"
    )


def _bars(title: str, rows: Sequence[tuple[str, str, float]], tone: int) -> str:
    top = max((value for _, _, value in rows), default=0.0) or 1.0
    lines = "".join(
        f"<tr><td>{_word(word)}<br><small>{escape(note)}</small></td>"
        f'<td class="wide"><div class="track tone{tone}"><i style="width:{100 * value / top:.2f}%"></i></div></td>'
        f'<td class="n">{value:.3f}</td></tr>'
        for word, note, value in rows
    )
    return f'<div class="card"><h3>{escape(title)}</h3><table class="numbers">{lines}</table></div>'


def _gradients(trace: Trace) -> str:
    top = max((max(g.mlm, g.rtd) for g in trace.gradients), default=0.0) or 1.0
    mlm, rtd = (name.replace(" x ", " × ") for name in weighted_losses(trace))
    head = (
        f'<tr><th>Part</th><th class="n">parameters</th><th class="n">from {mlm}</th><th class="n">from {rtd}</th>'
        '<th class="bars">side by side</th><th class="n">together</th></tr>'
    )
    rows = "".join(_gradient_row(g, top) for g in trace.gradients)
    return f'<div class="card scroll"><table class="numbers">{head}{rows}</table></div>'


def _gradient_row(g: PartGradient, top: float) -> str:
    bars = "".join(
        f'<div class="track tone{tone}"><i style="width:{100 * value / top:.2f}%"></i></div>'
        for tone, value in ((0, g.mlm), (1, g.rtd))
    )
    return (
        f'<tr><td>{escape(g.part)}</td><td class="n">{g.parameters:,}</td><td class="n">{g.mlm:.4g}</td>'
        f'<td class="n">{g.rtd:.4g}</td><td class="bars">{bars}</td><td class="n">{g.both:.4g}</td></tr>'
    )


def _shapes(trace: Trace) -> str:
    rows = "".join(
        f"<tr><td>{escape(s.owner)}</td><td><code>{escape(s.name)}</code></td><td>[{escape(s.legend)}]</td>"
        f'<td class="n">{" × ".join(map(str, s.shape))}</td></tr>'
        for s in trace.shapes
    )
    head = '<tr><th>Part of</th><th>Tensor or module</th><th>Shape</th><th class="n">Here</th></tr>'
    return f'<div class="card scroll"><table class="numbers">{head}{rows}</table></div>'


STAGES = (
    Stage(
        "The sentence becomes tokens",
        "<i>x</i> = [<i>x</i><sub>1</sub>, …, <i>x</i><sub>n</sub>]",
        "The tokenizer cuts the text into pieces of its vocabulary; [CLS] and [SEP] mark beginning and end.",
        _tokens,
        "<b>Tokenizer.encode</b> (tokenizer.py), <b>pack</b> (packing.py)",
        ("input_ids_T",),
    ),
    Stage(
        "Some positions are chosen",
        "<i>m</i> = the k smallest of <i>u</i><sub>1</sub> … <i>u</i><sub>n</sub>, "
        "&ensp;<i>u</i><sub>t</sub> ~ unif(0, 1)",
        "Every token gets a random number, which depends only on the seed, the example and the token's position.",
        _positions,
        "<b>mask_tokens</b> (masking.py), <b>philox</b> (kernels/rng.py)",
        ("masked_positions_M",),
    ),
    Stage(
        "What the generator sees",
        "<i>x</i><sup>masked</sup> = REPLACE(<i>x</i>, <i>m</i>, [MASK])",
        "[MASK] hides the chosen words, except for about one in seven: a word whose second random number is below "
        f"{KEEP_PROBABILITY:g} stays, but is predicted all the same.",
        _masked,
        "<b>mask_tokens</b> (masking.py)",
        ("masked_ids_T",),
    ),
    Stage(
        "The generator guesses, and a word is drawn",
        "<i>x̂</i><sub>i</sub> ~ <i>p</i><sub>G</sub>(<i>x</i><sub>i</sub> | <i>x</i><sup>masked</sup>)",
        "At every chosen position, a softmax gives each word of the vocabulary a probability. One word is drawn: "
        "often the likeliest, sometimes a rare one.",
        _candidates,
        "<b>Generator.fill</b>, step 2 of <b>Electra.forward</b> (electra.py), <b>mlm_head</b> "
        "(kernels/mlm_head.py)",
        ("logits_MV", "sampled_ids_M"),
    ),
    Stage(
        "The corrupted sentence",
        "<i>x</i><sup>corrupt</sup> = REPLACE(<i>x</i>, <i>m</i>, <i>x̂</i>)",
        "The drawn words take the places of the originals. No [MASK] is left: the discriminator reads a sentence "
        "that could be real.",
        _corrupted,
        "<b>replace_tokens</b>, step 3 of <b>Electra.forward</b> (electra.py)",
        ("corrupted_ids_T",),
    ),
    Stage(
        "The labels",
        "<i>y</i><sub>t</sub> = 1(<i>x</i><sup>corrupt</sup><sub>t</sub> ≠ <i>x</i><sub>t</sub>)",
        "A token counts as replaced only if it differs from the original: nobody could tell a lucky draw from it.",
        _labels,
        "step 3 of <b>Electra.forward</b> (electra.py)",
        ("is_replaced_T",),
    ),
    Stage(
        "The discriminator judges every token",
        "<i>D</i>(<i>x</i><sup>corrupt</sup>, t) = sigmoid(<i>w</i><sup>T</sup> "
        "<i>h</i><sub>D</sub>(<i>x</i><sup>corrupt</sup>)<sub>t</sub>)",
        "The discriminator says how likely each token is to be a replacement. It learns from all tokens, not only "
        "from the chosen ones.",
        _answers,
        "<b>Discriminator.judge</b>, step 4 of <b>Electra.forward</b> (electra.py)",
        ("rtd_logits_T",),
    ),
    Stage(
        "Two losses",
        "min <i>L</i><sub>MLM</sub>(<i>x</i>, θ<sub>G</sub>) + λ <i>L</i><sub>Disc</sub>(<i>x</i>, θ<sub>D</sub>)",
        "The generator pays minus the logarithm of the probability it gave to the original word; the "
        "discriminator pays the binary cross-entropy at every token. Both losses are in nats.",
        _losses,
        "step 5 of <b>Electra.forward</b> (electra.py), <b>rtd_head</b> (kernels/rtd_loss.py)",
    ),
    Stage(
        "The gradients",
        "",
        "How strongly each weighted loss pulls at each part of the model (Euclidean norm of the gradient). "
        "Nothing of the discriminator's loss flows back through the draw, which is discrete. The two losses meet "
        "only where parameters are shared.",
        _gradients,
        "<b>Electra</b> (electra.py); the update is in adam.py",
    ),
    Stage(
        "Every shape",
        "",
        LETTERS,
        _shapes,
        "<b>encoder.py</b> and <b>electra.py</b>; the letters are the suffixes of the names there",
    ),
)
