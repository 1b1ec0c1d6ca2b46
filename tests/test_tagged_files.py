"""Files of tagged words: columns and lists give the same examples, every bad one is named with file and line."""

from __future__ import annotations

import json

import pytest
from reading import write

from electra_core.downstream.tagging import spans, to_iob2
from electra_core.errors import UserError
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.labelled import BadRows
from electra_core.labelled_data.tagged_files import read_tagged

CONLL = "-DOCSTART- -X- O O\n\nEU NNP B-NP I-ORG\nrejects VBZ B-VP O\n\n\nPeter NNP B-NP I-PER\n"


def test_conll_columns(tmp_path):
    file = write(tmp_path / "a.conll", CONLL)
    assert [(e.line, e.words, e.tags) for e in read_tagged(file)] == [
        (3, ("EU", "rejects"), ("I-ORG", "O")),
        (7, ("Peter",), ("I-PER",)),
    ]
    assert [e.tags for e in read_tagged(file, Columns(label="2"))] == [("NNP", "VBZ"), ("NNP",)]
    lists = {"tokens": ["EU", "rejects"], "tags": ["I-ORG", "O"]}
    as_json = write(tmp_path / "a.jsonl", json.dumps(lists) + "\n")
    assert next(read_tagged(as_json)).tags == ("I-ORG", "O")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.conll", CONLL + "lonely\n", "a.conll:7: a word without a tag"),
        ("a.conll", CONLL + "two NNP\n", r"a.conll:7: expected 4 columns as before, got 2 \(line 8\)"),
        (
            "a.jsonl",
            '{"words": ["a", "b"], "tags": ["O"]}\n',
            r"a.jsonl:1: tag count .* \(1 tags, 2 words\)",
        ),
        ("a.jsonl", '{"words": ["a"]}\n', "a.jsonl:1: no list of tags"),
        ("a.jsonl", '{"words": [], "tags": []}\n', "a.jsonl:1: no list of words"),
        ("a.jsonl", '{"words": ["a", ""], "tags": ["O", "O"]}\n', "a.jsonl:1: a word is empty or not text"),
        ("a.jsonl", '{"words": ["a", null], "tags": ["O", "O"]}\n', "a.jsonl:1: a word is empty or not text"),
        ("a.jsonl", '{"words": ["\\ud800"], "tags": ["O"]}\n', "a.jsonl:1: not valid UTF-8"),
        ("a.jsonl", '{"id": 7, "words": ["a"], "tags": ["O"]}\n' * 2, r"a.jsonl:2: duplicate id \(7\)"),
    ],
    ids=[
        "no tag",
        "columns differ",
        "counts differ",
        "no tags",
        "no words",
        "empty word",
        "null",
        "surrogate",
        "id",
    ],
)
def test_bad_tagged_rows(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        list(read_tagged(write(tmp_path / name, content)))
    assert "\n" not in str(caught.value)


def test_bad_tagged_rows_may_be_skipped(tmp_path):
    rows = [
        '{"id": 1, "words": ["a"], "tags": ["O"]}',
        '{"id": 1, "words": ["b"], "tags": ["O"]}',
        '{"words": ["c"]}',
    ]
    file = write(tmp_path / "a.jsonl", "\n".join(rows) + "\n")
    bad = BadRows(file, skip=True)
    assert [example.words for example in read_tagged(file, bad=bad)] == [("a",)]
    assert bad.count == 2 and "duplicate id (1)" in bad.summary() and "a.jsonl:3: no list of tags" in bad.summary()
    unlabelled = read_tagged(file, bad=BadRows(file, skip=True), labelled=False)
    assert len(list(unlabelled)) == 3  # prediction keeps no ids


@pytest.mark.parametrize(
    "tags, expected",
    [
        (["I-A", "I-A", "B-A", "I-B", "O", "I-A"], ["B-A", "I-A", "B-A", "B-B", "O", "B-A"]),  # IOB1
        (["B-A", "I-A", "O", "B-A"], ["B-A", "I-A", "O", "B-A"]),  # IOB2 stays
        (["S-A", "B-B", "I-B", "E-B", "S-B", "O"], ["B-A", "B-B", "I-B", "I-B", "B-B", "O"]),  # IOBES
        (["B-A", "L-A", "I-A"], ["B-A", "I-A", "B-A"]),  # what follows the end of a span is a new one
    ],
)
def test_notations_of_spans(tags, expected):
    assert to_iob2(tags) == expected
    assert to_iob2(expected) == expected
    assert spans(tags) == spans(expected)
