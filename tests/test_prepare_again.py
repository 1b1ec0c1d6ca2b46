"""Preparing again and after a kill: always the bytes of one run without any of it."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from killed import contents, wait_until
from small_corpora import OPTIONS, documents_of, files, small_batches, text, tokenizer, whole  # noqa: F401

from electra_core.corpora import hold_out
from electra_core.corpora import writing as corpus_writing
from electra_core.corpora.journal import Journal
from electra_core.corpora.shards import Manifest
from electra_core.corpora.sources import find_sources
from electra_core.corpora.text_files import ReadReport, read_documents
from electra_core.errors import UserError
from electra_core.files.new_folder import partial_folder
from electra_core.prepare import prepare
from electra_core.tokenizer import WordPieceTokenizer


def test_the_same_call_again_does_nothing(
    files: Path, tokenizer: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(corpus_writing, "read_documents", None)
    assert prepare([files], whole, tokenizer=tokenizer, **OPTIONS) == Manifest.read(whole / "manifest.json")
    with pytest.raises(UserError, match="already holds a prepared corpus"):
        prepare([files], whole, tokenizer=tokenizer, **{**OPTIONS, "heldout_fraction": 0.3})


def test_any_option_that_makes_another_corpus_makes_another_call(text: Path, tmp_path: Path) -> None:
    """Only a few of its options leave the corpus as it is; a new one is to be counted among these or those."""
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    longest = max(documents_of(text), key=lambda document: len("".join(document)))
    for name, document in (("0.txt", longest), ("1.txt", ["a b"]), ("2.txt", ["a c"])):
        (texts / name).write_text("\n".join(document), "utf-8")
    same = {"text_paths", "out_dir", "workers", "overwrite", "quiet"}
    of_trained = {
        "tokenizer": "sentencepiece", "vocab_size": 301, "model_type": "bpe", "lowercase": False,
        "sample_characters": 40_000,
    }  # fmt: skip
    of_all = {
        "lines": "sentence", "text_field": "body", "documents": "file", "heldout_fraction": 0.5, "seed": 1,
        "drop_duplicates": True, "shard_tokens": 1000, "shard": (1, 1),
    }  # fmt: skip
    assert {*of_trained, *of_all} == inspect.signature(prepare).parameters.keys() - same
    first = {"tokenizer": "wordpiece", "vocab_size": 300, "sample_characters": 50_000, "quiet": True}
    prepare([texts], out, **first)
    given = {"tokenizer": out / "tokenizer", "quiet": True}
    prepare([texts], tmp_path / "given", **given)
    for folder, made, others in ((out, first, of_trained | of_all), (tmp_path / "given", given, of_all)):
        prepare([texts], folder, **made)  # nothing to do
        for name, value in others.items():
            if name == "shard" and made is first:
                continue  # a part needs an existing tokenizer
            with pytest.raises(UserError, match="already holds a prepared corpus"):
                prepare([texts], folder, **{**made, name: value})
                pytest.fail(f"{name} is not asked for")
    WordPieceTokenizer.from_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]).save(tmp_path / "words")
    for other in ("wordpiece", tmp_path / "words"):
        with pytest.raises(UserError, match="already holds a prepared corpus"):
            prepare([texts], tmp_path / "given", **{**given, "tokenizer": other})
    prepare([texts], tmp_path / "part", shard=(1, 2), **given)
    with pytest.raises(UserError, match="already holds a prepared corpus"):
        prepare([texts], tmp_path / "part", shard=(1, 3), **given)  # the longest file alone, here and there
    (texts / "3.txt").write_text("a d")
    with pytest.raises(UserError, match="already holds a prepared corpus"):
        prepare([texts], tmp_path / "part", shard=(1, 2), **given)  # the same file, of another whole


def test_a_file_that_changed_is_noticed(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tokenizer, heldout_fraction=0, quiet=True)
    (tmp_path / "a.txt").write_text("same size")
    with pytest.raises(UserError, match="already holds a prepared corpus"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tokenizer, heldout_fraction=0, quiet=True)


# After a kill -------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from electra_core.corpora import writing as module
from electra_core import prepare

def add(self, blocks, real=module.ShardedText._add, left=[int(sys.argv[4])]):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, blocks)

if __name__ == "__main__":
    module.ShardedText._add = add
    module.BATCH_CHARACTERS, module.JOURNAL_BATCHES = 20_000, 3
    prepare.prepare([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], heldout_fraction=0.2, shard_tokens=40_000,
                   quiet=True)
"""


