"""Corpora: what goes wrong while one is written or opened leaves nothing half-done and is said in a line."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from killed import contents, wait_until
from small_corpora import copied, data, small_batches, text, tokenizer  # noqa: F401

from electra_core.cli import build_parser
from electra_core.corpora.shards import Manifest
from electra_core.corpora.vocabulary import train_sentencepiece
from electra_core.corpus import Corpus
from electra_core.errors import UserError
from electra_core.prepare import SAMPLE_CHARACTERS, prepare

# ------------------------------------------------------------------------------------------------ what goes wrong


def test_bad_arguments(text: Path, tmp_path: Path) -> None:
    for options in ({"lines": "x"}, {"documents": "x"}, {"workers": 0}, {"heldout_fraction": 1.0}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected "):
            prepare([text], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_file_given_twice_would_count_double(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    shutil.copy(text, tmp_path / "a.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    for paths in ([text, text], [tmp_path / "a.txt", tmp_path], [tmp_path]):
        with pytest.raises(UserError, match=r"\.txt: given twice, by itself or in a folder"):
            prepare(paths, tmp_path / "out", tokenizer=tokenizer, quiet=True)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which none can be made")
def test_no_folder_can_be_made(text: Path, tokenizer: Path) -> None:
    with pytest.raises(UserError, match=r"^/proc: no folder can be made here"):
        prepare([text], Path("/proc/x/y"), tokenizer=tokenizer, quiet=True)


def test_text_without_a_word_to_learn(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 3_000_000)
    with pytest.raises(UserError, match="contains nothing to train a vocabulary on"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", quiet=True)


def test_the_command_learns_from_as_much_text_as_the_function() -> None:
    options = build_parser().parse_args(["prepare", "--text", "a.txt", "--out", "DATA"])
    assert options.sample_characters == SAMPLE_CHARACTERS


@pytest.mark.parametrize("bad", ["absent.txt", "latin.txt", "small.txt", "empty.txt", "tokenizer"])
def test_nothing_is_left_after_an_error(tmp_path: Path, text: Path, bad: str) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "small.txt").write_text("a few words are too few for so large a vocabulary")
    (tmp_path / "empty.txt").touch()
    before = contents(tmp_path)
    with pytest.raises(UserError):
        prepare(
            [text if bad == "tokenizer" else tmp_path / bad],
            tmp_path / "out",
            tokenizer=tmp_path / "absent" if bad == "tokenizer" else "sentencepiece",
            quiet=True,
        )
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


def test_an_error_leaves_the_earlier_corpus(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "out")
    (tmp_path / "late.txt").write_bytes(b"good\n\n" * 1000 + b"\xff")
    with pytest.raises(UserError, match=r"invalid UTF-8 at byte 6,000 "):
        prepare([tmp_path / "late.txt"], tmp_path / "out", tokenizer=tokenizer, overwrite=True, quiet=True)
    assert contents(tmp_path / "out") == contents(data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late.txt", "out"]


def test_what_may_be_overwritten(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    options = {"tokenizer": tokenizer, "heldout_fraction": 0, "quiet": True}
    (tmp_path / "empty").mkdir()
    prepare([tmp_path / "a.txt"], tmp_path / "empty", **options)
    with pytest.raises(UserError, match="already holds a prepared corpus"):
        prepare([tmp_path / "a.txt"], tmp_path / "empty", **options, seed=1)
    assert (
        prepare([tmp_path / "a.txt"], tmp_path / "empty", overwrite=True, **options).splits["train"].documents == 1
    )
    with pytest.raises(UserError, match="is not a prepared corpus"):
        prepare([tmp_path / "a.txt"], tmp_path, overwrite=True, **options)
    (tmp_path / "empty" / "b.txt").write_text("text inside the corpus")
    with pytest.raises(UserError, match=r"b\.txt: is inside"):
        prepare([tmp_path / "empty" / "b.txt"], tmp_path / "empty", overwrite=True, **options)
    (tmp_path / "empty" / "run").mkdir()
    for overwrite in (True, False):
        with pytest.raises(UserError, match=r"holds more than a prepared corpus \(b.txt, run\), which would be"):
            prepare([tmp_path / "a.txt"], tmp_path / "empty", overwrite=overwrite, **options, seed=1)


@pytest.mark.parametrize(
    ("code", "message"), [(errno.ENOSPC, "out: the disk is full"), (errno.EACCES, "out: no permission")]
)
def test_a_full_disk_and_no_permission(
    text: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("electra_core.corpora.shards._HashedFile.write", fail)
    with pytest.raises(UserError, match=message):
        prepare([text], tmp_path / "out", tokenizer=tokenizer, quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_real_limit_on_file_size(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(UserError, match="does not allow a file of this size; nothing was kept"):
            prepare([text], tmp_path / "out", tokenizer=tokenizer, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def imports(process: str) -> bool:
    """Whether a process is a worker that has begun to import what it needs."""
    try:
        here = Path("/proc", process)
        return "spawn_main" in (here / "cmdline").read_text() and "numpy" in (here / "maps").read_text()
    except OSError:  # gone meanwhile
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("workers_have", ["begun", "written"])
def test_ctrl_c_leaves_nothing_of_standard_input(tokenizer: Path, tmp_path: Path, workers_have: str) -> None:
    """A real interrupt, of a run whose workers are still importing, or that waits for more input."""
    code = (
        "import sys; from electra_core import prepare; from electra_core.corpora import writing\n"
        "if __name__ == '__main__':\n"
        "    writing.BATCH_CHARACTERS = 10_000\n"
        "    prepare.prepare(['-'], sys.argv[1], tokenizer=sys.argv[2], workers=2, heldout_fraction=0)"
    )
    (tmp_path / "run.py").write_text(code)
    text = b"one more document\n\n" * 120_000
    with tempfile.TemporaryFile() as file:
        file.write(text)
        file.seek(0)
        process = subprocess.Popen(
            [sys.executable, tmp_path / "run.py", tmp_path / "out", tokenizer],
            stdin=subprocess.PIPE if workers_have == "written" else file, stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background shells ignore it
        )  # fmt: skip
    try:
        if process.stdin is None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            wait_until(lambda: any(map(imports, children.read_text().split())))
        else:
            process.stdin.write(text)
            process.stdin.flush()
            written = tmp_path / ".out.partial/train-00000.tokens"
            wait_until(lambda: written.exists() and written.stat().st_size > 0)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does: everybody gets it
        errors = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert process.returncode != 0 and errors.count("KeyboardInterrupt") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.py"]


def test_opening_what_is_no_corpus(tmp_path: Path, copied: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="not a prepared corpus"):
            Corpus.open(folder)
    with pytest.raises(ValueError, match="split: expected one of"):
        Corpus.open(copied, "test")
    manifest = json.loads((copied / "manifest.json").read_text())
    for content, message in (
        ("{", "not the manifest of a corpus"),
        ("[]", "not the manifest of a corpus"),
        ("[" * 100_000, "manifest.json: not the manifest of a corpus .*nested too deeply"),
        ("{}", "not the manifest of a corpus"),
        (json.dumps({**manifest, "format_version": 99}), "format version 99"),
        (json.dumps({**manifest, "surprise": 1}), "not the manifest of a corpus"),
        (json.dumps({**manifest, "tokenizer_fingerprint": "0"}), "fingerprint does not match"),
        (
            json.dumps({**manifest, "splits": {**manifest["splits"], "train": {"shards": 1}}}),
            "counts .* do not match",
        ),
    ):
        (copied / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=message):
            Corpus.open(copied)


def test_files_missing_cut_off_or_damaged(copied: Path, tokenizer: Path) -> None:
    path = copied / "train-00000.tokens"
    whole = path.read_bytes()
    Corpus.open(copied).verify()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(UserError, match=r"train-00000\.tokens: damaged \(the checksum"):
        Corpus.open(copied).verify()
    path.write_bytes(whole)
    opened = Corpus.open(copied)
    path.unlink()
    with pytest.raises(UserError, match=r"train-00000\.tokens: cannot be read \(No such file"):
        opened.verify()
    path.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"train-00000\.tokens: truncated or changed"):
        Corpus.open(copied)
    path.unlink()
    with pytest.raises(UserError, match=r"train-00000\.tokens: missing"):
        Corpus.open(copied)
    path.write_bytes(whole)
    offsets = np.fromfile(copied / "train-00000.sentences", "<u8")
    offsets[-1] += 1
    offsets.tofile(copied / "train-00000.sentences")
    with pytest.raises(UserError, match="the offsets do not match the tokens"):
        Corpus.open(copied)


def test_another_tokenizer_is_noticed(copied: Path, text: Path) -> None:
    train_sentencepiece(text.read_text("utf-8").split("\n")[:1000], 500).save(copied / "tokenizer")
    with pytest.raises(UserError, match="this tokenizer is not the one that the corpus was made with"):
        _ = Corpus.open(copied).tokenizer


def test_manifest_survives_the_disk(data: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(data / "manifest.json")
    manifest.write(tmp_path / "manifest.json")
    assert (tmp_path / "manifest.json").read_bytes() == (data / "manifest.json").read_bytes()
    assert manifest.settings["sources"][0]["name"] == "topics.txt"


def test_prepare_shows_how_far_it_is(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {}

    class Recorder:
        def __init__(self, title: str, total: int | None, unit: str, *, quiet: bool) -> None:
            self.steps = seen.setdefault(f"{title} {total} {unit}", [])

        def __enter__(self) -> "Recorder":
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, amount: int = 1) -> None:
            self.steps.append(amount)

        def note(self, **_: object) -> None: ...

    monkeypatch.setattr("electra_core.corpora.writing.progress", Recorder)
    prepare([text], tmp_path / "out", vocab_size=300, sample_characters=50_000)
    size = text.stat().st_size
    assert [sum(seen[f"{title} {size} B"]) for title in ("reading a sample", "writing tokens")] == [size, size]
    assert min(step for steps in seen.values() for step in steps) >= 0
    assert len(seen[f"writing tokens {size} B"]) > 10
