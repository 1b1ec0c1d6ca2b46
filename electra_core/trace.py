"""One pre-training step in slow motion: everything that happens to one sentence, recorded.

`trace` runs the project's own functions, in the order of `Electra.forward`, and keeps their results: `mask_tokens`
chooses the positions, the generator's logits give the candidates, `Electra.forward` itself draws, replaces,
detects and computes the losses, and autograd gives each loss's gradient separately. Hooks read the shapes off the
running model. Nothing is computed in a second way; a test checks the figures against each other.

`tracing/terminal.py` and `tracing/page.py` show a `Trace`: as text, and as a page to step through.
`tracing/words.py` has the sentences that both use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from electra_kernels.rng import fold, philox, seed_tensor
from torch import Tensor

from electra_core.config import GENERATOR_SIZES, PretrainConfig, updated
from electra_core.electra import Electra
from electra_core.errors import UserError, printable
from electra_core.files.toml_files import read_table
from electra_core.masking import MASKING_STREAM, mask
from electra_core.model_dir import find_model, load_discriminator, load_generator, load_into
from electra_core.packing import PretrainBatch, pack
from electra_core.tokenizer import Tokenizer, matching_tokenizer
from electra_core.tracing.probes import PartGradient, Shape, part_gradients, recorded_shapes

CANDIDATES = 6


@dataclass(frozen=True)
class TokenTrace:
    """What happens to one of the T tokens, from its position in the text to the discriminator's prediction."""

    position: int
    token: str
    token_id: int
    special: bool
    """[CLS] and [SEP]: never masked."""
    order: float
    """Its random number in [0, 1): the smallest ones are chosen."""
    chosen: bool
    coin: float
    """A second random number in [0, 1); a chosen token is kept, not masked, if it is below 0.15."""
    seen: str
    """What the generator reads here."""
    corrupted: str
    """What the discriminator reads here."""
    replaced: bool
    """The label: `corrupted` differs from `token`."""
    probability: float
    """The discriminator's probability that it was replaced."""
    rtd_loss: float
    """This token's binary cross-entropy, in nats."""


@dataclass(frozen=True)
class Candidate:
    """A token that the generator could draw."""

    token: str
    probability: float
    """Its probability of being drawn, at the temperature of the draw."""
    rank: int
    """1 for the likeliest token of the vocabulary."""
    is_original: bool
    is_drawn: bool


@dataclass(frozen=True)
class Draw:
    """What the generator does at one masked position."""

    position: int
    original: Candidate
    drawn: Candidate
    candidates: list[Candidate]
    """The likeliest tokens first; the original and the drawn one are included, at the end if unlikely."""
    mlm_loss: float
    """-log of the original's probability (at temperature 1), in nats."""
    entropy: float
    """Entropy of the generator's own distribution (at temperature 1, as in the loss), in nats."""


@dataclass(frozen=True)
class Trace:
    """One pre-training step on one sentence."""

    text: str
    model: str
    seed: int
    truncated: int
    """Tokens of the text that did not fit and were left out."""
    mask_fraction: float
    max_predictions: int
    """Maximum number of chosen positions, whatever the fraction of tokens."""
    num_chosen: int
    tokens: list[TokenTrace]
    draws: list[Draw]
    gradients: list[PartGradient]
    shapes: list[Shape]
    mlm_loss: float
    rtd_loss: float
    loss: float
    generator_weight: float
    discriminator_weight: float
    temperature: float
    uniform_loss: float
    """log of the vocabulary's size: the MLM loss of knowing nothing."""
    base_rate_loss: float
    """Entropy of the replaced fraction: the RTD loss of always answering that fraction."""


