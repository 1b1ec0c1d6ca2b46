"""What frozen encoders know about two texts, layer by layer: linear probes of their states, nothing is fine-tuned.

    python -m benchmarks.probing --models electra=tiny mlm=RUN/discriminator random --out FILE.json

Needs STS-B under $ELECTRA_DATA (default ../shared/data): its pairs of sentences are read as [CLS] a [SEP] b [SEP],
probes are fitted on the training file and judged on the dev file. For every layer's output (0: the embeddings):

- `repeated`: does a token's state tell that its word is in the other text, too? Some words are more often than
  others; so tokens are compared only with tokens of the same word, and the probe is judged on words that it was
  not fitted on. AUC in %: of a repeated and a single occurrence of a word, how often the repeated one gets the
  higher value; knowing nothing is 50.
- `similarity`: do the states tell how similar the texts are? Pearson correlation, in %, of the people's judgements
  with a probe of the mean of all tokens' states.
- `verdict`, of a discriminator's last layer: are repeated words more original to it? AUC in %, as for `repeated`,
  of its own judgement of every token.
- `attention`, of the layer that makes the output: how many times as much attention a token pays to its own word in
  the other text as to another token there, in the head in which that is most; 1 if it makes no difference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import environment, replace_text
from electra_core.downstream.named_tasks import find_task
from electra_core.electra import Discriminator, DiscriminatorPredictions
from electra_core.encoder import Encoder
from electra_core.finetuning.model import RANDOM_START_RANGE
from electra_core.hub.layout import architecture
from electra_core.hub.model_places import find_model
from electra_core.initialisation import initialise
from electra_core.labelled_data.features import Features
from electra_core.labelled_data.labelled import BadRows
from electra_core.metrics import roc_auc
from electra_core.model_dir import load, load_config, load_discriminator
from electra_core.packing import TokenBatch
from electra_core.tasks import SequenceClassifier
from electra_core.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parent.parent
RIDGE = 0.01
"""Penalty of the probes, per example, for states of mean 0 and variance 1."""
PAIRS_PER_BATCH = 50


class States(NamedTuple):
    """What an encoder makes of a file of P pairs with W tokens ([CLS] and [SEP] not counted); L layers."""

    words_W: np.ndarray
    """Token ids."""
    repeated_W: np.ndarray
    """bool: whether the other text of the pair has the same id."""
    tokens_LWD: np.ndarray
    """Every token's state, at the embeddings (layer 0) and after every layer."""
    means_LPD: np.ndarray
    """Mean of all states of a pair."""
    attention_LH: np.ndarray
    """Attention to a token of the same word in the other text / to another token there; NaN at layer 0."""


def main(arguments: list[str] | None = None) -> None:
    """Probe every model, write the JSON, print its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "random"], metavar="[NAME[@STEP]=]MODEL",
                        help='model directories; "random": the first one\'s sizes, new weights')  # fmt: skip
    parser.add_argument("--train-pairs", type=int, default=3000)
    parser.add_argument("--dev-pairs", type=int, default=1500)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    data = Path(os.environ.get("ELECTRA_DATA", ROOT.parent / "shared" / "data")) / "glue" / "STS-B"
    if not data.is_dir():
        sys.exit(f"{data}: no such data set; set ELECTRA_DATA")
    rows: list[dict[str, Any]] = []
    first = options.models[0].rpartition("=")[2]
    for given in options.models:
        name, _, model = given.rpartition("=")
        encoder = random_encoder(first) if model == "random" else load_encoder(model)
        tokenizer = load_tokenizer(find_model(first if model == "random" else model, "discriminator"))
        files = [
            read(data, *part, tokenizer) for part in (("train", options.train_pairs), ("dev", options.dev_pairs))
        ]
        called, _, step = (name or model).partition("@")
        after = {"step": int(step)} if step else {}
        head = None if model == "random" else detection_head(model)
        for row in probed(encoder, head, tokenizer, *files):
            rows.append({"model": called} | after | row)
            print(*(f"{key} {value}" for key, value in rows[-1].items()))
    record = {"environment": environment(torch.device("cpu")), "rows": rows}
    replace_text(options.out, json.dumps(record, indent=1) + "\n")


def load_encoder(model: str) -> Encoder:
    """The encoder of any model directory, whatever its head."""
    return load(SequenceClassifier, model, head_may_be_new=True).encoder


def detection_head(model: str) -> DiscriminatorPredictions | None:
    """A discriminator's head; None of another model."""
    _, config = load_config(find_model(model))
    if config.get("architectures") != [architecture(Discriminator)]:
        return None
    return load_discriminator(model).discriminator_predictions


