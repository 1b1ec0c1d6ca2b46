"""Readers meet damaged files: a little of what `fuzz.py` does at length, what it found, and any bytes at all."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from fuzz import damaged
from fuzz_readers import READERS, parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from electra_core.config import PRESETS, updated
from electra_core.corpora.shards import SPLITS, Manifest, SplitCounts
from electra_core.corpora.sources import find_sources
from electra_core.corpora.text_files import read_documents
from electra_core.errors import UserError
from electra_core.files.row_files import read_rows
from electra_core.labelled_data.columns import Columns
from electra_core.labelled_data.labelled import read_texts
from electra_core.labelled_data.squad_files import read_questions
from electra_core.labelled_data.tagged_files import read_tagged
from electra_core.pretraining.mixing import open_data
from electra_core.pretraining.run_folder import read_config

INPUTS = 12


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    reader = READERS[name](tmp_path)
    refused = 0
    for index in range(INPUTS):
        try:
            reader(random.Random(f"suite {name} {index}"))
        except UserError as error:
            refused += 1
            assert str(error).strip()
    assert refused > 0, "damages of which none is noticed are none"


def test_inputs_can_be_repeated() -> None:
    content, other = json.dumps({"a": [1, 2, {"b": "c"}]}).encode() * 3, b"0123456789"
    made = [[damaged(content, other, random.Random(f"0 {i}")) for i in range(200)] for _ in range(2)]
    assert made[0] == made[1] and len(set(made[0])) > 150


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv", ".json", ".gz"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode("utf-8", "ignore"))
    )
)
def test_any_bytes(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    for read in (
        lambda: list(read_documents(find_sources([path]))),
        lambda: list(read_rows(path)),
        lambda: list(read_texts(path, Columns())),
        lambda: list(read_tagged(path)),
        lambda: list(read_questions(path)),
    ):
        try:
            read()
        except UserError as error:
            assert str(error)


# Found by `python -m tests.fuzz` ------------------------------------------------------------------------------


def test_parquet_whose_footer_or_pages_are_damaged(tmp_path: Path) -> None:
    """The library says OSError to both."""
    whole = parquet([{"text": "some words in a row " * 50}] * 20)
    seen, path = set(), tmp_path / "a.parquet"
    for place in range(4, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        for read in (lambda: list(read_documents(find_sources([path]))), lambda: list(read_rows(path))):
            try:
                read()
            except UserError as error:
                assert "\n" not in str(error)
                seen.add("not a readable Parquet" in str(error))
    assert True in seen


@pytest.mark.parametrize(
    "answers",
    [
        "x",
        [3],
        [{}],
        [{"text": 3}],
        [{"text": "Ann", "answer_start": "."}],
        [{"text": "Ann", "answer_start": None}],
    ],
)
def test_answers_that_are_none(answers: object, tmp_path: Path) -> None:
    qa = {"id": "1", "question": "Who?", "answers": answers}
    content = {"data": [{"paragraphs": [{"context": "Ann met Bob.", "qas": [qa]}]}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError):
        list(read_questions(tmp_path / "a.json"))


@pytest.mark.parametrize(
    "content", ['{"data": ["x"]}', '{"data": [{"paragraphs": [{"context": "c", "qas": ["x"]}]}]}', "[" * 100_000]
)
def test_squad_files_of_another_build(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match="not SQuAD's JSON format"):
        list(read_questions(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_nested_too_deeply(name: str, tmp_path: Path) -> None:
    deep = sys.getrecursionlimit() * 100
    (tmp_path / name).write_text("[" * deep)
    if name == "a.jsonl":
        (row,) = read_rows(tmp_path / name)
        assert row.problem.startswith("not JSON")
    else:
        with pytest.raises(UserError, match="not JSON"):
            list(read_rows(tmp_path / name))


def test_sizes_that_no_model_has() -> None:
    for changes in ({"hidden_size": 1}, {"num_attention_heads": 0}):
        with pytest.raises(UserError, match=r"num_attention_heads: (.* does not divide|expected)"):
            updated(PRESETS["tiny"].discriminator, changes, "discriminator")


def test_toml_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(UserError, match=r"a\.toml"):
        read_config(str(tmp_path / "a.toml"))


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": []}, {"splits": {}}, {"settings": 3}, {"splits": {"train": {"shards": "1"}, "heldout": {}}}],
)
def test_manifests_with_values_of_another_type(change: dict, tmp_path: Path) -> None:
    splits = {split: SplitCounts() for split in SPLITS}
    Manifest("", 5, splits, {}, {}).write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json").vocab_size == 5
    content = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError, match="not the manifest of a corpus"):
        Manifest.read(tmp_path / "manifest.json")


def test_a_part_without_text_to_train_on(tmp_path: Path) -> None:
    Manifest("", 5, {split: SplitCounts() for split in SPLITS}, {}, {}).write(tmp_path / "manifest.json")
    with pytest.raises(UserError, match="nothing to train on"):
        open_data(tmp_path)
