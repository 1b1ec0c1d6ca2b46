"""From text files to memory-mapped shards: what is written, that it is always the same, and what goes wrong."""

import gc
import io
import json
import os
import re
import shutil
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from killed import contents
from small_corpora import copied, data, documents_of, small_batches, text, tokenizer  # noqa: F401

from electra_core.corpora import encoding
from electra_core.corpora.encoding import MAX_SENTENCE_TOKENS, WordEncoder, cut_lengths
from electra_core.corpora.sentences import split_document
from electra_core.corpora.shards import SPLITS, Block, Manifest, ShardWriter
from electra_core.corpus import Corpus
from electra_core.prepare import prepare
from electra_core.tokenizer import load_tokenizer


def stored_documents(corpus: Corpus) -> list[list[list[int]]]:
    """Every document as a list of its sentences' ids."""
    return [
        [shard.tokens[shard.sentences[i] : shard.sentences[i + 1]].tolist() for i in range(first, end)]
        for shard in corpus.shards
        for first, end in zip(shard.documents[:-1].tolist(), shard.documents[1:].tolist(), strict=True)
    ]


# ---------------------------------------------------------------------------------------------- what is written


def test_the_shards_hold_the_text(data: Path, text: Path) -> None:
    train, heldout = Corpus.open(data), Corpus.open(data, "heldout")
    tokenizer = train.tokenizer.as_plain_text()
    expected: Counter[tuple[int, ...]] = Counter()
    for document in documents_of(text):
        ids = [tokenizer.encode(sentence) for sentence in split_document(document)]
        expected[tuple(token for sentence in ids for token in sentence)] += 1
    stored = [*stored_documents(train), *stored_documents(heldout)]
    assert Counter(tuple(token for sentence in document for token in sentence) for document in stored) == expected
    assert all(0 < len(sentence) <= MAX_SENTENCE_TOKENS for document in stored for sentence in document)
    assert len(train.shards) > 1 and all(shard.tokens.dtype == np.uint16 for shard in train.shards)
    assert 0.1 < heldout.num_documents / len(stored) < 0.3


def test_starts_are_where_documents_begin(data: Path) -> None:
    for split in SPLITS:
        for shard in Corpus.open(data, split).shards:
            assert np.array_equal(shard.starts, shard.sentences[shard.documents])


def test_a_corpus_may_be_made_of_links(data: Path, tmp_path: Path) -> None:
    """As from `cp -rs`: one that nobody else can write into."""
    shutil.copytree(data, tmp_path / "links", copy_function=os.symlink)
    assert Corpus.open(tmp_path / "links").tokenizer.vocab_size == Corpus.open(data).tokenizer.vocab_size


def test_a_manifest_is_shown_without_its_checksums(data: Path) -> None:
    manifest = replace(Manifest.read(data / "manifest.json"), tokenizer_fingerprint="printed by nobody")
    shown = repr(manifest)
    assert f"vocab_size={manifest.vocab_size}" in shown and manifest.tokenizer_fingerprint not in shown
    assert not any(entry.sha256 in shown for entry in manifest.files.values())


def test_a_corpus_of_version_1_opens(data: Path, copied: Path) -> None:
    content = json.loads((copied / "manifest.json").read_text())
    new = Corpus.open(copied)
    old = Manifest.read(copied / "manifest.json")
    files = {name: entry for name, entry in old.files.items() if not name.endswith(".starts")}
    for path in copied.glob("*.starts"):
        path.unlink()
    replace(old, format_version=1, files=files).write(copied / "manifest.json")
    again = Corpus.open(copied)
    assert json.loads((copied / "manifest.json").read_text())["fingerprint"] != content["fingerprint"]
    for shard, before in zip(again.shards, new.shards, strict=True):
        assert np.array_equal(shard.starts, before.starts)


