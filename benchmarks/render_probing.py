"""The benchmark page's section on probes of frozen states (`probing`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import svg

Row = dict[str, Any]
PROBES = {
    "similarity": "How similar two texts are, by a probe of their mean state (Pearson, %)",
    "repeated": "Whether a token's word is in the other text, too (AUC, %; 50: nothing is known)",
    "verdict": "Whether a discriminator finds repeated words more original than the same word elsewhere (AUC, %)",
    "attention": "Attention to the same word in the other text / to another one there (the head with most)",
}
"""Figure of a row -> what it says."""


def tables(rows: Sequence[Row]) -> list[str]:
    """A table for each probe: models by those layers that have figures."""
    lines = []
    for probe, title in PROBES.items():
        layers = sorted({row["layer"] for row in rows if row.get(probe) is not None})
        heads = ("embeddings" if layer == 0 else f"layer {layer}" for layer in layers)
        lines += [f"{title}:", "", f"| model | {' | '.join(heads)} |", "|---" * (1 + len(layers)) + "|"]
        for name, found in _models(rows).items():
            values = [found[layer].get(probe) for layer in layers]
            if any(value is not None for value in values):
                lines.append(f"| {name} | {' | '.join('' if v is None else f'{v:.1f}' for v in values)} |")
        lines.append("")
    return lines[:-1]


def figures(stem: str, rows: Sequence[Row]) -> dict[str, str]:
    """File name -> SVG: the similarity probe's figures by layer, or of the last layer over training."""
    if any("step" in row for row in rows):
        last = max(row["layer"] for row in rows)
        names = dict.fromkeys(row["model"] for row in rows)
        series = [
            svg.Curve(name, [(row["step"], [row["similarity"]]) for row in rows
                             if row["model"] == name and row["layer"] == last and "step" in row])
            for name in names
        ]  # fmt: skip
        title, axis = f"What a probe of layer {last} says of similarity, over training", "steps"
    else:
        series = [
            svg.Curve(name, [(layer, [row["similarity"]]) for layer, row in found.items()])
            for name, found in _models(rows).items()
        ]
        title, axis = "What a probe of each layer says of similarity", "layer (0: embeddings)"
    return {f"{stem}.svg": svg.curves(title, axis, "Pearson, %", series, from_zero=True)}


def _models(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Model, with its step -> layer -> row."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        name = f"{row['model']}, {row['step']:,} steps" if "step" in row else row["model"]
        found.setdefault(name, {})[row["layer"]] = row
    return found
