"""Sequences that are no language, by the FAQ's recipe: a vocabulary of symbols, from lines to predictions."""

from __future__ import annotations

import csv
import random
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import tokenizers
from doc_pages import DOCS, blocks
from tokenizers import models
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from electra_core import FinetuneSettings, Tag, cli
from electra_core.corpora.encoding import WordEncoder
from electra_core.corpora.sources import find_sources
from electra_core.corpora.text_files import ReadReport, read_documents
from electra_core.corpora.vocabulary import train_wordpiece
from electra_core.corpus import Corpus
from electra_core.errors import UserError
from electra_core.finetune import finetune
from electra_core.predict import load
from electra_core.tokenizer import load_tokenizer

SMALL = {
    "prepare": "--heldout-fraction 0.1 --quiet",
    "pretrain": "--steps 2 --batch-size 4 --num-hidden-layers 1 --generator-layers 1 --eval-examples 2 --quiet",
    "finetune": "--epochs 1 --quiet",
    "predict": "--quiet",
}
PATTERNS = {"residues": 0, "events": 1, "atoms": 2}
"""Places of the patterns in the recipe's line on them."""
EXAMPLES = {
    "residues": ["MKV" * 60 + "LAW", "GAVLIMFWPST", "mKV"],
    "events": ["E5 E22 E5 E11", "E1 e1 login.ok 1005 10", "[MASK] E5"],
    "atoms": ["CC(=O)Oc1ccccc1", "N[C@@H](C)C(=O)O", "ClCBr[nH]"],
}
TOKENS = {
    "residues": ["M", "K", "V"],
    "events": ["E5", "E22", "E5", "E11"],
    "atoms": ["C", "C", "(", "=", "O", ")", "O", "c", "1", "c", "c", "c", "c", "c", "1"],
}
"""How the first example begins."""


def recipe(kind: str) -> tuple[str, list[str]]:
    """The FAQ's program with the pattern for this kind, and its commands."""
    found = [b.text for b in blocks(DOCS / "faq.md") if b.reason.endswith("tests/test_symbols.py runs it")]
    program, commands = found
    line = next(line for line in program.split("\n") if line.startswith("SYMBOL"))
    pattern = re.findall(r'r"[^"]+"', line)[PATTERNS[kind]]
    return program.replace(line, f"SYMBOL = {pattern}"), commands.split("\n")


@pytest.fixture(params=EXAMPLES)
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The current folder has `sequences.txt` and the recipe's `symbols/`."""
    monkeypatch.chdir(tmp_path)
    drawn = random.Random(0)
    lines = [*EXAMPLES[request.param], *(drawn.choice(EXAMPLES[request.param]) for _ in range(40))]
    Path("sequences.txt").write_text("\n".join(lines) + "\n")
    exec(recipe(request.param)[0], {})
    return request.param


def test_tokens_are_the_symbols(kind: str) -> None:
    tokenizer = load_tokenizer("symbols").as_plain_text()
    for text in EXAMPLES[kind]:
        ids, offsets = tokenizer.encode_with_offsets(text)
        if "[MASK]" not in text:
            assert tokenizer.tokens(ids) == [text[begin:end] for begin, end in offsets], "case and digits as well"
            assert tokenizer.unk_id not in ids and "".join(tokenizer.tokens(ids)) == text.replace(" ", "")
        assert not {tokenizer.mask_id, tokenizer.cls_id, tokenizer.pad_id} & {*ids}, "a name is no special token"
    begins = tokenizer.tokens(tokenizer.encode(EXAMPLES[kind][0]))[: len(TOKENS[kind])]
    assert begins == TOKENS[kind]


def test_the_recipe_of_the_faq(kind: str) -> None:
    """Every command, and what `transformers` makes of the model."""
    for name, numbers in {"labelled": range(16), "dev": range(8), "new": range(3)}.items():
        with open(f"{name}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            rows.writerows([EXAMPLES[kind][n % 2], "ab"[n % 2]] for n in numbers)
    for command in recipe(kind)[1]:
        words = shlex.split(command)[1:]
        assert cli.main([*words, *shlex.split(SMALL[words[0]])]) == 0, command
    corpora = [Corpus.open("DATA", split) for split in ("train", "heldout")]
    assert sum(corpus.num_documents for corpus in corpora) == 43, "each line is one"
    text = EXAMPLES[kind][0]
    theirs, ours = AutoTokenizer.from_pretrained("MODEL"), load("MODEL")
    ids = [ours.tokenizer.cls_id, *ours.tokenizer.encode(text), ours.tokenizer.sep_id]
    assert theirs(text)["input_ids"] == ids
    model = AutoModelForSequenceClassification.from_pretrained("MODEL").eval()
    scores = model(**theirs(text, return_tensors="pt")).logits.detach().softmax(1)[0]
    assert ours(text)["scores"]["a"] == pytest.approx(float(scores[0]), abs=1e-2)


def test_a_tag_for_each_residue(tmp_path: Path) -> None:
    """Of a list; a text without spaces is one word."""
    rows = [{"tokens": [*"MKVLA"], "tags": ["H", "L", "H", "H", "H"]}] * 8
    settings = FinetuneSettings(epochs=1, freeze=0)
    finetune("tiny", Tag(), rows, rows, tmp_path / "tagger", settings, quiet=True)
    assert len(load(tmp_path / "tagger")([[*"MKV"]])[0]["tags"]) == 3


def test_the_names_of_a_fasta_file_are_no_text(tmp_path: Path) -> None:
    if shutil.which("awk") is None:
        pytest.skip("needs awk")
    page = (DOCS / "faq.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"`(awk [^`]*) x\.fasta > sequences\.txt`", page)
    (tmp_path / "x.fasta").write_text(">one | human\nMKV\nLA\n>two\nGAV\n")
    words = [*shlex.split(command), str(tmp_path / "x.fasta")]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "MKVLA\nGAV\n"


def test_a_line_may_be_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\none\ntwo\n\n \t\nthree\n")
    sources = find_sources([tmp_path / "a.txt"])
    report = ReadReport()
    assert list(read_documents(sources, documents="line", report=report)) == [["one"], ["two"], ["three"]]
    half = ReadReport(documents=2)
    assert list(read_documents(sources, documents="line", report=half)) == [["three"]], "resumed after the second"


def test_a_special_token_s_name_in_the_text_is_not_found_as_a_word(tmp_path: Path) -> None:
    """Nor is it with WordPiece, where brackets are not parted from words as BERT parts them."""
    engine = tokenizers.Tokenizer(
        models.WordPiece({name: n for n, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "E5"])})
    )
    engine.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("[MASK] E5") == [4, 5]
    (ids,) = WordEncoder(tokenizer.to_json()).encode(["[MASK] E5"])
    assert {*memoryview(ids).cast("H")} == {1, 5}


def test_a_vocabulary_without_unk_is_refused(tmp_path: Path) -> None:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "E5"]
    words = models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<unk>")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json: this tokenizer cannot encode the text .*WordLevel"):
        load_tokenizer(tmp_path)


def test_wordpiece_learned_from_words_that_it_cannot_read(caplog: pytest.LogCaptureFixture) -> None:
    """Each becomes one [UNK], so of the tokens they may be few."""
    said = "80% of the letters are in words of more than 100, which WordPiece reads as [UNK]"
    train_wordpiece(["MKVLA" * 40, *["KVLAG"] * 10], 60, lowercase=False)
    assert caplog.messages == [f"{said}; sentencepiece has no such limit"]
    caplog.clear()
    train_wordpiece(["KVLAG"] * 10, 60, lowercase=False)
    assert not caplog.messages
