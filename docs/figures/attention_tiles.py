"""Which tiles the forward attention kernel visits for a packed batch, with the project's own tile table."""

from __future__ import annotations

from electra_kernels.attention_triton import TILES
from style import save_svg, target

LENGTHS = (512, 300, 180)
TILE = TILES[90]["forward"][64]  # an H100 or H200, head dim 64, half precision
SCALE, GAP, TOP, LEFT = 0.42, 36.0, 58.0, 24.0
LONGEST = max(LENGTHS)


def rectangle(x: float, y: float, width: float, height: float, style: str) -> str:
    """A rectangle; lengths in tokens, places in units of the figure."""
    size = f'width="{width * SCALE:.1f}" height="{height * SCALE:.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} style="{style}"/>'


def text(x: float, y: float, words: str, style: str = "fill: var(--soft); font-size: 11px") -> str:
    """Words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" style="{style}">{words}</text>'


def tile(left: float, query: int, key: int) -> str:
    """A tile, darker the later it is visited, with the number of its turn."""
    step = key // TILE.keys
    opacity = 0.16 + 0.5 * step * TILE.keys / LONGEST
    style = f"fill: var(--tone0); stroke: var(--tone0); fill-opacity: {opacity:.2f}"
    x, y = left + key * SCALE, TOP + query * SCALE
    number = text(x + TILE.keys * SCALE / 2 - 4, y + TILE.queries * SCALE / 2 + 4, str(step + 1),
                  "fill: var(--ink); font-size: 10px")  # fmt: skip
    return rectangle(x + 1, y + 1, TILE.keys - 2 / SCALE, TILE.queries - 2 / SCALE, style) + number


def sequence(left: float, length: int) -> list[str]:
    """A sequence's square, the square that padding would make of it, and its tiles."""
    tiles = [tile(left, q, k) for q in range(0, length, TILE.queries) for k in range(0, length, TILE.keys)]
    return [
        rectangle(left, TOP, LONGEST, LONGEST, "fill: none; stroke: var(--line); stroke-dasharray: 3 3"),
        text(left, TOP - 12, f"sequence of {length}", "fill: var(--ink); font-size: 13px"),
        *tiles,
        rectangle(left, TOP, length, length, "fill: none; stroke: var(--tone1); stroke-width: 1.6"),
    ]


def entries(length: int) -> int:
    """Entries of the probabilities that a sequence's tiles hold."""
    return -(-length // TILE.queries) * TILE.queries * -(-length // TILE.keys) * TILE.keys


parts, left = [], LEFT
for length in LENGTHS:
    parts += sequence(left, length)
    left += LONGEST * SCALE + GAP
computed, padded = sum(map(entries, LENGTHS)), len(LENGTHS) * LONGEST**2
bottom = TOP + LONGEST * SCALE
walk = "One program per row of tiles (queries); it walks over the keys in the order of the numbers."
parts.append(text(LEFT, 22, walk, "fill: var(--ink); font-size: 13px"))
share = f"Computed: {computed:,} of {padded:,} entries ({100 * computed / padded:.0f}%)."
legend = f"Tiles of {TILE.queries} queries x {TILE.keys} keys. Orange: the sequence. Dashed: padding to {LONGEST}."
parts.append(text(LEFT, bottom + 22, f"{legend} {share}"))
save_svg(target(__file__), "\n".join(parts), left - GAP + LEFT, bottom + 38, "Tiles of the attention kernel")
