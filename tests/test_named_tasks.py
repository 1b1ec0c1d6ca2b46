"""Named tasks: found by name, written down and read again; real data sets lose no row."""

from __future__ import annotations

import json

import pytest

from electra_core.downstream.named_tasks import NAMED, choose_task, find_task
from electra_core.downstream.tagging import spans
from electra_core.downstream.task_files import task_from_json, task_to_json
from electra_core.errors import UserError
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.labelled import BadRows
from electra_core.labelled_data.squad_files import read_questions
from electra_core.labelled_data.tagged_files import read_tagged


def test_a_name_or_kind_with_the_users_columns():
    task, settings = choose_task("sts-b", Columns(text="a", header=False))
    assert settings == {"epochs": 10.0} and task.columns == Columns("a", "sentence2", "score", header=False)
    assert choose_task("tag")[0].kind == "tag" and choose_task("qa")[1] == {"epochs": 2.0}
    with pytest.raises(UserError, match="takes no columns"):
        choose_task("squad", Columns(text="a"))


@pytest.mark.parametrize("name", NAMED)
def test_named_tasks_survive_json(name):
    task = NAMED[name].task
    assert task_from_json(json.loads(json.dumps(task_to_json(task))), "x") == task


def test_unknown_tasks():
    assert find_task("classify") is None
    assert find_task("sst2") is NAMED["sst-2"] and find_task("SQuAD-2") is NAMED["squad2"]
    with pytest.raises(UserError, match="did you mean 'cola'"):
        find_task("colla")


# Rows and counts published with the data sets (see the folder's README).
GLUE_ROWS = {
    "CoLA": (8551, 1043, 1063), "SST-2": (67349, 872, 1821), "MRPC": (3668, 408, 1725),
    "STS-B": (5749, 1500, 1379), "RTE": (2490, 277, 3000), "WNLI": (635, 71, 146),
}  # fmt: skip


@pytest.mark.data
@pytest.mark.parametrize("name", GLUE_ROWS)
def test_real_glue_files_lose_no_row(name, data_dir):
    folder = data_dir / "glue" / name
    if not folder.exists():
        pytest.skip(f"{folder} is not there (ELECTRA_DATA)")
    named = find_task(name)
    counts = []
    for split in ("train", "dev", "test"):
        file = named.find(folder, split)
        examples = list(named.task.read(file, BadRows(file), labelled=split != "test"))
        counts.append(len(examples))
        if split != "test" and named.task.kind == "classify":
            assert {example.label for example in examples} == set(named.task.labels)
    assert tuple(counts) == GLUE_ROWS[name]


@pytest.mark.data
def test_real_conll_has_the_published_counts(data_dir):
    if not (data_dir / "conll2003").exists():
        pytest.skip("conll2003 is not there (ELECTRA_DATA)")
    examples = list(read_tagged(data_dir / "conll2003/eng.testa"))
    assert len(examples) == 3250
    assert sum(len(e.words) for e in examples) == 51362
    assert sum(len(spans(e.tags)) for e in examples) == 5942


@pytest.mark.data
def test_real_squad_has_the_published_counts(data_dir):
    if not (data_dir / "squad").exists():
        pytest.skip("squad is not there (ELECTRA_DATA)")
    examples = list(read_questions(data_dir / "squad/dev-v2.0.rebuilt.json"))
    assert (sum(bool(e.answers) for e in examples), sum(not e.answers for e in examples)) == (5928, 5945)
    assert all(e.context[s : s + len(t)] == t for e in examples for t, s in e.answers)
