"""Files as people really have them: what is in them is understood, or named with file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from reading import json_lines, refused, write

from electra_core.downstream.classify import Classify
from electra_core.errors import UserError
from electra_core.files import delimited, row_files, text_lines
from electra_core.files.row_files import read_rows
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.labelled import BadRows, read_texts


def pairs(path: Path, bad: BadRows | None = None, **columns) -> list[tuple[str, str | None]]:
    return [(e.text, e.label) for e in read_texts(path, Columns(**columns), bad)]


# ---- CSV and TSV


def test_names_of_columns_may_have_spaces_around_them(tmp_path):
    assert pairs(write(tmp_path / "a.csv", "text, label\nfine, 1\n")) == [("fine", "1")]


@pytest.mark.parametrize("name, separator", [("a.csv", ","), ("a.tsv", "\t")])
def test_two_columns_of_one_name_are_refused(tmp_path, name, separator):
    file = write(tmp_path / name, "text,label,text\nfine,1,other\n".replace(",", separator))
    assert "two columns are named 'text'" in refused(pairs, file)


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = pyarrow.array(["fine"])
    parquet.write_table(pyarrow.Table.from_arrays([cells] * 2, names=["text", "text"]), tmp_path / "a.parquet")
    assert "a.parquet: two columns are named 'text'" in refused(pairs, tmp_path / "a.parquet")


def test_a_wide_header_is_looked_through_once(tmp_path):
    compared = 0

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    names = [Name(number) for number in range(1000)]
    assert row_files._header(tmp_path, names) == names
    assert compared <= 3 * len(names)


@pytest.mark.parametrize("name, separator", [("a.csv", ","), ("a.tsv", "\t")])
def test_rows_of_nothing_are_left_out(tmp_path, name, separator):
    content = "\n \ntext,label\nfine,1\n , \n,\n  \ndull,0\n,,,\n"
    file = write(tmp_path / name, content.replace(",", separator).lstrip())
    assert pairs(file) == [("fine", "1"), ("dull", "0")]
    assert [row.line for row in read_rows(write(tmp_path / name, "text\n \nfine\n"), header=True)] == [2, 3]


def test_blank_lines_before_the_header(tmp_path):
    assert pairs(write(tmp_path / "a.csv", "\n \ntext;label\nfine, really;1\n")) == [("fine, really", "1")]
    assert list(read_rows(write(tmp_path / "b.csv", "\n \n"))) == []


def test_a_broken_first_row_without_a_header_is_the_only_one_lost(tmp_path):
    file = write(tmp_path / "a.csv", '"good" one,1\nfine,1\ndull,0\n')
    columns = {"text": "1", "label": "2", "header": False}
    assert "a.csv:1: broken quoting" in refused(pairs, file, **columns)
    assert pairs(file, BadRows(file, skip=True), **columns) == [("fine", "1"), ("dull", "0")]


def test_excels_first_line_names_what_separates(tmp_path):
    assert pairs(write(tmp_path / "a.csv", "sep=;\ntext;label\nfine, really;1\n")) == [("fine, really", "1")]


def test_a_header_within_a_file_is_no_example(tmp_path):
    file = write(tmp_path / "a.csv", "text,label\nfine,1\ntext, label\ndull,0\n")
    assert "a.csv:3: repeated header" in refused(pairs, file)
    assert pairs(file, BadRows(file, skip=True)) == [("fine", "1"), ("dull", "0")]
    assert pairs(write(tmp_path / "b.csv", "fine,1\nfine,1\n"), text="1", label="2") == [("fine", "1")] * 2
    assert len(list(read_rows(write(tmp_path / "c.csv", "text\ntext\n"), header=True))) == 1


def test_columns_without_a_name_may_be_several(tmp_path):
    assert pairs(write(tmp_path / "a.csv", ",,text,label\n0,0,fine,1\n")) == [("fine", "1")]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_lines_that_end_in_a_carriage_return_alone(tmp_path, name):
    content = "text,label\rfine,1\rdull,0\r".replace(",", "\t" if name == "a.tsv" else ",")
    assert "carriage return inside a line" in refused(pairs, write(tmp_path / name, content))


def test_what_an_open_quote_swallows_is_said(tmp_path):
    file = write(tmp_path / "a.csv", 'text,label\nfine,1\n"open,1\nlost,0\n"good" one,1\ndull,0\n')
    assert "a.csv:3: broken quoting" in refused(pairs, file) and "lines 3 to 5 are lost" in refused(pairs, file)
    assert pairs(file, BadRows(file, skip=True)) == [("fine", "1"), ("dull", "0")]


def test_separators_inside_quotes_do_not_count(tmp_path):
    file = write(tmp_path / "a.csv", '"one, two, three";1\n"four, five";0\n')
    assert pairs(file, text="1", label="2") == [("one, two, three", "1"), ("four, five", "0")]


@pytest.mark.parametrize("name", ["²", "0", "3"])
def test_numbers_that_name_no_column(tmp_path, name):
    file = write(tmp_path / "a.csv", "fine,1\n")
    assert f"no text column '{name}'" in refused(pairs, file, text=name, label="2", header=False)


def test_bad_rows_are_counted_in_words(tmp_path):
    for more, words in enumerate(("'text'); --skip", "(and 1 more bad row); --skip", "(and 2 more bad rows); ")):
        file = write(tmp_path / "a.csv", "text,label\n" + ",1\n" * (more + 1) + "fine,1\n")
        assert words in refused(pairs, file)


def test_quotes_may_stand_behind_a_space(tmp_path):
    file = write(tmp_path / "a.csv", 'label, text\n1, "fine, fine"\n"0", "dull"\n')
    assert pairs(file) == [("fine, fine", "1"), ("dull", "0")]


def test_spaces_at_the_start_of_a_cell_count(tmp_path):
    file = write(tmp_path / "a.csv", "question,context\nWho?, Ann met Bob\n")
    assert [row.cells["context"] for row in read_rows(file)] == [" Ann met Bob"]  # places are counted in it


def test_a_tsv_with_cells_in_quotes_is_told_from_a_broken_one(tmp_path):
    file = write(tmp_path / "a.tsv", 'text\tlabel\n"fine\nfine"\t1\n')
    assert "a.tsv:2: expected 2 columns, got 1 (quotes in a TSV are ordinary characters" in refused(pairs, file)
    assert "quotes" not in refused(pairs, write(file, "text\tlabel\nfine\n"))


def test_columns_may_be_numbers_in_a_file_with_a_header(tmp_path):
    file = write(tmp_path / "a.csv", "text,label\nfine,1\n")
    assert pairs(file, text="1", label="2") == [("fine", "1")]


def test_columns_that_are_asked_for_are_not_guessed_over(tmp_path):
    file = write(tmp_path / "a.csv", "sentence1,sentence2,text,label\nA,B,C,1\n")
    assert [(e.text, e.pair) for e in read_texts(file, Columns(pair="text"))] == [("A", "C")]
    file = write(tmp_path / "a.csv", "text,sentence,label\nA,B,1\n")
    assert [(e.text, e.pair) for e in read_texts(file, Columns(pair="text"))] == [("B", "A")]


# ---- JSON


def test_a_json_array_may_begin_after_blank_lines(tmp_path):
    file = write(tmp_path / "a.json", "\n \n" + json.dumps([{"text": "fine", "label": 1}], indent=1))
    assert pairs(file) == [("fine", "1")]


@pytest.mark.parametrize("as_array", [False, True], ids=["lines", "array"])
@pytest.mark.parametrize("field", ["id", "text", "label"])
def test_half_a_character_anywhere_makes_a_bad_row(tmp_path, field, as_array):
    good = {"id": "1", "text": "fine \U0001f600", "label": "a"}
    rows = [good, {**good, "id": "2", field: "\ud800"}]
    file = tmp_path / "a.json"
    if as_array:
        write(file, json.dumps(rows))
    else:
        json_lines(file, *rows)
    assert "a.json:2: not valid UTF-8 (lone surrogate U+D800" in refused(pairs, file)


def test_the_first_row_may_lack_what_the_others_have(tmp_path):
    pair = {"premise": "A", "hypothesis": "B", "label": 1}
    file = json_lines(tmp_path / "a.jsonl", {"premise": "A", "label": 0}, {}, {**pair, "label": None}, pair)
    bad = BadRows(file, skip=True)
    assert [(e.text, e.pair, e.label) for e in read_texts(file, bad=bad)] == [("A", "B", "1")]
    assert bad.first == [
        f"{file}:1: column 'hypothesis' is missing",
        f"{file}:2: column 'premise' is missing",
        f"{file}:3: the label is missing",
    ]


@pytest.mark.parametrize("label", [["a", "b"], {"a": 1}])
def test_labels_are_single_values(tmp_path, label):
    file = json_lines(tmp_path / "a.jsonl", {"text": "fine", "label": label})
    assert f"a.jsonl:1: the label is a {type(label).__name__}, expected one string or number" in refused(
        pairs, file
    )


def test_a_label_may_be_the_same_number_in_another_form(tmp_path):
    file = write(tmp_path / "a.csv", "text,label\nfine,1.0\ndull,0.0\nold,1\nodd,2.0\n")
    plain, bad = Classify(labels=("0", "1")), BadRows(file, skip=True)
    assert [example.label for example in plain.read(file, bad)] == ["1", "0", "1"]
    assert "is not in the training data ('2.0'; known: 0, 1)" in bad.first[0]
    named = Classify(labels=("bad", "good"), label_names=(("0", "bad"), ("1", "good")))
    assert [example.label for example in named.read(file, BadRows(file, skip=True))] == ["good", "bad", "good"]
    assert [example.label for example in Classify().read(file, bad)] == ["1.0", "0.0", "1", "2.0"]


def test_only_in_a_file_without_ids_is_a_row_called_by_its_line(tmp_path):
    """Else it might have the id of another."""
    rows = [{"id": name, "text": "fine", "label": 1} for name in (None, None, "", 7, 2)]
    file = json_lines(tmp_path / "a.jsonl", *rows)
    assert [example.id for example in read_texts(file)] == ["", "", "", "7", "2"]
    json_lines(file, *rows, rows[3])
    assert "a.jsonl:6: duplicate id (7)" in refused(pairs, file)
    file = write(tmp_path / "a.csv", "id,text\n7,good film\n8,bad film\n ,third\n")
    assert [example.id for example in read_texts(file, labelled=False)] == ["7", "8", ""]
    file = write(tmp_path / "b.csv", 'text,label\n"two\nlines",1\n,0\nthird,0\n')
    assert [example.id for example in read_texts(file, labelled=False, bad=BadRows(file, True))] == ["2", "5"]
    file = json_lines(tmp_path / "b.jsonl", {"id": 2, "text": "fine"}, {"text": "dull"})
    assert [example.id for example in read_texts(file, labelled=False)] == ["2", ""]
    assert [e.id for e in read_texts(file, Columns(id="none"), labelled=False)] == ["1", "2"]


def test_cells_that_hold_no_text(tmp_path):
    file = json_lines(tmp_path / "a.jsonl", '{"text": NaN, "label": 1}')
    assert "a.jsonl:1: column 'text' is missing" in refused(pairs, file)
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": [b"fine"], "label": [1]}), tmp_path / "a.parquet")
    assert "a.parquet:1: column 'text' holds a bytes, expected text" in refused(pairs, tmp_path / "a.parquet")


# ---- folders


def test_files_in_another_encoding_may_be_skipped(tmp_path):
    for label in ("pos", "neg"):
        (tmp_path / label).mkdir()
        write(tmp_path / label / "1.txt", "fine")
    write(tmp_path / "pos" / "2.txt", "fine".encode("utf-16"))
    write(tmp_path / "pos" / "²_3.txt", "fine")  # no number, whatever str.isdigit says
    bad = BadRows(tmp_path, skip=True)
    assert len(list(read_texts(tmp_path, bad=bad))) == 3
    assert bad.count == 1 and "pos/2.txt: is UTF-16" in bad.summary()
    with pytest.raises(UserError, match=r"pos/2.txt: is UTF-16"):
        list(read_texts(tmp_path))


def test_what_stands_in_a_folder_is_named_by_its_file(tmp_path):
    for label in ("pos", "neg", "odd"):
        (tmp_path / label).mkdir()
        write(tmp_path / label / "1.txt", "fine")
    task = Classify(labels=("neg", "pos"))
    bad = BadRows(tmp_path, skip=True)
    assert [example.place for example in task.read(tmp_path, bad)] == ["neg/1.txt", "pos/1.txt"]
    assert f"{tmp_path}:odd/1.txt: the label is not in the training data" in bad.summary()


def test_hidden_files_are_no_texts(tmp_path):
    for name in ("pos/a.txt", "neg/b.txt", ".cache/c.txt", "pos/._a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, b"\0\5" if "._" in name else "fine")
    assert pairs(tmp_path) == [("fine", "neg"), ("fine", "pos")]
    assert [e.text for e in read_texts(tmp_path / "pos", labelled=False)] == ["fine"]


def test_a_folder_of_texts_to_predict_needs_no_labels(tmp_path):
    for name in ("10", "2"):
        write(tmp_path / f"{name}.txt", f"text {name}")
    examples = list(read_texts(tmp_path, labelled=False))
    assert [(e.id, e.place, e.text, e.label) for e in examples] == [
        ("2", "2.txt", "text 2", None),
        ("10", "10.txt", "text 10", None),
    ]
    with pytest.raises(UserError, match=r"expected sub-folders of \.txt files"):
        list(read_texts(tmp_path))


# ---- the way out


def test_a_file_in_a_windows_encoding_is_told_how_to_become_utf_8(tmp_path):
    file = write(tmp_path / "a.csv", "text,label\nfein,1\nschön,0\nübel,0\n".encode("cp1252"))
    said = refused(pairs, file)
    assert "a.csv:3: not valid UTF-8 (byte 0xf6 at character 4) (and 1 more bad row); if Excel or Windows" in said
    assert "wrote it: --encoding cp1252 (western Europe), cp1251 (Cyrillic), gb18030 (Chinese)" in said
    assert "or iconv -f CP1252 -t UTF-8 OLD > NEW; --skip-bad-rows" in said
    bad = BadRows(file, skip=True)
    assert pairs(file, bad) == [("fein", "1")] and "iconv -f CP1252" in bad.summary()
    for name in ("a.jsonl", "a.txt"):  # whose encoding no flag names
        other = write(tmp_path / name, '{"text": "schön", "label": 1}\n'.encode("cp1252"))
        with pytest.raises(UserError, match=r"iconv -f CP1252 .* CP1251 for Cyrillic, GB18030 for Ch") as told:
            list(read_texts(other))
        assert "--encoding" not in str(told.value)
    lone = json_lines(tmp_path / "a.jsonl", {"text": "\ud800", "label": 1}, {"text": "fine", "label": 1})
    assert "lone surrogate" in refused(pairs, lone) and "iconv" not in refused(pairs, lone)


def test_nothing_is_said_of_leaving_out_all_there_is(tmp_path):
    said = refused(pairs, write(tmp_path / "a.csv", "text,label\nfein,\nübel,\n"))
    assert said.endswith("a.csv:2: the label is missing (all 2 rows are bad)")
    assert refused(pairs, write(tmp_path / "a.csv", "text,label\nfein,\n")).endswith(
        "a.csv:2: the label is missing"
    )
    file = write(tmp_path / "a.csv", "text,label\nfine,2\ndull,3\n")
    with pytest.raises(UserError, match=r"'2'; known: 0, 1\) \(all 2 rows are bad\)$"):
        list(Classify(labels=("0", "1")).read(file, BadRows(file)))


# ---- files that are small on the disk only


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.tsv.gz", "a.txt.gz"])
def test_a_line_that_no_memory_holds_is_not_read_whole(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text_lines, "MAX_ROW_BYTES", 1 << 16)
    monkeypatch.setattr(text_lines, "BLOCK_BYTES", 1 << 14)
    first = "[" if ".json." in name else '{"text": "fine"}' if "json" in name else "text"
    content = f'{first}\n{{"text": "{"x" * (1 << 20)}"}}\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(content))
    assert f"{name}:2: the line is longer than 128 MiB; " in refused(pairs, tmp_path / name)
    (tmp_path / name).write_bytes(gzip.compress(content.replace(b"x" * 1000, b"") * 2))
    assert "longer" not in refused(pairs, tmp_path / name), "lines are measured one by one"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_a_line_of_an_uncompressed_file_may_be_as_long_as_the_file(tmp_path, monkeypatch, name):
    """`json.dump(rows, file)` writes one line, whatever its length."""
    monkeypatch.setattr(text_lines, "MAX_ROW_BYTES", 1 << 16)
    monkeypatch.setattr(text_lines, "BLOCK_BYTES", 1 << 14)
    text = "x" * (1 << 18)
    row = json.dumps({"text": text, "label": "1"})
    content = {"a.json": f"[{row}]", "a.jsonl": row, "a.csv": f"text,label\n{text},1"}[name]
    assert pairs(write(tmp_path / name, content)) == [(text, "1")]


def test_a_cell_of_many_lines_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "MAX_ROW_BYTES", 1000)
    file = write(tmp_path / "a.csv", 'text,label\n"' + "a line\n" * 1000)
    assert "a.csv:2: broken quoting (field larger than field limit (1000)" in refused(pairs, file)
