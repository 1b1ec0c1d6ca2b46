"""Reads questions on a context with their answers in the usual formats.

These are SQuAD's JSON (articles of paragraphs of questions), and rows (JSON lines or arrays, CSV, TSV, Parquet,
the Hub) with question, context and answers, or one answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from electra_core.errors import UserError
from electra_core.files.row_files import format_of, read_rows
from electra_core.files.text_lines import read_lines, text_problem
from electra_core.labelled_data.labelled import BadRows, Ids, checked, has_id

ONE_ANSWER = ("answer", "answer_text")
"""Fields that hold the answer's text in a row without `answers`."""
NO_ANSWERS = (
    'the answers are missing (expected answers: {"text": [...], "answer_start": [...]}, or answer: a text, '
    "empty where there is none)"
)


@dataclass(frozen=True, slots=True)
class QuestionExample:
    """A question on a context. `answers` are (text, first character); an empty tuple means no answer."""

    id: str
    """ "" if the row has none though the file has ids."""
    place: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] | None = None
    """None: unknown. Empty: known to have no answer in the context."""


def read_questions(
    path: Path | str, bad: BadRows | None = None, *, labelled: bool = True
) -> Iterator[QuestionExample]:
    """Questions of a SQuAD JSON file, or of rows with question, context and answers.

    The rows' `answers` are {"text": [...], "answer_start": [...]}, as the Hub stores SQuAD. A row may instead have
    a text in `answer` or `answer_text` ("": the context holds no answer), and its first character in
    `answer_start`; without it, the answer's first occurrence counts.

    Args:
        bad: receives questions that cannot be used; without it they raise at the end of the file.
        labelled: whether every question must have answers (an empty list will do); if not, they are not read.

    Raises:
        UserError: file unreadable, not in one of these formats, empty, or with bad questions.
    """
    path = Path(path)
    bad = bad or BadRows(path)
    records = _json_records(path, bad) if format_of(path) == ".json" else _row_records(path, bad)
    yield from checked(path, _examples(records, bad, labelled), bad)


Record = tuple[str, dict[str, Any]]
"""Its place, and the fields id, question, context, answers (a list of {"text", "answer_start"} or None)."""


def _json_records(path: Path, bad: BadRows) -> Iterator[Record]:
    """Records of a .json file: SQuAD's format, an array of rows, or a row per line."""
    try:
        content = json.loads("\n".join(line for _, line in read_lines(path)))
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") != "Extra data":
            raise UserError(f"{path}: not SQuAD's JSON format ({error})") from None
        return _row_records(path, bad)
    if isinstance(content, list) or (isinstance(content, dict) and "question" in content):
        return _row_records(path, bad)
    return _squad_records(path, content)


def _squad_records(path: Path, content: Any) -> Iterator[Record]:
    try:
        for a, article in enumerate(content["data"]):
            for p, paragraph in enumerate(article["paragraphs"]):
                for q, qa in enumerate(paragraph["qas"]):
                    place = f"data[{a}].paragraphs[{p}].qas[{q}]"
                    answers = [] if qa.get("is_impossible") else qa.get("answers")
                    yield place, {**qa, "context": paragraph["context"], "answers": answers}
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: not SQuAD's JSON format ({reason})") from None


def _row_records(path: Path, bad: BadRows) -> Iterator[Record]:
    for row in read_rows(path):
        if row.problem:
            bad.add(row.line, row.problem)
        else:
            yield str(row.line), {**row.cells, "answers": _as_list(_answers_of(row.cells))}


def _answers_of(cells: dict[str, Any]) -> Any:
    """A row's answers: several, or a single one in its own cells."""
    name = next((name for name in ONE_ANSWER if isinstance(cells.get(name), str)), None)
    if cells.get("answers") is not None or name is None:
        return cells.get("answers")
    start = cells.get("answer_start")
    nowhere = start is None or start == "" or start != start  # NaN, as pandas writes it
    # pandas writes whole numbers with a point if one is missing in the column.
    if isinstance(start, str) and (whole := re.fullmatch(r"\s*(\d+)\.0*\s*", start)):
        start = whole[1]
    return [{"text": cells[name], "answer_start": -1 if nowhere else start}] if cells[name].strip() else []


def _as_list(answers: Any) -> Any:
    """Turns lists of texts and of starts into a list of both; anything else stays unchanged."""
    if not isinstance(answers, dict):
        return answers
    texts, starts = answers.get("text"), answers.get("answer_start")
    if not isinstance(texts, list):
        return answers
    starts = [-1] * len(texts) if starts is None else starts
    if not isinstance(starts, list) or len(starts) != len(texts):
        return answers
    return [{"text": text, "answer_start": start} for text, start in zip(texts, starts)]


def _examples(records: Iterable[Record], bad: BadRows, labelled: bool) -> Iterator[QuestionExample]:
    ids = Ids(labelled)
    for place, fields in records:
        example, problem = _example(place, fields, labelled)
        problem = problem or ids.problem(fields.get("id"))
        if problem or example is None:
            bad.add(place, problem)
        else:
            yield example


def _example(place: str, fields: dict[str, Any], labelled: bool) -> tuple[QuestionExample | None, str]:
    name = place
    if "id" in fields:
        name = str(fields["id"]) if has_id(fields["id"]) else ""
    if text_problem(name):
        return None, f"id: {text_problem(name)}"
    question, context = fields.get("question"), fields.get("context")
    for role, text in (("question", question), ("context", context)):
        if not isinstance(text, str) or not text.strip():
            return None, f"the {role} is missing or empty"
        if text_problem(text):
            return None, f"{role}: {text_problem(text)}"
    assert isinstance(question, str) and isinstance(context, str)
    answers, problem = _answers(context, fields["answers"]) if labelled else (None, "")
    return (None, problem) if problem else (QuestionExample(name, place, question, context, answers), "")


def _answers(context: str, given: Any) -> tuple[tuple[tuple[str, int], ...], str]:
    """(answers with their places, ""), or ((), why they cannot be used)."""
    if given is None:
        return (), NO_ANSWERS
    if not isinstance(given, list):
        return (), f"expected a list of answers, or text and answer_start of equal length (got {given!r:.80})"
    answers: list[tuple[str, int]] = []
    for answer in given:
        try:
            start = _locate(context, answer["text"], int(answer.get("answer_start", -1)))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return (), f"expected an answer with text and answer_start (got {answer!r:.80})"
        if start < 0:
            return (), f"the answer is not in the context ({answer['text']!r})"
        answers.append((answer["text"], start))
    return tuple(answers), ""


def _locate(context: str, answer: str, start: int) -> int:
    """The answer's place: `start`, or else the occurrence nearest to it; -1 if there is none."""
    if not answer.strip():
        return -1
    if start >= 0 and context[start : start + len(answer)] == answer:
        return start
    places = [match.start() for match in re.finditer(re.escape(answer), context)]
    return min(places, key=lambda place: abs(place - start), default=-1)
