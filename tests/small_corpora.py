"""Corpora of Python's language reference, for tests: prepared in a second, from many batches."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from electra_core.corpora import writing as corpus_writing
from electra_core.corpora.vocabulary import train_sentencepiece
from electra_core.prepare import prepare

OPTIONS = {"heldout_fraction": 0.2, "shard_tokens": 40_000, "quiet": True}
"""What `prepare` is given: several shards, even of this little text."""


@pytest.fixture(scope="module", autouse=True)
def small_batches() -> Iterator[None]:
    """So that this little text makes many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_writing, "BATCH_CHARACTERS", 20_000)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language reference as a text file: a document per chapter, wrapped lines."""
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    documents = (re.sub(r"\n\s*\n", "\n", topics[key]).strip() for key in sorted(topics))
    path.write_text("\n\n".join(documents) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(text.read_text("utf-8").split("\n")[:2000], 500).save(folder)
    return folder


@pytest.fixture(scope="module")
def data(text: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "corpus"
    prepare([text], out, tokenizer=tokenizer, heldout_fraction=0.2, shard_tokens=50_000, quiet=True)
    return out


def documents_of(path: Path) -> list[list[str]]:
    return [document.split("\n") for document in path.read_text("utf-8").strip().split("\n\n")]


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "corpus"))


@pytest.fixture(scope="module")
def files(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text in five files of different sizes and kinds, one of them empty."""
    folder = tmp_path_factory.mktemp("files")
    documents = documents_of(text)
    for number, (first, end) in enumerate([(0, 10), (10, 12), (12, 40), (40, 40), (40, 80)]):
        if number == 2:
            rows = [json.dumps({"text": "\n".join(document)}) for document in documents[first:end]]
            (folder / "2.jsonl").write_text("\n".join(rows), "utf-8")
        else:
            content = "\n\n".join("\n".join(document) for document in documents[first:end])
            (folder / f"{number}.txt").write_text(content, "utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(files: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "corpus"
    prepare([files], out, tokenizer=tokenizer, **OPTIONS)
    return out