def load_electra(source: str | Path) -> tuple[Electra, Tokenizer]:
    """Generator and discriminator of a run, combined again, and their tokenizer.

    Args:
        source: a run's folder, with `discriminator` and `generator` in it, or its `discriminator` itself.

    Raises:
        UserError: there is no such model, no generator beside it, one of other sizes (embeddings, vocabulary,
            positions), or it was trained with another objective.
    """
    directory = find_model(source)
    beside = directory.with_name("generator")
    if not (beside / "config.json").exists():
        raise UserError(f"{directory}: there is no generator beside it, which a trace needs")
    discriminator, generator = load_discriminator(directory), load_generator(beside)
    same = torch.equal(discriminator.encoder.embeddings.word_weight(), generator.encoder.embeddings.word_weight())
    narrow, run = generator.config, _run_config(directory.with_name("config.toml"))
    pretrain = replace(
        run,
        tying=run.tying if same and run.tying in ("embeddings", "all") else "none",
        **{ours: getattr(narrow, name) for name, ours in GENERATOR_SIZES.items()},
    )
    electra = Electra(discriminator.config, pretrain)
    load_into(electra.generator, beside)  # which tells of other sizes
    load_into(electra.discriminator, directory)
    return electra, matching_tokenizer(directory, narrow.vocab_size)


def _run_config(file: Path) -> PretrainConfig:
    """The run's configuration (fraction masked, weights of the losses, ...); the defaults without a file."""
    values = read_table(file, "pretrain") if file.is_file() else {}
    config = updated(PretrainConfig(), values, str(file))
    if config.objective != Electra.objective:
        raise UserError(
            f"{file}: objective: expected {Electra.objective!r}, the one traced, got {config.objective!r}"
        )
    return config


def trace(electra: Electra, tokenizer: Tokenizer, text: str, seed: int = 0, model: str = "") -> Trace:
    """Runs one pre-training step (without its update) on `text` and records every stage.

    The model's parameters, gradients and mode are left as they were.

    Args:
        electra: generator and discriminator; run as in training, including any dropout.
        tokenizer: their tokenizer. Names of special tokens in the text count as ordinary characters.
        seed: decides the masked positions, the draws and the dropout.
        model: the model's name in the trace.

    Raises:
        UserError: the text has no tokens, or the model draws words without its generator.
        ValueError: the tokenizer's vocabulary is not the model's.
    """
    plain = tokenizer.as_plain_text()
    vocabulary = electra.generator.config.vocab_size
    if plain.vocab_size > vocabulary:
        raise ValueError(f"tokenizer: expected at most {vocabulary} entries, got {plain.vocab_size}")
    if electra.config.uniform_generator:
        raise UserError("uniform_generator: the words are drawn without a generator, whose guesses a trace shows")
    ids = plain.encode(text)
    if not ids:
        raise UserError("the text has no tokens; there is nothing to trace")
    kept = ids[: electra.discriminator.config.max_position_embeddings - 2]
    device = next(electra.parameters()).device
    tokens = pack([[plain.cls_id, *kept, plain.sep_id]])
    batch = mask(tokens, [0], plain, electra.config, seed)  # as example 0 of a run with this seed

    was_training = electra.training
    electra.train()
    shapes: list[Shape] = []
    try:
        with recorded_shapes(electra, shapes):
            output = electra(batch.to(device), seed)
        with torch.no_grad():
            masked_text = batch.tokens.with_ids(batch.masked_ids_T).to(device)
            logits_MV = electra.generator(masked_text, batch.masked_positions_M.to(device), seed).float().cpu()
        gradients = part_gradients(electra, output.mlm_loss, output.rtd_loss)
    finally:
        electra.train(was_training)

    return Trace(
        text=text,
        model=model,
        seed=seed,
        truncated=len(ids) - len(kept),
        mask_fraction=electra.config.mask_fraction,
        max_predictions=electra.config.max_predictions,
        num_chosen=len(batch.masked_positions_M),
        tokens=_token_traces(batch, plain, seed, output.corrupted_ids_T.cpu(), output.rtd_logits_T.float().cpu()),
        draws=_draws(batch, plain, logits_MV, output.corrupted_ids_T.cpu(), electra.config),
        gradients=gradients,
        shapes=[*_batch_shapes(batch, logits_MV), *sorted(shapes, key=lambda shape: shape.owner != "generator")],
        mlm_loss=output.mlm_loss.item(),
        rtd_loss=output.rtd_loss.item(),
        loss=output.loss.item(),
        generator_weight=electra.config.generator_weight,
        discriminator_weight=electra.config.discriminator_weight,
        temperature=electra.config.temperature,
        uniform_loss=torch.tensor(float(vocabulary)).log().item(),
        base_rate_loss=_binary_entropy(output.is_replaced_T.float().mean().item()),
    )


