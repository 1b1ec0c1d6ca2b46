"""Self-contained HTML pages: one file, no network, light and dark, narrow and wide."""

from __future__ import annotations

from html import escape
from importlib.resources import files


def asset(name: str) -> str:
    """The text of a file in `electra_core/assets`."""
    return (files("electra_core") / "assets" / name).read_text(encoding="utf-8")


def page(title: str, body: str, *, styles: tuple[str, ...] = (), scripts: tuple[str, ...] = ("page.js",)) -> str:
    """A complete document around `body` (HTML), with `page.css`, further `styles` and `scripts` inlined."""
    css = "\n".join(asset(name) for name in ("page.css", *styles))
    js = "".join(f"<script>{asset(name)}</script>\n" for name in scripts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n{js}</body>\n</html>\n"
    )
