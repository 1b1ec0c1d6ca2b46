"""Loss and detection on held-out text over the training of the shipped `tiny`: its own log, drawn."""

from __future__ import annotations

import json

from style import HERE, STAND_IN, axes, save, target

LOG = HERE.parents[1] / "electra_core" / "tiny" / "curve.jsonl"
rows = [json.loads(line) for line in LOG.read_text(encoding="utf-8").split("\n") if line]
steps = [row["step"] for row in rows]

figure, (mlm, rtd, auc) = axes(3, (9.6, 2.9))
mlm.plot(steps, [row["eval_mlm_loss"] for row in rows], color=STAND_IN["tone0"], lw=1.8)
mlm.set_title("Generator: MLM loss (nats)")
rtd.plot(steps, [row["eval_rtd_loss"] for row in rows], color=STAND_IN["tone1"], lw=1.8, label="loss")
rtd.plot(steps, [row["eval_base_rate_loss"] for row in rows], color=STAND_IN["soft"], lw=1.2, ls="--",
         label="knows only the base rate")  # fmt: skip
rtd.set_title("Discriminator: RTD loss (nats)")
rtd.legend()
auc.plot(steps, [row["eval_rtd_auc"] for row in rows], color=STAND_IN["tone2"], lw=1.8)
auc.axhline(0.5, color=STAND_IN["soft"], lw=1.2, ls="--")
auc.annotate("guessing", (steps[-1], 0.5), ha="right", va="bottom", xytext=(0, 3), textcoords="offset points",
             color=STAND_IN["soft"])  # fmt: skip
auc.set_title("Discriminator: RTD AUC")
for plot in (mlm, rtd, auc):
    plot.set_xlabel("step")
    plot.set_xlim(0, steps[-1])
save(figure, target(__file__), f"tiny: held-out losses and AUC over {steps[-1]:,} steps")
