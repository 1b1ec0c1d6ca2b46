"""The pages of docs/ as tests read them: the fenced blocks of each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

DOCS = ROOT / "docs"


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    text: str
    reason: str
    """Why it does not run here; empty if it does."""


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").split("\n")
    at = 0
    while at < len(lines):
        fence = re.match(r"^(`{3,})\s*(\w*)", lines[at])
        if fence:
            end = next(i for i in range(at + 1, len(lines)) if lines[i].startswith(fence[1]))
            before = next((line for line in reversed(lines[:at]) if line.strip()), "")
            reason = re.match(r"<!-- not run here: (.+) -->", before)
            yield Block(at + 1, fence[2], "\n".join(lines[at + 1 : end]), reason[1] if reason else "")
            at = end
        at += 1
