"""Objectives of one's own, for tests (registered on import): COCO-LM's sequence loss beside ELECTRA's, the same of
crops, and one with a buffer that every forward pass in training writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from electra_kernels.rng import Seed
from torch import Tensor

from electra_core.config import EncoderConfig, PretrainConfig
from electra_core.electra import Electra, PretrainBatch, PretrainOutput
from electra_core.objectives import register
from electra_core.packing import TokenBatch, from_lengths


def finding(texts_ND: Tensor, others_ND: Tensor, batch: PretrainBatch) -> tuple[Tensor, Tensor]:
    """The loss of finding each text's other form among the batch's, and how often it is found."""
    logits_NN = texts_ND @ others_ND.T / 0.07
    logits_NN = logits_NN.masked_fill(batch.sequence_weights_N == 0, -1e4)  # filling: nobody's rivals
    rows_N = torch.arange(len(logits_NN), device=logits_NN.device)
    loss_N, hits_N = F.cross_entropy(logits_NN, rows_N, reduction="none"), (logits_NN.argmax(1) == rows_N).float()
    return batch.mean_over_sequences(loss_N), batch.mean_over_sequences(hits_N)


@register
class Contrastive(Electra):
    """The corrupted and the masked form of a text find each other among those of the batch."""

    objective = "contrastive"

    def forward(self, batch: PretrainBatch, seed: Seed) -> PretrainOutput:
        output, token_seed = super().forward(batch, seed), batch.seeds(seed)[0]

        def first_ND(ids_T: Tensor) -> Tensor:
            text = batch.tokens.with_ids(ids_T)
            hidden_ND = self.discriminator.encoder(text, token_seed, batch.first_tokens_N)
            return F.normalize(hidden_ND.float(), dim=1)

        loss, hits = finding(first_ND(output.corrupted_ids_T), first_ND(batch.masked_ids_T), batch)
        return replace(output, loss=output.loss + loss, more={"contrastive_loss": loss, "found": hits})


@register
class Crops(Electra):
    """A text finds its own crop among those of the batch."""

    objective = "crops"

    def forward(self, batch: PretrainBatch, seed: Seed) -> PretrainOutput:
        output, token_seed = super().forward(batch, seed), batch.seeds(seed)[0]

        def first_ND(text: TokenBatch) -> Tensor:
            return F.normalize(self.discriminator.encoder(text, token_seed, text.first_tokens_N).float(), dim=1)

        loss, _ = finding(first_ND(batch.tokens), self.crops(first_ND, batch.tokens), batch)
        return replace(output, loss=output.loss + loss, more={"crop_loss": loss})

    def crops(self, first_ND: Callable[[TokenBatch], Tensor], text: TokenBatch) -> Tensor:
        """[N, D]: of each crop; sequences are cut in two on the device, as docs/changing.md does it."""
        begins_N, ends_N = text.cu_seqlens[:-1], text.cu_seqlens[1:]
        cuts_N = begins_N + ((ends_N - begins_N) * 0.5).ceil().int()
        pieces = torch.cat((torch.stack((begins_N, cuts_N), dim=1).flatten(), ends_N[-1:]))
        return first_ND(replace(text, cu_seqlens=pieces))[::2]


@register
class HostCrops(Crops):
    """The same crops, as texts of their own, whose lengths are read on the host."""

    objective = "host-crops"

    def crops(self, first_ND: Callable[[TokenBatch], Tensor], text: TokenBatch) -> Tensor:
        ids = [ids_S[: -(-len(ids_S) // 2)] for ids_S in text.split()]
        flat_T = torch.cat(ids)
        return first_ND(from_lengths(flat_T, torch.zeros_like(flat_T), [len(ids_S) for ids_S in ids]))


@register
class Running(Electra):
    """The encoder's [CLS] stays near its running mean, a buffer."""

    objective = "running"

    def __init__(self, config: EncoderConfig, pretrain: PretrainConfig):
        super().__init__(config, pretrain)
        self.mean_D: Tensor
        self.register_buffer("mean_D", torch.zeros(config.hidden_size))
        self.register_buffer("seen", torch.tensor(False))

    def forward(self, batch: PretrainBatch, seed: Seed) -> PretrainOutput:
        output, token_seed = super().forward(batch, seed), batch.seeds(seed)[0]
        text = batch.tokens.with_ids(output.corrupted_ids_T)
        first_ND = self.discriminator.encoder(text, token_seed, batch.first_tokens_N).float()
        before_D = self.mean_D.clone()
        loss = batch.mean_over_sequences((first_ND - before_D).square().mean(1))
        if self.training:
            with torch.no_grad():
                new_D = (first_ND * batch.sequence_weights_N[:, None]).sum(0)
                self.keep(0.9 * before_D + 0.1 * new_D)
                self.seen.fill_(True)
        return replace(output, loss=output.loss + loss, more={"distance": loss.detach()})

    def keep(self, mean_D: Tensor) -> None:
        """Writes the mean."""
        self.mean_D.copy_(mean_D)


@register
class Replacing(Running):
    """The same, where the mean is another tensor after every step."""

    objective = "replacing"

    def keep(self, mean_D: Tensor) -> None:
        self.mean_D = mean_D
