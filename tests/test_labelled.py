"""Readers of labelled data: every format gives the same examples, every bad row is named with file and line."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from reading import write

from electra_core.downstream.choices import read_choices
from electra_core.downstream.classify import Classify
from electra_core.downstream.named_tasks import for_reading
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag
from electra_core.errors import UserError
from electra_core.files.text_lines import read_lines
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.label_cells import label_text
from electra_core.labelled_data.labelled import BadRows, TextExample, read_texts
from electra_core.labelled_data.squad_files import read_questions
from electra_core.labelled_data.tagged_files import read_tagged

ROWS = [("a fine film", "1"), ('says "no", twice', "0"), ("naïve\u0085café", "1")]


def texts_and_labels(path: Path, **columns) -> list[tuple[str, str | None]]:
    return [(example.text, example.label) for example in read_texts(path, Columns(**columns))]


def as_csv(rows) -> str:
    quoted = [f'"{text.replace(chr(34), chr(34) * 2)}",{label}' for text, label in rows]
    return "\n".join(["text,label", *quoted]) + "\n"


def test_every_format_gives_the_same_examples(tmp_path):
    tsv = "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS)
    jsonl = "".join(json.dumps({"review": text, "label": int(label)}) + "\n" for text, label in ROWS)
    files = [
        write(tmp_path / "a.csv", as_csv(ROWS)),
        write(tmp_path / "b.tsv", tsv),
        write(tmp_path / "c.tsv", "\ufeff" + tsv.rstrip("\n")),  # a byte-order mark, no last newline
        write(tmp_path / "d.tsv", tsv.replace("\n", "\r\n")),
        write(tmp_path / "e.jsonl", jsonl),
        write(tmp_path / "f.json", "[" + ",".join(jsonl.splitlines()) + "]"),
        write(tmp_path / "g.csv", as_csv(ROWS).replace(",1", ";1").replace(",0", ";0").replace("text,", "text;")),
    ]
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress(jsonl.encode()))
    (tmp_path / "i.tsv.xz").write_bytes(lzma.compress(tsv.encode()))
    files += [tmp_path / "h.jsonl.gz", tmp_path / "i.tsv.xz"]
    for file in files:
        assert texts_and_labels(file) == ROWS, file.name


def test_parquet_and_zst(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    table = pyarrow.table({"text": [text for text, _ in ROWS], "label": [int(label) for _, label in ROWS]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.csv.zst").write_bytes(zstandard.compress(as_csv(ROWS).encode()))
    assert texts_and_labels(tmp_path / "a.parquet") == ROWS
    assert texts_and_labels(tmp_path / "b.csv.zst") == ROWS


def test_columns_by_name_by_number_and_by_alternatives(tmp_path):
    headerless = write(tmp_path / "a.tsv", "gj04\t1\t*\tOne sentence.\ngj04\t0\t\tAnother one.\n")
    expected = [("One sentence.", "1"), ("Another one.", "0")]
    assert texts_and_labels(headerless, text="4", label="2") == expected
    assert texts_and_labels(headerless, text=("sentence", "4"), label=("label", "2")) == expected
    with_header = write(tmp_path / "b.tsv", "label\tx\tsentence\n1\t*\tOne sentence.\n0\t*\tAnother one.\n")
    assert texts_and_labels(with_header, text=("sentence", "4"), label=("label", "2")) == expected
    assert texts_and_labels(with_header, text="3", label="1", header=True) == expected
    pairs = write(tmp_path / "c.tsv", "premise\thypothesis\tlabel\nA\tB\tyes\n")
    assert [(e.text, e.pair, e.label) for e in read_texts(pairs)] == [("A", "B", "yes")]


def test_quotes_in_tsv_are_ordinary_unless_asked_for(tmp_path):
    file = write(tmp_path / "a.tsv", 'text\tlabel\n"quoted\ttext"\t1\n')
    with pytest.raises(UserError, match=r"a.tsv:2: expected 2 columns, got 3"):
        texts_and_labels(file)
    assert texts_and_labels(file, quoting=True) == [("quoted\ttext", "1")]


def test_folders_of_text_files(tmp_path):
    for label, names in {"pos": ["10_9", "2_9"], "neg": ["0_1"], "unsup": ["0_0"]}.items():
        (tmp_path / label).mkdir()
        for name in names:
            write(tmp_path / label / f"{name}.txt", f"text {name}\nsecond line")
    examples = list(read_texts(tmp_path))
    assert [(e.id, e.label) for e in examples] == [("neg/0_1", "neg"), ("pos/2_9", "pos"), ("pos/10_9", "pos")]
    assert examples[0].text == "text 0_1\nsecond line"


BAD_ROWS = {
    "missing column": ("text\tlabel\nfine\t1\nonly text\n", "a.tsv:3: expected 2 columns, got 1"),
    "no label": ("text\tlabel\nfine\t1\nno label\t\n", "a.tsv:3: the label is missing"),
    "NaN label": ("text\tlabel\nfine\t1\nno label\tNaN\n", "a.tsv:3: the label is missing"),
    "empty text": ("text\tlabel\n \t1\nfine\t1\n", "a.tsv:2: the text is empty (column 'text')"),
    "duplicate id": ("id\ttext\tlabel\n7\tfine\t1\n7\talso\t0\n", "a.tsv:3: duplicate id (7)"),
}


@pytest.mark.parametrize("content, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_named_or_skipped(tmp_path, content, message):
    file = write(tmp_path / "a.tsv", content)
    with pytest.raises(UserError) as caught:
        list(read_texts(file))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    bad = BadRows(file, skip=True)
    assert [example.text for example in read_texts(file, bad=bad)] == ["fine"]
    assert bad.count == 1 and message in bad.summary()


def test_wrong_encodings_are_named(tmp_path):
    latin = tmp_path / "latin.csv"
    latin.write_bytes("text,label\nfine,1\ncafé,1\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.csv:3: not valid UTF-8 \(byte 0xe9 at character 4\)"):
        texts_and_labels(latin)
    wide = tmp_path / "wide.csv"
    wide.write_bytes("text,label\nfine,1\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"is UTF-16, .*; save it as UTF-8 \(in Excel: \"CSV UTF-8\"\), or: iconv"):
        texts_and_labels(wide)
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\x89PNG\0\0")
    with pytest.raises(UserError, match="binary"):
        texts_and_labels(binary)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "fine", "label": 1}\n{"text": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", '{"text": "fine", "label": 1}\n[1]\n', "a.jsonl:2: expected a JSON object, got list"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n', "a.jsonl:2: the label is missing"),
        ("a.jsonl", '{"text": "fine", "label": 1}\n{"label": 1}\n', "a.jsonl:2: column 'text' is missing"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', "lone surrogate"),
        ("a.csv", 'text,label\n"open,1\nnext,0\n', "a.csv:2: broken quoting"),
    ],
    ids=["half a JSON", "a list", "NaN", "no text", "lone surrogate", "open quote"],
)  # fmt: skip
def test_damaged_files(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        texts_and_labels(write(tmp_path / name, content))


def test_columns_that_are_not_there_are_listed(tmp_path):
    file = write(tmp_path / "a.csv", "satz,urteil\nfein,1\n")
    with pytest.raises(UserError, match=r"no column has a usual name for the text.*satz, urteil.*--text-column"):
        texts_and_labels(file)
    with pytest.raises(UserError, match="no label column 'lable'; the columns are satz, urteil"):
        texts_and_labels(file, text="satz", label="lable")
    assert texts_and_labels(file, text="satz", label="urteil") == [("fein", "1")]


@pytest.mark.parametrize("content", ["", "text,label\n"], ids=["no bytes", "header only"])
def test_empty_files(tmp_path, content):
    with pytest.raises(UserError, match="holds no rows"):
        texts_and_labels(write(tmp_path / "a.csv", content))


def test_missing_files_and_unknown_formats(tmp_path):
    for name in ("none.csv", "none", "none.parquet", "none.jsonl.gz", "none.doc"):
        readers = (read_texts, read_choices, read_questions) + (() if name == "none.csv" else (read_tagged,))
        for reader in readers:
            with pytest.raises(UserError, match=f"{name}: no such file or folder"):
                list(reader(tmp_path / name))
    with pytest.raises(UserError, match=r"unknown format \.doc"):
        texts_and_labels(write(tmp_path / "a.doc", "x"))
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(as_csv(ROWS).encode())[:-12])
    with pytest.raises(UserError, match="damaged or truncated"):
        texts_and_labels(tmp_path / "cut.csv.gz")


def test_a_long_text_comes_whole(tmp_path):
    long = "word " * 300_000
    assert texts_and_labels(write(tmp_path / "a.csv", f'text,label\n"{long}",1\n')) == [(long.strip(), "1")]
    assert [len(line) for _, line in read_lines(write(tmp_path / "b.txt", long + "\nx\n"))] == [len(long), 1]


@pytest.mark.parametrize(
    "value, expected",
    [
        (1, "1"),
        (1.0, "1"),
        (True, "1"),
        (" pos ", "pos"),
        (2.5, "2.5"),
        (None, None),
        (math.nan, None),
        ("", None),
    ],
)
def test_labels_as_text(value, expected):
    assert label_text(value) == expected


def squad(**qa) -> str:
    paragraph = {"context": "Ann met Bob. Bob left.", "qas": [{"id": "1", "question": "Who left?", **qa}]}
    return json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": [paragraph]}]})


def test_squad_json(tmp_path):
    def answers(**qa):
        return next(read_questions(write(tmp_path / "a.json", squad(**qa)))).answers

    assert answers(answers=[{"text": "Bob", "answer_start": 13}]) == (("Bob", 13),)
    assert answers(answers=[{"text": "Bob", "answer_start": 12}]) == (("Bob", 13),)  # the nearest occurrence
    for given in ({"answers": []}, {}, {"answers": [{"text": "Bob", "answer_start": 13}]}):
        assert answers(**given, is_impossible=True) == ()
    flat = {"id": "1", "question": "Who?", "context": "Bob.", "answers": {"text": ["Bob"], "answer_start": [0]}}
    assert next(read_questions(write(tmp_path / "a.jsonl", json.dumps(flat)))).answers == (("Bob", 0),)


@pytest.mark.parametrize(
    "qa, message",
    [
        ({"answers": [{"text": "Eve", "answer_start": 0}]}, r"qas\[0\]: the answer is not in the context .*'Eve'"),
        ({"answers": [{"text": "", "answer_start": 0}]}, "the answer is not in the context"),
        ({}, "the answers are missing"),
        ({"question": " ", "answers": []}, "the question is missing or empty"),
    ],
    ids=["not in context", "empty answer", "no answers", "no question"],
)
def test_bad_questions_are_named(tmp_path, qa, message):
    with pytest.raises(UserError, match=message):
        list(read_questions(write(tmp_path / "a.json", squad(**qa))))


def test_questions_with_the_same_id_are_named(tmp_path):
    data = json.loads(squad(answers=[{"text": "Bob", "answer_start": 13}]))
    data["data"][0]["paragraphs"] *= 2
    with pytest.raises(UserError, match=r"a.json:data\[0\].paragraphs\[1\].qas\[0\]: duplicate id \(1\)"):
        list(read_questions(write(tmp_path / "a.json", json.dumps(data))))


def test_a_row_in_another_encoding_may_be_skipped(tmp_path):
    file = tmp_path / "a.tsv"
    file.write_bytes(b"text\tlabel\nfine\t1\ncaf\xe9\t1\n")
    bad = BadRows(file, skip=True)
    assert [example.text for example in read_texts(file, bad=bad)] == ["fine"]
    assert bad.count == 1 and "a.tsv:3: not valid UTF-8" in bad.summary()


@pytest.mark.parametrize("content", ["1", '{"data": [{}]}', '{"data": '], ids=["a number", "no keys", "half"])
def test_json_that_is_not_squad(tmp_path, content):
    with pytest.raises(UserError, match="not SQuAD's JSON format"):
        list(read_questions(write(tmp_path / "a.json", content)))


def test_choices(tmp_path):
    rows = [
        {"question": "Which?", "choices": ["x", "y", "z"], "label": 2},
        {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
    ]
    file = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [(e.choices, e.label) for e in read_choices(file)] == [(("x", "y", "z"), 2), (("x", "y"), 1)]
    swag = write(tmp_path / "b.csv", "startphrase,ending0,ending1,label\nHe,runs,sits,0\n")
    assert next(read_choices(swag)).choices == ("runs", "sits")
    rows = [
        {"question": "Which?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "1"},
        {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["B", "A"]}, "answerKey": "A"},
    ]  # names that could be places, as some of ARC's
    file = write(tmp_path / "names.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [example.label for example in read_choices(file)] == [0, 1]
    many = {"question": "Which?", "label": 10, **{f"ending{n}": f"e{n}" for n in reversed(range(12))}}
    example = next(read_choices(write(tmp_path / "many.jsonl", json.dumps(many) + "\n")))
    assert example.choices == tuple(f"e{n}" for n in range(12)) and example.label == 10
    wrong = write(tmp_path / "c.csv", "startphrase,ending0,ending1,label\nHe,runs,sits,2\n")
    with pytest.raises(UserError, match=r"c.csv:2: the label matches no choice"):
        list(read_choices(wrong))


BAD_CHOICES = {
    "no text": ({"choices": ["x", "y"], "label": 0}, "column 'question' is missing"),
    "empty text": ({"question": " ", "choices": ["x", "y"], "label": 0}, "the text is empty"),
    "one choice": ({"question": "q", "choices": ["x"], "label": 0}, "fewer than two choices"),
    "empty choice": ({"question": "q", "choices": ["x", ""], "label": 0}, r"a choice is empty \(choice 1\)"),
    "no choice": ({"question": "q", "choices": [None, "y"], "label": 0}, r"a choice is empty \(choice 0\)"),
    "surrogate": ({"question": "q", "choices": ["x", "\ud800"], "label": 0}, "not valid UTF-8"),
    "no label": ({"question": "q", "choices": ["x", "y"]}, "the label is missing"),
    "NaN label": ({"question": "q", "choices": ["x", "y"], "label": float("nan")}, "the label is missing"),
    "other label": (
        {"question": "q", "choices": ["x", "y"], "label": "C"},
        r"the label matches no choice \('C' of 2\)",
    ),
    "duplicate id": ({"id": "1", "question": "q", "choices": ["x", "y"], "label": 0}, r"duplicate id \(1\)"),
}


@pytest.mark.parametrize("row, message", BAD_CHOICES.values(), ids=BAD_CHOICES)
def test_bad_choices_are_named_or_skipped(tmp_path, row, message):
    good = {"id": "1", "question": "fine", "choices": ["x", "y"], "label": 1}
    file = write(tmp_path / "a.jsonl", json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"a.jsonl:2: .*{message}"):
        list(read_choices(file))
    bad = BadRows(file, skip=True)
    assert [example.text for example in read_choices(file, bad=bad)] == ["fine"] and bad.count == 1


def test_data_sets_of_the_hub(monkeypatch):
    """The Hub's library is not asked for here: a stand-in shows what is asked of it, and what is made of it."""
    asked = []

    class Rows(list):
        features = {  # noqa: RUF012
            "label": SimpleNamespace(names=["neg", "pos"]),
            "ner_tags": SimpleNamespace(feature=SimpleNamespace(names=["O", "B-X"])),
        }

    def load_dataset(*names, split):
        asked.append((*names, split))
        if names[0] == "nothing":
            raise FileNotFoundError("no such data set")
        return Rows([{"sentence": "fine", "label": 1, "tokens": ["a", "b"], "ner_tags": [0, 1]}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert texts_and_labels("hub:glue:sst2:validation") == [("fine", "pos")]
    assert next(read_tagged("hub:org/ner")).tags == ("O", "B-X")
    assert asked == [("glue", "sst2", "validation"), ("org/ner", "train")]
    with pytest.raises(UserError, match=r"hub:nothing: cannot be loaded \(no such data set\)"):
        texts_and_labels("hub:nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        texts_and_labels("hub:glue:sst2:validation")


# ---- labels that are written in several ways


def classified(path: Path, task: Classify) -> list[str | None]:
    return [example.label for example in task.read(path, BadRows(path))]


def test_true_and_false_are_the_same_in_json_and_in_a_table(tmp_path):
    rows, table = tmp_path / "a.jsonl", tmp_path / "a.csv"
    rows.write_text("".join(json.dumps({"text": "t", "label": value}) + "\n" for value in (True, False)))
    table.write_text("text,label\nt,True\nt,FALSE\n")
    assert classified(rows, Classify(labels=("False", "True"))) == ["True", "False"]
    assert classified(table, Classify(labels=("0", "1"))) == ["1", "0"]
    assert classified(table, Classify(labels=("FALSE", "True"))) == ["True", "FALSE"]
    shown = Classify(labels=("no", "yes"), label_names=(("0", "no"), ("1", "yes")))
    assert classified(table, shown) == classified(rows, shown) == ["yes", "no"]


def test_whole_numbers_with_fractions_are_numbers_if_all_are(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("text,label\nt,0.0\nt,1.0\nt,-2.00\n")
    assert classified(file, Classify()) == ["0", "1", "-2"]
    assert Classify().fitted(list(Classify().read(file, BadRows(file)))).labels == ("-2", "0", "1")
    assert classified(file, Classify(labels=("-2.00", "0", "1.0"))) == ["0", "1.0", "-2.00"]
    file.write_text("text,label\nt,1.0\nt,1.5\nt,2\n")
    assert classified(file, Classify()) == ["1.0", "1.5", "2"]


def test_labels_are_in_order_numbers_by_value_before_others():
    examples = [TextExample("", 1, "t", None, label) for label in ("b", "10", "9", "a", "-1", "1.5")]
    assert Classify().fitted(examples).labels == ("-1", "1.5", "9", "10", "a", "b")


def test_labels_of_a_task_may_be_numbers():
    assert Classify(labels=(0, np.int64(1))).labels == Classify(labels=["0", "1"]).labels == ("0", "1")
    assert Tag(labels=["O", "X"]).labels == ("O", "X") and Classify(labels=(False, True)).labels == ("0", "1")
    for labels in ("ab", 2, ("a", None), ("a", ["b"]), (0.5, 1)):
        with pytest.raises(ValueError, match="labels: expected"):
            Classify(labels=labels)


# ---- standard input


RECORDS = [{"text": "a fine film", "label": 1}, {"text": "[dull]", "label": 0}]


@pytest.mark.parametrize(
    "text",
    [
        "\n \n" + "".join(json.dumps(record) + "\n" for record in RECORDS),
        "".join(f"  {json.dumps(record)}\n\n" for record in RECORDS),
        json.dumps(RECORDS),
        "\n" + json.dumps(RECORDS, indent=2),
        " [ " + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    ],
)
def test_json_on_standard_input_is_told_by_its_beginning(text, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    read = [(example.text, example.label) for example in read_texts("-", labelled=False)]
    assert read == [("a fine film", "1"), ("[dull]", "0")]


def of_form(path: Path | str, form: str, **columns: str) -> list[tuple[str, str | None]]:
    task = for_reading(Classify(columns=Columns("text", None, "label")), Columns(**columns), form)
    return [(example.text, example.label) for example in task.read(path, BadRows(path), labelled=False)]


TWO = [("a, b", "1"), ('"c"', "0")]


@pytest.mark.parametrize(
    "form, text",
    [
        ("csv", '\n\ntext,label\n"a, b",1\n"""c""",0\n'),
        ("csv", 'text;label\na, b;1\n"""c""";0\n'),
        ("tsv", 'text\tlabel\na, b\t1\n"c"\t0\n'),
        ("jsonl", json.dumps([{"text": text, "label": label} for text, label in TWO], indent=1)),
        ("jsonl", "".join(json.dumps({"label": label, "text": text}) + "\n" for text, label in TWO)),
    ],
)
@pytest.mark.parametrize("name", ["-", "rows.data", "rows.json", "rows.txt"])
def test_what_is_in_a_file_may_be_said(form, text, name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    (tmp_path / "rows").write_text(text)
    path = name if name == "-" else (tmp_path / "rows").rename(tmp_path / name)
    assert of_form(path, form) == TWO


def test_lines_are_no_json_if_they_are_said_to_be_lines(tmp_path, monkeypatch):
    text = '{"text": "a"}\n\n[{"text"\n'
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    (tmp_path / "a.csv").write_text(text)
    assert of_form("-", "lines") == of_form(tmp_path / "a.csv", "lines") == [
        ('{"text": "a"}', None), ('[{"text"', None)
    ]  # fmt: skip
    for task in (Tag(), Answer()):
        with pytest.raises(UserError, match=f"--input-format: no effect with {task.kind}"):
            for_reading(task, Columns(), "csv")


def test_other_brackets_on_standard_input_are_text(monkeypatch):
    lines = ["[CLS] a film", "[[a]] {b}", '["x"]', "[", '{"text": "a"}']
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("\n\n".join(lines).encode())))
    assert [example.text for example in read_texts("-", labelled=False)] == lines
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'[{"text": "a"},')))
    with pytest.raises(UserError, match=r"^standard input: not JSON"):
        list(read_texts("-", labelled=False))
