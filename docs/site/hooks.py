"""What the site adds to the Markdown: code by function name, pages of the sources, equations as MathML.

**Code by name.** A link that stands alone on its line and points at a function,

    [`mask_tokens` in electra_core/masking.py](../electra_core/masking.py#mask_tokens)

is a link wherever the Markdown is read as it is. The site puts the function's present lines there, without
its docstring. A name that no longer exists ends the build, so that page and code cannot drift apart.

**Sources.** Links to Python files of the project lead to pages that show them; other links out of docs/ become
plain words, since the site stands alone.

**Equations** between dollar signs become MathML when the site is built: no script and no network. Browsers
set it well with a font that knows mathematics; STIX Two Math comes out of the package `ziamath`.
"""

from __future__ import annotations

import ast
import functools
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("electra_core", "kernels", "docs/exercises")
INCLUDE = re.compile(r"^\[([^\]\n]+)\]\(((?:\.\./)?[\w/]+\.py)#([\w.]+)\)$", re.MULTILINE)
LINK = re.compile(r"\]\(((?:\.\./)?[\w/]+\.py)(?:#[\w.]+)?\)")
OUTSIDE = re.compile(r"(?<!!)\[([^\]\n]+)\]\(\.\./(?!source/)[^)\s]*\)")
MATHS = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)

MEANT = {"<mo>&#x0221E;</mo>": "<mi>&#x0221E;</mi>", "<mi>&#x0007E;</mi>": "<mo>&#x0223C;</mo>"}
"""Infinity is a name and ~ a relation: latex2mathml has it the other way round, which spaces them wrongly."""


class Source(NamedTuple):
    """Lines of a file."""

    text: str
    first_line: int


@functools.cache
def source_of(path: Path, name: str) -> Source:
    """The lines of a function, method or class ("mask_tokens", "Electra.forward"), without docstring.

    Raises:
        LookupError: the file has nothing of that name.
    """
    text = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        node = _member(node, part, path, name)
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = text.split("\n")[first - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None and len(node.body) > 1:
        begin, end = node.body[0].lineno - first, node.body[0].end_lineno
        assert end is not None
        del lines[begin : end - first + 1]
    indent = len(lines[0]) - len(lines[0].lstrip())
    return Source("\n".join(line[indent:] for line in lines).rstrip(), first)


def _member(node: ast.AST, part: str, path: Path, name: str) -> ast.AST:
    for child in getattr(node, "body", []):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name == part:
            return child
    raise LookupError(f"{path.relative_to(ROOT)} has no {name}")


def resolve(link: str) -> Path:
    """The file that a link of a page in docs/ means."""
    return (ROOT / "docs" / link).resolve()


def source_page(path: Path) -> str:
    """Where the site keeps the page that shows a file of the project."""
    return "source/" + path.relative_to(ROOT).with_suffix(".md").as_posix()


ELSEWHERE = re.compile(r'<script src="?https://unpkg\.com/[^>]*></script>')


# What mkdocs calls ------------------------------------------------------------------------------------------


def on_config(config: Any, **_: Any) -> Any:
    """Leaves out of the menu what is not there: some pages are written by benchmarks."""
    for section in config.nav:
        for name, pages in section.items():
            if isinstance(pages, list):
                section[name] = [page for page in pages if (ROOT / "docs" / next(iter(page.values()))).exists()]
    return config


def on_files(files: Any, *, config: Any, **_: Any) -> Any:
    """Adds a page for every source file; they stay out of the search, which is for the text."""
    from mkdocs.structure.files import File

    for path in _shown_sources():
        name, fence = path.relative_to(ROOT).as_posix(), "`" * 4
        text = "---\nsearch: {exclude: true}\nhide: [toc]\n---\n"
        text += f'# `{name}`\n\n{fence} {{.python linenums="1"}}\n'
        text += path.read_text(encoding="utf-8") + f"\n{fence}\n"
        files.append(File.generated(config, source_page(path), content=text))
    return files


def _shown_sources() -> list[Path]:
    """Both packages and the exercises, and whatever else a page links to."""
    paths = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    for page in (ROOT / "docs").glob("*.md"):
        paths |= {resolve(link) for link in LINK.findall(page.read_text(encoding="utf-8"))}
    return sorted(path for path in paths if path.is_file())


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Includes functions and turns links to sources into links to their pages."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    markdown = INCLUDE.sub(_included, markdown)
    markdown = LINK.sub(lambda match: f"]({source_page(resolve(match[1]))})", markdown)
    return OUTSIDE.sub(lambda match: match[1], markdown)


def _included(match: re.Match[str]) -> str:
    label, link, name = match.groups()
    source = source_of(resolve(link), name)
    where = f"{source_page(resolve(link))}#__codelineno-0-{source.first_line}"
    return f"[{label}]({where}){{ .where }}\n\n``` python\n{source.text}\n```"


def on_page_content(html: str, **_: Any) -> str:
    """Equations as MathML."""
    return MATHS.sub(_equation, html)


def _equation(match: re.Match[str]) -> str:
    mathml = to_mathml(unescape(match[3]), block=match[2] == "[")
    return f'<div class="equation">{mathml}</div>' if match[2] == "[" else mathml


def on_post_page(output: str, **_: Any) -> str:
    """Light or dark before anything is painted; and nothing is fetched from elsewhere."""
    script = (ROOT / "docs" / "site" / "scheme.js").read_text(encoding="utf-8")
    output = re.sub(r"<body[^>]*>", lambda body: f"{body[0]}<script>{script}</script>", output, count=1)
    return ELSEWHERE.sub("", output)


def on_post_build(*, config: Any, **_: Any) -> None:
    """Puts the font of the equations beside the style sheet."""
    import ziamath

    font = Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"
    shutil.copy(font, Path(config.site_dir) / "site" / font.name)


def to_mathml(latex: str, *, block: bool) -> str:
    """An equation in LaTeX's notation -> MathML."""
    from latex2mathml.converter import convert

    mathml = str(convert(latex.strip(), display="block" if block else "inline"))
    for given, meant in MEANT.items():
        mathml = mathml.replace(given, meant)
    return mathml
