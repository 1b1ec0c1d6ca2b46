"""The operations of ELECTRA under the two ceilings of an H200: bounds by arithmetic, nothing measured here."""

from __future__ import annotations

import numpy as np
from style import STAND_IN, axes, save, target

PEAK, BANDWIDTH = 790e12, 4.3e12  # operations and bytes per second, bf16


def attention(length: int, stored: bool = False, size: int = 64) -> float:
    """Operations per byte of the forward pass of one head; `stored`: S x S probabilities go through memory."""
    moved = 8 * length * size + (12 * length**2 if stored else 0)
    return 4 * length**2 * size / moved


def product(rows: float, inner: float, columns: float) -> float:
    """[rows x inner] [inner x columns] in bf16."""
    return rows * inner * columns / (rows * inner + inner * columns + rows * columns)


TOKENS = 128 * 1024
OPERATIONS = [  # name, operations per byte, colour, place of the name
    ("dropout + residual + LayerNorm", 10 / 6, "soft", (6, -3)),
    ("attention, S = 128, P stored", attention(128, stored=True), "tone1", (-8, 2)),
    ("logits stored and read three times", 128 / 4, "tone1", (-8, 2)),
    ("attention, S = 128", attention(128), "tone0", (-8, 2)),
    ("logits stored once, E = 128", 128, "tone1", (-8, 2)),
    ("Small's feed-forward", product(TOKENS, 256, 1024), "tone0", (-10, 11)),
    ("attention, S = 512", attention(512), "tone0", (0, -13)),
    ("Base's feed-forward", product(TOKENS, 768, 3072), "tone0", (0, 11)),
    ("MLM head on chip", 2432 * 30522 / (2432 + 30522), "tone2", (0, -13)),
]

figure, (plot,) = axes(1, (7.6, 4.0))
intensity = np.geomspace(0.8, 20000, 200)
plot.plot(intensity, np.minimum(PEAK, intensity * BANDWIDTH) / 1e12, color=STAND_IN["ink"], lw=1.6)
for name, at, colour, (right, up) in OPERATIONS:
    bound = min(PEAK, at * BANDWIDTH) / 1e12
    plot.plot(at, bound, "o", color=STAND_IN[colour], ms=6)
    plot.annotate(name, (at, bound), xytext=(right, up), textcoords="offset points", color=STAND_IN[colour],
                  ha="left" if right >= 0 else "right", va="center", fontsize=8.5)  # fmt: skip
plot.axvline(PEAK / BANDWIDTH, color=STAND_IN["soft"], lw=0.9, ls=":")
plot.annotate(f"ridge: {PEAK / BANDWIDTH:.0f}", (PEAK / BANDWIDTH, 4), xytext=(4, 0), textcoords="offset points",
              color=STAND_IN["soft"])  # fmt: skip
plot.set(xscale="log", yscale="log", xlim=(0.8, 20000), ylim=(3, 2000), xlabel="operations per byte",
         ylabel="bound, TFLOP/s")  # fmt: skip
save(figure, target(__file__), "Roofline of an H200 with operations of ELECTRA")
