"""Questions and multiple choice as people really have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reading import json_lines, refused, write

from electra_core.downstream.choices import Choose, read_choices
from electra_core.labelled_data.squad_files import read_questions

ROW = {"question": "Who?", "context": "Ann met Bob", "answers": {"text": ["Bob"], "answer_start": [8]}}


def in_squad(path: Path, **qa) -> Path:
    return write(path, json.dumps({"data": [{"paragraphs": [{"context": "Ann met Bob", "qas": [qa]}]}]}))


@pytest.mark.parametrize(
    "content",
    [json.dumps([ROW, ROW]), json.dumps([ROW, ROW], indent=1), f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n"],
    ids=["array", "over many lines", "a row per line"],
)
def test_a_json_file_may_hold_rows(tmp_path, content):
    examples = list(read_questions(write(tmp_path / "a.json", content)))
    assert [(e.id, e.answers) for e in examples] == [("1", (("Bob", 8),)), ("2", (("Bob", 8),))]
    assert len(list(read_questions(write(tmp_path / "a.json", json.dumps(ROW))))) == 1


@pytest.mark.parametrize(
    "answers",
    [{"texts": ["Bob"]}, {"text": "Bob"}, {"text": ["Bob"], "answer_start": []}, "Bob", {}],
    ids=["another key", "no list", "fewer starts", "a text", "nothing"],
)
def test_answers_in_another_form_are_not_taken_for_none(tmp_path, answers):
    file = json_lines(tmp_path / "a.jsonl", {**ROW, "answers": answers})
    assert "a.jsonl:1: expected a list of answers, or text and answer_start of equal length" in refused(
        read_questions, file
    )


def test_to_predict_answers_do_not_matter(tmp_path):
    file = json_lines(tmp_path / "a.jsonl", {**ROW, "answers": {"text": ["Eve"], "answer_start": [0]}}, ROW)
    assert [example.answers for example in read_questions(file, labelled=False)] == [None, None]
    assert "a.jsonl:1: the answer is not in the context ('Eve')" in refused(read_questions, file)


def test_questions_without_ids_are_called_by_their_place(tmp_path):
    file = json_lines(tmp_path / "a.jsonl", {**ROW, "id": None}, {**ROW, "id": " "}, {**ROW, "id": 7})
    assert [example.id for example in read_questions(file)] == ["", "", "7"]
    bare = {name: value for name, value in ROW.items() if name != "id"}
    assert [example.id for example in read_questions(json_lines(file, bare, bare))] == ["1", "2"]
    place = "data[0].paragraphs[0].qas[0]"
    file = in_squad(tmp_path / "a.json", question="Who?", answers=[])
    assert [example.id for example in read_questions(file)] == [place]
    file = in_squad(tmp_path / "a.json", question="Who?", answers=[], id="\ud800")
    assert f"a.json:{place}: id: not valid UTF-8" in refused(read_questions, file)


@pytest.mark.parametrize("start", [3, -5, "8", 8.0, 10**9, None])
def test_a_wrong_start_is_put_right_where_the_answer_occurs(tmp_path, start):
    answers = {"text": ["Bob"], "answer_start": None if start is None else [start]}
    file = json_lines(tmp_path / "a.jsonl", {**ROW, "answers": answers})
    assert next(read_questions(file)).answers == (("Bob", 8),)


ONE = {"question": "Who?", "context": "Bob, Ann met Bob"}


@pytest.mark.parametrize("name", ["answer", "answer_text"])
@pytest.mark.parametrize(
    "start, found", [(13, 13), ("13", 13), (13.0, 13), ("13.0", 13), (12, 13), (None, 0), ("", 0)]
)
def test_a_row_may_have_one_answer(tmp_path, name, start, found):
    file = json_lines(tmp_path / "a.jsonl", {**ONE, name: "Bob", "answer_start": start}, {**ONE, name: ""})
    assert [example.answers for example in read_questions(file)] == [(("Bob", found),), ()]


def test_one_answer_in_a_table(tmp_path):
    rows = (
        "question,context,answer,answer_start\nWho?,Ann met Bob,Bob,8\nWho?,Ann met Bob,Bob,\nWhy?,Ann met Bob,,\n"
    )
    for file in (write(tmp_path / "a.csv", rows), write(tmp_path / "a.tsv", rows.replace(",", "\t"))):
        assert [e.answers for e in read_questions(file)] == [(("Bob", 8),), (("Bob", 8),), ()]
    file = write(tmp_path / "a.csv", "question,context,answer\nWho?,Ann met Bob,Eve\nWho?,Ann met Bob,Bob\n")
    assert "a.csv:2: the answer is not in the context ('Eve')" in refused(read_questions, file)


def test_the_form_of_answers_is_told_where_they_are_missing(tmp_path):
    said = refused(read_questions, json_lines(tmp_path / "a.jsonl", {**ONE, "solution": "Bob"}, ROW))
    assert 'a.jsonl:1: the answers are missing (expected answers: {"text": [...], "answer_start": [...]}' in said
    assert "or answer: a text, empty where there is none)" in said
    assert next(read_questions(json_lines(tmp_path / "a.jsonl", {**ROW, "answer": "Ann"}))).answers == (
        ("Bob", 8),
    )


# ---- multiple choice

CHOICE = {"question": "Which?", "choices": ["x", "y", "z"], "label": 2}


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("answer, expected", [("2", 1), (3, 2), ("1", 0)])
def test_choices_that_have_names_are_found_by_them(tmp_path, answer, expected, as_list):
    choices = {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}
    if as_list:
        choices = [{"text": text, "label": label} for text, label in zip(*choices.values())]
    file = json_lines(tmp_path / "a.jsonl", {"question": "Which?", "choices": choices, "answerKey": answer})
    example = next(read_choices(file))
    assert (example.choices, example.label) == (("x", "y", "z"), expected)


@pytest.mark.parametrize("label, expected", [("two words", 0), ("x", 2), ("B", 1), ("2", 2)])
def test_a_label_may_be_the_choice_itself(tmp_path, label, expected):
    """Where it is neither a number nor the letter of one."""
    choices = ["two words ", "2", "x"]
    file = json_lines(tmp_path / "a.jsonl", {"question": "Which?", "choices": choices, "label": label})
    assert next(read_choices(file)).label == expected
    twice = json_lines(tmp_path / "b.jsonl", {"question": "Which?", "choices": ["no", "no"], "label": "no"})
    assert "the label matches no choice ('no' of 2)" in refused(read_choices, twice)


@pytest.mark.parametrize("label", ["ß", "²", "-1", "3", 3, "D", "xy"])
def test_labels_that_name_no_choice(tmp_path, label):
    file = json_lines(tmp_path / "a.jsonl", {**CHOICE, "label": label})
    assert f"a.jsonl:1: the label matches no choice ('{label}' of 3" in refused(read_choices, file)
    assert next(read_choices(file, labelled=False)).label is None


def test_a_label_that_is_not_among_the_names(tmp_path):
    choices = {"text": ["x", "y"], "label": ["1", "2"]}
    file = json_lines(tmp_path / "a.jsonl", {"question": "Which?", "choices": choices, "answerKey": "0"})
    assert "the label matches no choice ('0' of 2; their names are 1, 2)" in refused(read_choices, file)


@pytest.mark.parametrize(
    "choice, what", [(None, "empty"), (" ", "empty"), (["y"], "a list"), ({"text": "y"}, "a dict")]
)
def test_choices_are_texts(tmp_path, choice, what):
    file = json_lines(tmp_path / "a.jsonl", {**CHOICE, "choices": ["x", choice, "z"]})
    assert f"a.jsonl:1: a choice is {what}" in refused(read_choices, file) and "(choice 1)" in refused(
        read_choices, file
    )


def test_rows_of_hellaswag(tmp_path):
    row = {"ind": 24, "ctx_a": "He sits.", "ctx": "He sits. he", "endings": ["x", "y"], "label": "1"}
    example = next(read_choices(json_lines(tmp_path / "a.jsonl", row)))
    assert (example.text, example.choices, example.label) == ("He sits. he", ("x", "y"), 1)


def test_numbers_as_choices_and_rows_without_an_id(tmp_path):
    file = json_lines(tmp_path / "a.jsonl", *[{**CHOICE, "choices": [1, 2.5, 3], "id": None}] * 2)
    assert [(e.id, e.choices) for e in read_choices(file)] == [("", ("1", "2.5", "3"))] * 2
    file = json_lines(tmp_path / "a.jsonl", *[{**CHOICE, "choices": ["a", "b", "c"]}] * 2)
    assert [e.id for e in read_choices(file)] == ["1", "2"]


@pytest.mark.parametrize("value", [("Which?", "xyz"), ("Which?", [1, 2]), ("Which?", []), {"text": "Which?"}])
def test_a_pipeline_takes_lists_of_texts_as_choices(value):
    with pytest.raises(ValueError, match="expected a text and its endings"):
        Choose().from_value(value, "1")