def random_encoder(model: str) -> Encoder:
    """One of the same sizes, as fine-tuning from a random start has it."""
    encoder = load_encoder(model)
    initialise(encoder, RANDOM_START_RANGE, seed=0)
    return encoder


def read(folder: Path, split: str, count: int, tokenizer: Tokenizer) -> Features:
    """The first pairs of a file, encoded, with their scores (0 to 1) as targets."""
    named = find_task("sts-b")
    assert named is not None
    file = named.find(folder, split)
    examples = list(named.task.read(file, BadRows(file)))[:count]
    return named.task.fitted(examples).encode(examples, tokenizer)


def probed(
    encoder: Encoder, head: DiscriminatorPredictions | None, tokenizer: Tokenizer, train: Features, dev: Features
) -> Iterator[dict[str, Any]]:
    """The figures of every layer."""
    fitted, judged = states_of(encoder, tokenizer, train), states_of(encoder, tokenizer, dev)
    last = len(encoder.layers)
    for layer in range(last + 1):
        similarity = probe(fitted.means_LPD[layer], np.asarray(train.targets), judged.means_LPD[layer])
        row = {
            "layer": layer,
            "repeated": 100 * repeated_words(fitted, judged, layer),
            "similarity": 100 * float(np.corrcoef(similarity, np.asarray(dev.targets))[0, 1]),
            "verdict": 100 * verdict(judged, head) if head is not None and layer == last else None,
            "attention": float(judged.attention_LH[layer].max()) if layer else None,
        }
        yield {name: value if value is None else round(value, 1) for name, value in row.items()}


def repeated_words(fitted: States, judged: States, layer: int) -> float:
    """AUC of a probe that tells repeated words, among tokens of the same word. Fitted on words with an even id."""
    even_W, odd_W = fitted.words_W % 2 == 0, judged.words_W % 2 == 1
    values, targets = fitted.tokens_LWD[layer][even_W], fitted.repeated_W[even_W].astype(np.float64)
    words = fitted.words_W[even_W]
    scores = probe(_less_mean(values, words), _less_mean(targets, words), judged.tokens_LWD[layer][odd_W])
    return auc_within_words(judged.words_W[odd_W], judged.repeated_W[odd_W], scores)


def verdict(states: States, head: DiscriminatorPredictions) -> float:
    """AUC of a discriminator's verdict that a token is original, as if it were one that its word is repeated."""
    with torch.no_grad():
        replaced_W = head(torch.from_numpy(states.tokens_LWD[-1]).float()).numpy()
    return auc_within_words(states.words_W, states.repeated_W, -replaced_W)


def auc_within_words(words_W: np.ndarray, truth_W: np.ndarray, scores_W: np.ndarray) -> float:
    """Of a true and a false token of the same word, how often the true one has the higher score."""
    right = pairs = 0.0
    for mine in _groups(words_W):
        truth = truth_W[mine]
        weight = float(truth.sum() * (~truth).sum())
        if weight:
            right, pairs = right + weight * roc_auc(truth, scores_W[mine]), pairs + weight
    return right / pairs


def probe(fitted_RD: np.ndarray, targets_R: np.ndarray, judged_QD: np.ndarray) -> np.ndarray:
    """[Q]: predictions of a ridge regression, up to a constant."""
    mean, scale = fitted_RD.mean(0), fitted_RD.std(0) + 1e-6
    x = (fitted_RD - mean) / scale
    penalty = RIDGE * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(x.T @ x + penalty, x.T @ (targets_R - targets_R.mean()))
    return (judged_QD - mean) / scale @ weights


