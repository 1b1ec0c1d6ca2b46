"""The library's side of the pre-training benchmark: ELECTRA and BERT's objective built from `transformers`, in the
ways of `PEERS` (`bench_pretrain.py` says how they differ)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_core.config import EncoderConfig, PretrainConfig, generator_config
from electra_core.packing import PretrainBatch, to_padded

LABELS = "transformers"


@dataclass(frozen=True)
class Peer:
    """How a program with the library's models computes logits and attention."""

    where: str
    """ "labels": logits and loss at every position, by the library. "logits": logits at every position, of which
    the masked ones are selected. "states": hidden states are selected, so only masked positions have logits."""
    attention: str = "sdpa"
    compiled: bool = False
    """Whether torch.compile compiles the encoders, forward and backward."""
    objectives: tuple[str, ...] = ("electra", "mlm")


PEERS = {
    LABELS: Peer("labels"),
    "transformers, masked logits": Peer("logits", objectives=("electra",)),
    "transformers, masked states": Peer("states"),
    "transformers, masked states, eager attention": Peer("states", "eager"),
    "transformers, masked states, compiled": Peer("states", compiled=True),
    "transformers, masked states, eager attention, compiled": Peer("states", "eager", compiled=True),
}
BY_DEFAULT = tuple(name for name, peer in PEERS.items() if not peer.compiled)
"""Compiling takes minutes, and a C++ compiler on a CPU."""


def peers(pretrain: PretrainConfig, chosen: Sequence[str] = BY_DEFAULT) -> tuple[str, ...]:
    """Names of the library's programs for an objective, among those that were chosen."""
    return tuple(name for name in PEERS if name in chosen and pretrain.objective in PEERS[name].objectives)


def hub_model(config: EncoderConfig, pretrain: PretrainConfig, name: str) -> nn.Module:
    """The model of one of `peers`."""
    peer = PEERS[name]
    return HubMaskedLM(config, peer) if pretrain.objective == "mlm" else HubElectra(config, pretrain, peer)


def hub_config(config: EncoderConfig) -> Any:
    """The library's configuration of the same sizes."""
    from transformers import ElectraConfig

    return ElectraConfig(
        vocab_size=config.vocab_size,
        embedding_size=config.embedding_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        hidden_dropout_prob=config.hidden_dropout_prob,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        layer_norm_eps=config.layer_norm_eps,
    )


def padded_inputs(batch: PretrainBatch) -> dict[str, Tensor]:
    """A batch as the library's data collator gives it: padded, with a mask, labels -100 at unmasked positions."""
    tokens = batch.tokens
    labels_T = torch.full_like(tokens.input_ids_T, -100)
    labels_T[batch.masked_positions_M] = batch.target_ids_M
    originals = to_padded(tokens.input_ids_T, tokens)
    return {
        "input_ids": to_padded(batch.masked_ids_T, tokens),
        "attention_mask": to_padded(torch.ones_like(tokens.input_ids_T), tokens),
        "token_type_ids": torch.zeros_like(originals),
        "labels": to_padded(labels_T, tokens, fill=-100),
        "originals": originals,
    }


class HubElectra(nn.Module):
    """ELECTRA built from the library's two models."""

    def __init__(self, config: EncoderConfig, pretrain: PretrainConfig, peer: Peer):
        super().__init__()
        from transformers import ElectraForMaskedLM, ElectraForPreTraining

        self.config, self.peer = pretrain, peer
        self.generator = ElectraForMaskedLM(hub_config(generator_config(config, pretrain)))
        self.discriminator = ElectraForPreTraining(hub_config(config))
        self.discriminator.electra.embeddings = self.generator.electra.embeddings
        for part in (self.generator, self.discriminator):
            prepare(part, peer)

    def forward(self, inputs: dict[str, Tensor], drawn_M: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(joint loss, MLM loss, RTD loss); `drawn_M` replaces its own draws."""
        about = {name: inputs[name] for name in ("attention_mask", "token_type_ids")}
        masked_NS = inputs["labels"] != -100
        mlm_loss, logits_MV = masked_lm(self.generator, inputs, self.peer.where)
        if drawn_M is None:
            with torch.no_grad():
                noise_MV = -torch.log(-torch.log(torch.rand_like(logits_MV).clamp_(min=1e-20, max=1 - 1e-7)))
                drawn_M = (logits_MV + noise_MV).argmax(-1)
        corrupted_NS = inputs["originals"].masked_scatter(masked_NS, drawn_M)
        replaced_NS = (corrupted_NS != inputs["originals"]).long()
        rtd_loss = self.discriminator(input_ids=corrupted_NS, labels=replaced_NS, **about).loss
        loss = self.config.generator_weight * mlm_loss + self.config.discriminator_weight * rtd_loss
        return loss, mlm_loss, rtd_loss


class HubMaskedLM(nn.Module):
    """BERT's objective with the library's model of the discriminator's size."""

    def __init__(self, config: EncoderConfig, peer: Peer):
        super().__init__()
        from transformers import ElectraForMaskedLM

        self.generator, self.peer = ElectraForMaskedLM(hub_config(config)), peer
        prepare(self.generator, peer)

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor]:
        """(loss,)"""
        return (masked_lm(self.generator, inputs, self.peer.where)[0],)


def prepare(model: Any, peer: Peer) -> None:
    """The library's model with the peer's attention, its encoder compiled if the peer's is."""
    model.set_attn_implementation(peer.attention)
    if peer.compiled:
        model.electra.compile()  # in place, so that the weights keep their names


def masked_lm(model: Any, inputs: dict[str, Tensor], where: str) -> tuple[Tensor, Tensor]:
    """Loss and fp32 logits [M, V] of the library's masked LM at the masked positions; `where` as in `Peer`."""
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    masked_NS, targets_M = inputs["labels"] != -100, inputs["labels"][inputs["labels"] != -100]
    if where == "labels":
        output = model(**given, labels=inputs["labels"])
        return output.loss, output.logits[masked_NS].float()
    if where == "logits":
        logits_MV = model(**given).logits[masked_NS].float()
    else:
        hidden_MD = model.electra(**given).last_hidden_state[masked_NS]
        logits_MV = model.generator_lm_head(model.generator_predictions(hidden_MD)).float()
    return F.cross_entropy(logits_MV, targets_M), logits_MV


def hub_steps(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    config: PretrainConfig,
    autocast: AbstractContextManager[Any],
) -> Iterator[None]:
    """The usual loop, one optimizer step for each item taken."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    for inputs in itertools.cycle(batches):
        with autocast:
            loss = model(inputs)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield
