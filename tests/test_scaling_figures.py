"""The figures of the scaling and reliability pages are drawn from the committed results."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from benchmarks.scaling_figures import FOLDER, figures
from benchmarks.svg import Curve, curves


def test_the_committed_figures_are_what_the_results_give() -> None:
    """But for the style sheet, which is that of all figures."""
    drawn = figures()
    assert {path.name for path in FOLDER.iterdir()} == drawn.keys()
    for name, text in drawn.items():
        assert _plain((FOLDER / name).read_text(encoding="utf-8")) == _plain(text), f"{name}: draw it again"


def test_axes_begin_at_zero_and_tenfold_is_one_distance() -> None:
    line = Curve("line", [(1.0, [5.0]), (10.0, [5.0]), (100.0, [10.0])])
    root = ElementTree.fromstring(curves("a < b", "x", "y", [line], from_zero=True, log_x=True))
    circles = [circle for circle in root.iter("{http://www.w3.org/2000/svg}circle") if circle.get("r") == "4"]
    x, y = ([float(str(circle.get(axis))) for circle in circles] for axis in ("cx", "cy"))
    assert x[1] - x[0] == x[2] - x[1] > 0
    bottom = 2 * y[0] - y[2]  # 5 is half as high as 10, if zero is at the bottom
    said = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"1", "10", "100"} <= {*said}, "a mark at each size"
    assert abs(bottom - (45 + 260)) < 0.2


def _plain(text: str) -> str:
    return re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
