"""TensorFlow 1 checkpoints of google-research/electra -> model directories.

    electra/embeddings/word_embeddings                        electra.embeddings.word_embeddings.weight
    electra/encoder/layer_3/attention/self/query/kernel       electra.encoder.layer.3.attention.self.query.weight
    .../LayerNorm/gamma, beta                                 ...LayerNorm.weight, bias
    discriminator_predictions/dense_1/kernel                  discriminator_predictions.dense_prediction.weight
    generator/encoder/...                                     electra.encoder....            (of the generator)
    generator_predictions/output_bias                         generator_lm_head.bias

Kernels are [in, out] there and [out, in] here. The generator shares `electra/embeddings` unless it has
`generator/embeddings` of its own, and is the discriminator itself if there is no `generator/` at all. Adam's
moments (`adam_m`, `adam_v`) and `global_step` are left out. Sizes are inferred from the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from electra_core.config import EncoderConfig
from electra_core.conversion.tf_bundle import Variable, read_bundle
from electra_core.electra import Discriminator, Generator
from electra_core.encoder import Encoder
from electra_core.errors import UserError, option
from electra_core.files.clutter import entries
from electra_core.hub.layout import to_hub
from electra_core.model_dir import save_pretrained
from electra_core.tokenizer import WordPieceTokenizer

HEAD_SIZE = 64  # of every model that google-research/electra describes; a checkpoint does not say


def convert_checkpoint(
    checkpoint: str | Path, out: str | Path, *, num_heads: int | None = None, lowercase: bool = True
) -> list[Path]:
    """Writes OUT/discriminator and OUT/generator, where the checkpoint has them.

    A `vocab.txt` beside the checkpoint becomes their tokenizer.

    Args:
        checkpoint: PREFIX of PREFIX.index and PREFIX.data-*, or a directory with one checkpoint.
        num_heads: attention heads of the discriminator; None: its hidden size / 64.
        lowercase: whether the vocabulary is uncased.

    Returns:
        The directories written.

    Raises:
        UserError: the checkpoint is missing, damaged, or of another model.
    """
    prefix = _prefix(Path(checkpoint))
    variables = read_bundle(prefix)
    vocab = prefix.parent / "vocab.txt"
    tokenizer = WordPieceTokenizer.from_vocab(vocab, lowercase=lowercase) if vocab.is_file() else None
    written = []
    for kind in (Discriminator, Generator):
        stored = hub_variables(variables, generator=kind is Generator)
        head = "generator_predictions." if kind is Generator else "discriminator_predictions."
        if not any(name.startswith(head) for name in stored):
            continue
        config = infer_config(stored, num_heads if kind is Discriminator else None)
        if tokenizer is not None:
            tokenizer.check_fits(config.vocab_size, vocab)
        model = kind(config, Encoder(config))
        _fill(model, stored, prefix)
        directory = Path(out) / kind.__name__.lower()
        save_pretrained(model, directory, tokenizer=tokenizer)
        written.append(directory)
    if not written:
        raise UserError(f"{prefix}: not an ELECTRA checkpoint (it has neither of the two heads)")
    return written


def hub_variables(variables: Mapping[str, Variable], *, generator: bool) -> dict[str, Variable]:
    """The variables of one of the two models, by their Hub names."""
    tops = {"electra", "generator_predictions" if generator else "discriminator_predictions"}
    has_own_encoder = any(name.startswith("generator/encoder/") for name in variables)
    found: dict[str, Variable] = {}
    for name in sorted(variables):  # "generator/..." after "electra/...", so that its own embeddings win
        top, _, rest = name.partition("/")
        if name.endswith(("/adam_m", "/adam_v")):
            continue
        if generator and top == "generator":
            top = "electra"
        elif generator and top == "electra" and has_own_encoder and not rest.startswith("embeddings/"):
            continue  # the discriminator's encoder
        if top in tops:
            found[hub_name(f"{top}/{rest}")] = variables[name]
    return found


def hub_name(name: str) -> str:
    """`electra/encoder/layer_3/output/dense/kernel` -> `electra.encoder.layer.3.output.dense.weight`"""
    if name == "generator_predictions/output_bias":
        return "generator_lm_head.bias"
    *path, last = name.split("/")
    path = ["dense_prediction" if part == "dense_1" else part.replace("layer_", "layer.") for part in path]
    if last.endswith("_embeddings"):
        path.append(last)
    last = "bias" if last in ("bias", "beta") else "weight"
    return ".".join([*path, last])


def infer_config(stored: Mapping[str, Variable], num_heads: int | None = None) -> EncoderConfig:
    """The sizes of a model, from the shapes of its variables (kernels being [in, out])."""
    try:
        vocab_size, embedding_size = stored["electra.embeddings.word_embeddings.weight"].shape
        hidden_size, intermediate_size = stored["electra.encoder.layer.0.intermediate.dense.weight"].shape
        positions, _ = stored["electra.embeddings.position_embeddings.weight"].shape
        types, _ = stored["electra.embeddings.token_type_embeddings.weight"].shape
    except (KeyError, ValueError) as error:
        raise UserError(f"not an ELECTRA checkpoint: {error} is missing or of the wrong shape") from error
    layers = {name.split(".")[3] for name in stored if name.startswith("electra.encoder.layer.")}
    try:
        return EncoderConfig(
            vocab_size=vocab_size,
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            num_hidden_layers=len(layers),
            num_attention_heads=num_heads or max(1, hidden_size // HEAD_SIZE),
            intermediate_size=intermediate_size,
            max_position_embeddings=positions,
            type_vocab_size=types,
        )
    except ValueError as error:
        raise UserError(f"{option('num_heads')}: {error}") from error


@torch.no_grad()
def _fill(model: Discriminator | Generator, stored: Mapping[str, Variable], prefix: Path) -> None:
    targets = to_hub(dict(model.named_parameters()))
    problems = [f"missing: {name}" for name in targets if name not in stored]
    problems += [f"unexpected: {name}" for name in stored if name not in targets]
    for name in targets.keys() & stored.keys():
        shape = tuple(targets[name].shape)
        if stored[name].shape != (shape[::-1] if _is_kernel(name) else shape):
            problems.append(f"wrong shape: {name} {stored[name].shape}")
    if problems:
        kind = type(model).__name__
        raise UserError(
            f"{prefix}: does not contain the variables of a {kind}\n  " + "\n  ".join(sorted(problems)[:20])
        )
    for name, target in targets.items():
        values = torch.from_numpy(stored[name].read())
        target.copy_(values.T if _is_kernel(name) else values)


def _is_kernel(name: str) -> bool:
    """Whether a weight is a linear layer's; embeddings and LayerNorm are stored as they are."""
    return name.endswith(".weight") and not name.endswith(("LayerNorm.weight", "_embeddings.weight"))


def _prefix(checkpoint: Path) -> Path:
    """The checkpoint prefix that a user's path means."""
    if not checkpoint.is_dir():
        for suffix in (".index", ".meta", ".data-00000-of-00001"):
            if checkpoint.name.endswith(suffix):
                return checkpoint.with_name(checkpoint.name.removesuffix(suffix))
        return checkpoint
    found = sorted(entries(checkpoint, "*.index"))
    if len(found) != 1:
        names = ", ".join(path.stem for path in found) or "none"
        raise UserError(
            f"{checkpoint}: expected one checkpoint in this directory, got {names}; give the prefix of one"
        )
    return found[0].with_suffix("")