def _groups(words_W: np.ndarray) -> list[np.ndarray]:
    """The places of every word."""
    order = np.argsort(words_W, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(words_W[order])) + 1)


def _less_mean(values: np.ndarray, words_W: np.ndarray) -> np.ndarray:
    """`values` less the mean of the same word's."""
    result = values.copy()
    for mine in _groups(words_W):
        result[mine] -= values[mine].mean(0)
    return result


@torch.no_grad()
def states_of(encoder: Encoder, tokenizer: Tokenizer, features: Features) -> States:
    """The states of all pairs of a file."""
    layers, heads = len(encoder.layers), encoder.config.num_attention_heads
    caught: list[Tensor] = []  # every layer's input, of one batch
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0])) for layer in encoder.layers
    ]
    words, repeated, tokens, means = [], [], [], []
    attention_LHK = torch.zeros(layers, heads, 2, dtype=torch.float64)
    for first in range(0, len(features), PAIRS_PER_BATCH):
        batch = features.batch(range(first, min(first + PAIRS_PER_BATCH, len(features)))).tokens
        caught.clear()
        last_TD = encoder(batch)
        states_LTD = torch.stack([*caught, last_TD])
        is_word_T = (batch.input_ids_T != tokenizer.cls_id) & (batch.input_ids_T != tokenizer.sep_id)
        repeated_T = torch.zeros_like(is_word_T)
        for place in spans(batch):
            same, other = same_and_other(batch, place, is_word_T)
            repeated_T[place] = same.any(1)
            means.append(states_LTD[:, place].mean(1))
            for layer, inputs_TD in enumerate(states_LTD[:-1]):
                attention_LHK[layer] += attention_paid(encoder, layer, inputs_TD[place], same, other)
        words.append(batch.input_ids_T[is_word_T])
        repeated.append(repeated_T[is_word_T])
        tokens.append(states_LTD[:, is_word_T])
    for hook in hooks:
        hook.remove()
    ratio_LH = attention_LHK[:, :, 0] / attention_LHK[:, :, 1]
    return States(
        torch.cat(words).numpy(), torch.cat(repeated).numpy(), torch.cat(tokens, 1).double().numpy(),
        torch.stack(means, 1).double().numpy(), np.concatenate([np.full((1, heads), np.nan), ratio_LH.numpy()]),
    )  # fmt: skip


def spans(batch: TokenBatch) -> list[slice]:
    """The tokens of every sequence."""
    borders = batch.cu_seqlens.tolist()
    return [slice(start, end) for start, end in itertools.pairwise(borders)]


def same_and_other(batch: TokenBatch, place: slice, is_word_T: Tensor) -> tuple[Tensor, Tensor]:
    """bool [S, S] twice: keys of the other text that have the query's word, and those that have another one."""
    ids_S, segments_S, is_word_S = batch.input_ids_T[place], batch.segment_ids_T[place], is_word_T[place]
    across = (segments_S[:, None] != segments_S) & is_word_S[:, None] & is_word_S
    same = across & (ids_S[:, None] == ids_S)
    return same, across & ~same


def attention_paid(encoder: Encoder, layer: int, inputs_SD: Tensor, same: Tensor, other: Tensor) -> Tensor:
    """Float [H, 2]: mean attention to a key of `same` and to one of `other`, summed over the queries with both."""
    attention = encoder.layers[layer].attention
    q_HSK, k_HSK, _ = (
        attention.qkv(inputs_SD).view(-1, 3, attention.num_heads, attention.head_size).permute(1, 2, 0, 3)
    )
    weights_HSS = torch.softmax(q_HSK @ k_HSK.transpose(1, 2) * attention.head_size**-0.5, dim=2)
    both_S = same.any(1) & other.any(1)
    paid = [(weights_HSS * keys).sum(2) / keys.sum(1).clamp(min=1) for keys in (same, other)]
    return torch.stack(paid, 2)[:, both_S].sum(1)


if __name__ == "__main__":
    main()