def masking_numbers(num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """The two random numbers in [0, 1) behind every token's masking in `mask_tokens`, for example 0."""
    column = torch.arange(num_tokens)
    order_T, coin_T, _, _ = philox(seed_tensor(fold(seed, MASKING_STREAM)), column, torch.zeros_like(column), 0)
    return order_T / 2**32, coin_T / 2**32


def _shown(tokenizer: Tokenizer, token_id: int) -> str:
    """The token as people see it, on a terminal or a page; #ID where no token has the id."""
    try:
        return printable(tokenizer.token(token_id))
    except ValueError:
        return f"#{token_id}"


def _token_traces(
    batch: PretrainBatch, tokenizer: Tokenizer, seed: int, corrupted_ids_T: Tensor, logits_T: Tensor
) -> list[TokenTrace]:
    originals_T = batch.tokens.input_ids_T
    chosen = set(batch.masked_positions_M.tolist())
    order_T, coin_T = masking_numbers(len(originals_T), seed)
    replaced_T = corrupted_ids_T != originals_T
    losses_T = F.binary_cross_entropy_with_logits(logits_T, replaced_T.float(), reduction="none")
    return [
        TokenTrace(
            position=t,
            token=_shown(tokenizer, int(originals_T[t])),
            token_id=int(originals_T[t]),
            special=int(originals_T[t]) in (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id),
            order=order_T[t].item(),
            chosen=t in chosen,
            coin=coin_T[t].item(),
            seen=_shown(tokenizer, int(batch.masked_ids_T[t])),
            corrupted=_shown(tokenizer, int(corrupted_ids_T[t])),
            replaced=bool(replaced_T[t]),
            probability=logits_T[t].sigmoid().item(),
            rtd_loss=losses_T[t].item(),
        )
        for t in range(len(originals_T))
    ]


def _draws(
    batch: PretrainBatch, tokenizer: Tokenizer, logits_MV: Tensor, corrupted_ids_T: Tensor, config: PretrainConfig
) -> list[Draw]:
    """For every masked position: the candidates, and which of them was drawn."""
    losses_M = F.cross_entropy(logits_MV, batch.target_ids_M, reduction="none")
    entropies_M = torch.special.entr(logits_MV.softmax(-1)).sum(-1)
    if config.disallow_correct:
        logits_MV = logits_MV.scatter(1, batch.target_ids_M[:, None], -torch.inf)
    probabilities_MV = (logits_MV / config.temperature).softmax(-1)
    draws = []
    for m, position in enumerate(batch.masked_positions_M.tolist()):
        p_V = probabilities_MV[m]
        original, drawn = int(batch.target_ids_M[m]), int(corrupted_ids_T[position])
        shown = p_V.topk(min(CANDIDATES, len(p_V))).indices.tolist()
        shown += [word for word in dict.fromkeys((drawn, original)) if word not in shown]
        found = {
            word: Candidate(
                token=_shown(tokenizer, word),
                probability=p_V[word].item(),
                rank=int((p_V > p_V[word]).sum()) + 1,
                is_original=word == original,
                is_drawn=word == drawn,
            )
            for word in shown
        }
        candidates = sorted(found.values(), key=lambda c: -c.probability)
        figures = losses_M[m].item(), entropies_M[m].item()
        draws.append(Draw(position, found[original], found[drawn], candidates, *figures))
    return draws


def _batch_shapes(batch: PretrainBatch, logits_MV: Tensor) -> list[Shape]:
    """The tensors of the step, in the order in which they are computed."""
    tokens, positions, logits = (batch.tokens.num_tokens,), tuple(batch.masked_positions_M.shape), logits_MV.shape
    names = {
        "input_ids_T": tokens,
        "masked_positions_M": positions,
        "masked_ids_T": tokens,
        "logits_MV": tuple(logits),
        "sampled_ids_M": positions,
        "corrupted_ids_T": tokens,
        "is_replaced_T": tokens,
        "rtd_logits_T": tokens,
    }
    return [Shape("batch", name, " ".join(name.rpartition("_")[2]), shape) for name, shape in names.items()]


def _binary_entropy(fraction: float) -> float:
    pair = torch.tensor([fraction, 1 - fraction])
    return torch.special.entr(pair).sum().item()