def test_killed_runs_are_gone_on_with(
    files: Path, tokenizer: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Two real kills: within the third file, and behind it."""
    monkeypatch.setattr(corpus_writing, "JOURNAL_BATCHES", 3)
    monkeypatch.setattr(corpus_writing, "BATCH_CHARACTERS", 20_000)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    done = []
    for batches in (5, 7):
        command = [sys.executable, "-c", KILLED, files, out, tokenizer, str(batches)]
        ended = subprocess.run(command, cwd=Path(__file__).parent, stderr=subprocess.PIPE, timeout=120)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        done.append(json.loads((partial / "journal.json").read_text())["state"]["documents"])
    assert 0 < done[0] < done[1]
    looked_at: list[str] = []
    real = read_documents

    def watched(sources, *, report, **reading):  # type: ignore[no-untyped-def]
        looked_at.append(sources[report.source].path.name)
        return real(sources, **reading, report=report)

    monkeypatch.setattr(corpus_writing, "read_documents", watched)
    prepare([files], out, tokenizer=tokenizer, **OPTIONS)
    assert looked_at == ["4.txt"], "files that were done are not opened again"
    assert contents(out) == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupted_runs_are_gone_on_with(
    files: Path, tokenizer: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Ctrl-C before the journal's first entry leaves nothing, later what is durable; errors leave nothing."""
    monkeypatch.setattr(corpus_writing, "JOURNAL_BATCHES", 3)
    monkeypatch.setattr(corpus_writing, "BATCH_CHARACTERS", 20_000)
    real = corpus_writing.ShardedText._add

    for error, added, kept in (
        (KeyboardInterrupt(), 2, []),
        (UserError("bad text"), 5, []),
        (KeyboardInterrupt(), 5, [".out.partial"]),
    ):
        left = iter(range(added))

        def add(self, blocks, left=left, error=error):  # type: ignore[no-untyped-def]
            if next(left, None) is None:
                raise error
            real(self, blocks)

        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(corpus_writing.ShardedText, "_add", add)
            prepare([files], tmp_path / "out", tokenizer=tokenizer, **OPTIONS)
        assert [path.name for path in tmp_path.iterdir()] == kept
    before = json.loads((tmp_path / ".out.partial" / "journal.json").read_text())["state"]["documents"]
    read: list[list[str]] = []

    def watched(sources, **options):  # type: ignore[no-untyped-def]
        return (read.append(document) or document for document in read_documents(sources, **options))

    monkeypatch.setattr(corpus_writing, "read_documents", watched)
    manifest = prepare([files], tmp_path / "out", tokenizer=tokenizer, **OPTIONS)
    assert len(read) == sum(split.documents for split in manifest.splits.values()) - before < len(read) + before
    assert contents(tmp_path / "out") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_while_one_document_was_taken_out(
    files: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The journal tells of the shards before; by then it is gone, and all begins anew."""
    monkeypatch.setattr(corpus_writing, "JOURNAL_BATCHES", 1)
    options = {**OPTIONS, "tokenizer": tokenizer, "heldout_fraction": 1e-9}
    prepare([files], tmp_path / "whole", **options)
    left = tmp_path / ".out.partial"
    real = hold_out._spare

    def watched(shards, counts):  # type: ignore[no-untyped-def]
        shutil.copytree(left, tmp_path / "left")
        return real(shards, counts)

    with monkeypatch.context() as patch:
        patch.setattr(hold_out, "_spare", watched)
        prepare([files], tmp_path / "out", **options)
    assert (tmp_path / "left" / "before").is_dir() and not (tmp_path / "left" / "journal.json").exists()
    shutil.rmtree(tmp_path / "out")
    shutil.move(tmp_path / "left", left)
    prepare([files], tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and not left.exists()


WORKERS_OF_A_KILLED_PROCESS = """
import multiprocessing, os, signal, sys
from electra_core.corpora.encoding import Document, encode_all
from electra_core.tokenizer import load_tokenizer

if __name__ == "__main__":
    batches = ([Document(0, ["words and more"])] for _ in range(10**9))
    blocks = encode_all(batches, load_tokenizer(sys.argv[1]), "auto", 2)
    next(blocks)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_main_process(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(WORKERS_OF_A_KILLED_PROCESS)
    done = subprocess.run([sys.executable, tmp_path / "run.py", tokenizer], stdout=subprocess.PIPE, timeout=120)
    workers = [Path(f"/proc/{number}") for number in done.stdout.decode().split()]
    assert done.returncode == -signal.SIGKILL and workers
    wait_until(lambda: not any(worker.exists() for worker in workers))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("limits", [{}, {"BLOCK_BYTES": 16, "MAX_LINE": 40, "MAX_DOCUMENT_CHARACTERS": 100}])
def test_reading_goes_on_behind_any_document(
    name: str, limits: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit, value in limits.items():
        monkeypatch.setattr(f"electra_core.corpora.text_files.{limit}", value)
    for folder in ("1", "2", "3"):
        (tmp_path / folder).mkdir()
        texts = [" ".join(f"{folder}w{i}" for i in range(40 * (j % 3) + 1)) for j in range(5)]
        rows = [{"text": text} for text in texts]
        content = {
            "a.txt": "\n\n".join(texts),
            "a.jsonl": "\n".join(map(json.dumps, rows)),
            "a.json": json.dumps(rows),
            "a.csv": "\n".join(["text", *texts]),
        }
        (tmp_path / folder / name).write_text(content[name] if folder != "2" else "")
    sources = find_sources([tmp_path])
    report = ReadReport()
    seen: list[tuple[ReadReport, list[str]]] = []
    for document in read_documents(sources, report=report):
        seen.append((ReadReport(**vars(report)), document))
    assert (report.cut_lines > 0) == bool(limits)
    for place, (before, _) in enumerate(seen):
        again = ReadReport(**vars(before))
        assert list(read_documents(sources, report=again)) == [document for _, document in seen[place + 1 :]]
        assert again == report


def test_what_a_killed_run_left_is_of_no_use_to_another(tmp_path: Path) -> None:
    (tmp_path / "train-00000.tokens").write_bytes(b"1234")
    journal = Journal(tmp_path, {"seed": 0})
    assert journal.state is None and not list(tmp_path.iterdir())
    journal.write({"documents": 3})
    (tmp_path / "train-00000.tokens").write_bytes(b"1234")
    assert Journal(tmp_path, {"seed": 0}).state == {"documents": 3}
    assert len(list(tmp_path.iterdir())) == 2
    assert Journal(tmp_path, {"seed": 1}).state is None and not list(tmp_path.iterdir())
    for damaged in ("", "{", "[]", "[" * 100_000, '{"settings": {"seed": 0}}'):
        (tmp_path / "journal.json").write_text(damaged)
        assert Journal(tmp_path, {"seed": 0}).state is None


def test_an_entry_that_a_killed_run_was_writing_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, {"seed": 0})
    journal.write({"documents": 3})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", mock.Mock(side_effect=KeyboardInterrupt))  # stands for the kill
        journal.write({"documents": 5})
    journal = Journal(tmp_path, {"seed": 0})
    assert journal.state == {"documents": 3}
    journal.remove()
    assert not list(tmp_path.iterdir()), "the folder is to be the corpus"


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with partial_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        with pytest.raises(UserError, match="another process is writing"), partial_folder(tmp_path / "out"):
            pass
        assert (folder / "file").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]
