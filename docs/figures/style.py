"""What the figures have in common: colours for light and dark, and how they are saved.

An SVG that is shown as an image follows the reader's system by a media query inside it. So colours are names
(CSS variables), and matplotlib, which knows none, draws with stand-ins that are exchanged in the file.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CSS = """
svg { --ink: #24292f; --soft: #656d76; --line: #d0d7de; --card: #f6f8fa;
      --tone0: #0969da; --tone1: #bc4c00; --tone2: #1a7f37; --tone3: #8250df; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --card: #20262e;
        --tone0: #58a6ff; --tone1: #f0883e; --tone2: #56d364; --tone3: #bc8cff; } }
"""
NAMES = ("ink", "soft", "line", "card", "tone0", "tone1", "tone2", "tone3")
STAND_IN = {name: f"#0a0b{index:02x}" for index, name in enumerate(NAMES)}
FONT = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def target(script: str) -> Path:
    """Where a script's figure goes: beside it, or into the folder given on the command line."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    return folder / Path(script).with_suffix(".svg").name


def save_svg(path: Path, body: str, width: float, height: float, title: str) -> None:
    """Writes a figure made by hand; colours in `body` are var(--ink) and so on."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
    text = f"{head}\n<title>{title}</title>\n<style>{CSS}text {{ font-family: {FONT}; }}</style>\n{body}\n</svg>\n"
    path.write_text(text, encoding="utf-8")


def axes(columns: int = 1, size: tuple[float, float] = (7.2, 3.2)) -> tuple[Any, list[Any]]:
    """A matplotlib figure and its axes, side by side, in the figures' style."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    colour = STAND_IN
    plt.rcParams.update(
        {
            "svg.fonttype": "none", "svg.hashsalt": "electra", "font.family": "sans-serif", "font.size": 9.5,
            "text.color": colour["ink"], "axes.labelcolor": colour["soft"], "axes.edgecolor": colour["line"],
            "xtick.color": colour["soft"], "ytick.color": colour["soft"], "axes.grid": True,
            "grid.color": colour["line"], "grid.linewidth": 0.6, "axes.spines.top": False,
            "axes.spines.right": False, "legend.frameon": False, "axes.titlesize": 10, "axes.axisbelow": True,
        }
    )  # fmt: skip
    figure, made = plt.subplots(1, columns, figsize=size, squeeze=False, layout="constrained")
    return figure, list(made[0])


def save(figure: Any, path: Path, title: str) -> None:
    """Writes a matplotlib figure with colours by name and without a background."""
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None, "Title": title})
    text = path.read_text(encoding="utf-8")
    for name, stand_in in STAND_IN.items():
        text = text.replace(stand_in, f"var(--{name})")
    text = re.sub(r"font: ([\d.]+px) [^;\"]+", rf"font: \1 {FONT}", text.replace("&quot;", ""))
    text = re.sub(r'<svg ([^>]*?)width="[^"]*pt" ', r"<svg \1", text)
    text = text.replace("</defs>", f"</defs>\n<style>{CSS}</style>", 1)
    text = re.sub(r' height="[\d.]+pt"', "", text, count=1)
    path.write_text("\n".join(line.rstrip() for line in text.split("\n")), encoding="utf-8")
