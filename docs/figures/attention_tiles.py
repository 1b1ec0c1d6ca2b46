"""Which tiles the forward attention kernel visits for a packed batch, with the tiles of the project's own table."""

from __future__ import annotations

from electra_kernels.attention_triton import TILES
from style import save_svg, target

LENGTHS = (512, 300, 180)
TILE = TILES[90]["forward"][64]  # an H100 or H200, head dim 64, half precision
SCALE, GAP, TOP, LEFT = 0.42, 36.0, 58.0, 24.0


def rectangle(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" style="{style}"/>'


def text(x: float, y: float, words: str, style: str = "fill: var(--soft); font-size: 11px") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" style="{style}">{words}</text>'


parts, left, computed = [], LEFT, 0
longest = max(LENGTHS)
for length in LENGTHS:
    side = longest * SCALE
    parts.append(rectangle(left, TOP, side, side, "fill: none; stroke: var(--line); stroke-dasharray: 3 3"))
    parts.append(text(left, TOP - 12, f"sequence of {length}", "fill: var(--ink); font-size: 13px"))
    for row in range(0, length, TILE.queries):
        for step, key in enumerate(range(0, length, TILE.keys)):
            fill = "fill: var(--tone0); stroke: var(--tone0); stroke-width: 1"
            width, height = TILE.keys * SCALE, TILE.queries * SCALE
            opacity = 0.16 + 0.5 * step / (longest / TILE.keys)
            parts.append(rectangle(left + key * SCALE + 1, TOP + row * SCALE + 1, width - 2, height - 2,
                                   f"{fill}; fill-opacity: {opacity:.2f}"))  # fmt: skip
            parts.append(text(left + (key + TILE.keys / 2) * SCALE - 4, TOP + (row + TILE.queries / 2) * SCALE + 4,
                              str(step + 1), "fill: var(--ink); font-size: 10px"))  # fmt: skip
            computed += TILE.queries * TILE.keys
    edge = length * SCALE
    parts.append(rectangle(left, TOP, edge, edge, "fill: none; stroke: var(--tone1); stroke-width: 1.6"))
    left += side + GAP
padded = len(LENGTHS) * longest**2
bottom = TOP + longest * SCALE
parts.append(text(LEFT, 22, "One program per row of tiles (queries); it walks over the keys in the order of the numbers.",
                  "fill: var(--ink); font-size: 13px"))  # fmt: skip
parts.append(text(LEFT, bottom + 22, f"Tiles of {TILE.queries} queries x {TILE.keys} keys. Orange: the sequence. Dashed: padding "
                  f"to {longest}. Computed: {computed:,} of {padded:,} entries ({100 * computed / padded:.0f}%)."))  # fmt: skip
save_svg(target(__file__), "\n".join(parts), left - GAP + LEFT, bottom + 38, "Tiles of the attention kernel")
