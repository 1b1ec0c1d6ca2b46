"""The two-level draw converges to the softmax: a row of the shipped generator, drawn by the project's `draw`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from electra_kernels.rng import seed_tensor
from electra_kernels.sample_replace_reference import draw, tile_sums
from style import STAND_IN, axes, save, target

import electra_core
from electra_core.packing import pack
from electra_core.trace import load_electra

DRAWS, CHUNK = 1 << 17, 1 << 13
TEXT = "the chef cooked the [MASK] in the old kitchen"

electra, tokenizer = load_electra(Path(electra_core.__file__).parent / "tiny" / "discriminator")
before, after = TEXT.split("[MASK]")
ids = [tokenizer.cls_id, *tokenizer.encode(before), tokenizer.mask_id, *tokenizer.encode(after), tokenizer.sep_id]
with torch.no_grad():
    logits_MV = electra.eval().generator(pack([ids]), torch.tensor([ids.index(tokenizer.mask_id)]))
softmax_V = logits_MV[0].double().softmax(-1)

weights_RV = softmax_V.float().expand(CHUNK, -1)
sums_RC = tile_sums(weights_RV[:1]).expand(CHUNK, -1)
counts, checkpoints, distances = torch.zeros(len(softmax_V)), [], []
for first in range(0, DRAWS, CHUNK):
    drawn = draw(weights_RV, sums_RC, seed_tensor(1), torch.arange(first, first + CHUNK), stream=0)
    for end in sorted({1 << k for k in range(6, 18)} & set(range(first + 1, first + CHUNK + 1))):
        so_far = counts + torch.bincount(drawn[: end - first], minlength=len(counts))
        checkpoints.append(end)
        distances.append(float((so_far / end - softmax_V).abs().sum() / 2))
    counts += torch.bincount(drawn, minlength=len(counts))

# What exact draws are expected to be off by: half the mean absolute deviation of binomials (normal approximation).
expected = [float((2 / torch.pi * softmax_V * (1 - softmax_V) / n).sqrt().minimum(2 * softmax_V).sum() / 2)
            for n in checkpoints]  # fmt: skip

figure, (bars, curve) = axes(2, (8.8, 3.2))
top = softmax_V.topk(9).indices
place = np.arange(len(top))
bars.barh(place - 0.2, 100 * softmax_V[top], 0.38, color=STAND_IN["tone0"], label="softmax")
bars.barh(place + 0.2, 100 * counts[top] / DRAWS, 0.38, color=STAND_IN["tone1"], label=f"drawn, of {DRAWS:,}")
bars.set_yticks(place, [tokenizer.token(int(word)).strip("▁ ") for word in top])
bars.invert_yaxis()
bars.set(xlabel="%", title=TEXT.replace("[MASK]", "____"), xlim=(0, 150 * float(softmax_V.max())))
bars.legend(loc="lower right")  # beside the shortest bars
curve.plot(checkpoints, distances, "o-", ms=4, color=STAND_IN["tone1"], label="measured")
curve.plot(checkpoints, expected, "--", color=STAND_IN["soft"], label="expected of exact draws")
curve.set(xscale="log", yscale="log", xlabel="draws", title="Total variation distance to the softmax")
curve.legend()
save(figure, target(__file__), "The two-level draw converges to the softmax")
