"""Writes the embedded corpus to files, on which `electra demo` works and after which `--texts-only` stops.

    OUT/corpus.txt                      docstrings of this machine's libraries, for `electra prepare`
    OUT/task/train.jsonl, dev.jsonl     "which area is this docstring of?", for `electra finetune`

The texts come from `docstrings.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from electra_core.corpora.docstrings import Document, Example, LabelledTask, labelled_task, write_corpus

EXAMPLE_CHARACTERS = 280


def write_sample(folder: Path, corpus: Iterable[Document]) -> tuple[list[Document], LabelledTask]:
    """Writes text and task into `folder`, which is created if necessary.

    Returns:
        The documents of the text, and the task. The text contains no dev example, not even without its label.
    """
    corpus = list(corpus)
    task = labelled_task(corpus, longest=EXAMPLE_CHARACTERS)
    (folder / "task").mkdir(parents=True, exist_ok=True)
    _write_examples(task.train, folder / "task" / "train.jsonl")
    _write_examples(task.dev, folder / "task" / "dev.jsonl")
    unseen = {example.document.text for example in task.dev}
    corpus = [document for document in corpus if document.text not in unseen]
    write_corpus(folder / "corpus.txt", corpus)
    return corpus, task


def _write_examples(examples: Sequence[Example], file: Path) -> None:
    rows = (json.dumps({"text": e.text, "label": e.label, "module": e.document.module}) for e in examples)
    file.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
