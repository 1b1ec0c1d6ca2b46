"""Columns by name and by number, with a header and without, and those of a file that was not trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from reading import refused, write_lines

from electra_core.downstream.choices import Choose
from electra_core.downstream.classify import Classify, Regress
from electra_core.downstream.named_tasks import for_reading
from electra_core.downstream.squad import Answer
from electra_core.downstream.tagging import Tag
from electra_core.downstream.task_files import task_from_json, task_to_json
from electra_core.errors import UserError
from electra_core.finetuning.data import read_data
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.labelled import BadRows, read_texts


def read(file: Path, columns: Columns, *, labelled: bool = True, given: Columns | None = None) -> list[tuple]:
    """(text, pair, label) of a file as a model reads it that was trained with `columns`."""
    task = for_reading(Classify(columns=columns), given or Columns())
    return [(e.text, e.pair, e.label) for e in task.read(file, BadRows(file), labelled=labelled)]


# ---- header


@pytest.mark.parametrize("header, first", [(None, "Kommentar"), (True, "fein"), (False, "Kommentar")])
def test_a_header_is_what_it_is_said_to_be(tmp_path, header, first):
    file = write_lines(tmp_path / "a.csv", "Kommentar,Note", "fein,1", "schlecht,0")
    assert next(read_texts(file, Columns("1", None, "2", header=header))).text == first


def test_a_column_is_named_by_a_number_too(tmp_path):
    file = write_lines(tmp_path / "a.tsv", "1\ta film\tpos", "2\ta plot\tneg")
    for columns in (Columns(2, label=3, id=1), Columns(np.int64(2), label=[3], id=("7", 1))):
        assert read(file, columns) == read(file, Columns("2", None, "3", "1"))
    assert Columns(0).text == "0" and Columns(labels=(0, "b")).labels == ("0", "b")
    assert Columns(labels=(1, "1", np.int64(2))).labels == ("1", "2")
    for labels in (5, (), "toxic", ("a", None), ("a", ["b"])):
        with pytest.raises(ValueError, match=r"^labels: expected column names, such as .*, got "):
            Columns(labels=labels)
    for role, given in (
        ("text", 1.0),
        ("labels", (1, True)),
        ("pair", True),
        ("label", {"a"}),
        ("id", [None]),
        ("text", b"text"),
    ):
        with pytest.raises(ValueError, match=f"^{role}: expected a column's name or its number from 1, got "):
            Columns(**{role: given})


def test_a_file_without_header_and_columns_without_names(tmp_path):
    file = write_lines(tmp_path / "a.csv", "I hated it 6890,0", "I loved it,1")
    said = refused(read, file, Columns())
    assert (
        "no column has a usual name for the text and the label; the columns are I hated it 6890, 0; name one"
        in said
    )
    assert "name one with --text-column and --label-column" in said
    assert said.endswith("(if the first line is not a header: --no-header, and the column's number from 1)")
    assert refused(read, file, Columns(header=False)).endswith(" and --label-column, by number, from 1")
    one = refused(read, file, Columns(label="2", header=False))
    assert "no column has a usual name for the text; " in one and "--label" not in one
    absent = refused(
        read, write_lines(tmp_path / "b.csv", "text,label", "a,b"), Columns(), given=Columns("body", None, "stars")
    )
    assert "no text column 'body' and no label column 'stars'; the columns are text, label; name others" in absent
    assert absent.endswith("name others with --text-column and --label-column")
    assert "--no-header" not in refused(read, write_lines(tmp_path / "a.jsonl", '{"a": "b", "c": "d"}'), Columns())
    assert len(read(file, Columns("1", None, "2", header=False))) == 2


@pytest.mark.parametrize(
    "task, message",
    [
        (
            Classify(labels=("0", "1"), columns=Columns("1", None, "2")),
            "known: 0, 1; if this line is the header: --",
        ),
        (
            Regress(columns=Columns("1", None, "2")),
            r"the label is not a number \('Note'; if this line is the header: --",
        ),
    ],
)
def test_a_header_that_is_no_example_is_suspected(tmp_path, task, message):
    file = write_lines(tmp_path / "a.csv", "Kommentar,Note", "fein,1", "schlecht,Note")
    with pytest.raises(UserError, match=f"a.csv:1: .*{message}"):
        list(task.read(file, BadRows(file)))
    bad = BadRows(file, skip=True)
    list(task.read(file, bad))
    assert "--header" in bad.first[0] and "--header" not in bad.first[1]


@pytest.mark.parametrize(
    "label, said", [("1,5", True), ("-,5", True), ("1,000.5", False), ("a,b", False), ("1,", False)]
)
def test_a_decimal_comma_is_suspected(tmp_path, label, said):
    file = write_lines(tmp_path / "a.tsv", "text\tscore", f"fein\t{label}")
    with pytest.raises(UserError, match=r"the label is not a number") as caught:
        list(Regress().read(file, BadRows(file)))
    assert ("a decimal comma?" in str(caught.value)) == said


@pytest.mark.parametrize("separator", [";", "|", "\t", " | "])
def test_what_cuts_a_csv_is_found(tmp_path, separator):
    file = write_lines(
        tmp_path / "a.csv", *(line.replace("/", separator) for line in ("text/label", "so, so/1", "no/0"))
    )
    assert read(file, Columns()) == [("so, so", None, "1"), ("no", None, "0")]


def test_columns_that_another_name_of_the_file_would_show(tmp_path):
    quoted = write_lines(tmp_path / "a.tsv", '"text"\t"label"', '"fine"\t"1"')
    for columns in (Columns(), Columns(text="text", label="label")):
        assert refused(read, quoted, columns).endswith("only a .csv may have quoted cells")
    assert read(quoted.rename(tmp_path / "a.csv"), Columns()) == [("fine", None, "1")]
    plain = write_lines(tmp_path / "a.txt", "text\tlabel", "fine\t1")
    for columns in (Columns(), Columns(text="text", label="label")):
        assert refused(read, plain, columns).endswith(
            "a .txt holds one text per line; rename a file of columns to .csv or .tsv"
        )


# ---- another file than the one that was trained on


def test_the_usual_names_stand_in_for_those_of_the_training_file(tmp_path):
    trained = Columns("review_text", None, "stars")
    same = write_lines(tmp_path / "a.csv", "review_text,stars,text,label", "fine,1,other,0")
    usual = write_lines(tmp_path / "b.csv", "n,sentence,category", "7,fine,1")
    assert read(same, trained) == read(usual, trained) == [("fine", None, "1")]
    with pytest.raises(UserError, match="no text column 'review_text'"):  # not in training
        list(read_texts(usual, trained))


def test_usual_names_may_have_capitals(tmp_path):
    rows = ("fine,1", "dull,0")
    for header in ("Text,Label", "REVIEW,SENTIMENT", "text,Label"):
        assert read(write_lines(tmp_path / "a.csv", header, *rows), Columns()) == [
            ("fine", None, "1"),
            ("dull", None, "0"),
        ]
        assert read(write_lines(tmp_path / "a.csv", header, *rows), Columns(text="1", label="2"))[0] == (
            "fine",
            None,
            "1",
        )
    pairs = write_lines(tmp_path / "b.csv", "ID,Sentence1,Sentence2,Score", "7,a,b,2")
    assert (
        read(pairs, Columns())
        == read(pairs, Columns(text="left", pair="right", label="same"))
        == [("a", "b", "2")]
    )
    both = write_lines(tmp_path / "c.csv", "Text,text,label", "no,yes,1")
    assert read(both, Columns()) == [("yes", None, "1")]
    assert "no column has a usual name for the text" in refused(
        read, write_lines(tmp_path / "d.csv", "Text,TEXT,label", "a,b,1"), Columns()
    )


def test_of_several_usual_names_none_is_taken(tmp_path):
    trained = Columns("review_text", None, "stars")
    several = write_lines(tmp_path / "a.csv", "text,comment,label", "fine,other,1")
    assert refused(read, several, trained).endswith(
        "no text column 'review_text'; the columns are text, comment, label; name another with --text-column"
    )
    assert read(several, trained, given=Columns(text="comment")) == [("other", None, "1")]
    labels = write_lines(tmp_path / "b.csv", "text,label,score", "fine,1,0.5")
    assert "no label column 'stars'" in refused(read, labels, trained)
    assert read(labels, trained, labelled=False) == [("fine", None, None)]


def test_a_column_that_is_named_for_the_file_must_be_there(tmp_path):
    file = write_lines(tmp_path / "a.csv", "text,label", "fine,1")
    for columns in (Columns(), Columns("review_text")):
        assert "no text column 'satz'" in refused(read, file, columns, given=Columns(text="satz"))


def test_pairs_stand_in_together(tmp_path):
    trained = Columns("premisse", "hypothese", "label")
    usual = write_lines(tmp_path / "a.csv", "sentence1,sentence2,label", "fine,dull,1")
    assert read(usual, trained) == [("fine", "dull", "1")]
    two = write_lines(tmp_path / "c.csv", "sentence1,sentence2,question1,question2,label", "fine,dull,who,what,1")
    assert "no text column 'premisse'" in refused(read, two, trained), "which pair is meant, nobody knows"
    half = write_lines(tmp_path / "b.csv", "premisse,sentence2,label", "fine,dull,1")
    assert "no pair column 'hypothese'" in refused(read, half, trained)
    assert refused(read, half, trained).endswith("name another with --text-pair-column")
    assert read(half, trained, given=Columns(pair="sentence2")) == [("fine", "dull", "1")]


@pytest.mark.parametrize("trained", [Columns(), Columns("premise", "hypothesis"), Columns("1", "2")])
def test_pairs_to_predict_are_called_text_and_pair(tmp_path, trained):
    file = write_lines(tmp_path / "a.jsonl", json.dumps({"text": "fine", "pair": "dull"}))
    assert read(file, trained, labelled=False) == [("fine", "dull", None)]


def test_other_tasks_find_the_usual_names_too(tmp_path):
    tags = write_lines(tmp_path / "a.jsonl", json.dumps({"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]}))
    tagger = for_reading(Tag(columns=Columns("woerter", None, "marken")), Columns())
    assert next(tagger.read(tags, BadRows(tags))).tags == ("O", "B-X")
    conll = write_lines(tmp_path / "a.conll", "a O", "b B-X")
    assert next(tagger.read(conll, BadRows(conll))).tags == ("O", "B-X")
    choices = write_lines(tmp_path / "b.jsonl", json.dumps({"question": "q", "choices": ["x", "y"], "answer": 1}))
    chooser = for_reading(Choose(columns=Columns("frage", None, "antwort")), Columns())
    assert next(chooser.read(choices, BadRows(choices))).label == 1
    with pytest.raises(UserError, match="no list of tags"):
        list(for_reading(Tag(), Columns(label="x")).read(tags, BadRows(tags)))


def fitted(file: Path, columns: Columns | None = None) -> tuple[Classify, list[str]]:
    """The task that a file was trained on, and what was said about the file."""
    lines: list[str] = []
    task, *_ = read_data(Classify(columns=columns or Columns()), file, None, FinetuneSettings(), lines.append)
    return task, lines


def test_columns_that_were_found_are_those_of_later_files(tmp_path):
    reviews = write_lines(tmp_path / "rev.csv", "review,sentiment", *(f"film {n},{n % 2}" for n in range(20)))
    task, _ = fitted(reviews)
    assert task.columns == Columns("review", None, "sentiment")
    assert task_from_json(task_to_json(task), "task.json") == task
    later = write_lines(tmp_path / "new.csv", "text,review,category,sentiment", "x,fine,news,1", "y,dull,news,0")
    assert read(later, task.columns) == [("fine", None, "1"), ("dull", None, "0")]
    assert read(later, task.columns, given=Columns(text="text", label="category"))[0] == ("x", None, "news")
    usual = write_lines(tmp_path / "usual.csv", "text,label", "fine,1")
    assert read(usual, task.columns) == [("fine", None, "1")]
    assert read(write_lines(tmp_path / "a.txt", "fine"), task.columns, labelled=False) == [("fine", None, None)]
    assert fitted(reviews, Columns("1"))[0].columns == Columns("1", None, "sentiment")


def test_pairs_that_were_found_stay_pairs(tmp_path):
    rows = (f"film {n},plot {n},{n % 2}" for n in range(20))
    task, _ = fitted(write_lines(tmp_path / "a.csv", "premise,hypothesis,label", *rows))
    assert task.columns == Columns("premise", "hypothesis", "label")
    later = write_lines(tmp_path / "b.csv", "sentence1,sentence2,premise,hypothesis,label", "v,w,x,y,0")
    assert read(later, task.columns) == [("x", "y", "0")]
    lines = write_lines(tmp_path / "a.txt", "only one")
    with pytest.raises(UserError, match=r"a.txt:1: a single text instead of a pair"):
        list(for_reading(task, Columns()).read(lines, BadRows(lines), labelled=False))
    with pytest.raises(UserError, match="no text column 'premise'"):
        list(for_reading(task, Columns(pair="other")).read(lines, BadRows(lines), labelled=False))


@pytest.mark.parametrize("header", ["text,label", "review,rating", "satz,sentiment"])
def test_a_header_is_told_by_usual_names_and_those_of_training(tmp_path, header):
    """Also where a column is given by its number, which says nothing of a header."""
    task, _ = fitted(write_lines(tmp_path / "a.csv", "satz,sentiment", "fine,1", "dull,0"), Columns("satz"))
    file = write_lines(tmp_path / "b.csv", header, "fine,1")
    assert read(file, task.columns, given=Columns(text="1"), labelled=False)[0][0] == "fine"
    assert read(file, task.columns, given=Columns(text="1", label="2")) == [("fine", None, "1")]
    bare = write_lines(tmp_path / "c.csv", "fine,1", "dull,0")
    assert len(read(bare, task.columns, given=Columns(text="1", label="2"))) == 2


def test_it_is_said_which_columns_were_read(tmp_path):
    rows = [f"film {n},news,{n % 2}" for n in range(21)]
    file = write_lines(tmp_path / "a.csv", "text,category,sentiment", *rows)
    assert fitted(file, Columns(label="sentiment"))[1][0] == (
        f"{file}: 21 rows, text 'text', label 'sentiment' (0 11, 1 10)"
    )
    labels = [f"film {n},{n % 7},{n % 2},x" for n in range(21)]
    several = write_lines(tmp_path / "b.csv", "text,category,sentiment,Body", *labels)
    assert fitted(several)[1][0] == (
        f"{several}: 21 rows, text 'text', label 'category' (0 3, 1 3, 2 3, 3 3, 4 3, and 2 others)"
        "; not used as the label: column 'sentiment' (name it with --label-column)"
        "; not used as the text: column 'Body' (name it with --text-column)"
    )
    pairs = write_lines(
        tmp_path / "c.csv", "sentence1,sentence2,score", *(f"a{n},b{n},{n / 4}" for n in range(21))
    )
    lines: list[str] = []
    read_data(Regress(), pairs, None, FinetuneSettings(), lines.append)
    assert lines == [f"{pairs}: 21 rows, texts 'sentence1' and 'sentence2', label 'score' (0 to 5)"]
    for label in ("neg", "pos"):
        (tmp_path / "d" / label).mkdir(parents=True)
        for n in range(10):
            write_lines(tmp_path / "d" / label / f"{n}.txt", f"{label} {n}")
    task, lines = fitted(tmp_path / "d")
    assert lines == [f"{tmp_path / 'd'}: 20 rows, labels by folder (neg 10, pos 10)"]
    assert task.columns == Columns()


def test_questions_have_no_columns():
    assert for_reading(Answer(), Columns()) == Answer()
    with pytest.raises(UserError, match="qa: takes no columns"):
        for_reading(Answer(), Columns(text="a"))


# ---- ids


def ids(file: Path, columns: Columns | None = None) -> list[str]:
    return [example.id for example in read_texts(file, columns)]


def test_a_column_of_ids_is_named_or_none_is(tmp_path):
    file = write_lines(tmp_path / "a.csv", "id,key,text,label", "7,a,fine,1", "8,b,good,1", "8,c,dull,0")
    said = (
        "a.csv:4: duplicate id (8); if that column does not hold row ids: --id-column none; --skip-bad-rows skips"
    )
    assert said in refused(read, file, Columns())
    assert ids(file, Columns(id="key")) == ["a", "b", "c"]
    assert ids(file, Columns(id="none")) == ids(file, Columns(text="3", id="none")) == ["2", "3", "4"]
    with pytest.raises(
        UserError, match="no id column 'nr'; the columns are id, key, text, label; name another with --id-column"
    ):
        ids(file, Columns(id="nr"))
    assert "no id column 'nr'" in refused(read, file, Columns(), given=Columns(id="nr"))
    assert read(write_lines(tmp_path / "b.csv", "text,label", "fine,1"), Columns(id="key")) == [
        ("fine", None, "1")
    ]


def test_a_column_whose_values_mostly_repeat_holds_no_ids(tmp_path, caplog):
    file = write_lines(tmp_path / "a.csv", "id,text,label", *(f"{number // 3},fine,1" for number in range(10)))
    assert ids(file) == [str(line) for line in range(2, 12)]
    assert (
        "a.csv: column 'id' holds no row ids, as most values repeat; name another with --id-column" in caplog.text
    )
    with pytest.raises(UserError, match="duplicate id"):
        ids(file, Columns(id="id"))
    twice = write_lines(tmp_path / "b.csv", "id,text,label", *(f"{number // 2},fine,1" for number in range(10)))
    with pytest.raises(UserError, match="duplicate id"):  # a half are distinct
        ids(twice)


def test_rows_that_name_their_cells_have_other_ids_too(tmp_path):
    row = {"id": 7, "key": "a", "tokens": ["x"], "tags": ["O"], "text": "Who?", "choices": ["x", "y"], "label": 0}
    file = write_lines(tmp_path / "a.jsonl", json.dumps(row), json.dumps({**row, "key": "b"}))
    for task in (Tag, Choose):
        for columns, names in ((Columns(id="key"), ["a", "b"]), (Columns(id="none"), ["1", "2"])):
            assert [e.id for e in task(columns=columns).read(file, BadRows(file))] == names
        with pytest.raises(
            UserError, match=r"duplicate id \(7\); if that column does not hold row ids: --id-column none"
        ):
            list(task().read(file, BadRows(file)))


def test_ids_that_are_named_and_not_there_are_missed(tmp_path):
    row = {"tokens": ["x"], "tags": ["O"], "text": "Who?", "choices": ["x", "y"], "label": 0}
    file = write_lines(tmp_path / "a.jsonl", json.dumps(row))
    for task in (Tag, Choose):
        with pytest.raises(UserError, match=r"a\.jsonl: no id column 'key'; the columns are tokens, tags"):
            list(task(columns=Columns(id="key")).read(file, BadRows(file)))
        later = for_reading(task(columns=Columns(id="key")), Columns())
        assert [e.id for e in later.read(file, BadRows(file))] == ["1"], "of the training file"
    for words in (
        write_lines(tmp_path / "a.conll", "x O", ""),
        write_lines(tmp_path / "a.csv", "sentence,word,tag", "1,x,O"),
    ):
        with pytest.raises(UserError, match="--id-column: no effect with"):
            list(Tag(columns=Columns(id="key")).read(words, BadRows(words)))
        assert len(list(Tag(columns=Columns(id="none")).read(words, BadRows(words)))) == 1


def test_the_training_files_columns_come_first_in_any_case(tmp_path):
    file = write_lines(tmp_path / "a.csv", "rating,body,score", "3,fine,1000", "1,dull,2000")
    task = for_reading(Regress(columns=Columns(text="Body", label="Rating")), Columns())
    assert [(e.text, e.label) for e in task.read(file, BadRows(file))] == [("fine", "3"), ("dull", "1")]
    file = write_lines(tmp_path / "b.csv", "text,comment,label,score", "fine,x,1,2")
    assert read(file, Columns(text="Text", label="Label")) == [("fine", None, "1")]


def test_a_file_without_header_is_told_the_way_out(tmp_path):
    file = write_lines(tmp_path / "a.csv", "bad dull film,0", "fine one,1")
    said = refused(read, file, Columns(text="text", label="label"))
    assert "no text column 'text'" in said and "--no-header, and the column's number from 1" in said
    named = write_lines(tmp_path / "b.csv", "review,label", "fine one,1")
    assert "--no-header" not in refused(read, named, Columns(), given=Columns(text="nope"))


# ---- encoding


def in_cp1252(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(lines).encode("cp1252"))
    return path


@pytest.mark.parametrize("name, separator", [("a.csv", ","), ("a.tsv", "\t")])
def test_a_table_may_have_another_encoding(tmp_path, name, separator):
    lines = (line.replace(",", separator) for line in ("text,Größe", "„schön“,1", "fine,0"))
    file, asked = in_cp1252(tmp_path / name, *lines), Columns(label="Größe", encoding="cp1252")
    assert read(file, Columns(), given=asked) == [("„schön“", None, "1"), ("fine", None, "0")]
    said = refused(read, file, asked)  # of the training file
    assert "no label column 'Größe'" in said and "if Excel or Windows wrote it: --encoding cp1252" in said


def test_a_folder_and_tags_may_have_another_encoding(tmp_path):
    for label in ("neg", "pos"):
        in_cp1252(tmp_path / "texts" / label / "1.txt", "schön")
    texts = read_texts(tmp_path / "texts", Columns(encoding="cp1252"))
    assert [example.text for example in texts] == ["schön"] * 2
    for name, lines in (("a.tsv", ["Köln\tB-LOC"]), ("a.csv", ["Sentence #,Word,Tag", "1,Köln,B-LOC"])):
        file = in_cp1252(tmp_path / name, *lines)
        (example,) = Tag(columns=Columns(encoding="cp1252")).read(file, BadRows(file))
        assert (example.words, example.tags) == (("Köln",), ("B-LOC",))


@pytest.mark.parametrize("name", ["cp1259", "utf-16", "utf-32-le", "rot13", "base64"])
def test_encodings_that_are_none_of_lines(tmp_path, name):
    file = in_cp1252(tmp_path / "a.csv", "text,label", "fine,1")
    with pytest.raises(
        UserError, match=f"^encoding: expected one that extends ASCII, such as utf-8, cp1252 .*, got '{name}'"
    ):
        list(read_texts(file, Columns(encoding=name)))


def test_bytes_that_another_encoding_has_not_are_named(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b"text,label\nfine,1\n\x81,1\n")
    with pytest.raises(
        UserError, match=r"a.csv:3: not valid cp1252 \(byte 0x81 at character 1\); --skip-bad-rows"
    ):
        list(read_texts(file, Columns(encoding="cp1252")))
