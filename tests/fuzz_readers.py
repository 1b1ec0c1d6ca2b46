"""What is fuzzed: for each reader, valid files and how they are read to the end. See `fuzz.py`."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from fuzz import damaged
from safetensors.torch import save_file
from tf_bundles import write_bundle

from electra_core.checkpoint import newest_intact
from electra_core.config import PRESETS, updated
from electra_core.conversion.tf_bundle import read_bundle
from electra_core.corpora.journal import Journal
from electra_core.corpora.sources import find_sources
from electra_core.corpora.text_files import read_documents
from electra_core.corpora.vocabulary import train_sentencepiece
from electra_core.corpus import Corpus
from electra_core.downstream.choices import read_choices
from electra_core.electra import Discriminator
from electra_core.errors import UserError
from electra_core.examples import Examples
from electra_core.files.byte_files import ByteFile
from electra_core.files.row_files import read_rows
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.labelled import read_texts
from electra_core.labelled_data.squad_files import read_questions
from electra_core.labelled_data.tagged_files import read_tagged
from electra_core.model_dir import load
from electra_core.prepare import prepare
from electra_core.pretraining.run_folder import read_config
from electra_core.runs.metrics_log import read_metrics
from electra_core.tokenizer import load_tokenizer

Reader = Callable[[random.Random], None]
"""Makes an input, and reads it."""

TEXT = "The first document, naïve and short.\nIts second line.\n\nThe second document. It has 东京 in it.\n" * 4
SQUAD = {
    "version": "2.0",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "Ann met Bob in Rome in 1999.",
                    "qas": [
                        {
                            "id": "1",
                            "question": "Who met Bob?",
                            "answers": [{"text": "Ann", "answer_start": 0}],
                            "is_impossible": False,
                        },
                        {"id": "2", "question": "Who sang?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}
TEXT_ROWS = [{"text": line, "label": "pos", "n": 3} for line in TEXT.split("\n") if line]
QA_ROWS = [
    {"id": "1", "question": "Who?", "context": "Ann met Bob.", "answers": {"text": ["Ann"], "answer_start": [0]}}
]
TAG_ROWS = [{"tokens": ["Ann", "met", "Bob"], "tags": ["B-PER", "O", "B-PER"]}] * 3
CHOICE_ROWS = [
    {"context": "She sat", "choices": ["down", "up"], "label": 0},
    {"ctx": "He", "endings": ["ran", "swam"], "label": "1"},
]


def lines_of(rows: list[dict]) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in rows)


def parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


def csv_of(rows: list[dict], delimiter: str) -> bytes:
    head = delimiter.join(rows[0])
    return "\n".join([head, *(delimiter.join(map(str, row.values())) for row in rows)]).encode()


def of_files(folder: Path, files: dict[str, bytes], read: Callable[[Path], object]) -> Reader:
    """A reader of single files, any of `files`."""
    names = sorted(files)

    def run(draw: random.Random) -> None:
        name = draw.choice(names)
        path = folder / name
        path.write_bytes(damaged(files[name], files[draw.choice(names)], draw))
        read(path)

    return run


def of_folder(folder: Path, valid: Path, names: list[str], read: Callable[[Path], object]) -> Reader:
    """A reader of a folder, in which one of the files `names` (relative) is damaged."""
    contents = {name: (valid / name).read_bytes() for name in names}
    copy = folder / "damaged"
    shutil.copytree(valid, copy)

    def run(draw: random.Random) -> None:
        name = draw.choice(names)
        try:
            (copy / name).write_bytes(damaged(contents[name], contents[draw.choice(names)], draw))
            read(copy)
        finally:
            (copy / name).write_bytes(contents[name])

    return run


def text(folder: Path) -> Reader:
    rows = [{"text": paragraph} for paragraph in TEXT.split("\n\n")]
    files = {
        ".txt": TEXT.encode(),
        ".jsonl": lines_of(rows),
        ".json": json.dumps(rows).encode(),
        ".csv": "\n".join(["text", *(f'"{row["text"]}"' for row in rows)]).encode(),
        ".parquet": parquet(rows),
    }

    def read(path: Path) -> None:
        for document in read_documents(find_sources([path])):
            "\n".join(document).encode()

    return of_files(folder, {f"a{suffix}": content for suffix, content in files.items()}, read)


def compressed(folder: Path) -> Reader:
    zstandard = pytest.importorskip("zstandard")
    content = TEXT.encode() * 20
    files = {
        "a.gz": gzip.compress(content, mtime=0),
        "a.xz": lzma.compress(content),
        "a.zst": zstandard.compress(content),
    }

    def read(path: Path) -> None:
        with ByteFile(path.name, path) as file:
            while file.read(1 << 16):
                pass

    return of_files(folder, files, read)


def rows(folder: Path) -> Reader:
    wanted = TEXT_ROWS
    files = {
        "a.csv": csv_of(wanted, ","),
        "a.tsv": csv_of(wanted, "\t"),
        "a.jsonl": lines_of(wanted),
        "a.txt": TEXT.encode(),
        "a.json": json.dumps(wanted).encode(),
        "a.parquet": parquet(wanted),
        "a.csv.gz": gzip.compress(csv_of(wanted, ","), mtime=0),
    }
    return of_files(folder, files, lambda path: [str(row.cells) for row in read_rows(path)])


def labelled(folder: Path) -> Reader:
    wanted = TEXT_ROWS
    files = {
        "a.csv": csv_of(wanted, ","),
        "a.tsv": csv_of(wanted, "\t"),
        "a.jsonl": lines_of(wanted),
        "a.parquet": parquet(wanted),
    }
    return of_files(folder, files, lambda path: list(read_texts(path, Columns())))


def several_labels(folder: Path) -> Reader:
    files = {
        "a.csv": b'text,labels\none,"a,b"\ntwo,\nthree,"[\'a\', 2]"\nfour,"[""b""]"\n',
        "a.jsonl": lines_of([{"text": "one", "labels": labels} for labels in (["a", 2], [], "a, b", None, 1.5)]),
    }
    return of_files(folder, files, lambda path: list(read_texts(path, Columns(), several=True)))


def tags(folder: Path) -> Reader:
    conll = b"-DOCSTART- O\n\nAnn NNP B-PER\nmet VBD O\nBob NNP B-PER\n\nIt PRP O\nrains VBZ O\n" * 3
    files = {"a.txt": conll, "a.conll": conll, "a.jsonl": lines_of(TAG_ROWS), "a.parquet": parquet(TAG_ROWS)}
    return of_files(folder, files, lambda path: list(read_tagged(path)))


def questions(folder: Path) -> Reader:
    files = {"a.json": json.dumps(SQUAD).encode(), "a.jsonl": lines_of(QA_ROWS), "a.parquet": parquet(QA_ROWS)}
    return of_files(folder, files, lambda path: list(read_questions(path)))


def choices(folder: Path) -> Reader:
    files = {
        "a.jsonl": lines_of(CHOICE_ROWS[:1] * 3),
        "b.jsonl": lines_of(CHOICE_ROWS[1:] * 3),
        "a.parquet": parquet(CHOICE_ROWS[:1]),
    }
    return of_files(folder, files, lambda path: list(read_choices(path)))


def tokenizers(folder: Path) -> Reader:
    words = tiny_model.make_model(folder / "words")
    train_sentencepiece(TEXT.split("\n") * 20, 30).save(folder / "pieces")
    files = {
        "vocab.txt": (words / "vocab.txt").read_bytes(),
        "a.json": (words / "tokenizer.json").read_bytes(),
        "b.json": (folder / "pieces" / "tokenizer.json").read_bytes(),
        "spiece.model": (folder / "pieces" / "spiece.model").read_bytes(),
        "tokenizer_config.json": (words / "tokenizer_config.json").read_bytes(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)

    def read(path: Path) -> None:
        tokenizer = load_tokenizer(folder / "vocab.txt" if path.name == "tokenizer_config.json" else path)
        tokenizer.encode("Ann met [MASK] 东京.")
        tokenizer.fingerprint()

    inner = of_files(folder, files, read)

    def run(draw: random.Random) -> None:
        try:
            inner(draw)
        finally:
            for name, content in files.items():
                (folder / name).write_bytes(content)

    return run


def toml(folder: Path) -> Reader:
    content = b'steps = 10\nlearning_rate = 1e-3\nobjective = "mlm"\n'
    content += b"[discriminator]\nhidden_size = 128\n[pretrain]\nseed = 3\n"

    def read(path: Path) -> None:
        changes, encoder = read_config(str(path))
        preset = PRESETS["tiny"]
        updated(preset.pretrain, changes, "configuration")
        updated(preset.discriminator, encoder, "discriminator")

    return of_files(folder, {"a.toml": content}, read)


def model(folder: Path) -> Reader:
    valid = tiny_model.make_model(folder / "valid")
    return of_folder(folder, valid, ["config.json", "model.safetensors"], lambda path: load(Discriminator, path))


def bin_model(folder: Path) -> Reader:
    import torch
    from safetensors.torch import load_file

    valid = tiny_model.make_model(folder / "valid")
    torch.save(load_file(valid / "model.safetensors"), valid / "pytorch_model.bin")
    (valid / "model.safetensors").unlink()
    return of_folder(folder, valid, ["pytorch_model.bin"], lambda path: load(Discriminator, path))


def corpus(folder: Path) -> Reader:
    words = tiny_model.make_model(folder / "words")
    (folder / "a.txt").write_text("\n\n".join("the film was good . what a plot ." for _ in range(30)))
    prepare(
        [folder / "a.txt"],
        folder / "valid",
        tokenizer=words / "vocab.txt",
        heldout_fraction=0.2,
        shard_tokens=60,
        quiet=True,
    )
    names = [path.name for path in (folder / "valid").iterdir() if path.is_file()]
    names += ["tokenizer/tokenizer.json"] + ["manifest.json"] * len(names)

    def read(path: Path) -> None:
        for split in ("train", "heldout"):
            opened = Corpus.open(path, split)
            opened.verify()
            if opened.num_tokens:
                examples = Examples(opened, 16, 0)
                examples.batch(examples.plan(range(8)))

    return of_folder(folder, folder / "valid", names, read)


def runs(folder: Path) -> Reader:
    """Checkpoints, logs of metrics and journals."""
    import hashlib

    import torch

    valid = folder / "valid"
    state = valid / "checkpoints" / "step-00000002"
    state.mkdir(parents=True)
    save_file({"model/a": torch.zeros(3)}, state / "state.safetensors")
    digest = hashlib.sha256((state / "state.safetensors").read_bytes()).hexdigest()
    (state / "state.json").write_text(json.dumps({"step": 2, "sha256": digest, "tokens": 5, "identity": {}}))
    (valid / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1.5}) + "\n" for i in range(9)))
    (valid / "journal.json").write_text(json.dumps({"settings": {"seed": 0}, "state": {"documents": 3}}))
    names = [
        f"checkpoints/{state.name}/state.safetensors",
        f"checkpoints/{state.name}/state.json",
        "metrics.jsonl",
        "journal.json",
    ]

    def read(path: Path) -> None:
        checkpoint, damaged_ones = newest_intact(path / "checkpoints")
        if checkpoint is None:  # which is what the commands say then
            raise UserError("; ".join(damaged_ones))
        if (path / "metrics.jsonl").exists():
            read_metrics(path / "metrics.jsonl")
        alone = path / "alone"
        alone.mkdir(exist_ok=True)
        shutil.copy(path / "journal.json", alone)
        _ = Journal(alone, {"seed": 0}).state

    return of_folder(folder, valid, names, read)


def tensorflow(folder: Path) -> Reader:
    write_bundle(folder / "a", {f"layer_{i}/kernel": np.ones((3, i + 1), "f4") for i in range(12)}, 2)
    content = (folder / "a.index").read_bytes()

    def run(draw: random.Random) -> None:
        (folder / "a.index").write_bytes(damaged(content, content, draw))
        for variable in read_bundle(folder / "a").values():
            variable.read()

    return run


READERS: dict[str, Callable[[Path], Reader]] = {
    "text": text,
    "compressed": compressed,
    "rows": rows,
    "labelled": labelled,
    "several_labels": several_labels,
    "tags": tags,
    "questions": questions,
    "choices": choices,
    "tokenizers": tokenizers,
    "toml": toml,
    "model": model,
    "bin_model": bin_model,
    "corpus": corpus,
    "runs": runs,
    "tensorflow": tensorflow,
}

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
