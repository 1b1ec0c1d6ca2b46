"""The site that `make docs` builds: whole, without network, equations set, light and dark; opened in a browser."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
NEEDED = ("latex2mathml", "material", "mkdocs", "mkdocstrings", "ziamath")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed (extra `docs`): {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", str(folder)]
    command += ["-f", str(ROOT / "docs" / "site" / "mkdocs.yml")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_page_is_built_and_needs_no_network(site: Path) -> None:
    built = {path.stem for path in site.glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= built
    for page in site.glob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\"\s>]+)", html)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|icon|preload)[^>]*href=\"?([^\"\s>]+)", html)
        assert not [url for url in loaded if url.startswith(("http:", "https:", "//"))], page.name
        if page.name != "404.html":  # made for a server's root
            files = [url.partition("?")[0] for url in loaded if not url.startswith("data:")]
            assert not [url for url in files if not (page.parent / url).is_file()], page.name


def test_links_between_pages_and_into_sources_resolve(site: Path) -> None:
    """Also the line numbers that included functions point at."""
    ids: dict[Path, set[str]] = {}
    for page in sorted(set(site.glob("*.html")) - {site / "404.html"}):  # which is made for a server's root
        for link in re.findall(r"<a[^>]*\shref=\"([^\"]+)\"", page.read_text(encoding="utf-8")):
            if link.startswith(("http", "mailto:", "javascript:")):
                continue
            path, _, anchor = unescape(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor and target.suffix == ".html":
                if target not in ids:
                    ids[target] = set(re.findall(r"\sid=\"?([^\"\s>]+)", target.read_text(encoding="utf-8")))
                assert anchor in ids[target], f"{page.name}: {link}"


def test_equations_are_mathml_and_code_is_there(site: Path) -> None:
    html = (site / "rtd_loss.html").read_text(encoding="utf-8")
    assert html.count("<math") >= 8 and "arithmatex" not in html and "\\frac" not in html
    assert "binary_cross_entropy_with_logits" in html, "rtd_loss's own lines"
    for page, right in {"sample_replace": "<mo>&#x0223C;</mo>", "attention": "<mi>&#x0221E;</mi>"}.items():
        assert right in (site / f"{page}.html").read_text(encoding="utf-8"), "~ and infinity, spaced as in print"
    assert (site / "site" / "STIXTwoMath-Regular.ttf").stat().st_size > 100_000
    assert "Raises:" in (site / "api.html").read_text(encoding="utf-8"), "docstrings"


LOOK = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll(".md-typeset > p, .md-typeset > table, .md-content")]
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 1).length;
  const maths = [...document.querySelectorAll("math")].filter((e) => e.getBoundingClientRect().height < 4).length;
  const broken = [...document.images].filter((e) => !e.naturalWidth).length;
  document.title = ["LOOK", document.body.dataset.mdColorScheme, wide, maths, broken].join(" ");
});</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium to open the pages in")
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_pages_in_a_browser(site: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """Light and dark as the system is; nothing wider than the window; equations and images are drawn."""
    page = site / f"look-{width}.html"
    page.write_text(
        (site / "mlm_head.html").read_text(encoding="utf-8").replace("</body>", LOOK), encoding="utf-8"
    )
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=3000"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    page.unlink()
    title = re.search(r"<title>(LOOK.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-500:]
    assert title[1] == f"LOOK {'slate' if dark else 'default'} 0 0 0"
