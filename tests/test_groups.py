"""Rows that belong together (--group-column) are held out together, or trained on together."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from finetune_runs import QUICK, Killed, at_step, killed, model, without_times  # noqa: F401

from electra_core import UserError
from electra_core.cli import main
from electra_core.downstream.choices import Choose
from electra_core.downstream.classify import Classify, Regress
from electra_core.downstream.in_memory import as_files
from electra_core.downstream.interface import Task
from electra_core.downstream.multilabel import MultiLabel
from electra_core.downstream.named_tasks import for_reading
from electra_core.downstream.tagging import Tag
from electra_core.downstream.task_files import load_task, task_to_json
from electra_core.finetune import finetune
from electra_core.finetuning import dev_split
from electra_core.finetuning.data import read_data
from electra_core.finetuning.settings import FinetuneSettings
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.groups import groups_of
from electra_core.labelled_data.labelled import BadRows, TextExample
from electra_core.predict import evaluate, load

BY_PATIENT = Columns(group="patient")
SETTINGS = FinetuneSettings()


def rows(count: int = 200, patients: int = 40) -> list[dict[str, Any]]:
    """Texts of `patients`, in no order."""
    draw = random.Random(0)
    return [
        {"text": f"note {n}", "label": "ab"[n % 2], "patient": f"p{draw.randrange(patients)}"}
        for n in range(count)
    ]


def held_out(
    task: Task, file: Path, dev: Path | None = None, lines: list[str] | None = None
) -> tuple[list[Any], list[Any]]:
    _, train, dev_examples, _ = read_data(task, file, dev, SETTINGS, (lines if lines is not None else []).append)
    return train, dev_examples


def as_json_lines(path: Path, some: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return path


def delimited(path: Path, some: list[dict[str, Any]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, some[0].keys(), delimiter="\t" if ".tsv" in path.name else ",")
        writer.writeheader()
        writer.writerows(some)
    return path


def compressed(path: Path, some: list[dict[str, Any]]) -> Path:
    plain = delimited(path.with_suffix(""), some)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


def parquet(path: Path, some: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as files

    files.write_table(pyarrow.Table.from_pylist(some), path)
    return path


@pytest.mark.parametrize(
    "write, name",
    [
        (delimited, "a.csv"), (delimited, "a.tsv"), (compressed, "a.csv.gz"), (as_json_lines, "a.jsonl"),
        (parquet, "a.parquet"),
    ],
)  # fmt: skip
def test_a_group_is_on_one_side(write: Callable[..., Path], name: str, tmp_path: Path) -> None:
    some = rows()
    of_text = {row["text"]: row["patient"] for row in some}
    lines: list[str] = []
    train, dev = held_out(Classify(columns=BY_PATIENT), write(tmp_path / name, some), lines=lines)
    patients = [{of_text[example.text] for example in part} for part in (train, dev)]
    assert patients[0].isdisjoint(patients[1]) and len(patients[0] | patients[1]) == len({*of_text.values()})
    assert len(train) + len(dev) == 200 and 15 <= len(dev) <= 20
    count = Counter(example.label for example in dev)
    assert min(count.values()) >= 8, "and each class still has about its share"
    all_patients = len({*of_text.values()})
    said = f"held out {len(patients[1])} of {all_patients} groups, with {len(dev)} of 200 examples"
    assert [line for line in lines if line.endswith(said)]
    assert held_out(Classify(columns=BY_PATIENT), tmp_path / name)[1] == dev


def test_without_the_column_groups_are_torn_apart(tmp_path: Path) -> None:
    """So the test above can fail; and a column that is not named changes nothing."""
    file = as_json_lines(tmp_path / "a.jsonl", rows())
    of_text = {row["text"]: row["patient"] for row in rows()}
    train, dev = held_out(Classify(), file)
    assert {of_text[e.text] for e in train} & {of_text[e.text] for e in dev} and len(dev) == 20
    bare = as_json_lines(tmp_path / "b.jsonl", [{**row, "patient": ""} for row in rows()])
    assert held_out(Classify(), bare)[1] == dev


def test_the_column_may_have_a_number(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("".join(f"{row['patient']},{row['text']},{row['label']}\n" for row in rows()))
    by_number = Classify(columns=Columns(text=2, label=3, group=1))
    named = delimited(tmp_path / "b.csv", rows())
    expected = [example.text for example in held_out(Classify(columns=BY_PATIENT), named)[1]]
    assert [example.text for example in held_out(by_number, file)[1]] == expected
    header = tmp_path / "c.csv"  # no usual name in it; the group's tells that it is one
    header.write_text("patient,note,diagnosis\n" + file.read_text())
    by_both = Classify(columns=Columns(text=2, label=3, group="patient"))
    assert [example.text for example in held_out(by_both, header)[1]] == expected


def test_copies_join_the_groups_they_are_in(tmp_path: Path) -> None:
    """p0's text is p1's, and another of p1's is p2's: all three are one."""
    some = rows()
    for source, patient in ((0, "x0"), (1, "x1")):
        some[source]["patient"] = patient
        some.append({**some[source], "text": some[source]["text"].upper(), "patient": f"x{source + 1}"})
    for _ in range(40):  # more of the three than a tenth, so that nothing of them is held out
        some.append({"text": f"more {len(some)}", "label": "a", "patient": f"x{len(some) % 3}"})
    train, _ = held_out(Classify(columns=BY_PATIENT), as_json_lines(tmp_path / "a.jsonl", some))
    assert sum(example.text.startswith("more") for example in train) == 40
    assert {"note 0", "NOTE 0", "note 1", "NOTE 1"} <= {example.text for example in train}


def test_neither_a_text_nor_a_group_is_on_both_sides() -> None:
    """However texts and groups are joined, and in whatever order."""
    draw = random.Random(0)
    for _ in range(50):
        named = [draw.choice([None, *"abcdefghijklmnopqrst"]) for _ in range(24)]
        some = [TextExample(str(n), n + 1, f"text {draw.randrange(20)}") for n in range(len(named))]
        train, dev = ({e.line - 1 for e in part} for part in dev_split.split(some, "a.csv", named=named))
        assert dev and {some[n].text for n in train}.isdisjoint(some[n].text for n in dev)
        assert {named[n] for n in train} & {named[n] for n in dev} <= {None}


def test_rows_without_a_group_stand_alone(tmp_path: Path) -> None:
    some = rows()
    for row, nothing in zip(some[::2], [None, "", " ", float("nan")] * 25):
        row["patient"] = nothing
    del some[0]["patient"]
    lines: list[str] = []
    _, dev = held_out(Classify(columns=BY_PATIENT), as_json_lines(tmp_path / "a.jsonl", some), lines=lines)
    assert len(dev) == 20 and any(line.endswith("examples; 100 belong to no group") for line in lines)


@pytest.mark.parametrize(
    "task, add",
    [
        (MultiLabel(columns=BY_PATIENT), {}),
        (Regress(columns=BY_PATIENT), {}),
        (Classify(columns=replace(BY_PATIENT, text="text", pair="other")), {"other": "the same"}),
        (Choose(columns=BY_PATIENT), {"choices": ["a", "b"], "label": 0}),
        (Tag(columns=BY_PATIENT), {"tokens": ["Ann", "left"], "tags": ["B-PER", "O"]}),
    ],
    ids=["multilabel", "regress", "pairs", "choose", "tag"],
)
def test_any_task_on_rows_has_groups(task: Task, add: dict[str, Any], tmp_path: Path) -> None:
    some = [{**row, **add} for row in rows()]
    if isinstance(task, Regress):
        some = [{**row, "label": number} for number, row in enumerate(some)]
    if isinstance(task, Tag):
        some = [{**row, "tokens": [row["text"], "left"], "text": None} for row in some]
    train, dev = held_out(task, as_json_lines(tmp_path / "a.jsonl", some))
    patients = [{some[example.line - 1]["patient"] for example in part} for part in (train, dev)]
    assert dev and patients[0].isdisjoint(patients[1])


def test_sentences_of_a_table_with_a_row_per_word_have_groups(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    words = [f"{n},w{n}x{k},{'OB'[k % 2]},d{n % 20}\n" for n in range(100) for k in range(3)]
    file.write_text("sentence_id,word,tag,document\n" + "".join(words))
    train, dev = held_out(Tag(columns=Columns(group="document")), file)
    documents = [{int(example.words[0][1:].split("x")[0]) % 20 for example in part} for part in (train, dev)]
    assert (len(dev), len(documents[1])) == (10, 2) and documents[0].isdisjoint(documents[1])


def test_what_cannot_have_groups_is_refused(tmp_path: Path) -> None:
    file, other = as_json_lines(tmp_path / "a.jsonl", rows()), as_json_lines(tmp_path / "b.jsonl", rows(20))
    with pytest.raises(UserError, match=r"^--group-column: no effect with dev\b"):
        held_out(Classify(columns=BY_PATIENT), file, other)
    known = "the columns are text, label, patient"
    with pytest.raises(UserError, match=f"a.jsonl: no group column 'doctor'; {known}; name .* --group-column"):
        held_out(Classify(columns=Columns(group="doctor")), file)
    for label in ("neg", "pos"):
        (tmp_path / "texts" / label).mkdir(parents=True)
        for n in range(3):
            (tmp_path / "texts" / label / f"{n}.txt").write_text(f"{label} {n}")
    tagged = tiny_model.names_to_tag(tmp_path / "a.conll", 20)
    for task, source in ((Classify(), tmp_path / "texts"), (Tag(), tagged)):
        with pytest.raises(UserError, match=r"--group-column: no effect with .*, which is no table; exp"):
            held_out(replace(task, columns=BY_PATIENT), source)  # type: ignore[type-var]
    lists = as_json_lines(tmp_path / "c.jsonl", [{**row, "patient": [1]} for row in rows()])
    with pytest.raises(UserError, match=r"c.jsonl:1: column 'patient': expected one value per row, got a list"):
        held_out(Classify(columns=BY_PATIENT), lists)
    one = as_json_lines(tmp_path / "d.jsonl", [{**row, "patient": 7} for row in rows()])
    with pytest.raises(UserError, match="200 examples that all belong together cannot be split; give a dev file"):
        held_out(Classify(columns=BY_PATIENT), one)


@pytest.mark.parametrize("as_stdin", [True, False])
def test_a_pipe_can_be_read_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_stdin: bool) -> None:
    pipe = tmp_path / "a.jsonl"
    os.mkfifo(pipe)
    text = "".join(json.dumps(row) + "\n" for row in rows())
    writer = threading.Thread(target=lambda: pipe.write_text(text), daemon=True)
    writer.start()
    with monkeypatch.context() as patch, open(pipe) if as_stdin else nullcontext() as stdin:
        if stdin is not None:
            patch.setattr("sys.stdin", stdin)
        source, name = (Path("-"), "standard input") if as_stdin else (pipe, "a.jsonl")
        with pytest.raises(UserError, match=f"{name}: cannot be read twice, which --group-column needs; exp"):
            held_out(Classify(columns=BY_PATIENT), source)
    writer.join()


def test_a_model_trained_with_groups_reads_files_that_can_have_none(tmp_path: Path) -> None:
    kinds = [f"{mark}-{kind}" for kind in ("PER", "PRAISE") for mark in "BI"]
    task = Tag(labels=("O", *kinds), columns=Columns(group="document"))
    tagged = tiny_model.names_to_tag(tmp_path / "a.conll", 20)
    assert len(list(for_reading(task, Columns()).read(tagged, BadRows(tagged)))) == 20


def test_rows_in_memory_have_groups_and_python_s_words(tmp_path: Path) -> None:
    expected = held_out(Classify(columns=BY_PATIENT), as_json_lines(tmp_path / "a.jsonl", rows()))[1]
    with as_files(print, Classify(columns=BY_PATIENT), train=rows()) as (files, _):
        assert held_out(Classify(columns=BY_PATIENT), files["train"])[1] == expected
    with pytest.raises(UserError, match=r"name another with Columns\(group=...\)"):
        with as_files(print, Classify(columns=BY_PATIENT), train=rows()) as (files, _):
            held_out(Classify(columns=Columns(group="doctor")), files["train"])


def test_a_training_with_groups_is_resumed_as_itself_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    file = delimited(tmp_path / "a.csv", [{**row, "text": f"film {row['text']}"} for row in rows()])
    task, settings = Classify(columns=BY_PATIENT), replace(QUICK, epochs=1, evaluations=2)

    def train(out: str, task: Task = task, **more: Any) -> dict[str, Any]:
        return finetune(model, task, file, None, tmp_path / out, settings, quiet=True, **more)

    whole = train("whole", cache=tmp_path / "cache")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 8, killed)
        train("out")
    with pytest.raises(UserError, match=r"columns was \{.*'group': 'patient'.*, is now"):
        train("out", Classify(), resume=True)
    assert without_times(train("out", resume=True)) == without_times(whole)
    saved = load_task(tmp_path / "out")
    assert isinstance(saved, Classify) and saved.columns.group == "patient"
    bare = delimited(tmp_path / "new.csv", [{"text": "a film", "label": "a"}] * 3)
    assert evaluate(load(tmp_path / "out"), bare).metrics.keys() >= {"accuracy"}, "no such column is needed later"


def test_the_first_rows_of_json_lines_may_lack_the_column(tmp_path: Path) -> None:
    some = rows(300)
    late = [row if n >= 250 else {k: v for k, v in row.items() if k != "patient"} for n, row in enumerate(some)]
    file = as_json_lines(tmp_path / "a.jsonl", late)
    for column in ("patient", 3):
        task = Classify(columns=Columns(group=column))
        found = groups_of(file, task.columns, list(task.read(file, BadRows(file))))
        assert found == [None] * 250 + [row["patient"] for row in some[250:]]


def test_a_task_without_groups_is_described_as_before() -> None:
    """Its description is part of what a checkpoint and the cache of tokens are recognised by."""
    described = task_to_json(Classify())["columns"]
    assert described == {role: value for role, value in asdict(Columns()).items() if role != "group"}
    assert "group" not in described and task_to_json(Classify(columns=BY_PATIENT))["columns"]["group"] == "patient"


def test_on_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = delimited(tmp_path / "a.csv", rows())
    command = ["finetune", "--model", str(model), "--task", "classify", "--train", str(file), "--out",
               str(tmp_path / "out"), "--epochs", "1", "--quiet", "--group-column", "patient"]  # fmt: skip
    assert main([*command, "--dev", str(file)]) == 2
    assert "electra finetune: --group-column: no effect with --dev" in capsys.readouterr().err
    assert main(command) == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    expected = held_out(Classify(columns=BY_PATIENT), file)
    assert (report["train_examples"], report["dev_examples"]) == tuple(map(len, expected))
