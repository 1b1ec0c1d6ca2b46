"""What is odd about data is said in one line, and nothing is said of what is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import tiny_model
from finetune_runs import model  # noqa: F401
from reading import write_lines

from electra_core.downstream.choices import ChoiceExample
from electra_core.downstream.classify import Classify
from electra_core.downstream.tagging import Tag
from electra_core.finetune import finetune
from electra_core.finetuning.data_warnings import (
    copies,
    header_as_example,
    labels_alike,
    labels_of_none,
    labels_of_one,
    many_cut,
    spans_within_words,
    unmarked_spans,
)
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.features import Features
from electra_core.labelled_data.labelled import BadRows, TextExample, read_texts
from electra_core.labelled_data.squad_files import QuestionExample
from electra_core.labelled_data.tagged_files import TaggedExample
from electra_core.predict import load
from electra_core.tokenizer import unknown_words

QUICK = FinetuneSettings(epochs=1, batch_size=16)


def warnings(model, train, dev, out, task=None, **settings) -> list[str]:
    """What fine-tuning warns of, but for few steps and for learning nothing."""
    lines: list[str] = []
    finetune(model, task or Classify(), train, dev, out, replace(QUICK, **settings), quiet=True, say=lines.append)
    found = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
    assert not any("\n" in line for line in found)
    return [line for line in found if not (line.startswith("only ") or line.startswith("a constant guess "))]


# ---- copies


def texts(*words: str) -> list[TextExample]:
    return [TextExample(str(n), n, word, None, "1") for n, word in enumerate(words)]


def test_copies_are_counted_whatever_their_label():
    train = texts(*"abcdefghij")
    assert copies(train, texts("a", "x", "b", "b")) == "3 of the 4 dev texts are also in the training data"
    assert copies(train, texts("a", *"klmnopqrst")) is None  # one of eleven
    assert copies(train, texts("x")) is None


@pytest.mark.parametrize(
    "example, called",
    [
        (TextExample("1", 1, "a", "b", "1"), "pairs"),
        (TaggedExample("1", 1, ("a",), ("O",)), "sentences"),
        (QuestionExample("1", "1", "who?", "a", ()), "questions' contexts"),
        (ChoiceExample("1", 1, "a", ("x", "y"), 0), "texts"),
    ],
)
def test_copies_are_called_what_they_are(example, called):
    assert copies([example], [example]) == f"1 of the 1 dev {called} are also in the training data"
    other = {"question": "other?"} if called.startswith("questions") else {"line": 7}
    assert copies([replace(example, **other)], [example])


def test_fine_tuning_tells_of_copies(model, tmp_path):
    train = tiny_model.reviews(tmp_path / "train.tsv", 160)
    dev = tiny_model.reviews(tmp_path / "dev.tsv", 40, seed=1)
    assert warnings(model, train, dev, tmp_path / "a") == warnings(model, train, None, tmp_path / "b") == []
    mixed = write_lines(
        tmp_path / "mixed.tsv", *dev.read_text().splitlines()[:3], *train.read_text().splitlines()[1:49]
    )
    assert warnings(model, train, mixed, tmp_path / "c") == [
        "48 of the 50 dev texts are also in the training data"
    ]


# ---- a header


ROWS = [f"{'good' if n % 2 else 'bad'} film {'a ' * n},{n % 2}" for n in range(40)]


@pytest.mark.parametrize("name", ["train.csv", "train.tsv"])
def test_fine_tuning_tells_of_a_header_that_became_an_example(model, tmp_path, name):
    lines = [line.replace(",", "\t") if name.endswith("tsv") else line for line in ["Kommentar,Note", *ROWS]]
    file, columns = write_lines(tmp_path / name, *lines), Columns("1", None, "2")
    (said,) = warnings(model, file, None, tmp_path / "out", Classify(columns=columns))
    assert said.startswith(f"{file}:1: read as an example, but looks like a header") and "'Note'" in said
    assert "Note" in json.loads((tmp_path / "out/config.json").read_text())["label2id"]
    task = Classify(columns=replace(columns, header=True))
    assert warnings(model, file, None, tmp_path / "header", task) == []
    assert list(json.loads((tmp_path / "header/config.json").read_text())["label2id"]) == ["0", "1"]
    task = Classify(columns=replace(columns, header=False))
    alone = ["no dev example has the label 'Note' (cannot be evaluated; its single example stays in training)"]
    assert warnings(model, file, None, tmp_path / "none", task) == alone


@pytest.mark.parametrize(
    "name, lines",
    [
        ("a.csv", ROWS),
        ("a.csv", ["text,label", *ROWS]),  # a usual name: not read as an example
        ("a.csv", ["a,x", "b,y", "c,z"]),  # every class has one example
        ("a.jsonl", ['{"t": "a", "l": "x"}', '{"t": "b", "l": "y"}', '{"t": "c", "l": "y"}']),
    ],
    ids=["no header", "a header", "all differ", "no table"],
)
def test_other_first_lines_are_no_headers(tmp_path, name, lines):
    file, columns = write_lines(tmp_path / name, *lines), Columns("1", None, "2")
    assert header_as_example(file, list(read_texts(file, columns)), columns) is None


# ---- labels


@pytest.mark.parametrize(
    "labels, said",
    [
        (
            [str(n) for n in range(10)],
            "10 of the 10 labels have only one example each; is this the right column? (--label-column",
        ),
        (["0"] * 50 + [str(n) for n in range(20)], "19 of the 20 labels"),
        ([str(n) for n in range(9)], ""),  # a small example
        ([str(n) for n in (*range(12), *range(6))], ""),  # a half are no most
        ([str(n % 20) for n in range(31)], ""),
    ],
)
def test_many_labels_of_one_example_may_be_no_classes(labels, said):
    found = labels_of_one("a.tsv", [replace(*texts("a"), label=label) for label in labels])
    assert (found is None) if not said else found is not None and found.startswith(f"a.tsv: {said}")


@pytest.mark.parametrize(
    "labels, said",
    [
        (["Pos", "neg", "pos", "neg", "pos"], "'Pos' (1) / 'pos' (2)"),
        (["1", "0", "1.0"], "'1' (1) / '1.0' (1)"),
        (["not so", "not  so"], "'not so' (1) / 'not  so' (1)"),
        (["1", "\uff11"], "'1' (1) / '\uff11' (1)"),
        (["1", "\u200b1"], r"'1' (1) / '\u200b1' (1)"),
        (["O", "B-PER", "I-PER", "B-per"], "'B-PER' (1) / 'B-per' (1)"),
        (["True", "1", "False", "2"], "'True' (1) / '1' (1)"),
        (["a", "A", "a ", "b", "B"], "'a' (1) / 'A' (1) / 'a ' (1), 'b' (1) / 'B' (1)"),
        ([*"abcdefg", *"ABCDEFG"], "'e' (1) / 'E' (1), and 2 others"),
        (["1", "10", "1.5", "v1.0", "v1.00.1", "-1", "-"], None),
    ],
)
def test_labels_that_are_nearly_one_are_told(labels, said):
    found = labels_alike("a.tsv", Counter(labels))
    if said is None:
        assert found is None
        return
    groups = "each group" if ", " in said else "they"
    assert found is not None and found.endswith(f"{said}; should {groups} be one?")
    assert found.startswith("a.tsv: labels that differ only in case, white space or a number's form are separate")


def test_fine_tuning_tells_of_slips_in_labels(model, tmp_path):
    rows = [f"good{' a' * n}\t{'pos' if n % 2 else 'neg'}" for n in range(40)]
    file = write_lines(tmp_path / "a.tsv", "text\tlabel", *rows, "fine\tPos")
    said, _ = warnings(model, file, None, tmp_path / "out")
    assert said.startswith(f"{file}: labels that differ only in case") and "'pos' (20) / 'Pos' (1)" in said


def test_fine_tuning_tells_of_labels_that_are_no_classes(model, tmp_path):
    file = write_lines(tmp_path / "a.tsv", "text\tlabel", *(f"good{' a' * n}\t{n}" for n in range(20)))
    (said,) = warnings(model, file, None, tmp_path / "out")
    assert said.startswith(f"{file}: 20 of the 20 labels have only one example each")


# ---- tags


@pytest.mark.parametrize(
    "tags, odd",
    [
        ("O O PER", "PER"),
        ("o o o B:PER I:PER I:PER", "I:PER"),
        ("0 0 1 2 2", "2"),  # numbers of tags, which the Hub has names for
        ("O O B-PER", ""),
        ("O O B I", ""),
        ("O NN NN VB", ""),  # parts of speech, one of which is called O
    ],
)
def test_spans_in_no_usual_notation_are_judged_word_by_word_and_that_is_told(tmp_path, tags, odd):
    file = write_lines(tmp_path / "a.conll", *(f"w {tag}" for tag in tags.split()))
    examples = list(Tag().read(file, BadRows(file)))
    said = unmarked_spans(file, examples, Tag().fitted(examples).labels)
    assert (said is not None and f"{file}: tags like {odd!r} mark no spans" in said) if odd else said is None


def test_one_tag_alone_is_no_odd_notation():
    assert unmarked_spans("a.conll", [TaggedExample("1", 1, ("w",), ("O",))], ("O", "PER")) is None


def test_spans_that_prediction_cannot_find_are_told(model, tmp_path):
    """A Korean particle and a Turkish suffix are part of the word; a Japanese letter is a word."""
    texts = [("김철수는 갔다", 3), ("İstanbul'da kaldı", 8), ("東京へ行く", 2), *[("Ann left", 3)] * 7]
    rows = [json.dumps({"text": text, "entities": [[0, end, "X"]]}) for text, end in texts]
    examples = list(Tag().read(write_lines(tmp_path / "a.jsonl", *rows), BadRows("a.jsonl")))
    said = spans_within_words("a.jsonl", examples)
    assert said and "a.jsonl: 2 of the 10 spans begin or end within a word ('김철수' of '김철수는')" in said
    told = warnings(model, tmp_path / "a.jsonl", None, tmp_path / "out", Tag(), max_length=32)
    assert any("spans begin or end within a word" in line for line in told)
    assert spans_within_words("a.jsonl", examples[1:]) and spans_within_words("a.jsonl", examples[2:]) is None
    assert spans_within_words("a.conll", [TaggedExample("1", 1, ("w",), ("B-X",))]) is None


def test_fine_tuning_tells_of_tags_without_marks(model, tmp_path):
    file = write_lines(tmp_path / "a.conll", *("good O\n" * n + "film PER\n" for n in range(1, 20)))
    (said,) = warnings(model, file, None, tmp_path / "out", Tag(), max_length=32)
    assert said.startswith(f"{file}: tags like 'PER' mark no spans")


# ---- words that are none


@pytest.mark.parametrize("unknown, tokens, said", [(1, 2, "50.0%"), (11, 100, "11.0%"), (10, 100, ""), (0, 0, "")])
def test_a_tenth_of_unknown_words_is_no_matter(unknown, tokens, said):
    line = f"{said} of the tokens are [UNK]; the vocabulary does not suit this text" if said else None
    assert unknown_words(unknown, tokens) == line


def test_unknown_tokens_are_counted_without_what_stands_around_texts():
    features = Features(2, 3)
    assert features.unknown(1) == (0, 0)
    features.add(0, [1, 7, 1], [8])
    features.add(1, [9])
    assert features.unknown(1) == (2, 5)


def test_text_that_the_vocabulary_cannot_write_is_told(model, tmp_path):
    file = write_lines(tmp_path / "a.tsv", "text\tlabel", *(f"good 東京\t{n % 2}" for n in range(20)), "a film\t1")
    (said,) = warnings(model, file, file, tmp_path / "out", max_length=32)[2:]
    assert said == "64.5% of the tokens are [UNK]; the vocabulary does not suit this text"
    predictor = load(tmp_path / "out")
    predictor(["good 東京", "a film"])
    predictor("東")
    assert (predictor.unknown, predictor.words) == (3, 6)


def test_labels_that_say_there_is_none():
    examples = [
        replace(example, label=label) for example, label in zip(texts(*"abcd"), ("x", "N/A", "N/A", "NULL"))
    ]
    assert labels_of_none("a.csv", examples) == (
        "a.csv: 3 examples have the label 'N/A' or 'NULL', learned as a class; if it means a "
        "missing label, leave the cell empty and use --skip-bad-rows"
    )
    assert "1 example has the label 'NULL'" in str(labels_of_none("a.csv", examples[3:]))
    assert labels_of_none("a.csv", examples[:1]) is None


def test_fine_tuning_tells_of_labels_that_say_there_is_none(model, tmp_path):
    rows = [f"good{' a' * n}\t{('pos', 'neg', 'None')[n % 3]}" for n in range(40)]
    (said,) = warnings(model, write_lines(tmp_path / "a.tsv", "text\tlabel", *rows), None, tmp_path / "out")
    assert "13 examples have the label 'None'" in said


# ---- what was cut, and who hears of it


def test_many_that_were_cut_are_a_warning_where_something_helps():
    few, many = (
        "10 of 100 examples are longer than 64 tokens and",
        "11 of 100 examples are longer than 64 tokens and",
    )
    assert many_cut(10, 100, 64, may_be_longer=True) == f"{few} were truncated"
    assert many_cut(11, 100, 64, may_be_longer=False) == f"{many} were truncated"
    assert (
        many_cut(11, 100, 64, may_be_longer=True)
        == f"warning: {many} were truncated; max_length reads more of each"
    )


def test_cut_texts_are_a_warning_of_fine_tuning(model, tmp_path):
    train = tiny_model.reviews(tmp_path / "train.tsv", 40)
    (said,) = warnings(model, train, None, tmp_path / "out", max_length=8)
    assert said.endswith("examples are longer than 8 tokens and were truncated; max_length reads more of each")


def test_too_large_a_length_is_lowered_aloud(model, tmp_path):
    train = tiny_model.reviews(tmp_path / "train.tsv", 40)
    assert warnings(model, train, None, tmp_path / "out", max_length=9999) == [
        "max_length: 9999 exceeds the model's positions; using 64"
    ]
    assert json.loads((tmp_path / "out/metrics.json").read_text())["settings"]["max_length"] == 64
    assert warnings(model, train, None, tmp_path / "other", max_length=64) == []


def test_warnings_are_seen_by_who_has_not_set_up_logging(model, tmp_path):
    train = tiny_model.reviews(tmp_path / "train.tsv", 40)
    with train.open("a") as file:
        file.write("no label\t\n" + "the film was good " * 30 + "\tpos\n")
    script = (
        "from electra_core.finetune import *; from electra_core.downstream.classify import Classify\n"
        f"settings = FinetuneSettings(epochs=1, skip_bad_rows=True)\n"
        f"data, out = {str(train)!r}, {str(tmp_path / 'out')!r}\n"
        f"finetune({str(model)!r}, Classify(), data, None, out, settings, quiet=True)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert (
        f"{train}: skipped 1 bad row" in done.stderr and "longer than 64 tokens and were truncated" in done.stderr
    )
    assert "warning: only " in done.stderr and "seed 0" not in done.stderr
