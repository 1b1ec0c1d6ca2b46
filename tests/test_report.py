"""The report: self-contained, well-formed, and showing exactly the figures it was given."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from electra_core.detect import TokenScore
from electra_core.reports.demo_page import Passage, Report, to_html, to_terminal, write_report
from electra_core.reports.plots import (
    Dots,
    Rule,
    Series,
    dot_plot,
    duration,
    line_chart,
    median,
    nice_axis,
    number,
)

VOID = {"meta", "link", "br", "line", "polyline"}


class Balance(HTMLParser):
    """Fails on tags that are closed out of order, and collects every attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes nothing"


def parsed(html: str) -> Balance:
    balance = Balance()
    balance.feed(html)
    balance.close()
    assert not balance.stack
    return balance


@pytest.fixture
def report() -> Report:
    text = "The committee slept."
    scores = [TokenScore("the", 0, 3, 0.1), TokenScore("committee", 4, 13, 0.9), TokenScore("slept", 14, 19, 0.2)]
    return Report(
        title="A <title>",
        summary="Summary & more.",
        machine=[("Machine", "2 cores")],
        task="Which of 4 areas?",
        starts=[
            Dots("Shipped", "for hours", [0.7, 0.72, 0.71], 0),
            Dots("Random", "", [0.5, 0.4], 3),
            Dots("Absent", "not in the package", [], 1),
        ],
        references=[Rule(0.25, "guessing"), Rule(0.6, "counting words")],
        charts=[line_chart([Series("loss", [0, 10, 20], [9.0, 7.0, 6.5])], title="MLM loss")],
        charts_note="Every 10 steps.",
        passages=[Passage("Seen", "A note.", text, scores, {1: "dog"})],
        facts=[("Corpus", "9 MB")],
        stages=[("pre-training", 60.0), ("fine-tuning", 30.0)],
    )


def test_page_is_well_formed_and_needs_no_network(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = parsed(html)
    for name, value in page.attributes:
        assert name != "src"
        assert name != "href" or (value or "").startswith("data:")
    assert "://" not in re.sub(r"<script.*?</script>", "", html, flags=re.S)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", html)
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_page_shows_the_figures_and_escapes_the_words(report: Report) -> None:
    html = to_html(report)
    for expected in ("A &lt;title&gt;", "Summary &amp; more.", "71.0%", "45.0%", "60.0%", "25.0%", "Which of 4"):
        assert expected in html
    assert "n/a" in html and "not in the package" in html
    assert "<del>dog</del>" in html
    assert "1 min 30 s" in html and "9 MB" in html


def test_warnings_stand_on_top(report: Report) -> None:
    assert 'class="warning"' not in to_html(report)
    warned = replace(report, warnings=[("It collapsed", "AUC 0.50.")])
    html = to_html(warned)
    assert html.index("It collapsed") < html.index("Does pre-training help?")
    assert "! It collapsed\n  AUC 0.50." in to_terminal(warned)
    long = to_terminal(replace(report, task="many words " * 30, warnings=[("It collapsed", "so it is " * 40)]))
    assert max(map(len, long.split("\n"))) <= 80


def test_terminal_table(report: Report) -> None:
    lines = to_terminal(report).split("\n")
    assert any(re.match(r"Shipped +71\.0%  70\.0-72\.0 +█+$", line) for line in lines)
    assert any(re.match(r"Random +45\.0%  40\.0-50\.0", line) for line in lines)
    assert any(re.match(r"Absent +n/a  not in the package", line) for line in lines)
    assert any(re.match(r"counting words +60\.0%$", line) for line in lines)
    bars = {line.split()[0]: line.count("█") for line in lines if "█" in line}
    assert bars["Random"] / bars["Shipped"] == pytest.approx(0.45 / 0.71, abs=0.05)
    assert max(map(len, lines)) <= 80


def test_no_model_at_all_still_gives_a_page(report: Report) -> None:
    empty = replace(report, starts=[Dots("Absent", "", [])], references=[], charts=[], passages=[], stages=[])
    parsed(to_html(empty))
    assert "n/a" in to_terminal(empty)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0, 1), (0.49, 0.53), (6.1, 9.7), (0, 20000), (-3, 3), (5, 5), (0, 0), (1e-7, 2e-7),
        (0, 9e-14), (3e-40, 3e-40),  # losses of a model that is sure of everything
    ],
)  # fmt: skip
def test_axis_covers_its_data_with_round_ticks(low: float, high: float) -> None:
    axis = nice_axis(low, high)
    assert axis.low <= low and axis.high >= high
    assert 3 <= len(axis.ticks) <= 9
    steps = [b - a for a, b in zip(axis.ticks, axis.ticks[1:])]
    assert max(steps) == pytest.approx(min(steps))
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-6


