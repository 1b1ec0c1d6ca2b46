"""Preparing in parts, on many machines: always the bytes of one run."""

import io
import re
import shutil
from pathlib import Path

import pytest
import tiny_model
from killed import contents
from small_corpora import OPTIONS, documents_of, files, small_batches, text, tokenizer, whole  # noqa: F401

from electra_core.cli import main
from electra_core.corpora.merge import merge
from electra_core.corpora.shards import Manifest
from electra_core.corpora.sources import Source, share
from electra_core.corpus import Corpus
from electra_core.errors import UserError
from electra_core.prepare import prepare, train_tokenizer


@pytest.fixture(scope="module")
def parts(files: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parts")
    for part in (1, 2, 3):
        prepare([files], folder / str(part), tokenizer=tokenizer, shard=(part, 3), **OPTIONS)
    return [folder / str(part) for part in (1, 2, 3)]


def test_merged_parts_are_the_whole_byte_for_byte(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    manifest = merge([parts[2], parts[0], parts[1]], tmp_path / "merged", quiet=True)
    assert contents(tmp_path / "merged") == contents(whole)
    assert manifest.splits["train"].shards > 1 and manifest.notes == ("1 of the files are empty",)
    assert Corpus.open(tmp_path / "merged", "heldout").num_tokens > 0


def test_a_file_as_one_document_in_parts_and_by_several_workers(
    files: Path, tokenizer: Path, whole: Path, tmp_path: Path, small_batches: None
) -> None:  # fmt: skip
    """Blank lines are passed over; rows are documents as before. The bytes are those of one run."""
    options = {**OPTIONS, "tokenizer": tokenizer, "documents": "file"}
    manifest = prepare([files], tmp_path / "one", **options)
    splits = manifest.splits.values()
    assert sum(split.documents for split in splits) == 3 + 28, "three .txt files with text, 28 rows"
    by_blank_lines = Manifest.read(whole / "manifest.json")
    assert sum(split.documents for split in by_blank_lines.splits.values()) > 70
    assert sum(split.tokens for split in splits) == sum(split.tokens for split in by_blank_lines.splits.values())
    assert manifest.settings["documents"] == "file" and "documents" not in by_blank_lines.settings
    prepare([files], tmp_path / "many", workers=2, **options)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    parts = [tmp_path / "first", tmp_path / "second"]
    for number, part in enumerate(parts, start=1):
        prepare([files], part, shard=(number, 2), **options)
    merge(parts, tmp_path / "merged", quiet=True)
    assert contents(tmp_path / "merged") == contents(tmp_path / "one")
    other = tmp_path / "other"
    prepare([files], other, shard=(2, 2), **{**options, "documents": "blank-line"})
    for pair in ([parts[0], other], [other, parts[0]]):
        with pytest.raises(UserError, match="differ in documents"):
            merge(pair, tmp_path / "none", quiet=True)


def test_parts_that_do_not_make_a_whole(
    whole: Path, parts: list[Path], files: Path, tokenizer: Path, tmp_path: Path
) -> None:  # fmt: skip
    def fails(which: list[Path], message: str) -> None:
        with pytest.raises(UserError, match=message):
            merge(which, tmp_path / "merged", quiet=True)
        assert not (tmp_path / "merged").exists()

    fails(parts[:1], "missing: part 2, 3 of 3")
    fails([*parts, parts[0]], "are both part 1 of 3")
    fails([whole], "a whole corpus, not a part")
    prepare([files], tmp_path / "seed", tokenizer=tokenizer, shard=(2, 3), seed=1, **OPTIONS)
    fails([parts[0], tmp_path / "seed", parts[2]], "differ in seed")
    prepare([files / "0.txt", files / "1.txt", files / "2.jsonl"], tmp_path / "other", tokenizer=tokenizer,
            shard=(2, 3), **OPTIONS)  # fmt: skip
    fails([parts[0], tmp_path / "other", parts[2]], "differ in the files that were cut into parts")
    tokens = shutil.copytree(parts[0], tmp_path / "damaged") / "train-00000.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"\xff")
    fails([tmp_path / "damaged", *parts[1:]], r"train-00000\.tokens: damaged")


@pytest.mark.parametrize("shard_tokens", [10, 1 << 28])
def test_parts_without_held_out_documents_make_a_whole_with_one(
    tokenizer: Path, tmp_path: Path, shard_tokens: int
) -> None:  # fmt: skip
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, words in enumerate((5, 9, 2)):
        (texts / f"{number}.txt").write_text(f"{'word ' * words}\n\n{'letter ' * words}")
    options = {**OPTIONS, "tokenizer": tokenizer, "heldout_fraction": 1e-9, "shard_tokens": shard_tokens}
    parts = [tmp_path / f"part{number}" for number in (1, 2)]
    for number, part in enumerate(parts, start=1):
        assert not prepare([texts], part, shard=(number, 2), **options).splits["heldout"].documents
    for workers in (1, 2):
        prepare([texts], tmp_path / f"whole{workers}", workers=workers, **options)
    merge(parts, tmp_path / "merged", quiet=True)
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole1") == contents(tmp_path / "whole2")
    assert Corpus.open(tmp_path / "merged", "heldout").num_documents == 1
    Corpus.open(tmp_path / "merged").verify()


@pytest.mark.parametrize("sizes", [[1] * 8, [9, 1, 1, 1], [1, 1, 1, 9], [0, 0, 5], [3, 1, 4, 1, 5, 9, 2, 6]])
def test_every_file_goes_to_one_part(sizes: list[int], tmp_path: Path) -> None:
    sources = []
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.txt").write_bytes(b"x" * size)
        sources.append(Source(str(number), tmp_path / f"{number}.txt"))
    for parts in range(1, len(sizes) + 1):
        shared = [share(sources, part, parts) for part in range(1, parts + 1)]
        assert all(shared) and [source for part in shared for source in part] == sources
    with pytest.raises(UserError, match=r"shard: expected at most as many parts as files, \d+, got"):
        share(sources, 1, len(sizes) + 1)
    with pytest.raises(UserError, match="shard 3/2: expected a part from 1 to 2"):
        share(sources, 3, 2)
    with pytest.raises(UserError, match="pipes cannot be divided into parts"):
        share([Source("standard input", None)], 1, 1)


def test_shares_are_of_about_equal_size(tmp_path: Path) -> None:
    sources = []
    for number in range(100):
        (tmp_path / f"{number}.txt").write_bytes(b"x" * (1 + number % 7))
        sources.append(Source(str(number), tmp_path / f"{number}.txt"))
    sizes = [sum(source.size or 0 for source in share(sources, part, 4)) for part in (1, 2, 3, 4)]
    assert max(sizes) - min(sizes) <= 14


def test_on_the_command_line(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer, two parts, one corpus: the same examples as `prepare` makes by itself."""
    common = ["--seed", "3", "--quiet"]
    small = ["--vocab-size", "400", "--sample-characters", "100000"]
    prepare_text = ["prepare", "--text", str(files), *common]
    words = ["--tokenizer", str(tmp_path / "words"), "--heldout-fraction", "0.1"]
    assert main([*prepare_text, *small, "--tokenizer-only", "--out", str(tmp_path / "words")]) == 0
    for part in ("1", "2"):
        assert main([*prepare_text, *words, "--shard", f"{part}/2", "--out", str(tmp_path / part)]) == 0
    parts = [str(tmp_path / part) for part in ("1", "2")]
    assert main(["prepare", "--merge", *parts, "--out", str(tmp_path / "merged"), "--quiet"]) == 0
    assert "next: electra prepare --merge PART... --out DATA" in capsys.readouterr().out
    assert main([*prepare_text, *small, "--heldout-fraction", "0.1", "--out", str(tmp_path / "whole")]) == 0
    assert Corpus.open(tmp_path / "merged").fingerprint == Corpus.open(tmp_path / "whole").fingerprint
    for bad, message in (
        ([*prepare_text, "--shard", "1/2"], "needs an existing --tokenizer"),
        ([*prepare_text, "--shard", "1-2"], "--shard: expected I/N"),
        ([*prepare_text, *words, "--shard", "9/9"], "--shard: expected at most as many parts as files"),
        ([*prepare_text, *words[:2], "--tokenizer-only"], "expected sentencepiece or wordpiece to train one"),
    ):
        assert main([*bad, "--out", str(tmp_path / "bad")]) == 2
        assert re.search(message, capsys.readouterr().err)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"words")))
    assert main(["prepare", "--text", "-", *words, "--shard", "1/1", "--out", str(tmp_path / "bad")]) == 2
    assert not (tmp_path / "bad").exists()


def test_a_tokenizer_is_not_written_over_something_else(files: Path, tmp_path: Path) -> None:
    options = {"vocab_size": 300, "sample_characters": 50_000, "quiet": True}
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not a tokenizer"):
        train_tokenizer([files], tmp_path / "words", overwrite=True, **options)
    (tmp_path / "words" / "letter.txt").unlink()
    train_tokenizer([files], tmp_path / "words", **options)
    with pytest.raises(UserError, match="already holds a tokenizer"):
        train_tokenizer([files], tmp_path / "words", **options)
    text = shutil.copy(next(files.rglob("*.txt")), tmp_path / "words" / "text.txt")
    with pytest.raises(UserError, match=r"text\.txt: is inside .*words, which would be overwritten"):
        train_tokenizer([text], tmp_path / "words", overwrite=True, **options)
    assert Path(text).is_file()


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_tokenizer_is_not_written_over_a_model(files: Path, tmp_path: Path, overwrite: bool) -> None:
    """A model's folder holds a tokenizer, too."""
    options = {"vocab_size": 300, "sample_characters": 50_000, "quiet": True}
    model = tiny_model.make_model(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(UserError, match=r"holds more than a tokenizer \(config.json, .*\), which would be"):
        train_tokenizer([files], model, overwrite=overwrite, **options)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    for kind in ("sentencepiece", "wordpiece"):  # what it writes itself it may replace
        train_tokenizer([files], tmp_path / "words", tokenizer=kind, overwrite=True, **options)
    train_tokenizer([files], tmp_path / "words", overwrite=True, **options)
    assert not (tmp_path / "words" / "vocab.txt").exists()
