"""The embedded corpus: what is read, how it is cleaned, and that the labelled task does not leak."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from electra_core.corpora import docstrings
from electra_core.corpora.docstrings import (
    AREAS,
    Document,
    area_of,
    clean,
    documents,
    example_text,
    labelled_task,
    write_corpus,
)
from electra_core.corpora.sample import EXAMPLE_CHARACTERS, write_sample
from electra_core.errors import UserError

LONG = "Words enough to pass for a document of the corpus, number %d."


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    return list(documents())


def test_corpus_has_the_size_that_is_promised(corpus: list[Document]) -> None:
    assert len(corpus) > 15_000
    assert sum(len(document.text) for document in corpus) > 6_000_000
    assert len({document.text for document in corpus}) == len(corpus)
    tops = Counter(document.module.partition(".")[0] for document in corpus)
    assert tops["torch"] > 5000 and tops["numpy"] > 1000 and tops["pydoc_data"] > 50 and tops["asyncio"] > 100


def test_corpus_file_gives_the_documents_back(corpus: list[Document], tmp_path: Path) -> None:
    size = write_corpus(tmp_path / "corpus.txt", corpus)
    data = (tmp_path / "corpus.txt").read_bytes()
    assert len(data) == size
    assert data.decode().removesuffix("\n").split("\n\n") == [document.text for document in corpus]


def test_task_is_balanced_and_split_by_module(corpus: list[Document]) -> None:
    task = labelled_task(corpus, train_per_class=64, dev_per_class=100)
    assert len(task.labels) >= 8 and set(task.labels) <= set(AREAS)
    train_counts = Counter(example.label for example in task.train)
    dev_counts = Counter(example.label for example in task.dev)
    assert set(train_counts) == set(dev_counts) == set(task.labels)
    assert all(32 <= n <= 64 for n in train_counts.values())
    assert all(50 <= n <= 100 for n in dev_counts.values())
    assert not {e.document.module for e in task.train} & {e.document.module for e in task.dev}
    assert not {e.text for e in task.train} & {e.text for e in task.dev}
    for example in task.train + task.dev:
        assert len(example.text) <= 400 and "\n" not in example.text
        if "." in example.document.module:
            assert example.document.module not in example.text, "the answer stands in the text"


def test_task_depends_on_the_seed_alone(corpus: list[Document]) -> None:
    some = corpus[::3]
    sizes = {"train_per_class": 16, "dev_per_class": 16}
    first = labelled_task(some, **sizes)
    assert labelled_task(reversed(some), **sizes) == first
    assert labelled_task(some, **sizes, seed=1).train != first.train


def test_task_needs_two_areas() -> None:
    with pytest.raises(ValueError, match="at least two areas"):
        labelled_task([Document(LONG % 1, "torch.nn.x", "neural networks", "x")])


def test_reading_imports_nothing() -> None:
    """`documents()` in a fresh interpreter leaves torch and numpy unimported."""
    program = (
        "import sys; from electra_core.corpora.docstrings import documents; next(documents());"
        "bad = [m for m in ('torch', 'numpy') if m in sys.modules]; sys.exit(' '.join(bad) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that stands for the only place where sources are."""
    monkeypatch.setattr(docstrings, "_source_folders", lambda: [("pack", tmp_path)])
    return tmp_path


def test_finds_every_kind_of_docstring(tree: Path) -> None:
    (tree / "__init__.py").write_text(f'"""{LONG % 0}"""')
    (tree / "m.py").write_text(
        f'"""{LONG % 1}"""\n'
        f'class A:\n    """{LONG % 2}"""\n    async def f(self):\n        """{LONG % 3}"""\n'
        f'        def inner():\n            """{LONG % 4}"""\n'
        f'if True:\n    def g():\n        """{LONG % 5}"""\n'
        f'try:\n    pass\nexcept E:\n    def h():\n        """{LONG % 6}"""\n'
        f'add_docstr(torch.abs, r"""{LONG % 7}""".format(**args))\n'
        f'lib.add_newdoc("numpy", "abs", """{LONG % 8}""")\n'
        f'add_newdoc(doc="""{LONG % 10}""")\n'
        f'class Again:\n    """{LONG % 2}"""\n'
        'def short():\n    """Too short."""\n'
        f'x = """{LONG % 9} But no docstring."""\n'
    )
    found = {document.name: document.text for document in documents()}
    assert found == {
        "pack": LONG % 0,
        "pack.m": LONG % 1,
        "pack.m.A": LONG % 2,
        "pack.m.A.f": LONG % 3,
        "pack.m.A.f.inner": LONG % 4,
        "pack.m.g": LONG % 5,
        "pack.m.h": LONG % 6,
        "pack.m.torch.abs": LONG % 7,
        "pack.m.'numpy'": LONG % 8,
    }