def test_shards_do_not_depend_on_how_documents_were_grouped(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    documents = [draw.integers(1, 9, size=draw.integers(1, 5)) for _ in range(60)]
    written = []
    for group in (1, 7, 60):
        folder = tmp_path / str(group)
        folder.mkdir()
        writer = ShardWriter(folder, "train", np.dtype("<u2"), 100)
        for first in range(0, 60, group):
            add(writer, documents[first : first + group])
        writer.close()
        written.append(contents(folder))
        assert writer.counts.shards > 5 and writer.counts.documents == 60
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("written", [0, 3, 31, 60])
def test_a_writer_goes_on_where_another_was_killed(tmp_path: Path, written: int) -> None:
    draw = np.random.default_rng(1)
    documents = [draw.integers(1, 9, size=draw.integers(1, 5)) for _ in range(60)]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = ShardWriter(tmp_path / "whole", "train", np.dtype("<u2"), 100)
    add(whole, documents)
    whole.close()
    killed = ShardWriter(tmp_path / "killed", "train", np.dtype("<u2"), 100)
    add(killed, documents[:written])
    state = json.loads(json.dumps(killed.sync()))
    add(killed, documents[written:][::-1])  # what comes after the last `sync` is lost
    killed.sync()
    again = ShardWriter(tmp_path / "killed", "train", np.dtype("<u2"), 100, state)
    add(again, documents[written:])
    again.close()
    assert (again.files, again.counts) == (whole.files, whole.counts)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def add(writer: ShardWriter, documents: list[np.ndarray]) -> None:
    """Documents, as lengths of sentences, of tokens that tell which document they are of."""
    tokens = [np.full(int(lengths.sum()), lengths.sum(), "<u2") for lengths in documents]
    sentences = np.concatenate([np.zeros(0, np.int64), *documents])
    content = b"".join(map(bytes, tokens))
    writer.add(Block(content, sentences, np.array([len(lengths) for lengths in documents], np.int64)))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("large", [False, True])
def test_a_large_corpus_is_not_read_around(data: Path, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    monkeypatch.setattr("electra_core.corpus.LARGE", 0 if large else 1_000_000_000)
    gc.collect()  # maps of the same files that nobody uses any more
    corpus = Corpus.open(data)
    corpus.read_at_random()
    advised: dict[str, bool] = {}
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").split("\n"):
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            file = Path(line.split(maxsplit=5)[-1])
        elif line.startswith("VmFlags:") and file.parent == data and file.name.startswith("train-"):
            kind = file.suffix[1:]
            advised[kind] = advised.get(kind, False) or "rr" in line.split()
    assert advised == {"tokens": False, "sentences": large, "documents": False, "starts": False}
    assert corpus.num_documents > 0


def test_counts_and_sentences_across_shards(data: Path) -> None:
    corpus = Corpus.open(data)
    documents = stored_documents(corpus)
    sentences = [sentence for document in documents for sentence in document]
    assert corpus.num_documents == len(documents) and corpus.num_sentences == len(sentences)
    assert corpus.num_tokens == sum(map(len, sentences))
    with pytest.raises(ValueError, match="read-only"):
        corpus.shards[0].tokens[0] = 1


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_byte(
    data: Path, text: Path, tokenizer: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "CACHE_CHARACTERS", 1000)  # in this process, words are forgotten all the time
    prepare(
        [text], tmp_path / "out", tokenizer=tokenizer, heldout_fraction=0.2, shard_tokens=50_000, workers=workers,
        quiet=True,
    )  # fmt: skip
    assert contents(tmp_path / "out") == contents(data)


def test_what_is_held_out_does_not_depend_on_the_rest(
    data: Path, text: Path, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "part.txt").write_text("\n\n".join("\n".join(document) for document in documents_of(text)[::-2]))
    prepare([tmp_path / "part.txt"], tmp_path / "out", tokenizer=tokenizer, heldout_fraction=0.2, quiet=True)
    for split in ("train", "heldout"):
        whole, part = (
            map(repr, stored_documents(Corpus.open(folder, split))) for folder in (data, tmp_path / "out")
        )
        assert set(part) <= set(whole)


FEW = {
    "unlike lengths": [
        "one",
        "long text of all",
        "all of text long",
        *["words with a copy of them"] * 2,
        "the word " * 40,
    ],
    "the last": ["the word " * 40, "the word " * 41, "a word"],
    "copies": ["the word", "the word"],
}


@pytest.mark.parametrize("shard_tokens", [8, 1 << 28])
@pytest.mark.parametrize("name", FEW)
def test_of_few_documents_one_is_held_out(tokenizer: Path, tmp_path: Path, name: str, shard_tokens: int) -> None:
    """The longest up to the average, the first of equals, one without a copy; the rest stays as it is."""
    (tmp_path / "a.txt").write_text("\n\n".join(FEW[name]))
    options = {"tokenizer": tokenizer, "shard_tokens": shard_tokens, "quiet": True}
    prepare([tmp_path / "a.txt"], tmp_path / "all", heldout_fraction=0, **options)
    manifest = prepare([tmp_path / "a.txt"], tmp_path / "few", **options)
    everything, train, heldout = (
        stored_documents(Corpus.open(tmp_path / folder, split))
        for folder, split in (("all", "train"), ("few", "train"), ("few", "heldout"))
    )
    place = {"unlike lengths": 1, "the last": 2, "copies": 0}[name]
    assert heldout == [everything[place]] and train == everything[:place] + everything[place + 1 :]
    assert manifest.notes[-1].startswith("few documents, and the draw held out none; one ")
    Corpus.open(tmp_path / "few").verify()
    assert not (tmp_path / "few" / "before").exists()


def test_a_document_alone_is_not_held_out(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one document")
    manifest = prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tokenizer, quiet=True)
    assert [manifest.splits[split].documents for split in SPLITS] == [1, 0]
    assert manifest.notes[-1].startswith("no document is held out")


@pytest.fixture
def part(text: Path, tmp_path: Path) -> Path:
    """The first chapters."""
    content = text.read_bytes()[:100_000]
    (tmp_path / "part.txt").write_bytes(content[: content.rfind(b"\n\n")])
    return tmp_path / "part.txt"


def test_a_trained_tokenizer_and_standard_input(
    part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare([part], tmp_path / "file", vocab_size=300, quiet=True)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(part.read_bytes())))
    second = prepare(["-"], tmp_path / "stdin", vocab_size=300, quiet=True)
    assert first.fingerprint == second.fingerprint and first.vocab_size == 300
    assert {path.name.split(".")[-1] for path in (tmp_path / "stdin").iterdir()} == {
        "tokens", "sentences", "documents", "starts", "json", "tokenizer",
    }  # fmt: skip


@pytest.mark.parametrize("trained", [True, False])
def test_text_from_pipes(part: Path, tmp_path: Path, trained: bool) -> None:
    """As of bash's `--text <(zcat a.gz) <(zcat b.gz)`: no size, no position, and gone once they are read."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "One more document."}) + "\n")
    options = {"vocab_size": 300, "lines": "sentence", "quiet": True}
    first = prepare([part, rows], tmp_path / "files", **options)
    if not trained:
        options["tokenizer"] = tmp_path / "files" / "tokenizer"
    pipes = [tmp_path / "text", tmp_path / "pipe.jsonl"]
    for pipe, file in zip(pipes, (part, rows)):
        os.mkfifo(pipe)
        threading.Thread(target=pipe.write_bytes, args=[file.read_bytes()], daemon=True).start()
    second = prepare(pipes, tmp_path / "pipes", **options)
    assert first.fingerprint == second.fingerprint
    assert [source["bytes"] for source in second.settings["sources"]] == [None, None]
    assert {path.name for path in (tmp_path / "pipes").iterdir()} == {
        path.name for path in (tmp_path / "files").iterdir()
    }


def test_kinds_of_tokenizers(part: Path, tmp_path: Path) -> None:
    options = {"model_type": "bpe", "lowercase": False, "vocab_size": 300, "quiet": True}
    prepare([part], tmp_path / "cased", **options)
    corpus = Corpus.open(tmp_path / "cased")
    capitalised = set(re.findall(r"\b[A-Z][a-z]+\b", part.read_text(encoding="utf-8")))
    assert capitalised & set(corpus.tokenizer.decode(corpus.shards[0].tokens[:5000].tolist()).split())
    words = prepare([part], tmp_path / "words", tokenizer="wordpiece", vocab_size=400, quiet=True)
    assert (tmp_path / "words" / "tokenizer" / "vocab.txt").is_file() and words.vocab_size == 400


def test_duplicates_special_names_and_notes(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the same text\n\nthe same text\n\nthe [MASK] of 東京\n\n\u200b\n")
    options = {"tokenizer": tokenizer, "quiet": True, "heldout_fraction": 0.0}
    twice = prepare([tmp_path / "a.txt"], tmp_path / "twice", **options)
    once = prepare([tmp_path / "a.txt"], tmp_path / "once", drop_duplicates=True, **options)
    assert (twice.splits["train"].documents, once.splits["train"].documents) == (3, 2)  # \u200b leaves nothing
    corpus = Corpus.open(tmp_path / "once")
    assert corpus.tokenizer.mask_id not in corpus.shards[0].tokens
    assert [note.split("; ")[0].split(" ", 1)[1] for note in once.notes] == [
        "of the tokens are [UNK]", "document is held out",
    ]  # fmt: skip
    assert Corpus.open(tmp_path / "once", "heldout").num_tokens == 0
    assert Corpus.open(tmp_path / "once").manifest == once


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(70_000))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "a.txt").write_text("w69999 w3")
    prepare(
        [tmp_path / "a.txt"],
        tmp_path / "out",
        tokenizer=tmp_path / "vocab.txt",
        heldout_fraction=0,
        quiet=True,
    )
    (shard,) = Corpus.open(tmp_path / "out").shards
    assert shard.tokens.dtype == np.uint32 and shard.tokens.tolist() == [70_004, 8]


def test_words_are_encoded_as_texts_are(text: Path, tokenizer: Path) -> None:
    plain = load_tokenizer(tokenizer).as_plain_text()
    encoder = WordEncoder(plain.to_json())
    sentences = [sentence for document in documents_of(text)[:10] for sentence in split_document(document)]
    sentences += ["", "  two  spaces ", "tab\there", "no\u00a0break \u3000 e\u0301", "[MASK] x"]
    for _ in range(2):
        found = [np.frombuffer(ids, encoder.dtype).tolist() for ids in encoder.encode(sentences)]
        assert found == plain.encode_batch(sentences)


@pytest.mark.parametrize("length", [0, 1, 127, 128, 129, 256, 257, 1000])
def test_long_sentences_are_cut_evenly(length: int) -> None:
    pieces = cut_lengths(length)
    assert sum(pieces) == length and max(pieces, default=0) <= MAX_SENTENCE_TOKENS
    assert (
        len(pieces) == -(-length // MAX_SENTENCE_TOKENS) and max(pieces, default=0) - min(pieces, default=0) <= 1
    )


# ------------------------------------------------------------------------------------------------------- opening