def test_axis_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="expected finite numbers"):
        nice_axis(0, math.nan)


def test_curve_points_lie_where_the_axes_say() -> None:
    html = line_chart([Series("loss", [0, 50, 100], [0.0, 1.0, 0.5])], title="t", rules=[Rule(1, "r")])
    parsed(html)
    points = re.search(r'<polyline[^>]*points="([^"]*)"', html)
    assert points is not None
    assert points[1] == "0.000,100.000 50.000,0.000 100.000,50.000"
    assert 'class="rule" x1="0" x2="100" y1="0.000" y2="0.000"' in html
    data = re.search(r'data-chart="([^"]*)"', html)
    assert data is not None
    assert json.loads(unescape(data[1]))["series"][0]["y"] == [0.0, 1.0, 0.5]


def test_gaps_interrupt_a_curve_and_a_lone_point_shows() -> None:
    html = line_chart([Series("a", [0, 1, 2, 3], [1.0, 2.0, math.nan, 1.5])], title="t")
    assert html.count("<polyline") == 2 and html.count("lone") == 1
    assert "NaN" not in html and "nan" not in html
    assert "Nothing was measured" in line_chart([Series("a", [], [])], title="t")
    two = [Series("a", [0, 1], [1.0, 2.0]), Series("b", [0], [math.nan])]
    assert "b (not measured)" in line_chart(two, title="t")


def test_far_references_are_told_not_drawn() -> None:
    rows = [Dots("m", "", [0.7, 0.72])]
    html = dot_plot(rows, title="t", rules=[Rule(0.08, "guessing"), Rule(0.65, "counting")])
    assert "Off the scale: guessing 8.0%." in html
    assert re.findall(r'class="dotrule"[^>]*>([^<]*)<', html) == ["counting"]
    assert html.count('class="dot"') == 2 and "71.0%" in html


def test_small_helpers() -> None:
    assert [number(v) for v in (0.3, 1000, 12500, 2e6, 0)] == ["0.3", "1000", "12.5k", "2M", "0"]
    assert median([3, 1, 2]) == 2 and median([1, 2]) == 1.5 and math.isnan(median([]))
    assert [duration(s) for s in (8.2, 125, 3720)] == ["8 s", "2 min 05 s", "1 h 02 min"]


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
POINTING = """<script>
const log = [];
const at = (node, type, x) => node.dispatchEvent(new PointerEvent(type, {bubbles: true, clientX: x, clientY: 5}));
const plot = document.querySelector("[data-chart]");
const box = plot.getBoundingClientRect();
at(plot, "pointermove", box.left + 0.55 * box.width);
log.push(plot.querySelector(".tip").textContent);
at(plot, "pointerleave", 0);
log.push(document.querySelectorAll(".tip, .cursor").length);
const tokens = [...document.querySelectorAll(".tok")];
tokens.slice(0, 2).forEach((token) => {
  at(token, "pointerover", 0);
  log.push(document.querySelector(".floating").textContent);
});
at(document.body, "pointerover", 0);
log.push(document.querySelectorAll(".floating").length);
const left = (node) => node.getBoundingClientRect().left;
const ticks = [...document.querySelectorAll(".ytick")].map((t) => t.getBoundingClientRect().right);
const outside = ticks.every((right) => right <= left(plot));
log.push(outside ? "ticks outside" : "ticks inside");
log.push(document.documentElement.scrollWidth <= innerWidth ? "fits" : "too wide");
document.title = "LOG " + log.join(" | ");
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium to open the page in")
def test_pointing_at_the_page_shows_the_figures(report: Report, tmp_path: Path) -> None:
    """Charts tell their values, tokens their probability and original, in a real browser of a phone's width."""
    page = tmp_path / "report.html"
    page.write_text(to_html(report).replace("</body>", POINTING), encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-500:]
    assert title[1].split(" | ") == [
        "LOG step 10loss  7",
        "0",
        "10.0% replaced",
        "90.0% replaced · was “dog”",
        "0",
        "ticks outside",
        "fits",
    ]