def test_broken_files_are_passed_over(tree: Path) -> None:
    (tree / "syntax.py").write_text(f'"""{LONG % 1}"""\nprint "python 2"\n')
    (tree / "nul.py").write_bytes(b'"""zero\0byte"""')
    (tree / "coding.py").write_bytes(b'# coding: uft-8\n"""' + (LONG % 2).encode() + b'"""')
    (tree / "bytes.py").write_bytes(b'"""not utf-8 \xff' + (LONG % 3).encode() + b'"""')
    (tree / "latin.py").write_bytes(b'# coding: latin-1\n"""\xe9' + (LONG % 4).encode() + b'"""')
    (tree / "deep.py").write_text('"""x"""\n' + "(" * 5000 + ")" * 5000)
    (tree / "tests").mkdir()
    (tree / "tests" / "skipped.py").write_text(f'"""{LONG % 5}"""')
    assert [document.text for document in documents()] == ["é" + LONG % 4]


def test_language_reference_is_read_from_its_dictionary(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "_source_folders", lambda: [("", tree)])
    (tree / "pydoc_data").mkdir()
    text = "Coroutines\\n**********\\n\\nFunctions defined so are always\\ncoroutines. Others are not.\\n"
    (tree / "pydoc_data" / "topics.py").write_text(f"topics = {{'async': '''{text}'''}}\n")
    (document,) = documents()
    assert document.name == "async"
    assert document.text == "Coroutines\nFunctions defined so are always coroutines.\nOthers are not."


def test_no_sources_is_one_clear_line(tree: Path) -> None:
    with pytest.raises(UserError, match="no Python sources found"):
        list(documents())


def test_clean_unwraps_prose_and_keeps_structure() -> None:
    docstring = """Adds two numbers. It is
        quick, e.g. for `x`.

        Parameters
        ----------
        x : int
            The first
            number.

        - one
        - two

        >>> add(1, 2)
        3
        \x00\ud800
        """
    assert clean(docstring).split("\n") == [
        "Adds two numbers.",
        "It is quick, e.g. for `x`.",
        "Parameters",
        "x : int",
        "The first number.",
        "- one",
        "- two",
        ">>> add(1, 2)",
        "3",
    ]


def test_longest_prefix_names_the_area() -> None:
    assert area_of("torch.nn.modules.linear") == area_of("torch.ao.nn.qat") == "neural networks"
    assert area_of("torch.ao.quantization.fx") == "quantization"
    assert area_of("email") == area_of("email.mime.text") == "internet"
    assert area_of("emails") == area_of("torch") == ""


def test_example_text_takes_the_answer_out() -> None:
    text = ">>> import torch.nn as nn\nSee :class:`~torch.nn.Linear`, e.g. np.linalg.norm.\nfrom x import y\nEnd."
    assert example_text(text, 400) == "See :class:`Linear`, e.g. norm. End."
    assert example_text("one two three", 9) == "one two"
    assert example_text("one two", 7) == "one two"


def test_sample_as_files(tmp_path: Path, corpus: list[Document]) -> None:
    """What is judged on is not in the text, not even without its label."""
    kept, task = write_sample(tmp_path / "new" / "folder", corpus)
    assert task == labelled_task(corpus, longest=EXAMPLE_CHARACTERS)
    for name, examples in (("train", task.train), ("dev", task.dev)):
        lines = (tmp_path / "new" / "folder" / "task" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [(r["text"], r["label"]) for r in map(json.loads, lines)] == [(e.text, e.label) for e in examples]
    text = (tmp_path / "new" / "folder" / "corpus.txt").read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    assert text == [document.text for document in kept]
    assert not set(text) & {example.document.text for example in task.dev}
    assert set(text) & {example.document.text for example in task.train}
