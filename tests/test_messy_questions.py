"""Questions and multiple choice as people really have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_messy_rows import json_lines, write

from electra_core.errors import UserError
from electra_core.squad_files import read_questions

ROW = {"question": "Who?", "context": "Ann met Bob", "answers": {"text": ["Bob"], "answer_start": [8]}}


def refusal(path: Path, **more) -> str:
    with pytest.raises(UserError) as caught:
        list(read_questions(path, **more))
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert "a.jsonl:1: expected a list of answers, or text and answer_start of equal length" in refusal(file)


def test_to_predict_answers_do_not_matter(tmp_path):
    file = json_lines(tmp_path / "a.jsonl", {**ROW, "answers": {"text": ["Eve"], "answer_start": [0]}}, ROW)
    assert [example.answers for example in read_questions(file, labelled=False)] == [None, None]
    assert "a.jsonl:1: the answer does not occur in the context ('Eve')" in refusal(file)


def test_questions_without_an_id_are_called_by_their_place(tmp_path):
    file = json_lines(tmp_path / "a.jsonl", {**ROW, "id": None}, {**ROW, "id": ""}, {**ROW, "id": 7})
    assert [example.id for example in read_questions(file)] == ["1", "2", "7"]
    place = "data[0].paragraphs[0].qas[0]"
    file = in_squad(tmp_path / "a.json", question="Who?", answers=[])
    assert [example.id for example in read_questions(file)] == [place]
    file = in_squad(tmp_path / "a.json", question="Who?", answers=[], id="\ud800")
    assert f"a.json:{place}: id: not valid UTF-8" in refusal(file)


@pytest.mark.parametrize("start", [3, -5, "8", 8.0, 10**9, None])
def test_a_wrong_start_is_put_right_where_the_answer_occurs(tmp_path, start):
    answers = {"text": ["Bob"], "answer_start": None if start is None else [start]}
    file = json_lines(tmp_path / "a.jsonl", {**ROW, "answers": answers})
    assert next(read_questions(file)).answers == (("Bob", 8),)
